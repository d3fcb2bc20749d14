//! Admission control: it owns the counts of requests and of bytes in flight, their limits and the drain, and never knows what they ask.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

use tokio::sync::Notify;

use crate::work::JobError;

/// Counts what is inside and closes for a shutdown.
pub struct Gate {
    requests_max: AtomicUsize,
    requests: Count,
    jobs: Count,
    leaving: AtomicBool,
    closed: AtomicBool,
    left: Notify,
}

/// A request's permit, given back when dropped.
pub struct Permit<'g>(&'g Gate);

impl Permit<'_> {
    /// Leaves it to the caller to give it back, by [`Gate::leave_request`].
    pub fn keep(self) {
        std::mem::forget(self);
    }
}

/// An accepted job's permit, given back when dropped.
pub struct JobPermit(Arc<Gate>);

/// Counts that every request changes share no cache line with what it only reads.
#[repr(align(128))]
#[derive(Default)]
struct Count(AtomicUsize);

impl Gate {
    /// A gate for this many requests at once.
    #[must_use]
    pub fn new(requests_max: usize) -> Arc<Self> {
        Arc::new(Self {
            requests_max: requests_max.into(),
            requests: Count::default(),
            jobs: Count::default(),
            leaving: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            left: Notify::new(),
        })
    }

    /// Lets this many in from now on; those inside stay.
    pub fn set_requests_max(&self, requests_max: usize) {
        self.requests_max.store(requests_max, Ordering::Relaxed);
    }

    /// Lets a request in, where there is room and the host isn't draining.
    ///
    /// # Errors
    /// [`JobError::Busy`] or [`JobError::Unavailable`].
    pub fn enter(&self) -> Result<Permit<'_>, JobError> {
        // Counted first: a drain that starts now either sees this request or is seen by it.
        let inside = self.requests.0.fetch_add(1, Ordering::SeqCst);
        let permit = Permit(self);
        if self.is_closed() {
            return Err(JobError::Unavailable("the server is shutting down".into()));
        }
        if inside >= self.requests_max.load(Ordering::Relaxed) {
            return Err(JobError::Busy("too many requests are in flight (allow_concurrent_inputs_handler)"));
        }
        Ok(permit)
    }

    /// Keeps the host from exiting while an accepted asynchronous job is under way. The caller holds a permit of its
    /// request still, so this can't miss a drain.
    pub fn job(self: &Arc<Self>) -> JobPermit {
        self.jobs.0.fetch_add(1, Ordering::SeqCst);
        JobPermit(Arc::clone(self))
    }

    /// Gives back a permit that was kept.
    pub fn leave_request(&self) {
        self.leave(&self.requests);
    }

    fn leave(&self, count: &Count) {
        if count.0.fetch_sub(1, Ordering::SeqCst) == 1 && self.is_closed() {
            self.left.notify_waiters();
        }
    }

    /// Marks the host as about to drain.
    pub fn leave_soon(&self) {
        self.leaving.store(true, Ordering::SeqCst);
    }

    /// Whether it will close soon, or has.
    #[must_use]
    pub fn is_leaving(&self) -> bool {
        self.leaving.load(Ordering::SeqCst) || self.is_closed()
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
        self.requests.0.load(Ordering::SeqCst)
    }

    /// Everything inside: requests and accepted jobs.
    #[must_use]
    pub fn inside(&self) -> usize {
        self.requests() + self.jobs.0.load(Ordering::SeqCst)
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

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        self.0.leave(&self.0.requests);
    }
}

impl Drop for JobPermit {
    fn drop(&mut self) {
        self.0.leave(&self.0.jobs);
    }
}

/// Bytes in flight, of all requests together.
pub struct Budget {
    bytes_max: usize,
    bytes: Count,
}

impl Budget {
    /// A budget of this many bytes.
    #[must_use]
    pub fn new(bytes_max: usize) -> Self {
        Self { bytes_max, bytes: Count::default() }
    }

    /// Takes bytes for what is about to come.
    ///
    /// # Errors
    /// [`JobError::Busy`] where there would be more than the limit.
    pub fn take(&self, bytes: usize) -> Result<(), JobError> {
        let before = self.bytes.0.fetch_add(bytes, Ordering::Relaxed);
        if before.saturating_add(bytes) <= self.bytes_max {
            return Ok(());
        }
        self.give_back(bytes);
        Err(JobError::Busy(
            "too many bytes of requests and answers are in flight (server.bytes_in_flight_max)",
        ))
    }

    /// Whether there is room for so many, of what may as well come later.
    #[must_use]
    pub fn has_room_for(&self, bytes: usize) -> bool {
        self.bytes().saturating_add(bytes) <= self.bytes_max
    }

    /// Takes bytes for what is there already.
    pub fn count(&self, bytes: usize) {
        self.bytes.0.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Gives bytes back that were taken or counted.
    pub fn give_back(&self, bytes: usize) {
        self.bytes.0.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Bytes in flight.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes.0.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_drain_waits_for_requests_and_for_accepted_jobs() {
        let gate = Gate::new(2);
        let request = gate.enter().unwrap();
        let job = gate.job();
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

    #[test]
    fn bytes_over_the_budget_are_refused_and_answers_that_exist_are_counted_all_the_same() {
        let budget = Budget::new(100);
        assert!(budget.take(60).is_ok());
        assert!(matches!(budget.take(41), Err(JobError::Busy(_))));
        assert_eq!(budget.bytes(), 60, "a refusal leaves no trace");
        budget.count(80);
        assert!(budget.take(1).is_err());
        budget.give_back(80);
        assert!(budget.take(40).is_ok());
        budget.give_back(100);
        assert_eq!(budget.bytes(), 0);
    }
}
