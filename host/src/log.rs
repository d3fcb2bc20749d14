//! The log: where its lines go, which levels are wanted now, and how a plugin's lines come into it. It never knows why something is
//! logged.

use std::io::IsTerminal;

use modalkit_loader::LogLevel;
use parking_lot::RwLock;
use tracing::{Level, level_filters::LevelFilter};
use tracing_subscriber::{
    filter::{ParseError, Targets},
    layer::SubscriberExt,
    reload,
    util::SubscriberInitExt,
};

/// Changes the log's levels while the host runs.
#[derive(Clone)]
pub struct LogLevels(reload::Handle<Targets, tracing_subscriber::Registry>);

/// The levels as they were said: lines of plugins are held against them by their own modules.
static LEVELS: RwLock<Option<Targets>> = RwLock::new(None);

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

/// Sends the log to standard error: for people on a terminal, as JSON lines otherwise.
///
/// # Errors
/// `levels` isn't a list of levels such as `info,modalkit=debug`.
pub fn install(levels: &str) -> Result<LogLevels, ParseError> {
    let levels: Targets = levels.parse()?;
    let (filter, handle) = reload::Layer::new(with_plugins(&levels));
    *LEVELS.write() = Some(levels);
    let people = std::io::stderr().is_terminal();
    let for_people = people.then(|| tracing_subscriber::fmt::layer().with_writer(std::io::stderr));
    let for_machines = (!people)
        .then(|| tracing_subscriber::fmt::layer().json().flatten_event(true).with_writer(std::io::stderr));
    tracing_subscriber::registry().with(filter).with(for_people).with(for_machines).init();
    Ok(LogLevels(handle))
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
    let all = levels.iter().map(|(_, level)| level).chain(levels.default_level());
    match all.max().unwrap_or(LevelFilter::OFF) {
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
