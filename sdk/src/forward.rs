//! Carries what a plugin logs to the host: `tracing` events, `log` records and panics, with the model's name.
//!
//! A plugin has statics of its own, so its dispatcher, logger and panic hook are not the host's; this module installs
//! all three once a library and sends every line through the host's callback.

use std::{
    cell::RefCell,
    fmt::{self, Write as _},
    sync::{
        Once, OnceLock,
        atomic::{AtomicU8, Ordering},
    },
};

use modalkit_abi::{HostApi, LogLevel, LogRecord};
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
static HOST: OnceLock<HostApi> = OnceLock::new();
static LEVEL: AtomicU8 = AtomicU8::new(LogLevel::Off as u8);
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
pub(crate) fn attach(host: HostApi) {
    HOST.get_or_init(|| host);
    LEVEL.store(host.level as u8, Ordering::Relaxed);
    INSTALL.call_once(|| {
        // Either may be taken already by a library the plugin uses; that one's choice stands.
        let _ = tracing::subscriber::set_global_default(Registry::default().with(ToHost));
        let _ = log::set_logger(&ToHost);
        std::panic::set_hook(Box::new(|panic| {
            let place = panic.location().map(ToString::to_string).unwrap_or_default();
            send(LogLevel::Error, "panic", &panic.payload_as_str().unwrap_or("a panic"), &place);
        }));
    });
    log::set_max_level(log_filter(host.level));
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
    if level as u8 > LEVEL.load(Ordering::Relaxed) {
        return;
    }
    let message = message.to_string();
    // The thread may be ending: then its model's name is gone, and the line goes without it.
    let mut model = MODEL.try_with(|model| model.borrow().clone()).unwrap_or_default();
    if model.is_empty() {
        // A thread of the plugin's own, which serves no model in particular.
        plugin().0.clone_into(&mut model);
    }
    (host.log)(&LogRecord {
        level,
        model: model.as_str().into(),
        target: target.into(),
        message: message.as_str().into(),
        fields: fields.trim_end().into(),
    });
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
        level_of(*metadata.level()) as u8 <= LEVEL.load(Ordering::Relaxed)
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(match LEVEL.load(Ordering::Relaxed) {
            0 => LevelFilter::OFF,
            1 => LevelFilter::ERROR,
            2 => LevelFilter::WARN,
            3 => LevelFilter::INFO,
            4 => LevelFilter::DEBUG,
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
            log::Level::Error => LogLevel::Error,
            log::Level::Warn => LogLevel::Warn,
            log::Level::Info => LogLevel::Info,
            log::Level::Debug => LogLevel::Debug,
            log::Level::Trace => LogLevel::Trace,
        };
        send(level, record.target(), record.args(), "");
    }

    fn flush(&self) {}
}

fn level_of(level: Level) -> LogLevel {
    match level {
        Level::ERROR => LogLevel::Error,
        Level::WARN => LogLevel::Warn,
        Level::INFO => LogLevel::Info,
        Level::DEBUG => LogLevel::Debug,
        Level::TRACE => LogLevel::Trace,
    }
}

fn log_filter(level: LogLevel) -> log::LevelFilter {
    match level {
        LogLevel::Off => log::LevelFilter::Off,
        LogLevel::Error => log::LevelFilter::Error,
        LogLevel::Warn => log::LevelFilter::Warn,
        LogLevel::Info => log::LevelFilter::Info,
        LogLevel::Debug => log::LevelFilter::Debug,
        LogLevel::Trace => log::LevelFilter::Trace,
    }
}
