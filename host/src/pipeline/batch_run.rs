//! One batch on a lane: its inputs decoded, its stages run, its callers answered, or of another process their replies handed back for later. What fails as a whole where another try may help is run again
//! in halves, until the item that does it is alone; what came to nothing since its process died goes back to the queue, to run without
//! company. It never knows how many replicas there are, nor when one is replaced.

use std::{
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use modalkit_batch::{Closed, Waiting};
use modalkit_engine::{
    Checked, ChunkResult, Decoded, EndedBy, Failure, FailureKind, Instance, Interest, Process,
};

use super::{
    BatchEnd, Taken,
    inference_stats::BatchTotals,
    lane::{LaneContext, LaneSlot, Running, Seat, Waiter},
    lost_device,
    stages::{Callers, Ended, StageTimes, counts_as_healthy, decoded_for, is_of_device, stages, unwanted},
};
use crate::{
    insight::BatchTimings,
    work::{ChunkSender, Deaths, Job, JobError, Replies, ReplyHandle},
};

/// What one input's cost counts for at most: a counter of whole numbers begins again where it overflows.
const COST_MAX: u64 = 1 << 40;
/// How long a process may take to die whose device has failed.
const DEATH_TIME_MAX: Duration = Duration::from_secs(5);
/// Times that a job comes back from processes that somebody else ended, until it has failed; and the same where it was alone in the last of them: the
/// kernel, for want of memory, ends a process as anybody else would.
const UNCHARGED_MAX: u32 = 8;
const UNCHARGED_ALONE_MAX: u32 = 3;

/// An item on its way: its place among the batch's waiters, and its input where that is decoded.
type Item = (usize, Option<Decoded>);

/// What has come to nothing since the process has died.
struct Died {
    how: String,
    by: EndedBy,
    /// Those that it was running.
    suspects: Vec<usize>,
    /// Its device had failed in it.
    of_device: bool,
}

struct BatchRun<'r> {
    instance: &'r dyn Instance,
    lane: &'r LaneSlot,
    context: &'r LaneContext,
    /// By the places of waiters.
    ends: Vec<Option<Ended>>,
    callers: LaneCallers<'r>,
    times: StageTimes,
    cost: u64,
    padding: u64,
    /// Why the batch failed as a whole, at first.
    failed: Option<Failure>,
    begun: Instant,
    /// After this it is not run again in parts.
    time_max: Duration,
}

/// A batch that ran.
pub(super) struct Ran {
    /// Its replies that are to be sent once the next one is under way.
    pub(super) unsent: Replies,
    /// `None` where it says nothing of the next one: nothing ran, or it ran without company or came to nothing.
    pub(super) end: Option<BatchEnd>,
}

