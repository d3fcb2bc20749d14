//! The environment: variables of the process, and below them those of a `.env` file. It turns those that name keys into located
//! values, and never knows what keys mean.

use std::{collections::BTreeMap, env, fs, io, path::Path, sync::Arc};

use super::{
    fault::{Fault, Place, Warning},
    node::{Entry, Node, Value},
};

/// Variables start with this; the keys of a path are joined by two underscores.
pub(super) const PREFIX: &str = "MODALKIT_";
pub(super) const SEPARATOR: &str = "__";
/// Keys in the path of one name.
const STEPS_MAX: usize = 64;
/// Read in the current folder.
pub(super) const DOT_ENV: &str = ".env";

/// Variables, each with where it was set.
#[derive(Clone, Debug, Default)]
pub struct Environment {
    variables: BTreeMap<String, (String, Place)>,
    /// Lines of `.env` that set nothing. Other programs read that file too, and some take more than this one does.
    passed_over: Vec<Warning>,
}

impl Environment {
    /// Of this process, over `.env` in the current folder where there is one. Variables that aren't UTF-8 are passed over.
    ///
    /// # Errors
    /// `.env` can't be read, or sets a variable of this program's in another form than `NAME=value`.
    pub fn of_process() -> Result<Self, super::Faults> {
        let path = Path::new(DOT_ENV);
        Self::of_process_over(fs::read_to_string(path), path)
    }

    /// Of this process, over what was read of a `.env` file.
    pub(super) fn of_process_over(dot_env: io::Result<String>, path: &Path) -> Result<Self, super::Faults> {
        let mut all = Self::of_dot_env(dot_env, path).map_err(super::Faults::from)?;
        let set = env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
        all.extend(Self::from_iter(set));
        Ok(all)
    }

    /// What a `.env` file sets; nothing where there is none.
    pub(super) fn of_dot_env(text: io::Result<String>, path: &Path) -> Result<Self, Vec<Fault>> {
        let shared: Arc<Path> = path.into();
        let whole = Place::Whole(Arc::clone(&shared));
        let text = match text {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(error) => {
                return Err(vec![Fault::unreadable(&whole, "", &error)]);
            }
        };
        let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
        let (mut all, mut faults) = (Self::default(), Vec::new());
        for item in dotenvy::Iter::new(text.as_bytes()) {
            // What the parser says shows the line, which may hold a secret.
            let (name, value) = match item {
                Ok(set) => set,
                Err(error) => {
                    let (line, is_ours) = match &error {
                        // With a quote that is never closed it is all that follows.
                        dotenvy::Error::LineParse(rest, _) => {
                            let first = rest.lines().next().unwrap_or_default();
                            (text.lines().position(|known| known == first), rest.lines().any(sets_a_key))
                        }
                        _ => (None, true),
                    };
                    let at = line.map_or(whole.clone(), |line| Place::File {
                        path: Arc::clone(&shared),
                        line: line as u32 + 1,
                        column: 1,
                    });
                    let expected =
                        "lines of NAME=value, in single quotes where the value has blanks, quotes or a $";
                    if is_ours {
                        faults.push(Fault::new(&at, "", expected, "another line"));
                    } else {
                        let why = format!("the line is passed over: expected {expected}");
                        all.passed_over.push(Warning { at, key: DOT_ENV.to_owned(), why });
                    }
                    continue;
                }
            };
            let sets = |line: &str| {
                let line = line.trim_start().trim_start_matches("export ").trim_start();
                line.strip_prefix(name.as_str()).is_some_and(|rest| rest.trim_start().starts_with('='))
            };
            let last = text.lines().enumerate().filter(|(_, line)| sets(line)).last();
            let line = last.map_or(0, |(line, _)| line) as u32 + 1;
            let at = Place::DotEnv { path: Arc::clone(&shared), line, name: name.as_str().into() };
            all.variables.insert(name, (value, at));
        }
        if faults.is_empty() { Ok(all) } else { Err(faults) }
    }

    /// Variables that were probably meant for keys, and set nothing.
    pub(super) fn near_misses(&self, sections: &[&str]) -> Vec<Warning> {
        let meant = |name: &str| {
            let rest = name.get(PREFIX.len()..).filter(|_| sets_a_key(name))?;
            let section = sections.iter().find(|section| {
                let own = rest.get(..section.len()).is_some_and(|own| own.eq_ignore_ascii_case(section));
                let behind = rest.get(section.len()..).unwrap_or_default();
                own && behind.starts_with('_') && !behind.starts_with(SEPARATOR)
            })?;
            let (section, key) = rest.split_at(section.len());
            Some(format!("{PREFIX}{section}{SEPARATOR}{}", &key[1..]))
        };
        let warning = |(name, (_, at)): (&String, &(String, Place))| {
            let why = format!(
                "it sets nothing: the keys of a name have two underscores between them, as in {}",
                meant(name)?
            );
            Some(Warning { at: at.clone(), key: name.clone(), why })
        };
        self.variables.iter().filter_map(warning).collect()
    }

    /// Lines of `.env` that set nothing.
    pub(super) fn passed_over(&self) -> &[Warning] {
        &self.passed_over
    }

    pub(super) fn is_empty(&self) -> bool {
        self.variables.is_empty()
    }

    /// Lays later variables over these.
    pub(super) fn extend(&mut self, later: Self) {
        self.variables.extend(later.variables);
        self.passed_over.extend(later.passed_over);
    }

