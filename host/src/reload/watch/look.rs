//! One look after the other through a volume: what has changed since, and has settled. Time is an argument, and so is what events
//! tell; it never waits.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use modalkit_loader::LoadError;

use super::{
    Told,
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

/// What a look knows beside what it sees.
pub(super) struct Hints<'h> {
    /// Files whose writers have closed or renamed them since the last look.
    pub(super) finished: &'h BTreeSet<PathBuf>,
    /// Files that are being written.
    pub(super) writing: &'h BTreeSet<PathBuf>,
    /// Somebody waits: nothing needs to hold still.
    pub(super) hurry: bool,
}

/// What was seen of a volume, and what of it was told. Time is an argument.
pub(super) struct Look {
    pub(super) volume: String,
    pub(super) mount_point: PathBuf,
    settle: Duration,
    settle_timeout: Duration,
    /// [`RETRY`], or less where volumes are polled more often.
    retry: Duration,
    builder: Arc<Builder>,
    plugins: HashMap<PathBuf, Seen>,
    data: HashMap<PathBuf, Seen>,
    /// The first look finds what was there before: that is no change.
    data_known: bool,
    /// Since when some data has been on its way.
    data_moves_since: Option<Instant>,
    /// What was said once, and is not said again before it is over.
    complaint: Option<String>,
}

struct Seen {
    stamp: Stamp,
    since: Instant,
    told: bool,
    /// Something was told of it before.
    known: bool,
    finished: bool,
    /// It was written over since it was told: the same file with other content.
    in_place: bool,
    /// When to try again what may pass.
    again: Option<Instant>,
    /// Why it could not be copied.
    complaint: Option<String>,
    /// SHA-256 of what was told last, for data that is compared by content.
    content: Option<[u8; 32]>,
}

impl Look {
    pub(super) fn new(volume: &Volume, server: &Server, builder: Arc<Builder>) -> Self {
        Self {
            volume: volume.name.clone(),
            mount_point: std::path::absolute(&volume.mount_point).unwrap_or(volume.mount_point.clone()),
            settle: server.settle,
            settle_timeout: server.settle_timeout,
            retry: RETRY.min(server.poll_interval),
            builder,
            plugins: HashMap::new(),
            data: HashMap::new(),
            data_known: false,
            data_moves_since: None,
            complaint: None,
        }
    }

    /// Whether no plugin file is on its way.
    pub(super) fn is_quiet(&self) -> bool {
        self.plugins.values().all(|seen| seen.told)
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
        if let Err(error) = files.collect(&self.mount_point, 0) {
            files.complaint = Some(format!("can't read the volume: {error}"));
            files.miss(0);
        }
        files.sight.linked |= fs::canonicalize(&self.mount_point).is_ok_and(|real| real != self.mount_point);
        if self.complaint != files.complaint {
            if let Some(complaint) = &files.complaint {
                tracing::warn!(volume = self.volume, folder = %self.mount_point.display(), "{complaint}");
            }
            self.complaint.clone_from(&files.complaint);
        }
        files
    }

    /// The plugins that have settled since the last look or are gone, and when to look again where something hasn't settled.
    pub(super) fn plugins(
        &mut self,
        now: Instant,
        hints: &Hints<'_>,
        files: &Files,
    ) -> (Vec<Told>, Option<Duration>) {
        let mut told = Vec::new();
        let mut next = None;
        // What can't be read isn't gone, as far as anybody knows. What is gone is told first: a plugin may have another name now.
        if !files.plugins_partial {
            self.plugins.retain(|path, seen| {
                let there = files.plugins.values().any(|(known, _)| known == path);
                if !there && seen.known {
                    let name = plugin_name(path).unwrap_or_default();
                    told.push(Told::Gone { name, path: path.clone() });
                }
                there
            });
        }
        self.look_at_plugins(now, hints, &files.plugins, &mut told, &mut next);
        (told, next)
    }

    fn look_at_plugins(
        &mut self,
        now: Instant,
        hints: &Hints<'_>,
        files: &BTreeMap<String, (PathBuf, Stamp)>,
        told: &mut Vec<Told>,
        next: &mut Option<Duration>,
    ) {
        for (name, (path, stamp)) in files {
            let seen = self
                .plugins
                .entry(path.clone())
                .or_insert_with(|| Seen::new(stamp.clone(), now, self.settle));
            seen.see(stamp, now, hints.finished.contains(path));
            let again = seen.again.is_some_and(|again| again <= now);
            if seen.told && !again {
                if let Some(again) = seen.again {
                    sooner(next, again - now);
                }
                continue;
            }
            let still = now.saturating_duration_since(seen.since);
            let mut wait = match seen.finished || hints.hurry {
                true => Duration::ZERO,
                // Written over without an end that anybody saw: there is nothing in the file that would tell.
                false if seen.in_place => DATA_SETTLE.max(self.settle),
                false => self.settle,
            };
            let unfinished = hints.writing.contains(path) && !seen.finished;
            if still >= wait && (unfinished || !modalkit_loader::is_whole(path).unwrap_or(true)) {
                wait = self.settle_timeout;
            }
            if still < wait {
                sooner(next, wait - still);
                continue;
            }
            let staged = self.builder.stage(path);
            let is_queue = match &staged {
                Ok(staged) => modalkit_loader::exports_queue(staged.path()),
                Err(_) => Ok(false),
            };
            let Ok(is_queue) = is_queue else {
                sooner(next, self.retry);
                continue;
            };
            // What was written while it was copied is no copy of anything.
            if Stamp::of_file(path).ok().as_ref() != Some(stamp) {
                sooner(next, self.settle);
                continue;
            }
            let complaint = staged.as_ref().err().filter(|error| error.may_pass()).map(LoadError::chain);
            // The file may be as it was when its folder's mode, or the room for the copy, has changed.
            seen.again = complaint.as_ref().map(|_| now + self.retry);
            if complaint.is_some() {
                sooner(next, self.retry);
            }
            let same = complaint.is_some() && complaint == seen.complaint;
            seen.complaint = complaint;
            seen.told = true;
            seen.known = true;
            if is_queue {
                // Whoever delivers results looks for it by its name; it is no model.
                tracing::info!(
                    plugin = name,
                    "a queue backend is in the volume; backends of queue_config with kind = \"plugin\" can name it"
                );
            } else if !same {
                told.push(Told::Plugin {
                    name: name.clone(),
                    path: path.clone(),
                    staged: staged.map_err(Arc::new),
                });
            }
        }
    }

