//! The engine of dynamic libraries. It opens each content once in the life of the process, and bounds how many there are.

use std::{
    collections::HashMap,
    io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use modalkit_engine::{Engine, Isolation, LoadError, OpenTimings, Plugin, PluginLog, QueuePlugin, Staged};
use parking_lot::Mutex;

use crate::{
    Preflight, Trust, allocator, elf,
    library::{Library, PipelineLibrary},
    preflight,
    queue::QueueLibrary,
    resident,
    store::{Store, staged_in_place},
    thread_priority,
};

/// How libraries are taken.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Whose files are taken.
    pub trust: Trust,
    /// How a library is tried first.
    pub preflight: Preflight,
    /// Libraries of pipelines that may be open, and of queues as many again.
    pub libraries_max: usize,
    /// Where lines of plugins go; the first engine's in a process takes those of all. Without it they log as outside of a host.
    pub log: Option<PluginLog>,
}

/// What the end of an opening is waited for, where another level of the log is to be heard.
const OPENING_ENDS: Duration = Duration::from_millis(100);

/// What is opened, by its content. Whoever holds an entry's lock opens it; others that want the same wait for that.
type Opened<T> = Mutex<HashMap<String, Arc<Mutex<Option<T>>>>>;

/// An [`Engine`] that opens dynamic libraries in this process.
pub struct Libraries {
    store: Store,
    settings: Settings,
    pipelines: Opened<PipelineLibrary>,
    queues: Opened<QueueLibrary>,
    /// Libraries of pipelines that are open, or about to be; of queues.
    resident: AtomicUsize,
    resident_queues: AtomicUsize,
}

impl Libraries {
    /// An engine that has opened nothing.
    ///
    /// # Errors
    /// The private folder for its copies can't be made.
    pub fn new(settings: Settings) -> Result<Self, LoadError> {
        Ok(Self {
            store: Store::new(settings.trust)?,
            settings,
            pipelines: Mutex::default(),
            queues: Mutex::default(),
            resident: AtomicUsize::new(0),
            resident_queues: AtomicUsize::new(0),
        })
    }

    /// What has this content, opened by `open` where it isn't yet.
    fn open_once<T: Library>(
        &self,
        staged: &Staged,
        opened: &Opened<T>,
        resident: &AtomicUsize,
        open: impl FnOnce(&Staged) -> Result<T, LoadError>,
    ) -> Result<T, LoadError> {
        let entry = Arc::clone(opened.lock().entry(staged.sha256().to_owned()).or_default());
        let mut known = entry.lock();
        if let Some(known) = &*known {
            return Ok(known.clone());
        }
        let limit = self.settings.libraries_max;
        let room = |found: usize| (found < limit).then_some(found + 1);
        let staged = &self.store.find_again(staged)?;
        match resident.fetch_update(Ordering::SeqCst, Ordering::SeqCst, room) {
            Err(found) => Err(LoadError::TooManyLibraries { found, limit }),
            Ok(_) => {
                let opened = open(staged).inspect_err(|_| {
                    resident.fetch_sub(1, Ordering::SeqCst);
                });
                let opened = opened?;
                self.attach(&opened);
                Ok(known.insert(opened).clone())
            }
        }
    }

    /// Gives a library the log, at the level that is wanted when this returns.
    fn attach(&self, library: &impl Library) {
        let Some(log) = &self.settings.log else { return };
        let mut level = (log.level)();
        loop {
            library.attach(level, log);
            let now = (log.level)();
            if now == level {
                return;
            }
            level = now;
        }
    }

    /// Has libraries hear of another level. One that is being opened hears it when it is open.
    fn attach_all<T: Library>(&self, opened: &Opened<T>) {
        let entries: Vec<_> = opened.lock().values().cloned().collect();
        for entry in entries {
            let library = entry.try_lock_for(OPENING_ENDS).and_then(|library| library.clone());
            library.iter().for_each(|library| self.attach(library));
        }
    }

