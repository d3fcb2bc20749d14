//! The kinds of values: their ranges and units, what is expected in their place, their schema. It knows no key.

use std::{collections::BTreeMap, fmt, time::Duration};

use serde_json::{Value as Json, json};
use tracing_subscriber::filter::{LevelFilter, Targets};

use super::{
    fault::{Place, Warning, listed, nearest},
    layer::{Reader, Row, Setting, child},
    node::{Entry, Node, Value},
};

/// A whole number within its range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Count<const LEAST: u64, const MOST: u64>(pub(super) u64);

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
        pub(super) struct $name(pub(super) f64);

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
    pub(super) fn duration(self) -> Duration {
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
            Value::Text(text) if reader.lenient => match text.to_ascii_lowercase().as_str() {
                // As the Python library takes them.
                "true" | "yes" | "on" | "1" => Some(true),
                "false" | "no" | "off" | "0" => Some(false),
                _ => reader.refuse_scalar(&opened, key, Self::expected()),
            },
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
        match &node.value {
            Value::Text(text) => Some(text.clone()),
            // JSON in quotes is the text in them.
            Value::Variable(text) => Some(serde_json::from_str(text).unwrap_or_else(|_| text.clone())),
            _ => reader.refuse(node, key, Self::expected()),
        }
    }

    fn json(&self, _: bool) -> Json {
        json!(self)
    }

    fn schema() -> Json {
        json!({"type": ["string", "null"]})
    }
}

/// What stands for a secret wherever settings are shown.
pub(super) const HIDDEN: &str = "(hidden)";

/// A text that is nobody's business.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Secret(pub(super) String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(HIDDEN)
    }
}

impl Setting for Secret {
    fn expected() -> String {
        "a text that is not empty, without blanks at its ends".to_owned()
    }

    fn read(node: &Node, key: &str, reader: &mut Reader) -> Option<Self> {
        let found = match &node.value {
            Value::Text(text) => text.clone(),
            Value::Variable(text) => serde_json::from_str(text).unwrap_or_else(|_| text.clone()),
            _ => {
                reader.faults.push(super::Fault::new(&node.at, key, Self::expected(), node.kind()));
                return None;
            }
        };
        let what = match found.as_str() {
            HIDDEN => "what `modalkit check` shows in the place of a secret",
            "" => "an empty text",
            text if text.trim() != text => "a text with blanks at its ends",
            _ => return Some(Self(found)),
        };
        reader.faults.push(super::Fault::new(&node.at, key, Self::expected(), what));
        None
    }

    fn json(&self, _: bool) -> Json {
        json!(HIDDEN)
    }

    fn schema() -> Json {
        json!({"type": ["string", "null"], "writeOnly": true})
    }
}

/// The address of a broker, which may hold a password.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Url(pub(super) String);

impl Url {
    /// Without the password.
    fn shown(&self) -> String {
        let Some((scheme, rest)) = self.0.split_once("://") else { return self.0.clone() };
        let authority = rest.split('/').next().unwrap_or_default();
        match authority.rsplit_once('@') {
            Some((user, _)) if user.contains(':') => {
                let name = user.split(':').next().unwrap_or_default();
                format!("{scheme}://{name}:{HIDDEN}{}", &rest[user.len()..])
            }
            _ => self.0.clone(),
        }
    }
}

impl fmt::Debug for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.shown())
    }
}

impl Setting for Url {
    fn expected() -> String {
        "an address such as memory:// or redis://127.0.0.1:6379".to_owned()
    }

    fn read(node: &Node, key: &str, reader: &mut Reader) -> Option<Self> {
        let text = match &node.value {
            Value::Text(text) | Value::Variable(text) => text,
            _ => return reader.refuse(node, key, Self::expected()),
        };
        match text.split_once("://") {
            Some((scheme, _)) if !scheme.is_empty() => Some(Self(text.clone())),
            _ => {
                reader.faults.push(super::Fault::new(&node.at, key, Self::expected(), "a text without ://"));
                None
            }
        }
    }

    fn json(&self, _: bool) -> Json {
        json!(self.shown())
    }

    fn schema() -> Json {
        json!({"type": ["string", "null"]})
    }
}

impl<T: Setting> Setting for Vec<T> {
    fn expected() -> String {
        format!("a list, of which each is {}", T::expected())
    }