/// Runs a batch, and sends the replies of the one before as soon as it is under way. `None` when it was given up meanwhile, and this thread with it.
pub(super) fn run(seat: &Seat<'_>, taken: Taken, mut before: Replies) -> Option<Ran> {
    let Seat { instance, lane, context, .. } = *seat;
    let Taken { batch, at, free_since } = taken;
    // Timings of the jobs that carry any.
    let mut timed = Vec::new();
    let (mut waiters, mut items) =
        (Vec::with_capacity(batch.jobs.len()), Vec::with_capacity(batch.jobs.len()));
    let is_alone = batch.closed == Closed::Alone;
    // A process has died while it looked at these.
    let mut suspects = Vec::new();
    for Waiting { job, arrived, id } in batch.jobs {
        if job.reply.is_abandoned() {
            context.metrics.skipped_cancelled.inc();
            continue;
        }
        if instance.process().is_none() && job.deaths.suspected > 0 {
            let message = "a worker process died while it ran this input, and its model now runs in the host's own process: there it is not tried".to_owned();
            job.reply.send(Err(JobError::Failed(Failure { kind: FailureKind::Died, message })));
            continue;
        }
        if !is_alone && job.decoded.as_ref().is_some_and(|decoded| decoded.checked == Checked::Suspect) {
            let job = Job { decoded: None, deaths: Deaths { suspected: 1, ..job.deaths }, ..job };
            suspects.push(Waiting { job, arrived, id });
            continue;
        }
        if let Some(timings) = job.timings {
            timed.push((timings, arrived));
        }
        job.reply.begins();
        items.push((waiters.len(), job.decoded));
        let Job { reply, request_id, input, deaths, .. } = job;
        waiters.push(Some(Waiter { reply, request_id, input, id, arrived, deaths, has_begun: false }));
    }
    run_alone(suspects, context);
    if waiters.is_empty() {
        return Some(Ran { unsent: before, end: None });
    }
    if seat.company.is_some() || is_alone {
        // It may wait for other lanes, or for checks of inputs.
        before.send();
    }
    // Nothing else runs in the same process beside a job that is under suspicion.
    let _company = seat.company(is_alone);
    let _kept = instance.process().filter(|_| is_alone).map(Process::keep_to_batches);
    // From here on plugin code runs, and the fleet watches the time.
    let started = if seat.company.is_some() { Instant::now() } else { at };
    *lane.running.lock() = Some(Running { started, waits_since: None, overran: None, waiters });
    let count = items.len();
    let begun = Instant::now();
    let mut run = BatchRun {
        instance,
        lane,
        context,
        ends: std::iter::repeat_with(|| None).take(count).collect(),
        callers: LaneCallers { lane, context, places: Vec::new(), waited: Duration::ZERO, before },
        times: StageTimes::default(),
        cost: 0,
        padding: 0,
        failed: None,
        begun,
        time_max: context.generation.spec.replicas.batch_timeout,
    };
    let result = run.run(items);
    let ended = Instant::now();
    let BatchRun { mut ends, callers, times, cost, padding, failed, .. } = run;
    let waited = callers.waited;
    let mut totals = BatchTotals::default();
    if failed.is_none() && result.is_ok() {
        context.metrics.cost.inc_by(cost);
        context.metrics.padding.inc_by(padding);
        totals.stages = context.observe(begun, &times, ended - waited).map(|stages| (count, stages));
    }
    let result = result.and_then(|()| examine(seat, &mut ends));
    if !timed.is_empty() {
        let batch = BatchTimings {
            closed: batch.closed,
            size: count,
            generation: context.generation.number,
            replica: seat.number,
            free_since,
            taken: at,
            begun,
            preprocessed: times.preprocessed,
            predicted: times.predicted,
            ended,
            span: None,
        };
        context.record_timings(batch, timed);
    }
    let Running { mut waiters, overran, .. } = lane.running.lock().take()?;
    // What callers took who don't read is no sign of a slow pipeline.
    let took = (ended - begun).saturating_sub(waited);
    let end = (!is_alone && result.is_ok()).then_some(BatchEnd { jobs: count, took });
    if let Err(died) = result {
        // Beside others, or after them in the same process, it may have been theirs. What hangs has hung by itself.
        let is_certain = count == 1 && (is_alone || overran.is_some() && seat.is_only_lane);
        let open: Vec<usize> = (0..count).filter(|place| ends[*place].is_none()).collect();
        if !died.suspects.is_empty() && overran.is_none() {
            context.metrics.died.inc();
        }
        if !died.suspects.is_empty() && (died.by == EndedBy::Itself || overran.is_some()) {
            context.count(took, false);
        }
        come_back(died, &open, is_certain, overran, &mut waiters, context);
    } else if ends.iter().any(Option::is_some) {
        match counts_as_healthy(ends.iter().flatten()) {
            Some(is_healthy) => context.count(took, is_healthy),
            None => context.generation.batch_stats.note_time(took),
        }
    }
    // Before anybody is answered: who looks then finds it counted.
    for (end, waiter) in
        ends.iter().zip(&waiters).filter_map(|(end, waiter)| end.as_ref().zip(waiter.as_ref()))
    {
        let succeeded = match end {
            Ended::Outcome(Err(failure)) if failure.kind == FailureKind::Unwanted => continue,
            Ended::Outcome(outcome) => outcome.is_ok(),
            Ended::Rejected(_) => false,
        };
        totals.queue.add(begun.saturating_duration_since(waiter.arrived));
        let counted = if succeeded { &mut totals.succeeded } else { &mut totals.failed };
        counted.add(ended.saturating_duration_since(waiter.arrived));
    }
    context.generation.inference_stats.add(&totals);
    let mut replies = Replies::default();
    for (place, ended) in ends.into_iter().enumerate() {
        let (Some(ended), Some(waiter)) = (ended, waiters[place].take()) else { continue };
        let reply = match ended {
            Ended::Outcome(outcome) => outcome.map_err(JobError::Failed),
            Ended::Rejected(rejection) => Err(context.generation.rejected(rejection, &waiter.input)),
        };
        // Another process begins the next batch, where one waits, before these callers are answered and ask again: else it would wait for a core
        // behind them. In this process the lane has the core.
        match instance.process() {
            Some(_) => replies.push(waiter.reply, reply),
            None => waiter.reply.send(reply),
        }
    }
    Some(Ran { unsent: replies, end })
}

