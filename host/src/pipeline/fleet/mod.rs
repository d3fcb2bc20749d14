//! Keeps as many replicas of a generation as are wanted: leases their devices, starts, replaces, gives up and retires them, and
//! has them walked through changes of their data. One loop over one enum of events; it never runs a batch itself, and never decides
//! whether its generation serves, but for a probation that its failures end.

mod loading;
mod retiring;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use modalkit_device::Lease;
use modalkit_engine::Failure;
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
    time::MissedTickBehavior,
};

use self::loading::Retry;
use super::{
    Generation, Model, SharedInstance, Status,
    command::{FleetCommand, Leases, VolumeChange},
    lane::LaneContext,
    replica::{Event, Replica, ReplicaContext},
    scale::{self, Observed, Step},
    walk::Walk,
};

/// How often the fleet looks at queue and replicas: the grain of `batch_timeout_seconds`, `load_timeout_seconds` and of
/// scaling.
const TICK: Duration = Duration::from_millis(50);
/// Threads write here when they start or fail; a full channel makes them wait.
const EVENTS_MAX: usize = 64;
/// Commands that wait for the loop, which carries each out at once.
const COMMANDS_MAX: usize = 16;

/// The running loop of one generation. Dropped, it ends as by [`Fleet::stop`], and nobody waits for it.
pub struct Fleet {
    /// Whose replicas these are.
    pub generation: Arc<Generation>,
    commands: mpsc::Sender<FleetCommand>,
    progress: watch::Receiver<Progress>,
    condition: watch::Receiver<Status>,
    live: Arc<AtomicUsize>,
    task: JoinHandle<()>,
}

/// How far the first replicas have come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    /// They load.
    Loading,
    /// One waits for a device, for this reason. It goes on when one is free.
    Waits(String),
    /// As many as were asked for are loaded.
    Loaded,
    /// One could not be loaded, for this reason. It is tried again, with a growing pause.
    Failed(String),
}

struct Loop {
    model: Arc<Model>,
    context: Arc<ReplicaContext>,
    /// For walks, which may outlive the fleet.
    commands: mpsc::WeakSender<FleetCommand>,
    progress: watch::Sender<Progress>,
    /// Where the model stands while its generation serves.
    condition: watch::Sender<Status>,
    /// Replicas to be loaded before anything else is decided.
    first: usize,
    /// The length of `replicas`, for others to read.
    live: Arc<AtomicUsize>,
    replicas: Vec<Arc<Replica>>,
    /// Loaded, to take over; they run nothing until then.
    spares: Vec<Arc<Replica>>,
    leaving: Vec<Arc<Replica>>,
    /// Replicas with a batch that overran; their other lanes may still run one.
    given_up: Vec<Arc<Replica>>,
    loading: Vec<Loading>,
    /// Devices of the generation before, which its replicas may share where none is free.
    inherited: Leases,
    /// How many leases had ended when the last one was refused; it is asked for again when that number changes.
    starved_at: Option<u64>,
    /// Threads of this generation that overran their time in `load`, in a batch or in a hook and haven't come back. The metric counts those
    /// of earlier ones too, which outlive their fleets: whoever notices that one is stuck adds to it, and that thread takes it off.
    stuck: usize,
    started_ever: u64,
    retry: Retry,
    /// Deaths of processes with no good batch between them, and the good batches there had been at the last one.
    deaths: u32,
    /// The same of those that neither the host nor the process itself brought about.
    kills: u32,
    good_before: u64,
    /// The replica that a fresh one is to replace, and that one's number.
    recycling: Option<(Arc<Replica>, u64)>,
    short_since: Option<Instant>,
    spare_since: Option<Instant>,
}

struct Loading {
    replica: u64,
    is_spare: bool,
    since: Instant,
    /// What changed after it began to read its data.
    missed: Vec<VolumeChange>,
}

