//! One model's reloads: one loop over one enum of events. A change becomes a candidate, which is built, loaded and asked golden
//! requests while the generation before serves on; then it is swapped in, and the old one stands by until the new one has
//! passed its probation. It owns the model's fleets and what is remembered, and is never on the path of a request.
//!
//! ```text
//! Idle --new content--> Building --> Loading --> Golden --swap--> Idle
//!   what fails before the swap leaves what serves, and its reason in the journal
//! Alone --swap--> OnTrial --passed--> Alone (the old one retired)
//!                        `--failed--> Alone (the old one serves again)
//! ```

use std::{
    collections::{BTreeSet, VecDeque},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use modalkit_loader::{LoadError, Plugin, Staged};
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinSet,
    time::{Interval, MissedTickBehavior},
};

use super::{
    build::{Builder, milliseconds},
    journal::{Cause, Entry, HookReport, Journal, Outcome, Phase, Phases, Source, unix_ms},
    report::Report,
    watch::Bell,
};
use crate::{
    config::Volume,
    pipeline::{Fleet, Generation, Golden, GoldenError, Model, Progress, Status, VolumeChange},
    telemetry::ReloadMetrics,
};

/// Events that wait; senders wait where there are more.
pub(super) const INBOX_MAX: usize = 64;
/// Orders that wait for the change under way.
const ORDERS_MAX: usize = 1024;
/// Generations that one may go back to, one after the other.
const PREVIOUS_MAX: usize = 32;
/// How often a trial is looked at: failures are judged as they happen, slowness by this.
const TRIAL_TICK: Duration = Duration::from_millis(50);

/// What a machine is told.
pub(super) enum Event {
    /// The plugin's file has been written: a copy of it, or why there is none.
    File(PathBuf, Result<Staged, Arc<LoadError>>),
    /// The plugin's file is gone.
    Gone(PathBuf),
    /// Model data changed.
    Data(VolumeChange),
    /// Somebody asks for a change and waits for its outcome.
    Order(Order),
    /// Somebody asks for a hook and waits for what it said.
    Hook(VolumeChange, HookReply),
    /// Somebody waits until nothing is under way.
    Settled(oneshot::Sender<Option<Entry>>),
    /// Somebody wants to know how things stand.
    Report(oneshot::Sender<Report>),
    /// The candidate of this number has been built, or not.
    Built(u64, Result<(Plugin, Phases), LoadError>),
    /// The candidate's first replicas have come this far.
    Progress(Progress),
    /// The candidate of this number was asked golden requests.
    Asked(u64, Result<(), GoldenError>),
    /// A generation that was replaced by this entry of the journal has left.
    Left(u64),
    /// A hook has run on every replica.
    Hooked(Vec<Result<(), String>>),
    /// The generation on trial failed it.
    TrialFailed,
    /// Time to look at the trial.
    TrialTick,
    /// `volume_reload_interval_seconds` has passed.
    Interval,
    /// The model goes: at most after this time, in which what is queued is run.
    Unload(Duration),
    /// The host goes.
    Stop,
}

