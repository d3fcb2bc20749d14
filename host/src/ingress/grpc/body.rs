//! The body of a call that tonic reads: its messages are small, and it ends when the call's time is up or the host drains, whatever its sender does. It never
//! knows what they say.

use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use futures_util::FutureExt;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use tokio::time::{Instant, Interval, MissedTickBehavior, Sleep, interval_at, sleep_until};

use tonic::Status;

use super::call::GrpcCall;
use crate::{
    egress::job_status,
    ingress::{body::RequestBody, lingering_close, peer::Peer, timer::Limit},
    work::JobError,
};

/// Between two looks whether the host drains.
pub(super) const DRAIN_LOOK: Duration = Duration::from_millis(500);

type Error = Box<dyn std::error::Error + Send + Sync>;

/// A look now and then whether the host drains.
pub(super) fn drain_look() -> Interval {
    let mut look = interval_at(Instant::now() + DRAIN_LOOK, DRAIN_LOOK);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    look
}

/// A body as it comes. Dropped before its end, the rest of it is read for a while, so that its sender reads the answer.
pub(super) struct Incomings {
    incoming: Option<Incoming>,
    peer: Arc<Peer>,
}

impl Incomings {
    pub(super) fn new(incoming: Incoming, peer: &Arc<Peer>) -> Self {
        Self { incoming: Some(incoming), peer: Arc::clone(peer) }
    }

    pub(super) fn peer(&self) -> &Arc<Peer> {
        &self.peer
    }

    /// The next frame; `None` at the end.
    pub(super) fn poll(&mut self, task: &mut Context<'_>) -> Poll<Option<hyper::Result<Frame<Bytes>>>> {
        let Some(incoming) = &mut self.incoming else { return Poll::Ready(None) };
        let frame = ready!(Pin::new(incoming).poll_frame(task));
        if !matches!(frame, Some(Ok(_))) {
            self.incoming = None;
            self.peer.sends_on.store(false, Ordering::Relaxed);
        }
        Poll::Ready(frame)
    }
}

impl Drop for Incomings {
    fn drop(&mut self) {
        let Some(incoming) = self.incoming.take() else { return };
        if incoming.is_end_stream() {
            self.peer.sends_on.store(false, Ordering::Relaxed);
        } else {
            lingering_close::read_on(RequestBody::new(incoming), Arc::clone(&self.peer));
        }
    }
}

/// What tonic reads.
pub(super) struct SmallMessages {
    incomings: Incomings,
    /// Where its caller has set one.
    limit: Option<Limit>,
    /// When something must have come again.
    silent_until: Pin<Box<Sleep>>,
    body_timeout: Duration,
    drain_look: Interval,
}

impl SmallMessages {
    pub(super) fn new(incomings: Incomings, call: &GrpcCall) -> Self {
        let limit = call.ends_at.map(|at| call.exchange.timer.limit(at));
        let body_timeout = call.context().server.body_timeout;
        let silent_until = Box::pin(sleep_until(Instant::now() + body_timeout));
        Self { incomings, limit, silent_until, body_timeout, drain_look: drain_look() }
    }
}

impl Body for SmallMessages {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        task: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        if let Poll::Ready(frame) = self.incomings.poll(task) {
            let at = Instant::now() + self.body_timeout;
            self.silent_until.as_mut().reset(at);
            return Poll::Ready(frame.map(|frame| frame.map_err(Into::into)));
        }
        if let Some(limit) = &mut self.limit
            && limit.poll_unpin(task).is_ready()
        {
            self.limit = None;
            return Poll::Ready(Some(Err(job_status(&JobError::DeadlinePassed).into())));
        }
        if self.silent_until.as_mut().poll(task).is_ready() {
            let limit = self.body_timeout;
            let silent = format!("expected the next message within {limit:?} (server.body_timeout_ms)");
            return Poll::Ready(Some(Err(Status::deadline_exceeded(silent).into())));
        }
        while self.drain_look.poll_tick(task).is_ready() {
            if self.incomings.peer.context.gate.is_closed() {
                let error = JobError::Unavailable("the server is shutting down".into());
                return Poll::Ready(Some(Err(job_status(&error).into())));
            }
        }
        Poll::Pending
    }

    fn is_end_stream(&self) -> bool {
        self.incomings.incoming.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.incomings.incoming.as_ref().map_or_else(SizeHint::default, Body::size_hint)
    }
}
