//! Single values: a default where nothing is written, else what is written, within its range.

use std::time::Duration;

use super::ConfigError;

pub(super) fn number(
    key: &str,
    found: Option<u64>,
    default: u64,
    least: u64,
    most: u64,
) -> Result<usize, ConfigError> {
    let value = found.unwrap_or(default);
    match usize::try_from(value) {
        Ok(fits) if (least..=most).contains(&value) => Ok(fits),
        _ => Err(ConfigError::Range {
            key: key.to_owned(),
            found: value.to_string(),
            expected: format!("a number from {least} to {most}"),
        }),
    }
}

pub(super) fn real(
    key: &str,
    found: Option<f64>,
    default: f64,
    least: f64,
    most: f64,
) -> Result<f64, ConfigError> {
    let value = found.unwrap_or(default);
    if (least..=most).contains(&value) {
        return Ok(value);
    }
    Err(ConfigError::Range {
        key: key.to_owned(),
        found: value.to_string(),
        expected: format!("a number from {least} to {most}"),
    })
}

pub(super) fn milliseconds(key: &str, found: Option<u64>, default: u64) -> Result<Duration, ConfigError> {
    Ok(Duration::from_millis(number(key, found, default, 1, 86_400_000)? as u64))
}

pub(super) fn seconds(key: &str, found: Option<f64>, default: f64) -> Result<Duration, ConfigError> {
    let value = found.unwrap_or(default);
    match Duration::try_from_secs_f64(value) {
        Ok(duration) if (0.001..=86_400.0).contains(&value) => Ok(duration),
        _ => Err(ConfigError::Range {
            key: key.to_owned(),
            found: value.to_string(),
            expected: "seconds from 0.001 to 86400".into(),
        }),
    }
}