/// What somebody asks for.
pub(super) struct Order {
    pub(super) what: What,
    pub(super) reply: OutcomeReply,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum What {
    /// Take what the volume holds, also where it is what serves.
    Reload,
    /// Go back to the generation before.
    RollBack,
}

pub(super) type OutcomeReply = oneshot::Sender<Entry>;
pub(super) type HookReply = oneshot::Sender<HookReport>;

/// What is on its way to serve.
enum State {
    /// Nothing.
    Idle,
    /// A file is copied, tried in a process of its own and opened.
    Building(Candidate),
    /// Replicas load and warm up; they take no work.
    Loading(Candidate, Fleet),
    /// One of them is asked golden requests.
    Golden(Candidate, Fleet),
}

/// What serves.
enum Serving {
    Nothing,
    Alone(Fleet),
    /// It serves, and the one before stands by until it has proven itself.
    OnTrial {
        fleet: Fleet,
        standby: Standby,
    },
}

struct Standby {
    fleet: Fleet,
    /// The journal's entry of the swap.
    entry: u64,
    until: Instant,
    /// What it was not told of.
    missed: Changes,
}

struct Candidate {
    number: u64,
    cause: Cause,
    sha256: Option<String>,
    phases: Phases,
    /// When the step under way began.
    begun: Instant,
    /// How far its replicas have come, as far as was looked at.
    seen: Progress,
    /// What changed after it began to load.
    missed: Changes,
    /// It served before: no trial, and what it replaces is not gone back to.
    back: bool,
    waiting: Vec<OutcomeReply>,
}

/// Content that is not taken again by itself.
struct Refused {
    sha256: String,
    /// It didn't load or answer, for which its data may be to blame: a change of them is another chance.
    by_data: bool,
}

/// A call of `on_volume_reload` under way, and what came meanwhile.
#[derive(Default)]
struct Hook {
    running: Option<(VolumeChange, Vec<HookReply>)>,
    next: Changes,
    waiting: Vec<HookReply>,
}

/// What changed, one entry a volume.
#[derive(Default)]
struct Changes(VecDeque<VolumeChange>);

pub(super) struct Machine {
    model: Arc<Model>,
    builder: Arc<Builder>,
    metrics: ReloadMetrics,
    bell: Arc<[Bell]>,
    volumes: Vec<Volume>,
    inbox: mpsc::Receiver<Event>,
    myself: mpsc::WeakSender<Event>,
    state: State,
    serving: Serving,
    previous: Vec<Arc<Generation>>,
    orders: VecDeque<(What, Vec<OutcomeReply>)>,
    settled: Vec<oneshot::Sender<Option<Entry>>>,
    journal: Journal,
    source: Option<Source>,
    refused: Option<Refused>,
    hook: Hook,
    candidates: u64,
    generations: u64,
    /// Every library that it ever served with, by content.
    libraries: Vec<Plugin>,
    trial_tick: Interval,
    hook_tick: Option<Interval>,
}

impl Machine {
    pub(super) fn new(
        model: Arc<Model>,
        builder: Arc<Builder>,
        metrics: ReloadMetrics,
        bell: Arc<[Bell]>,
        volumes: Vec<Volume>,
        (myself, inbox): (mpsc::WeakSender<Event>, mpsc::Receiver<Event>),
    ) -> Self {
        let every = |period: Duration| {
            let mut interval = tokio::time::interval_at(tokio::time::Instant::now() + period, period);
            interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
            interval
        };
        Self {
            trial_tick: every(TRIAL_TICK),
            hook_tick: model.spec.reload.hook_interval.map(every),
            model,
            builder,
            metrics,
            bell,
            volumes,
            inbox,
            myself,
            state: State::Idle,
            serving: Serving::Nothing,
            previous: Vec::new(),
            orders: VecDeque::new(),
            settled: Vec::new(),
            journal: Journal::default(),
            source: None,
            refused: None,
            hook: Hook::default(),
            candidates: 0,
            generations: 0,
            libraries: Vec::new(),
        }
    }

    /// Runs until it is told to end, and then until every replica has left, but for those that hang.
    pub(super) async fn run(mut self) {
        let unload = loop {
            match self.next().await {
                Event::Stop => break None,
                Event::Unload(limit) => break Some(limit),
                event => self.on(event).await,
            }
            self.next_order().await;
        };
        self.leave(unload).await;
    }

    async fn next(&mut self) -> Event {
        let candidate = async {
            match &mut self.state {
                State::Loading(candidate, fleet) => Event::Progress(fleet.beyond(&candidate.seen).await),
                _ => std::future::pending().await,
            }
        };
        let trial = async {
            match &self.serving {
                Serving::OnTrial { fleet, .. } => {
                    tokio::select! {
                        () = fleet.generation.vitals.failed_trial() => Event::TrialFailed,
                        _ = self.trial_tick.tick() => Event::TrialTick,
                    }
                }
                _ => std::future::pending().await,
            }
        };
        let interval = async {
            match &mut self.hook_tick {
                Some(interval) => interval.tick().await,
                None => std::future::pending().await,
            };
            Event::Interval
        };
        tokio::select! {
            biased;
            // First, so that no more callers than needed meet a generation that fails.
            event = trial => event,
            event = candidate => event,
            // The channel ends with the host.
            event = self.inbox.recv() => event.unwrap_or(Event::Stop),
            event = interval => event,
        }
    }

    async fn on(&mut self, event: Event) {
        match event {
            Event::File(path, staged) => self.on_file(path, staged),
            Event::Gone(path) => self.on_gone(&path),
            Event::Data(change) => self.on_data(change).await,
            Event::Order(order) => self.on_order(order),
            Event::Hook(change, reply) => self.call_hook(change, vec![reply]).await,
            Event::Settled(reply) => self.settled.push(reply),
            // Whoever asked may have left.
            Event::Report(reply) => drop(reply.send(self.report())),
            Event::Built(number, built) => self.on_built(number, built),
            Event::Progress(progress) => self.on_progress(progress).await,
            Event::Asked(number, asked) => self.on_asked(number, asked).await,
            Event::Left(entry) => self.on_left(entry),
            Event::Hooked(results) => self.on_hooked(results).await,
            Event::TrialFailed => self.end_trial().await,
            Event::TrialTick => self.on_trial_tick().await,
            Event::Interval => self.on_interval().await,
            Event::Unload(_) | Event::Stop => unreachable!("`run` ends with them"),
        }
    }

