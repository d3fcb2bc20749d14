//! One model's reloads: one loop over one enum of events. A change becomes a candidate, which is built, loaded and asked golden
//! requests while the generation before serves on; then it is swapped in, and the old one stands by until the new one has
//! passed its probation. It owns the model's fleets and what is remembered, and is never on the path of a request.
//!
//! ```text
//! Idle --new content--> Building --> Loading --> Golden --swap--> Idle
//!   what fails before the swap leaves what serves, and its reason in the history
//! Alone --swap--> OnProbation --passed--> Alone (the old one retired)
//!                        `--failed--> Alone (the old one serves again)
//! Alone --a candidate needs its devices, stop_first--> Stopped --swap--> Alone
//!                                                             `--the candidate failed--> loaded again
//! ```

mod candidate;
mod configure;
mod golden;
mod hooks;
mod orders;
mod plugin_source;
mod probation;
mod records;

use std::{
    collections::VecDeque,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use modalkit_device::Reservation;
use modalkit_engine::{Failure, LoadError, Plugin, Staged};
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinSet,
    time::{Interval, MissedTickBehavior},
};

use super::{
    build::Builder,
    history::{Cause, History, HookReport, Outcome, Phase, Phases, ReloadRecord, Source},
    report::{Report, Retired},
    watch::WatchHandle,
};
use crate::{
    config::{ModelSpec, Volume},
    insight::metrics::ReloadMetrics,
    pipeline::{Fleet, Generation, GoldenError, Model, Progress, Status, VolumeChange},
};
pub(super) use configure::needs_a_generation;

use candidate::{Candidate, Refused};
use hooks::Hook;
pub(super) use orders::{Order, What};
use plugin_source::PluginSource;
use probation::Standby;

/// Events that wait; senders wait where there are more.
pub(super) const INBOX_MAX: usize = 64;
/// How often a probation is checked: failures are judged as they happen, slowness by this.
const PROBATION_TICK: Duration = Duration::from_millis(50);

/// A plugin's file: a copy of it, or why there is none.
pub(super) type PluginFile = (PathBuf, Result<Staged, Arc<LoadError>>);

/// What a machine is told.
pub(super) enum Event {
    /// The plugin's file has been written: a copy of it, or why there is none.
    File(PathBuf, Result<Staged, Arc<LoadError>>),
    /// The plugin's file is gone.
    Gone(PathBuf),
    /// Model data changed.
    Data(VolumeChange),
    /// The model's spec was this and has changed; its volumes now, and its plugin's file where there is one.
    Configure(Arc<ModelSpec>, Vec<Volume>, Option<PluginFile>),
    /// Somebody asks for a change and waits for its outcome.
    Order(Order),
    /// Somebody asks for a hook and waits for what it said.
    Hook(VolumeChange, HookReply),
    /// Somebody waits until nothing is under way.
    Settled(oneshot::Sender<Option<ReloadRecord>>),
    /// Somebody wants to know how things stand.
    Report(oneshot::Sender<Report>),
    /// The candidate of this number has been built, or not.
    Built(u64, Result<(Arc<dyn Plugin>, Phases), LoadError>),
    /// The candidate's first replicas have come this far.
    Progress(Progress),
    /// The candidate of this number was asked golden requests.
    Asked(u64, Result<(), GoldenError>),
    /// The generation that the change of this record replaced has left.
    Left(u64),
    /// A hook has run on every replica.
    Hooked(Vec<Result<(), Failure>>),
    /// The generation failed its probation.
    ProbationFailed,
    /// Time to check the probation.
    ProbationTick,
    /// `volume_reload_interval_seconds` has passed.
    Interval,
    /// The model goes: at most after this time, in which what is queued is run.
    Unload(Duration),
    /// The host goes.
    Stop,
}

pub(super) type OutcomeReply = oneshot::Sender<ReloadRecord>;
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
    /// It has stopped, so that the next one gets its devices; callers wait. It is loaded again where the next one fails.
    Stopped(Stopped),
    Alone(Fleet),
    /// It serves, and the one before is on standby until it has passed.
    OnProbation {
        fleet: Fleet,
        standby: Standby,
    },
}

