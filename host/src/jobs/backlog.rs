//! One model's jobs that wait for room in its queue, or for their next attempt, and how they are handed over to it. It never decides which model
//! is next.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use modalkit_engine::Payload;
use modalkit_journal::{JobId, Journal, Slot};

use super::{
    Jobs,
    attempt::Attempt,
    ending::{Ending, end, ending_without_run, input},
    inbox::Inbox,
    live_job::{FirstAttempt, LiveJob},
};
use crate::{
    config::ModelSpec,
    pipeline::Model,
    protocol,
    work::{Deadline, Deaths, Gate, Job, JobError, ReplyHandle, RequestId},
};

/// The fewest jobs that are kept in a model's queue, where as many wait.
const WINDOW_MIN: usize = 64;
/// Full rounds of a model's batches that are in its queue.
const WINDOW_BATCHES: usize = 4;
/// The share of a model's queue that jobs may take: callers who wait on a connection need room too.
const WINDOW_OF_QUEUE: usize = 2;
/// Jobs of a model that are ended unrun in one turn of the loop: each is read and written.
const ENDED_AT_ONCE: usize = 64;
/// The time until a model that takes no jobs is checked again.
pub(super) const RECHECK_INTERVAL: Duration = Duration::from_millis(50);

/// One model's jobs.
#[derive(Default)]
pub(super) struct ModelBacklog {
    pub(super) waiting: VecDeque<(Arc<LiveJob>, FirstAttempt)>,
    /// By when their next attempt may begin, whatever becomes of the system's clock.
    pub(super) delayed: BTreeMap<(Instant, JobId), Arc<LiveJob>>,
    /// In the model's queue, or running.
    pub(super) handed: usize,
    /// The model took none: it is looked at again then.
    pub(super) blocked_until: Option<Instant>,
    /// It was logged that the model isn't served.
    pub(super) told: bool,
}

/// What is needed to hand a job over to its model.
pub(super) struct Handover<'a> {
    pub(super) model: &'a Model,
    pub(super) gate: &'a Arc<Gate>,
    pub(super) inbox: &'a Arc<Inbox>,
    pub(super) jobs: &'a Arc<Jobs>,
    pub(super) journal: &'a Journal,
    /// No other job runs beside it.
    pub(super) alone: bool,
}

/// What became of a job that was to be handed over.
pub(super) enum HandoverResult {
    /// The model's queue has it.
    Queued { must_wake: bool, slot: Arc<Slot> },
    /// It has ended unrun.
    Ended,
    /// The queue didn't take it: that comes back as the end of its attempt.
    Refused,
    /// The journal can't be read.
    Unreadable(Arc<LiveJob>, FirstAttempt),
}

impl ModelBacklog {
    pub(super) fn fill(&mut self, handover: &Handover<'_>) {
        let window = window(&handover.model.spec());
        let (mut wakes, mut unrun) = (false, 0);
        while self.handed < window {
            if unrun >= ENDED_AT_ONCE {
                self.blocked_until = Some(Instant::now());
                break;
            }
            let Some((live_job, first_attempt)) = self.waiting.pop_front() else { break };
            match self.hand_over(live_job, first_attempt, handover) {
                HandoverResult::Queued { must_wake, .. } => wakes |= must_wake,
                HandoverResult::Ended => unrun += 1,
                HandoverResult::Refused => {
                    self.blocked_until = Some(Instant::now() + RECHECK_INTERVAL);
                    break;
                }
                HandoverResult::Unreadable(live_job, first_attempt) => {
                    self.waiting.push_front((live_job, first_attempt));
                    self.blocked_until = Some(Instant::now() + RECHECK_INTERVAL);
                    break;
                }
            }
        }
        if wakes {
            handover.model.queue.wake();
        }
    }

    pub(super) fn hand_over(
        &mut self,
        live_job: Arc<LiveJob>,
        first_attempt: FirstAttempt,
        handover: &Handover<'_>,
    ) -> HandoverResult {
        let Handover { model, gate, inbox, jobs, journal, alone } = *handover;
        if let Some(ending) =
            ending_without_run(&live_job, &model.spec(), jobs.shared.spec.crashes_max, journal)
        {
            end(&live_job, ending, None, jobs, journal);
            return HandoverResult::Ended;
        }
        let input = match input(&live_job, journal) {
            Ok(Some(input)) => input,
            Ok(None) => {
                let lost = "what came in for it is not in the journal".to_owned();
                end(&live_job, Ending::failed(&live_job, journal, lost), None, jobs, journal);
                return HandoverResult::Ended;
            }
            Err(error) => {
                tracing::error!(job_id = %live_job.id, error = ?error, "the journal can't be read; the job waits");
                return HandoverResult::Unreadable(live_job, first_attempt);
            }
        };
        // Kept: writing its end needs it too.
        jobs.shared.keep_input(&live_job, &input);
        let attempts = live_job.progress.lock().attempts;
        let slot = Arc::new(journal.ledger().slot(live_job.id, attempts + 1, alone));
        let attempt = Attempt {
            live_job: Arc::clone(&live_job),
            slot: Arc::clone(&slot),
            inbox: Arc::clone(inbox),
            permit: Some(gate.job()),
            began: false.into(),
            metrics: Arc::clone(&jobs.shared.metrics),
        };
        let job = Job {
            request_id: RequestId::Given(live_job.id.to_string().into()),
            input: Payload::Json(input.parts.message),
            decoded: first_attempt.decoded,
            reply: ReplyHandle::recorded(Box::new(attempt)),
            timings: first_attempt.timings,
            deaths: Deaths::default(),
        };
        // Counted whatever happens: one that isn't taken tells its end as well.
        self.handed += 1;
        // Before the queue has it: a lane may begin it at once.
        let mut progress = live_job.progress.lock();
        let pushed = if alone {
            model.queue.push_alone(job)
        } else {
            model.queue.push([job], live_job.deadline.map(Deadline))
        };
        match pushed {
            Ok(queued) => {
                progress.hand_over(Arc::clone(&model.queue), queued.first);
                HandoverResult::Queued { must_wake: queued.must_wake, slot }
            }
            Err(_) => HandoverResult::Refused,
        }
    }

    /// Ends those whose deadline has passed while their model wasn't serving.
    pub(super) fn end_overdue(&mut self, now: Instant, jobs: &Arc<Jobs>, journal: &Journal) {
        let overdue = |(live_job, _): &(Arc<LiveJob>, FirstAttempt)| {
            live_job.deadline.is_some_and(|deadline| deadline <= now)
        };
        for _ in 0..ENDED_AT_ONCE {
            let Some(place) = self.waiting.iter().position(overdue) else { return };
            let Some((live_job, _)) = self.waiting.remove(place) else { return };
            let ending = Ending::failed(&live_job, journal, protocol::job_failure(&JobError::DeadlinePassed));
            end(&live_job, ending, None, jobs, journal);
        }
    }
}

/// Jobs that one model has in its queue or running.
fn window(spec: &ModelSpec) -> usize {
    let round = spec.batch.max_batch_size * spec.replicas.max * spec.replicas.batches_in_flight;
    (WINDOW_BATCHES * round).max(WINDOW_MIN).min((spec.batch.queue_max / WINDOW_OF_QUEUE).max(1))
}
