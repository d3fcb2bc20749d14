//! What serves on probation: the generation before is kept on standby until the new one has passed its probation, and serves again where it
//! has not.

use std::{sync::Arc, time::Instant};

use modalkit_engine::Engine;
use modalkit_journal::unix_ms;

use super::{Event, Machine, OutcomeReply, Serving, candidate::Refused};
use crate::{
    pipeline::Fleet,
    reload::{
        build::milliseconds,
        history::{Cause, Outcome},
    },
};

impl Machine {
    pub(super) async fn on_probation_tick(&mut self) {
        let Serving::OnProbation { fleet, standby } = &self.serving else { return };
        if Instant::now() >= standby.until {
            self.end_probation().await;
            return;
        }
        let generation = &fleet.generation;
        generation.batch_stats.judge(|| generation.set_serves(false));
    }

    /// The verdict: passed, so that the old one goes; failed, so that it serves again. A newer candidate that needs the room
    /// brings it about early.
    pub(super) async fn end_probation(&mut self) {
        let Serving::OnProbation { fleet, .. } = &self.serving else { return };
        match fleet.generation.batch_stats.end_probation() {
            Some(reason) => self.back_to_standby(reason, Cause::Probation, Vec::new()).await,
            None => {
                self.retire_standby();
                self.keep_what_serves();
            }
        }
    }

    fn retire_standby(&mut self) {
        self.serving = match std::mem::replace(&mut self.serving, Serving::Nothing) {
            Serving::OnProbation { fleet, standby } => {
                self.retire(standby.fleet, standby.record);
                Serving::Alone(fleet)
            }
            other => other,
        };
    }

    pub(super) async fn back_to_standby(&mut self, reason: String, cause: Cause, waiting: Vec<OutcomeReply>) {
        let (fleet, standby) = match std::mem::replace(&mut self.serving, Serving::Nothing) {
            Serving::OnProbation { fleet, standby } => (fleet, standby),
            other => {
                self.serving = other;
                return;
            }
        };
        let begun = Instant::now();
        // So that nothing of it can stop lanes any more.
        let _ = fleet.generation.batch_stats.end_probation();
        let generation = Arc::clone(&standby.fleet.generation);
        self.status.swap(Some(&fleet), &standby.fleet);
        self.metrics.generation.set(generation.number as i64);
        self.previous.pop();
        self.refused = Some(Refused {
            sha256: fleet.generation.plugin.description().sha256().to_owned(),
            reason: reason.clone(),
            by_data: false,
        });
        let mut candidate = self.candidate(cause, Some(generation.plugin.description().sha256().to_owned()));
        candidate.phases.swap_ms = Some(milliseconds(begun));
        let record = self.record(&candidate, Some(generation.number), Outcome::RolledBack { reason });
        let record = self.write_down(record, waiting);
        self.serving = Serving::Alone(standby.fleet);
        self.retire(fleet, record);
        for (missed, _) in standby.missed.0 {
            self.call_hook(missed, Vec::new()).await;
        }
    }

    pub(super) fn retire(&self, fleet: Fleet, record: u64) {
        let myself = self.myself.clone();
        let engine = Arc::clone(&self.builder.engine);
        tokio::spawn(async move {
            end(fleet, engine).await;
            if let Some(myself) = myself.upgrade() {
                // A machine that has ended keeps no history.
                let _ = myself.send(Event::Left(record)).await;
            }
        });
    }

    pub(super) fn drop_fleet(&self, fleet: Fleet) {
        tokio::spawn(end(fleet, Arc::clone(&self.builder.engine)));
    }

    pub(super) fn on_left(&mut self, record: u64) {
        let since = self.history.ended_at(record).map(|at| unix_ms().saturating_sub(at));
        if let Some(took) = since {
            self.history.drained(record, took as f64);
        }
    }
}

/// Lets a fleet leave, and then its memory.
async fn end(fleet: Fleet, engine: Arc<dyn Engine>) {
    fleet.stop().await;
    // The host may be ending.
    let _ = tokio::task::spawn_blocking(move || engine.return_freed_memory()).await;
}