    /// Opens a copy in a process of its own.
    fn try_first(&self, staged: &Staged) -> Result<(), LoadError> {
        // The child inherits the priority of the thread that starts it.
        thread::scope(|scope| {
            let preflight = || {
                thread_priority::lower();
                preflight::run(staged, &self.settings.preflight)
            };
            let failed = |_| Err(LoadError::Refused("the host failed over it; see its log".into()));
            scope.spawn(preflight).join().unwrap_or_else(failed)
        })
    }
}

impl Engine for Libraries {
    fn stage(&self, file: &Path) -> Result<Staged, LoadError> {
        self.store.stage(file)
    }

    fn is_whole(&self, file: &Path) -> io::Result<bool> {
        // Of a folder, each file is whole as it is.
        Ok(file.is_dir() || elf::is_whole(file)?)
    }

    fn exports_queue(&self, staged: &Staged) -> io::Result<bool> {
        Ok(!staged.path().is_dir() && elf::exports_queue(staged.path())?)
    }

    fn put(&self, name: &Path, files: &[(PathBuf, Vec<u8>)]) -> Result<Staged, LoadError> {
        self.store.put(name, files)
    }

    fn trust(&self, files: &[PathBuf], folders: &[PathBuf]) -> Result<(), LoadError> {
        self.store.trust(files, folders)
    }

    fn open(
        &self,
        staged: &Staged,
        isolation: &Isolation,
        timings: &mut OpenTimings,
    ) -> Result<Arc<dyn Plugin>, LoadError> {
        if !isolation.in_process {
            return Err(LoadError::Refused("libraries are opened in this process".into()));
        }
        let library = self.open_once(staged, &self.pipelines, &self.resident, |staged| {
            let fit = timed(&mut timings.preflight, || self.try_first(staged));
            fit?;
            // The same checks on the same bytes passed a moment ago in the other process, so this fails for want of memory at most.
            Ok(timed(&mut timings.open, || PipelineLibrary::open(staged))?)
        })?;
        Ok(Arc::new(library))
    }

    fn opened(&self, sha256: &str) -> Option<Arc<dyn Plugin>> {
        let entry = self.pipelines.lock().get(sha256).cloned()?;
        let library = entry.try_lock()?.clone()?;
        Some(Arc::new(library))
    }

    fn resident(&self) -> usize {
        self.resident.load(Ordering::SeqCst)
    }

    fn open_queue(&self, file: &Path, pin: Option<&str>) -> Result<Arc<dyn QueuePlugin>, LoadError> {
        let staged = self.stage(file)?;
        staged.check_pin(pin, "the queue backend's entry")?;
        let library = self.open_once(&staged, &self.queues, &self.resident_queues, |staged| {
            self.try_first(staged)?;
            Ok(QueueLibrary::open(staged)?)
        })?;
        Ok(Arc::new(library))
    }

    fn log_level_changed(&self) {
        self.attach_all(&self.pipelines);
        self.attach_all(&self.queues);
    }

    fn resident_bytes(&self, files: &[Staged]) -> u64 {
        resident::bytes(files)
    }

    fn lower_thread_priority(&self) {
        thread_priority::lower();
    }

    fn return_freed_memory(&self) {
        allocator::return_freed_memory();
    }

    fn close(&self) {
        self.store.close();
    }
}

/// A plugin, and what has it hear that other lines of it are wanted.
pub type OpenedInPlace = (Arc<dyn Plugin>, Box<dyn Fn() + Send>);

/// Opens a private copy of a file where it is, without a trial, in a process that has it for itself.
///
/// # Errors
/// It is no plugin of a pipeline that this process can run.
pub fn open_in_place(copy: &Path, file: &Path, log: PluginLog) -> Result<OpenedInPlace, LoadError> {
    let library = PipelineLibrary::open(&staged_in_place(copy)).map_err(|error| error.of(file))?;
    let attached = library.clone();
    let attach = move || attached.attach((log.level)(), &log);
    attach();
    Ok((Arc::new(library), Box::new(attach)))
}