    /// The value of a variable, by its exact name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&str> {
        self.variables.get(name).map(|(value, _)| value.as_str())
    }

    /// All variables, by name.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.variables.iter().map(|(name, (value, _))| (name.as_str(), value.as_str()))
    }

    /// The variables that name keys, as one layer. A map that is given whole, as JSON, replaces what the files say there; a
    /// longer path changes one key of it. Names are matched without regard to case, against what the files have.
    /// `sections`: the keys at the top, which one variable may give whole.
    pub(super) fn layer(&self, files: &[&Node], sections: &[&str], faults: &mut Vec<Fault>) -> Node {
        let mut root = Node::map(Place::Default);
        let mut named: Vec<_> =
            self.variables.iter().filter(|(name, _)| names_a_key(name, sections)).collect();
        // Shorter paths first: a whole map, then single keys of it. Of two spellings, the process's own comes last and wins.
        let of_process = |at: &Place| !matches!(at, Place::DotEnv { .. });
        named.sort_by_key(|(name, (_, at))| (name.matches(SEPARATOR).count(), of_process(at), name.as_str()));
        let mut spelled: BTreeMap<(String, bool), &str> = BTreeMap::new();
        for (name, (value, at)) in named {
            if let Some(other) = spelled.insert((name.to_ascii_uppercase(), of_process(at)), name)
                && !files.iter().any(|file| has_both(file, name, other))
            {
                faults.push(Fault::new(at, "", "one spelling of a variable", format!("{name} and {other}")));
                continue;
            }
            let path: Vec<&str> = name[PREFIX.len()..].split(SEPARATOR).collect();
            if path.len() > STEPS_MAX {
                faults.push(Fault::new(
                    at,
                    "",
                    format!("at most {STEPS_MAX} keys in a name"),
                    format!("{}", path.len()),
                ));
                continue;
            }
            if let Some(empty) = path.iter().position(|step| step.is_empty()) {
                let key = path[..empty].join(".");
                faults.push(Fault::new(
                    at,
                    &key,
                    "names of keys with two underscores between them",
                    format!("the name {name}"),
                ));
                continue;
            }
            let value = Node::new(Value::Variable(value.clone()), at.clone());
            if let Err(above) = put(&mut root, files, &path, value) {
                let found = format!("the variable {name}, and another that gives {above} a value of its own");
                faults.push(Fault::new(at, &above, "either a whole value or single keys in it", found));
            }
        }
        root
    }
}

impl FromIterator<(String, String)> for Environment {
    fn from_iter<I: IntoIterator<Item = (String, String)>>(variables: I) -> Self {
        let placed = |(name, value): (String, String)| {
            let at = Place::Variable(name.as_str().into());
            (name, (value, at))
        };
        Self { variables: variables.into_iter().map(placed).collect(), passed_over: Vec::new() }
    }
}

/// Puts a value where a path leads. The error is the key on the way that is no table.
fn put(root: &mut Node, files: &[&Node], path: &[&str], value: Node) -> Result<(), String> {
    let (mut node, mut like, mut walked) = (root, files.to_vec(), Vec::new());
    for (index, step) in path.iter().enumerate() {
        // A map that was given as JSON is opened for the keys in it.
        if matches!(node.value, Value::Variable(_)) {
            *node = node.opened();
        }
        let at = value.at.clone();
        let Value::Map(entries) = &mut node.value else { return Err(walked.join(".")) };
        let known = like.iter().flat_map(|file| file.entries()).map(|entry| &entry.name);
        let own = entries.iter().map(|entry| &entry.name);
        let all: Vec<&String> = own.chain(known).collect();
        let exact = all.iter().find(|name| name.as_str() == *step);
        let name = exact
            .or_else(|| all.iter().find(|name| name.eq_ignore_ascii_case(step)))
            .map(|name| (*name).clone());
        let name = name.unwrap_or_else(|| step.to_ascii_lowercase());
        like = like.into_iter().filter_map(|file| file.get(&name)).collect();
        walked.push(name.clone());
        let last = index + 1 == path.len();
        let place = match entries.iter().position(|entry| entry.name == name) {
            Some(place) => place,
            None => {
                entries.push(Entry { name, at: at.clone(), node: Node::map(at) });
                entries.len() - 1
            }
        };
        node = &mut entries[place].node;
        if last {
            *node = value;
            return Ok(());
        }
    }
    Ok(())
}

/// Whether a file has names that differ by their case alone, and each variable means one of them.
fn has_both(file: &Node, name: &str, other: &str) -> bool {
    let has = |name: &str| {
        let path = name[PREFIX.len()..].split(SEPARATOR);
        let last = path.clone().count().saturating_sub(1);
        let found = path.take(last).try_fold(file, |node, step| {
            let exact = node.get(step);
            exact.or_else(|| {
                node.entries()
                    .iter()
                    .find(|entry| entry.name.eq_ignore_ascii_case(step))
                    .map(|entry| &entry.node)
            })
        });
        found.map(std::ptr::from_ref)
    };
    has(name).is_some() && has(name) != has(other)
}

/// Whether a line that can't be read was meant to set a variable of this program's. Passed over, it might open what it was to guard.
fn sets_a_key(line: &str) -> bool {
    let line = line.trim_start().trim_start_matches("export ").trim_start();
    line.get(..PREFIX.len()).is_some_and(|start| start.eq_ignore_ascii_case(PREFIX))
}

fn names_a_key(name: &str, sections: &[&str]) -> bool {
    let prefixed = name.get(..PREFIX.len()).is_some_and(|start| start.eq_ignore_ascii_case(PREFIX));
    let is_section = || sections.iter().any(|section| section.eq_ignore_ascii_case(&name[PREFIX.len()..]));
    prefixed && (name.contains(SEPARATOR) || is_section())
}
