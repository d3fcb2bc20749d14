//! Which plugins are taken only where an entry names their content: those of buckets, but for mounts that say otherwise. It reads nothing.

use std::path::{Path, PathBuf};

use modalkit_engine::LoadError;

use crate::config::Volume;

/// Buckets whose plugins are taken only where somebody names their content.
pub(super) struct Unpinned(Vec<(String, PathBuf)>);

impl Unpinned {
    pub(super) fn of(volumes: &[Volume]) -> Self {
        let strict = volumes.iter().filter(|volume| !volume.takes_any_plugin());
        Self(strict.map(|volume| (volume.name.clone(), volume.mount_point.clone())).collect())
    }

    /// # Errors
    /// The plugin lies in such a bucket, and nobody names its content.
    pub(super) fn check(&self, plugin: &Path, sha256: &str, is_pinned: bool) -> Result<(), LoadError> {
        match self.0.iter().find(|(_, mount_point)| plugin.starts_with(mount_point)) {
            Some((volume, _)) if !is_pinned => {
                Err(LoadError::Unpinned { volume: volume.clone(), found: sha256.to_owned() })
            }
            _ => Ok(()),
        }
    }
}
