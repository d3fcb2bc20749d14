//! How changes end: their record in the history, their line in the log, their counter, and the answer to who waits for them.

use modalkit_journal::unix_ms;

use super::{Machine, OutcomeReply, candidate::Candidate};
use crate::reload::history::{Outcome, Phase, Phases, ReloadRecord};

impl Machine {
    pub(super) fn entry(
        &self,
        candidate: &Candidate,
        generation: Option<u64>,
        outcome: Outcome,
    ) -> ReloadRecord {
        ReloadRecord {
            at_unix_ms: unix_ms(),
            cause: candidate.cause,
            generation,
            plugin_sha256: candidate.sha256.clone(),
            outcome,
            phases: candidate.phases,
        }
    }

    pub(super) fn write_down(&mut self, entry: ReloadRecord, waiting: Vec<OutcomeReply>) -> u64 {
        let model = &self.model.name;
        let (generation, outcome) = (entry.generation, entry.outcome.word());
        match &entry.outcome {
            Outcome::Swapped => {
                let Phases { stage_ms, preflight_ms, open_ms, load_ms, golden_ms, swap_ms, drain_ms: _ } =
                    entry.phases;
                tracing::info!(
                    model,
                    generation,
                    stage_ms,
                    preflight_ms,
                    open_ms,
                    load_ms,
                    golden_ms,
                    swap_ms,
                    "a new generation serves"
                );
            }
            Outcome::RolledBack { reason } => {
                tracing::warn!(model, generation, reason, "the generation before serves again");
            }
            Outcome::Refused { phase: Phase::RollBack, reason } => {
                tracing::warn!(model, reason, serving = self.generation_number(), "not rolled back");
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
        self.history.add(entry)
    }

    pub(super) fn conclude(&mut self, mut candidate: Candidate, outcome: Outcome) {
        let waiting = std::mem::take(&mut candidate.waiting);
        let entry = self.entry(&candidate, None, outcome);
        self.write_down(entry, waiting);
    }
}
