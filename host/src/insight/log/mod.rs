//! The log: where its lines go, which levels are wanted now, and how a plugin's lines come into it. It never knows why something is
//! logged.

mod sink;

use std::{
    backtrace::{Backtrace, BacktraceStatus},
    io::{self, BufRead, Read, Write},
    panic,
    sync::OnceLock,
    thread,
};

use modalkit_engine::LogLevel;
use parking_lot::RwLock;
use tracing::{Level, level_filters::LevelFilter};
use tracing_subscriber::{
    filter::{ParseError, Targets},
    fmt,
    layer::SubscriberExt,
    reload,
    util::SubscriberInitExt,
};

use sink::{Form, Sink};

/// Changes the log's levels while the host runs.
#[derive(Clone)]
pub struct LogLevels(reload::Handle<Targets, tracing_subscriber::Registry>);

/// The levels as they were said: lines of plugins are held against them by their own modules.
static LEVELS: RwLock<Option<Targets>> = RwLock::new(None);

/// What stands where other lines of plugins have their module.
const STDOUT: &str = "stdout";
/// Bytes of a line that is printed; what is longer becomes several.
const PRINTED_BYTES_MAX: u64 = 16 << 10;

/// What the audit log is logged under.
pub const AUDIT_TARGET: &str = "modalkit::audit";
/// What lines of plugins are logged under here.
const PLUGIN_TARGET: &str = "plugin";

impl LogLevels {
    /// Logs at these levels from now on; levels that are none change nothing. Plugins are told by [`plugin_level`].
    pub fn set(&self, levels: &str) {
        if let Ok(levels) = levels.parse::<Targets>() {
            // It fails where the subscriber is gone, and then nobody logs.
            let _ = self.0.reload(with_plugins(&levels));
            *LEVELS.write() = Some(levels);
        }
    }
}

impl LogLevels {
    /// Logs at this level from now on what has no level of its own, and what the audit log says at least.
    pub fn set_default(&self, level: LogLevel) {
        let level = match level {
            LogLevel::Off => LevelFilter::OFF,
            LogLevel::Error => LevelFilter::ERROR,
            LogLevel::Warn => LevelFilter::WARN,
            LogLevel::Info => LevelFilter::INFO,
            LogLevel::Debug => LevelFilter::DEBUG,
            LogLevel::Trace => LevelFilter::TRACE,
        };
        let said = LEVELS.read().clone().unwrap_or_default();
        // Whoever changes this over the network doesn't hide from the audit log, nor what anybody does after that.
        let audit = Targets::new().with_target(AUDIT_TARGET, LevelFilter::INFO);
        let own = said.iter().map(|(target, level)| (target.to_owned(), level));
        let levels = audit.with_targets(own.collect::<Vec<_>>()).with_default(level);
        let _ = self.0.reload(with_plugins(&levels));
        *LEVELS.write() = Some(levels);
    }
}

/// The lines of this process, once it serves.
static SINK: OnceLock<&Sink> = OnceLock::new();

