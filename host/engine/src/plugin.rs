//! Where pipelines come from: engines, and the plugins that they open.

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use crate::{Decoded, Failure, Instance, Isolation, LoadError, Payload, QueuePlugin, Rejection, Staged};

/// Log levels, the most severe first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum LogLevel {
    /// Nothing is logged.
    Off,
    /// Errors.
    Error,
    /// Warnings.
    Warn,
    /// What an operator wants to know.
    Info,
    /// What a developer wants to know.
    Debug,
    /// Everything.
    Trace,
}

/// Where lines go that plugins log.
#[derive(Clone, Copy, Debug)]
pub struct PluginLog {
    /// The least severe lines that are wanted now.
    pub level: fn() -> LogLevel,
    /// Takes a line: its level, model (else plugin), target, message and fields.
    pub sink: fn(LogLevel, &str, &str, &str, &str),
}

/// How long the steps of an opening took, as far as it came; nothing where the content was open already.
#[derive(Clone, Copy, Debug, Default)]
pub struct OpenTimings {
    /// The trial in a process of its own.
    pub preflight: Option<Duration>,
    /// The opening itself.
    pub open: Option<Duration>,
}

/// Takes the files of one kind of plugins. Everything here is blocking, but for [`Engine::opened`] and [`Engine::resident`].
pub trait Engine: Send + Sync {
    /// Makes a private copy; the same content gives the same copy.
    ///
    /// # Errors
    /// The file can't be read, somebody else could have changed it, or the copy can't be written.
    fn stage(&self, file: &Path) -> Result<Staged, LoadError>;

    /// Whether a file looks as if its writer were done with it.
    ///
    /// # Errors
    /// It can't be read.
    fn is_whole(&self, file: &Path) -> io::Result<bool>;

    /// Whether a copy is a queue's plugin, and no pipeline's.
    ///
    /// # Errors
    /// It can't be read.
    fn exports_queue(&self, staged: &Staged) -> io::Result<bool>;

    /// Puts files of the program's own where copies are; `name` says for what.
    ///
    /// # Errors
    /// They can't be written.
    fn put(&self, name: &Path, files: &[(PathBuf, Vec<u8>)]) -> Result<Staged, LoadError>;

    /// Asks of files and of folders, which are used where they lie and not copied, whether they are to be trusted as a plugin is: all that is in them,
    /// and the way to it.
    ///
    /// # Errors
    /// [`LoadError::Untrusted`] for what somebody else could change, or what can't be looked at.
    fn trust(&self, files: &[PathBuf], folders: &[PathBuf]) -> Result<(), LoadError>;

    /// Opens a copy, or finds its content opened: tries it in a process of its own first, since opening it may run its code.
    ///
    /// # Errors
    /// It is no plugin of a pipeline that this host can run, or as many are open as may be, or this engine doesn't isolate like this.
    fn open(
        &self,
        staged: &Staged,
        isolation: &Isolation,
        timings: &mut OpenTimings,
    ) -> Result<Arc<dyn Plugin>, LoadError>;

    /// The plugin with this content, where it is open.
    fn opened(&self, sha256: &str) -> Option<Arc<dyn Plugin>>;

    /// Plugins of pipelines that take up room in this process until it ends: open, or about to be.
    fn resident(&self) -> usize;

    /// Copies and opens a queue's plugin, or finds its content opened; where a SHA-256 is given, only a file that has it.
    ///
    /// # Errors
    /// As [`Engine::stage`] and [`Engine::open`], or the file has another SHA-256.
    fn open_queue(&self, file: &Path, pin: Option<&str>) -> Result<Arc<dyn QueuePlugin>, LoadError>;

    /// Has every plugin hear that other lines of it are wanted than before.
    fn log_level_changed(&self);

    /// Bytes of this process's memory that opened files keep until it ends; 0 where the kernel doesn't say. Some milliseconds.
    fn resident_bytes(&self, files: &[Staged]) -> u64;

