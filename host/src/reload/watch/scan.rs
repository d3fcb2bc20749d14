//! Scans of one volume: what has changed since the scan before, and has settled. Time and the hints of events are arguments; it never
//! waits.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use modalkit_engine::{LoadError, tree};

use super::{
    VolumeEvent,
    files::{Files, Stamp, content, plugin_name},
};
use crate::{
    config::{Server, Volume},
    reload::build::Builder,
    transient::is_transient,
};

/// Model data whose writer nobody saw ending has settled after this.
const DATA_SETTLE: Duration = Duration::from_secs(2);
/// At most between two tries to read a file that could not be read for reasons outside of it.
pub(super) const RETRY: Duration = Duration::from_secs(1);

/// What a scan knows beside what it finds in the folder.
pub(super) struct Hints<'h> {
    /// Files whose writers have closed or renamed them since the last scan.
    pub(super) finished: &'h BTreeSet<PathBuf>,
    /// Files that are being written.
    pub(super) writing: &'h BTreeSet<PathBuf>,
    /// Somebody waits: nothing needs to hold still.
    pub(super) skip_settling: bool,
}

/// What earlier scans found in a volume, and what of it was reported.
pub(super) struct Scanner {
    pub(super) volume: String,
    pub(super) mount_point: PathBuf,
    /// The plugin that the folder is itself.
    pipeline: Option<String>,
    settle: Duration,
    settle_timeout: Duration,
    /// [`RETRY`], or less where volumes are polled more often.
    retry: Duration,
    pub(super) builder: Arc<Builder>,
    plugins: HashMap<PathBuf, FileState>,
    data: HashMap<PathBuf, FileState>,
    /// The first scan finds what was there before: that is no change.
    data_known: bool,
    /// Mirrored from a bucket: models have been loaded with what the first scan finds, also where that is nothing.
    is_mirrored: bool,
    /// Since when some data has been on its way.
    data_moves_since: Option<Instant>,
    /// What was said once, and is not said again before it is over.
    warning: Option<String>,
}

/// A file, as the scans before found it.
struct FileState {
    stamp: Stamp,
    since: Instant,
    reported: bool,
    /// Something was reported of it before.
    known: bool,
    finished: bool,
    /// It was written over since it was reported: the same file with other content.
    in_place: bool,
    /// When to try again what may pass.
    again: Option<Instant>,
    /// Why it could not be copied.
    warning: Option<String>,
    /// SHA-256 of what was reported last, for data that is compared by content.
    content: Option<[u8; 32]>,
}

impl Scanner {
    pub(super) fn new(volume: &Volume, server: &Server, builder: Arc<Builder>) -> Self {
        Self {
            volume: volume.name.clone(),
            mount_point: std::path::absolute(&volume.mount_point).unwrap_or(volume.mount_point.clone()),
            pipeline: volume.pipeline.clone(),
            settle: server.settle,
            settle_timeout: server.settle_timeout,
            retry: RETRY.min(server.poll_interval),
            builder,
            plugins: HashMap::new(),
            data: HashMap::new(),
            data_known: false,
            is_mirrored: volume.bucket.is_some(),
            data_moves_since: None,
            warning: None,
        }
    }

    /// Whether no plugin file is on its way.
    pub(super) fn is_quiet(&self) -> bool {
        self.plugins.values().all(|file| file.reported)
    }

    /// Which folder it is now, however it is called.
    pub(super) fn identity(&self) -> Option<(u64, u64)> {
        use std::os::unix::fs::MetadataExt;
        let metadata = fs::metadata(&self.mount_point).ok()?;
        Some((metadata.dev(), metadata.ino()))
    }

    /// What lies in the volume.
    pub(super) fn collect(&mut self) -> Files {
        let mut files = Files::default();
        let collected = match &self.pipeline {
            Some(name) => files.collect_pipeline(name, &self.mount_point),
            None => files.collect(&self.mount_point),
        };
        if let Err(error) = collected {
            let hint = match error.kind() {
                io::ErrorKind::NotFound => {
                    "; make the folder, or correct app_settings.deployment_config.volumes"
                }
                _ => "",
            };
            files.warning = Some(format!("can't read the volume: {error}{hint}"));
            files.miss(0);
        }
        files.completeness.linked |=
            fs::canonicalize(&self.mount_point).is_ok_and(|real| real != self.mount_point);
        if self.warning != files.warning {
            if let Some(warning) = &files.warning {
                tracing::warn!(volume = self.volume, folder = %self.mount_point.display(), "{warning}");
            }
            self.warning.clone_from(&files.warning);
        }
        files
    }

