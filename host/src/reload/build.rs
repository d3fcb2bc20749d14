//! Turns a private copy into an opened plugin: preflight, then open. Blocking; it never touches what is served. Each content
//! is opened once in the life of the process, and their number is bounded.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use modalkit_loader::{
    LoadError, Plugin, QueuePlugin, Staged, Store, Trust, lower_thread_priority,
    preflight::{self, Preflight},
};
use parking_lot::Mutex;
use prometheus::IntGauge;

use super::history::Phases;
use crate::{
    config::{Server, Volume},
    fence::Fence,
    insight::log,
};

/// Makes plugins of files.
pub(super) struct Builder {
    store: Store,
    pub(super) fence: Arc<Fence>,
    program: PathBuf,
    preflight_limit: Duration,
    libraries_max: usize,
    /// By content. Whoever holds an entry's lock opens it; others that want the same wait for that.
    opened: Mutex<HashMap<String, Arc<Mutex<Option<Plugin>>>>>,
    /// Libraries that are open, or about to be.
    libraries: AtomicUsize,
    gauge: IntGauge,
}

/// This very program, even where its file has been replaced since it started.
const THIS_PROGRAM: &str = "/proc/self/exe";

/// The argument that makes this program the preflight's child.
pub const PREFLIGHT_COMMAND: &str = "preflight";

impl Builder {
    pub(super) fn new(
        store: Store,
        fence: Arc<Fence>,
        preflight_limit: Duration,
        libraries_max: usize,
        gauge: IntGauge,
    ) -> Self {
        let program = PathBuf::from(THIS_PROGRAM);
        Self {
            store,
            fence,
            program,
            preflight_limit,
            libraries_max,
            opened: Mutex::default(),
            libraries: AtomicUsize::new(0),
            gauge,
        }
    }

    /// Removes the private copies.
    pub(super) fn close(&self) {
        self.fence.close();
        self.store.close();
    }

    /// Makes a private copy.
    pub(super) fn stage(&self, file: &Path) -> Result<Staged, LoadError> {
        self.store.stage(file)
    }

    /// Opens a copy, or finds it opened.
    pub(super) fn build(&self, staged: &Staged, phases: &mut Phases) -> Result<Plugin, LoadError> {
        let entry = Arc::clone(self.opened.lock().entry(staged.sha256().to_owned()).or_default());
        let mut plugin = entry.lock();
        if let Some(plugin) = &*plugin {
            return Ok(plugin.clone());
        }
        let room = |found: usize| (found < self.libraries_max).then_some(found + 1);
        let staged = &self.store.find_again(staged)?;
        let opened = match self.libraries.fetch_update(Ordering::SeqCst, Ordering::SeqCst, room) {
            Err(found) => Err(LoadError::TooManyLibraries { found, limit: self.libraries_max }),
            Ok(_) => self.open(staged, phases).inspect_err(|_| {
                self.libraries.fetch_sub(1, Ordering::SeqCst);
            }),
        };
        self.gauge.set(self.libraries.load(Ordering::SeqCst) as i64);
        let opened = plugin.insert(opened?).clone();
        // The level may have changed since it was attached.
        opened.attach(log::plugin_level(), log::plugin_line);
        Ok(opened)
    }

    /// The plugin with this content, where it is open.
    pub(super) fn opened(&self, sha256: &str) -> Option<Plugin> {
        let entry = self.opened.lock().get(sha256).cloned()?;
        entry.try_lock()?.clone()
    }

    /// Tells every opened plugin which lines are worth sending. Those that are being opened hear it then.
    pub(super) fn tell_log_level(&self) {
        for entry in self.opened.lock().values() {
            if let Some(plugin) = entry.try_lock().as_deref().and_then(Option::as_ref) {
                plugin.attach(log::plugin_level(), log::plugin_line);
            }
        }
    }

    fn open(&self, staged: &Staged, phases: &mut Phases) -> Result<Plugin, LoadError> {
        let begun = Instant::now();
        let fit = try_first(staged, &self.program, self.preflight_limit);
        phases.preflight_ms = Some(milliseconds(begun));
        fit?;
        let begun = Instant::now();
        // The same checks on the same bytes passed a moment ago in the other process, so this fails for want of memory at most.
        let plugin = Plugin::open(staged)?;
        plugin.attach(log::plugin_level(), log::plugin_line);
        phases.open_ms = Some(milliseconds(begun));
        Ok(plugin)
    }
}

/// Opens a copy in a process of its own.
fn try_first(staged: &Staged, program: &Path, limit: Duration) -> Result<(), LoadError> {
    let how = Preflight { program, args: &[PREFLIGHT_COMMAND], limit };
    // The child inherits the priority of the thread that starts it.
    thread::scope(|scope| {
        let preflight = || {
            lower_thread_priority();
            preflight::run(staged, &how)
        };
        let failed = |_| Err(LoadError::Refused("the host failed over it; see its log".into()));
        scope.spawn(preflight).join().unwrap_or_else(failed)
    })
}

/// Where this host's private copies lie.
///
/// # Errors
/// The private folder for them can't be made.
pub fn store(server: &Server) -> Result<Store, LoadError> {
    Store::new(Trust { any_owner: server.plugins_of_any_owner, any_mode: server.plugins_of_any_mode })
}

/// What opens queue plugins: each content once, and as many as there may be of pipelines.
#[must_use]
pub fn queue_opener(server: &Server, store: Store) -> modalkit_queue::OpenPlugin {
    let (limit, libraries_max) = (server.preflight_timeout, server.generations_max);
    let opened: Mutex<HashMap<String, QueuePlugin>> = Mutex::default();
    let open = move |file: &Path, pin: Option<&str>| -> Result<QueuePlugin, LoadError> {
        let staged = store.stage(file)?;
        staged.check_pin(pin, "the queue backend's entry")?;
        // Held while one is opened: another backend may want the same.
        let mut opened = opened.lock();
        if let Some(plugin) = opened.get(staged.sha256()) {
            return Ok(plugin.clone());
        }
        if opened.len() >= libraries_max {
            return Err(LoadError::TooManyLibraries { found: opened.len(), limit: libraries_max });
        }
        try_first(&staged, Path::new(THIS_PROGRAM), limit)?;
        let plugin = QueuePlugin::open(&staged)?;
        plugin.attach(log::plugin_level(), log::plugin_line);
        opened.insert(staged.sha256().to_owned(), plugin.clone());
        Ok(plugin)
    };
    Arc::new(move |file: &Path, pin: Option<&str>| open(file, pin).map_err(|error| error.chain()))
}

/// Opens a plugin as a host would, in a process of its own first; the file is not served.
///
/// # Errors
/// Why a host would not take it.
pub fn inspect(file: &Path, server: &Server) -> Result<Plugin, LoadError> {
    let store = store(server)?;
    let staged = store.stage(file)?;
    try_first(&staged, Path::new(THIS_PROGRAM), server.preflight_timeout)?;
    Ok(Plugin::open(&staged)?)
}

/// The file of a plugin of this name in the volumes.
#[must_use]
pub fn find(plugin: &str, volumes: &[Volume]) -> Option<PathBuf> {
    let files = volumes.iter().flat_map(|volume| {
        [format!("{plugin}.so"), format!("lib{plugin}.so")].map(|name| volume.mount_point.join(name))
    });
    files.into_iter().find(|file| file.is_file())
}

/// Since a moment, in milliseconds.
pub(super) fn milliseconds(since: Instant) -> f64 {
    // Whole microseconds: more digits would say nothing.
    since.elapsed().as_micros() as f64 / 1e3
}
