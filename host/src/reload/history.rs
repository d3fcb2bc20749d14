//! What became of each change, for people: the outcomes and their times, the last ones remembered. It decides nothing.

use std::{collections::VecDeque, path::PathBuf};

use serde::Serialize;

/// Reloads that are remembered of each model.
const REMEMBERED: usize = 32;

/// How a change ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum Outcome {
    /// The new generation serves.
    Swapped,
    /// The generation before serves again.
    RolledBack {
        /// Why.
        reason: String,
    },
    /// What serves stayed.
    Refused {
        /// Where it failed.
        phase: Phase,
        /// Why, and what to do.
        reason: String,
    },
    /// A newer change came first.
    Superseded,
    /// The model or the host went away meanwhile.
    Stopped,
}

/// The steps of a reload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Copying, checking and opening the file.
    Build,
    /// `load` and `warmup`.
    Load,
    /// Golden requests.
    Golden,
    /// Finding the generation to go back to.
    RollBack,
}

/// What a change came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// A file with new content.
    File,
    /// Somebody asked for it.
    Request,
    /// The model's entry says something else now.
    Configuration,
    /// A generation did worse than the one before.
    Probation,
    /// It had stopped for a generation that then failed.
    Recovery,
    /// The file's content took the host down once: what served in an earlier run is taken instead.
    Fence,
}

/// How long each step took, in milliseconds; those that weren't reached are missing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Phases {
    /// Copying and hashing, where the watch hasn't done it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stage_ms: Option<f64>,
    /// Opening it in a process of its own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub preflight_ms: Option<f64>,
    /// Opening it here.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub open_ms: Option<f64>,
    /// `load` and `warmup`, until the last of the first replicas had them behind it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub load_ms: Option<f64>,
    /// Golden requests.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub golden_ms: Option<f64>,
    /// The swap.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub swap_ms: Option<f64>,
    /// From the swap until the old generation's replicas had left, any time on standby included.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub drain_ms: Option<f64>,
}

/// One change.
#[derive(Clone, Debug, Serialize)]
pub struct ReloadRecord {
    /// When it ended, in milliseconds since 1970.
    pub at_unix_ms: u64,
    /// What it came from.
    pub cause: Cause,
    /// The generation it was about; missing where it didn't become one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub generation: Option<u64>,
    /// The content it was about, where that was read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub plugin_sha256: Option<String>,
    /// How it ended.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// How long it took.
    pub phases: Phases,
}

/// What became of the last call of `on_volume_reload`.
#[derive(Clone, Debug, Serialize)]
pub struct HookReport {
    /// When it ended, in milliseconds since 1970.
    pub at_unix_ms: u64,
    /// The volume's name.
    pub volume: String,
    /// The files that had changed, relative to the mount point; none where nobody knew which.
    pub changed: Vec<String>,
    /// One entry for each replica: what its hook said, where it failed.
    pub errors: Vec<Option<String>>,
}

/// What is remembered of one model.
#[derive(Debug, Default)]
pub(super) struct History {
    entries: VecDeque<(u64, ReloadRecord)>,
    count: u64,
    pub(super) hook: Option<HookReport>,
    /// Calls of the hook for data that had changed, and those that failed.
    data: VecDeque<HookReport>,
    pub(super) hooks: u64,
    pub(super) hooks_failed: u64,
}

/// Where a model's plugin comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Source {
    /// The file.
    pub path: PathBuf,
    /// Whether it is there. What is loaded serves on where it isn't.
    pub present: bool,
}

impl History {
    /// Writes an entry down; the number is for [`History::drained`].
    pub(super) fn add(&mut self, entry: ReloadRecord) -> u64 {
        self.count += 1;
        self.entries.push_back((self.count, entry));
        if self.entries.len() > REMEMBERED {
            self.entries.pop_front();
        }
        self.count
    }

    /// Writes down what became of a call of `on_volume_reload`. Those of an interval that went well are counted and not remembered: they
    /// would drive out all others.
    pub(super) fn add_hook(&mut self, report: HookReport) {
        if !report.changed.is_empty() || report.errors.iter().any(Option::is_some) {
            self.data.push_back(report.clone());
            if self.data.len() > REMEMBERED {
                self.data.pop_front();
            }
        }
        self.hook = Some(report);
    }

    /// Changes of data, the newest first.
    pub(super) fn data_history(&self) -> Vec<HookReport> {
        self.data.iter().rev().cloned().collect()
    }

    /// Says how long the generation that was replaced took to leave.
    pub(super) fn drained(&mut self, entry: u64, took_ms: f64) {
        if let Some((_, entry)) = self.entries.iter_mut().find(|(number, _)| *number == entry) {
            entry.phases.drain_ms = Some(took_ms);
        }
    }

    /// When an entry was written, in milliseconds since 1970.
    pub(super) fn ended_at(&self, entry: u64) -> Option<u64> {
        self.entries.iter().find(|(number, _)| *number == entry).map(|(_, entry)| entry.at_unix_ms)
    }

    /// The newest first.
    pub(super) fn history(&self) -> Vec<ReloadRecord> {
        self.entries.iter().rev().map(|(_, entry)| entry.clone()).collect()
    }

    pub(super) fn last(&self) -> Option<&ReloadRecord> {
        self.entries.back().map(|(_, entry)| entry)
    }
}

impl Outcome {
    /// A word for metrics.
    pub(super) fn word(&self) -> &'static str {
        match self {
            Self::Swapped => "swapped",
            Self::RolledBack { .. } => "rolled_back",
            Self::Refused { .. } => "refused",
            Self::Superseded => "superseded",
            Self::Stopped => "stopped",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::insight::metrics::RELOAD_OUTCOMES;

    #[test]
    fn every_outcome_has_a_counter() {
        let (reason, phase) = (String::new(), Phase::Build);
        let outcomes = [
            Outcome::Swapped,
            Outcome::RolledBack { reason: reason.clone() },
            Outcome::Refused { phase, reason },
            Outcome::Superseded,
            Outcome::Stopped,
        ];
        assert_eq!(outcomes.map(|outcome| outcome.word()), RELOAD_OUTCOMES);
    }

    #[test]
    fn the_last_32_are_remembered_and_a_drain_finds_its_entry() {
        let mut journal = History::default();
        let entry = |generation| ReloadRecord {
            at_unix_ms: 0,
            cause: Cause::File,
            generation: Some(generation),
            plugin_sha256: None,
            outcome: Outcome::Swapped,
            phases: Phases::default(),
        };
        let numbers: Vec<u64> = (1..=40).map(|generation| journal.add(entry(generation))).collect();
        journal.drained(numbers[39], 7.0);
        journal.drained(numbers[0], 9.0);
        let history = journal.history();
        assert_eq!((history.len(), history[0].generation, history[31].generation), (32, Some(40), Some(9)));
        assert_eq!((history[0].phases.drain_ms, history[1].phases.drain_ms), (Some(7.0), None));
    }
}
