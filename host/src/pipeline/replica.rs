//! One instance and the threads that run its stages, each a lane: take a batch, run it, answer. It never knows how many
//! replicas there are.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use bytes::Bytes;
use modalkit_batch::Waiting;
use modalkit_device::Lease;
use modalkit_loader::{Failure, FailureKind, Instance, Item, Outcome};
use parking_lot::Mutex;
use tokio::sync::mpsc;

use super::Generation;
use crate::{
    dispatch::{Queue, Taken, Turn},
    job::{JobError, ReplyHandle, RequestId},
    telemetry::ModelMetrics,
    trail::{BatchTrail, Ran, Trail},
};

/// What a replica's threads tell the fleet.
pub(super) enum Event {
    /// It is loaded and takes batches.
    Started(Arc<Replica>),
    /// The replica of this number could not be loaded.
    Failed(u64, Failure),
    /// A lane of a replica that was given up came back.
    CameBack,
}

/// An instance that serves.
pub(super) struct Replica {
    /// `None` when its last lane has left.
    instance: Mutex<Option<Arc<Instance>>>,
    pub(super) number: u64,
    lanes: Vec<Lane>,
    leave: AtomicBool,
    /// Its instance is changing: batches wait in the queue, for other replicas or for the end of this.
    parked: AtomicBool,
    running_lanes: AtomicUsize,
    /// Its devices. They are free when the last thread has left, and with it the instance.
    lease: Option<Arc<Lease>>,
}

/// What one of its threads runs.
#[derive(Default)]
struct Lane {
    running: Mutex<Option<Running>>,
}

/// The replies of the batch that a lane runs. Whoever takes them answers: the lane when it is done, or the fleet when
/// the batch has overrun its time.
struct Running {
    started: Instant,
    callers: Vec<Caller>,
}

struct Caller {
    reply: ReplyHandle,
    request_id: RequestId,
}

/// What a replica needs to run.
pub(super) struct Surroundings {
    pub(super) generation: Arc<Generation>,
    pub(super) queue: Arc<Queue>,
    pub(super) metrics: Arc<ModelMetrics>,
    pub(super) events: mpsc::Sender<Event>,
}

/// Between two looks at an instance that somebody still uses: in most cases to validate one input.
const BETWEEN_LOOKS_MIN: Duration = Duration::from_millis(1);
const BETWEEN_LOOKS_MAX: Duration = Duration::from_millis(100);

impl Replica {
    /// Loads an instance on a thread of its own, which then becomes its first lane.
    pub(super) fn start(
        number: u64,
        around: Arc<Surroundings>,
        lease: Option<Arc<Lease>>,
    ) -> std::io::Result<()> {
        let name = thread_name(&around, number, 0);
        let load = move || match around.generation.instance(lease.as_deref()) {
            Ok(instance) => Self::serve(number, &around, instance, lease),
            Err(mut failure) => {
                if let Some(lease) = lease {
                    judge(&lease, &mut failure);
                    // Free before anybody tries again.
                    drop(lease);
                }
                around.tell(Event::Failed(number, failure));
            }
        };
        thread::Builder::new().name(name).spawn(load)?;
        Ok(())
    }

    fn serve(number: u64, around: &Arc<Surroundings>, instance: Instance, lease: Option<Arc<Lease>>) {
        let count = around.generation.spec.replicas.batches_in_flight;
        let lanes: Vec<Lane> = (0..count).map(|_| Lane::default()).collect();
        let replica = Arc::new(Self {
            instance: Mutex::new(Some(Arc::new(instance))),
            number,
            lanes,
            leave: AtomicBool::new(false),
            parked: AtomicBool::new(false),
            running_lanes: AtomicUsize::new(count),
            lease,
        });
        if !around.tell(Event::Started(Arc::clone(&replica))) {
            // Its fleet has ended meanwhile: nobody would ever tell it to leave.
            replica.leave();
        }
        for index in 1..count {
            let (of_lane, around) = (Arc::clone(&replica), Arc::clone(around));
            let spawned = thread::Builder::new()
                .name(thread_name(&around, number, index))
                .spawn(move || of_lane.run_lane(index, &around));
            if let Err(error) = spawned {
                replica.running_lanes.fetch_sub(1, Ordering::SeqCst);
                tracing::warn!(%error, "can't start a thread for batches_in_flight; the replica runs with fewer");
            }
        }
        replica.run_lane(0, around);
    }

    /// The instance, while it serves.
    pub(super) fn instance(&self) -> Option<Arc<Instance>> {
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
        failures.retain(|failure| failure.kind != FailureKind::InvalidInput);
        if failures.is_empty() {
            return;
        }
        let lost = self.lease.as_ref().is_some_and(|lease| {
            let claim = failures.iter().find(|failure| failure.kind == FailureKind::DeviceLost);
            lease.examine(claim.map(|failure| failure.message.as_str()))
        });
        failures.into_iter().for_each(|failure| correct(failure, lost));
    }

