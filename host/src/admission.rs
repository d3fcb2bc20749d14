//! Who may enter: it owns the count of requests in flight, their limit and the drain, and never knows what they ask.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

use tokio::sync::Notify;

use crate::job::JobError;

/// Counts what is inside and closes for a shutdown.
pub struct Gate {
    requests_max: usize,
    requests: AtomicUsize,
    background: AtomicUsize,
    closed: AtomicBool,
    left: Notify,
}

/// A place inside, given back when dropped.
pub struct Permit {
    gate: Arc<Gate>,
    background: bool,
}

impl Gate {
    /// A gate for this many requests at once.
    #[must_use]
    pub fn new(requests_max: usize) -> Arc<Self> {
        Arc::new(Self {
            requests_max,
            requests: AtomicUsize::new(0),
            background: AtomicUsize::new(0),
            closed: AtomicBool::new(false),
            left: Notify::new(),
        })
    }

    /// Lets a request in, where there is room and the host isn't draining.
    ///
    /// # Errors
    /// [`JobError::Busy`] or [`JobError::Unavailable`].
    pub fn enter(self: &Arc<Self>) -> Result<Permit, JobError> {
        // Counted first: a drain that starts now either sees this request or is seen by it.
        let inside = self.requests.fetch_add(1, Ordering::SeqCst);
        let permit = Permit { gate: Arc::clone(self), background: false };
        if self.is_closed() {
            return Err(JobError::Unavailable("the server is shutting down".into()));
        }
        if inside >= self.requests_max {
            return Err(JobError::Busy("too many requests are in flight (allow_concurrent_inputs_handler)"));
        }
        Ok(permit)
    }

    /// Keeps the host from exiting while an accepted asynchronous job is under way. The caller holds a permit of its
    /// request still, so this can't miss a drain.
    pub fn background(self: &Arc<Self>) -> Permit {
        self.background.fetch_add(1, Ordering::SeqCst);
        Permit { gate: Arc::clone(self), background: true }
    }

    /// Lets nobody in any more.
    pub fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
    }

    /// Whether [`Gate::close`] was called.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    /// Requests inside.
    #[must_use]
    pub fn requests(&self) -> usize {
        self.requests.load(Ordering::SeqCst)
    }

    /// Everything inside: requests and accepted jobs.
    #[must_use]
    pub fn inside(&self) -> usize {
        self.requests() + self.background.load(Ordering::SeqCst)
    }

    /// Waits until nobody is inside.
    pub async fn emptied(&self) {
        loop {
            let left = self.left.notified();
            tokio::pin!(left);
            // Registered before the count is read, or the last one could leave in between.
            left.as_mut().enable();
            if self.inside() == 0 {
                return;
            }
            left.await;
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let count = if self.background { &self.gate.background } else { &self.gate.requests };
        if count.fetch_sub(1, Ordering::SeqCst) == 1 && self.gate.is_closed() {
            self.gate.left.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_drain_waits_for_requests_and_for_accepted_jobs() {
        let gate = Gate::new(2);
        let request = gate.enter().unwrap();
        let job = gate.background();
        gate.close();
        assert!(matches!(gate.enter(), Err(JobError::Unavailable(_))));
        let drained = tokio::spawn({
            let gate = Arc::clone(&gate);
            async move { gate.emptied().await }
        });
        tokio::task::yield_now().await;
        drop(request);
        tokio::task::yield_now().await;
        assert!(!drained.is_finished());
        drop(job);
        drained.await.unwrap();
        assert_eq!(gate.inside(), 0);
    }

    #[test]
    fn one_too_many_is_told_to_come_back_and_leaves_no_trace() {
        let gate = Gate::new(1);
        let inside = gate.enter().unwrap();
        assert!(matches!(gate.enter(), Err(JobError::Busy(_))));
        drop(inside);
        assert!(gate.enter().is_ok());
        assert_eq!(gate.requests(), 0);
    }
}
