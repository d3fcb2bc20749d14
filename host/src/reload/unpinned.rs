//! Which plugins are taken only where an entry names their content: those of buckets, but for mounts that say otherwise. It reads nothing.

use std::path::Path;

use modalkit_engine::LoadError;

use crate::config::Volume;

/// Buckets whose plugins are taken only where somebody names their content.
pub(super) struct Unpinned(Vec<Volume>);

impl Unpinned {
    pub(super) fn of(volumes: &[Volume]) -> Self {
        let strict = volumes.iter().filter(|volume| !volume.takes_any_plugin());
        Self(strict.cloned().collect())
    }

    /// # Errors
    /// The plugin lies in such a bucket, and nobody names its content.
    pub(super) fn check(&self, plugin: &Path, sha256: &str, is_pinned: bool) -> Result<(), LoadError> {
        match self.0.iter().find(|volume| volume.holds(plugin)) {
            Some(volume) if !is_pinned => {
                Err(LoadError::Unpinned { volume: volume.name.clone(), found: sha256.to_owned() })
            }
            _ => Ok(()),
        }
    }
}