/// A generation without replicas, and what is needed to bring it back.
struct Stopped {
    generation: Arc<Generation>,
    replicas: usize,
    /// Its devices are this model's until something serves on them again.
    _reservation: Reservation,
}

pub(super) struct Machine {
    model: Arc<Model>,
    builder: Arc<Builder>,
    metrics: ReloadMetrics,
    watches: Arc<[WatchHandle]>,
    volumes: Vec<Volume>,
    inbox: mpsc::Receiver<Event>,
    myself: mpsc::WeakSender<Event>,
    state: State,
    serving: Serving,
    previous: Vec<Arc<Generation>>,
    orders: VecDeque<(What, Vec<OutcomeReply>)>,
    settled: Vec<oneshot::Sender<Option<ReloadRecord>>>,
    history: History,
    source: Option<Source>,
    refused: Option<Refused>,
    /// The content that somebody went back from.
    gone_back_from: Option<String>,
    /// What the watch told of while a file was built whose content wasn't known yet.
    later: Option<(PathBuf, Staged)>,
    /// A second file with the plugin's name, for when the first goes.
    passed_over: Option<(PathBuf, Result<Staged, Arc<LoadError>>)>,
    hook: Hook,
    candidates: u64,
    generations: u64,
    /// Every library that it ever served with, by content.
    plugins: Vec<Arc<dyn Plugin>>,
    probation_tick: Interval,
    hook_tick: Option<Interval>,
}

fn every(period: Duration) -> Interval {
    let mut interval = tokio::time::interval_at(tokio::time::Instant::now() + period, period);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    interval
}

