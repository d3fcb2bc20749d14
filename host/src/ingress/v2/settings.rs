//! The log's level and the traces' sampling as Triton's clients read and change them. What is changed here is forgotten when the host ends.

use modalkit_engine::LogLevel;

use crate::{
    egress::Refusal,
    ingress::Context,
    insight::log,
    work::{Detail, JobError},
};

/// The log's settings; of a change, those that it names.
#[derive(Clone, Debug, Default, PartialEq)]
pub(in crate::ingress) struct LogSettings {
    pub(in crate::ingress) info: Option<bool>,
    pub(in crate::ingress) warning: Option<bool>,
    pub(in crate::ingress) error: Option<bool>,
    /// 1 for debug, 2 and more for everything.
    pub(in crate::ingress) verbose_level: Option<u64>,
}

/// Of a change, the settings of traces that it names. The one of no values goes back to the configured ones.
#[derive(Clone, Debug, Default, PartialEq)]
pub(in crate::ingress) struct TraceSettings {
    pub(in crate::ingress) level: Option<Vec<String>>,
    pub(in crate::ingress) rate: Option<Vec<String>>,
}

impl TraceSettings {
    /// The same with one more setting.
    ///
    /// # Errors
    /// There is no such setting, or it can't be changed.
    pub(in crate::ingress) fn with(mut self, name: &str, values: Vec<String>) -> Result<Self, Refusal> {
        let fixed = |expected| values.iter().try_for_each(|found| check_fixed(name, found, expected));
        match name {
            "trace_level" => self.level = Some(values),
            "trace_rate" => self.rate = Some(values),
            "trace_count" => fixed("-1")?,
            "log_frequency" => fixed("0")?,
            "trace_file" => fixed("")?,
            "trace_mode" => fixed("opentelemetry")?,
            _ => {
                let msg = format!("expected one of trace_level, trace_rate, found {name:?}");
                return Err(invalid_setting(name, msg));
            }
        }
        Ok(self)
    }
}

/// What is logged now.
pub(in crate::ingress) fn log_settings() -> LogSettings {
    of_level(log::default_level())
}

fn of_level(level: LogLevel) -> LogSettings {
    LogSettings {
        info: Some(level >= LogLevel::Info),
        warning: Some(level >= LogLevel::Warn),
        error: Some(level >= LogLevel::Error),
        verbose_level: Some(match level {
            LogLevel::Trace => 2,
            LogLevel::Debug => 1,
            _ => 0,
        }),
    }
}

/// The level at which all is logged that is wanted; a level brings with it what is more severe.
fn level_of(settings: &LogSettings) -> LogLevel {
    match settings {
        LogSettings { verbose_level: Some(2..), .. } => LogLevel::Trace,
        LogSettings { verbose_level: Some(1), .. } => LogLevel::Debug,
        LogSettings { info: Some(true), .. } => LogLevel::Info,
        LogSettings { warning: Some(true), .. } => LogLevel::Warn,
        LogSettings { error: Some(true), .. } => LogLevel::Error,
        _ => LogLevel::Off,
    }
}

/// The most that may be logged, where a change says of something that it isn't wanted: what is less severe isn't either.
fn most(change: &LogSettings) -> LogLevel {
    match change {
        LogSettings { error: Some(false), .. } => LogLevel::Off,
        LogSettings { warning: Some(false), .. } => LogLevel::Error,
        LogSettings { info: Some(false), .. } => LogLevel::Warn,
        LogSettings { verbose_level: Some(0), .. } => LogLevel::Info,
        LogSettings { verbose_level: Some(1), .. } => LogLevel::Debug,
        _ => LogLevel::Trace,
    }
}

/// Logs so from now on, until the configuration is applied again.
///
/// # Errors
/// The host is going away.
pub(in crate::ingress) async fn change_log(context: &Context, change: LogSettings) -> Result<(), Refusal> {
    let now = log_settings();
    let wanted = LogSettings {
        info: change.info.or(now.info),
        warning: change.warning.or(now.warning),
        error: change.error.or(now.error),
        verbose_level: change.verbose_level.or(now.verbose_level),
    };
    let level = level_of(&wanted).min(most(&change));
    if context.configuration.set_log_level(level).await {
        return Ok(());
    }
    Err(JobError::Unavailable("the server is shutting down".into()).into())
}

