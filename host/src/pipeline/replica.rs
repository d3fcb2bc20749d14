//! One instance and the threads that run its stages, each a lane: take a batch, run it, answer. It never knows how many
//! replicas there are.

use std::{
    ops::Deref,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use modalkit_device::Lease;
use modalkit_engine::{Death, EndedBy, Failure, Instance, Process};
use parking_lot::{Mutex, RwLock};
use tokio::sync::mpsc;

use super::{
    Generation, SharedInstance,
    batch_run::{self, Ran},
    lane::{LaneContext, LaneSlot, Seat},
    lost_device::judge,
};
use crate::{
    pipeline::LaneState,
    work::{JobError, Replies},
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
    /// It waits to take over.
    spare: AtomicBool,
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

/// What overran its time.
pub(super) enum Overrun {
    /// So many batches, whose threads hang.
    Hang(usize),
    /// A batch whose process was ended for it.
    Killed,
}

/// What a replica needs to run.
pub(super) struct ReplicaContext {
    pub(super) of_lanes: LaneContext,
    pub(super) events: mpsc::Sender<Event>,
}

impl Deref for ReplicaContext {
    type Target = LaneContext;

    fn deref(&self) -> &LaneContext {
        &self.of_lanes
    }
}

/// Between two looks at an instance that somebody still uses: in most cases to validate one input.
const INSTANCE_POLL_MIN: Duration = Duration::from_millis(1);
const INSTANCE_POLL_MAX: Duration = Duration::from_millis(100);
/// After this one that hangs is ended, where it has a process of its own.
const INSTANCE_TIME_MAX: Duration = Duration::from_secs(10);

impl Replica {
    /// Loads an instance on a thread of its own, which then becomes its first lane.
    pub(super) fn start(
        number: u64,
        context: Arc<ReplicaContext>,
        lease: Option<Arc<Lease>>,
        is_spare: bool,
    ) -> std::io::Result<()> {
        let name = thread_name(&context, number, 0);
        let load = move || match context.generation.instance(lease.as_deref()) {
            Ok(instance) => Self::serve(number, &context, instance, lease, is_spare),
            Err(mut failure) => {
                if let Some(lease) = lease {
                    let is_isolated = context.generation.plugin.is_isolated();
                    judge((!is_isolated).then_some(&*lease), &mut failure);
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
        is_spare: bool,
    ) {
        let count = context.generation.batches_in_flight();
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
            spare: AtomicBool::new(is_spare),
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
    pub(super) fn kill(&self, why: &str, by: EndedBy) -> bool {
        self.with_process(|process| process.kill(why, by)).is_some()
    }

    fn with_process<T>(&self, look: impl FnOnce(&dyn Process) -> T) -> Option<T> {
        let instance = self.instance.lock();
        instance.as_ref()?.process().map(look)
    }

    /// Pauses its lanes, or resumes them. Called inside `Queue::update_lane_states`, all lanes see it before they take a batch.
    pub(super) fn set_paused(&self, paused: bool) {
        self.paused.store(paused, Ordering::SeqCst);
    }

    /// Whether it waits to take over.
    pub(super) fn is_spare(&self) -> bool {
        self.spare.load(Ordering::SeqCst)
    }

    /// Has it take batches as others do. Wake the queue's lanes afterwards.
    pub(super) fn take_over(&self) {
        self.spare.store(false, Ordering::SeqCst);
    }

    fn lane_state(&self, generation: &Generation) -> LaneState {
        let has_died = self.death().is_some();
        if self.stopping.load(Ordering::SeqCst) || self.is_lost() || has_died {
            LaneState::Stopped
        } else if !generation.serves()
            || self.paused.load(Ordering::SeqCst)
            || self.spare.load(Ordering::SeqCst)
        {
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
            let Some(batch) = running.as_mut().filter(|batch| batch.has_run(now) >= limit) else { continue };
            if self.is_isolated {
                killed |= batch.overran.replace(limit).is_none();
                continue;
            }
            let waiters = running.take().map(|batch| batch.waiters).unwrap_or_default();
            drop(running);
            overrun += 1;
            let waiting = waiters.into_iter().flatten();
            waiting.for_each(|waiter| waiter.reply.send(Err(JobError::BatchTimedOut(limit))));
        }
        if killed {
            self.kill(&format!("a batch overran {limit:?} (batch_timeout_seconds)"), EndedBy::Host);
        }
        if killed { Overrun::Killed } else { Overrun::Hang(overrun) }
    }

    fn run_lane(&self, index: usize, context: &ReplicaContext) {
        let lane = &self.lanes[index];
        let lane_id = context.queue.lane();
        let instance = self.instance().expect("it is there while a lane runs");
        let (mut replies, mut last) = (Replies::default(), None);
        let state = || self.lane_state(&context.generation);
        while let Some(taken) = context.queue.next_batch(lane_id, state, &mut replies, last) {
            let seat = Seat {
                number: self.number,
                instance: &**instance,
                lane,
                context,
                is_only_lane: self.lanes.len() == 1,
                company: self.company.as_ref(),
                lease: self.lease.as_deref(),
            };
            let ended = batch_run::run(&seat, taken, replies);
            self.batches.fetch_add(1, Ordering::Relaxed);
            let Some(Ran { unsent, end }) = ended else {
                context.metrics.replicas_stuck.dec();
                context.tell(Event::ThreadReturned);
                break;
            };
            (replies, last) = (unsent, end);
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
        let (mut pause, begun) = (INSTANCE_POLL_MIN, Instant::now());
        while let Err(shared) = Arc::try_unwrap(instance).map(drop) {
            thread::sleep(pause);
            if let Some(process) = shared.process().filter(|_| begun.elapsed() > INSTANCE_TIME_MAX) {
                process.kill("somebody still waits for it after its replica has left", EndedBy::Host);
            }
            pause = (pause * 2).min(INSTANCE_POLL_MAX);
            instance = shared;
        }
    }
}

impl ReplicaContext {
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