    // ---- what the volumes say

    fn on_file(&mut self, path: PathBuf, staged: Result<Staged, Arc<LoadError>>) {
        if let Some(source) = self.source.as_ref().filter(|source| source.present && source.path != path) {
            tracing::warn!(model = self.model.spec.name, serves = %source.path.display(), passed_over = %path.display(), "two files in the volumes have the name of this model's plugin; remove one");
            return;
        }
        self.source = Some(Source { path, present: true });
        let staged = match staged {
            Ok(staged) => staged,
            Err(error) => {
                let mut candidate = self.candidate(Cause::File, None);
                candidate.begun = Instant::now();
                self.refuse(candidate, Phase::Build, error.chain());
                return;
            }
        };
        let sha256 = Some(staged.sha256());
        let candidate = match &self.state {
            State::Idle => None,
            State::Building(candidate) | State::Loading(candidate, _) | State::Golden(candidate, _) => {
                Some(candidate)
            }
        };
        if let Some(candidate) = candidate {
            if candidate.sha256.as_deref() == sha256 {
                return;
            }
            // What it was made of is no longer in the volume.
            self.give_up_candidate(Outcome::Superseded);
        } else if self.serving_sha256() == sha256 {
            tracing::debug!(model = self.model.spec.name, "the file has the content that serves");
            return;
        } else if self.refused.as_ref().map(|refused| refused.sha256.as_str()) == sha256 {
            tracing::info!(
                model = self.model.spec.name,
                sha256,
                "the file has content that was refused before; POST /models/NAME/reload tries it again"
            );
            return;
        }
        let candidate = self.candidate(Cause::File, Some(staged.sha256().to_owned()));
        self.build(candidate, From::Staged(staged));
    }

    fn on_gone(&mut self, path: &Path) {
        let Some(source) = self.source.as_mut().filter(|source| source.path == path) else { return };
        source.present = false;
        if !matches!(self.serving, Serving::Nothing) {
            tracing::warn!(model = self.model.spec.name, file = %path.display(), "the plugin's file is gone; what is loaded serves on until the host ends");
        }
    }

    async fn on_data(&mut self, change: VolumeChange) {
        let another_chance = self.refused.as_ref().is_some_and(|refused| refused.by_data);
        match &mut self.state {
            State::Loading(candidate, _) | State::Golden(candidate, _) => {
                candidate.missed.add(change.clone());
            }
            State::Idle if another_chance => {
                tracing::info!(
                    model = self.model.spec.name,
                    "data changed; the plugin that didn't load is tried again"
                );
                self.refused = None;
                self.orders.push_back((What::Reload, Vec::new()));
            }
            State::Idle | State::Building(_) => {}
        }
        self.call_hook(change, Vec::new()).await;
    }

    async fn on_interval(&mut self) {
        self.bell.iter().for_each(Bell::ring);
        for volume in self.volumes.clone() {
            let change = VolumeChange {
                volume: volume.name,
                mount_point: volume.mount_point.display().to_string(),
                changed: Vec::new(),
            };
            self.call_hook(change, Vec::new()).await;
        }
    }

    // ---- what people say

    fn on_order(&mut self, order: Order) {
        let full = self.orders.len() >= ORDERS_MAX;
        match self.orders.back_mut() {
            // Those who ask for the same share one run of it.
            Some((What::Reload, waiting)) if order.what == What::Reload => waiting.push(order.reply),
            _ if full => {
                let mut candidate = self.candidate(Cause::Request, None);
                candidate.waiting.push(order.reply);
                let reason = format!("{ORDERS_MAX} reloads and rollbacks wait already; come back later");
                self.conclude(candidate, Outcome::Refused { phase: Phase::Build, reason });
            }
            _ => self.orders.push_back((order.what, vec![order.reply])),
        }
    }

    async fn next_order(&mut self) {
        while self.is_settled() {
            let Some((what, waiting)) = self.orders.pop_front() else {
                let last = self.journal.last().cloned();
                // Whoever asked may have left.
                self.settled.drain(..).for_each(|reply| drop(reply.send(last.clone())));
                return;
            };
            self.give_up_candidate(Outcome::Superseded);
            match what {
                What::Reload => self.reload(waiting),
                What::RollBack => self.roll_back(waiting).await,
            }
        }
    }

    /// Whether nothing is under way but what may go on for ever: a first generation that is tried again and again.
    fn is_settled(&self) -> bool {
        match &self.state {
            State::Idle => true,
            State::Loading(candidate, _) => matches!(candidate.seen, Progress::Failed(_)),
            State::Building(_) | State::Golden(..) => false,
        }
    }

