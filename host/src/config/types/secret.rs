//! Values that are nobody's business: they are read, and never shown, also not where they are wrong.

use std::fmt;

use serde_json::{Value as Json, json};

use super::super::{
    fault::Fault,
    layer::{Reader, Setting},
    node::{Node, Value},
};

/// What stands for a secret wherever settings are shown.
pub(in crate::config) const HIDDEN: &str = "(hidden)";

/// A text that is nobody's business.
#[derive(Clone, PartialEq, Eq)]
pub(in crate::config) struct Secret(pub(in crate::config) String);

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
                let fault = Fault::new(&node.at, key, Self::expected(), node.kind());
                reader.faults.push(fault.hint("write it in quotes"));
                return None;
            }
        };
        let what = match found.as_str() {
            HIDDEN => {
                let found = "what `modalkit check` shows in the place of a secret";
                reader.faults.push(Fault::new(&node.at, key, "the secret itself", found));
                return None;
            }
            "" => "an empty text",
            text if text.trim() != text => "a text with blanks at its ends",
            _ => return Some(Self(found)),
        };
        reader.faults.push(Fault::new(&node.at, key, Self::expected(), what));
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
pub(in crate::config) struct Url(pub(in crate::config) String);

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
                reader.faults.push(Fault::new(&node.at, key, Self::expected(), "a text without ://"));
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
