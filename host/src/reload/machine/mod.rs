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
mod recovery;
mod report;
mod state;
mod volume_events;

use std::{
    collections::VecDeque,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use modalkit_engine::{Failure, LoadError, Plugin, Staged};
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinSet,
    time::{Interval, MissedTickBehavior},
};

use super::{
    build::Builder,
    history::{Cause, History, HookReport, Outcome, Phases, ReloadRecord, Source},
    report::Report,
    watch::WatchHandle,
};
use crate::{
    config::{ModelSpec, Volume},
    insight::metrics::ReloadMetrics,
    pipeline::{Generation, GoldenError, Model, Progress, Status, StatusWriter, VolumeChange},
};
pub(super) use configure::needs_a_generation;

use candidate::{Candidate, Refused};
use hooks::Hook;
pub(super) use orders::{Order, What};
use state::{Serving, Standby, State, Stopped};

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
    /// Somebody waits until what came before this has been taken.
    Taken(oneshot::Sender<()>),
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
    /// The fleet that serves says something else of the model's status.
    Condition,
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

pub(super) struct Machine {
    model: Arc<Model>,
    builder: Arc<Builder>,
    metrics: ReloadMetrics,
    watches: Arc<[WatchHandle]>,
    volumes: Vec<Volume>,
    inbox: mpsc::Receiver<Event>,
    myself: mpsc::WeakSender<Event>,
    status: StatusWriter,
    serving: Serving,
    /// Why nothing serves, where a change was refused since the plugin's file was looked for.
    trouble: Option<String>,
    /// Changes that have ended, and who waits for that.
    ended: Vec<(ReloadRecord, Vec<OutcomeReply>)>,
    previous: Vec<Arc<Generation>>,
    orders: VecDeque<(What, Vec<OutcomeReply>)>,
    settled: Vec<oneshot::Sender<Option<ReloadRecord>>>,
    history: History,
    source: Option<Source>,
    refused: Option<Refused>,
    /// In which the plugin's folder was seen last, where it is one of Python.
    environment: Option<String>,
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
        (model, status): (Arc<Model>, StatusWriter),
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
            status,
            serving: Serving::Nothing,
            trouble: None,
            ended: Vec::new(),
            previous: Vec::new(),
            orders: VecDeque::new(),
            settled: Vec::new(),
            history: History::default(),
            source: None,
            refused: None,
            environment: None,
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
        let mut state = State::Idle;
        let unload = loop {
            state = match self.next(&mut state).await {
                Event::Stop => break None,
                Event::Unload(limit) => break Some(limit),
                event => self.on(state, event).await,
            };
            self.announce(&state);
            state = self.bring_back(state).await;
            state = self.next_order(state).await;
            self.announce(&state);
        };
        self.leave(state, unload).await;
    }

    async fn next(&mut self, state: &mut State) -> Event {
        let candidate = async {
            match state {
                State::Loading(candidate, fleet) => Event::Progress(fleet.beyond(&candidate.seen).await),
                _ => std::future::pending().await,
            }
        };
        let condition = async {
            match self.serving.fleet().filter(|fleet| fleet.generation.serves()) {
                Some(fleet) => fleet.leaves_condition(&self.model.status()).await,
                None => std::future::pending().await,
            }
            Event::Condition
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
            event = condition => event,
            event = candidate => event,
            // The channel ends with the host.
            event = self.inbox.recv() => event.unwrap_or(Event::Stop),
            event = interval => event,
        }
    }

    async fn on(&mut self, mut state: State, event: Event) -> State {
        match event {
            Event::File(path, staged) => return self.on_file(state, path, staged),
            Event::Gone(path) => return self.on_gone(state, &path),
            Event::Configure(spec, volumes, file) => {
                return self.on_configure(state, &spec, volumes, file).await;
            }
            Event::Built(number, built) => return self.on_built(state, number, built).await,
            Event::Progress(progress) => return self.on_progress(state, progress).await,
            Event::Asked(number, asked) => return self.on_asked(state, number, asked).await,
            Event::Data(change) => self.on_data(&mut state, change, Vec::new()).await,
            Event::Hook(change, reply) if change.changed.is_empty() => {
                self.call_hook(change, vec![reply]).await;
            }
            Event::Hook(change, reply) => self.on_data(&mut state, change, vec![reply]).await,
            Event::Order(order) => self.on_order(order),
            Event::Settled(reply) => self.settled.push(reply),
            // Whoever asked may have left.
            Event::Report(reply) => drop(reply.send(self.report(&state))),
            Event::Taken(reply) => drop(reply.send(())),
            Event::Left(entry) => self.on_left(entry),
            Event::Hooked(results) => self.on_hooked(results).await,
            Event::ProbationFailed => self.end_probation().await,
            Event::ProbationTick => self.on_probation_tick().await,
            Event::Interval => self.on_interval().await,
            // Announced after each event.
            Event::Condition => {}
            Event::Unload(_) | Event::Stop => unreachable!("`run` ends with them"),
        }
        state
    }

    /// Says where the model stands, and then to those who wait what became of the changes that have ended.
    fn announce(&mut self, state: &State) {
        let status = self.status_of(state);
        self.status.publish(status, self.generation());
        self.answer_ended();
    }

    /// Where the model stands: by what serves; where nothing does, by what is on its way.
    fn status_of(&self, state: &State) -> Status {
        let seen = match state {
            State::Loading(candidate, _) => Some(&candidate.seen),
            _ => None,
        };
        match (&self.serving, state, seen) {
            (Serving::Alone(fleet) | Serving::OnProbation { fleet, .. }, ..) => {
                // One that has just failed its probation says nothing any more: what is on standby takes over.
                if fleet.generation.serves() {
                    fleet.condition()
                } else {
                    Status::clone(&self.model.status())
                }
            }
            // Nobody will run what waits for it.
            (Serving::Stopped(_), ..) if self.has_lost_devices() => Status::lost_device(),
            (Serving::Stopped(_), ..) => Status::Ready,
            // There is nothing better: the fleet tries again, and its first replica serves.
            (Serving::Nothing, _, Some(Progress::Failed(reason) | Progress::Waits(reason))) => {
                Status::Failed { reason: reason.clone() }
            }
            (Serving::Nothing, State::Building(_) | State::Loading(..) | State::Golden(..), _) => {
                Status::Loading
            }
            (Serving::Nothing, State::Idle, _) => match &self.trouble {
                Some(reason) => Status::Failed { reason: reason.clone() },
                None => Status::waiting(&self.model.spec()),
            },
        }
    }

    fn has_lost_devices(&self) -> bool {
        self.model.devices.lost().borrow().is_some()
    }

    async fn leave(mut self, state: State, unload: Option<Duration>) {
        self.give_up(state, Outcome::Stopped);
        // Whoever serves now does so to the end.
        self.end_probation().await;
        for (_, waiting) in std::mem::take(&mut self.orders) {
            let mut candidate = self.candidate(Cause::Request, None);
            candidate.waiting = waiting;
            self.conclude(candidate, Outcome::Stopped);
        }
        self.answer_ended();
        // Whoever waits for a machine that has ended hears so.
        self.settled.clear();
        self.model.queue.drain();
        if let Some(limit) = unload.filter(|_| matches!(self.serving, Serving::Alone(_))) {
            let begun = Instant::now();
            let may_run = || self.serving.fleet().is_some_and(|fleet| fleet.condition() == Status::Ready);
            while begun.elapsed() < limit && self.model.queue.load().queued > 0 && may_run() {
                tokio::time::sleep(PROBATION_TICK).await;
            }
        }
        // Nothing is taken any more that no lane would run.
        self.status.publish(if unload.is_some() { Status::Removed } else { Status::Stopping }, None);
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
        self.serving.generation()
    }

    /// Whether what serves was loaded as the model's entry says now.
    fn serves_as_configured(&self) -> bool {
        let serves_so = |generation: &Arc<Generation>| {
            !needs_a_generation(&generation.spec, &self.model.spec(), generation.plugin.is_isolated())
        };
        self.generation().is_some_and(serves_so)
    }

    fn generation_number(&self) -> Option<u64> {
        self.generation().map(|generation| generation.number)
    }

    /// Whether this is what serves, in the environment that it was loaded in.
    fn serves(&self, staged: &Staged) -> bool {
        self.generation().is_some_and(|generation| {
            let serving = &generation.plugin.description().staged;
            (serving.sha256(), serving.environment()) == (staged.sha256(), staged.environment())
        })
    }

    fn serving_sha256(&self) -> Option<&str> {
        self.generation().map(|generation| generation.plugin.description().sha256())
    }
}
