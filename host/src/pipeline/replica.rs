//! One instance and the threads that run its stages, each a lane: take a batch, run it, answer. It never knows how many
//! replicas there are.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use modalkit_batch::Waiting;
use modalkit_device::Lease;
use modalkit_engine::{ChunkResult, Failure, FailureKind, Instance, Interest, Outcome};
use parking_lot::Mutex;
use tokio::sync::mpsc;

use super::{
    Generation, SharedInstance,
    stages::{Callers, StageTimes, counts_as_healthy, decoded_for, is_no_fault, stages},
};
use crate::{
    insight::{BatchTimings, JobRun, JobTimings, metrics::ModelMetrics},
    pipeline::{LaneState, Queue, Taken},
    work::{ChunkSender, JobError, ReplyHandle, RequestId},
};

/// What a replica's threads tell the fleet.
pub(super) enum Event {
    /// It is loaded and takes batches.
    Started(Arc<Replica>),
    /// The replica of this number could not be loaded.
    Failed(u64, Failure),
    /// A lane of a replica that was given up has returned from the plugin.
    ThreadReturned,
}

/// An instance that serves.
pub(super) struct Replica {
    /// `None` when its last lane has left.
    instance: Mutex<Option<SharedInstance>>,
    pub(super) number: u64,
    lanes: Vec<LaneSlot>,
    stopping: AtomicBool,
    /// Its instance is changing: batches wait in the queue, for other replicas or for the end of this.
    paused: AtomicBool,
    running_lanes: AtomicUsize,
    /// Its devices. They are free when the last thread has left, and with it the instance.
    lease: Option<Arc<Lease>>,
}

/// What one of its threads runs.
#[derive(Default)]
struct LaneSlot {
    running: Mutex<Option<Running>>,
}

/// The replies of the batch that a lane runs. Whoever takes them answers: the lane when it is done, or the fleet when
/// the batch has overrun its time.
struct Running {
    /// Later by what the batch has waited for callers who don't read.
    started: Instant,
    /// It waits for one now, since then.
    waits_since: Option<Instant>,
    waiters: Vec<Waiter>,
}

struct Waiter {
    reply: ReplyHandle,
    request_id: RequestId,
}

/// What a replica needs to run.
pub(super) struct ReplicaContext {
    pub(super) generation: Arc<Generation>,
    pub(super) queue: Arc<Queue>,
    pub(super) metrics: Arc<ModelMetrics>,
    pub(super) events: mpsc::Sender<Event>,
    /// Milliseconds that a batch waits for a caller who doesn't read; as the model has it now.
    pub(super) stream_wait_ms: AtomicU64,
}

/// Between two looks at an instance that somebody still uses: in most cases to validate one input.
const INSTANCE_POLL_MIN: Duration = Duration::from_millis(1);
const INSTANCE_POLL_MAX: Duration = Duration::from_millis(100);
/// What one input's cost counts for at most: a counter of whole numbers begins again where it overflows.
const COST_MAX: u64 = 1 << 40;

impl Replica {
    /// Loads an instance on a thread of its own, which then becomes its first lane.
    pub(super) fn start(
        number: u64,
        context: Arc<ReplicaContext>,
        lease: Option<Arc<Lease>>,
    ) -> std::io::Result<()> {
        let name = thread_name(&context, number, 0);
        let load = move || match context.generation.instance(lease.as_deref()) {
            Ok(instance) => Self::serve(number, &context, instance, lease),
            Err(mut failure) => {
                if let Some(lease) = lease {
                    judge(&lease, &mut failure);
                    // Free before anybody tries again.
                    drop(lease);
                }
                if !context.tell(Event::Failed(number, failure)) {
                    // Its fleet had given it up, and has ended meanwhile.
                    context.metrics.replicas_stuck.dec();
                }
            }
        };
        thread::Builder::new().name(name).spawn(load)?;
        Ok(())
    }

