//! One timer a connection, armed lazily. Every request needs two limits, for its headers and for its answer, and almost
//! none is ever reached; registering and removing a timer for each would cost more than the rest of the bookkeeping.
//! A limit that is set again here only remembers its moment: the timer behind it fires at an older, earlier one, looks,
//! and goes back to sleep.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Instant,
};

use hyper::rt::{Sleep, Timer};
use parking_lot::Mutex;

type Alarm = Pin<Box<tokio::time::Sleep>>;

/// A connection's timer, while nobody uses it.
#[derive(Clone, Default)]
pub(super) struct ConnectionTimer {
    unused: Arc<Mutex<Option<Alarm>>>,
}

/// Waits for a moment, with the connection's timer where that is free (always so in HTTP/1.1), else with one of its own.
pub(super) struct Limit {
    at: Instant,
    alarm: Option<Alarm>,
    timer: ConnectionTimer,
}

impl ConnectionTimer {
    pub(super) fn limit(&self, at: Instant) -> Limit {
        Limit { at, alarm: self.unused.lock().take(), timer: self.clone() }
    }
}

impl Future for Limit {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let Self { at, alarm, .. } = self.get_mut();
        let at = tokio::time::Instant::from_std(*at);
        let alarm = alarm.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(at)));
        if alarm.deadline() > at {
            alarm.as_mut().reset(at);
        }
        while alarm.as_mut().poll(context).is_ready() {
            if alarm.deadline() >= at {
                return Poll::Ready(());
            }
            alarm.as_mut().reset(at);
        }
        Poll::Pending
    }
}

impl Drop for Limit {
    fn drop(&mut self) {
        if let Some(alarm) = self.alarm.take() {
            *self.timer.unused.lock() = Some(alarm);
        }
    }
}

impl Sleep for Limit {}

impl Timer for ConnectionTimer {
    fn sleep(&self, duration: std::time::Duration) -> Pin<Box<dyn Sleep>> {
        self.sleep_until(Instant::now() + duration)
    }

    fn sleep_until(&self, deadline: Instant) -> Pin<Box<dyn Sleep>> {
        Box::pin(self.limit(deadline))
    }

    fn reset(&self, sleep: &mut Pin<Box<dyn Sleep>>, deadline: Instant) {
        match sleep.as_mut().downcast_mut_pin::<Limit>() {
            Some(limit) => limit.get_mut().at = deadline,
            None => *sleep = self.sleep_until(deadline),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_limit_is_reached_at_its_moment_whatever_the_timer_was_armed_for() {
        let timer = ConnectionTimer::default();
        for milliseconds in [50, 20, 500, 1] {
            let begun = tokio::time::Instant::now();
            timer.limit(begun.into_std() + Duration::from_millis(milliseconds)).await;
            assert_eq!(begun.elapsed().as_millis(), u128::from(milliseconds));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_limit_that_is_dropped_leaves_its_timer_to_the_next() {
        let timer = ConnectionTimer::default();
        let begun = tokio::time::Instant::now();
        let soon = timer.limit(begun.into_std() + Duration::from_millis(10));
        assert!(tokio::time::timeout(Duration::from_millis(5), soon).await.is_err());
        assert!(timer.unused.lock().is_some());
        timer.limit(begun.into_std() + Duration::from_millis(30)).await;
        assert_eq!(begun.elapsed().as_millis(), 30);
    }
}
