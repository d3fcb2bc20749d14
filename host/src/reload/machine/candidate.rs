//! A candidate's way: build, load, golden requests, swap. What fails before the swap leaves what serves, and its reason in the
//! history.

use std::{sync::Arc, time::Instant};

use modalkit_engine::{LoadError, Plugin};
use tokio::sync::oneshot;

use super::{
    Event, Machine, OutcomeReply, Serving, Standby, State, golden::Ask, hooks::Changes,
    plugin_source::PluginSource,
};
use crate::{
    config::{ModelSpec, ReloadDevices},
    pipeline::{Fleet, Generation, GoldenError, Leases, Progress, check_settings, examine},
    reload::{
        build::milliseconds,
        history::{Cause, Outcome, Phase, Phases},
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
    /// Why this goes back to an earlier generation: then there is no probation, and no way back to what it replaces.
    pub(super) back: Option<String>,
    pub(super) waiting: Vec<OutcomeReply>,
}

/// Content that is not taken again by itself.
pub(super) struct Refused {
    pub(super) sha256: String,
    /// Why it was refused.
    pub(super) reason: String,
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

    pub(super) fn build(&mut self, candidate: Candidate, from: PluginSource) -> State {
        self.trouble = None;
        let (builder, myself, number) = (Arc::clone(&self.builder), self.myself.clone(), candidate.number);
        let spec = self.model.spec();
        let (pin, settings) = (spec.plugin_sha256.clone(), spec.settings.clone());
        let (name, isolation) = (spec.name.clone(), spec.isolation.clone());
        let origin = self.source.as_ref().map(|source| source.path.clone()).unwrap_or_default();
        let (done, built) = oneshot::channel();
        let work = move || {
            let mut phases = Phases::default();
            let built = from.staged(&builder, &mut phases).and_then(|staged| {
                builder.unpinned.check(&origin, staged.sha256(), pin.is_some())?;
                staged.check_pin(pin.as_deref(), "the model's entry")?;
                // In a process of its own it ends nobody else.
                let why = builder.fence.why(&name, staged.sha256());
                if let Some(why) = why.filter(|_| isolation.in_process && !staged.path().is_dir()) {
                    return Err(LoadError::Fenced(why));
                }
                let plugin = builder.build(&staged, &isolation, &mut phases)?;
                match check_settings(&*plugin, &settings) {
                    Ok(()) => Ok(plugin),
                    Err(faults) => Err(LoadError::Refused(faults.to_string())),
                }
            });
            // A machine that has ended wants no plugin.
            let _ = done.send(built.map(|plugin| (plugin, phases)));
        };
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
        State::Building(candidate)
    }

    pub(super) async fn on_built(
        &mut self,
        state: State,
        number: u64,
        built: Result<(Arc<dyn Plugin>, Phases), LoadError>,
    ) -> State {
        let mut candidate = match state {
            State::Building(candidate) if candidate.number == number => candidate,
            // Of one that was given up.
            other => return other,
        };
        let state = match built {
            Ok((plugin, phases)) => {
                candidate.phases = phases;
                let about = plugin.description();
                let sha256 = about.sha256();
                candidate.sha256 = Some(sha256.to_owned());
                tracing::info!(model = self.model.name, sha256, version = about.version, "plugin opened");
                if about.has_debug_assertions {
                    tracing::warn!(
                        model = self.model.name,
                        "the plugin was built for debugging and is many times slower than it need be; build it with --release"
                    );
                }
                self.generations += 1;
                // Of those in processes of their own nothing stays here that nobody uses.
                self.plugins.retain(|known| !known.is_isolated() || Arc::strong_count(known) > 1);
                if !self.plugins.iter().any(|known| known.description().sha256() == sha256) {
                    self.plugins.push(Arc::clone(&plugin));
                }
                let spec = ModelSpec::clone(&self.model.spec());
                let generation =
                    Generation::new(self.generations, plugin, spec, Arc::clone(&self.builder.fence));
                self.load(candidate, generation).await
            }
            Err(error) => {
                let file = self.source.as_ref().map(|source| source.path.display().to_string());
                let reason = format!("{} was refused: {}", file.unwrap_or_default(), error.chain());
                if !error.may_pass() && !error.is_of_entry() {
                    // Opening a folder of Python runs its code, which may read data.
                    let by_data = self.source.as_ref().is_some_and(|source| source.path.is_dir());
                    self.remember_refused(&candidate, &reason, by_data);
                }
                let is_fenced = matches!(error, LoadError::Fenced(_)) && candidate.cause == Cause::File;
                self.refuse(candidate, Phase::Build, reason);
                if is_fenced { self.serve_what_served() } else { State::Idle }
            }
        };
        match self.later.take() {
            Some((path, staged)) => self.on_file(state, path, Ok(staged)),
            None => state,
        }
    }

    /// Loads as many replicas as serve now, so that the swap changes nothing but what they run.
    pub(super) async fn load(&mut self, mut candidate: Candidate, generation: Arc<Generation>) -> State {
        // Three generations at once would be too much for most machines' memory.
        self.end_probation().await;
        let spec = self.model.spec();
        let limits = spec.replicas;
        // Where devices are short, what serves may have fewer than `min_replicas`: it begins with as many, and gets more when there are
        // devices.
        let least = if spec.gpu.is_some() { 1 } else { limits.min };
        let (replicas, inherited) = match &self.serving {
            // The first one serves as soon as it can.
            Serving::Nothing => (1, Leases::new()),
            Serving::Stopped(stopped) => (stopped.replicas.clamp(least, limits.max), Leases::new()),
            Serving::Alone(fleet) | Serving::OnProbation { fleet, .. } => {
                let inherited = match spec.reload.devices {
                    ReloadDevices::Share => fleet.leases().await,
                    ReloadDevices::Wait | ReloadDevices::StopFirst => Leases::new(),
                };
                (fleet.replicas().clamp(least, limits.max), inherited)
            }
        };
        candidate.begun = Instant::now();
        let fleet = Fleet::start(Arc::clone(&self.model), generation, replicas, inherited);
        State::Loading(candidate, fleet)
    }

    pub(super) async fn on_progress(&mut self, state: State, progress: Progress) -> State {
        let State::Loading(mut candidate, fleet) = state else { return state };
        let failed_before = matches!(candidate.seen, Progress::Failed(_));
        candidate.seen = progress.clone();
        match progress {
            Progress::Loading => State::Loading(candidate, fleet),
            Progress::Waits(_) => {
                if self.model.spec().reload.devices == ReloadDevices::StopFirst {
                    self.make_room(&fleet.generation).await;
                }
                // What serves goes on until a device is free.
                State::Loading(candidate, fleet)
            }
            // What had stopped doesn't load again either: as with a first one, there is nothing better.
            Progress::Failed(reason) if candidate.cause == Cause::Recovery => {
                self.serving = Serving::Nothing;
                self.trouble = Some(reason);
                State::Loading(candidate, fleet)
            }
            // There is nothing better: the fleet tries again, and its first replica serves.
            Progress::Failed(reason) if matches!(self.serving, Serving::Nothing) => {
                self.trouble = Some(reason.clone());
                if !failed_before {
                    let refused = Outcome::Refused { phase: Phase::Load, reason };
                    let waiting = std::mem::take(&mut candidate.waiting);
                    let record = self.record(&candidate, Some(fleet.generation.number), refused);
                    self.write_down(record, waiting);
                }
                State::Loading(candidate, fleet)
            }
            Progress::Failed(reason) => {
                if candidate.back.is_some() {
                    // It may be gone back to another time.
                    self.previous.push(Arc::clone(&fleet.generation));
                } else {
                    self.remember_refused(&candidate, &reason, true);
                }
                self.drop_fleet(fleet);
                self.refuse(candidate, Phase::Load, reason);
                State::Idle
            }
            Progress::Loaded => self.on_loaded(candidate, fleet).await,
        }
    }

    async fn on_loaded(&mut self, mut candidate: Candidate, fleet: Fleet) -> State {
        candidate.phases.load_ms = Some(milliseconds(candidate.begun));
        candidate.begun = Instant::now();
        let spec = self.model.spec();
        match (spec.golden.clone(), fleet.instance().await) {
            (Some(golden), Some(instance)) if candidate.back.is_none() => {
                let number = candidate.number;
                let ask = Ask { number, limit: spec.replicas.load_timeout, myself: self.myself.clone() };
                tokio::spawn(ask.golden(golden, instance));
                State::Golden(candidate, fleet)
            }
            (Some(_), None) if candidate.back.is_none() => {
                let (number, reason) =
                    (candidate.number, "no replica is left that could be asked".to_owned());
                let gone = GoldenError::Failed { place: 0, reason };
                self.on_asked(State::Golden(candidate, fleet), number, Err(gone)).await
            }
            _ => self.swap(candidate, fleet).await,
        }
    }

    pub(super) async fn on_asked(
        &mut self,
        state: State,
        number: u64,
        asked: Result<(), GoldenError>,
    ) -> State {
        let (mut candidate, fleet) = match state {
            State::Golden(candidate, fleet) if candidate.number == number => (candidate, fleet),
            // Of one that was given up.
            other => return other,
        };
        candidate.phases.golden_ms = Some(milliseconds(candidate.begun));
        match asked {
            Ok(()) => self.swap(candidate, fleet).await,
            Err(error) => {
                let mut reason = error.to_string();
                if let Some(cause) = std::error::Error::source(&error) {
                    reason = format!("{reason}: {cause}");
                }
                self.remember_refused(&candidate, &reason, true);
                // A request that fails on a device may have broken it for what serves there as well.
                fleet.leases().await.iter().for_each(|lease| examine(lease.upgrade()));
                self.drop_fleet(fleet);
                self.refuse(candidate, Phase::Golden, reason);
                State::Idle
            }
        }
    }

    /// Lets a loaded candidate serve. Nothing is on its way afterwards.
    async fn swap(&mut self, mut candidate: Candidate, fleet: Fleet) -> State {
        let begun = Instant::now();
        let probation = self.model.spec().reload.probation;
        let (old, before) = match std::mem::replace(&mut self.serving, Serving::Nothing) {
            Serving::Nothing => (None, None),
            Serving::Stopped(stopped) => (None, Some(stopped.generation)),
            Serving::Alone(old) => (Some(old), None),
            Serving::OnProbation { fleet: old, standby } => {
                self.retire(standby.fleet, standby.record);
                (Some(old), None)
            }
        };
        let before = before.or_else(|| old.as_ref().map(|old| Arc::clone(&old.generation)));
        let on_probation = old.as_ref().filter(|_| candidate.back.is_none() && !probation.time.is_zero());
        if let Some(old) = on_probation {
            // Before its first batch, which counts.
            fleet.generation.batch_stats.begin_probation(old.generation.batch_stats.snapshot(), probation);
        }
        let on_probation = on_probation.is_some();
        // The point of no return: from here on the new generation answers.
        self.status.swap(old.as_ref(), &fleet);
        self.trouble = None;
        self.metrics.generation.set(fleet.generation.number as i64);
        candidate.phases.swap_ms = Some(milliseconds(begun));
        let missed = std::mem::take(&mut candidate.missed);
        let outcome = if let Some(reason) = candidate.back.take() {
            // The content in the volume isn't taken again by itself: whoever asked for this rejected it.
            if let Some(before) = before.filter(|_| candidate.cause != Cause::Recovery) {
                let sha256 = before.plugin.description().sha256().to_owned();
                self.refused = Some(Refused { sha256, reason: reason.clone(), by_data: false });
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
        let record = self.record(&candidate, Some(fleet.generation.number), outcome);
        let record = self.write_down(record, waiting);
        self.serving = match old {
            None => Serving::Alone(fleet),
            Some(old) if on_probation => {
                let until = Instant::now() + probation.time;
                Serving::OnProbation {
                    fleet,
                    standby: Standby { fleet: old, record, until, missed: Changes::default() },
                }
            }
            Some(old) => {
                self.retire(old, record);
                Serving::Alone(fleet)
            }
        };
        if !on_probation {
            self.keep_what_serves();
        }
        for (missed, _) in missed.0 {
            self.call_hook(missed, Vec::new()).await;
        }
        State::Idle
    }

    /// Gives up what is on its way. Nothing is afterwards.
    pub(super) fn give_up(&mut self, state: State, outcome: Outcome) -> State {
        let candidate = match state {
            State::Idle => return State::Idle,
            State::Building(candidate) => candidate,
            State::Loading(candidate, fleet) | State::Golden(candidate, fleet) => {
                if candidate.back.is_some() && candidate.cause != Cause::Recovery {
                    // It may be gone back to another time.
                    self.previous.push(Arc::clone(&fleet.generation));
                } else if let Progress::Failed(reason) = &candidate.seen {
                    // It was tried again and again, and nobody does that any more: a change of its data is a chance.
                    self.remember_refused(&candidate, reason, true);
                }
                self.drop_fleet(fleet);
                candidate
            }
        };
        self.conclude(candidate, outcome);
        State::Idle
    }

    pub(super) fn refuse(&mut self, candidate: Candidate, phase: Phase, reason: String) {
        self.trouble = Some(reason.clone());
        self.conclude(candidate, Outcome::Refused { phase, reason });
    }

    pub(super) fn remember_refused(&mut self, candidate: &Candidate, reason: &str, by_data: bool) {
        if let Some(sha256) = candidate.sha256.clone() {
            self.refused = Some(Refused { sha256, reason: reason.to_owned(), by_data });
        }
    }
}