    /// The data that has settled since the last look.
    pub(super) fn data(
        &mut self,
        now: Instant,
        hints: &Hints<'_>,
        files: Files,
    ) -> (Vec<Told>, Option<Duration>) {
        if !files.sight.partial {
            let there: BTreeSet<&PathBuf> = files.data.iter().map(|(path, _)| path).collect();
            // What is loaded doesn't need its files any more: a file that is gone is no change.
            self.data.retain(|path, _| there.contains(path));
        }
        for (path, stamp) in files.data {
            let finished = hints.finished.contains(&path);
            let Some(seen) = self.data.get_mut(&path) else {
                let mut seen = Seen::new(stamp, now, DATA_SETTLE);
                seen.finished = finished;
                if !self.data_known {
                    seen.told = true;
                    seen.read_content(&path, now + self.retry);
                }
                self.data.insert(path, seen);
                continue;
            };
            seen.see(&stamp, now, finished);
            if seen.told && seen.again.is_some_and(|again| again <= now) {
                seen.read_content(&path, now + self.retry);
            }
        }
        // A folder that can't be entered has no files that anybody was told of: those that are found in it later are new.
        self.data_known |= !files.plugins_partial;
        let again = self.data.values().filter_map(|seen| seen.again).min();
        let mut next = again.map(|again| again.saturating_duration_since(now));
        let wait_of = |seen: &Seen| match (hints.hurry, seen.finished) {
            (true, _) => Duration::ZERO,
            (_, true) => self.settle,
            (_, false) => DATA_SETTLE.max(self.settle),
        };
        let waits = |seen: &Seen| {
            wait_of(seen)
                .checked_sub(now.saturating_duration_since(seen.since))
                .filter(|wait| !wait.is_zero())
        };
        let longest = self.data.values().filter(|seen| !seen.told).filter_map(waits).max();
        // What belongs together is told together: weights and the labels beside them. A file that never holds still holds up
        // the others for so long only.
        let since = *self.data_moves_since.get_or_insert(now);
        longest.into_iter().for_each(|longest| sooner(&mut next, longest));
        if longest.is_some() && now.saturating_duration_since(since) < self.settle_timeout {
            return (Vec::new(), next);
        }
        self.data_moves_since = longest.map(|_| now);
        let mut changed = Vec::new();
        for (path, seen) in &mut self.data {
            if seen.told || waits(seen).is_some() {
                continue;
            }
            let before = seen.content;
            if !seen.read_content(path, now + self.retry) {
                // Nobody knows whether it has changed.
                sooner(&mut next, self.retry);
                continue;
            }
            seen.told = true;
            if seen.content.is_none() || seen.content != before {
                let name = path.strip_prefix(&self.mount_point).unwrap_or(path);
                changed.push(name.to_string_lossy().into_owned());
            }
        }
        changed.sort();
        let told = if changed.is_empty() { Vec::new() } else { vec![Told::Data { changed }] };
        (told, next)
    }
}

impl Seen {
    /// A file that says it was changed long ago has held still as long.
    fn new(stamp: Stamp, now: Instant, settle: Duration) -> Self {
        let age = stamp.modified.and_then(|modified| modified.elapsed().ok()).unwrap_or_default();
        let since = now.checked_sub(age.min(settle)).unwrap_or(now);
        Self {
            stamp,
            since,
            told: false,
            known: false,
            finished: false,
            in_place: false,
            again: None,
            complaint: None,
            content: None,
        }
    }

    fn see(&mut self, stamp: &Stamp, now: Instant, finished: bool) {
        if self.stamp != *stamp {
            self.in_place = self.known && self.stamp.inode == stamp.inode;
            self.again = None;
            self.stamp = stamp.clone();
            self.since = now;
            self.told = false;
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

pub(super) fn sooner(next: &mut Option<Duration>, wait: Duration) {
    *next = Some(next.map_or(wait, |next| next.min(wait)));
}
