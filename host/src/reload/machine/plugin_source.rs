//! Where a candidate's library comes from.

use std::{path::PathBuf, time::Instant};

use modalkit_engine::{LoadError, Staged};

use crate::reload::{
    build::{Builder, milliseconds},
    history::Phases,
};

/// Where a candidate's library comes from.
pub(super) enum PluginSource {
    /// The watch's copy.
    Staged(Staged),
    /// The file, to be copied now.
    File(PathBuf),
}

impl PluginSource {
    /// The copy; made now where there is none yet.
    ///
    /// # Errors
    /// Why it can't be made.
    pub(super) fn staged(self, builder: &Builder, phases: &mut Phases) -> Result<Staged, LoadError> {
        match self {
            Self::Staged(staged) => Ok(staged),
            Self::File(file) => {
                let begun = Instant::now();
                let staged = builder.engine.stage(&file)?;
                phases.stage_ms = Some(milliseconds(begun));
                Ok(staged)
            }
        }
    }
}
