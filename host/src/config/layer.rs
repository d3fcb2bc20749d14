//! How keys are declared: one list for each table, from which its parts in files, their merging, their defaults, their schema
//! and what `check` prints all follow. It never knows which keys there are.

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
    pub(super) fn explain<T: Setting>(
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

/// Declares a table: `name: Type = default or "what the default follows from";`, in `later` the keys whose feature isn't here yet.
macro_rules! layer {
    (
        $(#[doc = $about:literal])+
        pub(super) struct $layer:ident {
            $( $(#[doc = $doc:literal])+ $field:ident: $type:ty $(= $default:expr)? $(, or $note:literal)?; )*
        }
        $(later { $( $(#[doc = $later_doc:literal])+ $later:ident: $later_type:ty; )* })?
        $(rest $rest:ident;)?
    ) => {
        $(#[doc = $about])+
        #[derive(Clone, Debug, Default, PartialEq)]
        pub(super) struct $layer {
            $( $(#[doc = $doc])+ pub(super) $field: $crate::config::layer::Slot<$type>, )*
            $($( $(#[doc = $later_doc])+ pub(super) $later: $crate::config::layer::Slot<$later_type>, )*)?
            $( pub(super) $rest: $crate::config::types::FreeForm, )?
        }

        impl $layer {
            /// The keys that have a meaning here.
            pub(super) const KEYS: &[&str] = &[$($crate::config::layer::name(stringify!($field)),)* $($($crate::config::layer::name(stringify!($later)),)*)?];
            $($(
                /// What is written, else the default.
                #[allow(dead_code, reason = "defaults of keys whose feature isn't here yet are only shown")]
                pub(super) fn $field(&self) -> $type {
                    let default: fn() -> $type = || $default;
                    self.$field.value().cloned().unwrap_or_else(default)
                }
            )?)*
        }

        impl $crate::config::layer::Setting for $layer {
            fn expected() -> String {
                format!("a table with the keys {}", $crate::config::fault::listed(Self::KEYS.iter().copied()))
            }

            fn empty() -> Option<Self> {
                Some(Self::default())
            }

            fn read(
                node: &$crate::config::node::Node,
                key: &str,
                reader: &mut $crate::config::layer::Reader,
            ) -> Option<Self> {
                let node = node.opened();
                if !matches!(node.value, $crate::config::node::Value::Map(_)) {
                    return reader.refuse_kind(&node, key, Self::expected());
                }
                let mut read = Self::default();
                for entry in node.entries() {
                    let path = $crate::config::layer::child(key, &entry.name);
                    let before = reader.faults.len();
                    $( if entry.name == $crate::config::layer::name(stringify!($field)) {
                        read.$field = $crate::config::layer::Slot::read(&entry.node, &path, reader);
                        reader.explain::<$type>(before, &path, &[$($doc),+], $crate::config::layer::layer!(@option $($default)?));
                        continue;
                    } )*
                    $($( if entry.name == $crate::config::layer::name(stringify!($later)) {
                        read.$later = $crate::config::layer::Slot::read(&entry.node, &path, reader);
                        reader.explain::<$later_type>(before, &path, &[$($later_doc),+], None);
                        continue;
                    } )*)?
                    if !$crate::config::layer::layer!(@rest read, entry $(, $rest)?) {
                        reader.unknown(&entry.at, key, &entry.name, Self::KEYS);
                    }
                }
                Some(read)
            }

            fn merge(&mut self, later: Self) {
                $( self.$field.merge(later.$field); )*
                $($( self.$later.merge(later.$later); )*)?
                $( $crate::config::layer::Setting::merge(&mut self.$rest, later.$rest); )?
            }

            fn json(&self, defaults: bool) -> serde_json::Value {
                let mut members = serde_json::Map::new();
                $( if let Some(value) = self.$field.json($crate::config::layer::layer!(@option $($default)?), defaults) {
                    members.insert($crate::config::layer::name(stringify!($field)).to_owned(), value);
                } )*
                $($( if let Some(value) = self.$later.json(None, defaults) {
                    members.insert($crate::config::layer::name(stringify!($later)).to_owned(), value);
                } )*)?
                $( if let serde_json::Value::Object(own) = self.$rest.json(defaults) {
                    members.extend(own);
                } )?
                serde_json::Value::Object(members)
            }

            fn schema() -> serde_json::Value {
                let mut properties = serde_json::Map::new();
                $( properties.insert($crate::config::layer::name(stringify!($field)).to_owned(), $crate::config::layer::property::<$type>(
                    &[$($doc),+], $crate::config::layer::layer!(@option $($default)?), $crate::config::layer::layer!(@option $($note)?),
                )); )*
                $($( properties.insert($crate::config::layer::name(stringify!($later)).to_owned(), $crate::config::layer::property::<$later_type>(
                    &[$($later_doc,)+ "(No effect in this version.)"], None, None,
                )); )*)?
                let rest = $crate::config::layer::layer!(@has $($rest)?);
                $crate::config::layer::table_schema(&[$($about),+], properties, rest)
            }

            fn rows(
                &self,
                key: &str,
                _at: &$crate::config::fault::Place,
                defaults: bool,
                rows: &mut Vec<$crate::config::layer::Row>,
            ) {
                $( self.$field.rows(
                    &$crate::config::layer::child(key, $crate::config::layer::name(stringify!($field))),
                    $crate::config::layer::layer!(@option $($default)?), $crate::config::layer::layer!(@option $($note)?), defaults, rows,
                ); )*
                $($( self.$later.rows(
                    &$crate::config::layer::child(key, $crate::config::layer::name(stringify!($later))), None, None, defaults, rows,
                ); )*)?
                $( $crate::config::layer::Setting::rows(&self.$rest, key, &$crate::config::fault::Place::Default, defaults, rows); )?
            }

            fn warn(&self, key: &str, warnings: &mut Vec<$crate::config::fault::Warning>) {
                $( if let Some(value) = self.$field.value() {
                    $crate::config::layer::Setting::warn(value, &$crate::config::layer::child(key, $crate::config::layer::name(stringify!($field))), warnings);
                } )*
                $($( if self.$later.value().is_some() {
                    warnings.push($crate::config::fault::Warning {
                        at: self.$later.at(),
                        key: $crate::config::layer::child(key, $crate::config::layer::name(stringify!($later))),
                        why: "this key has no effect in this version".to_owned(),
                    });
                } )*)?
                // A table without such keys has nothing to say.
                let _ = (key, warnings);
            }
        }
    };
    (@option) => { None };
    (@option $value:expr) => { Some($value) };
    (@has) => { false };
    (@has $rest:ident) => { true };
    (@rest $read:ident, $entry:ident) => { false };
    (@rest $read:ident, $entry:ident, $rest:ident) => {{
        $read.$rest.add($entry);
        true
    }};
}
pub(crate) use layer;
