//! The kinds of values: their ranges and units, what is expected in their place, their schema. It knows no key.

mod secret;
mod tables;

use std::{path::PathBuf, time::Duration};

use modalkit_device::{NoPreference, Preference};
use serde_json::{Value as Json, json};
use tracing_subscriber::filter::{LevelFilter, Targets};

use super::{
    fault::{Place, listed, nearest},
    layer::{Reader, Setting},
    node::{Node, Value},
};

pub(in crate::config) use secret::{HIDDEN, Secret, Url};
pub(in crate::config) use tables::{FreeForm, Named, OneOrMany, Over};

/// A whole number within its range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::config) struct Count<const LEAST: u64, const MOST: u64>(pub(in crate::config) u64);

impl<const LEAST: u64, const MOST: u64> Setting for Count<LEAST, MOST> {
    fn expected() -> String {
        format!("a whole number from {LEAST} to {MOST}")
    }

    fn read(node: &Node, key: &str, reader: &mut Reader) -> Option<Self> {
        let opened = number(node, reader.lenient);
        let found = match opened.value {
            Value::Integer(found) => u64::try_from(found).ok(),
            // As JSON and YAML may write whole numbers.
            Value::Float(found) if found.fract() == 0.0 && (0.0..=2f64.powi(53)).contains(&found) => {
                Some(found as u64)
            }
            _ => None,
        };
        match found {
            Some(found) if (LEAST..=MOST).contains(&found) => Some(Self(found)),
            _ => reader.refuse_scalar(&opened, key, Self::expected()),
        }
    }

    fn json(&self, _: bool) -> Json {
        json!(self.0)
    }

    fn schema() -> Json {
        json!({"type": ["integer", "null"], "minimum": LEAST, "maximum": MOST})
    }
}

/// A variable's text is opened as JSON; in a lenient file a text that holds a number is one.
fn number(node: &Node, lenient: bool) -> Node {
    match &node.value {
        Value::Text(text) if lenient => match serde_json::from_str(text.trim()) {
            Ok(number @ Json::Number(_)) => Node::from_json(number, &node.at),
            _ => node.clone(),
        },
        _ => node.opened(),
    }
}

/// Declares a number with a fraction: its range, and what is expected in words.
macro_rules! real {
    ($(#[$doc:meta])* $name:ident, $range:expr, $expected:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq)]
        pub(in crate::config) struct $name(pub(in crate::config) f64);

        impl Setting for $name {
            fn expected() -> String {
                $expected.to_owned()
            }

            fn read(node: &Node, key: &str, reader: &mut Reader) -> Option<Self> {
                let opened = number(node, reader.lenient);
                let found = match opened.value {
                    Value::Integer(found) => found as f64,
                    Value::Float(found) => found,
                    _ => return reader.refuse_scalar(&opened, key, Self::expected()),
                };
                let fits: fn(f64) -> bool = $range;
                if fits(found) { Some(Self(found)) } else { reader.refuse_scalar(&opened, key, Self::expected()) }
            }

            fn json(&self, _: bool) -> Json {
                json!(self.0)
            }

            fn schema() -> Json {
                json!({"type": ["number", "null"], "$comment": $expected})
            }
        }
    };
}

/// How long an incomplete batch waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::config) enum BatchWaitMs {
    Milliseconds(u64),
    Adaptive,
}

const ADAPTIVE: &str = "adaptive";

impl BatchWaitMs {
    const MOST: u64 = 600_000;
}

impl Setting for BatchWaitMs {
    fn expected() -> String {
        format!("milliseconds, a whole number from 0 to {}, or \"{ADAPTIVE}\"", Self::MOST)
    }

    fn read(node: &Node, key: &str, reader: &mut Reader) -> Option<Self> {
        let opened = number(node, reader.lenient);
        let found = match &opened.value {
            Value::Text(text) if text == ADAPTIVE => return Some(Self::Adaptive),
            Value::Integer(found) => u64::try_from(*found).ok(),
            Value::Float(found) if found.fract() == 0.0 && *found >= 0.0 => Some(*found as u64),
            _ => None,
        };
        match found {
            Some(found) if found <= Self::MOST => Some(Self::Milliseconds(found)),
            _ => reader.refuse_scalar(&opened, key, Self::expected()),
        }
    }

    fn json(&self, _: bool) -> Json {
        match self {
            Self::Milliseconds(milliseconds) => json!(milliseconds),
            Self::Adaptive => json!(ADAPTIVE),
        }
    }

    fn schema() -> Json {
        json!({"anyOf": [{"type": ["integer", "null"], "minimum": 0, "maximum": Self::MOST}, {"const": ADAPTIVE}]})
    }
}