    fn reload(&mut self, waiting: Vec<OutcomeReply>) {
        let mut candidate = self.candidate(Cause::Request, None);
        candidate.waiting = waiting;
        match self.source.clone() {
            Some(Source { path, present: true }) => self.build(candidate, From::File(path)),
            Some(Source { path, .. }) => {
                let reason = format!("expected the plugin at {}, and there is no file", path.display());
                self.refuse(candidate, Phase::Build, reason);
            }
            None => {
                let reason =
                    format!("no volume holds {plugin}.so or lib{plugin}.so", plugin = self.model.spec.plugin);
                self.refuse(candidate, Phase::Build, reason);
            }
        }
    }

    async fn roll_back(&mut self, waiting: Vec<OutcomeReply>) {
        if matches!(self.serving, Serving::OnTrial { .. }) {
            self.back_to_standby("asked for".into(), Cause::Request, waiting).await;
            return;
        }
        let mut candidate = self.candidate(Cause::Request, None);
        candidate.waiting = waiting;
        candidate.back = true;
        match self.previous.pop() {
            Some(generation) => {
                candidate.sha256 = Some(generation.plugin.sha256().to_owned());
                self.load(candidate, generation);
            }
            None => {
                let outcome = Outcome::Refused {
                    phase: Phase::RollBack,
                    reason: "there is no generation to go back to".into(),
                };
                self.conclude(candidate, outcome);
            }
        }
    }

    // ---- the candidate

    fn candidate(&mut self, cause: Cause, sha256: Option<String>) -> Candidate {
        self.candidates += 1;
        Candidate {
            number: self.candidates,
            cause,
            sha256,
            phases: Phases::default(),
            begun: Instant::now(),
            seen: Progress::Loading,
            missed: Changes::default(),
            back: false,
            waiting: Vec::new(),
        }
    }

    fn build(&mut self, candidate: Candidate, from: From) {
        if matches!(self.serving, Serving::Nothing) {
            self.model.set_status(Status::Loading, None);
        }
        let (builder, myself, number) = (Arc::clone(&self.builder), self.myself.clone(), candidate.number);
        let pin = self.model.spec.plugin_sha256.clone();
        let work = move || {
            let mut phases = Phases::default();
            let built = from.staged(&builder, &mut phases).and_then(|staged| {
                check_pin(pin.as_deref(), &staged)?;
                builder.build(&staged, &mut phases)
            });
            // A machine that has ended wants no plugin.
            if let Some(myself) = myself.upgrade() {
                let _ = myself.blocking_send(Event::Built(number, built.map(|plugin| (plugin, phases))));
            }
        };
        self.state = State::Building(candidate);
        tokio::task::spawn_blocking(work);
    }

    fn on_built(&mut self, number: u64, built: Result<(Plugin, Phases), LoadError>) {
        let mut candidate = match std::mem::replace(&mut self.state, State::Idle) {
            State::Building(candidate) if candidate.number == number => candidate,
            // Of one that was given up.
            other => {
                self.state = other;
                return;
            }
        };
        match built {
            Ok((plugin, phases)) => {
                candidate.phases = phases;
                candidate.sha256 = Some(plugin.sha256().to_owned());
                tracing::info!(
                    model = self.model.spec.name,
                    sha256 = plugin.sha256(),
                    version = plugin.version(),
                    "plugin opened"
                );
                self.generations += 1;
                if !self.libraries.iter().any(|known| known.is_same(&plugin)) {
                    self.libraries.push(plugin.clone());
                }
                let generation = Generation::new(self.generations, plugin, self.model.spec.clone());
                self.load(candidate, generation);
            }
            Err(error) => {
                let file = self.source.as_ref().map(|source| source.path.display().to_string());
                let reason = format!("{} was refused: {}", file.unwrap_or_default(), error.chain());
                if !error.may_pass() {
                    self.remember_refused(&candidate, false);
                }
                self.refuse(candidate, Phase::Build, reason);
            }
        }
    }

    /// Loads as many replicas as serve now, so that the swap changes nothing but what they run.
    fn load(&mut self, mut candidate: Candidate, generation: Arc<Generation>) {
        if matches!(self.serving, Serving::OnTrial { .. }) {
            // Three generations at once would be too much for most machines' memory.
            self.retire_standby();
        }
        let limits = self.model.spec.replicas;
        let now = usize::try_from(self.model.metrics.replicas.get()).unwrap_or_default();
        let replicas = match self.serving {
            Serving::Nothing => limits.min,
            _ => now.clamp(limits.min, limits.max),
        };
        candidate.begun = Instant::now();
        let fleet = Fleet::start(Arc::clone(&self.model), generation, replicas);
        self.state = State::Loading(candidate, fleet);
    }

