//! The audit log: who managed the host, and who was refused. It owns the limits on lines that anybody can cause, and never knows why
//! a caller was refused, nor any key's value.

use std::{
    convert::Infallible,
    fmt,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::access::{Caller, Origin};

/// What these lines are logged under.
use crate::insight::log::AUDIT_TARGET as TARGET;
/// Lines about refused requests in each interval, over the network and over the management socket each; further ones are counted.
const REFUSED_LINES_MAX: u32 = 10;
/// The interval.
const REFUSED_INTERVAL: Duration = Duration::from_secs(10);
/// Lines about what callers who don't manage changed of their own in each interval; further ones are counted.
const OWN_CHANGES_LINES_MAX: u32 = 10;
/// The interval.
const OWN_CHANGES_INTERVAL: Duration = Duration::from_secs(10);
/// Bytes of a name in a line: callers choose them.
const NAME_BYTES_MAX: usize = 256;
/// What stands in the place of a key's name for callers over the management socket.
const SOCKET: &str = "socket";

/// Writes the audit log.
pub struct Audit {
    /// Who was refused over the network.
    network: LineLimit,
    /// Who was refused over the management socket: nobody out there takes these lines away.
    socket: LineLimit,
    /// What callers who don't manage changed.
    own_changes: LineLimit,
}

impl Default for Audit {
    fn default() -> Self {
        let refused = |untold| LineLimit::new(REFUSED_LINES_MAX, REFUSED_INTERVAL, untold);
        Self {
            network: refused(|count, interval| {
                tracing::warn!(target: TARGET, count, ?interval, over = "network", "further requests were refused");
            }),
            socket: refused(|count, interval| {
                tracing::warn!(target: TARGET, count, ?interval, over = SOCKET, "further requests were refused");
            }),
            own_changes: LineLimit::new(OWN_CHANGES_LINES_MAX, OWN_CHANGES_INTERVAL, |count, interval| {
                tracing::info!(target: TARGET, count, ?interval, "further jobs were changed by their callers");
            }),
        }
    }
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
    /// What it does.
    pub effect: Effect,
}

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// It looks at how the host is.
    Look,
    /// It reads settings, or a queue's messages.
    Read,
    /// It changes something.
    Change,
}

impl fmt::Display for Action<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.method, self.endpoint)
    }
}

/// A request that is being answered. Where its caller leaves first, the line says so: what it asked for may happen all the same.
pub struct OpenAction<'a> {
    audit: &'a Audit,
    action: Action<'a>,
    manages: bool,
    key: Option<&'a str>,
    from: &'a Origin,
    status: Option<u16>,
}

/// Whether a request that was let in has a line.
#[derive(Debug, PartialEq, Eq)]
enum LogAs {
    None,
    Debug,
    Info,
    /// Anybody can cause it.
    InfoWithinLimit,
}

impl LogAs {
    fn of(effect: Effect, manages: bool, status: Option<u16>) -> Self {
        match (effect, manages) {
            (Effect::Change | Effect::Read, true) => Self::Info,
            (Effect::Change, false) if status.is_some_and(|status| (400..500).contains(&status)) => {
                Self::None
            }
            (Effect::Change, false) => Self::InfoWithinLimit,
            (Effect::Look, _) | (Effect::Read, false) => Self::Debug,
        }
    }
}

impl Audit {
    /// A request of a caller who was let in; its line is written at its end.
    #[must_use]
    pub fn begin<'a>(&'a self, action: Action<'a>, caller: &'a Caller, from: &'a Origin) -> OpenAction<'a> {
        let key = match from {
            Origin::Socket { .. } => Some(SOCKET),
            Origin::Network(_) => caller.key.as_deref(),
        };
        OpenAction { audit: self, action, manages: caller.manages, key, from, status: None }
    }

    /// A request that was refused for the key that it showed, or for showing none.
    pub fn refused(&self, action: Action<'_>, key: Option<&str>, from: &Origin, status: u16) {
        if self.refusals(from).has_a_line() {
            let name = shortened(action.name);
            tracing::warn!(target: TARGET, action = %action, name, key, address = %from, status, "request refused");
        }
    }

    fn refusals(&self, from: &Origin) -> &LineLimit {
        match from {
            Origin::Network(_) => &self.network,
            Origin::Socket { .. } => &self.socket,
        }
    }

    /// Tells of those that had no line of their own, also when nobody calls any more.
    pub async fn run(&self) -> Infallible {
        tokio::select! {
            never = self.network.run() => never,
            never = self.socket.run() => never,
            never = self.own_changes.run() => never,
        }
    }

    /// Tells of those that had no line of their own so far.
    pub fn flush(&self) {
        [&self.network, &self.socket, &self.own_changes].into_iter().for_each(LineLimit::flush);
    }
}

fn shortened(name: &str) -> &str {
    &name[..name.floor_char_boundary(NAME_BYTES_MAX)]
}

impl OpenAction<'_> {
    /// It was answered with this status.
    pub fn answered(mut self, status: u16) {
        self.status = Some(status);
    }
}

impl Drop for OpenAction<'_> {
    fn drop(&mut self) {
        let Self { audit, action, manages, key, from, status } = self;
        let line = LogAs::of(action.effect, *manages, *status);
        let name = shortened(action.name);
        let message = if status.is_some() { "management" } else { "management, whose caller left" };
        match line {
            LogAs::None => {}
            LogAs::Debug => {
                tracing::debug!(target: TARGET, action = %action, name, key, address = %from, status, "{message}");
            }
            LogAs::InfoWithinLimit if !audit.own_changes.has_a_line() => {}
            LogAs::Info | LogAs::InfoWithinLimit => {
                tracing::info!(target: TARGET, action = %action, name, key, address = %from, status, "{message}");
            }
        }
    }
}