    fn serve(
        number: u64,
        context: &Arc<ReplicaContext>,
        instance: Box<dyn Instance>,
        lease: Option<Arc<Lease>>,
    ) {
        let count = context.generation.spec.replicas.batches_in_flight;
        let lanes: Vec<LaneSlot> = (0..count).map(|_| LaneSlot::default()).collect();
        let replica = Arc::new(Self {
            instance: Mutex::new(Some(Arc::new(instance))),
            number,
            lanes,
            stopping: AtomicBool::new(false),
            paused: AtomicBool::new(false),
            running_lanes: AtomicUsize::new(count),
            lease,
        });
        if !context.tell(Event::Started(Arc::clone(&replica))) {
            // Its fleet had given it up, and has ended meanwhile: nobody would ever tell it to leave.
            context.metrics.replicas_stuck.dec();
            replica.stop();
        }
        for index in 1..count {
            let (of_lane, context) = (Arc::clone(&replica), Arc::clone(context));
            let spawned = thread::Builder::new()
                .name(thread_name(&context, number, index))
                .spawn(move || of_lane.run_lane(index, &context));
            if let Err(error) = spawned {
                replica.running_lanes.fetch_sub(1, Ordering::SeqCst);
                tracing::warn!(%error, "can't start a thread for batches_in_flight; the replica runs with fewer");
            }
        }
        replica.run_lane(0, context);
    }

    /// The instance, while it serves.
    pub(super) fn instance(&self) -> Option<SharedInstance> {
        self.instance.lock().clone()
    }

    /// Its devices.
    pub(super) fn lease(&self) -> Option<&Arc<Lease>> {
        self.lease.as_ref()
    }

    /// Whether a device of it is lost: nothing that it would run can go well.
    pub(super) fn is_lost(&self) -> bool {
        self.lease.as_ref().is_some_and(|lease| lease.is_lost())
    }

    /// Finds out whether what failed has to do with its device, and corrects what was said of that. The driver is asked once for a batch.
    fn examine(&self, outcomes: &mut Result<Vec<Outcome>, Failure>) {
        let mut failures: Vec<&mut Failure> = match outcomes {
            Ok(outcomes) => outcomes.iter_mut().filter_map(|outcome| outcome.as_mut().err()).collect(),
            Err(failure) => vec![failure],
        };
        failures.retain(|failure| !is_no_fault(failure));
        if failures.is_empty() {
            return;
        }
        let lost = self.lease.as_ref().is_some_and(|lease| {
            let claim = failures.iter().find(|failure| failure.kind == FailureKind::DeviceLost);
            lease.examine(claim.map(|failure| failure.message.as_str()))
        });
        failures.into_iter().for_each(|failure| correct(failure, lost));
    }

    /// Pauses its lanes, or resumes them. Called inside `Queue::update_lane_states`, all lanes see it before they take a batch.
    pub(super) fn set_paused(&self, paused: bool) {
        self.paused.store(paused, Ordering::SeqCst);
    }

    fn lane_state(&self, generation: &Generation) -> LaneState {
        if self.stopping.load(Ordering::SeqCst) || self.is_lost() {
            LaneState::Stopped
        } else if !generation.serves() || self.paused.load(Ordering::SeqCst) {
            LaneState::Paused
        } else {
            LaneState::Active
        }
    }

    /// Asks it to leave after what it runs now. Wake the queue's lanes afterwards.
    pub(super) fn stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
    }

    /// Whether all of its threads have left.
    pub(super) fn has_stopped(&self) -> bool {
        self.running_lanes.load(Ordering::SeqCst) == 0
    }

    /// Whether a batch is running on any of its threads.
    pub(super) fn is_running(&self) -> bool {
        self.lanes.iter().any(|lane| lane.running.lock().is_some())
    }

    /// Answers the batches that have run longer than `limit`; says how many there were.
    pub(super) fn give_up_overrun(&self, now: Instant, limit: Duration) -> usize {
        let mut overrun = 0;
        for lane in &self.lanes {
            let mut running = lane.running.lock();
            if running.as_ref().is_none_or(|batch| batch.has_run(now) < limit) {
                continue;
            }
            let waiters = running.take().map(|batch| batch.waiters).unwrap_or_default();
            drop(running);
            overrun += 1;
            waiters.into_iter().for_each(|waiter| waiter.reply.send(Err(JobError::BatchTimedOut(limit))));
        }
        overrun
    }

    fn run_lane(&self, index: usize, context: &ReplicaContext) {
        let lane = &self.lanes[index];
        let lane_id = context.queue.lane();
        let instance = self.instance().expect("it is there while a lane runs");
        while let Some(taken) = context.queue.next_batch(lane_id, || self.lane_state(&context.generation)) {
            if !run(&**instance, lane, self, taken, context) {
                context.metrics.replicas_stuck.dec();
                context.tell(Event::ThreadReturned);
                break;
            }
        }
        drop(instance);
        if self.running_lanes.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.drop_instance();
        }
    }

    /// The author's `drop` runs here, on a thread of the replica: whoever else looks at the instance (to validate an
    /// input) was given another one before the lanes were told to leave, and is done in a moment.
    fn drop_instance(&self) {
        let Some(mut instance) = self.instance.lock().take() else { return };
        let mut pause = INSTANCE_POLL_MIN;
        while let Err(shared) = Arc::try_unwrap(instance).map(drop) {
            thread::sleep(pause);
            pause = (pause * 2).min(INSTANCE_POLL_MAX);
            instance = shared;
        }
    }
}

