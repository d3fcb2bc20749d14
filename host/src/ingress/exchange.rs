//! One request and its answer, until the answer's last byte is written: what it holds of the host's limits, and when it gives that
//! back, which is earlier for small answers of HTTP/1. It never knows what is asked.

use std::{
    ops::Deref,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use super::peer::Peer;
use crate::{access::ConcurrencyPermit, work::JobError};

/// Bodies and answers up to this many bytes are not counted in the budget: the limit on requests in flight bounds them, and
/// whoever fills the budget keeps no small request out.
pub(super) const BYTES_FREE: usize = 16 << 10;

/// A request that is not over. Dropped, it gives back what it holds.
pub(super) struct Exchange {
    peer: Arc<Peer>,
    http2: bool,
    /// The answer is made and not written.
    answers: bool,
    /// It counts among the requests in flight.
    admitted: AtomicBool,
    /// Its permit among its key's calls.
    key_permit: OnceLock<Arc<ConcurrencyPermit>>,
    /// Its part of the budget.
    bytes: AtomicUsize,
}

impl Exchange {
    pub(super) fn begin(peer: Arc<Peer>, http2: bool) -> Self {
        if http2 {
            peer.begun.fetch_add(1, Ordering::Relaxed);
            peer.open.fetch_add(1, Ordering::Relaxed);
        }
        Self {
            peer,
            http2,
            answers: false,
            admitted: AtomicBool::new(false),
            key_permit: OnceLock::new(),
            bytes: AtomicUsize::new(0),
        }
    }

    /// Whether it is one of several at once on its connection.
    pub(super) fn is_http2(&self) -> bool {
        self.http2
    }

    /// Its connection.
    pub(super) fn peer(&self) -> &Arc<Peer> {
        &self.peer
    }

    /// Counts among the requests in flight until this is over.
    pub(super) fn enter(&self) -> Result<(), JobError> {
        self.peer.context.gate.enter()?.keep();
        self.admitted.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Holds a permit among a key's calls until this is over.
    pub(super) fn keep(&self, key_permit: Option<&Arc<ConcurrencyPermit>>) {
        if let Some(key_permit) = key_permit {
            // Set once: a request has one caller.
            let _ = self.key_permit.set(Arc::clone(key_permit));
        }
    }

    /// Takes bytes of the budget, until this is over.
    pub(super) fn take_bytes(&self, bytes: usize) -> Result<(), JobError> {
        self.peer.context.budget.take(bytes)?;
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        Ok(())
    }

    /// Holds bytes of the budget that somebody has taken, until this is over.
    pub(super) fn keep_bytes(&self, bytes: usize) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// An answer with a body of so many bytes is about to be written. A small one on an HTTP/1 connection that takes what it gets is as
    /// good as written: who waits for it and then sends the next request finds room.
    pub(super) fn begin_answer(&mut self, bytes: usize) {
        if bytes > BYTES_FREE {
            self.peer.context.budget.count(bytes);
            *self.bytes.get_mut() += bytes;
        } else if !self.http2 && !self.peer.stalled.load(Ordering::Relaxed) {
            self.leave();
        }
        if self.http2 {
            self.answers = true;
            self.peer.unwritten.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Some of the answer was taken.
    pub(super) fn progressed(&self) {
        if self.http2 {
            self.peer.progressed.store(true, Ordering::Relaxed);
        }
    }

    fn leave(&mut self) {
        let context = &self.peer.context;
        if std::mem::take(self.admitted.get_mut()) {
            context.gate.leave_request();
        }
        let bytes = std::mem::take(self.bytes.get_mut());
        if bytes > 0 {
            context.budget.give_back(bytes);
        }
        self.key_permit.take();
    }
}

/// Bytes of a stream that are to be written: with others of the same, they keep its exchange open. They count in the budget, however few they
/// are, since a stream has many.
pub(super) struct Unwritten {
    exchange: Arc<Exchange>,
    bytes: usize,
}

impl Unwritten {
    pub(super) fn of(exchange: &Arc<Exchange>, bytes: usize) -> Self {
        exchange.peer.context.budget.count(bytes);
        if exchange.http2 {
            exchange.peer.unwritten.fetch_add(1, Ordering::Relaxed);
        }
        Self { exchange: Arc::clone(exchange), bytes }
    }

    pub(super) fn exchange(&self) -> &Exchange {
        &self.exchange
    }
}

impl Drop for Unwritten {
    fn drop(&mut self) {
        self.exchange.peer.context.budget.give_back(self.bytes);
        if self.exchange.http2 {
            self.exchange.peer.unwritten.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl Deref for Exchange {
    type Target = Peer;

    fn deref(&self) -> &Peer {
        &self.peer
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        self.leave();
        if self.http2 {
            self.peer.open.fetch_sub(1, Ordering::Relaxed);
            if self.answers {
                self.peer.unwritten.fetch_sub(1, Ordering::Relaxed);
            }
        }
    }
}