/// The settings of traces now, in the protocol's words.
pub(in crate::ingress) fn trace_settings(context: &Context) -> Vec<(&'static str, Vec<String>)> {
    let ratio = context.metrics.traces.sample_ratio().unwrap_or_default();
    let level = if ratio > 0.0 { "TIMESTAMPS" } else { "OFF" };
    // One of so many.
    let rate = if ratio > 0.0 { (1.0 / ratio).round() } else { 0.0 };
    vec![
        ("trace_level", vec![level.to_owned()]),
        ("trace_rate", vec![rate.to_string()]),
        ("trace_count", vec!["-1".to_owned()]),
        ("log_frequency", vec!["0".to_owned()]),
        ("trace_file", vec![String::new()]),
        ("trace_mode", vec!["opentelemetry".to_owned()]),
    ]
}

/// Samples requests so from now on.
///
/// # Errors
/// Spans go nowhere, or a setting is none.
pub(in crate::ingress) fn change_traces(context: &Context, change: &TraceSettings) -> Result<(), Refusal> {
    if change.level.is_none() && change.rate.is_none() {
        return Ok(());
    }
    let traces = &context.metrics.traces;
    if !traces.is_exporting() {
        return Err(invalid_setting(
            "trace_level",
            "expected a host that exports traces (server.traces)".into(),
        ));
    }
    let level = change.level.as_deref();
    match level {
        None | Some([]) => {}
        Some([off]) if off == "OFF" => {
            traces.set_sample_ratio(Some(0.0));
            return Ok(());
        }
        Some(levels) if levels.iter().all(|level| level == "TIMESTAMPS") => {}
        Some(found) => {
            return Err(invalid_setting(
                "trace_level",
                format!("expected TIMESTAMPS or OFF, found {found:?}"),
            ));
        }
    }
    let ratio = match change.rate.as_deref() {
        None if level.is_some_and(|level| !level.is_empty()) => {
            // It goes on as it was, or with every request where it was off.
            traces.sample_ratio().filter(|ratio| *ratio > 0.0).or(Some(1.0))
        }
        None | Some([]) => None,
        Some([_]) if level.is_none() && traces.sample_ratio() == Some(0.0) => {
            let expected = "expected trace_level TIMESTAMPS beside it, since nothing is traced";
            return Err(invalid_setting("trace_rate", expected.into()));
        }
        Some([rate]) => match rate.trim().parse::<u32>() {
            Ok(rate @ 1..) => Some(1.0 / f64::from(rate)),
            _ => {
                return Err(invalid_setting(
                    "trace_rate",
                    format!("expected a whole number above 0, found {rate:?}"),
                ));
            }
        },
        Some(found) => {
            return Err(invalid_setting("trace_rate", format!("expected one number, found {found:?}")));
        }
    };
    traces.set_sample_ratio(ratio);
    Ok(())
}

/// Something is wrong with a setting.
pub(in crate::ingress) fn invalid_setting(setting: &str, msg: String) -> Refusal {
    let loc = vec!["body".into(), setting.into()];
    JobError::Invalid(vec![Detail { loc, msg, kind: "value_error".into() }]).into()
}

/// A setting that can't be changed is told so, where it is said to be something else than it is.
///
/// # Errors
/// It is to be changed.
pub(in crate::ingress) fn check_fixed(setting: &str, found: &str, fixed: &str) -> Result<(), Refusal> {
    if found == fixed {
        return Ok(());
    }
    Err(invalid_setting(setting, format!("expected {fixed:?}, which can't be changed here, found {found:?}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_level_is_told_as_it_is_set() {
        for level in
            [LogLevel::Off, LogLevel::Error, LogLevel::Warn, LogLevel::Info, LogLevel::Debug, LogLevel::Trace]
        {
            assert_eq!(level_of(&of_level(level)), level);
        }
    }

    #[test]
    fn what_is_said_not_to_be_wanted_is_not_logged() {
        let no_info = LogSettings { info: Some(false), ..LogSettings::default() };
        let no_warning = LogSettings { warning: Some(false), ..LogSettings::default() };
        let no_error = LogSettings { error: Some(false), ..LogSettings::default() };
        let plain = LogSettings { verbose_level: Some(0), ..LogSettings::default() };
        assert_eq!(most(&no_info), LogLevel::Warn);
        assert_eq!(most(&no_warning), LogLevel::Error);
        assert_eq!(most(&no_error), LogLevel::Off);
        assert_eq!((most(&plain), most(&LogSettings::default())), (LogLevel::Info, LogLevel::Trace));
    }
}
