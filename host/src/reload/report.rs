//! How one model's reloads stand, for `GET /models/{name}`. It holds what was seen, and asks nobody.

use modalkit_loader::Plugin;
use serde::{Serialize, Serializer, ser::SerializeStruct};

use super::journal::{Entry, HookReport, Source};
use crate::pipeline::Tally;

/// How one model's reloads stand.
#[derive(Serialize)]
pub struct Report {
    /// `idle`, `building`, `loading`, `golden` or `probation`.
    pub reload: &'static str,
    /// The generation that stands by while the one that serves is on trial.
    pub standby: Option<u64>,
    /// The generation that a rollback goes to.
    pub previous: Option<u64>,
    /// The plugin's file; `None` where none was seen.
    pub source: Option<Source>,
    /// Whether the model's entry pins its content.
    pub plugin_pinned: bool,
    /// Generations there ever were.
    pub generations: u64,
    /// Libraries that no generation serves with, and that stay mapped.
    #[serde(serialize_with = "retired")]
    pub retired: Vec<Plugin>,
    /// How the generation that serves does; `None` where none does.
    #[serde(serialize_with = "tally")]
    pub vitals: Option<Tally>,
    /// The last call of `on_volume_reload`.
    pub hook: Option<HookReport>,
    /// Calls of it there ever were.
    pub hooks: u64,
    /// Of those, the ones that failed on some replica.
    pub hooks_failed: u64,
    /// The last change: how it ended, and why.
    pub last: Option<Entry>,
    /// The last changes, the newest first.
    pub history: Vec<Entry>,
}

fn retired<S: Serializer>(libraries: &[Plugin], serializer: S) -> Result<S::Ok, S::Error> {
    let mut object = serializer.serialize_struct("Retired", 2)?;
    object.serialize_field("libraries", &libraries.len())?;
    object.serialize_field("bytes", &modalkit_loader::mapped_bytes(libraries))?;
    object.end()
}

fn tally<S: Serializer>(tally: &Option<Tally>, serializer: S) -> Result<S::Ok, S::Error> {
    let Some(tally) = tally else { return serializer.serialize_none() };
    let mut object = serializer.serialize_struct("Vitals", 3)?;
    object.serialize_field("batches", &tally.batches)?;
    object.serialize_field("batches_failed", &tally.failed)?;
    object.serialize_field("batch_p99_ms", &(tally.p99.as_secs_f64() * 1e3))?;
    object.end()
}