impl Running {
    fn has_run(&self, now: Instant) -> Duration {
        self.waits_since.unwrap_or(now).saturating_duration_since(self.started)
    }
}

impl LaneSlot {
    /// Notes since when the batch waits for a caller who doesn't read, or that it no longer does: its own time stands still meanwhile.
    fn note_wait(&self, since: Option<Instant>) {
        let mut running = self.running.lock();
        let Some(batch) = running.as_mut() else { return };
        if let Some(since) = std::mem::replace(&mut batch.waits_since, since) {
            batch.started += since.elapsed();
        }
    }

    /// Answers the waiters whose inputs turned out to be unfit, by their places. `false` when the batch was given up.
    fn refuse(&self, refused: Vec<(usize, JobError)>) -> bool {
        let mut running = self.running.lock();
        let Some(batch) = running.as_mut() else { return refused.is_empty() };
        // From the back, so that the places in front stay what they are.
        for (place, error) in refused.into_iter().rev() {
            batch.waiters.remove(place).reply.send(Err(error));
        }
        true
    }
}

/// The callers of the batch that a lane runs.
struct LaneCallers<'l> {
    lane: &'l LaneSlot,
    context: &'l ReplicaContext,
    /// How long the batch has waited for those who don't read.
    waited: Duration,
}

impl LaneCallers<'_> {
    /// What the item's reply says; `None` where the batch was given up.
    fn with_reply<T>(&self, item: usize, look: impl FnOnce(&ReplyHandle) -> T) -> Option<T> {
        let running = self.lane.running.lock();
        Some(look(&running.as_ref()?.waiters.get(item)?.reply))
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
        }
        result
    }
}