    /// The plugins that have settled since the last scan or are gone, and when to scan again where something hasn't settled.
    pub(super) fn plugins(
        &mut self,
        now: Instant,
        hints: &Hints<'_>,
        files: &Files,
    ) -> (Vec<VolumeEvent>, Option<Duration>) {
        let mut told = Vec::new();
        let mut next = None;
        // What can't be read isn't gone, as far as anybody knows. What is gone is reported first: a plugin may have another name now.
        if !files.plugins_partial {
            self.plugins.retain(|path, file| {
                let there = files.plugins.values().any(|(known, _)| known == path);
                if !there && file.known {
                    let name = self.pipeline.clone().or_else(|| plugin_name(path)).unwrap_or_default();
                    told.push(VolumeEvent::Gone { name, path: path.clone() });
                }
                there
            });
        }
        self.scan_plugins(now, hints, &files.plugins, &mut told, &mut next);
        (told, next)
    }

    fn scan_plugins(
        &mut self,
        now: Instant,
        hints: &Hints<'_>,
        files: &BTreeMap<String, (PathBuf, Stamp)>,
        told: &mut Vec<VolumeEvent>,
        next: &mut Option<Duration>,
    ) {
        for (name, (path, stamp)) in files {
            let file = self
                .plugins
                .entry(path.clone())
                .or_insert_with(|| FileState::new(stamp.clone(), now, self.settle));
            file.update(stamp, now, hints.finished.contains(path));
            let again = file.again.is_some_and(|again| again <= now);
            if file.reported && !again {
                if let Some(again) = file.again {
                    earlier_of(next, again - now);
                }
                continue;
            }
            let still = now.saturating_duration_since(file.since);
            let mut wait = match file.finished || hints.skip_settling {
                true => Duration::ZERO,
                // Written over without an end that anybody saw: there is nothing in the file that would tell.
                false if file.in_place => DATA_SETTLE.max(self.settle),
                false => self.settle,
            };
            // Of a folder, any of its code.
            let is_written = hints
                .writing
                .iter()
                .any(|written| written == path || written.starts_with(path) && tree::is_code(written));
            let unfinished = is_written && !file.finished;
            if still >= wait && (unfinished || !self.builder.engine.is_whole(path).unwrap_or(true)) {
                wait = self.settle_timeout;
            }
            if still < wait {
                earlier_of(next, wait - still);
                continue;
            }
            let staged = self.builder.engine.stage(path);
            let is_queue = match &staged {
                Ok(staged) => self.builder.engine.exports_queue(staged),
                Err(_) => Ok(false),
            };
            let Ok(is_queue) = is_queue else {
                earlier_of(next, self.retry);
                continue;
            };
            // A file that was written while it was copied gives an unusable copy.
            if Stamp::of_plugin(path).ok().as_ref() != Some(stamp) {
                earlier_of(next, self.settle);
                continue;
            }
            let warning = staged.as_ref().err().filter(|error| error.may_pass()).map(LoadError::chain);
            // The file may be as it was when its folder's mode, or the room for the copy, has changed.
            file.again = warning.as_ref().map(|_| now + self.retry);
            if warning.is_some() {
                earlier_of(next, self.retry);
            }
            let same = warning.is_some() && warning == file.warning;
            file.warning = warning;
            file.reported = true;
            file.known = true;
            if is_queue {
                // Whoever delivers results looks for it by its name; it is no model.
                tracing::info!(
                    plugin = name,
                    "a queue backend is in the volume; backends of queue_config with kind = \"plugin\" can name it"
                );
            } else if !same {
                told.push(VolumeEvent::Plugin {
                    name: name.clone(),
                    path: path.clone(),
                    staged: staged.map_err(Arc::new),
                });
            }
        }
    }

