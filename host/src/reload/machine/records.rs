//! How changes end: their record in the history, their line in the log, their counter, and the answer to who waits for them.

use modalkit_journal::unix_ms;

use super::{Machine, OutcomeReply, candidate::Candidate};
use crate::reload::history::{Outcome, Phase, Phases, ReloadRecord};

impl Machine {
    pub(super) fn record(
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

    /// Adds a change that has ended to the history; who waits for it is told after the model's status was published. Gives the record's
    /// number.
    pub(super) fn write_down(&mut self, record: ReloadRecord, waiting: Vec<OutcomeReply>) -> u64 {
        let model = &self.model.name;
        let (generation, outcome) = (record.generation, record.outcome.word());
        match &record.outcome {
            Outcome::Swapped => {
                let Phases { stage_ms, preflight_ms, open_ms, load_ms, golden_ms, swap_ms, drain_ms: _ } =
                    record.phases;
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
        self.ended.push((record.clone(), waiting));
        self.history.add(record)
    }

    /// Tells those who wait what became of the changes that have ended.
    pub(super) fn answer_ended(&mut self) {
        for (record, waiting) in self.ended.drain(..) {
            // Whoever asked may have left.
            waiting.into_iter().for_each(|reply| drop(reply.send(record.clone())));
        }
    }

    pub(super) fn conclude(&mut self, mut candidate: Candidate, outcome: Outcome) {
        let waiting = std::mem::take(&mut candidate.waiting);
        let record = self.record(&candidate, None, outcome);
        self.write_down(record, waiting);
    }
}
