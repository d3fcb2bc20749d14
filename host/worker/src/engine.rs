//! The engine: plugins whose instances have processes of their own, beside those of the engine that opens them in this one.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use modalkit_engine::{
    Confinement, Engine, Isolation, LoadError, OpenTimings, Plugin, PluginLog, QueuePlugin, Staged,
};
use parking_lot::Mutex;

use crate::{
    instance::Listener,
    plugin::{Maker, WorkerPlugin},
    python::{self, Interpreter},
    start::Program,
};

/// An [`Engine`] that runs isolated plugins in worker processes, and leaves all else to another one.
pub struct Workers {
    in_process: Arc<dyn Engine>,
    program: Program,
    log: Option<PluginLog>,
    /// How long a plugin may take to be opened and described.
    limit: Duration,
    opened: Mutex<Vec<Weak<WorkerPlugin>>>,
    /// The worker of Python, once it is needed.
    package: Mutex<Option<Staged>>,
}

impl Workers {
    /// Beside this engine.
    #[must_use]
    pub fn new(
        in_process: Arc<dyn Engine>,
        program: Program,
        limit: Duration,
        log: Option<PluginLog>,
    ) -> Self {
        Self { in_process, program, log, limit, opened: Mutex::default(), package: Mutex::default() }
    }

    /// What runs a folder of Python.
    fn interpreter(&self, staged: &Staged, confinement: &Confinement) -> Result<Interpreter, LoadError> {
        let mut package = self.package.lock();
        let there = package.take().filter(|package| package.path().exists());
        let there = match there {
            Some(there) => there,
            None => python::put_package(&*self.in_process)?,
        };
        *package = Some(there.clone());
        drop(package);
        let interpreter = Interpreter::find(staged.origin(), &confinement.python, there)?;
        let (files, folders) = interpreter.used_in_place();
        self.in_process.trust(&files, &folders)?;
        Ok(interpreter)
    }

    fn find(&self, matches: impl Fn(&WorkerPlugin) -> bool) -> Option<Arc<WorkerPlugin>> {
        let mut opened = self.opened.lock();
        opened.retain(|plugin| plugin.strong_count() > 0);
        opened.iter().filter_map(Weak::upgrade).find(|plugin| matches(plugin))
    }
}

impl Engine for Workers {
    fn stage(&self, file: &Path) -> Result<Staged, LoadError> {
        self.in_process.stage(file)
    }

    fn is_whole(&self, file: &Path) -> io::Result<bool> {
        self.in_process.is_whole(file)
    }

    fn exports_queue(&self, staged: &Staged) -> io::Result<bool> {
        self.in_process.exports_queue(staged)
    }

    fn put(&self, name: &Path, files: &[(PathBuf, Vec<u8>)]) -> Result<Staged, LoadError> {
        self.in_process.put(name, files)
    }

    fn trust(&self, files: &[PathBuf], folders: &[PathBuf]) -> Result<(), LoadError> {
        self.in_process.trust(files, folders)
    }

    fn open(
        &self,
        staged: &Staged,
        isolation: &Isolation,
        timings: &mut OpenTimings,
    ) -> Result<Arc<dyn Plugin>, LoadError> {
        let is_python = staged.path().is_dir();
        if isolation.in_process && !is_python {
            return self.in_process.open(staged, isolation, timings);
        }
        let confinement = &isolation.confinement;
        // The same code in two folders is two plugins: each has its own environment, and data beside it.
        let interpreter = is_python.then(|| self.interpreter(staged, confinement)).transpose()?;
        if let Some(known) = self.find(|plugin| plugin.is(staged, confinement, interpreter.as_ref())) {
            return Ok(known);
        }
        let begun = Instant::now();
        let maker = Maker {
            program: self.program.clone(),
            log: self.log,
            confinement: confinement.clone(),
            interpreter,
        };
        let opened = WorkerPlugin::open(maker, staged, self.limit);
        timings.preflight = Some(begun.elapsed());
        let opened = Arc::new(opened?);
        self.opened.lock().push(Arc::downgrade(&opened));
        Ok(opened)
    }

    fn opened(&self, sha256: &str) -> Option<Arc<dyn Plugin>> {
        let isolated = self.find(|plugin| plugin.description().sha256() == sha256);
        isolated.map(|plugin| plugin as Arc<dyn Plugin>).or_else(|| self.in_process.opened(sha256))
    }

    fn resident(&self) -> usize {
        self.in_process.resident()
    }

    fn open_queue(&self, file: &Path, pin: Option<&str>) -> Result<Arc<dyn QueuePlugin>, LoadError> {
        self.in_process.open_queue(file, pin)
    }

    fn log_level_changed(&self) {
        self.in_process.log_level_changed();
        if let Some(log) = &self.log {
            Levels::tell(log);
        }
    }

    fn resident_bytes(&self, files: &[Staged]) -> u64 {
        self.in_process.resident_bytes(files)
    }

    fn lower_thread_priority(&self) {
        self.in_process.lower_thread_priority();
    }

    fn return_freed_memory(&self) {
        self.in_process.return_freed_memory();
    }

    fn close(&self) {
        self.in_process.close();
    }
}

/// Who hears of other levels of the log: every worker that serves.
pub(crate) struct Levels;

static LISTENERS: Mutex<Vec<Weak<dyn Listener>>> = Mutex::new(Vec::new());

impl Levels {
    pub(crate) fn add(listener: Weak<dyn Listener>) {
        let mut all = LISTENERS.lock();
        all.retain(|known| known.strong_count() > 0);
        all.push(listener);
    }

    fn tell(log: &PluginLog) {
        let level = (log.level)();
        LISTENERS.lock().iter().filter_map(Weak::upgrade).for_each(|listener| listener.hear(level));
    }
}