fn timed<T>(took: &mut Option<Duration>, work: impl FnOnce() -> T) -> T {
    let begun = Instant::now();
    let done = work();
    *took = Some(begun.elapsed());
    done
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        path::PathBuf,
        sync::{Barrier, atomic::AtomicU8},
    };

    use modalkit_engine::LogLevel;

    use super::*;

    const LEVELS: [LogLevel; 2] = [LogLevel::Info, LogLevel::Debug];
    /// The place in [`LEVELS`] of the one that is wanted now.
    static LEVEL: AtomicU8 = AtomicU8::new(0);

    /// Remembers the level that it was told last.
    #[derive(Clone)]
    struct Fake(Arc<Mutex<Option<LogLevel>>>);

    impl Library for Fake {
        fn attach(&self, level: LogLevel, _: &PluginLog) {
            *self.0.lock() = Some(level);
        }
    }

    fn fake() -> Fake {
        Fake(Arc::default())
    }

    fn libraries(libraries_max: usize) -> Libraries {
        Libraries::new(Settings {
            trust: Trust { any_owner: false, any_mode: false },
            preflight: Preflight { program: PathBuf::new(), argument: "", limit: Duration::ZERO },
            libraries_max,
            log: Some(PluginLog {
                level: || LEVELS[usize::from(LEVEL.load(Ordering::SeqCst))],
                sink: |_, _, _, _, _| {},
            }),
        })
        .unwrap()
    }

    fn staged(libraries: &Libraries, content: &str) -> Staged {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a.so");
        fs::write(&file, content).unwrap();
        libraries.stage(&file).unwrap()
    }

    #[test]
    fn two_who_want_the_same_content_open_it_once() {
        let libraries = libraries(8);
        let staged = staged(&libraries, "content");
        let opened: Opened<Fake> = Opened::default();
        let (times, both) = (AtomicUsize::new(0), Barrier::new(2));
        let open = |_: &Staged| {
            // Until the other one has the entry as well, and waits for it: the map holds it too.
            while Arc::strong_count(&opened.lock()[staged.sha256()]) < 3 {
                thread::yield_now();
            }
            times.fetch_add(1, Ordering::SeqCst);
            Ok(fake())
        };
        let open_it = || {
            both.wait();
            libraries.open_once(&staged, &opened, &libraries.resident, open).unwrap()
        };
        let (one, other) = thread::scope(|scope| {
            let (one, other) = (scope.spawn(open_it), scope.spawn(open_it));
            (one.join().unwrap(), other.join().unwrap())
        });
        assert!(Arc::ptr_eq(&one.0, &other.0));
        assert_eq!((times.load(Ordering::SeqCst), libraries.resident()), (1, 1));
    }

    #[test]
    fn no_more_are_opened_than_the_limit_and_one_that_fails_leaves_its_place() {
        let libraries = libraries(1);
        let (first, second) = (staged(&libraries, "first"), staged(&libraries, "second"));
        let opened = Opened::default();
        let open = |staged: &Staged, result: Result<Fake, LoadError>| {
            libraries.open_once(staged, &opened, &libraries.resident, |_| result)
        };
        let failed = open(&first, Err(LoadError::Refused("no luck".into())));
        assert!(matches!(failed, Err(LoadError::Refused(_))));
        assert_eq!(libraries.resident(), 0);
        assert!(open(&first, Ok(fake())).is_ok());
        let full = open(&second, Ok(fake()));
        assert!(matches!(full, Err(LoadError::TooManyLibraries { found: 1, limit: 1 })));
        assert!(open(&first, Err(LoadError::Refused("it is open".into()))).is_ok());
    }

    #[test]
    fn a_level_that_changes_while_a_library_is_opened_is_heard() {
        let libraries = libraries(8);
        let staged = staged(&libraries, "content");
        let opened = Opened::default();
        let open = |_: &Staged| {
            LEVEL.store(1, Ordering::SeqCst);
            // Doesn't wait for this opening for ever.
            libraries.attach_all(&opened);
            Ok(fake())
        };
        let library = libraries.open_once(&staged, &opened, &libraries.resident, open).unwrap();
        assert_eq!(*library.0.lock(), Some(LogLevel::Debug));
        LEVEL.store(0, Ordering::SeqCst);
        libraries.attach_all(&opened);
        assert_eq!(*library.0.lock(), Some(LogLevel::Info));
    }
}
