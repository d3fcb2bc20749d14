//! One timer a connection, armed lazily. Every request needs two limits, for its headers and for its answer, and almost
//! none is ever reached; registering and removing a timer for each would cost more than the rest of the bookkeeping.
//! A limit that is set again here only remembers its moment: the timer behind it fires at an older, earlier one, looks,
//! and goes back to sleep.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, Instant},
};

use hyper::rt::{Sleep, Timer};
use parking_lot::Mutex;

type Alarm = Pin<Box<tokio::time::Sleep>>;

/// A connection's timer. hyper asks it for one limit, from the end of a request on: until the next one's headers have come. That is
/// the time for which a connection may idle; once the first bytes are there, the rest of the headers must come within a time of its own.
#[derive(Clone)]
pub(super) struct ConnectionTimer {
    shared: Arc<Shared>,
    header_timeout: Duration,
}

struct Shared {
    /// Kept while nobody uses it.
    unused: Mutex<Option<Alarm>>,
    /// Bytes have come since a limit on headers was set, or looked at.
    bytes_came: AtomicBool,
    /// No limit on headers was set so far.
    is_first: AtomicBool,
}

/// Waits for a moment, with the connection's timer where that is free (always so in HTTP/1.1), else with one of its own.
pub(super) struct Limit {
    at: Instant,
    headers: Headers,
    alarm: Option<Alarm>,
    timer: ConnectionTimer,
}

/// What a limit knows of headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Headers {
    /// It is about something else.
    None,
    /// They haven't begun.
    Awaited,
    /// They have, and must be there at the limit's moment.
    Begun,
}

impl ConnectionTimer {
    pub(super) fn new(header_timeout: Duration) -> Self {
        let shared = Shared {
            unused: Mutex::default(),
            bytes_came: AtomicBool::new(false),
            is_first: AtomicBool::new(true),
        };
        Self { shared: Arc::new(shared), header_timeout }
    }

    pub(super) fn limit(&self, at: Instant) -> Limit {
        Limit { at, headers: Headers::None, alarm: self.shared.unused.lock().take(), timer: self.clone() }
    }

    /// Notes that the caller has sent something.
    pub(super) fn bytes_came(&self) {
        self.shared.bytes_came.store(true, Ordering::Relaxed);
    }
}

impl Future for Limit {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let Self { at, headers, alarm, timer } = self.get_mut();
        // Headers that come at once are never looked at here.
        if *headers == Headers::Awaited && timer.shared.bytes_came.swap(false, Ordering::Relaxed) {
            (*at, *headers) = (now() + timer.header_timeout, Headers::Begun);
        }
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

/// By the clock that alarms go by.
fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

impl Drop for Limit {
    fn drop(&mut self) {
        if let Some(alarm) = self.alarm.take() {
            *self.timer.shared.unused.lock() = Some(alarm);
        }
    }
}

impl Sleep for Limit {}

impl Timer for ConnectionTimer {
    fn sleep(&self, duration: Duration) -> Pin<Box<dyn Sleep>> {
        self.sleep_until(Instant::now() + duration)
    }

    fn sleep_until(&self, deadline: Instant) -> Pin<Box<dyn Sleep>> {
        self.shared.bytes_came.store(false, Ordering::Relaxed);
        // A connection that has asked for nothing yet has the time that headers have, and not that of one that idles.
        let first = self.shared.is_first.swap(false, Ordering::Relaxed);
        let least = if first { self.header_timeout } else { Duration::ZERO };
        let mut limit = self.limit(deadline.max(now() + least));
        limit.headers = Headers::Awaited;
        Box::pin(limit)
    }

    fn reset(&self, sleep: &mut Pin<Box<dyn Sleep>>, deadline: Instant) {
        match sleep.as_mut().downcast_mut_pin::<Limit>() {
            Some(limit) => {
                self.shared.bytes_came.store(false, Ordering::Relaxed);
                let limit = limit.get_mut();
                (limit.at, limit.headers) = (deadline, Headers::Awaited);
            }
            None => *sleep = self.sleep_until(deadline),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADERS: Duration = Duration::from_millis(30);

    #[tokio::test(start_paused = true)]
    async fn a_limit_is_reached_at_its_moment_whatever_the_timer_was_armed_for() {
        let timer = ConnectionTimer::new(HEADERS);
        for milliseconds in [50, 20, 500, 1] {
            let begun = tokio::time::Instant::now();
            timer.limit(begun.into_std() + Duration::from_millis(milliseconds)).await;
            assert_eq!(begun.elapsed().as_millis(), u128::from(milliseconds));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_limit_that_is_dropped_leaves_its_timer_to_the_next() {
        let timer = ConnectionTimer::new(HEADERS);
        let begun = tokio::time::Instant::now();
        let soon = timer.limit(begun.into_std() + Duration::from_millis(10));
        assert!(tokio::time::timeout(Duration::from_millis(5), soon).await.is_err());
        assert!(timer.shared.unused.lock().is_some());
        timer.limit(begun.into_std() + Duration::from_millis(30)).await;
        assert_eq!(begun.elapsed().as_millis(), 30);
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_may_idle_for_long_and_its_headers_may_not_take_long_once_they_have_begun() {
        let timer = ConnectionTimer::new(HEADERS);
        timer.bytes_came();
        let begun = tokio::time::Instant::now();
        let first = timer.sleep_until(begun.into_std() + HEADERS / 2);
        first.await;
        assert_eq!(begun.elapsed(), HEADERS, "the first has as long as headers have");
        let begun = tokio::time::Instant::now();
        let mut limit = timer.sleep_until(begun.into_std() + Duration::from_secs(60) + HEADERS / 2);
        let waited = tokio::time::timeout(Duration::from_secs(60), &mut limit).await;
        assert!(waited.is_err(), "what came before counts for the request before");
        timer.bytes_came();
        let waited = tokio::time::timeout(Duration::from_millis(20), &mut limit).await;
        assert!(waited.is_err());
        // More bytes give no more time.
        timer.bytes_came();
        limit.await;
        assert_eq!(begun.elapsed(), Duration::from_secs(60) + HEADERS);
    }
}