    async fn on_progress(&mut self, progress: Progress) {
        let State::Loading(mut candidate, fleet) = std::mem::replace(&mut self.state, State::Idle) else {
            return;
        };
        let failed_before = matches!(candidate.seen, Progress::Failed(_));
        candidate.seen = progress.clone();
        match progress {
            Progress::Loading => self.state = State::Loading(candidate, fleet),
            Progress::Failed(reason) if matches!(self.serving, Serving::Nothing) => {
                // There is nothing better: the fleet tries again, and its first replica serves.
                self.model.set_status(Status::Failed { reason: reason.clone() }, None);
                if !failed_before {
                    let refused = Outcome::Refused { phase: Phase::Load, reason };
                    let waiting = std::mem::take(&mut candidate.waiting);
                    let entry = self.entry(&candidate, Some(fleet.generation.number), refused);
                    self.write_down(entry, waiting);
                }
                self.state = State::Loading(candidate, fleet);
            }
            Progress::Failed(reason) => {
                if candidate.back {
                    // It may be gone back to another time.
                    self.previous.push(Arc::clone(&fleet.generation));
                } else {
                    self.remember_refused(&candidate, true);
                }
                self.drop_fleet(fleet);
                self.refuse(candidate, Phase::Load, reason);
            }
            Progress::Loaded => {
                candidate.phases.load_ms = Some(milliseconds(candidate.begun));
                candidate.begun = Instant::now();
                let instance = fleet.instance().await;
                match (self.model.spec.golden.clone(), instance) {
                    (Some(golden), Some(instance)) if !candidate.back => {
                        let ask = Ask {
                            number: candidate.number,
                            limit: self.model.spec.replicas.load_timeout,
                            generation: Arc::clone(&fleet.generation),
                            myself: self.myself.clone(),
                        };
                        self.state = State::Golden(candidate, fleet);
                        tokio::spawn(ask.golden(golden, instance));
                    }
                    _ => self.swap(candidate, fleet).await,
                }
            }
        }
    }

    async fn on_asked(&mut self, number: u64, asked: Result<(), GoldenError>) {
        let (mut candidate, fleet) = match std::mem::replace(&mut self.state, State::Idle) {
            State::Golden(candidate, fleet) if candidate.number == number => (candidate, fleet),
            other => {
                self.state = other;
                return;
            }
        };
        candidate.phases.golden_ms = Some(milliseconds(candidate.begun));
        match asked {
            Ok(()) => self.swap(candidate, fleet).await,
            Err(error) => {
                let mut reason = error.to_string();
                if let Some(cause) = std::error::Error::source(&error) {
                    reason = format!("{reason}: {cause}");
                }
                self.remember_refused(&candidate, true);
                self.drop_fleet(fleet);
                self.refuse(candidate, Phase::Golden, reason);
            }
        }
    }

    async fn swap(&mut self, mut candidate: Candidate, fleet: Fleet) {
        let begun = Instant::now();
        let probation = self.model.spec.reload.probation;
        let old = match std::mem::replace(&mut self.serving, Serving::Nothing) {
            Serving::Nothing => None,
            Serving::Alone(old) => Some(old),
            Serving::OnTrial { fleet: old, standby } => {
                self.retire(standby.fleet, standby.entry);
                Some(old)
            }
        };
        let on_trial = old.as_ref().filter(|_| !candidate.back && !probation.time.is_zero());
        if let Some(old) = on_trial {
            // Before its first batch, which counts.
            fleet.generation.vitals.try_beside(old.generation.vitals.tally(), probation);
        }
        let on_trial = on_trial.is_some();
        // The point of no return: from here on the new generation answers.
        self.model.swap(old.as_ref().map(|old| &old.generation), &fleet.generation);
        self.metrics.generation.set(fleet.generation.number as i64);
        candidate.phases.swap_ms = Some(milliseconds(begun));
        self.refused = None;
        let missed = std::mem::take(&mut candidate.missed);
        let outcome = if candidate.back {
            // What is in the volume was turned down by whoever asked for this.
            if let Some(old) = &old {
                let sha256 = old.generation.plugin.sha256().to_owned();
                self.refused = Some(Refused { sha256, by_data: false });
            }
            Outcome::RolledBack { reason: "asked for".into() }
        } else {
            if let Some(old) = &old {
                self.previous.push(Arc::clone(&old.generation));
                if self.previous.len() > PREVIOUS_MAX {
                    self.previous.remove(0);
                }
            }
            Outcome::Swapped
        };
        let waiting = std::mem::take(&mut candidate.waiting);
        let entry = self.entry(&candidate, Some(fleet.generation.number), outcome);
        let entry = self.write_down(entry, waiting);
        self.serving = match old {
            None => Serving::Alone(fleet),
            Some(old) if on_trial => {
                let until = Instant::now() + probation.time;
                Serving::OnTrial {
                    fleet,
                    standby: Standby { fleet: old, entry, until, missed: Changes::default() },
                }
            }
            Some(old) => {
                self.retire(old, entry);
                Serving::Alone(fleet)
            }
        };
        for missed in missed.0 {
            self.call_hook(missed, Vec::new()).await;
        }
    }