/// Finds out what failures have to do with the device. In this process, the driver is asked. A process of its own whose device failed in it is
/// ended: the failure lasts as long as that does, and the device is well.
fn examine(seat: &Seat<'_>, ends: &mut [Option<Ended>]) -> Result<(), Died> {
    let Some(process) = seat.instance.process() else {
        lost_device::examine(seat.lease, ends.iter_mut().flatten().filter_map(Ended::failure_mut));
        return Ok(());
    };
    let of_device = |ended: &Option<Ended>| ended.as_ref()?.failure().cloned().filter(is_of_device);
    let suspects: Vec<usize> = (0..ends.len()).filter(|place| of_device(&ends[*place]).is_some()).collect();
    let Some(failure) = suspects.first().and_then(|place| of_device(&ends[*place])) else { return Ok(()) };
    let how = format!("its device failed in its process: {}", failure.message);
    process.kill(&how, EndedBy::Itself);
    // Before anything else is run in it.
    process.wait(DEATH_TIME_MAX);
    suspects.iter().for_each(|place| ends[*place] = None);
    Err(Died { how, by: EndedBy::Itself, suspects, of_device: true })
}

impl BatchRun<'_> {
    /// Runs items, in halves where all of them fail.
    fn run(&mut self, items: Vec<Item>) -> Result<(), Died> {
        let (mut places, mut inputs) = (Vec::with_capacity(items.len()), Vec::with_capacity(items.len()));
        let (mut cost, mut largest, mut are_measured) = (0, 0, true);
        for (place, decoded) in items {
            let Some(decoded) = self.decoded(place, decoded) else { continue };
            match decoded {
                Ok(decoded) => {
                    let cost_of_item = decoded.measure.cost.min(COST_MAX);
                    cost += cost_of_item;
                    largest = cost_of_item.max(largest);
                    are_measured &= decoded.checked == Checked::Validated;
                    places.push(place);
                    inputs.push(decoded);
                }
                Err(error) => {
                    if let Some(arrived) = self.lane.refuse(place, error) {
                        self.context.generation.inference_stats.add_refused(arrived.elapsed());
                    }
                }
            }
        }
        if inputs.is_empty() {
            return Ok(());
        }
        self.cost += cost;
        if are_measured {
            self.padding += largest * inputs.len() as u64 - cost;
        }
        if let Some(death) = self.instance.process().and_then(|process| process.death()) {
            // Before these were its concern.
            return Err(Died { how: death.how, by: death.by, suspects: Vec::new(), of_device: false });
        }
        self.callers.places.clone_from(&places);
        let ran = stages(self.instance, inputs, &mut self.times, &mut self.callers);
        if let Some(cost) = self.times.cost.take() {
            self.cost = cost.min(COST_MAX);
        }
        let failure = match ran {
            Ok(ends) => {
                for (place, ended) in places.into_iter().zip(ends) {
                    self.ends[place] = Some(ended);
                }
                return Ok(());
            }
            Err(failure) => failure,
        };
        if matches!(failure.kind, FailureKind::Died | FailureKind::NeverBegan) {
            let death = self.instance.process().and_then(|process| process.death());
            let by = death.map_or(EndedBy::Itself, |death| death.by);
            let suspects = if failure.kind == FailureKind::Died { places } else { Vec::new() };
            return Err(Died { how: failure.message, by, suspects, of_device: false });
        }
        if self.failed.is_none() {
            self.say_failed(&failure, &places);
            self.failed = Some(failure.clone());
        }
        if places.len() == 1 || !may_be_one_items(&failure) || self.begun.elapsed() > self.time_max {
            places
                .into_iter()
                .for_each(|place| self.ends[place] = Some(Ended::Outcome(Err(failure.clone()))));
            return Ok(());
        }
        let second = places.split_off(places.len().div_ceil(2));
        for half in [places, second] {
            let mut again = Vec::with_capacity(half.len());
            for place in half {
                if self.lane.has_begun(place) {
                    self.ends[place] = Some(Ended::Outcome(Err(failure.clone())));
                } else if self.callers.interest_of(place) == Interest::Nothing {
                    self.ends[place] = Some(Ended::Outcome(Err(unwanted())));
                } else {
                    again.push((place, None));
                }
            }
            if again.is_empty() {
                continue;
            }
            if self.begun.elapsed() > self.time_max {
                again
                    .iter()
                    .for_each(|(place, _)| self.ends[*place] = Some(Ended::Outcome(Err(failure.clone()))));
                continue;
            }
            if !self.lane.starts_again() {
                // Given up: nobody waits.
                return Ok(());
            }
            self.context.metrics.reruns_halved.inc_by(again.len() as u64);
            self.run(again)?;
        }
        Ok(())
    }

    /// An item's input for this instance; `None` where nobody waits for it any more.
    fn decoded(&self, place: usize, decoded: Option<Decoded>) -> Option<Result<Decoded, JobError>> {
        match decoded {
            // As nearly all are.
            Some(decoded) if decoded.checked == Checked::Validated && self.instance.owns(&decoded) => {
                Some(Ok(decoded))
            }
            decoded => {
                let input = self.lane.with_waiter(place, |waiter| waiter.input.clone())?;
                Some(decoded_for(self.instance, decoded, &input, &self.context.generation))
            }
        }
    }

    fn say_failed(&self, failure: &Failure, places: &[usize]) {
        let panicked = failure.kind == FailureKind::Panicked;
        let metrics = &self.context.metrics;
        if panicked { &metrics.panicked } else { &metrics.failed }.inc();
        tracing::error!(
            model = self.context.generation.spec.name,
            generation = self.context.generation.number,
            items = places.len(),
            first_request = places.first().and_then(|place| self.lane.request_id(*place)),
            error = %failure.message,
            "a batch failed"
        );
    }
}