real! {
    /// A time.
    Seconds, |found| (0.001..=86_400.0).contains(&found), "seconds from 0.001 to 86400"
}
real! {
    /// A time that may be none.
    SecondsOrZero, |found| found == 0.0 || (0.001..=86_400.0).contains(&found), "0, or seconds from 0.001 to 86400"
}
real! {
    /// A period; the Python library says -1 for "only on change".
    Period, |found| found == -1.0 || (0.001..=86_400.0).contains(&found), "seconds from 0.001 to 86400, or -1: only on change"
}
real! {
    /// A part of a whole.
    Share, |found| (0.0..=1.0).contains(&found), "a share from 0 to 1"
}
real! {
    /// How many times as much.
    Ratio, |found| (1.0..=1e6).contains(&found), "a number from 1 to 1000000"
}
real! {
    /// A rate.
    PerSecond, |found| (0.001..=1e9).contains(&found), "a rate per second from 0.001 to 1000000000"
}
real! {
    /// Cores, memory and the like of a container.
    Amount, |found| (0.0..=1e12).contains(&found), "a number that is not negative"
}

impl Seconds {
    pub(in crate::config) fn duration(self) -> Duration {
        Duration::from_secs_f64(self.0)
    }
}

impl Setting for bool {
    fn expected() -> String {
        "true or false".to_owned()
    }

    fn read(node: &Node, key: &str, reader: &mut Reader) -> Option<Self> {
        let opened = node.opened();
        match &opened.value {
            Value::Bool(value) => Some(*value),
            // A variable has no truth values but in words.
            Value::Text(text) if reader.lenient || !matches!(node.at, Place::File { .. }) => {
                match text.to_ascii_lowercase().as_str() {
                    // As the Python library takes them.
                    "true" | "yes" | "on" | "1" => Some(true),
                    "false" | "no" | "off" | "0" => Some(false),
                    _ => reader.refuse_scalar(&opened, key, Self::expected()),
                }
            }
            _ => reader.refuse_scalar(&opened, key, Self::expected()),
        }
    }

    fn json(&self, _: bool) -> Json {
        json!(self)
    }

    fn schema() -> Json {
        json!({"type": ["boolean", "null"]})
    }
}

impl Setting for String {
    fn expected() -> String {
        "a text".to_owned()
    }

    fn read(node: &Node, key: &str, reader: &mut Reader) -> Option<Self> {
        node.text().or_else(|| reader.refuse(node, key, Self::expected()))
    }

    fn json(&self, _: bool) -> Json {
        json!(self)
    }

    fn schema() -> Json {
        json!({"type": ["string", "null"]})
    }
}

/// A folder; one that is written without its beginning lies in the working folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::config) struct Folder(pub(in crate::config) PathBuf);

impl Setting for Folder {
    fn expected() -> String {
        "the path of a folder".to_owned()
    }

    fn read(node: &Node, key: &str, reader: &mut Reader) -> Option<Self> {
        let absolute = node.text().and_then(|text| std::path::absolute(text).ok());
        absolute.map(Self).or_else(|| reader.refuse(node, key, Self::expected()))
    }

    fn json(&self, _: bool) -> Json {
        json!(self.0)
    }

    fn schema() -> Json {
        String::schema()
    }
}

