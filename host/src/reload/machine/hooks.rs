//! Changed data: `on_volume_reload` on what serves, one call at a time, and what has to be told later to whom it missed.

use std::collections::{BTreeSet, VecDeque};

use modalkit_engine::Failure;
use modalkit_journal::unix_ms;

use super::{Event, HookReply, Machine, Serving};
use crate::{pipeline::VolumeChange, reload::history::HookReport};

/// A call of `on_volume_reload` under way, and what came meanwhile.
#[derive(Default)]
pub(super) struct Hook {
    pub(super) running: Option<(VolumeChange, Vec<HookReply>)>,
    pub(super) next: Changes,
}

/// What changed, one entry a volume, and who waits for its hook.
#[derive(Default)]
pub(super) struct Changes(pub(super) VecDeque<(VolumeChange, Vec<HookReply>)>);

impl Machine {
    pub(super) async fn call_hook(&mut self, change: VolumeChange, waiting: Vec<HookReply>) {
        if let Serving::OnProbation { standby, .. } = &mut self.serving {
            standby.missed.add(change.clone(), Vec::new());
        }
        if self.hook.running.is_some() {
            self.hook.next.add(change, waiting);
            return;
        }
        let fleet = match &self.serving {
            // What is loaded next reads the data as they are then.
            Serving::Nothing | Serving::Stopped(..) => {
                let report = self.hook_report(change, Vec::new());
                waiting.into_iter().for_each(|reply| drop(reply.send(report.clone())));
                return;
            }
            Serving::Alone(fleet) | Serving::OnProbation { fleet, .. } => fleet,
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

    pub(super) async fn on_hooked(&mut self, results: Vec<Result<(), Failure>>) {
        let Some((change, waiting)) = self.hook.running.take() else { return };
        let report = self.hook_report(change, results);
        self.history.hooks += 1;
        let model = &self.model.name;
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
            self.history.hooks_failed += 1;
            self.metrics.hooks_failed.inc();
        } else {
            tracing::info!(model, volume = report.volume, changed = ?report.changed, "model data reloaded");
            self.metrics.hooks_ok.inc();
        }
        waiting.into_iter().for_each(|reply| drop(reply.send(report.clone())));
        self.history.add_hook(report);
        if let Some((change, waiting)) = self.hook.next.0.pop_front() {
            self.call_hook(change, waiting).await;
        }
    }

    pub(super) fn hook_report(&self, change: VolumeChange, results: Vec<Result<(), Failure>>) -> HookReport {
        HookReport {
            at_unix_ms: unix_ms(),
            volume: change.volume,
            changed: change.changed,
            errors: results.into_iter().map(|result| result.err().map(|failure| failure.message)).collect(),
        }
    }
}

impl Changes {
    pub(super) fn add(&mut self, change: VolumeChange, waiting: Vec<HookReply>) {
        let Some((known, others)) = self.0.iter_mut().find(|(known, _)| known.volume == change.volume) else {
            self.0.push_back((change, waiting));
            return;
        };
        others.extend(waiting);
        if known.changed.is_empty() || change.changed.is_empty() {
            // Nobody knows which files changed.
            known.changed.clear();
            return;
        }
        let files: BTreeSet<String> = known.changed.drain(..).chain(change.changed).collect();
        known.changed = files.into_iter().collect();
    }
}
