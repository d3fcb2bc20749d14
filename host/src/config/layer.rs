//! One source's values of keys: how they are read, merged and shown, whatever the key. It never knows which keys there are.

use std::fmt::Debug;

use serde_json::{Map, Value as Json, json};

use super::{
    fault::{Fault, Place, Warning, listed, nearest},
    node::{Node, Value},
};

/// What can stand behind a key.
pub(super) trait Setting: Clone + Debug + Sized {
    /// What is expected, for people.
    fn expected() -> String;

    /// What stands for null among others of its kind; `None` where nothing does.
    fn empty() -> Option<Self> {
        None
    }

    /// The value, or `None` and a fault.
    fn read(node: &Node, key: &str, reader: &mut Reader) -> Option<Self>;

    /// Lays a later value over this one.
    fn merge(&mut self, later: Self) {
        *self = later;
    }

    /// As it would be written in JSON; a table with its defaults, where these are wanted.
    fn json(&self, defaults: bool) -> Json;

    /// JSON Schema.
    fn schema() -> Json;

    /// Adds a row, or a row for each key of a table.
    fn rows(&self, key: &str, at: &Place, _defaults: bool, rows: &mut Vec<Row>) {
        rows.push(Row { key: key.to_owned(), value: self.json(true).to_string(), at: at.clone() });
    }

    /// Says which keys have no effect.
    fn warn(&self, _key: &str, _warnings: &mut Vec<Warning>) {}
}

/// A key as `check` prints it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// The key, its parents before it.
    pub key: String,
    /// Its value as JSON, or how it comes about.
    pub value: String,
    /// Where it comes from.
    pub at: Place,
}

/// What reading one layer needs, and what came of it.
pub(super) struct Reader<'a> {
    pub(super) faults: &'a mut Vec<Fault>,
    pub(super) warnings: &'a mut Vec<Warning>,
    /// Keys that nobody knows are passed over with a warning, and numbers may be texts.
    pub(super) lenient: bool,
    /// The table that a key of this name belongs to.
    pub(super) home: fn(&str) -> Option<String>,
}

impl Reader<'_> {
    /// Notes that a value isn't what was expected.
    pub(super) fn refuse<T>(&mut self, node: &Node, key: &str, expected: impl Into<String>) -> Option<T> {
        self.faults.push(Fault::new(&node.at, key, expected, node.described()));
        None
    }

    /// The same, where a table or a list was expected: a text in its place may be a secret of one of its keys.
    pub(super) fn refuse_kind<T>(
        &mut self,
        node: &Node,
        key: &str,
        expected: impl Into<String>,
    ) -> Option<T> {
        let found = match &node.at {
            Place::Variable(_) | Place::DotEnv { .. } if matches!(node.value, Value::Text(_)) => {
                "a text that is no JSON"
            }
            _ => node.kind(),
        };
        self.faults.push(Fault::new(&node.at, key, expected, found));
        None
    }

    /// The same, where a number or a truth value was expected: these are often written in quotes.
    pub(super) fn refuse_scalar<T>(
        &mut self,
        node: &Node,
        key: &str,
        expected: impl Into<String>,
    ) -> Option<T> {
        let fault = Fault::new(&node.at, key, expected, node.described());
        self.faults.push(match &node.value {
            Value::Text(text)
                if text.parse::<f64>().is_ok() || ["true", "false"].contains(&text.as_str()) =>
            {
                fault.hint(format!("write it without quotes: {text}"))
            }
            _ => fault,
        });
        None
    }

    /// Adds what a key is for to the faults of its value that say no more than what was expected.
    pub(super) fn add_hints<T: Setting>(
        &mut self,
        before: usize,
        key: &str,
        docs: &[&str],
        default: Option<T>,
    ) {
        let of_value = |fault: &&mut Fault| {
            let rest = fault.key.strip_prefix(key);
            fault.hint.is_none() && rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('['))
        };
        let text = docs.iter().map(|line| line.trim()).collect::<Vec<_>>().join(" ");
        let default = default.map(|default| default.json(true)).filter(|default| !default.is_object());
        let hint = match default {
            Some(default) => format!("{text} Default: {default}"),
            None => text,
        };
        self.faults[before..].iter_mut().filter(of_value).for_each(|fault| fault.hint = Some(hint.clone()));
    }

    pub(super) fn unknown(&mut self, at: &Place, parent: &str, name: &str, known: &[&str]) {
        let key = child(parent, name);
        let near = nearest(name, known.iter().copied());
        if self.lenient {
            let meant = near.map(|near| format!("; did you mean {near}?")).unwrap_or_default();
            self.warnings.push(Warning {
                at: at.clone(),
                key,
                why: format!("nothing reads this key{meant}"),
            });
            return;
        }
        let parent = if parent.is_empty() { "the configuration" } else { parent };
        let found = format!("the unknown key {}", shown(name));
        self.faults.push(match near {
            Some(near) => Fault::new(at, &key, format!("a key of {parent}"), found)
                .hint(format!("did you mean {near}?")),
            None => match (self.home)(name) {
                Some(home) => Fault::new(at, &key, format!("a key of {parent}"), found)
                    .hint(format!("it belongs to {home}")),
                None => {
                    let expected = format!("a key of {parent}: {}", listed(known.iter().copied()));
                    Fault::new(at, &key, expected, found)
                }
            },
        });
    }
}