    fn give_up_candidate(&mut self, outcome: Outcome) {
        let candidate = match std::mem::replace(&mut self.state, State::Idle) {
            State::Idle => return,
            State::Building(candidate) => candidate,
            State::Loading(candidate, fleet) | State::Golden(candidate, fleet) => {
                self.drop_fleet(fleet);
                candidate
            }
        };
        self.conclude(candidate, outcome);
    }

    fn refuse(&mut self, candidate: Candidate, phase: Phase, reason: String) {
        if matches!(self.serving, Serving::Nothing) && matches!(self.state, State::Idle) {
            self.model.set_status(Status::Failed { reason: reason.clone() }, None);
        }
        self.conclude(candidate, Outcome::Refused { phase, reason });
    }

    fn remember_refused(&mut self, candidate: &Candidate, by_data: bool) {
        if let Some(sha256) = candidate.sha256.clone() {
            self.refused = Some(Refused { sha256, by_data });
        }
    }

    fn conclude(&mut self, mut candidate: Candidate, outcome: Outcome) {
        let waiting = std::mem::take(&mut candidate.waiting);
        let entry = self.entry(&candidate, None, outcome);
        self.write_down(entry, waiting);
    }

    fn entry(&self, candidate: &Candidate, generation: Option<u64>, outcome: Outcome) -> Entry {
        Entry {
            at_unix_ms: unix_ms(),
            cause: candidate.cause,
            generation,
            plugin_sha256: candidate.sha256.clone(),
            outcome,
            phases: candidate.phases,
        }
    }

    fn write_down(&mut self, entry: Entry, waiting: Vec<OutcomeReply>) -> u64 {
        let model = &self.model.spec.name;
        let (generation, outcome) = (entry.generation, entry.outcome.word());
        match &entry.outcome {
            Outcome::Swapped => {
                tracing::info!(model, generation, phases = ?entry.phases, "a new generation serves");
            }
            Outcome::RolledBack { reason } => {
                tracing::warn!(model, generation, reason, "the generation before serves again");
            }
            Outcome::Refused { phase, reason } => {
                tracing::error!(model, ?phase, reason, serving = self.generation_number(), "plugin refused")
            }
            Outcome::Superseded | Outcome::Stopped => {
                tracing::info!(model, outcome, "a change was given up");
            }
        }
        self.metrics.outcome(outcome).inc();
        // Whoever asked may have left.
        waiting.into_iter().for_each(|reply| drop(reply.send(entry.clone())));
        self.journal.add(entry)
    }

    // ---- the trial

    async fn on_trial_tick(&mut self) {
        let Serving::OnTrial { fleet, standby } = &self.serving else { return };
        if Instant::now() >= standby.until {
            self.end_trial().await;
            return;
        }
        let generation = &fleet.generation;
        generation.vitals.judge(|| generation.set_serves(false));
    }

    /// The verdict: passed, so that the old one goes; failed, so that it serves again.
    async fn end_trial(&mut self) {
        let Serving::OnTrial { fleet, .. } = &self.serving else { return };
        match fleet.generation.vitals.end_trial() {
            Some(reason) => self.back_to_standby(reason, Cause::Probation, Vec::new()).await,
            None => self.retire_standby(),
        }
    }

    /// As [`Machine::end_trial`], where a newer candidate needs the room: the one that serves now is not judged further.
    fn retire_standby(&mut self) {
        self.serving = match std::mem::replace(&mut self.serving, Serving::Nothing) {
            Serving::OnTrial { fleet, standby } => {
                // A verdict that has just fallen has stopped its lanes: they go on, and the candidate comes soon.
                if fleet.generation.vitals.end_trial().is_some() {
                    self.model.swap(None, &fleet.generation);
                }
                self.retire(standby.fleet, standby.entry);
                Serving::Alone(fleet)
            }
            other => other,
        };
    }

    async fn back_to_standby(&mut self, reason: String, cause: Cause, waiting: Vec<OutcomeReply>) {
        let (fleet, standby) = match std::mem::replace(&mut self.serving, Serving::Nothing) {
            Serving::OnTrial { fleet, standby } => (fleet, standby),
            other => {
                self.serving = other;
                return;
            }
        };
        let begun = Instant::now();
        // So that nothing of it can stop lanes any more.
        let _ = fleet.generation.vitals.end_trial();
        let generation = Arc::clone(&standby.fleet.generation);
        self.model.swap(Some(&fleet.generation), &generation);
        self.metrics.generation.set(generation.number as i64);
        self.previous.pop();
        self.refused = Some(Refused { sha256: fleet.generation.plugin.sha256().to_owned(), by_data: false });
        let mut candidate = self.candidate(cause, Some(generation.plugin.sha256().to_owned()));
        candidate.phases.swap_ms = Some(milliseconds(begun));
        let entry = self.entry(&candidate, Some(generation.number), Outcome::RolledBack { reason });
        let entry = self.write_down(entry, waiting);
        self.serving = Serving::Alone(standby.fleet);
        self.retire(fleet, entry);
        for missed in standby.missed.0 {
            self.call_hook(missed, Vec::new()).await;
        }
    }

