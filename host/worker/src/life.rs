//! A worker process from its start to its end, as the host knows it: how it is ended, and how it ended. It never knows what the worker runs.

use std::{
    fs::{self, File},
    io,
    os::unix::{fs::FileExt, process::ExitStatusExt},
    process::ExitStatus,
    time::{Duration, Instant},
};

use modalkit_engine::{Death, EndedBy};
use parking_lot::{Condvar, Mutex};

use crate::{cgroup::Cgroup, channel::Breaker, supervisor};

/// How long a process that has lost its connection, or was killed, is waited for until it counts as dead all the same.
const DEATH_TIME_MAX: Duration = Duration::from_secs(5);
/// Bytes that are read of what the worker noted of its end.
const NOTE_BYTES_MAX: usize = 512;
/// Signals that are sent by others: code doesn't raise them by its faults.
const SENT: [i32; 5] = [libc::SIGKILL, libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT];

/// One worker process.
pub(crate) struct Life {
    pub(crate) model: String,
    /// Broken, they end the guard's patience and every call that waits for the worker.
    breakers: Vec<Breaker>,
    /// Where its code's end is noted as it happens.
    note: File,
    cgroup: Option<Cgroup>,
    state: Mutex<State>,
    died: Condvar,
}

struct Killed {
    why: String,
    at: Instant,
    /// Who brought it about.
    by: EndedBy,
}

#[derive(Default)]
struct State {
    /// As the worker says.
    pid: Option<u32>,
    /// Why the host ended it, and since when that should have happened.
    killed: Option<Killed>,
    /// It was told to leave: an end with 0 is none that anybody need hear of.
    leaves: bool,
    death: Option<Death>,
}

impl Life {
    pub(crate) fn new(model: String, breakers: Vec<Breaker>, note: File, cgroup: Option<Cgroup>) -> Self {
        Self { model, breakers, note, cgroup, state: Mutex::default(), died: Condvar::new() }
    }

    pub(crate) fn death(&self) -> Option<Death> {
        self.state.lock().death.clone()
    }

    pub(crate) fn has_died(&self) -> bool {
        self.state.lock().death.is_some()
    }

    pub(crate) fn set_pid(&self, pid: u32) {
        self.state.lock().pid = Some(pid);
    }

    pub(crate) fn set_leaves(&self) {
        self.state.lock().leaves = true;
    }

    /// Since when it should be gone.
    pub(crate) fn killed_at(&self) -> Option<Instant> {
        self.state.lock().killed.as_ref().map(|killed| killed.at)
    }

    /// Ends it with all its descendants, for the first of the reasons that are given.
    pub(crate) fn kill(&self, why: &str) {
        self.end(why, EndedBy::Host);
    }

    pub(crate) fn end(&self, why: &str, by: EndedBy) {
        let mut state = self.state.lock();
        if state.death.is_none() {
            state.killed.get_or_insert_with(|| Killed { why: why.to_owned(), at: Instant::now(), by });
        }
        drop(state);
        self.breakers.iter().for_each(Breaker::break_off);
        // It sees to it that this comes to an end.
        if let Ok(supervisor) = supervisor::shared(None) {
            supervisor.wake();
        }
    }

    /// Waits until it is dead. A worker that has broken its connection is ended for this reason, if it doesn't end by itself at once.
    pub(crate) fn wait_for_death(&self, patience: Duration, why: &str) -> Death {
        if let Some(death) = self.wait(patience) {
            return death;
        }
        self.end(why, EndedBy::Itself);
        self.wait(DEATH_TIME_MAX).unwrap_or_else(|| Death {
            how: format!("it was ended by the host: {why}; its process is still there"),
            by: EndedBy::Itself,
        })
    }

    pub(crate) fn wait(&self, time: Duration) -> Option<Death> {
        let until = Instant::now() + time;
        let mut state = self.state.lock();
        while state.death.is_none() {
            if self.died.wait_until(&mut state, until).timed_out() {
                break;
            }
        }
        state.death.clone()
    }

