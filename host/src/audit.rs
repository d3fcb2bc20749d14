//! The audit log: who managed the host, and who was refused. It owns the limit on lines about refusals, and never knows why a caller
//! was refused, nor any key's value.

use std::{
    convert::Infallible,
    fmt,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::access::{Caller, Origin};

/// What these lines are logged under.
const TARGET: &str = "modalkit::audit";
/// Lines about refused requests in each interval; further ones are counted.
const REFUSED_LINES_MAX: u32 = 10;
/// The interval.
const REFUSED_INTERVAL: Duration = Duration::from_secs(10);
/// Bytes of a name in a line: callers choose them.
const NAME_BYTES_MAX: usize = 256;
/// What stands in the place of a key's name for callers over the management socket.
const SOCKET: &str = "socket";

/// Writes the audit log.
#[derive(Default)]
pub struct Audit {
    refused: Mutex<Refused>,
    /// Some were counted and not told of.
    untold: Notify,
}

/// What a request asks for.
#[derive(Clone, Copy)]
pub struct Action<'a> {
    /// The method.
    pub method: &'a str,
    /// The path with placeholders, such as `/models/{name}/reload`.
    pub endpoint: &'a str,
    /// What stands in the placeholder.
    pub name: &'a str,
    /// Whether it changes something.
    pub changes: bool,
}

impl fmt::Display for Action<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.method, self.endpoint)
    }
}

/// A request that is being answered. Where its caller leaves first, the line says so: what it asked for may happen all the same.
pub struct Underway<'a> {
    action: Action<'a>,
    key: Option<&'a str>,
    from: &'a Origin,
    status: Option<u16>,
}

impl Audit {
    /// A request of a caller who was let in; its line is written at its end.
    #[must_use]
    pub fn begin<'a>(action: Action<'a>, caller: &'a Caller, from: &'a Origin) -> Underway<'a> {
        let key = match from {
            Origin::Socket { .. } => Some(SOCKET),
            Origin::Network(_) => caller.key.as_deref(),
        };
        Underway { action, key, from, status: None }
    }

    /// A request that was refused for the key that it showed, or for showing none.
    pub fn refused(&self, action: Action<'_>, key: Option<&str>, from: &Origin, status: u16) {
        let verdict = self.refused.lock().another(Instant::now());
        if let Some(untold) = verdict.untold {
            tell_untold(untold);
        }
        if verdict.tell {
            let name = shortened(action.name);
            tracing::warn!(target: TARGET, action = %action, name, key, address = %from, status, "request refused");
        } else {
            self.untold.notify_one();
        }
    }

    /// Tells of those that had no line of their own, also when nobody calls any more.
    pub async fn run(&self) -> Infallible {
        loop {
            self.untold.notified().await;
            let end = self.refused.lock().end();
            tokio::time::sleep_until(end.into()).await;
            self.flush();
        }
    }

    /// Tells of those that had no line of their own so far.
    pub fn flush(&self) {
        let untold = std::mem::take(&mut self.refused.lock().untold);
        if untold > 0 {
            tell_untold(untold);
        }
    }
}

fn tell_untold(count: u64) {
    tracing::warn!(target: TARGET, count, interval = ?REFUSED_INTERVAL, "further requests were refused");
}

fn shortened(name: &str) -> &str {
    &name[..name.floor_char_boundary(NAME_BYTES_MAX)]
}

impl Underway<'_> {
    /// It was answered with this status.
    pub fn answered(mut self, status: u16) {
        self.status = Some(status);
    }
}

impl Drop for Underway<'_> {
    fn drop(&mut self) {
        let Self { action, key, from, status } = self;
        let name = shortened(action.name);
        let message = if status.is_some() { "management" } else { "management, whose caller left" };
        if action.changes {
            tracing::info!(target: TARGET, action = %action, name, key, address = %from, status, "{message}");
        } else {
            tracing::debug!(target: TARGET, action = %action, name, key, address = %from, status, "{message}");
        }
    }
}

/// Refused requests in the interval that runs.
#[derive(Default)]
struct Refused {
    begun: Option<Instant>,
    told: u32,
    untold: u64,
}

/// What is said of one more.
#[derive(Debug, PartialEq, Eq)]
struct Verdict {
    /// So many of the interval before have not been told of.
    untold: Option<u64>,
    /// Whether it has a line of its own.
    tell: bool,
}

impl Refused {
    fn another(&mut self, now: Instant) -> Verdict {
        let mut untold = None;
        if self.begun.is_none_or(|begun| now.duration_since(begun) >= REFUSED_INTERVAL) {
            untold = (self.untold > 0).then_some(self.untold);
            *self = Self { begun: Some(now), told: 0, untold: 0 };
        }
        let tell = self.told < REFUSED_LINES_MAX;
        if tell {
            self.told += 1;
        } else {
            self.untold += 1;
        }
        Verdict { untold, tell }
    }

    fn end(&self) -> Instant {
        self.begun.unwrap_or_else(Instant::now) + REFUSED_INTERVAL
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_beyond_the_limit_are_counted_and_told_once() {
        let start = Instant::now();
        let mut refused = Refused::default();
        for _ in 0..REFUSED_LINES_MAX {
            assert_eq!(refused.another(start), Verdict { untold: None, tell: true });
        }
        for _ in 0..40 {
            let late = start + REFUSED_INTERVAL - Duration::from_millis(1);
            assert_eq!(refused.another(late), Verdict { untold: None, tell: false });
        }
        let next = start + REFUSED_INTERVAL;
        assert_eq!(refused.end(), next);
        assert_eq!(refused.another(next), Verdict { untold: Some(40), tell: true });
        assert_eq!(refused.another(next), Verdict { untold: None, tell: true });
    }

    #[test]
    fn a_name_is_cut_between_its_letters() {
        assert_eq!(shortened("echo"), "echo");
        let long = "é".repeat(NAME_BYTES_MAX);
        assert_eq!(shortened(&format!("x{long}")).len(), NAME_BYTES_MAX - 1);
    }
}
