//! What a model asks for: which device, how many of them, and how much of their memory. Pure.

use std::{fmt, str::FromStr};

/// The word for "whichever there is".
const ANY: &str = "any";
/// The most devices that one replica may ask for.
const COUNT_MAX: usize = 64;

/// What one replica of a model asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The best first. Never empty.
    pub preferences: Vec<Preference>,
    /// Mebibytes of each device, which others may share then; `None` for whole devices.
    pub memory_mb: Option<u64>,
}

/// Devices that would do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Preference {
    /// What the device's name must contain; `None` for any device.
    pub name: Option<String>,
    /// How many of them, 1 or more.
    pub count: usize,
}

impl Preference {
    /// Whether a device of this name would do: each word that is asked for stands in it, in this order. Words are letters and
    /// digits, in either case: `A100` is `NVIDIA A100-SXM4-80GB`, as is `A100-80GB`, and `L4` is not `NVIDIA L40S`.
    #[must_use]
    pub fn fits(&self, device: &str) -> bool {
        let Some(name) = &self.name else { return true };
        let mut found = words(device);
        words(name).all(|wanted| found.any(|word| word.eq_ignore_ascii_case(wanted)))
    }
}

fn words(name: &str) -> impl Iterator<Item = &str> {
    name.split(|letter: char| !letter.is_alphanumeric()).filter(|word| !word.is_empty())
}

/// Why a text names no device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct NoPreference(
    /// What was expected.
    pub String,
);

impl FromStr for Preference {
    type Err = NoPreference;

    /// Reads `any`, a part of a device's name, or either with the number of devices behind a colon.
    fn from_str(text: &str) -> Result<Self, NoPreference> {
        let (name, count) = match text.rsplit_once(':') {
            Some((name, count)) => match count.trim().parse() {
                Ok(count) if (1..=COUNT_MAX).contains(&count) => (name, count),
                _ => {
                    return Err(NoPreference(format!(
                        "a number of devices from 1 to {COUNT_MAX} behind the colon"
                    )));
                }
            },
            None => (text, 1),
        };
        let name = name.trim();
        if words(name).next().is_none() {
            return Err(NoPreference("a device's name, such as \"A100\", or \"any\"".to_owned()));
        }
        let name = (!name.eq_ignore_ascii_case(ANY)).then(|| name.to_owned());
        Ok(Self { name, count })
    }
}

impl fmt::Display for Preference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name.as_deref().unwrap_or(ANY))?;
        if self.count > 1 {
            write!(f, ":{}", self.count)?;
        }
        Ok(())
    }
}

impl fmt::Display for Wanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (place, preference) in self.preferences.iter().enumerate() {
            let or = if place == 0 { "" } else { " or " };
            write!(f, "{or}{preference}")?;
        }
        match self.memory_mb {
            Some(memory) => write!(f, " with {memory} MiB"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fits(wanted: &str, device: &str) -> bool {
        wanted.parse::<Preference>().unwrap().fits(device)
    }

    #[test]
    fn names_are_found_by_their_words() {
        for (wanted, device) in [
            ("A100", "NVIDIA A100-SXM4-80GB"),
            ("a100-80gb", "NVIDIA A100-SXM4-80GB"),
            ("H100", "NVIDIA H100 80GB HBM3"),
            ("RTX 4090", "NVIDIA GeForce RTX 4090"),
            ("any", "NVIDIA L4"),
            ("ANY:2", "NVIDIA L4"),
            ("L4:2", "NVIDIA L4"),
        ] {
            assert!(fits(wanted, device), "{wanted} is {device}");
        }
        for (wanted, device) in [
            ("L4", "NVIDIA L40S"),
            ("A10", "NVIDIA A100-SXM4-80GB"),
            ("80GB-A100", "NVIDIA A100-SXM4-80GB"),
            ("H200", "NVIDIA H100 80GB HBM3"),
        ] {
            assert!(!fits(wanted, device), "{wanted} is not {device}");
        }
    }

    #[test]
    fn what_names_no_device_is_told() {
        for text in ["", " ", ":2", "A100:", "A100:0", "A100:65", "A100:two", "--"] {
            assert!(text.parse::<Preference>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn it_is_printed_as_it_is_written() {
        let wanted = Wanted {
            preferences: vec!["H100:2".parse().unwrap(), "any".parse().unwrap()],
            memory_mb: Some(4096),
        };
        assert_eq!(wanted.to_string(), "H100:2 or any with 4096 MiB");
    }
}
