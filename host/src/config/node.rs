//! A file's values, each with its place. It knows no key and no type beyond what TOML, YAML and JSON have in common.

use serde_json::json;

use super::fault::Place;

/// A value and where it was written.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Node {
    pub(super) value: Value,
    pub(super) at: Place,
    /// It replaces the tables below it, where others are laid over them key by key.
    pub(super) whole: bool,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    Null,
    Bool(bool),
    Integer(i128),
    Float(f64),
    Text(String),
    /// The text of a variable: JSON where something else than text is expected.
    Variable(String),
    List(Vec<Node>),
    Map(Vec<Entry>),
}

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Entry {
    pub(super) name: String,
    /// Where the name stands.
    pub(super) at: Place,
    pub(super) node: Node,
}

impl Node {
    pub(super) fn new(value: Value, at: Place) -> Self {
        let whole = matches!(value, Value::Variable(_));
        Self { value, at, whole }
    }

    pub(super) fn map(at: Place) -> Self {
        Self::new(Value::Map(Vec::new()), at)
    }

    pub(super) fn entries(&self) -> &[Entry] {
        match &self.value {
            Value::Map(entries) => entries,
            _ => &[],
        }
    }

    pub(super) fn get(&self, name: &str) -> Option<&Self> {
        self.entries().iter().find(|entry| entry.name == name).map(|entry| &entry.node)
    }

    /// A variable's text as the value that it stands for: JSON, or else the text itself.
    pub(super) fn opened(&self) -> Self {
        match &self.value {
            Value::Variable(text) => {
                let value = serde_json::from_str(text)
                    .map_or_else(|_| Value::Text(text.clone()), |json| Self::from_json(json, &self.at).value);
                Self { value, at: self.at.clone(), whole: self.whole }
            }
            _ => self.clone(),
        }
    }

    /// A text; a variable's may stand in quotes, as JSON.
    pub(super) fn text(&self) -> Option<String> {
        match &self.value {
            Value::Text(text) => Some(text.clone()),
            Value::Variable(text) => Some(serde_json::from_str(text).unwrap_or_else(|_| text.clone())),
            _ => None,
        }
    }

    pub(super) fn from_json(json: serde_json::Value, at: &Place) -> Self {
        let value = match json {
            serde_json::Value::Null => Value::Null,
            serde_json::Value::Bool(value) => Value::Bool(value),
            serde_json::Value::Number(number) => match number.as_i128() {
                Some(integer) => Value::Integer(integer),
                None => Value::Float(number.as_f64().unwrap_or(f64::NAN)),
            },
            serde_json::Value::String(text) => Value::Text(text),
            serde_json::Value::Array(list) => {
                Value::List(list.into_iter().map(|item| Self::from_json(item, at)).collect())
            }
            serde_json::Value::Object(map) => Value::Map(
                map.into_iter()
                    .map(|(name, value)| Entry { name, at: at.clone(), node: Self::from_json(value, at) })
                    .collect(),
            ),
        };
        Self::new(value, at.clone())
    }

    /// What a pipeline gets. JSON has no infinite numbers: they go as text.
    pub(super) fn json(&self) -> serde_json::Value {
        match &self.opened().value {
            Value::Null => serde_json::Value::Null,
            Value::Bool(value) => json!(value),
            Value::Integer(value) => match (i64::try_from(*value), u64::try_from(*value)) {
                (Ok(value), _) => json!(value),
                (_, Ok(value)) => json!(value),
                _ => json!(*value as f64),
            },
            Value::Float(value) if value.is_finite() => json!(value),
            Value::Float(value) => json!(value.to_string()),
            Value::Text(text) | Value::Variable(text) => json!(text),
            Value::List(list) => list.iter().map(Self::json).collect(),
            Value::Map(entries) => {
                entries.iter().map(|entry| (entry.name.clone(), entry.node.json())).collect()
            }
        }
    }

    /// Lays a later value over this one: tables key by key, anything else whole.
    pub(super) fn overlay(&mut self, later: Self) {
        match (&mut self.value, later) {
            (Value::Map(entries), Self { value: Value::Map(over), whole: false, .. }) => {
                for entry in over {
                    match entries.iter_mut().find(|known| known.name == entry.name) {
                        Some(known) => known.node.overlay(entry.node),
                        None => entries.push(entry),
                    }
                }
            }
            (_, later) => *self = later,
        }
    }

    /// The deepest place on the way to a value, as far as there is one.
    pub(super) fn place_of<'a>(&self, mut path: impl Iterator<Item = &'a str>) -> Place {
        let next = path.next().and_then(|step| match &self.value {
            Value::List(list) => list.get(step.parse::<usize>().ok()?),
            _ => self.get(step),
        });
        next.map_or_else(|| self.at.clone(), |node| node.place_of(path))
    }

    /// For people. Long texts are cut.
    pub(super) fn described(&self) -> String {
        const SHOWN_MAX: usize = 60;
        match &self.value {
            Value::Null => "nothing (null)".to_owned(),
            Value::Bool(value) => value.to_string(),
            Value::Integer(value) => format!("the number {value}"),
            Value::Float(value) => format!("the number {value}"),
            Value::Text(text) | Value::Variable(text) if text.chars().count() > SHOWN_MAX => {
                format!("the text {:?}…", text.chars().take(SHOWN_MAX).collect::<String>())
            }
            Value::Text(text) | Value::Variable(text) => format!("the text {text:?}"),
            Value::List(list) => format!("a list of {}", list.len()),
            Value::Map(_) => "a table".to_owned(),
        }
    }

    /// For people, where the value itself is secret.
    pub(super) fn kind(&self) -> &'static str {
        match &self.value {
            Value::Null => "nothing (null)",
            Value::Bool(_) => "true or false",
            Value::Integer(_) | Value::Float(_) => "a number",
            Value::Text(_) | Value::Variable(_) => "a text",
            Value::List(_) => "a list",
            Value::Map(_) => "a table",
        }
    }
}
