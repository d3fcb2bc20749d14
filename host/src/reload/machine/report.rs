//! How things stand with a model's reloads, for people.

use std::sync::Arc;

use super::{Candidate, Machine, Serving, State};
use crate::{
    pipeline::Progress,
    reload::report::{Report, Retired},
};

impl Machine {
    pub(super) fn report(&self, state: &State) -> Report {
        let reload = match (state, &self.serving) {
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
            as_configured: matches!(state, State::Idle)
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