/// Runs a batch. `false` when it was given up meanwhile, and this thread with it.
fn run(
    instance: &dyn Instance,
    lane: &LaneSlot,
    replica: &Replica,
    taken: Taken,
    context: &ReplicaContext,
) -> bool {
    let Taken { batch, at, free_since } = taken;
    // Timings of the jobs that carry any.
    let mut timed = Vec::new();
    let (mut waiters, mut inputs) =
        (Vec::with_capacity(batch.jobs.len()), Vec::with_capacity(batch.jobs.len()));
    for Waiting { job, arrived, .. } in batch.jobs {
        if job.reply.is_abandoned() {
            context.metrics.skipped_cancelled.inc();
            continue;
        }
        if let Some(timings) = job.timings {
            timed.push((timings, arrived));
        }
        job.reply.begins();
        waiters.push(Waiter { reply: job.reply, request_id: job.request_id });
        inputs.push((job.input, job.decoded));
    }
    if waiters.is_empty() {
        return true;
    }
    // From here on plugin code runs, and the fleet watches the time.
    *lane.running.lock() = Some(Running { started: at, waits_since: None, waiters });
    let (mut items, mut refused, mut cost) = (Vec::with_capacity(inputs.len()), Vec::new(), 0_u64);
    for (place, (input, decoded)) in inputs.into_iter().enumerate() {
        match decoded_for(instance, decoded, &input, &context.generation) {
            Ok(decoded) => {
                cost += decoded.measure.cost.min(COST_MAX);
                items.push(decoded);
            }
            Err(error) => refused.push((place, error)),
        }
    }
    if !refused.is_empty() && !lane.refuse(refused) {
        return false;
    }
    let size = items.len();
    let begun = Instant::now();
    let mut times = StageTimes::default();
    let mut callers = LaneCallers { lane, context, waited: Duration::ZERO };
    let mut outcomes =
        if size == 0 { Ok(Vec::new()) } else { stages(instance, items, &mut times, &mut callers) };
    let ended = Instant::now();
    if outcomes.is_ok() {
        context.metrics.cost.inc_by(cost);
        context.observe(begun, &times, ended - callers.waited);
    }
    replica.examine(&mut outcomes);
    if size > 0 && !timed.is_empty() {
        let batch = BatchTimings {
            closed: batch.closed,
            size,
            generation: context.generation.number,
            replica: replica.number,
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
    let Some(Running { waiters, .. }) = lane.running.lock().take() else { return false };
    if size > 0 {
        // What callers took who don't read is no sign of a slow pipeline.
        let took = (ended - begun).saturating_sub(callers.waited);
        match counts_as_healthy(&outcomes) {
            Some(is_healthy) => context.count(took, is_healthy),
            None => context.generation.batch_stats.note_time(took),
        }
    }
    match outcomes {
        Ok(outcomes) => {
            for (waiter, outcome) in waiters.into_iter().zip(outcomes) {
                waiter.reply.send(outcome.map_err(JobError::Failed));
            }
        }
        Err(failure) => fail(waiters, context, failure),
    }
    true
}

/// Asks the driver what a failure on these devices means, and says so in it.
pub(super) fn judge(lease: &Lease, failure: &mut Failure) {
    let claim = (failure.kind == FailureKind::DeviceLost).then(|| failure.message.clone());
    correct(failure, lease.examine(claim.as_deref()));
}

/// Sets a failure's kind by whether a device is lost; a loss that the plugin claims and the driver doesn't confirm is transient.
fn correct(failure: &mut Failure, lost: bool) {
    failure.kind = match failure.kind {
        _ if lost => FailureKind::DeviceLost,
        FailureKind::DeviceLost | FailureKind::DeviceSuspected => FailureKind::Transient,
        kind => kind,
    };
}

impl ReplicaContext {
    fn stream_wait(&self) -> Duration {
        Duration::from_millis(self.stream_wait_ms.load(Ordering::Relaxed))
    }

    /// Lets batches wait so long for a caller who doesn't read.
    pub(super) fn set_stream_wait(&self, wait: Duration) {
        self.stream_wait_ms.store(wait.as_millis() as u64, Ordering::Relaxed);
    }

    /// Counts a batch. The one that fails its generation's probation is its last: the generation stops serving with it, and the
    /// reload decides what serves then.
    pub(super) fn count(&self, took: Duration, succeeded: bool) {
        self.generation.batch_stats.count(took, succeeded, || self.generation.set_serves(false));
    }

    /// Counts what each stage took.
    fn observe(&self, begun: Instant, times: &StageTimes, ended: Instant) {
        let (Some(preprocessed), Some(predicted)) = (times.preprocessed, times.predicted) else { return };
        self.metrics.preprocess.observe((preprocessed - begun).as_secs_f64());
        self.metrics.predict.observe((predicted - preprocessed).as_secs_f64());
        self.metrics.postprocess.observe((ended - predicted).as_secs_f64());
    }

    /// Records a batch's timings for those of its jobs that carry some.
    fn record_timings(&self, mut batch: BatchTimings, timed: Vec<(Arc<JobTimings>, Instant)>) {
        let traced = timed.iter().filter_map(|(timings, _)| timings.span.clone()).collect();
        batch.span = self.metrics.traces.batch(&self.generation.spec.name, &batch, traced);
        let batch = Arc::new(batch);
        for (timings, arrived) in timed {
            timings.note(JobRun { arrived, batch: Arc::clone(&batch) });
        }
    }

    /// `false` where the fleet has ended.
    fn tell(&self, event: Event) -> bool {
        self.events.blocking_send(event).is_ok()
    }
}

/// Linux shows 15 bytes of it.
fn thread_name(context: &ReplicaContext, replica: u64, lane: usize) -> String {
    let name: String = context.generation.spec.name.chars().filter(char::is_ascii_graphic).take(8).collect();
    format!("{name}.{replica}.{lane}")
}

fn fail(waiters: Vec<Waiter>, context: &ReplicaContext, failure: Failure) {
    let panicked = failure.kind == FailureKind::Panicked;
    if panicked { &context.metrics.panicked } else { &context.metrics.failed }.inc();
    tracing::error!(
        model = context.generation.spec.name,
        generation = context.generation.number,
        items = waiters.len(),
        first_request = waiters.first().map(|waiter| waiter.request_id.to_string()),
        error = %failure.message,
        "a batch failed"
    );
    for waiter in waiters {
        waiter.reply.send(Err(JobError::Failed(failure.clone())));
    }
}
