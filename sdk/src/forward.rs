//! Carries what a plugin logs to the host: `tracing` events, `log` records and panics, with the model's name.
//!
//! A plugin has statics of its own, so its dispatcher, logger and panic hook are not the host's; this module installs
//! all three once a library and sends every line through the host's callback.

use std::{
    cell::RefCell,
    fmt::{self, Write as _},
    sync::{
        Once, OnceLock,
        atomic::{AtomicU32, Ordering},
    },
};

use modalkit_abi::{HostApiRef, LogLevel};
use tracing::{
    Event, Level, Metadata, Subscriber,
    field::{Field, Visit},
    level_filters::LevelFilter,
    span,
    subscriber::Interest,
};
use tracing_subscriber::{
    Layer, Registry,
    layer::{Context, SubscriberExt},
    registry::LookupSpan,
};

static PLUGIN: OnceLock<(&str, &str)> = OnceLock::new();
static HOST: OnceLock<HostApiRef> = OnceLock::new();
static LEVEL: AtomicU32 = AtomicU32::new(LogLevel::OFF.0);
static INSTALL: Once = Once::new();

thread_local! {
    static MODEL: RefCell<String> = const { RefCell::new(String::new()) };
}

pub(crate) fn set_plugin(name: &'static str, version: &'static str) {
    PLUGIN.get_or_init(|| (name, version));
}

/// Name and version of the plugin's crate.
pub(crate) fn plugin() -> (&'static str, &'static str) {
    PLUGIN.get().copied().unwrap_or_default()
}

/// Connects this library's log to the host, or changes its level.
pub(crate) fn attach(host: HostApiRef, level: LogLevel) {
    HOST.get_or_init(|| host);
    LEVEL.store(level.0, Ordering::Relaxed);
    INSTALL.call_once(|| {
        // Either may be taken already by a library the plugin uses; that one's choice stands.
        let _ = tracing::subscriber::set_global_default(Registry::default().with(ToHost));
        let _ = log::set_logger(&ToHost);
        std::panic::set_hook(Box::new(|panic| {
            let place = panic.location().map(ToString::to_string).unwrap_or_default();
            send(LogLevel::ERROR, "panic", &panic.payload_as_str().unwrap_or("a panic"), &place);
        }));
    });
    log::set_max_level(log_filter(level));
    tracing::callsite::rebuild_interest_cache();
}

/// Says which model this thread serves from here on. It stays said after the call: between calls the host's threads run
/// no code of this library that could log.
pub(crate) fn serving(model: &str) {
    MODEL.with_borrow_mut(|current| {
        if current != model {
            current.clear();
            current.push_str(model);
        }
    });
}

fn send(level: LogLevel, target: &str, message: &dyn fmt::Display, fields: &str) {
    let Some(host) = HOST.get() else { return };
    if level.0 > LEVEL.load(Ordering::Relaxed) {
        return;
    }
    let message = message.to_string();
    // The thread may be ending: then its model's name is gone, and the line goes without it.
    let mut model = MODEL.try_with(|model| model.borrow().clone()).unwrap_or_default();
    if model.is_empty() {
        // A thread of the plugin's own, which serves no model in particular.
        plugin().0.clone_into(&mut model);
    }
    let (model, message, fields) = (model.as_str(), message.as_str(), fields.trim_end());
    host.log()(level, model.into(), target.into(), message.into(), fields.into());
}

struct ToHost;

#[derive(Default)]
struct Text {
    message: String,
    fields: String,
}

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing to a `String` can't fail.
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.fields, "{name}={value:?} "),
        };
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for ToHost {
    fn register_callsite(&self, _: &'static Metadata<'static>) -> Interest {
        // The level can change at any time: ask each time, which costs one atomic load.
        Interest::sometimes()
    }

    fn enabled(&self, metadata: &Metadata<'_>, _: Context<'_, S>) -> bool {
        level_of(*metadata.level()).0 <= LEVEL.load(Ordering::Relaxed)
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(match LogLevel(LEVEL.load(Ordering::Relaxed)) {
            LogLevel::OFF => LevelFilter::OFF,
            LogLevel::ERROR => LevelFilter::ERROR,
            LogLevel::WARN => LevelFilter::WARN,
            LogLevel::INFO => LevelFilter::INFO,
            LogLevel::DEBUG => LevelFilter::DEBUG,
            _ => LevelFilter::TRACE,
        })
    }

    fn on_new_span(&self, attributes: &span::Attributes<'_>, id: &span::Id, context: Context<'_, S>) {
        let mut text = Text::default();
        attributes.record(&mut text);
        if let Some(span) = context.span(id) {
            span.extensions_mut().insert(text);
        }
    }

    fn on_record(&self, id: &span::Id, values: &span::Record<'_>, context: Context<'_, S>) {
        if let Some(span) = context.span(id)
            && let Some(text) = span.extensions_mut().get_mut::<Text>()
        {
            values.record(text);
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let mut text = Text::default();
        for span in context.event_scope(event).into_iter().flat_map(|scope| scope.from_root()) {
            if let Some(of_span) = span.extensions().get::<Text>() {
                text.fields.push_str(&of_span.fields);
            }
        }
        event.record(&mut text);
        send(level_of(*event.metadata().level()), event.metadata().target(), &text.message, &text.fields);
    }
}

impl log::Log for ToHost {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &log::Record<'_>) {
        let level = match record.level() {
            log::Level::Error => LogLevel::ERROR,
            log::Level::Warn => LogLevel::WARN,
            log::Level::Info => LogLevel::INFO,
            log::Level::Debug => LogLevel::DEBUG,
            log::Level::Trace => LogLevel::TRACE,
        };
        send(level, record.target(), record.args(), "");
    }

    fn flush(&self) {}
}

fn level_of(level: Level) -> LogLevel {
    match level {
        Level::ERROR => LogLevel::ERROR,
        Level::WARN => LogLevel::WARN,
        Level::INFO => LogLevel::INFO,
        Level::DEBUG => LogLevel::DEBUG,
        Level::TRACE => LogLevel::TRACE,
    }
}

fn log_filter(level: LogLevel) -> log::LevelFilter {
    match level {
        LogLevel::OFF => log::LevelFilter::Off,
        LogLevel::ERROR => log::LevelFilter::Error,
        LogLevel::WARN => log::LevelFilter::Warn,
        LogLevel::INFO => log::LevelFilter::Info,
        LogLevel::DEBUG => log::LevelFilter::Debug,
        _ => log::LevelFilter::Trace,
    }
}
