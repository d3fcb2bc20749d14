//! Which jobs a host that died was running, and which of them may have done it. It never knows how a death is found out, nor what becomes of
//! a job that is to blame.

use std::{collections::HashSet, num::NonZeroU32};

use crate::{
    ledger::Noted,
    record::{OpenJob, State},
    store::Store,
};

/// How the host before this one died. One that ended in order leaves no job behind that it was running.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostDeath {
    /// Its machine has stopped: no job has to do with it.
    MachineStopped,
    /// It was ended without a trace, as by SIGKILL.
    Killed {
        /// The kernel may have done it for want of memory, which a job may have taken.
        memory_was_short: bool,
    },
    /// Code that it ran has ended it.
    Code {
        /// The thread of it, by the kernel's number, where that was inside a call into a plugin.
        thread: Option<NonZeroU32>,
        /// By what, for people to read.
        how: String,
    },
}

/// What is known of a job by the deaths of hosts that were running it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Suspicion {
    /// Nothing.
    #[default]
    None,
    /// It may have been its doing: it runs alone, until an attempt of it has ended.
    Suspected,
    /// It was its doing.
    Convicted,
}

impl Suspicion {
    pub(crate) fn of(code: i64) -> Self {
        match code {
            0 => Self::None,
            2 => Self::Convicted,
            _ => Self::Suspected,
        }
    }

    pub(crate) fn code(self) -> i64 {
        match self {
            Self::None => 0,
            Self::Suspected => 1,
            Self::Convicted => 2,
        }
    }
}

impl HostDeath {
    /// Counts this death for a job that was being run. `false` where it had nothing to do with it.
    fn charge(&self, job: &mut OpenJob, noted: &Noted) -> bool {
        let is_alone = match self {
            Self::MachineStopped => return false,
            Self::Code { thread: Some(thread), .. } if thread.get() != noted.thread => return false,
            // Nobody else ran on that thread, and it has happened before.
            Self::Code { thread: Some(_), how } if noted.alone => {
                job.suspicion = Suspicion::Convicted;
                job.error = Some(how.clone());
                job.crashes += 1;
                job.crashes_alone += 1;
                return true;
            }
            Self::Code { thread: Some(_), .. } | Self::Killed { memory_was_short: false } => false,
            Self::Code { thread: None, .. } | Self::Killed { memory_was_short: true } => noted.alone,
        };
        job.suspicion = Suspicion::Suspected;
        job.crashes += 1;
        job.crashes_alone += u32::from(is_alone);
        true
    }
}

/// Counts the death of the host before this one for each job that may have to do with it. On disk before the ledger is emptied, so that none is
/// missed; a host that dies between the two counts these once more. `false` where the disk is full: the host starts all the same, and the next
/// start finds them again.
pub(crate) fn take_over(
    store: &mut Store,
    open_jobs: &mut [OpenJob],
    running: &[Noted],
    death: &HostDeath,
    now: u64,
) -> rusqlite::Result<bool> {
    let mut group = store.begin(now)?;
    let mut seen = HashSet::new();
    for noted in running {
        let Ok(index) = open_jobs.binary_search_by_key(&noted.row, |job| job.id.row()) else { continue };
        let job = &mut open_jobs[index];
        // An attempt that has ended is known by its number.
        let was_running = job.state == State::Queued && noted.attempt > job.attempts;
        if was_running && !seen.contains(&noted.row) && death.charge(job, noted) {
            seen.insert(noted.row);
            group.crashed(job)?;
        }
    }
    if seen.is_empty() {
        return Ok(true);
    }
    match group.commit() {
        Err(error) if error.sqlite_error_code() == Some(rusqlite::ErrorCode::DiskFull) => Ok(false),
        committed => committed.map(|()| true),
    }
}
