//! A model's entry changes: its batches and replicas at once, what its pipeline is loaded with by a new generation, which comes in
//! as any other does. Where that fails, what serves goes on serving as it was loaded.

use super::{From, Machine, PluginFile, Source, every};
use crate::{
    config::{ModelSpec, Volume},
    pipeline::{Generation, Status},
    reload::journal::{Cause, Outcome, Phase},
};

/// Whether a pipeline must be loaded again to be served like this.
pub(in crate::reload) fn needs_a_generation(before: &ModelSpec, after: &ModelSpec) -> bool {
    let loaded = |spec: &ModelSpec| {
        let ModelSpec {
            plugin, plugin_sha256, all_model_data_folder, common_settings, secrets, golden, ..
        } = spec.clone();
        let lanes = spec.replicas.batches_in_flight;
        (plugin, plugin_sha256, all_model_data_folder, common_settings, secrets, golden, lanes)
    };
    loaded(before) != loaded(after) || before.settings != after.settings
}

impl Machine {
    pub(super) async fn on_configure(
        &mut self,
        spec: ModelSpec,
        volumes: Vec<Volume>,
        file: Option<PluginFile>,
    ) {
        let before = self.model.spec();
        self.volumes = volumes;
        if *before == spec {
            return;
        }
        tracing::info!(model = self.model.name, "the model's configuration has changed");
        if before.reload.hook_interval != spec.reload.hook_interval {
            self.hook_tick = spec.reload.hook_interval.map(every);
        }
        let another_plugin = before.plugin != spec.plugin;
        let reload = needs_a_generation(&before, &spec);
        let expected = format!("{}.so", spec.plugin);
        self.model.respec(spec);
        if !reload {
            return;
        }
        // What was refused may be taken with these settings.
        self.refused = None;
        self.give_up_candidate(Outcome::Superseded);
        if another_plugin {
            (self.source, self.passed_over, self.later) = (None, None, None);
        }
        let candidate = self.candidate(Cause::Configuration, None);
        match (file, self.generation().map(|generation| generation.plugin.clone())) {
            (Some((path, Ok(staged))), _) => {
                self.source = Some(Source { path, present: true });
                self.build(candidate, From::Staged(staged));
            }
            (Some((path, Err(error))), _) => {
                self.source = Some(Source { path, present: true });
                self.refuse(candidate, Phase::Build, error.chain());
            }
            // The file has gone since it was opened.
            (None, Some(plugin)) if !another_plugin => {
                self.generations += 1;
                let generation =
                    Generation::new(self.generations, plugin, ModelSpec::clone(&self.model.spec()));
                self.load(candidate, generation).await;
            }
            (None, Some(_)) => {
                let reason = format!(
                    "no volume holds {expected} or lib{expected}; what serves goes on until one does"
                );
                self.refuse(candidate, Phase::Build, reason);
            }
            (None, None) => self.model.set_status(Status::Waiting { expected }, None),
        }
    }
}
