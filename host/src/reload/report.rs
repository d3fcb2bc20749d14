//! How one model's reloads stand, for `GET /models/{name}`. It holds what was seen, and never changes anything.

use std::sync::Arc;

use modalkit_engine::{Engine, Staged};
use serde::{Serialize, Serializer, ser::SerializeStruct};

use super::history::{HookReport, ReloadRecord, Source};
use crate::pipeline::StatsSnapshot;

/// How one model's reloads stand.
#[derive(Serialize)]
pub struct Report {
    /// `idle`, `building`, `loading`, `waits_for_device`, `golden` or `probation`.
    pub reload: &'static str,
    /// The generation on standby while the one that serves is on probation.
    pub standby: Option<u64>,
    /// The generation that a rollback goes to.
    pub previous: Option<u64>,
    /// The plugin's file; `None` where none was seen.
    pub source: Option<Source>,
    /// Whether the model's entry pins its content.
    pub plugin_pinned: bool,
    /// Whether what serves was loaded as the configuration has it now; `None` where nothing serves, or something is on its way.
    pub as_configured: Option<bool>,
    /// Generations there ever were.
    pub generations: u64,
    /// What no generation serves with, and stays open.
    pub retired: Retired,
    /// How the generation that serves does; `None` where none does.
    #[serde(serialize_with = "snapshot")]
    #[serde(rename = "vitals")]
    pub batch_stats: Option<StatsSnapshot>,
    /// The last call of `on_volume_reload`.
    pub hook: Option<HookReport>,
    /// Calls of it there ever were.
    pub hooks: u64,
    /// Of those, the ones that failed on some replica.
    pub hooks_failed: u64,
    /// The last change: how it ended, and why.
    pub last: Option<ReloadRecord>,
    /// The last changes, the newest first.
    pub history: Vec<ReloadRecord>,
    /// The last changes of data, the newest first.
    pub data_history: Vec<HookReport>,
}

/// Opened files that no generation serves with. What they cost is looked at when it is written, which takes some milliseconds.
pub struct Retired {
    /// The files.
    pub files: Vec<Staged>,
    /// What has opened them.
    pub engine: Arc<dyn Engine>,
}

impl Serialize for Retired {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut object = serializer.serialize_struct("Retired", 2)?;
        object.serialize_field("libraries", &self.files.len())?;
        object.serialize_field("bytes", &self.engine.resident_bytes(&self.files))?;
        object.end()
    }
}

fn snapshot<S: Serializer>(snapshot: &Option<StatsSnapshot>, serializer: S) -> Result<S::Ok, S::Error> {
    let Some(snapshot) = snapshot else { return serializer.serialize_none() };
    let mut object = serializer.serialize_struct("BatchStats", 3)?;
    object.serialize_field("batches", &snapshot.batches)?;
    object.serialize_field("batches_failed", &snapshot.failed)?;
    object.serialize_field("batch_p99_ms", &(snapshot.p99.as_secs_f64() * 1e3))?;
    object.end()
}
