//! `run --watch`: looks at the plugins' sources and says which plugin to build again. It compares what it sees, so that it needs
//! nothing of the system's.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    time::SystemTime,
};

use crate::build;

/// The sources of each plugin, as they were seen last.
pub(crate) struct Sources(BTreeMap<String, BTreeMap<PathBuf, SystemTime>>);

impl Sources {
    /// As they are now.
    pub(crate) fn look() -> anyhow::Result<Self> {
        let mut sources = BTreeMap::new();
        for plugin in build::plugins()? {
            let mut files = BTreeMap::new();
            collect(&Path::new("plugins").join(&plugin), &mut files);
            sources.insert(plugin, files);
        }
        Ok(Self(sources))
    }

    /// The plugins whose sources have changed since, new ones included; from now on these count.
    pub(crate) fn changed(&mut self) -> anyhow::Result<Vec<String>> {
        let now = Self::look()?;
        let changed = now.0.iter().filter(|(plugin, files)| self.0.get(*plugin) != Some(files));
        let changed = changed.map(|(plugin, _)| plugin.clone()).collect();
        *self = now;
        Ok(changed)
    }
}

/// A folder or file that vanished in between is none any more.
fn collect(folder: &Path, files: &mut BTreeMap<PathBuf, SystemTime>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        let Ok(metadata) = entry.metadata() else { continue };
        if metadata.is_dir() {
            collect(&path, files);
        } else if let Ok(modified) = metadata.modified() {
            files.insert(path, modified);
        }
    }
}