/// Whether a failure of a whole batch may be one item's doing, so that the others do better without it.
fn may_be_one_items(failure: &Failure) -> bool {
    match failure.kind {
        FailureKind::InvalidInput | FailureKind::Transient | FailureKind::Panicked => true,
        FailureKind::Permanent
        | FailureKind::DeviceLost
        | FailureKind::DeviceSuspected
        | FailureKind::Died
        | FailureKind::NeverBegan
        | FailureKind::Unwanted => false,
    }
}

/// What becomes of the items of a batch whose process has died: the one that did it fails, those that may have done it run without company, and
/// nothing is charged to those that can't have.
fn come_back(
    died: Died,
    open: &[usize],
    is_certain: bool,
    overran: Option<Duration>,
    waiters: &mut [Option<Waiter>],
    context: &LaneContext,
) {
    let is_charged = died.by == EndedBy::Itself || overran.is_some();
    let was_alone = is_certain;
    let mut back = Vec::new();
    // Those that have their outcomes get them.
    for place in open {
        let Some(mut waiter) = waiters[*place].take() else { continue };
        // Of those that hadn't had their turn, it is nobody's doing.
        let is_charged = is_charged && died.suspects.contains(place);
        // It was there when another one died, or nothing else can have made this one hang.
        let is_certain = is_certain && (overran.is_some() || waiter.deaths.suspected > 0);
        let failed = |how: String| JobError::Failed(Failure { kind: FailureKind::Died, message: how });
        if is_charged && is_certain {
            if !died.of_device && overran.is_none() {
                context.convictions.fetch_add(1, Ordering::Relaxed);
            }
            waiter.reply.send(Err(match overran {
                Some(limit) => JobError::HungAlone(limit),
                None if died.of_device => {
                    JobError::Failed(Failure { kind: FailureKind::Transient, message: died.how.clone() })
                }
                None => failed(format!(
                    "its worker process died while it ran this input and no other: {}",
                    died.how
                )),
            }));
            continue;
        }
        if waiter.has_begun {
            waiter.reply.send(Err(failed(format!(
                "its worker process died when parts of the answer had gone out: {}",
                died.how
            ))));
            continue;
        }
        if is_charged {
            waiter.deaths.suspected += 1;
        } else {
            waiter.deaths.uncharged += 1;
            if was_alone && waiter.deaths.uncharged > UNCHARGED_ALONE_MAX && died.by == EndedBy::Others {
                context.convictions.fetch_add(1, Ordering::Relaxed);
                waiter.reply.send(Err(failed(format!(
                    "its worker process was killed each of the {} times that it ran this input, at last with no other: {} from outside, or by the kernel for want of memory",
                    waiter.deaths.uncharged, died.how
                ))));
                continue;
            }
            if waiter.deaths.uncharged > UNCHARGED_MAX {
                waiter.reply.send(Err(failed(format!(
                    "its worker process was ended {} times before it had an answer: {}",
                    waiter.deaths.uncharged, died.how
                ))));
                continue;
            }
        }
        waiter.reply.comes_back();
        let Waiter { reply, request_id, input, id, arrived, deaths, .. } = waiter;
        let job = Job { request_id, input, decoded: None, reply, timings: None, deaths };
        back.push(Waiting { job, id, arrived });
    }
    tracing::warn!(
        model = context.generation.spec.name,
        generation = context.generation.number,
        run_again = back.len(),
        how = died.how,
        "a batch came to nothing: its worker process has died"
    );
    run_alone(back, context);
}