    fn read(node: &Node, key: &str, reader: &mut Reader) -> Option<Self> {
        let opened = node.opened();
        let Value::List(list) = &opened.value else { return reader.refuse(&opened, key, Self::expected()) };
        let read = |(index, item): (usize, &Node)| T::read(item, &format!("{key}[{index}]"), reader);
        // Each that is wrong is told.
        let items: Vec<Option<T>> = list.iter().enumerate().map(read).collect();
        items.into_iter().collect()
    }

    fn json(&self, defaults: bool) -> Json {
        self.iter().map(|item| item.json(defaults)).collect()
    }

    fn schema() -> Json {
        json!({"type": ["array", "null"], "items": T::schema()})
    }
}

/// One, or a list of them.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct OneOrMany<T>(pub(super) Vec<T>, bool);

impl<T: Setting> Setting for OneOrMany<T> {
    fn expected() -> String {
        format!("{}, or a list of such", T::expected())
    }

    fn read(node: &Node, key: &str, reader: &mut Reader) -> Option<Self> {
        match node.opened().value {
            Value::List(_) => Some(Self(Vec::read(node, key, reader)?, true)),
            Value::Map(_) => reader.refuse(&node.opened(), key, Self::expected()),
            _ => Some(Self(vec![T::read(node, key, reader)?], false)),
        }
    }

    fn json(&self, defaults: bool) -> Json {
        match self.0.as_slice() {
            [one] if !self.1 => one.json(defaults),
            _ => self.0.json(defaults),
        }
    }

    fn schema() -> Json {
        json!({"anyOf": [T::schema(), Vec::<T>::schema()]})
    }
}

/// A table with names of the user's own.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Named<T> {
    pub(super) entries: BTreeMap<String, (T, Place)>,
    /// It replaces what earlier layers say.
    replaces: bool,
}

impl<T> Default for Named<T> {
    fn default() -> Self {
        Self { entries: BTreeMap::new(), replaces: false }
    }
}

impl<T> Named<T> {
    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, &T)> {
        self.entries.iter().map(|(name, (value, _))| (name.as_str(), value))
    }
}

impl<T: Setting> Setting for Named<T> {
    fn expected() -> String {
        format!("a table of names, of which each is {}", T::expected())
    }

    fn read(node: &Node, key: &str, reader: &mut Reader) -> Option<Self> {
        let opened = node.opened();
        if !matches!(opened.value, Value::Map(_)) {
            return reader.refuse(&opened, key, Self::expected());
        }
        let mut read = Self { entries: BTreeMap::new(), replaces: opened.whole };
        for Entry { name, at, node } in opened.entries() {
            if let Some(value) = T::read(node, &child(key, name), reader) {
                read.entries.insert(name.clone(), (value, at.clone()));
            }
        }
        Some(read)
    }

    fn merge(&mut self, later: Self) {
        if later.replaces {
            *self = later;
            return;
        }
        for (name, (value, at)) in later.entries {
            match self.entries.get_mut(&name) {
                Some((known, known_at)) => {
                    known.merge(value);
                    *known_at = at;
                }
                None => drop(self.entries.insert(name, (value, at))),
            }
        }
    }

    fn json(&self, defaults: bool) -> Json {
        self.entries.iter().map(|(name, (value, _))| (name.clone(), value.json(defaults))).collect()
    }

    fn schema() -> Json {
        json!({"type": ["object", "null"], "additionalProperties": T::schema()})
    }

    fn rows(&self, key: &str, _: &Place, defaults: bool, rows: &mut Vec<Row>) {
        for (name, (value, at)) in &self.entries {
            let (key, before) = (child(key, name), rows.len());
            value.rows(&key, at, defaults, rows);
            if rows.len() == before {
                rows.push(Row { key, value: "{}".to_owned(), at: at.clone() });
            }
        }
    }

    fn warn(&self, key: &str, warnings: &mut Vec<Warning>) {
        self.entries.iter().for_each(|(name, (value, _))| value.warn(&child(key, name), warnings));
    }
}

/// A table that is laid over the application's: what it doesn't say follows from there.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Over<T>(pub(super) T);

impl<T: Setting> Setting for Over<T> {
    fn expected() -> String {
        T::expected()
    }

    fn read(node: &Node, key: &str, reader: &mut Reader) -> Option<Self> {
        T::read(node, key, reader).map(Self)
    }

    fn merge(&mut self, later: Self) {
        self.0.merge(later.0);
    }

    fn json(&self, _: bool) -> Json {
        self.0.json(false)
    }

    fn schema() -> Json {
        T::schema()
    }

    fn rows(&self, key: &str, at: &Place, _: bool, rows: &mut Vec<Row>) {
        self.0.rows(key, at, false, rows);
    }

