//! What is told of the volumes: a plugin's file is there or gone, data changed, the interval of the hook has passed.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use modalkit_engine::{LoadError, Staged};

use super::{HookReply, Machine, State, What, plugin_source::PluginSource};
use crate::{
    pipeline::VolumeChange,
    reload::{
        history::{Cause, Outcome, Phase, Source},
        watch::WatchHandle,
    },
};

impl Machine {
    pub(super) fn on_file(
        &mut self,
        state: State,
        path: PathBuf,
        staged: Result<Staged, Arc<LoadError>>,
    ) -> State {
        if let Some(source) = self.source.as_ref().filter(|source| source.present && source.path != path) {
            tracing::warn!(model = self.model.name, serves = %source.path.display(), passed_over = %path.display(), "two files in the volumes have the name of this model's plugin; remove one");
            self.passed_over = Some((path, staged));
            return state;
        }
        self.source = Some(Source { path: path.clone(), present: true });
        let staged = match staged {
            Ok(staged) => staged,
            Err(error) => {
                let candidate = self.candidate(Cause::File, None);
                self.refuse(candidate, Phase::Build, error.chain());
                return state;
            }
        };
        let sha256 = Some(staged.sha256());
        let is_known = self.environment.as_deref() == staged.environment();
        if !is_known {
            // The same code may do well in another one.
            (self.environment, self.refused) = (staged.environment().map(str::to_owned), None);
        }
        let serves = self.serves(&staged) && self.serves_as_configured();
        let refused = self.refused.as_ref().filter(|refused| Some(refused.sha256.as_str()) == sha256);
        let refused = refused.map(|refused| refused.reason.clone());
        let gives_way = match &state {
            State::Idle => false,
            State::Building(candidate) if candidate.sha256.is_none() => {
                self.later = Some((path, staged));
                return state;
            }
            State::Building(candidate) | State::Loading(candidate, _) | State::Golden(candidate, _) => {
                if candidate.sha256.as_deref() == sha256 && is_known {
                    return state;
                }
                // What came from the volume is no longer in it. What somebody asked for gives way to new content only.
                candidate.cause != Cause::Request || !serves && refused.is_none()
            }
        };
        let state = if gives_way { self.give_up(state, Outcome::Superseded) } else { state };
        if serves {
            tracing::debug!(model = self.model.name, "the file has the content that serves");
            return state;
        }
        if let Some(reason) = refused {
            self.trouble = Some(reason);
            tracing::info!(
                model = self.model.name,
                sha256,
                "the file has content that was refused before; POST /models/NAME/reload tries it again"
            );
            return state;
        }
        let candidate = self.candidate(Cause::File, Some(staged.sha256().to_owned()));
        self.build(candidate, PluginSource::Staged(staged))
    }

    pub(super) fn on_gone(&mut self, state: State, path: &Path) -> State {
        if self.passed_over.as_ref().is_some_and(|(other, _)| other == path) {
            self.passed_over = None;
        }
        let Some(source) = self.source.as_mut().filter(|source| source.path == path) else { return state };
        source.present = false;
        if let Some((path, staged)) = self.passed_over.take() {
            return self.on_file(state, path, staged);
        }
        // What was wrong with the file isn't any more.
        self.trouble = None;
        state
    }

    pub(super) async fn on_data(&mut self, state: &mut State, change: VolumeChange, waiting: Vec<HookReply>) {
        let another_chance = self.refused.as_ref().is_some_and(|refused| refused.by_data);
        match state {
            State::Loading(candidate, fleet) => {
                candidate.missed.add(change.clone(), Vec::new());
                fleet.data_changed().await;
            }
            State::Golden(candidate, _) => candidate.missed.add(change.clone(), Vec::new()),
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

    pub(super) async fn on_interval(&mut self) {
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
}
