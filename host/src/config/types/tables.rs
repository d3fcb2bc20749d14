//! Lists and tables of other kinds.

use std::collections::BTreeMap;

use serde_json::{Value as Json, json};

use super::super::{
    fault::{Place, Warning},
    layer::{Reader, Row, Setting, child},
    node::{Entry, Node, Value},
};

impl<T: Setting> Setting for Vec<T> {
    fn expected() -> String {
        format!("a list, of which each is {}", T::expected())
    }

    fn read(node: &Node, key: &str, reader: &mut Reader) -> Option<Self> {
        let opened = node.opened();
        let Value::List(list) = &opened.value else {
            return reader.refuse_kind(&opened, key, Self::expected());
        };
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
pub(in crate::config) struct OneOrMany<T>(pub(in crate::config) Vec<T>, bool);

impl<T: Setting> Setting for OneOrMany<T> {
    fn expected() -> String {
        format!("{}, or a list of such", T::expected())
    }

    fn read(node: &Node, key: &str, reader: &mut Reader) -> Option<Self> {
        match node.opened().value {
            Value::List(_) => Some(Self(Vec::read(node, key, reader)?, true)),
            Value::Map(_) => reader.refuse_kind(&node.opened(), key, Self::expected()),
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
pub(in crate::config) struct Named<T> {
    pub(in crate::config) entries: BTreeMap<String, (T, Place)>,
    /// It replaces what earlier layers say.
    replaces: bool,
}

impl<T> Default for Named<T> {
    fn default() -> Self {
        Self { entries: BTreeMap::new(), replaces: false }
    }
}

impl<T> Named<T> {
    pub(in crate::config) fn iter(&self) -> impl Iterator<Item = (&str, &T)> {
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
            return reader.refuse_kind(&opened, key, Self::expected());
        }
        let mut read = Self { entries: BTreeMap::new(), replaces: opened.whole };
        for Entry { name, at, node } in opened.entries() {
            let null = matches!(node.opened().value, Value::Null).then(T::empty).flatten();
            if let Some(value) = null.or_else(|| T::read(node, &child(key, name), reader)) {
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
pub(in crate::config) struct Over<T>(pub(in crate::config) T);

impl<T: Setting> Setting for Over<T> {
    fn expected() -> String {
        T::expected()
    }

    fn empty() -> Option<Self> {
        T::empty().map(Self)
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
pub(in crate::config) struct FreeForm(pub(in crate::config) Node);

impl Default for FreeForm {
    fn default() -> Self {
        Self(Node::map(Place::Default))
    }
}

impl FreeForm {
    /// Adds a key.
    pub(in crate::config) fn add(&mut self, entry: &Entry) {
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
            _ => reader.refuse_kind(&opened, key, Self::expected()),
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