    /// Lets threads that answer callers run before the calling one, from here on and for good. No plugin may start threads of its own on
    /// such a thread: they would inherit that.
    fn lower_thread_priority(&self);

    /// Gives memory back to the system that was freed: a version of a model has ended.
    fn return_freed_memory(&self);

    /// Removes every private copy; what is open stays so.
    fn close(&self);
}

/// What a plugin says of itself, and what it was made of.
#[derive(Clone, Debug)]
pub struct Description {
    /// The plugin's name.
    pub name: String,
    /// The plugin's version.
    pub version: String,
    /// The boundary that it was built for, as `5.0`.
    pub abi: String,
    /// The version of the SDK that it was made with.
    pub sdk: String,
    /// The compiler of that SDK.
    pub rustc: String,
    /// Whether it was built for debugging: it is many times slower then.
    pub has_debug_assertions: bool,
    /// JSON Schema of one input.
    pub input_schema: String,
    /// JSON Schema of one output.
    pub output_schema: String,
    /// JSON Schema of the model's own keys.
    pub settings_schema: String,
    /// The private copy.
    pub staged: Staged,
}

impl Description {
    /// SHA-256 of the file, in hexadecimal.
    #[must_use]
    pub fn sha256(&self) -> &str {
        self.staged.sha256()
    }
}

/// What a pipeline is loaded with.
pub struct Load<'a> {
    /// The model's name.
    pub model_name: &'a str,
    /// The folder that holds every model's data.
    pub all_model_data_folder: &'a str,
    /// What all models have in common: a JSON object.
    pub common_settings: &'a str,
    /// The application's name and settings, for pipelines that are made to ask for them: a JSON object.
    pub application: &'a str,
    /// The model's own keys: a JSON object.
    pub settings: &'a str,
    /// Secrets by name.
    pub secrets: &'a BTreeMap<String, String>,
    /// The devices that it is given.
    pub devices: &'a [Device<'a>],
    /// Where it is written how the plugin's code ended the process, should it do that.
    pub crash_note: Option<&'a File>,
    /// Batches that will run at once, at least 1.
    pub batches_in_flight: usize,
    /// How long it may take; held to where the load can be ended, and else by whoever waits for it.
    pub limit: Duration,
}

/// A device that an instance is given.
#[derive(Clone, Copy, Debug)]
pub struct Device<'a> {
    /// Its number in this process, as CUDA counts.
    pub ordinal: u32,
    /// As its maker calls it.
    pub name: &'a str,
    /// Its own for ever.
    pub uuid: &'a str,
    /// Bytes of all of its memory.
    pub memory_bytes: u64,
    /// Bytes that the instance may use; `None` for all.
    pub memory_budget_bytes: Option<u64>,
}

/// An opened plugin of a pipeline.
pub trait Plugin: Send + Sync {
    /// What it says of itself.
    fn description(&self) -> &Description;

    /// Says whether a JSON object is what the pipeline takes as a model's own keys.
    ///
    /// # Errors
    /// Why it isn't.
    fn check_settings(&self, settings: &str) -> Result<(), Failure>;

    /// Whether its instances run in processes of their own, by [`Instance::process`].
    fn is_isolated(&self) -> bool {
        false
    }

    /// Whether inputs may differ in what they cost, or in shape.
    fn measures_inputs(&self) -> bool {
        true
    }

    /// How many batches an instance runs at once at most; `None` for any number.
    fn batches_at_once(&self) -> Option<usize> {
        None
    }

    /// Builds a pipeline and warms it up; takes as long as the author's `load` and `warmup`.
    ///
    /// # Errors
    /// What these said.
    fn load(&self, with: &Load<'_>) -> Result<Box<dyn Instance>, Failure>;

    /// Parses one input, without an instance that would validate it.
    ///
    /// # Errors
    /// Why the input isn't one.
    fn decode(&self, payload: &Payload) -> Result<Decoded, Rejection>;
}