impl Machine {
    pub(super) fn new(
        model: Arc<Model>,
        builder: Arc<Builder>,
        metrics: ReloadMetrics,
        watches: Arc<[WatchHandle]>,
        volumes: Vec<Volume>,
        (myself, inbox): (mpsc::WeakSender<Event>, mpsc::Receiver<Event>),
    ) -> Self {
        Self {
            probation_tick: every(PROBATION_TICK),
            hook_tick: model.spec().reload.hook_interval.map(every),
            model,
            builder,
            metrics,
            watches,
            volumes,
            inbox,
            myself,
            state: State::Idle,
            serving: Serving::Nothing,
            previous: Vec::new(),
            orders: VecDeque::new(),
            settled: Vec::new(),
            history: History::default(),
            source: None,
            refused: None,
            gone_back_from: None,
            later: None,
            passed_over: None,
            hook: Hook::default(),
            candidates: 0,
            generations: 0,
            plugins: Vec::new(),
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
            self.bring_back().await;
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
        let probation = async {
            match &self.serving {
                Serving::OnProbation { fleet, .. } => {
                    tokio::select! {
                        () = fleet.generation.batch_stats.probation_failed() => Event::ProbationFailed,
                        _ = self.probation_tick.tick() => Event::ProbationTick,
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
            event = probation => event,
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
            Event::Data(change) => self.on_data(change, Vec::new()).await,
            Event::Configure(spec, volumes, file) => self.on_configure(&spec, volumes, file).await,
            Event::Order(order) => self.on_order(order),
            Event::Hook(change, reply) if change.changed.is_empty() => {
                self.call_hook(change, vec![reply]).await;
            }
            Event::Hook(change, reply) => self.on_data(change, vec![reply]).await,
            Event::Settled(reply) => self.settled.push(reply),
            // Whoever asked may have left.
            Event::Report(reply) => drop(reply.send(self.report())),
            Event::Built(number, built) => self.on_built(number, built).await,
            Event::Progress(progress) => self.on_progress(progress).await,
            Event::Asked(number, asked) => self.on_asked(number, asked).await,
            Event::Left(entry) => self.on_left(entry),
            Event::Hooked(results) => self.on_hooked(results).await,
            Event::ProbationFailed => self.end_probation().await,
            Event::ProbationTick => self.on_probation_tick().await,
            Event::Interval => self.on_interval().await,
            Event::Unload(_) | Event::Stop => unreachable!("`run` ends with them"),
        }
    }

    fn on_file(&mut self, path: PathBuf, staged: Result<Staged, Arc<LoadError>>) {
        if let Some(source) = self.source.as_ref().filter(|source| source.present && source.path != path) {
            tracing::warn!(model = self.model.name, serves = %source.path.display(), passed_over = %path.display(), "two files in the volumes have the name of this model's plugin; remove one");
            self.passed_over = Some((path, staged));
            return;
        }
        self.source = Some(Source { path: path.clone(), present: true });
        let staged = match staged {
            Ok(staged) => staged,
            Err(error) => {
                let candidate = self.candidate(Cause::File, None);
                self.refuse(candidate, Phase::Build, error.chain());
                return;
            }
        };
        let sha256 = Some(staged.sha256());
        let serves = self.serving_sha256() == sha256 && self.serves_as_configured();
        let refused = self.refused.as_ref().map(|refused| refused.sha256.as_str()) == sha256;
        match &self.state {
            State::Building(candidate) if candidate.sha256.is_none() => {
                self.later = Some((path, staged));
                return;
            }
            State::Building(candidate) | State::Loading(candidate, _) | State::Golden(candidate, _) => {
                if candidate.sha256.as_deref() == sha256 {
                    return;
                }
                // What came from the volume is no longer in it. What somebody asked for gives way to new content only.
                if candidate.cause != Cause::Request || !serves && !refused {
                    self.give_up_candidate(Outcome::Superseded);
                }
            }
            State::Idle => {}
        }
        if serves {
            tracing::debug!(model = self.model.name, "the file has the content that serves");
            return;
        }
        if refused {
            tracing::info!(
                model = self.model.name,
                sha256,
                "the file has content that was refused before; POST /models/NAME/reload tries it again"
            );
            return;
        }
        let candidate = self.candidate(Cause::File, Some(staged.sha256().to_owned()));
        self.build(candidate, PluginSource::Staged(staged));
    }

    fn on_gone(&mut self, path: &Path) {
        if self.passed_over.as_ref().is_some_and(|(other, _)| other == path) {
            self.passed_over = None;
        }
        let Some(source) = self.source.as_mut().filter(|source| source.path == path) else { return };
        source.present = false;
        if let Some((path, staged)) = self.passed_over.take() {
            self.on_file(path, staged);
        } else if matches!((&self.serving, &self.state), (Serving::Nothing, State::Idle)) {
            // What was wrong with the file isn't any more.
            let expected = format!("{}.so", self.model.spec().plugin);
            self.model.set_status(Status::Waiting { expected }, None);
        }
    }

    async fn on_data(&mut self, change: VolumeChange, waiting: Vec<HookReply>) {
        let another_chance = self.refused.as_ref().is_some_and(|refused| refused.by_data);
        match &mut self.state {
            State::Loading(candidate, _) | State::Golden(candidate, _) => {
                candidate.missed.add(change.clone(), Vec::new());
            }
            State::Idle if another_chance => {
                tracing::info!(
                    model = self.model.name,
                    "data changed; the plugin that didn't load is tried again"
                );
                self.refused = None;
                self.orders.push_back((What::Reload, Vec::new()));
            }
            State::Idle | State::Building(_) => {}
        }
        self.call_hook(change, waiting).await;
    }

    async fn on_interval(&mut self) {
        self.watches.iter().for_each(WatchHandle::wake);
        for volume in self.volumes.clone() {
            let change = VolumeChange {
                volume: volume.name,
                mount_point: volume.mount_point.display().to_string(),
                changed: Vec::new(),
            };
            self.call_hook(change, Vec::new()).await;
        }
    }

    async fn leave(mut self, unload: Option<Duration>) {
        self.give_up_candidate(Outcome::Stopped);
        // Whoever serves now does so to the end.
        self.end_probation().await;
        for (_, waiting) in std::mem::take(&mut self.orders) {
            let mut candidate = self.candidate(Cause::Request, None);
            candidate.waiting = waiting;
            self.conclude(candidate, Outcome::Stopped);
        }
        // Whoever waits for a machine that has ended hears so.
        self.settled.clear();
        self.model.queue.drain();
        if let Some(limit) = unload.filter(|_| matches!(self.serving, Serving::Alone(_))) {
            let begun = Instant::now();
            while begun.elapsed() < limit && self.model.queue.load().queued > 0 {
                tokio::time::sleep(PROBATION_TICK).await;
            }
        }
        // Nothing is taken any more that no lane would run.
        self.model.set_status(if unload.is_some() { Status::Removed } else { Status::Stopping }, None);
        let mut leaving = JoinSet::new();
        match self.serving {
            Serving::Nothing | Serving::Stopped(..) => {}
            Serving::Alone(fleet) => drop(leaving.spawn(fleet.stop())),
            Serving::OnProbation { fleet, standby } => {
                leaving.spawn(fleet.stop());
                leaving.spawn(standby.fleet.stop());
            }
        }
        leaving.join_all().await;
        if unload.is_some() {
            let (fence, name) = (Arc::clone(&self.builder.fence), self.model.name.clone());
            let order = fence.order();
            tokio::task::spawn_blocking(move || fence.forget(&name, order));
            tracing::info!(model = self.model.name, "its replicas have left: it was unloaded");
        }
    }

    fn generation(&self) -> Option<&Arc<Generation>> {
        match &self.serving {
            Serving::Nothing => None,
            Serving::Stopped(stopped) => Some(&stopped.generation),
            Serving::Alone(fleet) | Serving::OnProbation { fleet, .. } => Some(&fleet.generation),
        }
    }

    /// Whether what serves was loaded as the model's entry says now.
    fn serves_as_configured(&self) -> bool {
        self.generation().is_some_and(|generation| !needs_a_generation(&generation.spec, &self.model.spec()))
    }

    fn generation_number(&self) -> Option<u64> {
        self.generation().map(|generation| generation.number)
    }

    fn serving_sha256(&self) -> Option<&str> {
        self.generation().map(|generation| generation.plugin.description().sha256())
    }

    fn report(&self) -> Report {
        let reload = match (&self.state, &self.serving) {
            (State::Building(_), _) => "building",
            (State::Loading(Candidate { seen: Progress::Waits(_), .. }, _), _) => "waits_for_device",
            (State::Loading(..), _) => "loading",
            (State::Golden(..), _) => "golden",
            (State::Idle, Serving::OnProbation { .. }) => "probation",
            (State::Idle, _) => "idle",
        };
        let standby = match &self.serving {
            Serving::OnProbation { standby, .. } => Some(&standby.fleet.generation),
            _ => None,
        };
        let in_use: Vec<&str> = self
            .generation()
            .into_iter()
            .chain(standby)
            .map(|generation| generation.plugin.description().sha256())
            .collect();
        let retired = self.plugins.iter().filter(|known| !in_use.contains(&known.description().sha256()));
        Report {
            reload,
            standby: standby.map(|generation| generation.number),
            previous: self.previous.last().map(|generation| generation.number),
            source: self.source.clone(),
            plugin_pinned: self.model.spec().plugin_sha256.is_some(),
            as_configured: matches!(self.state, State::Idle)
                .then(|| self.generation())
                .flatten()
                .map(|_| self.serves_as_configured()),
            generations: self.generations,
            retired: Retired {
                files: retired.map(|plugin| plugin.description().staged.clone()).collect(),
                engine: Arc::clone(&self.builder.engine),
            },
            batch_stats: self.generation().map(|generation| generation.batch_stats.snapshot()),
            hook: self.history.hook.clone(),
            hooks: self.history.hooks,
            hooks_failed: self.history.hooks_failed,
            last: self.history.last().cloned(),
            history: self.history.history(),
            data_history: self.history.data_history(),
        }
    }
}
