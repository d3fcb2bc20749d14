//! An answer's body on its way to the socket. Its bytes keep the exchange open: both protocols hold a buffer until its last byte
//! is written, and drop it then.

use std::{
    convert::Infallible,
    io::IoSlice,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::Buf;
use hyper::{
    Response,
    body::{self, Frame, SizeHint},
};

use super::exchange::{Exchange, Unwritten};
use crate::{
    egress::{Body, BodyStream, HttpResponse},
    protocol::Answer,
};

/// The body of an answer.
pub(super) enum Outgoing {
    /// `None` once it was handed over.
    Whole(Option<Written>),
    /// What is made while it is sent, with what its bytes share.
    Stream(Box<dyn BodyStream>, Arc<Exchange>),
}

/// Bytes that are handed over to be written.
pub(super) struct Written {
    answer: Answer,
    exchange: Held,
}

/// How bytes keep their exchange open.
enum Held {
    Own(Exchange),
    Shared(Unwritten),
}

/// The response as it is written: its body holds the exchange until its last byte is written. Without a body the exchange ends here.
pub(super) fn respond(mut exchange: Exchange, response: HttpResponse) -> Response<Outgoing> {
    let (head, body) = response.into_parts();
    let outgoing = match body {
        Body::Whole(answer) => {
            exchange.begin_answer(answer.remaining());
            let exchange = Held::Own(exchange);
            Outgoing::Whole(answer.has_remaining().then_some(Written { answer, exchange }))
        }
        Body::Stream(stream) => Outgoing::Stream(stream, Arc::new(exchange)),
    };
    Response::from_parts(head, outgoing)
}

impl body::Body for Outgoing {
    type Data = Written;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        task: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Written>, Infallible>>> {
        let written = match &mut *self {
            Self::Whole(written) => written.take(),
            Self::Stream(stream, exchange) => ready!(stream.poll_next(task)).map(|bytes| {
                let exchange = Held::Shared(Unwritten::of(exchange, bytes.len()));
                Written { answer: bytes.into(), exchange }
            }),
        };
        Poll::Ready(written.map(|written| Ok(Frame::data(written))))
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Self::Whole(None))
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole(written) => {
                SizeHint::with_exact(written.as_ref().map_or(0, |written| written.remaining() as u64))
            }
            Self::Stream(..) => SizeHint::default(),
        }
    }
}

impl Buf for Written {
    fn remaining(&self) -> usize {
        self.answer.remaining()
    }

    fn chunk(&self) -> &[u8] {
        self.answer.chunk()
    }

    fn chunks_vectored<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        self.answer.chunks_vectored(slices)
    }

    fn advance(&mut self, count: usize) {
        self.answer.advance(count);
        match &self.exchange {
            Held::Own(exchange) => exchange.progressed(),
            Held::Shared(unwritten) => unwritten.exchange().progressed(),
        }
    }
}
