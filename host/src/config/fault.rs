//! What is wrong with a configuration, and where. It owns the form of these messages and never knows which keys there are.

use std::{fmt, io, path::Path, sync::Arc};

use serde::{Serialize, Serializer};

use crate::transient::is_transient;

/// Where a value was written.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// In a file: lines and columns from 1, a column a character.
    File {
        /// Which.
        path: Arc<Path>,
        /// The line.
        line: u32,
        /// The column.
        column: u32,
    },
    /// In a file as a whole.
    Whole(Arc<Path>),
    /// In a variable of the environment.
    Variable(Arc<str>),
    /// In a variable that a `.env` file sets.
    DotEnv {
        /// The file.
        path: Arc<Path>,
        /// The line.
        line: u32,
        /// The variable.
        name: Arc<str>,
    },
    /// Nowhere: it is the default.
    Default,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { path, line, column } => write!(f, "{}:{line}:{column}", path.display()),
            Self::Whole(path) => write!(f, "{}", path.display()),
            Self::Variable(name) => write!(f, "${name}"),
            Self::DotEnv { path, line, name } => write!(f, "{}:{line} ${name}", path.display()),
            Self::Default => f.write_str("default"),
        }
    }
}

impl Serialize for Place {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// One thing that is wrong. Never shows the value of a secret key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Fault {
    /// Where.
    pub at: Place,
    /// The key, its parents before it, joined by dots; empty where it is about the whole file.
    pub key: String,
    /// What would be right.
    pub expected: String,
    /// What is there.
    pub found: String,
    /// What to do, where that doesn't follow.
    #[serde(rename = "help")]
    pub hint: Option<String>,
    /// A file could not be read for a reason that may pass, which says nothing about what is written in it.
    #[serde(skip)]
    pub transient: bool,
}

impl Fault {
    pub(super) fn new(at: &Place, key: &str, expected: impl Into<String>, found: impl Into<String>) -> Self {
        Self {
            at: at.clone(),
            key: key.to_owned(),
            expected: expected.into(),
            found: found.into(),
            hint: None,
            transient: false,
        }
    }

    /// A file that can't be read.
    pub(super) fn unreadable(at: &Place, key: &str, error: &io::Error) -> Self {
        let transient = is_transient(error);
        Self { transient, ..Self::new(at, key, "a file that can be read", error.to_string()) }
    }

    /// A host that asks callers for keys, and would ask nobody any more.
    #[must_use]
    pub fn unguarded() -> Self {
        let key = "app_settings.auth_config";
        let expected = "a key, or deployment_config.secure, since this host asks callers who they are";
        let fault = Self::new(&Place::Default, key, expected, "nothing, which would let everybody in");
        fault.hint("where that is meant, restart the host to let everybody in")
    }

    /// Names what was most likely meant, where anything is like it.
    pub(super) fn meant<'a>(self, found: &str, known: impl IntoIterator<Item = &'a str>) -> Self {
        match nearest(found, known) {
            Some(near) => self.hint(format!("did you mean {near}?")),
            None => self,
        }
    }

    /// A file that isn't what it should be.
    #[must_use]
    pub fn of_file(path: &Path, expected: &str, found: &str) -> Self {
        Self::new(&Place::Whole(path.into()), "", expected, found)
    }

    pub(super) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { at, key, expected, found, hint, transient: _ } = self;
        write!(f, "{at}")?;
        if !key.is_empty() {
            write!(f, "  {key}")?;
        }
        write!(f, "\n  expected  {expected}\n  found     {found}")?;
        match hint {
            Some(hint) => write!(f, "\n  help      {hint}"),
            None => Ok(()),
        }
    }
}

/// Everything that is wrong with a configuration: in the order of files, lines and columns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Faults(Vec<Fault>);

impl Faults {
    /// `Ok` where there are none.
    pub(super) fn or<T>(faults: Vec<Fault>, value: T) -> Result<T, Self> {
        if faults.is_empty() { Ok(value) } else { Err(Self::from(faults)) }
    }

    /// All of them.
    pub fn iter(&self) -> std::slice::Iter<'_, Fault> {
        self.0.iter()
    }

    /// All of them in one line, where one is of a file that could not be read for a reason that may pass.
    #[must_use]
    pub fn transient(&self) -> Option<String> {
        let line = |fault: &Fault| fault.to_string().replace('\n', ";");
        let is_transient = self.0.iter().any(|fault| fault.transient);
        is_transient.then(|| self.0.iter().map(line).collect::<Vec<_>>().join("; "))
    }
}

impl From<Vec<Fault>> for Faults {
    fn from(mut faults: Vec<Fault>) -> Self {
        faults.sort_by(|a, b| (&a.at, &a.key).cmp(&(&b.at, &b.key)));
        // What the application says is wrong for each model that follows it, and said once.
        let last = |key: &str| key.rsplit('.').next().unwrap_or_default().to_owned();
        faults.dedup_by(|a, b| {
            matches!(a.at, Place::File { .. })
                && (&a.at, &a.expected, &a.found, last(&a.key))
                    == (&b.at, &b.expected, &b.found, last(&b.key))
        });
        Self(faults)
    }
}

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.len() {
            1 => f.write_str("the configuration has an error")?,
            count => write!(f, "the configuration has {count} errors")?,
        }
        self.0.iter().try_for_each(|fault| write!(f, "\n\n{fault}"))
    }
}

impl std::error::Error for Faults {}

/// Something that is written and has no effect.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Warning {
    /// Where.
    pub at: Place,
    /// The key, its parents before it.
    pub key: String,
    /// Why.
    pub why: String,
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}  {}: {}", self.at, self.key, self.why)
    }
}

/// How alike two names must be, from 0 to 1, for one to be taken for a slip of the other.
const ALIKE: f64 = 0.8;

/// The name that was most likely meant.
pub(super) fn nearest<'a>(found: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let found = found.to_ascii_lowercase();
    let scored =
        known.into_iter().map(|name| (strsim::jaro_winkler(&found, &name.to_ascii_lowercase()), name));
    let best = scored.max_by(|a, b| a.0.total_cmp(&b.0))?;
    (best.0 >= ALIKE).then_some(best.1)
}

/// Names in a row, for people.
pub(super) fn listed<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    let names: Vec<&str> = names.into_iter().collect();
    match names.as_slice() {
        [] => "none".to_owned(),
        names => names.join(", "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slip_is_recognised_and_another_word_is_not() {
        let known = ["max_batch_size", "wait_ms", "queue_max"];
        assert_eq!(nearest("max_bach_size", known), Some("max_batch_size"));
        assert_eq!(nearest("waitms", known), Some("wait_ms"));
        assert_eq!(nearest("colour", known), None);
        assert_eq!(nearest("x", []), None);
    }
}
