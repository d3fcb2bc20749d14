//! How jobs end: what is written, and what is told to whoever waits. It owns the limits on results and errors, and never decides
//! whether a job runs again.

use std::{sync::Arc, time::Instant};

use bytes::Bytes;
use modalkit_engine::Payload;
use modalkit_journal::{Finish, Journal, State, Unfit, unix_ms};

use super::{
    Jobs,
    live_job::{Input, LiveJob},
};
use crate::{
    config::ModelSpec,
    protocol::{self, Envelope},
    work::{JobError, JobPermit},
};

/// Bytes of an error that are kept.
const ERROR_BYTES_MAX: usize = 64 << 10;
/// Deaths of hosts that were running a job, until that has failed: where none left a trace, they may all have come from outside; but a pipeline
/// that leaves by `_exit` leaves none either, and would be run for ever.
const DEATHS_MAX: u32 = 16;

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
    pub(super) fn answered(live_job: &LiveJob, journal: &Journal, output: Payload, bytes_max: usize) -> Self {
        let ending = match output.into_json() {
            Ok(output) => Self::succeeded(live_job, journal, output),
            Err(failure) => return Self::failed(live_job, journal, failure.message),
        };
        match ending.message.as_ref().map_or(0, Bytes::len) {
            found if found > bytes_max => {
                let error = format!(
                    "the result has {found} bytes, at most {bytes_max} are kept (server.result_bytes_max)"
                );
                Self::failed(live_job, journal, error)
            }
            _ => ending,
        }
    }

    fn succeeded(live_job: &LiveJob, journal: &Journal, output: Bytes) -> Self {
        let parts = input_or_log(live_job, journal).map(|input| input.parts);
        let meta = parts.as_ref().and_then(|parts| parts.meta.as_deref());
        let message = Some(protocol::succeeded_job(output, meta));
        let queue = parts.map(|parts| parts.success_queue).filter(|queue| !queue.is_empty());
        Self { state: State::Succeeded, message, error: None, queue }
    }

    /// Of a job that has ended the host.
    pub(super) fn convicted(live_job: &LiveJob, journal: &Journal) -> Self {
        let how = live_job.progress.lock().error.clone().unwrap_or_default();
        let error = format!(
            "the host was ended by {how} while it ran this job and no other in the batch; it is not tried again"
        );
        Self::failed(live_job, journal, error)
    }

    pub(super) fn failed(live_job: &LiveJob, journal: &Journal, error: String) -> Self {
        let input = input_or_log(live_job, journal);
        let envelope = input.as_ref().map_or_else(Bytes::new, |input| input.envelope.clone());
        let queue = input.map(|input| input.parts.failure_queue).filter(|queue| !queue.is_empty());
        let error = shortened(error);
        let message = Some(protocol::failed_job(error.clone(), &envelope));
        Self { state: State::Failed, message, error: Some(error), queue }
    }
}

/// Writes how a job ended; then it is told to whoever waits for it, and its message is delivered.
pub(super) fn end(
    live_job: &Arc<LiveJob>,
    ending: Ending,
    permit: Option<JobPermit>,
    jobs: &Arc<Jobs>,
    journal: &Journal,
) {
    let Ending { state, message, error, mut queue } = ending;
    if state == State::Failed && queue.is_none() && live_job.from_queue {
        queue = jobs.queues().dead_letter().map(ToOwned::to_owned);
        tracing::warn!(
            model = &*live_job.model, job_id = %live_job.id, error, to = queue,
            "a request from a queue failed and names no failure queue"
        );
    }
    let (finished, since) = (unix_ms(), journal.clock().now());
    let (attempts, started) = {
        let mut progress = live_job.progress.lock();
        if !progress.end() {
            return;
        }
        (progress.attempts, progress.started)
    };
    jobs.shared.metrics.jobs.ended(&live_job.model, state.word()).inc();
    // Of one that another process accepted nobody knows how long it took: clocks may have been set in between.
    if let Some(accepted) = live_job.accepted {
        jobs.shared.metrics.jobs.seconds.observe(accepted.elapsed().as_secs_f64());
    }
    jobs.shared.unended_less(live_job);
    let least = Finish {
        id: live_job.id,
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
    let (live_job, jobs) = (Arc::clone(live_job), Arc::clone(jobs));
    journal.finish(finish, move |written| {
        match written {
            Ok(()) => jobs.ended(&live_job, queue, since, message.unwrap_or_default()),
            Err(unfit) => give_up_result(&live_job, least, &unfit, &jobs),
        }
        drop(permit);
    });
}

/// Ends a job whose end can't be written with the least that can be.
fn give_up_result(live_job: &Arc<LiveJob>, finish: Finish, unfit: &Unfit, jobs: &Arc<Jobs>) {
    tracing::error!(job_id = %live_job.id, error = %unfit, "the end of a job can't be written; it has failed, and its result is lost");
    let finish = Finish { error: Some(format!("its end could not be written: {unfit}")), ..finish };
    let (live_job, of_end) = (Arc::clone(live_job), Arc::clone(jobs));
    let journal = jobs.journal.read();
    // Once it is closed, the next start runs the job again.
    let Some(journal) = &*journal else { return };
    let since = finish.since;
    journal.finish(finish, move |written| {
        if let Err(error) = written {
            tracing::error!(job_id = %live_job.id, %error, "that the job has failed can't be written either");
        }
        of_end.ended(&live_job, None, since, Bytes::new());
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
pub(super) fn ending_without_run(
    live_job: &LiveJob,
    spec: &ModelSpec,
    crashes_max: u32,
    journal: &Journal,
) -> Option<Ending> {
    if live_job.is_cancelled() {
        return Some(Ending::cancelled());
    }
    if live_job.deadline.is_some_and(|deadline| deadline <= Instant::now()) {
        let error = protocol::job_failure(&JobError::DeadlinePassed);
        return Some(Ending::failed(live_job, journal, error));
    }
    let (attempts, crashes, crashes_alone) = {
        let progress = live_job.progress.lock();
        (progress.attempts, progress.crashes, progress.crashes_alone)
    };
    if crashes_alone >= crashes_max {
        let error = format!(
            "the host died {crashes_alone} times while it was running this job and no other; it is not tried again (server.job_crashes_max)"
        );
        return Some(Ending::failed(live_job, journal, error));
    }
    if crashes >= DEATHS_MAX {
        let error =
            format!("the host died {crashes} times while it was running this job; it is not tried again");
        return Some(Ending::failed(live_job, journal, error));
    }
    // The configuration may have allowed more.
    (attempts > spec.retries).then(|| {
        let error = format!(
            "the last one failed; {attempts} attempts were made and {} retries are allowed (deployment_config.retries)",
            spec.retries
        );
        Ending::failed(live_job, journal, error)
    })
}

pub(super) fn input(
    live_job: &LiveJob,
    journal: &Journal,
) -> Result<Option<Input>, modalkit_journal::ReadError> {
    if let Some(input) = &live_job.progress.lock().input {
        return Ok(Some(input.clone()));
    }
    let Some(envelope) = journal.envelope(live_job.id)? else { return Ok(None) };
    Ok(Envelope::of(&envelope).ok().map(|parts| Input { envelope, parts }))
}

fn input_or_log(live_job: &LiveJob, journal: &Journal) -> Option<Input> {
    input(live_job, journal).unwrap_or_else(|error| {
        tracing::error!(job_id = %live_job.id, error = ?error, "the journal can't be read; the job's message goes nowhere");
        None
    })
}
