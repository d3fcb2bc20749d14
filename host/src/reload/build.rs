//! Turns a file into an opened plugin: private copy, preflight, open. Blocking; it never touches what is served.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use modalkit_loader::{
    LoadError, Plugin, Store,
    preflight::{self, Preflight},
};

use crate::telemetry;

/// Makes plugins of files.
pub(super) struct Builder {
    store: Store,
    program: PathBuf,
    limit: Duration,
}

/// What a file turned out to be.
pub(super) enum Built {
    Plugin(Plugin),
    Same,
    Other { found: String },
}

/// The argument that makes this program the preflight's child.
pub const PREFLIGHT_COMMAND: &str = "preflight";

impl Builder {
    pub(super) fn new(store: Store, limit: Duration) -> Self {
        // This very program, even where its file has been replaced since it started.
        Self { store, program: PathBuf::from("/proc/self/exe"), limit }
    }

    /// Opens the file, unless this content (`served`, a SHA-256) or another one is served already.
    pub(super) fn build(&self, file: &Path, served: Option<&str>) -> Result<Built, LoadError> {
        let staged = self.store.stage(file)?;
        match served {
            Some(served) if served == staged.sha256() => return Ok(Built::Same),
            Some(_) => return Ok(Built::Other { found: staged.sha256().to_owned() }),
            None => {}
        }
        let how = Preflight { program: &self.program, args: &[PREFLIGHT_COMMAND], limit: self.limit };
        preflight::run(&staged, &how)?;
        let plugin = Plugin::open(&staged)?;
        plugin.attach(telemetry::plugin_level(), telemetry::plugin_line);
        Ok(Built::Plugin(plugin))
    }
}
