//! What a volume's files become: the engine that opens them, and what is remembered of earlier loads. Blocking; it never touches what is
//! served.

use std::{
    collections::BTreeSet,
    fs,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use modalkit_engine::{Engine, Isolation, LoadError, OpenTimings, Plugin, Staged, tree};
use prometheus::IntGauge;

use super::{history::Phases, unpinned::Unpinned};
use crate::{config::Volume, fence::Fence};

/// Makes plugins of files.
pub(super) struct Builder {
    pub(super) engine: Arc<dyn Engine>,
    pub(super) fence: Arc<Fence>,
    /// Where plugins are taken from only if their content is named.
    pub(super) unpinned: Unpinned,
    gauge: IntGauge,
}

impl Builder {
    pub(super) fn new(
        engine: Arc<dyn Engine>,
        fence: Arc<Fence>,
        volumes: &[Volume],
        gauge: IntGauge,
    ) -> Self {
        Self { engine, fence, unpinned: Unpinned::of(volumes), gauge }
    }

    /// Removes the private copies.
    pub(super) fn close(&self) {
        self.fence.close();
        self.engine.close();
    }

    /// Opens a copy, or finds it opened.
    pub(super) fn build(
        &self,
        staged: &Staged,
        isolation: &Isolation,
        phases: &mut Phases,
    ) -> Result<Arc<dyn Plugin>, LoadError> {
        let mut timings = OpenTimings::default();
        let opened = self.engine.open(staged, isolation, &mut timings);
        phases.preflight_ms = timings.preflight.map(in_milliseconds);
        phases.open_ms = timings.open.map(in_milliseconds);
        self.gauge.set(self.engine.resident() as i64);
        opened
    }
}

/// The file of a plugin of this name in the volumes, or the folder of a pipeline in Python.
#[must_use]
pub fn find(plugin: &str, volumes: &[Volume]) -> Option<PathBuf> {
    if let Some(volume) = volumes.iter().find(|volume| volume.pipeline.as_deref() == Some(plugin)) {
        return Some(volume.mount_point.clone());
    }
    let files = volumes.iter().filter(|volume| volume.pipeline.is_none()).flat_map(|volume| {
        [format!("{plugin}.so"), format!("lib{plugin}.so"), plugin.to_owned()]
            .map(|name| volume.mount_point.join(name))
    });
    files.into_iter().find(|file| file.is_file() || tree::is_pipeline(file))
}

/// The names of the folders in the volumes that are pipelines in Python.
#[must_use]
pub fn folders(volumes: &[Volume]) -> BTreeSet<String> {
    let watched = volumes.iter().filter(|volume| volume.pipeline.is_none());
    let entries =
        watched.flat_map(|volume| fs::read_dir(&volume.mount_point).into_iter().flatten().flatten());
    let pipelines = entries.filter(|entry| tree::is_pipeline(&entry.path()));
    pipelines
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| !name.starts_with('.'))
        .collect()
}

/// Since a moment, in milliseconds.
pub(super) fn milliseconds(since: Instant) -> f64 {
    in_milliseconds(since.elapsed())
}

fn in_milliseconds(took: Duration) -> f64 {
    // Whole microseconds: more digits would say nothing.
    took.as_micros() as f64 / 1e3
}