/// Has jobs run next, each without company.
fn run_alone(jobs: Vec<Waiting<Job>>, context: &LaneContext) {
    if jobs.is_empty() {
        return;
    }
    context.metrics.reruns_alone.inc_by(jobs.len() as u64);
    for job in context.queue.take_back(jobs) {
        job.reply.send(Err(JobError::Unavailable("the model stopped serving".into())));
    }
}

/// The callers of the batch that a lane runs.
pub(super) struct LaneCallers<'l> {
    lane: &'l LaneSlot,
    context: &'l LaneContext,
    /// The places of the items that run now among the batch's waiters.
    places: Vec<usize>,
    /// How long the batch has waited for those who don't read.
    waited: Duration,
    /// The replies of the batch before.
    before: Replies,
}

impl LaneCallers<'_> {
    /// What the item's reply says; `None` where the batch was given up.
    fn with_reply<T>(&self, item: usize, look: impl FnOnce(&ReplyHandle) -> T) -> Option<T> {
        let place = *self.places.get(item)?;
        self.lane.with_waiter(place, |waiter| look(&waiter.reply))
    }

    fn interest_of(&self, place: usize) -> Interest {
        self.lane.with_waiter(place, |waiter| waiter.reply.interest()).unwrap_or(Interest::Nothing)
    }

    /// Puts a chunk where its caller reads it, and waits for a caller who doesn't read as long as that may be. Not under the lane's lock: the
    /// fleet looks at it.
    fn send_waiting(&mut self, chunks: &ChunkSender, json: &[u8]) -> ChunkResult {
        loop {
            let result = chunks.try_send(json);
            if result != ChunkResult::Full {
                return result;
            }
            let begun = Instant::now();
            let stall_max = self.context.stream_wait();
            self.lane.note_wait(Some(begun));
            let reads = chunks.wait_for_room(stall_max);
            self.waited += begun.elapsed();
            self.lane.note_wait(None);
            if !reads {
                chunks.cut_off(JobError::StoppedReading(stall_max));
                return ChunkResult::Unwanted;
            }
        }
    }
}

impl Callers for LaneCallers<'_> {
    fn are_waiting(&mut self) {
        self.before.send();
    }

    fn interest(&self, item: usize) -> Interest {
        self.with_reply(item, ReplyHandle::interest).unwrap_or(Interest::Nothing)
    }

    fn chunk(&mut self, item: usize, json: &[u8], waits: bool) -> ChunkResult {
        let result = match self.with_reply(item, ReplyHandle::chunks) {
            Some(Some(chunks)) if waits => self.send_waiting(&chunks, json),
            Some(Some(chunks)) => chunks.try_send(json),
            Some(None) | None if self.interest(item) == Interest::Nothing => return ChunkResult::Unwanted,
            // One who wants the outcome alone.
            Some(None) | None => return ChunkResult::Taken,
        };
        if result == ChunkResult::Taken {
            self.context.metrics.stream_chunks.inc();
            if let Some(place) = self.places.get(item) {
                self.lane.note_begun(*place);
            }
        }
        result
    }
}
