//! A model's entry changes: its batches and replicas at once, what its pipeline is loaded with by a new generation, which comes in
//! as any other does. Where that fails, what serves goes on serving as it was loaded.

use std::sync::Arc;

use modalkit_engine::Plugin;

use super::{Candidate, Machine, PluginFile, Source, State, every, plugin_source::PluginSource};
use crate::{
    config::{ModelSpec, Volume},
    pipeline::Generation,
    reload::history::{Cause, Outcome, Phase},
};

/// Whether a pipeline, in a process of its own or not, must be loaded again to be served like this.
pub(in crate::reload) fn needs_a_generation(
    before: &ModelSpec,
    after: &ModelSpec,
    is_isolated: bool,
) -> bool {
    let loaded = |spec: &ModelSpec| {
        let ModelSpec {
            plugin,
            plugin_sha256,
            all_model_data_folder,
            common_settings,
            secrets,
            golden,
            gpu,
            enforce_schema,
            ..
        } = spec.clone();
        let lanes = spec.replicas.batches_in_flight;
        let checks = (golden, enforce_schema);
        (plugin, plugin_sha256, all_model_data_folder, common_settings, secrets, checks, gpu, lanes)
    };
    let runs_alike = before.isolation.is_same_for(is_isolated, &after.isolation);
    !runs_alike || loaded(before) != loaded(after) || before.settings != after.settings
}

impl Machine {
    pub(super) async fn on_configure(
        &mut self,
        state: State,
        before: &ModelSpec,
        volumes: Vec<Volume>,
        file: Option<PluginFile>,
    ) -> State {
        let spec = self.model.spec();
        self.volumes = volumes;
        if *before == *spec {
            return state;
        }
        tracing::info!(model = self.model.name, "the model's configuration has changed");
        if before.reload.hook_interval != spec.reload.hook_interval {
            self.hook_tick = spec.reload.hook_interval.map(every);
        }
        // Where nothing serves, whatever changes may be what was wrong.
        let is_isolated = self.generation().is_none_or(|generation| generation.plugin.is_isolated());
        if !needs_a_generation(before, &spec, is_isolated) {
            return state;
        }
        let state = self.give_up(state, Outcome::Superseded);
        if before.plugin != spec.plugin {
            (self.source, self.passed_over, self.later) = (None, None, None);
        }
        let as_now = |generation: &&Arc<Generation>| {
            let is_isolated = generation.plugin.is_isolated();
            generation.spec.plugin == spec.plugin
                && generation.spec.isolation.is_same_for(is_isolated, &spec.isolation)
        };
        let serving = self.generation().filter(|generation| as_now(generation));
        let serving = serving.map(|generation| generation.plugin.clone());
        // Content that did badly does so with these settings too; what didn't load may load with them.
        let did_badly =
            self.refused.as_ref().filter(|refused| !refused.by_data).map(|refused| refused.sha256.clone());
        let gone_back_from = self.gone_back_from.clone();
        let is_out =
            |sha256: &str| [&did_badly, &gone_back_from].iter().any(|out| out.as_deref() == Some(sha256));
        let candidate = self.candidate(Cause::Configuration, None);
        match (file, serving) {
            (Some((path, Ok(staged))), Some(plugin)) if is_out(staged.sha256()) => {
                self.source = Some(Source { path, present: true });
                self.load_again(candidate, plugin).await
            }
            (Some((path, Ok(staged))), _) => {
                self.refused = None;
                self.source = Some(Source { path, present: true });
                self.build(candidate, PluginSource::Staged(staged))
            }
            (Some((path, Err(error))), _) => {
                self.source = Some(Source { path, present: true });
                self.refuse(candidate, Phase::Build, error.chain());
                state
            }
            // The file has gone since it was opened.
            (None, Some(plugin)) => self.load_again(candidate, plugin).await,
            (None, None) => {
                self.trouble = None;
                if self.generation().is_some() {
                    let plugin = &spec.plugin;
                    let reason = format!(
                        "no volume holds {plugin}.so or lib{plugin}.so; what serves goes on until one does"
                    );
                    self.refuse(candidate, Phase::Build, reason);
                }
                state
            }
        }
    }

    /// The library that serves, with what the model's entry says now.
    async fn load_again(&mut self, candidate: Candidate, plugin: Arc<dyn Plugin>) -> State {
        self.generations += 1;
        let spec = ModelSpec::clone(&self.model.spec());
        let generation = Generation::new(self.generations, plugin, spec, Arc::clone(&self.builder.fence));
        self.load(candidate, generation).await
    }
}