/// Lines of one kind, up to a limit.
struct LineLimit {
    lines_max: u32,
    interval: Duration,
    /// Tells how many in an interval had no line.
    tell_untold: fn(u64, Duration),
    counted: Mutex<Counted>,
    /// Some were counted and not told of.
    untold: Notify,
}

/// Those in the interval that runs.
#[derive(Default)]
struct Counted {
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

impl LineLimit {
    fn new(lines_max: u32, interval: Duration, tell_untold: fn(u64, Duration)) -> Self {
        Self { lines_max, interval, tell_untold, counted: Mutex::default(), untold: Notify::new() }
    }

    /// Whether one more has a line of its own; else it is counted.
    fn has_a_line(&self) -> bool {
        let verdict = self.another(Instant::now());
        if let Some(untold) = verdict.untold {
            (self.tell_untold)(untold, self.interval);
        }
        if !verdict.tell {
            self.untold.notify_one();
        }
        verdict.tell
    }

    fn another(&self, now: Instant) -> Verdict {
        let mut counted = self.counted.lock();
        let mut untold = None;
        if counted.begun.is_none_or(|begun| now.duration_since(begun) >= self.interval) {
            untold = (counted.untold > 0).then_some(counted.untold);
            *counted = Counted { begun: Some(now), told: 0, untold: 0 };
        }
        let tell = counted.told < self.lines_max;
        if tell {
            counted.told += 1;
        } else {
            counted.untold += 1;
        }
        Verdict { untold, tell }
    }

    /// When the interval ends that runs.
    fn end(&self) -> Instant {
        self.counted.lock().begun.unwrap_or_else(Instant::now) + self.interval
    }

    async fn run(&self) -> Infallible {
        loop {
            self.untold.notified().await;
            tokio::time::sleep_until(self.end().into()).await;
            self.flush();
        }
    }

    fn flush(&self) {
        let untold = std::mem::take(&mut self.counted.lock().untold);
        if untold > 0 {
            (self.tell_untold)(untold, self.interval);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_beyond_the_limit_are_counted_and_told_once() {
        let start = Instant::now();
        let audit = Audit::default();
        let refused = audit.refusals(&Origin::Network("192.0.2.7:1".parse().unwrap()));
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
    fn refusals_over_the_network_hide_none_at_the_management_socket() {
        let audit = Audit::default();
        let action = Action { method: "GET", endpoint: "/config", name: "", effect: Effect::Read };
        let network = Origin::Network("192.0.2.7:1".parse().unwrap());
        for _ in 0..=REFUSED_LINES_MAX {
            audit.refused(action, None, &network, 401);
        }
        assert!(!audit.refusals(&network).has_a_line());
        assert!(audit.refusals(&Origin::Socket { uid: 1000 }).has_a_line());
    }

    #[test]
    fn callers_who_do_not_manage_leave_few_lines_and_none_where_nothing_changed() {
        let audit = Audit::default();
        let from = Origin::Network("192.0.2.7:1".parse().unwrap());
        let action = Action { method: "DELETE", endpoint: "/jobs/{id}", name: "x", effect: Effect::Change };
        let told = || audit.own_changes.counted.lock().told;
        let caller = Caller::default();
        for status in [400, 404, 409, 429] {
            audit.begin(action, &caller, &from).answered(status);
        }
        assert_eq!(told(), 0);
        for _ in 0..2 * OWN_CHANGES_LINES_MAX {
            audit.begin(action, &caller, &from).answered(200);
        }
        drop(audit.begin(action, &caller, &from));
        assert_eq!(told(), OWN_CHANGES_LINES_MAX);
        assert_eq!(audit.own_changes.counted.lock().untold, u64::from(OWN_CHANGES_LINES_MAX) + 1);
        // Nor do they take lines from those who are refused, or who manage.
        assert!(audit.refusals(&from).has_a_line());
        assert_eq!(LogAs::of(Effect::Change, true, Some(404)), LogAs::Info);
    }

    #[test]
    fn who_manages_leaves_a_line_for_changes_settings_and_results() {
        for (effect, manages, status, expected) in [
            (Effect::Change, true, Some(200), LogAs::Info),
            (Effect::Change, true, None, LogAs::Info),
            (Effect::Read, true, Some(200), LogAs::Info),
            (Effect::Look, true, Some(200), LogAs::Debug),
            (Effect::Look, false, Some(200), LogAs::Debug),
            (Effect::Change, false, Some(202), LogAs::InfoWithinLimit),
            (Effect::Change, false, Some(503), LogAs::InfoWithinLimit),
            (Effect::Change, false, None, LogAs::InfoWithinLimit),
            (Effect::Change, false, Some(404), LogAs::None),
        ] {
            assert_eq!(LogAs::of(effect, manages, status), expected, "{effect:?} {manages} {status:?}");
        }
    }

    #[test]
    fn a_name_is_cut_between_its_letters() {
        assert_eq!(shortened("echo"), "echo");
        let long = "é".repeat(NAME_BYTES_MAX);
        assert_eq!(shortened(&format!("x{long}")).len(), NAME_BYTES_MAX - 1);
    }
}