/// Declares words of which one is expected.
macro_rules! choice {
    ($(#[$doc:meta])* $name:ident { $($variant:ident = $word:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(in crate::config) enum $name { $($variant),+ }

        impl Setting for $name {
            fn expected() -> String {
                format!("one of {}", listed([$(concat!("\"", $word, "\"")),+]))
            }

            fn read(node: &Node, key: &str, reader: &mut Reader) -> Option<Self> {
                let Some(text) = node.text() else { return reader.refuse(node, key, Self::expected()) };
                match text.as_str() {
                    $($word => Some(Self::$variant),)+
                    _ => {
                        reader.refuse::<Self>(node, key, Self::expected());
                        if let (Some(near), Some(fault)) = (nearest(&text, [$($word),+]), reader.faults.last_mut()) {
                            fault.hint = Some(format!("did you mean \"{near}\"?"));
                        }
                        None
                    }
                }
            }

            fn json(&self, _: bool) -> Json {
                match self { $(Self::$variant => json!($word)),+ }
            }

            fn schema() -> Json {
                json!({"enum": [$($word,)+ Json::Null]})
            }
        }
    };
}

choice! {
    /// How a volume is watched.
    Watch { Native = "native", Poll = "poll", Both = "both" }
}
choice! {
    /// What is put in place.
    MountKind { File = "file", Dir = "dir" }
}
choice! {
    /// What a bucket's store speaks.
    BucketProvider { S3 = "s3", Gcs = "gcs", Azure = "azure" }
}
choice! {
    /// Kinds of queues.
    QueueKind { Memory = "memory", Redis = "redis", Sqs = "sqs", TaskIq = "taskiq", Plugin = "plugin", Model = "model" }
}
choice! {
    /// What a new generation does where no device is free.
    ReloadGpu { Share = "share", Wait = "wait", StopFirst = "stop_first" }
}
choice! {
    /// Where a pipeline's code runs.
    IsolationKind { InProcess = "in-process", Process = "process" }
}
choice! {
    /// What a model does, for clients of OpenAI's API.
    TaskKind { Embedding = "embedding", Completion = "completion", Chat = "chat" }
}
choice! {
    /// What a queue is in Redis.
    RedisType { List = "list", Stream = "stream" }
}

impl QueueKind {
    /// The kind of this name.
    pub(in crate::config) fn of(name: &str) -> Option<Self> {
        [Self::Memory, Self::Redis, Self::Sqs, Self::TaskIq, Self::Plugin]
            .into_iter()
            .find(|kind| kind.json(true).as_str() == Some(name))
    }
}

/// An IP address and a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::config) struct Address(pub(in crate::config) std::net::SocketAddr);

impl Setting for Address {
    fn expected() -> String {
        "an IP address and a port, such as 127.0.0.1:8000 or [::1]:0".to_owned()
    }

    fn read(node: &Node, key: &str, reader: &mut Reader) -> Option<Self> {
        let address = node.text().and_then(|text| text.parse().ok());
        address.map(Self).or_else(|| reader.refuse(node, key, Self::expected()))
    }

    fn json(&self, _: bool) -> Json {
        json!(self.0)
    }

    fn schema() -> Json {
        json!({"type": ["string", "null"]})
    }
}

/// A device's name, and how many of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::config) struct Gpu(pub(in crate::config) Preference);

impl Setting for Gpu {
    fn expected() -> String {
        "a device such as \"A100\", two as \"H100:2\", or \"any\"".to_owned()
    }

    fn read(node: &Node, key: &str, reader: &mut Reader) -> Option<Self> {
        let Some(text) = node.text() else { return reader.refuse(node, key, Self::expected()) };
        match text.parse() {
            Ok(preference) => Some(Self(preference)),
            Err(NoPreference(expected)) => reader.refuse(node, key, expected),
        }
    }

    fn json(&self, _: bool) -> Json {
        json!(self.0.to_string())
    }

    fn schema() -> Json {
        json!({"type": ["string", "null"]})
    }
}

/// A SHA-256 in hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::config) struct Sha256(pub(in crate::config) String);

impl Setting for Sha256 {
    fn expected() -> String {
        "64 hexadecimal digits, as `sha256sum` prints them".to_owned()
    }

    fn read(node: &Node, key: &str, reader: &mut Reader) -> Option<Self> {
        let is_digest =
            |text: &String| text.len() == 64 && text.bytes().all(|digit| digit.is_ascii_hexdigit());
        match node.text().filter(is_digest) {
            Some(text) => Some(Self(text.to_ascii_lowercase())),
            None => reader.refuse(node, key, Self::expected()),
        }
    }

    fn json(&self, _: bool) -> Json {
        json!(self.0)
    }

    fn schema() -> Json {
        json!({"type": ["string", "null"], "pattern": "^[0-9A-Fa-f]{64}$"})
    }
}

/// Levels of the log: one for all, or by module.
#[derive(Clone, Debug, PartialEq)]
pub(in crate::config) struct Levels(pub(in crate::config) String);

impl Setting for Levels {
    fn expected() -> String {
        "off, error, warn, info, debug or trace, or a list such as info,modalkit=debug".to_owned()
    }

    fn read(node: &Node, key: &str, reader: &mut Reader) -> Option<Self> {
        let Some(text) = node.text() else { return reader.refuse(node, key, Self::expected()) };
        // A word alone would be taken for a module of which everything is logged.
        let is_level = |part: &str| part.contains('=') || part.trim().parse::<LevelFilter>().is_ok();
        if text.split(',').all(is_level) && text.parse::<Targets>().is_ok() {
            return Some(Self(text));
        }
        reader.refuse(node, key, Self::expected())
    }

    fn json(&self, _: bool) -> Json {
        json!(self.0)
    }

    fn schema() -> Json {
        json!({"type": ["string", "null"]})
    }
}