    /// The process is gone.
    pub(crate) fn ended(&self, status: io::Result<ExitStatus>) -> Death {
        let was_out_of_memory = self.cgroup.as_ref().is_some_and(Cgroup::was_out_of_memory);
        let note = self.read_note();
        let mut state = self.state.lock();
        // Without a signal or a note it may have left since its connection was gone.
        let says_why = !note.is_empty() || status.as_ref().is_ok_and(|status| status.signal().is_some());
        let own = describe(status, &note);
        let death = match &state.killed {
            // It had died before the host saw to it.
            Some(Killed { by: EndedBy::Itself, .. }) if says_why && own.by == EndedBy::Itself => own,
            Some(Killed { why, by, .. }) => {
                Death { how: format!("it was ended by the host: {why}"), by: *by }
            }
            None if was_out_of_memory && note.is_empty() => Death {
                how: "it was ended by the kernel: it needed more than its memory (deployment_config.memory)"
                    .into(),
                by: EndedBy::Itself,
            },
            None => own,
        };
        state.death = Some(death.clone());
        drop(state);
        self.died.notify_all();
        // What waits for the worker and has not noticed: a descendant that escaped may hold the connection's other end.
        self.breakers.iter().for_each(Breaker::break_off);
        death
    }

    /// Whether its end was asked for.
    pub(crate) fn was_expected(&self) -> bool {
        let state = self.state.lock();
        state.leaves || state.killed.is_some()
    }

    fn read_note(&self) -> String {
        let mut bytes = [0; NOTE_BYTES_MAX];
        let length = self.note.read_at(&mut bytes, 0).unwrap_or_default();
        let note = bytes[..length].trim_ascii();
        // The worker's code can write there as well.
        let is_text = note.iter().all(|byte| byte.is_ascii_graphic() || *byte == b' ');
        if is_text { String::from_utf8_lossy(note).into_owned() } else { String::new() }
    }

    pub(crate) fn resident_bytes(&self) -> Option<u64> {
        let pid = self.state.lock().pid?;
        let statm = fs::read_to_string(format!("/proc/{pid}/statm")).ok()?;
        let pages: u64 = statm.split(' ').nth(1)?.parse().ok()?;
        Some(pages * rustix::param::page_size() as u64)
    }
}

fn describe(status: io::Result<ExitStatus>, note: &str) -> Death {
    let Ok(status) = status else {
        return Death { how: "nobody knows how it ended".into(), by: EndedBy::Others };
    };
    let how = match (status.signal(), status.code()) {
        (Some(_), _) if !note.is_empty() => note.to_owned(),
        (Some(signal), _) => signal_name(signal),
        (None, Some(code)) if note.is_empty() => format!("it exited with code {code}"),
        (None, code) => format!("{note} (exit code {})", code.unwrap_or_default()),
    };
    let was_sent = note.is_empty() && status.signal().is_some_and(|signal| SENT.contains(&signal));
    Death { how, by: if was_sent { EndedBy::Others } else { EndedBy::Itself } }
}

fn signal_name(signal: i32) -> String {
    let name = match signal {
        libc::SIGKILL => "SIGKILL",
        libc::SIGTERM => "SIGTERM",
        libc::SIGINT => "SIGINT",
        libc::SIGHUP => "SIGHUP",
        libc::SIGQUIT => "SIGQUIT",
        libc::SIGSEGV => "SIGSEGV",
        libc::SIGABRT => "SIGABRT",
        libc::SIGBUS => "SIGBUS",
        libc::SIGILL => "SIGILL",
        libc::SIGFPE => "SIGFPE",
        libc::SIGSYS => "SIGSYS",
        libc::SIGXCPU => "SIGXCPU",
        other => return format!("signal {other}"),
    };
    name.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_death_says_what_is_known_of_it_and_who_did_it() {
        let of = |raw: i32, note: &str| {
            let death = describe(Ok(ExitStatus::from_raw(raw)), note);
            (death.how, death.by)
        };
        assert_eq!(of(libc::SIGSEGV, "SIGSEGV in predict"), ("SIGSEGV in predict".into(), EndedBy::Itself));
        assert_eq!(of(libc::SIGSEGV, ""), ("SIGSEGV".into(), EndedBy::Itself));
        assert_eq!(of(libc::SIGKILL, ""), ("SIGKILL".into(), EndedBy::Others));
        assert_eq!(of(7 << 8, ""), ("it exited with code 7".into(), EndedBy::Itself));
        assert_eq!(of(70 << 8, "exit() in load"), ("exit() in load (exit code 70)".into(), EndedBy::Itself));
    }
}
