//! One instance and the threads that run its stages, each a lane: take a batch, run it, answer. It never knows how many
//! replicas there are.

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use modalkit_device::Lease;
use modalkit_engine::{Death, Failure, FailureKind, Instance, Process};
use parking_lot::{Mutex, RwLock, RwLockReadGuard, RwLockWriteGuard};
use tokio::sync::mpsc;

use super::{
    Generation, SharedInstance,
    batch_run::{self, Waiter},
    stages::{StageTimes, is_no_fault},
};
use crate::{
    insight::{BatchTimings, JobRun, JobTimings, metrics::ModelMetrics},
    pipeline::{LaneState, Queue},
    work::JobError,
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
    /// Where several batches run at once in a process of its own.
    company: Option<RwLock<()>>,
    batches: AtomicU64,
    is_isolated: bool,
    /// Once it was seen.
    death: OnceLock<Death>,
}

/// Who runs beside a batch.
#[expect(dead_code, reason = "what it holds is a lock")]
pub(super) enum Company<'r> {
    /// Others may.
    Any(RwLockReadGuard<'r, ()>),
    /// Nobody does.
    Alone(RwLockWriteGuard<'r, ()>),
    /// There are no others whom it could harm, or it can't be kept from harming them.
    None,
}

/// What one of its threads runs.
#[derive(Default)]
pub(super) struct LaneSlot {
    pub(super) running: Mutex<Option<Running>>,
    /// The limit that its batch overran, for which its process was ended.
    overran: Mutex<Option<Duration>>,
}

/// The replies of the batch that a lane runs. Whoever takes them answers: the lane when it is done, or the fleet when
/// the batch has overrun its time.
pub(super) struct Running {
    /// Later by what the batch has waited for callers who don't read.
    pub(super) started: Instant,
    /// It waits for one now, since then.
    pub(super) waits_since: Option<Instant>,
    /// By the places of items; `None` of those that have their answer.
    pub(super) waiters: Vec<Option<Waiter>>,
}

/// What overran its time.
pub(super) enum Overrun {
    /// So many batches, whose threads hang.
    Hang(usize),
    /// A batch whose process was ended for it.
    Killed,
}

/// What a replica needs to run.
pub(super) struct ReplicaContext {
    pub(super) generation: Arc<Generation>,
    pub(super) queue: Arc<Queue>,
    pub(super) metrics: Arc<ModelMetrics>,
    pub(super) events: mpsc::Sender<Event>,
    /// Milliseconds that a batch waits for a caller who doesn't read; as the model has it now.
    pub(super) stream_wait_ms: AtomicU64,
    /// Batches of which something went well.
    pub(super) good_batches: AtomicU64,
}

/// Between two looks at an instance that somebody still uses: in most cases to validate one input.
const INSTANCE_POLL_MIN: Duration = Duration::from_millis(1);
const INSTANCE_POLL_MAX: Duration = Duration::from_millis(100);

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
        let is_isolated = instance.process().is_some();
        let replica = Arc::new(Self {
            company: (is_isolated && count > 1).then(RwLock::default),
            batches: AtomicU64::new(0),
            is_isolated,
            death: OnceLock::new(),
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
    pub(super) fn examine<'f>(&self, failures: impl Iterator<Item = &'f mut Failure>) {
        let failures: Vec<&mut Failure> = failures.filter(|failure| !is_no_fault(failure)).collect();
        if failures.is_empty() {
            return;
        }
        let lost = self.lease.as_ref().is_some_and(|lease| {
            let claim = failures.iter().find(|failure| failure.kind == FailureKind::DeviceLost);
            lease.examine(claim.map(|failure| failure.message.as_str()))
        });
        failures.into_iter().for_each(|failure| correct(failure, lost));
    }

    /// Held while a batch runs: beside one without company, no other does, where they share a process of their own.
    pub(super) fn company(&self, is_alone: bool) -> Company<'_> {
        match (&self.company, is_alone) {
            (Some(company), true) => Company::Alone(company.write()),
            (Some(company), false) => Company::Any(company.read()),
            (None, _) => Company::None,
        }
    }

    pub(super) fn has_one_lane(&self) -> bool {
        self.lanes.len() == 1
    }

    /// A batch has come to its end.
    pub(super) fn note_batch(&self) {
        self.batches.fetch_add(1, Ordering::Relaxed);
    }

    /// Batches that it has run.
    pub(super) fn batches(&self) -> u64 {
        self.batches.load(Ordering::Relaxed)
    }

    /// How its process ended, where it has one, and that has.
    pub(super) fn death(&self) -> Option<Death> {
        if self.is_isolated && self.death.get().is_none() {
            let death = self.with_process(|process| process.death()).flatten();
            // It outlives the instance.
            death.into_iter().for_each(|death| drop(self.death.set(death)));
        }
        self.death.get().cloned()
    }

    /// Bytes of memory of its process, where it has one.
    pub(super) fn resident_bytes(&self) -> Option<u64> {
        self.with_process(|process| process.resident_bytes()).flatten()
    }

    /// Ends its process; `false` where it has none.
    pub(super) fn kill(&self, why: &str) -> bool {
        self.with_process(|process| process.kill(why)).is_some()
    }

    fn with_process<T>(&self, look: impl FnOnce(&dyn Process) -> T) -> Option<T> {
        let instance = self.instance.lock();
        instance.as_ref()?.process().map(look)
    }

    /// Pauses its lanes, or resumes them. Called inside `Queue::update_lane_states`, all lanes see it before they take a batch.
    pub(super) fn set_paused(&self, paused: bool) {
        self.paused.store(paused, Ordering::SeqCst);
    }

    fn lane_state(&self, generation: &Generation) -> LaneState {
        let has_died = self.death().is_some();
        if self.stopping.load(Ordering::SeqCst) || self.is_lost() || has_died {
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

    /// Answers the batches that have run longer than `limit`; says how many there were. Where it has a process of its own, that is ended, and its
    /// lanes see what becomes of their batches.
    pub(super) fn give_up_overrun(&self, now: Instant, limit: Duration) -> Overrun {
        let (mut overrun, mut killed) = (0, false);
        for lane in &self.lanes {
            let mut running = lane.running.lock();
            if running.as_ref().is_none_or(|batch| batch.has_run(now) < limit) {
                continue;
            }
            if self.is_isolated {
                killed |= lane.overran.lock().replace(limit).is_none();
                continue;
            }
            let waiters = running.take().map(|batch| batch.waiters).unwrap_or_default();
            drop(running);
            overrun += 1;
            let waiting = waiters.into_iter().flatten();
            waiting.for_each(|waiter| waiter.reply.send(Err(JobError::BatchTimedOut(limit))));
        }
        if killed {
            self.kill(&format!("a batch overran {limit:?} (batch_timeout_seconds)"));
        }
        if killed { Overrun::Killed } else { Overrun::Hang(overrun) }
    }

    fn run_lane(&self, index: usize, context: &ReplicaContext) {
        let lane = &self.lanes[index];
        let lane_id = context.queue.lane();
        let instance = self.instance().expect("it is there while a lane runs");
        while let Some(taken) = context.queue.next_batch(lane_id, || self.lane_state(&context.generation)) {
            if !batch_run::run(&**instance, lane, self, taken, context) {
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
    pub(super) fn note_wait(&self, since: Option<Instant>) {
        let mut running = self.running.lock();
        let Some(batch) = running.as_mut() else { return };
        if let Some(since) = std::mem::replace(&mut batch.waits_since, since) {
            batch.started += since.elapsed();
        }
    }

    /// The batch, or what is left of it, begins again; `false` when it was given up.
    pub(super) fn starts_again(&self) -> bool {
        let mut running = self.running.lock();
        let Some(batch) = running.as_mut() else { return false };
        batch.started = Instant::now();
        true
    }

    /// The limit that the batch overran, where that is why its process was ended.
    pub(super) fn take_overrun(&self) -> Option<Duration> {
        self.overran.lock().take()
    }
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
    pub(super) fn stream_wait(&self) -> Duration {
        Duration::from_millis(self.stream_wait_ms.load(Ordering::Relaxed))
    }

    /// Lets batches wait so long for a caller who doesn't read.
    pub(super) fn set_stream_wait(&self, wait: Duration) {
        self.stream_wait_ms.store(wait.as_millis() as u64, Ordering::Relaxed);
    }

    pub(super) fn good_batches(&self) -> u64 {
        self.good_batches.load(Ordering::Relaxed)
    }

    /// Counts a batch. The one that fails its generation's probation is its last: the generation stops serving with it, and the
    /// reload decides what serves then.
    pub(super) fn count(&self, took: Duration, succeeded: bool) {
        if succeeded {
            self.good_batches.fetch_add(1, Ordering::Relaxed);
        }
        self.generation.batch_stats.count(took, succeeded, || self.generation.set_serves(false));
    }

    /// Counts what each stage took.
    pub(super) fn observe(&self, begun: Instant, times: &StageTimes, ended: Instant) {
        let (Some(preprocessed), Some(predicted)) = (times.preprocessed, times.predicted) else { return };
        self.metrics.preprocess.observe((preprocessed - begun).as_secs_f64());
        self.metrics.predict.observe((predicted - preprocessed).as_secs_f64());
        self.metrics.postprocess.observe((ended - predicted).as_secs_f64());
    }

    /// Records a batch's timings for those of its jobs that carry some.
    pub(super) fn record_timings(&self, mut batch: BatchTimings, timed: Vec<(Arc<JobTimings>, Instant)>) {
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