    fn warn(&self, key: &str, warnings: &mut Vec<Warning>) {
        self.0.warn(key, warnings);
    }
}

/// A table that only a pipeline understands.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct FreeForm(pub(super) Node);

impl Default for FreeForm {
    fn default() -> Self {
        Self(Node::map(Place::Default))
    }
}

impl FreeForm {
    /// Adds a key.
    pub(super) fn add(&mut self, entry: &Entry) {
        if let Value::Map(entries) = &mut self.0.value {
            entries.push(entry.clone());
        }
    }
}

impl Setting for FreeForm {
    fn expected() -> String {
        "a table".to_owned()
    }

    fn read(node: &Node, key: &str, reader: &mut Reader) -> Option<Self> {
        let opened = node.opened();
        match opened.value {
            Value::Map(_) => Some(Self(opened)),
            _ => reader.refuse(&opened, key, Self::expected()),
        }
    }

    fn merge(&mut self, later: Self) {
        self.0.overlay(later.0);
    }

    fn json(&self, _: bool) -> Json {
        self.0.json()
    }

    fn schema() -> Json {
        json!({"type": ["object", "null"], "additionalProperties": true})
    }

    fn rows(&self, key: &str, _: &Place, _: bool, rows: &mut Vec<Row>) {
        leaves(&self.0, key, rows);
    }
}

fn leaves(node: &Node, key: &str, rows: &mut Vec<Row>) {
    match &node.opened().value {
        Value::Map(entries) if !entries.is_empty() => {
            entries.iter().for_each(|entry| leaves(&entry.node, &child(key, &entry.name), rows));
        }
        // An entry without keys of its own is told by its name.
        Value::Map(_) => {}
        _ => rows.push(Row { key: key.to_owned(), value: node.json().to_string(), at: node.at.clone() }),
    }
}

/// Declares words of which one is expected.
macro_rules! choice {
    ($(#[$doc:meta])* $name:ident { $($variant:ident = $word:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(super) enum $name { $($variant),+ }

        impl Setting for $name {
            fn expected() -> String {
                format!("one of {}", listed([$(concat!("\"", $word, "\"")),+]))
            }

            fn read(node: &Node, key: &str, reader: &mut Reader) -> Option<Self> {
                let text = match &node.value {
                    Value::Text(text) | Value::Variable(text) => text.as_str(),
                    _ => return reader.refuse(node, key, Self::expected()),
                };
                match text {
                    $($word => Some(Self::$variant),)+
                    _ => {
                        reader.refuse::<Self>(node, key, Self::expected());
                        if let (Some(near), Some(fault)) = (nearest(text, [$($word),+]), reader.faults.last_mut()) {
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
    /// Where results go.
    QueueBackend { Memory = "memory", Sqs = "sqs", TaskIq = "taskiq" }
}

/// An IP address and a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Address(pub(super) std::net::SocketAddr);

impl Setting for Address {
    fn expected() -> String {
        "an IP address and a port, such as 127.0.0.1:8000 or [::1]:0".to_owned()
    }

    fn read(node: &Node, key: &str, reader: &mut Reader) -> Option<Self> {
        match &node.value {
            Value::Text(text) | Value::Variable(text) => {
                text.parse().ok().map(Self).or_else(|| reader.refuse(node, key, Self::expected()))
            }
            _ => reader.refuse(node, key, Self::expected()),
        }
    }

    fn json(&self, _: bool) -> Json {
        json!(self.0)
    }

    fn schema() -> Json {
        json!({"type": ["string", "null"]})
    }
}

/// A SHA-256 in hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Sha256(pub(super) String);

impl Setting for Sha256 {
    fn expected() -> String {
        "64 hexadecimal digits, as `sha256sum` prints them".to_owned()
    }

    fn read(node: &Node, key: &str, reader: &mut Reader) -> Option<Self> {
        match &node.value {
            Value::Text(text) | Value::Variable(text)
                if text.len() == 64 && text.bytes().all(|digit| digit.is_ascii_hexdigit()) =>
            {
                Some(Self(text.to_ascii_lowercase()))
            }
            _ => reader.refuse(node, key, Self::expected()),
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
pub(super) struct Levels(pub(super) String);

impl Setting for Levels {
    fn expected() -> String {
        "off, error, warn, info, debug or trace, or a list such as info,modalkit=debug".to_owned()
    }

    fn read(node: &Node, key: &str, reader: &mut Reader) -> Option<Self> {
        let text = String::read(node, key, reader)?;
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