    /// Lets its lanes take no batch, or go on. Call it inside `Queue::change_turns`.
    pub(super) fn park(&self, parked: bool) {
        self.parked.store(parked, Ordering::SeqCst);
    }

    fn turn(&self, generation: &Generation) -> Turn {
        if self.leave.load(Ordering::SeqCst) || self.is_lost() {
            Turn::Leave
        } else if !generation.serves() || self.parked.load(Ordering::SeqCst) {
            Turn::Rest
        } else {
            Turn::Work
        }
    }

    /// Asks it to leave after what it runs now. Wake the queue's lanes afterwards.
    pub(super) fn leave(&self) {
        self.leave.store(true, Ordering::SeqCst);
    }

    /// Whether all of its threads have left.
    pub(super) fn has_left(&self) -> bool {
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
            if running.as_ref().is_none_or(|batch| now.saturating_duration_since(batch.started) < limit) {
                continue;
            }
            let callers = running.take().map(|batch| batch.callers).unwrap_or_default();
            drop(running);
            overrun += 1;
            callers.into_iter().for_each(|caller| caller.reply.send(Err(JobError::BatchTimedOut(limit))));
        }
        overrun
    }

    fn run_lane(&self, index: usize, around: &Surroundings) {
        let lane = &self.lanes[index];
        let place = around.queue.lane();
        let instance = self.instance().expect("it is there while a lane runs");
        while let Some(taken) = around.queue.next_batch(place, || self.turn(&around.generation)) {
            if !run(&instance, lane, self, taken, around) {
                around.tell(Event::CameBack);
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
        let mut pause = BETWEEN_LOOKS_MIN;
        while let Err(shared) = Arc::try_unwrap(instance).map(drop) {
            thread::sleep(pause);
            pause = (pause * 2).min(BETWEEN_LOOKS_MAX);
            instance = shared;
        }
    }
}

impl Lane {
    /// Answers the callers whose inputs turned out to be unfit, by their places. `false` when the batch was given up.
    fn refuse(&self, refused: Vec<(usize, JobError)>) -> bool {
        let mut running = self.running.lock();
        let Some(batch) = running.as_mut() else { return refused.is_empty() };
        // From the back, so that the places in front stay what they are.
        for (place, error) in refused.into_iter().rev() {
            batch.callers.remove(place).reply.send(Err(error));
        }
        true
    }
}

/// Runs a batch. `false` when it was given up meanwhile, and this thread with it.
fn run(instance: &Instance, lane: &Lane, replica: &Replica, taken: Taken, around: &Surroundings) -> bool {
    let Taken { batch, at, free_since } = taken;
    // Of the few that somebody follows.
    let mut followed = Vec::new();
    let (mut callers, mut inputs) =
        (Vec::with_capacity(batch.jobs.len()), Vec::with_capacity(batch.jobs.len()));
    for Waiting { job, arrived, .. } in batch.jobs {
        if job.reply.is_abandoned() {
            around.metrics.skipped_cancelled.inc();
            continue;
        }
        if let Some(trail) = job.trail {
            followed.push((trail, arrived));
        }
        job.reply.begins();
        callers.push(Caller { reply: job.reply, request_id: job.request_id });
        inputs.push((job.input, job.item));
    }
    if callers.is_empty() {
        return true;
    }
    // From here on plugin code runs, and the fleet watches the time.
    *lane.running.lock() = Some(Running { started: Instant::now(), callers });
    let (mut items, mut refused) = (Vec::with_capacity(inputs.len()), Vec::new());
    for (place, (input, item)) in inputs.into_iter().enumerate() {
        match item_of(instance, item, &input, &around.generation) {
            Ok(item) => items.push(item),
            Err(error) => refused.push((place, error)),
        }
    }
    if !refused.is_empty() && !lane.refuse(refused) {
        return false;
    }
    let size = items.len();
    let begun = Instant::now();
    let mut marks = Marks::default();
    let mut outcomes =
        if size == 0 { Ok(Vec::new()) } else { stages(instance, items, &around.metrics, &mut marks) };
    replica.examine(&mut outcomes);
    if size > 0 && !followed.is_empty() {
        let batch = BatchTrail {
            closed: batch.closed,
            size,
            generation: around.generation.number,
            replica: replica.number,
            free_since,
            taken: at,
            begun,
            preprocessed: marks.preprocessed,
            predicted: marks.predicted,
            ended: Instant::now(),
            span: None,
        };
        around.tell_followers(batch, followed);
    }
    let Some(Running { callers, .. }) = lane.running.lock().take() else { return false };
    if size > 0 {
        around.count(begun.elapsed(), speaks_for_its_generation(&outcomes, callers.len()));
    }
    match outcomes {
        Ok(outcomes) if outcomes.len() == callers.len() => {
            for (caller, outcome) in callers.into_iter().zip(outcomes) {
                caller.reply.send(outcome.map(Bytes::from_owner).map_err(JobError::Failed));
            }
        }
        Ok(outcomes) => fail(callers, around, wrong_count(size, outcomes.len())),
        Err(failure) => fail(callers, around, failure),
    }
    true
}

/// Asks the driver what a failure on these devices means, and says so in it.
pub(super) fn judge(lease: &Lease, failure: &mut Failure) {
    let claim = (failure.kind == FailureKind::DeviceLost).then(|| failure.message.to_string());
    correct(failure, lease.examine(claim.as_deref()));
}

/// Says in a failure whether a device is lost. One that nobody leased is not this host's to judge.
fn correct(failure: &mut Failure, lost: bool) {
    failure.kind = match failure.kind {
        _ if lost => FailureKind::DeviceLost,
        FailureKind::DeviceLost | FailureKind::DeviceSuspected => FailureKind::Transient,
        kind => kind,
    };
}

/// The job's item: decoded before, or now where another library did, and validated now where nobody could before.
fn item_of(
    instance: &Instance,
    item: Option<Item>,
    input: &[u8],
    generation: &Generation,
) -> Result<Item, JobError> {
    let item = match item.filter(|item| instance.owns(item)) {
        Some(item) => item,
        None => {
            generation.plugin.decode(None, input).map_err(|rejection| generation.explain(rejection, input))?
        }
    };
    if !item.is_validated() {
        instance.validate(&item).map_err(|rejection| generation.explain(rejection, input))?;
    }
    Ok(item)
}

/// When stages ended.
#[derive(Default)]
struct Marks {
    preprocessed: Option<Instant>,
    predicted: Option<Instant>,
}

fn stages(
    instance: &Instance,
    items: Vec<Item>,
    metrics: &ModelMetrics,
    marks: &mut Marks,
) -> Result<Vec<Outcome>, Failure> {
    let mut batch = instance.begin(items).expect("`item_of` made them all of this plugin");
    let begun = Instant::now();
    batch.preprocess()?;
    let preprocessed = Instant::now();
    marks.preprocessed = Some(preprocessed);
    batch.predict()?;
    let predicted = Instant::now();
    marks.predicted = Some(predicted);
    let outcomes = batch.postprocess()?;
    metrics.preprocess.observe((preprocessed - begun).as_secs_f64());
    metrics.predict.observe((predicted - preprocessed).as_secs_f64());
    metrics.postprocess.observe(predicted.elapsed().as_secs_f64());
    Ok(outcomes)
}

/// Whether anything in a batch went well; what an input is to blame for did.
fn speaks_for_its_generation(outcomes: &Result<Vec<Outcome>, Failure>, callers: usize) -> bool {
    let fit = |failure: &Failure| failure.kind == FailureKind::InvalidInput;
    match outcomes {
        Ok(outcomes) => {
            outcomes.len() == callers
                && outcomes.iter().any(|outcome| outcome.as_ref().map_or_else(fit, |_| true))
        }
        Err(failure) => fit(failure),
    }
}

impl Surroundings {
    /// Counts a batch. The one that fails its generation's trial is its last: whoever minds the trial says what then serves.
    pub(super) fn count(&self, took: Duration, succeeded: bool) {
        self.generation.vitals.count(took, succeeded, || self.generation.set_serves(false));
    }

    /// Notes a batch's way for those who follow one of its jobs.
    fn tell_followers(&self, mut batch: BatchTrail, followed: Vec<(Arc<Trail>, Instant)>) {
        let traced = followed.iter().filter_map(|(trail, _)| trail.span.clone()).collect();
        batch.span = self.metrics.traces.batch(&self.generation.spec.name, &batch, traced);
        let batch = Arc::new(batch);
        for (trail, arrived) in followed {
            trail.note(Ran { arrived, batch: Arc::clone(&batch) });
        }
    }

    /// Whether anybody heard it: nobody listens any more when the host is shutting down.
    fn tell(&self, event: Event) -> bool {
        self.events.blocking_send(event).is_ok()
    }
}

/// Linux shows 15 bytes of it.
fn thread_name(around: &Surroundings, replica: u64, lane: usize) -> String {
    let name: String = around.generation.spec.name.chars().filter(char::is_ascii_graphic).take(8).collect();
    format!("{name}.{replica}.{lane}")
}

fn wrong_count(expected: usize, found: usize) -> Failure {
    Failure {
        kind: FailureKind::Permanent,
        message: format!("the plugin returned {found} outcomes for a batch of {expected}").into(),
    }
}

fn fail(callers: Vec<Caller>, around: &Surroundings, failure: Failure) {
    let panicked = failure.kind == FailureKind::Panicked;
    if panicked { &around.metrics.panicked } else { &around.metrics.failed }.inc();
    tracing::error!(
        model = around.generation.spec.name,
        generation = around.generation.number,
        items = callers.len(),
        first_request = callers.first().map(|caller| caller.request_id.to_string()),
        error = %failure.message,
        "a batch failed"
    );
    for caller in callers {
        caller.reply.send(Err(JobError::Failed(failure.clone())));
    }
}
