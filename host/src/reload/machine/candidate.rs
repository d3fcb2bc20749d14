//! A candidate's way: build, load, golden requests, swap. What fails before the swap leaves what serves, and its reason in the
//! journal.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use modalkit_loader::{Instance, LoadError, Plugin, Staged};
use tokio::sync::{mpsc, oneshot};

use super::{Event, Machine, OutcomeReply, Serving, Standby, State, Stopped, hooks::Changes};
use crate::{
    config::{GoldenSpec, ModelSpec, ReloadDevices},
    pipeline::{Fleet, Generation, Golden, GoldenError, Leases, Progress, Status, check_settings, examine},
    reload::{
        build::{Builder, milliseconds},
        journal::{Cause, Entry, Outcome, Phase, Phases, unix_ms},
    },
};

/// Generations that one may go back to, one after the other.
const PREVIOUS_MAX: usize = 32;

/// What is to serve next.
pub(super) struct Candidate {
    pub(super) number: u64,
    pub(super) cause: Cause,
    pub(super) sha256: Option<String>,
    pub(super) phases: Phases,
    /// When the step under way began.
    pub(super) begun: Instant,
    /// How far its replicas have come, as far as was looked at.
    pub(super) seen: Progress,
    /// What changed after it began to load.
    pub(super) missed: Changes,
    /// Why it, which served before, serves again: no trial, and what it replaces is not gone back to.
    pub(super) back: Option<String>,
    pub(super) waiting: Vec<OutcomeReply>,
}

/// Content that is not taken again by itself.
pub(super) struct Refused {
    pub(super) sha256: String,
    /// It didn't load or answer, for which its data may be to blame: a change of them is another chance.
    pub(super) by_data: bool,
}

impl Machine {
    pub(super) fn candidate(&mut self, cause: Cause, sha256: Option<String>) -> Candidate {
        self.candidates += 1;
        Candidate {
            number: self.candidates,
            cause,
            sha256,
            phases: Phases::default(),
            begun: Instant::now(),
            seen: Progress::Loading,
            missed: Changes::default(),
            back: None,
            waiting: Vec::new(),
        }
    }

    pub(super) fn build(&mut self, candidate: Candidate, from: From) {
        if matches!(self.serving, Serving::Nothing) {
            self.model.set_status(Status::Loading, None);
        }
        let (builder, myself, number) = (Arc::clone(&self.builder), self.myself.clone(), candidate.number);
        let spec = self.model.spec();
        let (pin, settings) = (spec.plugin_sha256.clone(), spec.settings.clone());
        let (done, built) = oneshot::channel();
        let work = move || {
            let mut phases = Phases::default();
            let built = from.staged(&builder, &mut phases).and_then(|staged| {
                staged.check_pin(pin.as_deref(), "the model's entry")?;
                let plugin = builder.build(&staged, &mut phases)?;
                match check_settings(&plugin, &settings) {
                    Ok(()) => Ok(plugin),
                    Err(faults) => Err(LoadError::Refused(faults.to_string())),
                }
            });
            // A machine that has ended wants no plugin.
            let _ = done.send(built.map(|plugin| (plugin, phases)));
        };
        self.state = State::Building(candidate);
        // A thread of its own: a library that takes long to be tried must not keep large requests from being parsed. Where
        // there is none, or it ends early, the sender's end says so.
        drop(std::thread::Builder::new().name("build".into()).spawn(work));
        tokio::spawn(async move {
            let failed = || LoadError::Refused("the host failed over it; see its log".into());
            let built = built.await.unwrap_or_else(|_| Err(failed()));
            if let Some(myself) = myself.upgrade() {
                let _ = myself.send(Event::Built(number, built)).await;
            }
        });
    }

