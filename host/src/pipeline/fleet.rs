//! Keeps as many replicas of a generation as are wanted: leases their devices, starts, replaces, gives up and retires them, and
//! has them walked through changes of their data. One loop over one enum of events; it never runs a batch itself, and never decides
//! whether its generation serves.

use std::{
    sync::{
        Arc, Weak,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use modalkit_device::{Holder, Lease, NoLease};
use modalkit_loader::{Failure, FailureKind, Instance};
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
    time::MissedTickBehavior,
};

use super::{
    Generation, Model, Status,
    replica::{Event, Replica, Surroundings},
    scale::{self, Seen, Step},
    walk::Walk,
};

/// How often the fleet looks at queue and replicas: the grain of `batch_timeout_seconds`, `load_timeout_seconds` and of
/// scaling.
const TICK: Duration = Duration::from_millis(50);
/// After a failed load, the wait until the next try; it doubles with each failure up to the maximum.
const RETRY_MIN: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(60);
/// Threads write here when they start or fail; a full channel makes them wait.
const EVENTS_MAX: usize = 64;
/// Orders that wait for the loop, which carries each out at once.
const ORDERS_MAX: usize = 16;

/// The running loop of one generation. Dropped, it ends as by [`Fleet::stop`], and nobody waits for it.
pub struct Fleet {
    /// Whose replicas these are.
    pub generation: Arc<Generation>,
    orders: mpsc::Sender<Order>,
    progress: watch::Receiver<Progress>,
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

/// A change in a volume, as the pipelines are told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeChange {
    /// The volume's name.
    pub volume: String,
    /// Where it lies.
    pub mount_point: String,
    /// Changed files, relative to it; none where nobody knows which.
    pub changed: Vec<String>,
}

/// Devices that may be shared while their holders are there.
pub type Leases = Vec<Weak<Lease>>;

pub(super) enum Order {
    VolumeReload(VolumeChange, oneshot::Sender<Vec<Result<(), Failure>>>),
    /// A hook overran its time; its replica is given up.
    GiveUp(Arc<Replica>),
    /// That hook has returned after all.
    CameBack,
    Instance(oneshot::Sender<Option<Arc<Instance>>>),
    Leases(oneshot::Sender<Leases>),
    Stop,
}

struct Loop {
    model: Arc<Model>,
    around: Arc<Surroundings>,
    /// For walks, which may outlive the fleet.
    orders: mpsc::WeakSender<Order>,
    progress: watch::Sender<Progress>,
    /// It was told to end, and only waits for those that are still there.
    stopping: bool,
    /// Replicas to be loaded before anything else is decided.
    first: usize,
    /// As many as `replicas` has.
    live: Arc<AtomicUsize>,
    replicas: Vec<Arc<Replica>>,
    leaving: Vec<Arc<Replica>>,
    /// Replicas with a batch that overran; their other lanes may still run one.
    given_up: Vec<Arc<Replica>>,
    loading: Vec<Loading>,
    /// Devices of the generation before, which its replicas may share where none is free.
    inherited: Leases,
    /// As many leases had ended when none was to be had.
    starved_at: Option<u64>,
    /// Threads that overran their time in `load`, in a batch or in a hook and haven't come back.
    stuck: usize,
    started_ever: u64,
    retry: Retry,
    short_since: Option<Instant>,
    spare_since: Option<Instant>,
}

struct Loading {
    replica: u64,
    since: Instant,
    /// What changed after it began to read its data.
    missed: Vec<VolumeChange>,
}

struct Retry {
    not_before: Option<Instant>,
    pause: Duration,
}

impl Fleet {
    /// Starts to load this many replicas. They take no work until the generation is said to serve. Where no device is free for one, it
    /// shares one of the `inherited`.
    #[must_use]
    pub fn start(model: Arc<Model>, generation: Arc<Generation>, replicas: usize, inherited: Leases) -> Self {
        let (events, received) = mpsc::channel(EVENTS_MAX);
        let (orders, ordered) = mpsc::channel(ORDERS_MAX);
        let (report, progress) = watch::channel(Progress::Loading);
        let around = Arc::new(Surroundings {
            generation: Arc::clone(&generation),
            queue: Arc::clone(&model.queue),
            metrics: Arc::clone(&model.metrics),
            events,
        });
        let live = Arc::new(AtomicUsize::new(0));
        let fleet = Loop {
            live: Arc::clone(&live),
            model,
            around,
            orders: orders.downgrade(),
            progress: report,
            stopping: false,
            first: replicas.max(1),
            replicas: Vec::new(),
            leaving: Vec::new(),
            given_up: Vec::new(),
            loading: Vec::new(),
            inherited,
            starved_at: None,
            stuck: 0,
            started_ever: 0,
            retry: Retry { not_before: None, pause: RETRY_MIN },
            short_since: None,
            spare_since: None,
        };
        Self { generation, orders, progress, live, task: tokio::spawn(fleet.run(received, ordered)) }
    }

    /// Waits until the first replicas have come further than this; returns how far.
    pub async fn beyond(&mut self, seen: &Progress) -> Progress {
        match self.progress.wait_for(|progress| progress != seen).await {
            Ok(progress) => progress.clone(),
            Err(_) => Progress::Failed("the host's loop that loads replicas ended".into()),
        }
    }

    /// Loaded replicas.
    #[must_use]
    pub fn replicas(&self) -> usize {
        self.live.load(Ordering::SeqCst)
    }

    /// An instance, to ask it something beside its work. `None` where there is none.
    pub async fn instance(&self) -> Option<Arc<Instance>> {
        let (reply, instance) = oneshot::channel();
        self.orders.send(Order::Instance(reply)).await.ok()?;
        instance.await.ok()?
    }

    /// The devices of its replicas.
    pub async fn leases(&self) -> Leases {
        let (reply, leases) = oneshot::channel();
        // A fleet that has ended has none.
        let _ = self.orders.send(Order::Leases(reply)).await;
        leases.await.unwrap_or_default()
    }

    /// Runs `on_volume_reload` on one replica after the other. What comes back has one entry for each; it ends with the
    /// fleet.
    pub async fn volume_reload(&self, change: VolumeChange) -> oneshot::Receiver<Vec<Result<(), Failure>>> {
        let (reply, results) = oneshot::channel();
        // A fleet that has ended drops the reply, which says so.
        let _ = self.orders.send(Order::VolumeReload(change, reply)).await;
        results
    }

    /// Lets every replica finish what it runs, and waits until they have left, but for those that hang.
    pub async fn stop(self) {
        // A loop that has ended needs no word.
        let _ = self.orders.send(Order::Stop).await;
        if let Err(error) = self.task.await {
            tracing::error!(%error, "a fleet's loop ended before it was told to");
        }
    }
}

impl Loop {
    async fn run(mut self, mut events: mpsc::Receiver<Event>, mut orders: mpsc::Receiver<Order>) {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // The first load is tried even where no replica is kept without work: a model that can't load should say so.
        (0..self.first).for_each(|_| self.start_replica());
        loop {
            tokio::select! {
                Some(event) = events.recv() => self.on_event(event),
                _ = tick.tick() => self.on_tick(),
                order = orders.recv() => match order {
                    Some(order) => {
                        if !self.on_order(order) {
                            break;
                        }
                    }
                    None => break,
                },
            }
        }
        // Orders that come now are dropped, and their senders with them.
        drop(orders);
        self.stopping = true;
        self.retire_all();
        while self.leaving.iter().any(|replica| !replica.has_left())
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
                    self.leaving.retain(|replica| !replica.has_left());
                }
            }
        }
    }

    /// `false` when it is to end.
    fn on_order(&mut self, order: Order) -> bool {
        match order {
            Order::Stop => return false,
            Order::Instance(reply) => {
                // Whoever asked may have left.
                let _ = reply.send(self.replicas.first().and_then(|replica| replica.instance()));
            }
            Order::Leases(reply) => {
                let leases = self.replicas.iter().filter_map(|replica| replica.lease()).map(Arc::downgrade);
                // Whoever asked may have left.
                let _ = reply.send(leases.collect());
            }
            Order::VolumeReload(change, reply) => {
                for loading in &mut self.loading {
                    loading.missed.push(change.clone());
                }
                tokio::spawn(self.walk().through(self.replicas.clone(), change, reply));
            }
            Order::CameBack => self.came_back(),
            Order::GiveUp(replica) => {
                let known = self.replicas.len();
                self.replicas.retain(|other| !Arc::ptr_eq(other, &replica));
                if self.replicas.len() < known {
                    self.stuck += 1;
                    self.validate_with_first();
                    replica.leave();
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
                    self.stuck = self.stuck.saturating_sub(1);
                    replica.leave();
                    self.leaving.push(replica);
                    self.on_replicas_changed();
                    return;
                };
                self.retry.pause = RETRY_MIN;
                tracing::info!(
                    model = self.model.name,
                    generation = self.around.generation.number,
                    replica = replica.number,
                    "replica started"
                );
                for change in missed {
                    // Before its first batch.
                    replica.park(true);
                    tokio::spawn(self.walk().through(
                        vec![Arc::clone(&replica)],
                        change,
                        oneshot::channel().0,
                    ));
                }
                self.replicas.push(replica);
                self.on_replicas_changed();
                if self.replicas.len() >= self.first {
                    self.progress.send_replace(Progress::Loaded);
                }
                self.says(Status::Ready);
            }
            Event::Failed(replica, failure) => {
                if self.has_loaded(replica).is_some() {
                    self.on_load_failed(&failure);
                } else {
                    self.stuck = self.stuck.saturating_sub(1);
                }
            }
            Event::CameBack => self.came_back(),
        }
    }

    fn came_back(&mut self) {
        self.stuck = self.stuck.saturating_sub(1);
        self.on_replicas_changed();
        tracing::warn!(model = self.model.name, "a replica that was given up came back and left");
    }

    /// What a replica missed while it loaded; `None` where it was no longer waited for.
    fn has_loaded(&mut self, replica: u64) -> Option<Vec<VolumeChange>> {
        let at = self.loading.iter().position(|loading| loading.replica == replica)?;
        Some(self.loading.remove(at).missed)
    }

    fn walk(&self) -> Walk {
        Walk {
            model: Arc::clone(&self.model),
            orders: self.orders.clone(),
            limit: self.model.spec().replicas.load_timeout,
        }
    }

    /// Where the model stands, said by the generation that serves.
    fn says(&self, status: Status) {
        let generation = &self.around.generation;
        if generation.serves() && !self.stopping {
            self.model.set_status(status, Some(generation));
        }
    }

    fn on_tick(&mut self) {
        self.give_up_overrun();
        self.give_up_loading();
        self.give_up_lost();
        self.leaving.retain(|replica| !replica.has_left());
        let now = Instant::now();
        if !self.around.generation.serves() {
            // What doesn't serve keeps what it has; only its first replicas are tried again.
            let missing = self.first.saturating_sub(self.replicas.len() + self.loading.len());
            if missing > 0 && *self.progress.borrow() != Progress::Loaded && self.may_retry(now) {
                self.start_replica();
            }
            return;
        }
        // Another generation may have set them last.
        self.model.metrics.replicas.set(self.replicas.len() as i64);
        self.model.metrics.replicas_stuck.set(self.stuck as i64);
        self.say_if_stuck();
        let load = self.model.queue.load();
        let spec = self.model.spec();
        let lanes = self.around.generation.spec.replicas.batches_in_flight;
        let batch = spec.batch.max_batch_size;
        keep(&mut self.short_since, now, load.queued >= batch && load.free_lanes == 0);
        keep(&mut self.spare_since, now, load.spare_lanes >= lanes);
        let since = |moment: Option<Instant>| moment.map_or(Duration::ZERO, |moment| now - moment);
        // A model that takes no jobs can't be woken by one: it is brought back as if one waited.
        let refuses = self.model.serving().is_err();
        let seen = Seen {
            live: self.replicas.len(),
            starting: self.loading.len(),
            stuck: self.stuck,
            queued: load.queued.max(usize::from(refuses)),
            short_for: since(self.short_since),
            spare_for: since(self.spare_since),
        };
        match scale::next(&spec.replicas, &seen) {
            Step::Start if self.may_retry(now) => self.start_replica(),
            Step::Retire => {
                self.spare_since = Some(now);
                self.retire_one();
            }
            Step::Start | Step::Stay => {}
        }
    }

    fn may_retry(&self, now: Instant) -> bool {
        // Each thread that hangs keeps its memory: beyond this many, another try only spreads the damage.
        self.stuck <= self.model.spec().replicas.stuck_max
            && self.starved_at.is_none_or(|freed| freed != self.model.devices.freed())
            && self.retry.not_before.is_none_or(|moment| moment <= now)
    }

    fn start_replica(&mut self) {
        self.short_since = None;
        let freed = self.model.devices.freed();
        let lease = match self.lease(self.started_ever + 1) {
            Ok(lease) => lease,
            // Waiting would change nothing.
            Err(refusal @ (NoLease::NotHere { .. } | NoLease::NotBeside { .. })) => {
                self.on_load_failed(&failure(refusal.to_string()));
                return;
            }
            Err(refusal) => {
                self.on_starved(&refusal, freed);
                return;
            }
        };
        if self.starved_at.take().is_some() {
            self.progress.send_if_modified(|progress| {
                let waited = matches!(progress, Progress::Waits(_));
                if waited {
                    *progress = Progress::Loading;
                }
                waited
            });
        }
        self.started_ever += 1;
        match Replica::start(self.started_ever, Arc::clone(&self.around), lease) {
            Ok(()) => self.loading.push(Loading {
                replica: self.started_ever,
                since: Instant::now(),
                missed: Vec::new(),
            }),
            Err(error) => {
                self.pause_retries();
                tracing::error!(model = self.model.name, %error, "can't start a replica's thread");
            }
        }
    }

    /// The devices of one more replica: free ones, or else those of a replica of the generation before. `None` where the model asks for
    /// none.
    fn lease(&mut self, replica: u64) -> Result<Option<Arc<Lease>>, NoLease> {
        let generation = &self.around.generation;
        let Some(wanted) = &generation.spec.gpu else { return Ok(None) };
        let holder = Holder { model: self.model.name.clone(), generation: generation.number, replica };
        let refusal = match self.model.devices.lease(wanted, holder.clone()) {
            Ok(lease) => return Ok(Some(Arc::new(lease))),
            Err(refusal) => refusal,
        };
        let shared = |lease: &Weak<Lease>| lease.upgrade()?.share(wanted, holder.clone());
        let found = self.inherited.iter().enumerate().find_map(|(at, lease)| Some((at, shared(lease)?)));
        let Some((at, lease)) = found else {
            let beside = !self.inherited.is_empty()
                && self.model.devices.has_room_without(&self.inherited, wanted, &self.model.name);
            return Err(if beside { NoLease::NotBeside { wanted: wanted.to_string() } } else { refusal });
        };
        // Two of its replicas don't share what one of the generation before had.
        self.inherited.remove(at);
        tracing::info!(
            model = self.model.name,
            generation = generation.number,
            replica,
            "no device is free: the replica shares one with the generation before"
        );
        Ok(Some(Arc::new(lease)))
    }

    fn on_starved(&mut self, refusal: &NoLease, freed: u64) {
        let reason = refusal.to_string();
        // Said once, and tried again whenever a lease has ended.
        if self.starved_at.replace(freed).is_none() {
            let (model, generation) = (&self.model.name, self.around.generation.number);
            tracing::warn!(model, generation, reason, "a replica waits for a device");
        }
        self.progress.send_if_modified(|progress| {
            let waits = Progress::Waits(reason.clone());
            let changes = *progress != Progress::Loaded && *progress != waits;
            if changes {
                *progress = waits;
            }
            changes
        });
        if self.replicas.is_empty() {
            self.says(Status::Failed { reason });
        }
    }

    /// Replicas whose device is lost run nothing any more.
    fn give_up_lost(&mut self) {
        if !self.replicas.iter().any(|replica| replica.is_lost()) {
            return;
        }
        let (lost, well): (Vec<_>, Vec<_>) = self.replicas.drain(..).partition(|replica| replica.is_lost());
        self.replicas = well;
        self.validate_with_first();
        self.leaving.extend(lost);
        self.on_replicas_changed();
        if self.replicas.is_empty() {
            let reason = "its device is lost until this host has been started again".to_owned();
            self.says(Status::Failed { reason });
        }
    }

    fn on_load_failed(&mut self, failure: &Failure) {
        let pause = self.pause_retries();
        let reason = failure.message.to_string();
        tracing::error!(
            model = self.model.name,
            generation = self.around.generation.number,
            error = reason,
            retry_in = ?pause,
            "the pipeline didn't load"
        );
        let reason = format!("the pipeline didn't load: {reason}");
        self.progress.send_if_modified(|progress| {
            let loading = *progress != Progress::Loaded;
            if loading {
                *progress = Progress::Failed(reason.clone());
            }
            loading
        });
        if self.replicas.is_empty() {
            self.says(Status::Failed { reason });
        }
    }

    fn give_up_loading(&mut self) {
        let limit = self.model.spec().replicas.load_timeout;
        let overdue = self.loading.iter().filter(|loading| loading.since.elapsed() >= limit).count();
        self.loading.retain(|loading| loading.since.elapsed() < limit);
        for _ in 0..overdue {
            self.stuck += 1;
            self.on_load_failed(&failure(format!(
                "`load` and `warmup` did not return within {limit:?} (load_timeout_seconds); their thread is left behind"
            )));
        }
        if overdue > 0 {
            self.on_replicas_changed();
        }
    }

    fn pause_retries(&mut self) -> Duration {
        let pause = self.retry.pause;
        self.retry = Retry { not_before: Some(Instant::now() + pause), pause: (pause * 2).min(RETRY_MAX) };
        pause
    }

    fn retire_one(&mut self) {
        // The youngest: the oldest validates.
        if let Some(replica) = self.replicas.pop() {
            tracing::info!(
                model = self.model.name,
                replica = replica.number,
                "replica retired: there was no work"
            );
            self.validate_with_first();
            replica.leave();
            self.leaving.push(replica);
            self.on_replicas_changed();
        }
    }

    fn retire_all(&mut self) {
        let leaving = std::mem::take(&mut self.replicas);
        self.validate_with_first();
        leaving.iter().for_each(|replica| replica.leave());
        self.leaving.extend(leaving);
        self.on_replicas_changed();
    }

    fn give_up_overrun(&mut self) {
        let now = Instant::now();
        let limit = self.model.spec().replicas.batch_timeout;
        let mut overrun = 0;
        let mut given_up = Vec::new();
        for replicas in [&mut self.replicas, &mut self.leaving] {
            replicas.retain(|replica| match replica.give_up_overrun(now, limit) {
                0 => true,
                lanes => {
                    overrun += lanes;
                    given_up.push(Arc::clone(replica));
                    false
                }
            });
        }
        overrun += self.given_up.iter().map(|replica| replica.give_up_overrun(now, limit)).sum::<usize>();
        self.given_up.retain(|replica| replica.is_running());
        if overrun == 0 {
            return;
        }
        self.validate_with_first();
        for replica in given_up {
            tracing::error!(
                model = self.model.name,
                replica = replica.number,
                ?limit,
                "a batch overran batch_timeout_seconds; its replica is given up and replaced"
            );
            self.model.metrics.replicas_given_up.inc();
            replica.leave();
            examine(replica.lease().map(Arc::clone));
            self.given_up.push(replica);
        }
        self.stuck += overrun;
        self.model.metrics.timed_out.inc_by(overrun as u64);
        (0..overrun).for_each(|_| self.around.count(limit, false));
        self.on_replicas_changed();
        self.say_if_stuck();
    }

    /// A generation that took over from another may be as stuck as it was before.
    fn say_if_stuck(&self) {
        let bound = self.model.spec().replicas.stuck_max;
        let hangs = self.stuck > bound && self.replicas.is_empty() && self.loading.is_empty();
        if !hangs || self.model.serving().is_err() {
            return;
        }
        let reason = format!(
            "{} threads hang in batches, loads or hooks that overran their time, more than stuck_replicas_max ({bound}); no replica is started until some come back: find out why the pipeline hangs, or restart the host",
            self.stuck
        );
        tracing::error!(model = self.model.name, reason, "the model is stuck");
        self.says(Status::Stuck { reason });
    }

    fn on_replicas_changed(&self) {
        self.live.store(self.replicas.len(), Ordering::SeqCst);
        if self.around.generation.serves() {
            self.model.metrics.replicas.set(self.replicas.len() as i64);
            self.model.metrics.replicas_stuck.set(self.stuck as i64);
        }
        self.validate_with_first();
        self.model.queue.change_turns(|| {});
    }

    /// Inputs are validated by a replica that stays. Called before one is told to leave, so that nobody looks at it then.
    fn validate_with_first(&self) {
        let validating = self.replicas.first().and_then(|replica| replica.instance());
        self.around.generation.validate_with(validating);
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

/// What the host has to say in the plugin's stead.
pub(super) fn failure(message: String) -> Failure {
    Failure { kind: FailureKind::Permanent, message: message.into() }
}
