//! What the runner is told, and where that waits. It never knows what the runner does with it.

use std::{sync::Arc, time::Instant};

use parking_lot::{Condvar, Mutex};
use tokio::sync::oneshot;

use super::live_job::{FirstAttempt, LiveJob};
use crate::work::{JobPermit, Reply};

/// What the runner is told.
pub(super) enum Event {
    /// A job is on disk.
    Accepted(Arc<LiveJob>, FirstAttempt),
    /// An attempt is over; if it `began`, it counts.
    Answered { live_job: Arc<LiveJob>, reply: Reply, began: bool, permit: JobPermit },
    /// A job was taken back.
    Cancel(Arc<LiveJob>),
    /// Hand nothing more over.
    Drain(oneshot::Sender<()>),
    /// End.
    Stop,
}

/// What has been told to the runner and not been looked at.
#[derive(Default)]
pub(super) struct Inbox {
    events: Mutex<(Vec<Event>, bool)>,
    not_empty: Condvar,
}

impl Inbox {
    /// Sends an event, and wakes the runner if it waits.
    pub(super) fn put(&self, event: Event) {
        self.put_without_waking(event);
        self.wake();
    }

    /// Sends an event without waking the runner: whoever calls this calls [`Inbox::wake`] soon.
    pub(super) fn put_without_waking(&self, event: Event) {
        self.events.lock().0.push(event);
    }

    /// Wakes the runner if it waits and there is an event.
    pub(super) fn wake(&self) {
        let mut events = self.events.lock();
        if !events.0.is_empty() && std::mem::take(&mut events.1) {
            drop(events);
            self.not_empty.notify_one();
        }
    }

    /// Waits until there is something, or until this moment, and takes all of it.
    pub(super) fn take(&self, into: &mut Vec<Event>, until: Instant) {
        let mut events = self.events.lock();
        if events.0.is_empty() {
            events.1 = true;
            self.not_empty.wait_until(&mut events, until);
            events.1 = false;
        }
        std::mem::swap(&mut events.0, into);
    }
}