    pub(super) async fn on_built(&mut self, number: u64, built: Result<(Plugin, Phases), LoadError>) {
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
                    model = self.model.name,
                    sha256 = plugin.sha256(),
                    version = plugin.version(),
                    "plugin opened"
                );
                self.generations += 1;
                if !self.libraries.iter().any(|known| known.is_same(&plugin)) {
                    self.libraries.push(plugin.clone());
                }
                let generation =
                    Generation::new(self.generations, plugin, ModelSpec::clone(&self.model.spec()));
                self.load(candidate, generation).await;
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
        if let Some((path, staged)) = self.later.take() {
            self.on_file(path, Ok(staged));
        }
    }

    /// Loads as many replicas as serve now, so that the swap changes nothing but what they run.
    pub(super) async fn load(&mut self, mut candidate: Candidate, generation: Arc<Generation>) {
        // Three generations at once would be too much for most machines' memory.
        self.end_trial().await;
        let spec = self.model.spec();
        let limits = spec.replicas;
        // Where devices are short, what serves may have fewer than the least: as many come in, and more when there are devices.
        let least = if spec.gpu.is_some() { 1 } else { limits.min };
        let (replicas, inherited) = match &self.serving {
            // The first one serves as soon as it can.
            Serving::Nothing => (1, Leases::new()),
            Serving::Stopped(stopped) => (stopped.replicas.clamp(least, limits.max), Leases::new()),
            Serving::Alone(fleet) | Serving::OnTrial { fleet, .. } => {
                let inherited = match spec.reload.devices {
                    ReloadDevices::Share => fleet.leases().await,
                    ReloadDevices::Wait | ReloadDevices::StopFirst => Leases::new(),
                };
                (fleet.replicas().clamp(least, limits.max), inherited)
            }
        };
        candidate.begun = Instant::now();
        let fleet = Fleet::start(Arc::clone(&self.model), generation, replicas, inherited);
        self.state = State::Loading(candidate, fleet);
    }

    /// Stops what serves, where that gives the candidate the devices that it waits for; callers wait meanwhile.
    async fn make_room(&mut self, candidate: &Generation) {
        let Serving::Alone(fleet) = &self.serving else { return };
        let (devices, model) = (Arc::clone(&self.model.devices), self.model.name.clone());
        let leases = fleet.leases().await;
        let helps = candidate
            .spec
            .gpu
            .as_ref()
            .is_some_and(|wanted| devices.has_room_without(&leases, wanted, &model));
        if !helps {
            tracing::warn!(
                model,
                "reload_gpu = \"stop_first\": the devices of what serves would not do; it serves on until others are free"
            );
            return;
        }
        // Before they are free, so that nobody else takes them.
        let reservation = devices.reserve(&leases, &model);
        let Serving::Alone(fleet) = std::mem::replace(&mut self.serving, Serving::Nothing) else { return };
        let generation = Arc::clone(&fleet.generation);
        self.model.queue.change_turns(|| generation.set_serves(false));
        tracing::warn!(
            model,
            generation = generation.number,
            "it has stopped, so that the next generation gets its devices; requests wait"
        );
        let replicas = fleet.replicas();
        self.serving = Serving::Stopped(Stopped { generation, replicas, _reservation: reservation });
        self.drop_fleet(fleet);
    }

    /// Loads again what has stopped for a candidate that is no more. It counts as stopped until it serves, so that its callers wait, and
    /// another candidate may still take its place.
    pub(super) async fn bring_back(&mut self) {
        let (State::Idle, Serving::Stopped(stopped)) = (&self.state, &self.serving) else { return };
        let before = Arc::clone(&stopped.generation);
        let mut candidate = self.candidate(Cause::Recovery, Some(before.plugin.sha256().to_owned()));
        candidate.back = Some("what was to take its place failed".to_owned());
        let generation = Generation::new(before.number, before.plugin.clone(), before.spec.clone());
        self.load(candidate, generation).await;
    }

    pub(super) async fn on_progress(&mut self, progress: Progress) {
        let State::Loading(mut candidate, fleet) = std::mem::replace(&mut self.state, State::Idle) else {
            return;
        };
        let failed_before = matches!(candidate.seen, Progress::Failed(_));
        candidate.seen = progress.clone();
        match progress {
            Progress::Loading => {
                if matches!(self.serving, Serving::Nothing) {
                    self.model.set_status(Status::Loading, None);
                }
                self.state = State::Loading(candidate, fleet);
            }
            Progress::Waits(reason) => {
                let lost = self.model.devices.lost().borrow().is_some();
                match self.serving {
                    Serving::Nothing => self.model.set_status(Status::Failed { reason }, None),
                    // Nobody will run what waits for it.
                    Serving::Stopped(_) if lost => self.model.set_status(Status::Failed { reason }, None),
                    Serving::Alone(_) if self.model.spec().reload.devices == ReloadDevices::StopFirst => {
                        self.make_room(&fleet.generation).await;
                    }
                    // What serves goes on until a device is free.
                    _ => {}
                }
                self.state = State::Loading(candidate, fleet);
            }
            // What had stopped doesn't load again either: as with a first one, there is nothing better.
            Progress::Failed(reason) if candidate.cause == Cause::Recovery => {
                self.serving = Serving::Nothing;
                self.model.set_status(Status::Failed { reason }, None);
                self.state = State::Loading(candidate, fleet);
            }
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
                if candidate.back.is_some() {
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
                match (self.model.spec().golden.clone(), instance) {
                    (Some(golden), Some(instance)) if candidate.back.is_none() => {
                        let ask = Ask {
                            number: candidate.number,
                            limit: self.model.spec().replicas.load_timeout,
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

    pub(super) async fn on_asked(&mut self, number: u64, asked: Result<(), GoldenError>) {
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
                // A request that fails on a device may have broken it for what serves there as well.
                fleet.leases().await.iter().for_each(|lease| examine(lease.upgrade()));
                self.drop_fleet(fleet);
                self.refuse(candidate, Phase::Golden, reason);
            }
        }
    }

    pub(super) async fn swap(&mut self, mut candidate: Candidate, fleet: Fleet) {
        let begun = Instant::now();
        let probation = self.model.spec().reload.probation;
        let (old, before) = match std::mem::replace(&mut self.serving, Serving::Nothing) {
            Serving::Nothing => (None, None),
            Serving::Stopped(stopped) => (None, Some(stopped.generation)),
            Serving::Alone(old) => (Some(old), None),
            Serving::OnTrial { fleet: old, standby } => {
                self.retire(standby.fleet, standby.entry);
                (Some(old), None)
            }
        };
        let before = before.or_else(|| old.as_ref().map(|old| Arc::clone(&old.generation)));
        let on_trial = old.as_ref().filter(|_| candidate.back.is_none() && !probation.time.is_zero());
        if let Some(old) = on_trial {
            // Before its first batch, which counts.
            fleet.generation.vitals.try_beside(old.generation.vitals.tally(), probation);
        }
        let on_trial = on_trial.is_some();
        // The point of no return: from here on the new generation answers.
        self.model.swap(old.as_ref(), &fleet);
        self.metrics.generation.set(fleet.generation.number as i64);
        candidate.phases.swap_ms = Some(milliseconds(begun));
        let missed = std::mem::take(&mut candidate.missed);
        let outcome = if let Some(reason) = candidate.back.take() {
            // What is in the volume was turned down by whoever asked for this; where nobody did, it has been refused already.
            if let Some(before) = before.filter(|_| candidate.cause != Cause::Recovery) {
                let sha256 = before.plugin.sha256().to_owned();
                self.refused = Some(Refused { sha256, by_data: false });
            }
            Outcome::RolledBack { reason }
        } else {
            self.refused = None;
            if let Some(before) = before {
                self.previous.push(before);
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
        for (missed, _) in missed.0 {
            self.call_hook(missed, Vec::new()).await;
        }
    }

    pub(super) fn give_up_candidate(&mut self, outcome: Outcome) {
        let candidate = match std::mem::replace(&mut self.state, State::Idle) {
            State::Idle => return,
            State::Building(candidate) => candidate,
            State::Loading(candidate, fleet) | State::Golden(candidate, fleet) => {
                if candidate.back.is_some() && candidate.cause != Cause::Recovery {
                    // It may be gone back to another time.
                    self.previous.push(Arc::clone(&fleet.generation));
                } else if matches!(candidate.seen, Progress::Failed(_)) {
                    // It was tried again and again, and nobody does that any more: a change of its data is a chance.
                    self.remember_refused(&candidate, true);
                }
                self.drop_fleet(fleet);
                candidate
            }
        };
        self.conclude(candidate, outcome);
    }

    pub(super) fn refuse(&mut self, candidate: Candidate, phase: Phase, reason: String) {
        if matches!(self.serving, Serving::Nothing) && matches!(self.state, State::Idle) {
            self.model.set_status(Status::Failed { reason: reason.clone() }, None);
        }
        self.conclude(candidate, Outcome::Refused { phase, reason });
    }

    pub(super) fn remember_refused(&mut self, candidate: &Candidate, by_data: bool) {
        if let Some(sha256) = candidate.sha256.clone() {
            self.refused = Some(Refused { sha256, by_data });
        }
    }

    pub(super) fn conclude(&mut self, mut candidate: Candidate, outcome: Outcome) {
        let waiting = std::mem::take(&mut candidate.waiting);
        let entry = self.entry(&candidate, None, outcome);
        self.write_down(entry, waiting);
    }

    pub(super) fn entry(&self, candidate: &Candidate, generation: Option<u64>, outcome: Outcome) -> Entry {
        Entry {
            at_unix_ms: unix_ms(),
            cause: candidate.cause,
            generation,
            plugin_sha256: candidate.sha256.clone(),
            outcome,
            phases: candidate.phases,
        }
    }

    pub(super) fn write_down(&mut self, entry: Entry, waiting: Vec<OutcomeReply>) -> u64 {
        let model = &self.model.name;
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
}

/// Where a candidate's library comes from.
pub(super) enum From {
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

/// Asks a loaded instance golden requests on a thread of its own.
struct Ask {
    number: u64,
    limit: Duration,
    generation: Arc<Generation>,
    myself: mpsc::WeakSender<Event>,
}

impl Ask {
    async fn golden(self, spec: GoldenSpec, instance: Arc<Instance>) {
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