/// The thread that writes to standard error; dropped, it gives what was logged a last moment to be written.
pub struct Log(&'static Sink);

/// From now on nobody waits for whoever reads standard error, and panics are logged.
///
/// # Errors
/// The thread that writes can't be started.
pub fn start() -> io::Result<Log> {
    let sink: &'static Sink = Box::leak(Box::new(Sink::of_stderr()));
    // Known once somebody writes: until then all goes out at once.
    sink.start()?;
    let sink = SINK.get_or_init(|| sink);
    panic::set_hook(Box::new(|panicked| {
        tell_of_panic(panicked);
        // It may be one that aborts.
        sink.flush();
    }));
    Ok(Log(sink))
}

impl Log {
    /// Sends the log to standard error: for people on a terminal, as JSON lines otherwise.
    ///
    /// # Errors
    /// `levels` isn't a list of levels such as `info,modalkit=debug`.
    pub fn install(&self, levels: &str) -> Result<LogLevels, ParseError> {
        let levels: Targets = levels.parse()?;
        let (filter, handle) = reload::Layer::new(with_plugins(&levels));
        *LEVELS.write() = Some(levels);
        let for_people = (self.0.form() == Form::Text).then(|| layer().with_writer(self.0));
        let for_machines =
            (self.0.form() == Form::Json).then(|| layer().json().flatten_event(true).with_writer(self.0));
        tracing_subscriber::registry().with(filter).with(for_people).with(for_machines).init();
        Ok(LogLevels(handle))
    }
}

impl Log {
    /// Takes what is printed to standard output from here on into the log, line by line: plugins print there, and among lines of JSON
    /// nobody could read it.
    ///
    /// # Errors
    /// The system gives no pipe or no thread.
    pub fn take_standard_output(&self) -> io::Result<()> {
        let (reader, writer) = io::pipe()?;
        rustix::stdio::dup2_stdout(&writer)?;
        let read_on = move || {
            let mut reader = io::BufReader::new(reader);
            let mut line = Vec::new();
            // The pipe's other end is this process's standard output: it ends with the process.
            while let Ok(1..) = reader.by_ref().take(PRINTED_BYTES_MAX).read_until(b'\n', &mut line) {
                let text = String::from_utf8_lossy(line.trim_ascii_end());
                let levels = LEVELS.read().clone();
                let wanted = levels.is_some_and(|levels| levels.would_enable(STDOUT, &Level::INFO));
                if wanted && !text.is_empty() {
                    tracing::info!(target: PLUGIN_TARGET, from = STDOUT, "{text}");
                }
                line.clear();
            }
        };
        thread::Builder::new().name("stdout".into()).spawn(read_on).map(drop)
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        self.0.flush();
    }
}

/// Formats lines. What it has to say itself would be written at once, and could block.
fn layer<S>() -> fmt::Layer<S> {
    fmt::layer().log_internal_errors(false)
}

/// Writes what is no line of the log to standard error: by the log's thread where there is one, at once otherwise.
pub fn say(text: &str) {
    match SINK.get() {
        Some(sink) => sink.push(text.as_bytes()),
        // There is no place but this.
        None => drop(io::stderr().lock().write_all(text.as_bytes())),
    }
}

/// Lines that were dropped because standard error was not read.
#[must_use]
pub fn lines_dropped() -> u64 {
    SINK.get().map_or(0, |sink| sink.dropped())
}

/// In place of the standard library's own lines, which it writes to standard error at once.
fn tell_of_panic(panicked: &panic::PanicHookInfo<'_>) {
    let message = panicked.payload_as_str().unwrap_or("a value that is no text");
    let place = panicked.location().map(ToString::to_string).unwrap_or_default();
    let backtrace = Backtrace::capture();
    let backtrace = (backtrace.status() == BacktraceStatus::Captured).then(|| backtrace.to_string());
    let thread = thread::current().name().unwrap_or("unnamed").to_owned();
    if !tracing::dispatcher::has_been_set() {
        // The levels aren't known yet.
        return say(&format!("error: the thread {thread} panicked at {place}: {message}\n"));
    }
    tracing::error!(place, thread, backtrace, "panicked: {message}");
}

/// The least severe level at which everything is logged for which no level of its own was said.
#[must_use]
pub fn default_level() -> LogLevel {
    let default = LEVELS.read().as_ref().and_then(Targets::default_level);
    default.map_or(LogLevel::Off, engine_level)
}

/// Lines of plugins have been held against the levels before they come here.
fn with_plugins(levels: &Targets) -> Targets {
    levels.clone().with_target(PLUGIN_TARGET, LevelFilter::TRACE)
}

/// The least severe level that plugins need to send.
#[must_use]
pub fn plugin_level() -> LogLevel {
    let levels = LEVELS.read();
    let Some(levels) = levels.as_ref() else { return LogLevel::Off };
    // No plugin writes the audit log.
    let own = levels.iter().filter(|(target, _)| *target != AUDIT_TARGET);
    let all = own.map(|(_, level)| level).chain(levels.default_level());
    engine_level(all.max().unwrap_or(LevelFilter::OFF))
}

fn engine_level(level: LevelFilter) -> LogLevel {
    match level {
        LevelFilter::OFF => LogLevel::Off,
        LevelFilter::ERROR => LogLevel::Error,
        LevelFilter::WARN => LogLevel::Warn,
        LevelFilter::INFO => LogLevel::Info,
        LevelFilter::DEBUG => LogLevel::Debug,
        LevelFilter::TRACE => LogLevel::Trace,
    }
}

/// Takes a line of a plugin's into the host's log.
pub fn plugin_line(level: LogLevel, model: &str, target: &str, message: &str, fields: &str) {
    let wanted =
        |level: Level| LEVELS.read().as_ref().is_some_and(|levels| levels.would_enable(target, &level));
    macro_rules! line {
        ($event:ident) => {
            tracing::$event!(target: PLUGIN_TARGET, model, from = target, fields, "{message}")
        };
    }
    match level {
        LogLevel::Error if wanted(Level::ERROR) => line!(error),
        LogLevel::Warn if wanted(Level::WARN) => line!(warn),
        LogLevel::Info if wanted(Level::INFO) => line!(info),
        LogLevel::Debug if wanted(Level::DEBUG) => line!(debug),
        LogLevel::Trace if wanted(Level::TRACE) => line!(trace),
        _ => {}
    }
}