    /// The data that has settled since the last scan.
    pub(super) fn data(
        &mut self,
        now: Instant,
        hints: &Hints<'_>,
        files: Files,
    ) -> (Vec<VolumeEvent>, Option<Duration>) {
        if !files.completeness.partial {
            let there: BTreeSet<&PathBuf> = files.data.iter().map(|(path, _)| path).collect();
            // What is loaded doesn't need its files any more: a file that is gone is no change.
            self.data.retain(|path, _| there.contains(path));
        }
        for (path, stamp) in files.data {
            let finished = hints.finished.contains(&path);
            let Some(file) = self.data.get_mut(&path) else {
                let mut file = FileState::new(stamp, now, DATA_SETTLE);
                file.finished = finished;
                if !self.data_known {
                    file.reported = true;
                    file.read_content(&path, now + self.retry);
                }
                self.data.insert(path, file);
                continue;
            };
            file.update(&stamp, now, finished);
            if file.reported && file.again.is_some_and(|again| again <= now) {
                file.read_content(&path, now + self.retry);
            }
        }
        // A folder that can't be entered has no files that were reported: those that are found in it later are new.
        self.data_known |= !files.plugins_partial || self.is_mirrored;
        let again = self.data.values().filter_map(|file| file.again).min();
        let mut next = again.map(|again| again.saturating_duration_since(now));
        let wait_of = |file: &FileState| match (hints.skip_settling, file.finished) {
            (true, _) => Duration::ZERO,
            (_, true) => self.settle,
            (_, false) => DATA_SETTLE.max(self.settle),
        };
        let waits = |file: &FileState| {
            wait_of(file)
                .checked_sub(now.saturating_duration_since(file.since))
                .filter(|wait| !wait.is_zero())
        };
        let longest = self.data.values().filter(|file| !file.reported).filter_map(waits).max();
        // What belongs together is reported together: weights and the labels beside them. A file that never holds still holds up
        // the others for so long only.
        let since = *self.data_moves_since.get_or_insert(now);
        longest.into_iter().for_each(|longest| earlier_of(&mut next, longest));
        if longest.is_some() && now.saturating_duration_since(since) < self.settle_timeout {
            return (Vec::new(), next);
        }
        self.data_moves_since = longest.map(|_| now);
        let mut changed = Vec::new();
        for (path, file) in &mut self.data {
            if file.reported || waits(file).is_some() {
                continue;
            }
            let before = file.content;
            if !file.read_content(path, now + self.retry) {
                // Nobody knows whether it has changed.
                earlier_of(&mut next, self.retry);
                continue;
            }
            file.reported = true;
            if file.content.is_none() || file.content != before {
                let name = path.strip_prefix(&self.mount_point).unwrap_or(path);
                changed.push(name.to_string_lossy().into_owned());
            }
        }
        changed.sort();
        let told = if changed.is_empty() { Vec::new() } else { vec![VolumeEvent::Data { changed }] };
        (told, next)
    }
}

impl FileState {
    /// A file that says it was changed long ago has held still as long.
    fn new(stamp: Stamp, now: Instant, settle: Duration) -> Self {
        let age = stamp.modified.and_then(|modified| modified.elapsed().ok()).unwrap_or_default();
        let since = now.checked_sub(age.min(settle)).unwrap_or(now);
        Self {
            stamp,
            since,
            reported: false,
            known: false,
            finished: false,
            in_place: false,
            again: None,
            warning: None,
            content: None,
        }
    }

    fn update(&mut self, stamp: &Stamp, now: Instant, finished: bool) {
        if self.stamp != *stamp {
            self.in_place = self.known && self.stamp.inode == stamp.inode;
            self.again = None;
            self.stamp = stamp.clone();
            self.since = now;
            self.reported = false;
            self.finished = false;
        }
        self.finished |= finished;
    }

    /// Notes what is in a data file; `false` where that has to be tried `again` then, and nothing is noted.
    fn read_content(&mut self, path: &Path, again: Instant) -> bool {
        self.again = None;
        match content(path, &self.stamp) {
            Ok(content) => self.content = content,
            Err(error) if is_transient(&error) => self.again = Some(again),
            // A pipeline can't read it either.
            Err(_) => self.content = None,
        }
        self.again.is_none()
    }
}

pub(super) fn earlier_of(next: &mut Option<Duration>, wait: Duration) {
    *next = Some(next.map_or(wait, |next| next.min(wait)));
}