impl Fleet {
    /// Starts to load this many replicas. They take no work until the generation is said to serve. Where no device is free for one, it
    /// shares one of the `inherited`.
    #[must_use]
    pub fn start(model: Arc<Model>, generation: Arc<Generation>, replicas: usize, inherited: Leases) -> Self {
        let (events, received) = mpsc::channel(EVENTS_MAX);
        let (commands, commanded) = mpsc::channel(COMMANDS_MAX);
        let (report, progress) = watch::channel(Progress::Loading);
        let (tell_condition, condition) = watch::channel(Status::Loading);
        let context = Arc::new(ReplicaContext {
            of_lanes: LaneContext {
                generation: Arc::clone(&generation),
                queue: Arc::clone(&model.queue),
                metrics: Arc::clone(&model.metrics),
                stream_wait_ms: AtomicU64::new(0),
                good_batches: AtomicU64::new(0),
                convictions: AtomicU32::new(0),
            },
            events,
        });
        context.set_stream_wait(model.spec().replicas.stream_wait);
        let live = Arc::new(AtomicUsize::new(0));
        let fleet = Loop {
            live: Arc::clone(&live),
            model,
            context,
            commands: commands.downgrade(),
            progress: report,
            condition: tell_condition,
            first: replicas.max(1),
            replicas: Vec::new(),
            spares: Vec::new(),
            leaving: Vec::new(),
            given_up: Vec::new(),
            loading: Vec::new(),
            inherited,
            starved_at: None,
            stuck: 0,
            started_ever: 0,
            retry: Retry::default(),
            deaths: 0,
            kills: 0,
            good_before: 0,
            recycling: None,
            short_since: None,
            spare_since: None,
        };
        Self {
            generation,
            commands,
            progress,
            condition,
            live,
            task: tokio::spawn(fleet.run(received, commanded)),
        }
    }

    /// Waits until the first replicas have come further than this; returns how far.
    pub async fn beyond(&mut self, seen: &Progress) -> Progress {
        match self.progress.wait_for(|progress| progress != seen).await {
            Ok(progress) => progress.clone(),
            Err(_) => Progress::Failed("the host's loop that loads replicas ended".into()),
        }
    }

    /// Where the model stands while this serves.
    #[must_use]
    pub fn condition(&self) -> Status {
        self.condition.borrow().clone()
    }

    /// Waits until that is something else than this.
    pub async fn leaves_condition(&self, known: &Status) {
        if self.condition.clone().wait_for(|condition| condition != known).await.is_err() {
            // A loop that has ended says nothing any more.
            std::future::pending().await
        }
    }

    /// Loaded replicas.
    #[must_use]
    pub fn replicas(&self) -> usize {
        self.live.load(Ordering::SeqCst)
    }

    /// An instance, to ask it something beside its work. `None` where there is none.
    pub async fn instance(&self) -> Option<SharedInstance> {
        let (reply, instance) = oneshot::channel();
        self.commands.send(FleetCommand::Instance(reply)).await.ok()?;
        instance.await.ok()?
    }

    /// The devices of its replicas.
    pub async fn leases(&self) -> Leases {
        let (reply, leases) = oneshot::channel();
        // A fleet that has ended has none.
        let _ = self.commands.send(FleetCommand::Leases(reply)).await;
        leases.await.unwrap_or_default()
    }

    /// Data have changed that it reads when it loads.
    pub async fn data_changed(&self) {
        // A fleet that has ended loads nothing.
        let _ = self.commands.send(FleetCommand::DataChanged).await;
    }

    /// Runs `on_volume_reload` on one replica after the other. What comes back has one entry for each; it ends with the
    /// fleet.
    pub async fn volume_reload(&self, change: VolumeChange) -> oneshot::Receiver<Vec<Result<(), Failure>>> {
        let (reply, results) = oneshot::channel();
        // A fleet that has ended drops the reply, which says so.
        let _ = self.commands.send(FleetCommand::VolumeReload(change, reply)).await;
        results
    }

    /// Lets every replica finish what it runs, and waits until they have left, but for those that hang.
    pub async fn stop(self) {
        // A loop that has ended needs no word.
        let _ = self.commands.send(FleetCommand::Stop).await;
        if let Err(error) = self.task.await {
            tracing::error!(%error, "a fleet's loop ended before it was told to");
        }
    }
}