/// The key of a table's member.
pub(super) fn child(parent: &str, name: &str) -> String {
    let name = shown(name);
    if parent.is_empty() { name } else { format!("{parent}.{name}") }
}

/// A name as it can be printed: one with dots or the like in it would read as several.
pub(super) fn shown(name: &str) -> String {
    let plain =
        !name.is_empty() && name.chars().all(|letter| letter.is_alphanumeric() || "_-".contains(letter));
    if plain { name.to_owned() } else { format!("{name:?}") }
}

/// A key's value, if it was written, and where.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) enum Slot<T> {
    #[default]
    Unwritten,
    /// Written as null: the default, also where an earlier layer says something else.
    Null(Place),
    Written(T, Place),
}

impl<T: Setting> Slot<T> {
    pub(super) fn read(node: &Node, key: &str, reader: &mut Reader) -> Self {
        let opened = node.opened();
        if matches!(opened.value, Value::Null) {
            return Self::Null(opened.at);
        }
        match T::read(node, key, reader) {
            Some(value) => Self::Written(value, node.at.clone()),
            None => Self::Unwritten,
        }
    }

    pub(super) fn merge(&mut self, later: Self) {
        match (&mut *self, later) {
            (_, Self::Unwritten) => {}
            (Self::Written(value, at), Self::Written(later, later_at)) => {
                value.merge(later);
                *at = later_at;
            }
            (slot, later) => *slot = later,
        }
    }

    pub(super) fn value(&self) -> Option<&T> {
        match self {
            Self::Written(value, _) => Some(value),
            _ => None,
        }
    }

    /// Where it was written; the default's place where it wasn't.
    pub(super) fn at(&self) -> Place {
        match self {
            Self::Unwritten => Place::Default,
            Self::Null(at) | Self::Written(_, at) => at.clone(),
        }
    }

    pub(super) fn rows(
        &self,
        key: &str,
        default: Option<T>,
        note: Option<&str>,
        defaults: bool,
        rows: &mut Vec<Row>,
    ) {
        match (self, default) {
            (Self::Written(value, at), _) => value.rows(key, at, defaults, rows),
            (_, Some(default)) if defaults => default.rows(key, &self.at(), defaults, rows),
            _ => {
                if let Some(note) = note.filter(|_| defaults) {
                    rows.push(Row { key: key.to_owned(), value: note.to_owned(), at: self.at() });
                }
            }
        }
    }

    pub(super) fn json(&self, default: Option<T>, defaults: bool) -> Option<Json> {
        match (self, default) {
            (Self::Written(value, _), _) => Some(value.json(defaults)),
            // Laid over the application's, it is the default and not what that says.
            (Self::Null(_), _) if !defaults => Some(Json::Null),
            (_, Some(default)) if defaults => Some(default.json(defaults)),
            _ => None,
        }
    }
}

/// A field's name as a key: without what makes a keyword of Rust a name.
pub(super) const fn name(field: &'static str) -> &'static str {
    match field.as_bytes() {
        [b'r', b'#', ..] => field.split_at(2).1,
        _ => field,
    }
}

/// The schema of one key.
pub(super) fn property<T: Setting>(docs: &[&str], default: Option<T>, note: Option<&str>) -> Json {
    let mut schema = T::schema();
    let mut text = docs.iter().map(|line| line.trim()).collect::<Vec<_>>().join(" ");
    if let Some(note) = note {
        text = format!("{text} Default: {note}.");
    }
    let Some(members) = schema.as_object_mut() else { return schema };
    members.insert("description".into(), json!(text));
    if let Some(default) = default.filter(|_| !members.contains_key("properties")) {
        members.insert("default".into(), default.json(true));
    }
    schema
}

pub(super) fn table_schema(about: &[&str], properties: Map<String, Json>, rest: bool) -> Json {
    let text = about.iter().map(|line| line.trim()).collect::<Vec<_>>().join(" ");
    json!({"type": "object", "description": text, "properties": properties, "additionalProperties": rest})
}
