//! How jobs end: what is written, and what is told to whoever waits. It owns the limits on results and errors, and never decides
//! whether a job runs again.

use std::{sync::Arc, time::Instant};

use bytes::Bytes;
use modalkit_journal::{Finish, Journal, State, Unfit, unix_ms};

use super::{
    Jobs,
    entry::{Entry, Input, Phase},
    envelope::Parts,
};
use crate::{admission::JobPermit, config::ModelSpec, egress, job::JobError};

/// Bytes of an error that are kept.
const ERROR_BYTES_MAX: usize = 64 << 10;

/// How a job ends.
pub(super) struct Ending {
    state: State,
    message: Option<Bytes>,
    error: Option<String>,
    queue: Option<String>,
}

impl Ending {
    pub(super) fn cancelled() -> Self {
        Self { state: State::Cancelled, message: None, error: None, queue: None }
    }

    /// With the pipeline's answer, where that is no larger than may be kept.
    pub(super) fn answered(entry: &Entry, journal: &Journal, answer: Bytes, bytes_max: usize) -> Self {
        let ending = Self::succeeded(entry, journal, answer);
        match ending.message.as_ref().map_or(0, Bytes::len) {
            found if found > bytes_max => {
                let error = format!(
                    "the result has {found} bytes, at most {bytes_max} are kept (server.result_bytes_max)"
                );
                Self::failed(entry, journal, error)
            }
            _ => ending,
        }
    }

    fn succeeded(entry: &Entry, journal: &Journal, answer: Bytes) -> Self {
        let Some(input) = input_or_say(entry, journal) else {
            return Self { state: State::Succeeded, message: Some(answer), error: None, queue: None };
        };
        let message = match input.parts.meta {
            Some(meta) => egress::with_meta(&answer, &meta),
            None => answer,
        };
        let queue = Some(input.parts.success_queue).filter(|queue| !queue.is_empty());
        Self { state: State::Succeeded, message: Some(message), error: None, queue }
    }

    pub(super) fn failed(entry: &Entry, journal: &Journal, error: String) -> Self {
        let input = input_or_say(entry, journal);
        let envelope = input.as_ref().map_or_else(Bytes::new, |input| input.envelope.clone());
        let queue = input.map(|input| input.parts.failure_queue).filter(|queue| !queue.is_empty());
        let error = shortened(error);
        let message = Some(egress::failed_job(error.clone(), &envelope));
        Self { state: State::Failed, message, error: Some(error), queue }
    }
}

/// Writes how a job ended; then it is told to whoever waits for it, and its message is delivered.
pub(super) fn end(
    entry: &Arc<Entry>,
    ending: Ending,
    permit: Option<JobPermit>,
    jobs: &Arc<Jobs>,
    journal: &Journal,
) {
    let Ending { state, message, error, queue } = ending;
    let (finished, since) = (unix_ms(), journal.clock().now());
    let (attempts, started) = {
        let mut live = entry.live.lock();
        if matches!(live.phase, Phase::Ending | Phase::Ended) {
            return;
        }
        live.phase = Phase::Ending;
        live.queued = None;
        (live.attempts, live.started)
    };
    jobs.shared.metrics.jobs.ended(&entry.model, state.word()).inc();
    // Of one that another process accepted nobody knows how long it took: clocks may have been set in between.
    if let Some(accepted) = entry.accepted {
        jobs.shared.metrics.jobs.seconds.observe(accepted.elapsed().as_secs_f64());
    }
    jobs.shared.unended_less(entry);
    let least = Finish {
        id: entry.id,
        state: State::Failed,
        attempts,
        started,
        finished,
        result: None,
        error: None,
        queue: None,
        since,
    };
    let finish = Finish { state, result: message.clone(), error, queue: queue.clone(), ..least.clone() };
    let (entry, jobs) = (Arc::clone(entry), Arc::clone(jobs));
    journal.finish(finish, move |written| {
        match written {
            Ok(()) => jobs.ended(&entry, queue, since, message.unwrap_or_default()),
            Err(unfit) => give_up_result(&entry, least, &unfit, &jobs),
        }
        drop(permit);
    });
}

/// Ends a job whose end can't be written with the least that can be.
fn give_up_result(entry: &Arc<Entry>, finish: Finish, unfit: &Unfit, jobs: &Arc<Jobs>) {
    tracing::error!(job_id = %entry.id, error = %unfit, "the end of a job can't be written; it has failed, and its result is lost");
    let finish = Finish { error: Some(format!("its end could not be written: {unfit}")), ..finish };
    let (entry, of_end) = (Arc::clone(entry), Arc::clone(jobs));
    let journal = jobs.journal.read();
    // Once it is closed, the next start runs the job again.
    let Some(journal) = &*journal else { return };
    let since = finish.since;
    journal.finish(finish, move |written| {
        if let Err(error) = written {
            tracing::error!(job_id = %entry.id, %error, "that the job has failed can't be written either");
        }
        of_end.ended(&entry, None, since, Bytes::new());
    });
}

/// An error as it is kept: a plugin may have said anything.
pub(super) fn shortened(mut error: String) -> String {
    if error.len() > ERROR_BYTES_MAX {
        error.truncate(error.floor_char_boundary(ERROR_BYTES_MAX));
        error.push_str(" … (the rest is cut off)");
    }
    error
}

/// Why a job is not run at all.
pub(super) fn hopeless(
    entry: &Entry,
    spec: &ModelSpec,
    crashes_max: u32,
    journal: &Journal,
) -> Option<Ending> {
    if entry.is_cancelled() {
        return Some(Ending::cancelled());
    }
    if entry.deadline.is_some_and(|deadline| deadline <= Instant::now()) {
        let error = egress::job_failure(&JobError::DeadlinePassed);
        return Some(Ending::failed(entry, journal, error));
    }
    let (attempts, crashes_alone) = {
        let live = entry.live.lock();
        (live.attempts, live.crashes_alone)
    };
    if crashes_alone >= crashes_max {
        let error = format!(
            "the host died {crashes_alone} times while it was running this job and no other; it is not tried again (server.job_crashes_max)"
        );
        return Some(Ending::failed(entry, journal, error));
    }
    // The configuration may have allowed more.
    (attempts > spec.retries).then(|| {
        let error = format!(
            "the last one failed; {attempts} attempts were made and {} retries are allowed (deployment_config.retries)",
            spec.retries
        );
        Ending::failed(entry, journal, error)
    })
}

pub(super) fn input(entry: &Entry, journal: &Journal) -> Result<Option<Input>, modalkit_journal::ReadError> {
    if let Some(input) = &entry.live.lock().input {
        return Ok(Some(input.clone()));
    }
    let Some(envelope) = journal.envelope(entry.id)? else { return Ok(None) };
    Ok(Parts::of(&envelope).ok().map(|parts| Input { envelope, parts }))
}

fn input_or_say(entry: &Entry, journal: &Journal) -> Option<Input> {
    input(entry, journal).unwrap_or_else(|error| {
        tracing::error!(job_id = %entry.id, error = ?error, "the journal can't be read; the job's message goes nowhere");
        None
    })
}
