//! Values that are nobody's business: they are read, and never shown, also not where they are wrong.

use std::fmt;

use serde_json::{Value as Json, json};

use super::super::{
    fault::Fault,
    layer::{Reader, Setting},
    node::Node,
};

/// What stands for a secret wherever settings are shown.
pub(in crate::config) const HIDDEN: &str = "(hidden)";

/// A secret text, which is never printed.
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
        let Some(found) = node.text() else {
            let fault = Fault::new(&node.at, key, Self::expected(), node.kind());
            reader.faults.push(fault.hint("write it in quotes"));
            return None;
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
    /// Without what may be a secret in it: who asks, and values of its query.
    fn shown(&self) -> String {
        let Some((scheme, rest)) = self.0.split_once("://") else { return HIDDEN.to_owned() };
        let rest = match rest.rsplit_once('@') {
            Some((_, place)) => format!("{HIDDEN}@{place}"),
            None => rest.to_owned(),
        };
        match rest.split_once('?') {
            Some((path, _)) => format!("{scheme}://{path}?{HIDDEN}"),
            None => format!("{scheme}://{rest}"),
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
        let Some(text) = node.text() else {
            reader.faults.push(Fault::new(&node.at, key, Self::expected(), node.kind()));
            return None;
        };
        let found = match text.split_once("://") {
            _ if text.contains(HIDDEN) => "what `modalkit check` shows in the place of a secret",
            Some((scheme, _))
                if scheme.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+-.".contains(&byte))
                    && !scheme.is_empty() =>
            {
                return Some(Self(text));
            }
            Some(_) => "another text before ://",
            None => "a text without ://",
        };
        reader.faults.push(Fault::new(&node.at, key, Self::expected(), found));
        None
    }

    fn json(&self, _: bool) -> Json {
        json!(self.shown())
    }

    fn schema() -> Json {
        json!({"type": ["string", "null"]})
    }
}
