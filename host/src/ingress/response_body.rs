//! An answer's body on its way to the socket. Its bytes keep the exchange open: both protocols hold a buffer until its last byte
//! is written, and drop it then.

use std::{
    convert::Infallible,
    io::IoSlice,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes};
use hyper::{
    HeaderMap, Response,
    body::{self, Frame, SizeHint},
};
use tonic::Status;

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
    /// Messages of gRPC, and the status behind them.
    Grpc(tonic::body::Body, Arc<Exchange>),
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

/// The same of a call of gRPC.
pub(super) fn respond_grpc(
    exchange: Arc<Exchange>,
    response: Response<tonic::body::Body>,
) -> Response<Outgoing> {
    response.map(|messages| Outgoing::Grpc(messages, exchange))
}

/// What a call ends with whose messages broke off.
fn status_trailers(status: &Status) -> HeaderMap {
    let mut trailers = HeaderMap::new();
    // A text that is none for a header is left out.
    let _ = status.add_header(&mut trailers);
    trailers
}

/// Bytes of a stream that are handed over to be written.
fn shared(bytes: Bytes, exchange: &Arc<Exchange>) -> Written {
    let exchange = Held::Shared(Unwritten::of(exchange, bytes.len()));
    Written { answer: bytes.into(), exchange }
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
            Self::Stream(stream, exchange) => {
                ready!(stream.poll_next(task)).map(|bytes| shared(bytes, exchange))
            }
            Self::Grpc(messages, exchange) => {
                let frame = match ready!(Pin::new(messages).poll_frame(task)) {
                    Some(Ok(frame)) => frame.map_data(|bytes| shared(bytes, exchange)),
                    Some(Err(status)) => Frame::trailers(status_trailers(&status)),
                    None => return Poll::Ready(None),
                };
                return Poll::Ready(Some(Ok(frame)));
            }
        };
        Poll::Ready(written.map(|written| Ok(Frame::data(written))))
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Whole(written) => written.is_none(),
            Self::Stream(..) => false,
            Self::Grpc(messages, _) => messages.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole(written) => {
                SizeHint::with_exact(written.as_ref().map_or(0, |written| written.remaining() as u64))
            }
            Self::Stream(..) | Self::Grpc(..) => SizeHint::default(),
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
