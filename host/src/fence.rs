//! Remembers across starts which plugin content took the host down while it was loaded, so that it isn't loaded again by itself, and keeps a
//! copy of the content that last served, so that this does instead. It owns two folders in the state folder, and never decides what
//! serves.
//!
//! A load writes a note before it begins and removes it when it has ended, well or badly. Where plugin code ends the process meanwhile
//! (a fault, `exit`), the engine writes how into the note. A process that was killed leaves its note as it was, which
//! proves nothing the first time.

use std::{
    collections::{HashMap, HashSet},
    fs::{self, File, OpenOptions, Permissions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use modalkit_engine::Plugin;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Times that the host may die in the loads of one content, for reasons that nobody noted, until the content is fenced.
const DEATHS_MAX: u32 = 3;
/// Notes that are read at a start; there are as many as loads were under way, and as contents are fenced.
const NOTES_MAX: usize = 1024;
const NOTES: &str = "loading";
const KEPT: &str = "served";

/// What a note's first line holds.
#[derive(Debug, Deserialize, Serialize)]
struct Header {
    model: String,
    sha256: String,
    /// How often the host had died in this load before, for reasons that nobody noted.
    deaths: u32,
}

/// Content as one model loads it: with other settings, or other data, it may do well.
type Key = (String, String);

/// The folders, and what was found in them.
pub(crate) struct Fence {
    notes: PathBuf,
    kept: PathBuf,
    /// Why, with the note that says so.
    fenced: Mutex<HashMap<Key, (String, PathBuf)>>,
    deaths: Mutex<HashMap<Key, u32>>,
    /// Notes of loads under way.
    live: Mutex<HashSet<PathBuf>>,
    next: AtomicU64,
    /// The last order to keep or forget, of each model: an older one that is carried out later does nothing.
    orders: Mutex<HashMap<String, u64>>,
}

/// A load under way, on this thread.
pub(crate) struct Loading {
    fence: Arc<Fence>,
    key: Key,
    path: PathBuf,
    note: File,
}

impl Loading {
    /// Where it is written how plugin code ends the process.
    pub(crate) fn note(&self) -> &File {
        &self.note
    }
}

impl Drop for Loading {
    fn drop(&mut self) {
        // Well or badly, it came back.
        self.fence.deaths.lock().remove(&self.key);
        self.fence.live.lock().remove(&self.path);
        // One that stays counts as a death that nobody noted.
        let _ = fs::remove_file(&self.path);
    }
}

impl Fence {
    /// Reads what earlier runs have left in this state folder.
    ///
    /// # Errors
    /// The folders can't be made or read.
    pub(crate) fn open(state_folder: &Path) -> io::Result<Arc<Self>> {
        let fence = Self {
            notes: state_folder.join(NOTES),
            kept: state_folder.join(KEPT),
            fenced: Mutex::default(),
            deaths: Mutex::default(),
            live: Mutex::default(),
            next: AtomicU64::new(0),
            orders: Mutex::default(),
        };
        for folder in [&fence.notes, &fence.kept] {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
        }
        for entry in fs::read_dir(&fence.notes)?.take(NOTES_MAX) {
            fence.read(entry?.path());
        }
        Ok(Arc::new(fence))
    }

    fn read(&self, path: PathBuf) {
        let text = fs::read_to_string(&path).unwrap_or_default();
        let (header, how) = text.split_once('\n').unwrap_or((&text, ""));
        let Ok(Header { model, sha256, deaths }) = serde_json::from_str(header) else {
            // Not even begun.
            let _ = fs::remove_file(path);
            return;
        };
        let key = (model, sha256);
        let why = match how.trim() {
            "" if deaths + 1 < DEATHS_MAX => {
                let mut all = self.deaths.lock();
                let count = all.entry(key).or_default();
                *count = (*count).max(deaths + 1);
                let _ = fs::remove_file(path);
                return;
            }
            "" => format!("the host died {} times while it was loading this content", deaths + 1),
            how => format!("this content ended the host while it was loaded: {how}"),
        };
        tracing::warn!(model = key.0, sha256 = key.1, why, "content is fenced");
        self.fenced.lock().insert(key, (why, path));
    }

    /// Why this content isn't loaded by itself.
    pub(crate) fn why(&self, model: &str, sha256: &str) -> Option<String> {
        let fenced = self.fenced.lock();
        let (why, _) = fenced.get(&(model.to_owned(), sha256.to_owned()))?;
        Some(format!(
            "{why}; install another version, or have it tried once more with `modalkit reload {model}` (or POST /models/{model}/reload)"
        ))
    }

    /// Lets a model load whatever it wants again.
    pub(crate) fn lift(&self, model: &str) {
        self.fenced.lock().retain(|(fenced, _), (_, path)| {
            let stays = fenced != model;
            if !stays {
                let _ = fs::remove_file(path);
            }
            stays
        });
        self.deaths.lock().retain(|(died, _), _| died != model);
    }

    /// Notes that this thread loads this content, until that has ended. Where it can't be noted, it is loaded all the same.
    pub(crate) fn loading(self: &Arc<Self>, model: &str, sha256: &str) -> Option<Loading> {
        // No process id: in a container it is the same each time, and notes of fenced content stay.
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let path = self.notes.join(format!("{number}-{}", uuid::Uuid::now_v7().simple()));
        let key = (model.to_owned(), sha256.to_owned());
        let deaths = self.deaths.lock().get(&key).copied();
        let header =
            Header { model: model.to_owned(), sha256: sha256.to_owned(), deaths: deaths.unwrap_or_default() };
        let write = || -> io::Result<File> {
            let mut file = OpenOptions::new().append(true).create_new(true).mode(0o600).open(&path)?;
            file.write_all(format!("{}\n", serde_json::to_string(&header)?).as_bytes())?;
            Ok(file)
        };
        match write() {
            Ok(file) => {
                self.live.lock().insert(path.clone());
                Some(Loading { fence: Arc::clone(self), key, path, note: file })
            }
            Err(error) => {
                tracing::warn!(model, %error, "a load can't be noted; should it end the host, the next start tries it again");
                None
            }
        }
    }

    /// The host ends, and cuts off what loads: no content is to blame for that.
    pub(crate) fn close(&self) {
        for path in self.live.lock().drain() {
            let _ = fs::remove_file(path);
        }
    }

    /// A place in the order of what is kept and forgotten.
    pub(crate) fn order(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    /// The copy of what this model served with last, in an earlier run or in this one.
    pub(crate) fn kept(&self, model: &str) -> Option<PathBuf> {
        Some(self.place(model)).filter(|path| path.is_file())
    }

    /// Keeps a copy of what a model serves with. Blocking.
    pub(crate) fn keep(&self, model: &str, plugin: &dyn Plugin, order: u64) {
        if plugin.is_isolated() {
            // It ends no host.
            return;
        }
        let mut orders = self.orders.lock();
        let last = orders.entry(model.to_owned()).or_default();
        if *last > order {
            return;
        }
        *last = order;
        let place = self.place(model);
        let half = place.with_extension("half");
        let synced = || {
            let file = File::open(&half)?;
            file.set_permissions(Permissions::from_mode(0o600))?;
            file.sync_all()
        };
        let copied = fs::copy(plugin.description().staged.path(), &half).map(drop);
        let kept = copied.and_then(|()| synced()).and_then(|()| fs::rename(&half, &place));
        if let Err(error) = kept {
            let _ = fs::remove_file(&half);
            tracing::warn!(model, %error, "no copy is kept of the plugin that serves; it is needed only where a later one ends the host");
        }
    }

    /// Forgets a model that is no more. Blocking: a copy may be under way.
    pub(crate) fn forget(&self, model: &str, order: u64) {
        let mut orders = self.orders.lock();
        let last = orders.entry(model.to_owned()).or_default();
        if *last > order {
            return;
        }
        *last = order;
        // There may be none.
        let _ = fs::remove_file(self.place(model));
    }

    fn place(&self, model: &str) -> PathBuf {
        // A model may have any name.
        let name: String =
            Sha256::digest(model.as_bytes())[..16].iter().map(|byte| format!("{byte:02x}")).collect();
        self.kept.join(format!("{name}.so"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn notes(folder: &Path) -> usize {
        fs::read_dir(folder.join(NOTES)).unwrap().count()
    }

    /// As if the process had ended in the middle of it.
    fn cut_off(fence: &Arc<Fence>, how: &str) {
        let loading = fence.loading("m", "5e").unwrap();
        let mut file = OpenOptions::new().append(true).open(&loading.path).unwrap();
        file.write_all(how.as_bytes()).unwrap();
        std::mem::forget(loading);
    }

    #[test]
    fn what_ended_the_host_in_its_load_is_fenced_until_somebody_asks_for_it() {
        let folder = tempfile::tempdir().unwrap();
        let fence = Fence::open(folder.path()).unwrap();
        drop(fence.loading("m", "5e"));
        assert_eq!((notes(folder.path()), fence.why("m", "5e")), (0, None));
        let cut_off_by_the_host = fence.loading("m", "5e");
        fence.close();
        assert_eq!(notes(folder.path()), 0);
        std::mem::forget(cut_off_by_the_host);
        cut_off(&fence, "SIGSEGV in load");
        for _ in 0..2 {
            let fence = Fence::open(folder.path()).unwrap();
            let why = fence.why("m", "5e").unwrap();
            assert!(why.contains("SIGSEGV in load") && why.contains("modalkit reload m"), "{why}");
            assert!(fence.why("m", "6f").is_none() && fence.why("n", "5e").is_none());
        }
        let fence = Fence::open(folder.path()).unwrap();
        assert!(fence.loading("n", "6f").is_some(), "notes that stay are in nobody's way");
        fence.lift("n");
        assert!(fence.why("m", "5e").is_some());
        fence.lift("m");
        assert!(fence.why("m", "5e").is_none());
        assert!(Fence::open(folder.path()).unwrap().why("m", "5e").is_none());
    }

    #[test]
    fn who_is_killed_in_a_load_is_not_to_blame_until_it_happens_again_and_again() {
        let folder = tempfile::tempdir().unwrap();
        cut_off(&Fence::open(folder.path()).unwrap(), "");
        let fence = Fence::open(folder.path()).unwrap();
        drop(fence.loading("m", "5e"));
        drop(fence);
        for start in 1..=DEATHS_MAX {
            let fence = Fence::open(folder.path()).unwrap();
            assert_eq!(fence.why("m", "5e"), None, "start {start}");
            cut_off(&fence, "");
        }
        let fence = Fence::open(folder.path()).unwrap();
        assert!(fence.why("m", "5e").unwrap().contains("died 3 times"));
        // One that can't be parsed blames no content.
        fs::write(folder.path().join(NOTES).join("other"), "x").unwrap();
        drop(Fence::open(folder.path()).unwrap());
        assert_eq!(notes(folder.path()), 1);
    }
}
