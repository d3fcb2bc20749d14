//! What serves again where something fails: what has stopped to make room for a candidate, and what served in an earlier run.

use std::sync::Arc;

use super::{Machine, Serving, State, Stopped, plugin_source::PluginSource};
use crate::{pipeline::Generation, reload::history::Cause};

impl Machine {
    /// Stops what serves, where that gives the candidate the devices that it waits for; callers wait meanwhile.
    pub(super) async fn make_room(&mut self, candidate: &Generation) {
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
        self.model.queue.update_lane_states(|| generation.set_serves(false));
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
    pub(super) async fn bring_back(&mut self, state: State) -> State {
        let (State::Idle, Serving::Stopped(stopped)) = (&state, &self.serving) else { return state };
        let before = Arc::clone(&stopped.generation);
        let mut candidate =
            self.candidate(Cause::Recovery, Some(before.plugin.description().sha256().to_owned()));
        candidate.back = Some("what was to take its place failed".to_owned());
        let generation = self.again(&before);
        self.load(candidate, generation).await
    }

    /// A generation of the same content and settings, with nothing else in common.
    pub(super) fn again(&self, before: &Generation) -> Arc<Generation> {
        let fence = Arc::clone(&self.builder.fence);
        let again = Generation::new(before.number, Arc::clone(&before.plugin), before.spec.clone(), fence);
        if before.has_loaded() {
            again.note_loaded();
        }
        again
    }

    /// Takes the content that served in an earlier run, where the file's may not be loaded and nothing serves.
    pub(super) fn serve_what_served(&mut self) -> State {
        let kept = self.builder.fence.kept(&self.model.name);
        let (Serving::Nothing, Some(kept)) = (&self.serving, kept) else { return State::Idle };
        tracing::warn!(model = self.model.name, "what served before is taken from the host's own copy");
        let candidate = self.candidate(Cause::Fence, None);
        self.build(candidate, PluginSource::File(kept))
    }

    /// Keeps a copy of what serves, should a later start need it.
    pub(super) fn keep_what_serves(&self) {
        let Some(generation) = self.generation() else { return };
        let (fence, plugin) = (Arc::clone(&self.builder.fence), Arc::clone(&generation.plugin));
        let (name, order) = (self.model.name.clone(), self.builder.fence.order());
        tokio::task::spawn_blocking(move || fence.keep(&name, &*plugin, order));
    }
}