impl Loop {
    async fn run(mut self, mut events: mpsc::Receiver<Event>, mut commands: mpsc::Receiver<FleetCommand>) {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // The first load is tried even where no replica is kept without work: a model that can't load should say so.
        (0..self.first).for_each(|_| self.start_replica());
        loop {
            tokio::select! {
                Some(event) = events.recv() => self.on_event(event),
                _ = tick.tick() => self.on_tick(),
                command = commands.recv() => match command {
                    Some(command) => {
                        if !self.on_command(command) {
                            break;
                        }
                    }
                    None => break,
                },
            }
        }
        // Commands that come now are dropped, and their senders with them.
        drop(commands);
        self.retire_all();
        while self.leaving.iter().any(|replica| !replica.has_stopped())
            || self.given_up.iter().any(|replica| replica.is_running())
            || !self.loading.is_empty()
        {
            tokio::select! {
                Some(event) = events.recv() => {
                    self.on_event(event);
                    self.retire_all();
                }
                _ = tick.tick() => {
                    self.give_up_overrun();
                    self.give_up_loading();
                    self.leaving.retain(|replica| !replica.has_stopped());
                }
            }
        }
        // Loads that were given up may have come back since the last look; those that come later see that nobody is told any more.
        events.close();
        while let Ok(event) = events.try_recv() {
            self.on_event(event);
        }
        self.retire_all();
    }

    /// `false` when it is to end.
    fn on_command(&mut self, command: FleetCommand) -> bool {
        match command {
            FleetCommand::Stop => return false,
            FleetCommand::Instance(reply) => {
                // Whoever asked may have left.
                let _ = reply.send(self.replicas.first().and_then(|replica| replica.instance()));
            }
            FleetCommand::Leases(reply) => {
                let leases = self.replicas.iter().filter_map(|replica| replica.lease()).map(Arc::downgrade);
                // Whoever asked may have left.
                let _ = reply.send(leases.collect());
            }
            FleetCommand::DataChanged => self.retry.lift(),
            FleetCommand::VolumeReload(change, reply) => {
                self.retry.lift();
                for loading in &mut self.loading {
                    loading.missed.push(change.clone());
                }
                let all = self.replicas.iter().chain(&self.spares).cloned().collect();
                tokio::spawn(self.walk().through(all, change, reply));
            }
            FleetCommand::ThreadReturned => self.thread_returned(),
            FleetCommand::GiveUp(replica) => {
                let known = self.replicas.len() + self.spares.len();
                self.replicas.retain(|other| !Arc::ptr_eq(other, &replica));
                self.spares.retain(|other| !Arc::ptr_eq(other, &replica));
                if self.replicas.len() + self.spares.len() < known {
                    // The walk has counted it in the metric.
                    self.stuck += 1;
                    self.validate_with_first();
                    replica.stop();
                    self.given_up.push(replica);
                    self.on_replicas_changed();
                }
            }
        }
        true
    }

    fn on_event(&mut self, event: Event) {
        match event {
            Event::Started(replica) => {
                let Some(missed) = self.has_loaded(replica.number) else {
                    self.load_came_back();
                    replica.stop();
                    self.leaving.push(replica);
                    self.on_replicas_changed();
                    return;
                };
                self.retry.succeeded();
                self.context.generation.note_loaded();
                let is_spare = replica.is_spare();
                tracing::info!(
                    model = self.model.name,
                    generation = self.context.generation.number,
                    replica = replica.number,
                    is_spare,
                    "replica started"
                );
                for change in missed {
                    // As early as it can: it may have taken a batch already.
                    replica.set_paused(true);
                    tokio::spawn(self.walk().through(
                        vec![Arc::clone(&replica)],
                        change,
                        oneshot::channel().0,
                    ));
                }
                if is_spare {
                    self.spares.push(replica);
                    // It may be needed by now, and be there before what is loaded for that.
                    if self.replicas.is_empty() && self.context.generation.serves() {
                        self.take_spare();
                    }
                    return;
                }
                let number = replica.number;
                self.replicas.push(replica);
                if let Some((old, _)) = self.recycling.take_if(|(_, fresh)| *fresh == number) {
                    self.retire_recycled(&old);
                }
                self.on_replicas_changed();
                // First: what is loaded may be swapped in, and is ready then.
                self.set_condition(Status::Ready);
                if self.replicas.len() >= self.first {
                    self.progress.send_replace(Progress::Loaded);
                }
            }
            Event::Failed(replica, failure) => {
                if self.has_loaded(replica).is_some() {
                    self.on_load_refused(&failure);
                } else {
                    self.load_came_back();
                }
            }
            Event::ThreadReturned => self.thread_returned(),
        }
    }