    fn retire(&self, fleet: Fleet, entry: u64) {
        let myself = self.myself.clone();
        tokio::spawn(async move {
            fleet.stop().await;
            if let Some(myself) = myself.upgrade() {
                // A machine that has ended keeps no journal.
                let _ = myself.send(Event::Left(entry)).await;
            }
        });
    }

    fn drop_fleet(&self, fleet: Fleet) {
        tokio::spawn(fleet.stop());
    }

    fn on_left(&mut self, entry: u64) {
        let since = self.journal.ended_at(entry).map(|at| unix_ms().saturating_sub(at));
        if let Some(took) = since {
            self.journal.drained(entry, took as f64);
        }
    }

    // ---- hooks

    async fn call_hook(&mut self, change: VolumeChange, waiting: Vec<HookReply>) {
        if let Serving::OnTrial { standby, .. } = &mut self.serving {
            standby.missed.add(change.clone());
        }
        if self.hook.running.is_some() {
            self.hook.next.add(change);
            self.hook.waiting.extend(waiting);
            return;
        }
        let fleet = match &self.serving {
            Serving::Nothing => {
                let report = self.hook_report(change, Vec::new());
                waiting.into_iter().for_each(|reply| drop(reply.send(report.clone())));
                return;
            }
            Serving::Alone(fleet) | Serving::OnTrial { fleet, .. } => fleet,
        };
        let results = fleet.volume_reload(change.clone()).await;
        self.hook.running = Some((change, waiting));
        let myself = self.myself.clone();
        tokio::spawn(async move {
            // A fleet that ended in between has nothing that could be told.
            let results = results.await.unwrap_or_default();
            if let Some(myself) = myself.upgrade() {
                let _ = myself.send(Event::Hooked(results)).await;
            }
        });
    }

    async fn on_hooked(&mut self, results: Vec<Result<(), String>>) {
        let Some((change, waiting)) = self.hook.running.take() else { return };
        let report = self.hook_report(change, results);
        self.journal.hooks += 1;
        let model = &self.model.spec.name;
        let failed = report.errors.iter().flatten().count();
        for error in report.errors.iter().flatten() {
            tracing::error!(
                model,
                volume = report.volume,
                error,
                "on_volume_reload failed; the pipeline serves on as it is"
            );
        }
        if failed > 0 {
            self.journal.hooks_failed += 1;
            self.metrics.hooks_failed.inc();
        } else {
            tracing::info!(model, volume = report.volume, changed = ?report.changed, "model data reloaded");
            self.metrics.hooks_ok.inc();
        }
        waiting.into_iter().for_each(|reply| drop(reply.send(report.clone())));
        self.journal.hook = Some(report);
        if let Some(change) = self.hook.next.0.pop_front() {
            let waiting = std::mem::take(&mut self.hook.waiting);
            self.call_hook(change, waiting).await;
        }
    }

    fn hook_report(&self, change: VolumeChange, results: Vec<Result<(), String>>) -> HookReport {
        HookReport {
            at_unix_ms: unix_ms(),
            volume: change.volume,
            changed: change.changed,
            errors: results.into_iter().map(Result::err).collect(),
        }
    }

    // ---- the end, and what is told

    async fn leave(mut self, unload: Option<Duration>) {
        self.give_up_candidate(Outcome::Stopped);
        for (_, waiting) in std::mem::take(&mut self.orders) {
            let mut candidate = self.candidate(Cause::Request, None);
            candidate.waiting = waiting;
            self.conclude(candidate, Outcome::Stopped);
        }
        // Whoever waits for a machine that has ended hears so.
        self.settled.clear();
        self.model.queue.drain();
        if let Some(limit) = unload {
            let begun = Instant::now();
            while begun.elapsed() < limit && self.model.queue.load().queued > 0 {
                tokio::time::sleep(TRIAL_TICK).await;
            }
        }
        let mut leaving = JoinSet::new();
        match self.serving {
            Serving::Nothing => {}
            Serving::Alone(fleet) => drop(leaving.spawn(fleet.stop())),
            Serving::OnTrial { fleet, standby } => {
                leaving.spawn(fleet.stop());
                leaving.spawn(standby.fleet.stop());
            }
        }
        leaving.join_all().await;
        self.model.set_status(Status::Stopping, None);
        if unload.is_some() {
            tracing::info!(
                model = self.model.spec.name,
                "the model is no longer configured; it was unloaded"
            );
        }
    }

