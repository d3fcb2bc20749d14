//! Secrets: names that become values, from the environment or from a folder with one file for each. It owns the values, which
//! nothing here ever prints.

use std::{collections::BTreeMap, fmt, fs, io, path::Path, sync::Arc};

use super::Environment;
use crate::transient::is_transient;

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

    /// Looks for each name; the second value has those that were not found, the third those that nobody knows of now, and why.
    pub(super) fn find<'n>(
        names: &'n [String],
        environment: &Environment,
        folder: &Path,
    ) -> (Self, Vec<&'n str>, Vec<(&'n str, io::Error)>) {
        let mut found = BTreeMap::new();
        let (mut missing, mut unreadable) = (Vec::new(), Vec::new());
        for name in names {
            match look_for(name, environment, folder) {
                Ok(values) if values.is_empty() => missing.push(name.as_str()),
                Ok(values) => found.extend(values),
                Err(error) => unreadable.push((name.as_str(), error)),
            }
        }
        (Self(Arc::new(found)), missing, unreadable)
    }
}

impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.keys()).finish()
    }
}

/// What the file of a secret holds; `None` where there is none.
///
/// # Errors
/// There is one, or may be, and it can't be read.
pub fn read_file(name: &str, folder: &Path) -> io::Result<Option<String>> {
    if !is_name(name) {
        return Ok(None);
    }
    match text_of(&folder.join(name)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        text => text.map(Some),
    }
}

/// One secret's value.
pub(super) fn value(name: &str, environment: &Environment, folder: &Path) -> io::Result<Option<String>> {
    let found = look_for(name, environment, folder)?;
    Ok(found.into_iter().find(|(found, _)| found == name).map(|(_, value)| value))
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
pub(super) fn look_for(
    name: &str,
    environment: &Environment,
    folder: &Path,
) -> io::Result<Vec<(String, String)>> {
    if let Some(value) = variable(name, environment) {
        return Ok(vec![(name.to_owned(), value)]);
    }
    if !is_name(name) {
        return Ok(Vec::new());
    }
    let path = folder.join(name);
    if let Some(value) = read(&path)? {
        return Ok(vec![(name.to_owned(), value)]);
    }
    let Some(files) = there(fs::read_dir(&path))? else { return Ok(Vec::new()) };
    let mut found = Vec::new();
    for file in files {
        let Some(file) = there(file)? else { continue };
        // Kubernetes keeps the real files in `..data` and links to them.
        let Some(key) = file.file_name().into_string().ok().filter(|key| !key.starts_with('.')) else {
            continue;
        };
        if let Some(value) = read(&file.path())? {
            found.push((format!("{name}/{key}"), value));
        }
    }
    Ok(found)
}

/// A name is no path: what lies elsewhere is no secret of this folder.
fn is_name(name: &str) -> bool {
    !(name.is_empty() || name.starts_with('.') || name.contains('/'))
}

fn read(path: &Path) -> io::Result<Option<String>> {
    there(text_of(path))
}

/// What can't be read is as good as none, but for reasons that may pass.
fn there<T>(read: io::Result<T>) -> io::Result<Option<T>> {
    match read {
        Err(error) if is_transient(&error) => Err(error),
        read => Ok(read.ok()),
    }
}

/// A file's text, without the line's end that editors put there.
fn text_of(path: &Path) -> io::Result<String> {
    let about = fs::metadata(path)?;
    if !about.is_file() {
        return Err(io::Error::other("expected a file, found something else"));
    }
    if about.len() > SECRET_BYTES_MAX {
        let found = about.len();
        return Err(io::Error::other(format!("expected at most {SECRET_BYTES_MAX} bytes, found {found}")));
    }
    let text = fs::read_to_string(path)?;
    let text = text.strip_suffix('\n').unwrap_or(&text);
    Ok(text.strip_suffix('\r').unwrap_or(text).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_can_not_be_read_now_is_no_missing_secret() {
        let folder = tempfile::tempdir().unwrap();
        // It can be opened, and reading fails with EIO.
        std::os::unix::fs::symlink("/proc/self/mem", folder.path().join("token")).unwrap();
        assert!(read_file("token", folder.path()).is_err());
        assert_eq!(read_file("none", folder.path()).unwrap(), None);
        let names = ["token", "none"].map(ToOwned::to_owned);
        let (_, missing, unreadable) = Secrets::find(&names, &Environment::default(), folder.path());
        assert_eq!((missing, unreadable[0].0), (vec!["none"], "token"));
    }

    #[test]
    fn a_secret_is_a_variable_or_a_file_or_a_folder_of_files_and_never_shown() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("token"), "from a file\n").unwrap();
        fs::create_dir(folder.path().join("aws")).unwrap();
        fs::write(folder.path().join("aws/key"), "k").unwrap();
        fs::write(folder.path().join("aws/.hidden"), "h").unwrap();
        let environment = Environment::from_iter([("HUB_TOKEN".to_owned(), "from a variable".to_owned())]);
        let names = ["hub-token", "token", "aws", "none", "../token"].map(ToOwned::to_owned);
        let (secrets, missing, unreadable) = Secrets::find(&names, &environment, folder.path());
        assert_eq!(secrets.values()["hub-token"], "from a variable");
        assert_eq!(secrets.values()["token"], "from a file");
        assert_eq!(secrets.values()["aws/key"], "k");
        assert_eq!(secrets.values().len(), 3);
        assert_eq!(missing, ["none", "../token"]);
        assert!(unreadable.is_empty(), "{unreadable:?}");
        let shown = format!("{secrets:?}");
        assert!(shown.contains("hub-token") && !shown.contains("from"), "{shown}");
    }
}