    fn walk(&self) -> Walk {
        Walk {
            model: Arc::clone(&self.model),
            commands: self.commands.clone(),
            limit: self.model.spec().replicas.load_timeout,
        }
    }

    fn set_condition(&self, condition: Status) {
        self.condition.send_if_modified(|known| {
            let changes = *known != condition;
            *known = condition;
            changes
        });
    }

    fn on_tick(&mut self) {
        self.give_up_overrun();
        self.give_up_loading();
        self.give_up_lost();
        self.replace_dead();
        self.leaving.retain(|replica| !replica.has_stopped());
        let now = Instant::now();
        if !self.context.generation.serves() {
            // What doesn't serve keeps what it has; only its first replicas are tried again.
            let missing = self.first.saturating_sub(self.replicas.len() + self.loading.len());
            if missing > 0 && *self.progress.borrow() != Progress::Loaded && self.may_retry(now) {
                self.start_replica();
            }
            return;
        }
        // Another generation may have set them last.
        self.model.metrics.replicas.set(self.replicas.len() as i64);
        self.say_if_stuck();
        if self.starved_at.is_some() && *self.condition.borrow() == Status::Ready {
            self.say_if_starved("no device is free for a replica".to_owned());
        }
        self.recycle();
        let load = self.model.queue.load();
        let spec = self.model.spec();
        let lanes = self.context.generation.batches_in_flight();
        let batch = spec.batch.max_batch_size;
        keep(&mut self.short_since, now, load.queued >= batch && load.free_lanes == 0);
        keep(&mut self.spare_since, now, load.spare_lanes >= lanes);
        let since = |moment: Option<Instant>| moment.map_or(Duration::ZERO, |moment| now - moment);
        // A model that takes no jobs can't be woken by one: it is brought back as if one waited.
        let refuses = *self.condition.borrow() != Status::Ready;
        let observed = Observed {
            live: self.replicas.len(),
            starting: self.loading.iter().filter(|loading| !loading.is_spare).count(),
            stuck: self.stuck,
            queued: load.queued.max(usize::from(refuses)),
            short_for: since(self.short_since),
            spare_for: since(self.spare_since),
        };
        match scale::next(&spec.replicas, &observed) {
            Step::Start => self.add_replica(now),
            Step::Retire => {
                self.spare_since = Some(now);
                self.retire_one();
            }
            Step::Stay => {}
        }
        self.keep_spares(now);
    }

    fn on_replicas_changed(&self) {
        self.live.store(self.replicas.len(), Ordering::SeqCst);
        if self.context.generation.serves() {
            self.model.metrics.replicas.set(self.replicas.len() as i64);
        }
        self.validate_with_first();
        self.model.queue.update_lane_states(|| {});
    }

    /// Inputs are validated by a replica that stays. Called before one is told to leave, so that nobody looks at it then.
    fn validate_with_first(&self) {
        let validating = self.replicas.first().and_then(|replica| replica.instance());
        self.context.generation.validate_with(validating);
    }
}

/// Asks the driver after devices on which something went wrong that isn't a failure of theirs for certain.
pub fn examine(lease: Option<Arc<Lease>>) {
    let Some(lease) = lease else { return };
    // On a thread of its own, as the driver may hang. Where there is none, the next failure asks.
    let ask = move || {
        lease.examine(None);
    };
    let _ = thread::Builder::new().name("examine device".into()).spawn(ask);
}

/// Remembers since when something holds.
fn keep(since: &mut Option<Instant>, now: Instant, holds: bool) {
    *since = if holds { since.or(Some(now)) } else { None };
}
