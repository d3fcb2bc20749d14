//! Secrets: names that become values, from the environment or from a folder with one file for each. It owns the values, which
//! nothing here ever prints.

use std::{collections::BTreeMap, fmt, fs, path::Path, sync::Arc};

use super::Environment;

/// The most bytes that one secret may have.
const SECRET_BYTES_MAX: u64 = 1 << 20;

/// Values by name. Printed, it shows the names.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Secrets(Arc<BTreeMap<String, String>>);

impl Secrets {
    /// Values by name.
    #[must_use]
    pub fn values(&self) -> &BTreeMap<String, String> {
        &self.0
    }

    /// Looks for each name; the second value has those that were not found.
    pub(super) fn find<'n>(
        names: &'n [String],
        environment: &Environment,
        folder: &Path,
    ) -> (Self, Vec<&'n str>) {
        let mut found = BTreeMap::new();
        let mut missing = Vec::new();
        for name in names {
            let values = look_for(name, environment, folder);
            if values.is_empty() {
                missing.push(name.as_str());
            }
            found.extend(values);
        }
        (Self(Arc::new(found)), missing)
    }
}

impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.keys()).finish()
    }
}

/// What the file of a secret holds; `None` where there is none.
#[must_use]
pub fn read_file(name: &str, folder: &Path) -> Option<String> {
    value(name, &Environment::default(), folder)
}

/// One secret's value.
pub(super) fn value(name: &str, environment: &Environment, folder: &Path) -> Option<String> {
    look_for(name, environment, folder).into_iter().find(|(found, _)| found == name).map(|(_, value)| value)
}

/// The value of a variable of this name, or of its form as a variable.
pub(super) fn variable(name: &str, environment: &Environment) -> Option<String> {
    let upper = |letter: char| if letter.is_ascii_alphanumeric() { letter.to_ascii_uppercase() } else { '_' };
    let variable: String = name.chars().map(upper).collect();
    let value = environment.get(name).or_else(|| environment.get(&variable))?;
    (!value.is_empty()).then(|| value.to_owned())
}

/// The variable of this name, or of its form as a variable (`hub-token`: `HUB_TOKEN`); else the file of this name; else every
/// file in the folder of this name, as `NAME/FILE`.
fn look_for(name: &str, environment: &Environment, folder: &Path) -> Vec<(String, String)> {
    if let Some(value) = variable(name, environment) {
        return vec![(name.to_owned(), value)];
    }
    // A name is no path: what lies elsewhere is no secret of this folder.
    if name.is_empty() || name.starts_with('.') || name.contains('/') {
        return Vec::new();
    }
    let path = folder.join(name);
    if let Some(value) = read(&path) {
        return vec![(name.to_owned(), value)];
    }
    let Ok(files) = fs::read_dir(&path) else { return Vec::new() };
    let file = |file: fs::DirEntry| {
        let key = file.file_name().into_string().ok()?;
        // Kubernetes keeps the real files in `..data` and links to them.
        if key.starts_with('.') {
            return None;
        }
        Some((format!("{name}/{key}"), read(&file.path())?))
    };
    files.flatten().filter_map(file).collect()
}

/// A file's text, without the line's end that editors put there.
fn read(path: &Path) -> Option<String> {
    let about = fs::metadata(path).ok()?;
    if !about.is_file() || about.len() > SECRET_BYTES_MAX {
        return None;
    }
    let text = fs::read_to_string(path).ok()?;
    let text = text.strip_suffix('\n').unwrap_or(&text);
    Some(text.strip_suffix('\r').unwrap_or(text).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_a_variable_or_a_file_or_a_folder_of_files_and_never_shown() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("token"), "from a file\n").unwrap();
        fs::create_dir(folder.path().join("aws")).unwrap();
        fs::write(folder.path().join("aws/key"), "k").unwrap();
        fs::write(folder.path().join("aws/.hidden"), "h").unwrap();
        let environment = Environment::from_iter([("HUB_TOKEN".to_owned(), "from a variable".to_owned())]);
        let names = ["hub-token", "token", "aws", "none", "../token"].map(ToOwned::to_owned);
        let (secrets, missing) = Secrets::find(&names, &environment, folder.path());
        assert_eq!(secrets.values()["hub-token"], "from a variable");
        assert_eq!(secrets.values()["token"], "from a file");
        assert_eq!(secrets.values()["aws/key"], "k");
        assert_eq!(secrets.values().len(), 3);
        assert_eq!(missing, ["none", "../token"]);
        let shown = format!("{secrets:?}");
        assert!(shown.contains("hub-token") && !shown.contains("from"), "{shown}");
    }
}
