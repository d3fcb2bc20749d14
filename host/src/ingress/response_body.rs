//! An answer's body on its way to the socket. Its bytes keep the exchange open: both protocols hold a buffer until its last byte
//! is written, and drop it then.

use std::{
    convert::Infallible,
    io::IoSlice,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Buf;
use hyper::{
    Response,
    body::{Body, Frame, SizeHint},
};

use super::exchange::Exchange;
use crate::{egress::HttpResponse, protocol::Answer};

/// The body of an answer.
pub(super) struct Outgoing(Option<Unwritten>);

/// What is not written yet of an answer.
pub(super) struct Unwritten {
    answer: Answer,
    exchange: Exchange,
}

/// The response as it is written: its body holds the exchange until its last byte is written. Without a body the exchange ends here.
pub(super) fn respond(mut exchange: Exchange, response: HttpResponse) -> Response<Outgoing> {
    let (head, body) = response.into_parts();
    exchange.begin_answer(body.remaining());
    let unwritten = body.has_remaining().then_some(Unwritten { answer: body, exchange });
    Response::from_parts(head, Outgoing(unwritten))
}

impl Body for Outgoing {
    type Data = Unwritten;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Unwritten>, Infallible>>> {
        Poll::Ready(self.0.take().map(|unwritten| Ok(Frame::data(unwritten))))
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.0.as_ref().map_or(0, |unwritten| unwritten.remaining() as u64))
    }
}

impl Buf for Unwritten {
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
        self.exchange.progressed();
    }
}