    fn generation(&self) -> Option<&Arc<Generation>> {
        match &self.serving {
            Serving::Nothing => None,
            Serving::Alone(fleet) | Serving::OnTrial { fleet, .. } => Some(&fleet.generation),
        }
    }

    fn generation_number(&self) -> Option<u64> {
        self.generation().map(|generation| generation.number)
    }

    fn serving_sha256(&self) -> Option<&str> {
        self.generation().map(|generation| generation.plugin.sha256())
    }

    fn report(&self) -> Report {
        let reload = match (&self.state, &self.serving) {
            (State::Building(_), _) => "building",
            (State::Loading(..), _) => "loading",
            (State::Golden(..), _) => "golden",
            (State::Idle, Serving::OnTrial { .. }) => "probation",
            (State::Idle, _) => "idle",
        };
        let standby = match &self.serving {
            Serving::OnTrial { standby, .. } => Some(&standby.fleet.generation),
            _ => None,
        };
        let in_use: Vec<&Plugin> =
            self.generation().into_iter().chain(standby).map(|generation| &generation.plugin).collect();
        let retired =
            self.libraries.iter().filter(|known| !in_use.iter().any(|plugin| plugin.is_same(known)));
        Report {
            reload,
            standby: standby.map(|generation| generation.number),
            previous: self.previous.last().map(|generation| generation.number),
            source: self.source.clone(),
            plugin_pinned: self.model.spec.plugin_sha256.is_some(),
            generations: self.generations,
            retired: retired.cloned().collect(),
            vitals: self.generation().map(|generation| generation.vitals.tally()),
            hook: self.journal.hook.clone(),
            hooks: self.journal.hooks,
            hooks_failed: self.journal.hooks_failed,
            history: self.journal.history(),
        }
    }
}

/// Where a candidate's library comes from.
enum From {
    /// The watch's copy.
    Staged(Staged),
    /// The file, to be copied now.
    File(PathBuf),
}

impl From {
    fn staged(self, builder: &Builder, phases: &mut Phases) -> Result<Staged, LoadError> {
        match self {
            Self::Staged(staged) => Ok(staged),
            Self::File(file) => {
                let begun = Instant::now();
                let staged = builder.stage(&file)?;
                phases.stage_ms = Some(milliseconds(begun));
                Ok(staged)
            }
        }
    }
}

fn check_pin(pin: Option<&str>, staged: &Staged) -> Result<(), LoadError> {
    match pin {
        Some(expected) if expected != staged.sha256() => {
            Err(LoadError::Pinned { expected: expected.to_owned(), found: staged.sha256().to_owned() })
        }
        _ => Ok(()),
    }
}

/// Asks a loaded instance golden requests on a thread of its own.
struct Ask {
    number: u64,
    limit: Duration,
    generation: Arc<Generation>,
    myself: mpsc::WeakSender<Event>,
}

impl Ask {
    async fn golden(self, spec: crate::config::GoldenSpec, instance: Arc<modalkit_loader::Instance>) {
        let (done, asked) = oneshot::channel();
        let generation = self.generation;
        let ask = move || {
            let asked = Golden::read(&spec.file, spec.latency_max)
                .and_then(|golden| golden.ask(&generation, &instance));
            // Before the answer, so that nobody waits for this look at the instance.
            drop(instance);
            // The receiver is gone when the limit has passed.
            let _ = done.send(asked);
        };
        let asked = match std::thread::Builder::new().name("golden".into()).spawn(ask) {
            Ok(_) => tokio::time::timeout(self.limit, asked).await,
            Err(source) => {
                Ok(Ok(Err(GoldenError::Unreadable { path: "a thread to ask them".into(), source })))
            }
        };
        let asked = match asked {
            Ok(Ok(asked)) => asked,
            Ok(Err(_)) | Err(_) => Err(GoldenError::Hung { limit: self.limit }),
        };
        if let Some(myself) = self.myself.upgrade() {
            let _ = myself.send(Event::Asked(self.number, asked)).await;
        }
    }
}

impl Changes {
    fn add(&mut self, change: VolumeChange) {
        match self.0.iter_mut().find(|known| known.volume == change.volume) {
            Some(known) if known.changed.is_empty() || change.changed.is_empty() => {
                // Nobody knows which files changed.
                known.changed.clear();
            }
            Some(known) => {
                let files: BTreeSet<String> = known.changed.drain(..).chain(change.changed).collect();
                known.changed = files.into_iter().collect();
            }
            None => self.0.push_back(change),
        }
    }
}
