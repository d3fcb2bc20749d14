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
    HeaderMap, Response,
    body::{self, Frame, SizeHint},
    header::HeaderValue,
};
use tonic::Status;

use super::{
    exchange::{Exchange, Unwritten},
    grpc_text::cut_text,
};
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
    /// What tonic answers to a call of gRPC.
    Grpc(tonic::body::Body, Arc<Exchange>),
    /// Messages of a call of gRPC, with the status behind them; `None` once that has gone out.
    Messages(Option<Box<dyn Messages>>, Arc<Exchange>),
}

/// Messages that are made while they are sent, in their frames. Dropped before its end, its caller has left.
pub(super) trait Messages: Send {
    /// The next one, or why there are no more; `None` behind the last.
    fn poll_next(&mut self, task: &mut Context<'_>) -> Poll<Option<Result<Answer, Status>>>;
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

/// The same of a call of gRPC that tonic answers.
pub(super) fn respond_grpc(
    exchange: &Arc<Exchange>,
    response: Response<tonic::body::Body>,
) -> Response<Outgoing> {
    response.map(|messages| Outgoing::Grpc(messages, Arc::clone(exchange)))
}

/// The same of a call of gRPC, in messages.
pub(super) fn respond_messages(
    exchange: &Arc<Exchange>,
    headers: HeaderMap,
    messages: Box<dyn Messages>,
) -> Response<Outgoing> {
    let mut response = Response::new(Outgoing::Messages(Some(messages), Arc::clone(exchange)));
    *response.headers_mut() = headers;
    response
}

/// What a call ends with.
fn trailers(status: &Status) -> HeaderMap {
    let mut trailers = HeaderMap::new();
    // A text that is none for a header is left out.
    let _ = status.add_header(&mut trailers);
    cut_text(&mut trailers);
    trailers
}

/// The same of a call that succeeded.
fn trailers_of_success() -> HeaderMap {
    let mut trailers = HeaderMap::with_capacity(1);
    trailers.insert(Status::GRPC_STATUS, HeaderValue::from_static("0"));
    trailers
}

/// Bytes of a stream that are handed over to be written.
fn shared(answer: Answer, exchange: &Arc<Exchange>) -> Written {
    let exchange = Held::Shared(Unwritten::of(exchange, answer.remaining()));
    Written { answer, exchange }
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
                ready!(stream.poll_next(task)).map(|bytes| shared(bytes.into(), exchange))
            }
            Self::Grpc(messages, exchange) => {
                let frame = match ready!(Pin::new(messages).poll_frame(task)) {
                    Some(Ok(frame)) => frame.map_data(|bytes| shared(bytes.into(), exchange)),
                    Some(Err(status)) => Frame::trailers(trailers(&status)),
                    None => return Poll::Ready(None),
                };
                return Poll::Ready(Some(Ok(frame)));
            }
            Self::Messages(messages, exchange) => {
                let Some(open) = messages else { return Poll::Ready(None) };
                let status = match ready!(open.poll_next(task)) {
                    Some(Ok(answer)) => {
                        return Poll::Ready(Some(Ok(Frame::data(shared(answer, exchange)))));
                    }
                    Some(Err(status)) => Some(status),
                    None => None,
                };
                *messages = None;
                let trailers = status.map_or_else(trailers_of_success, |status| trailers(&status));
                return Poll::Ready(Some(Ok(Frame::trailers(trailers))));
            }
        };
        Poll::Ready(written.map(|written| Ok(Frame::data(written))))
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Whole(written) => written.is_none(),
            Self::Stream(..) => false,
            Self::Grpc(messages, _) => messages.is_end_stream(),
            Self::Messages(messages, _) => messages.is_none(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole(written) => {
                SizeHint::with_exact(written.as_ref().map_or(0, |written| written.remaining() as u64))
            }
            Self::Stream(..) | Self::Grpc(..) | Self::Messages(..) => SizeHint::default(),
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
