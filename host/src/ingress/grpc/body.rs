//! The messages of a call on their way in: their bytes are part of the host's budget from when they come until what they ask is answered. It never knows
//! what they say.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use hyper::body::{Body, Frame, Incoming, SizeHint};

use crate::{
    egress,
    ingress::{body::RequestBody, exchange::BYTES_FREE, lingering_close, peer::Peer},
    work::JobError,
};

type Error = Box<dyn std::error::Error + Send + Sync>;

/// Counts the bytes of one call's messages.
pub(super) struct Meter {
    peer: Arc<Peer>,
    /// That have come since the last message was taken.
    came: AtomicUsize,
    /// Of those, in the budget.
    counted: AtomicUsize,
}

/// A message's part of the budget, given back when dropped.
pub(super) struct Charge {
    peer: Arc<Peer>,
    bytes: usize,
}

impl Meter {
    pub(super) fn new(peer: &Arc<Peer>) -> Arc<Self> {
        let peer = Arc::clone(peer);
        Arc::new(Self { peer, came: AtomicUsize::new(0), counted: AtomicUsize::new(0) })
    }

    /// More has come. Small messages are not counted, as small bodies aren't.
    fn take(&self, bytes: usize) -> Result<(), JobError> {
        let came = self.came.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if came > BYTES_FREE {
            let missing = came - self.counted.load(Ordering::Relaxed);
            self.peer.context.budget.take(missing)?;
            self.counted.fetch_add(missing, Ordering::Relaxed);
        }
        Ok(())
    }

    /// A message is whole: what has come is its own.
    pub(super) fn message(&self) -> Charge {
        self.came.store(0, Ordering::Relaxed);
        Charge { peer: Arc::clone(&self.peer), bytes: self.counted.swap(0, Ordering::Relaxed) }
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        drop(self.message());
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        if self.bytes > 0 {
            self.peer.context.budget.give_back(self.bytes);
        }
    }
}

/// A call's body, counted. Dropped before its end, the rest of it is read for a while, so that its sender reads the answer.
pub(super) struct CountedBody {
    incoming: Option<Incoming>,
    meter: Arc<Meter>,
}

impl CountedBody {
    pub(super) fn new(incoming: Incoming, meter: &Arc<Meter>) -> Self {
        Self { incoming: Some(incoming), meter: Arc::clone(meter) }
    }
}

impl Body for CountedBody {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        task: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        let Some(incoming) = &mut self.incoming else { return Poll::Ready(None) };
        let frame = ready!(Pin::new(incoming).poll_frame(task));
        Poll::Ready(match frame {
            Some(Ok(frame)) => {
                let counted = self.meter.take(frame.data_ref().map_or(0, Bytes::len));
                Some(counted.map(|()| frame).map_err(|busy| egress::job_status(&busy).into()))
            }
            Some(Err(error)) => {
                self.incoming = None;
                Some(Err(error.into()))
            }
            None => {
                self.incoming = None;
                None
            }
        })
    }

    fn is_end_stream(&self) -> bool {
        self.incoming.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.incoming.as_ref().map_or_else(SizeHint::default, Body::size_hint)
    }
}

impl Drop for CountedBody {
    fn drop(&mut self) {
        if let Some(incoming) = self.incoming.take().filter(|incoming| !incoming.is_end_stream()) {
            lingering_close::read_on(RequestBody::new(incoming), Arc::clone(&self.meter.peer));
        }
    }
}
