//! Pipelines in Python, as folders in a volume. Their interpreter is that of the tests' Python tools, which have pydantic and numpy.

use std::{fs, os::unix::fs::symlink, path::Path};

use crate::{Setup, built};

/// An environment with pydantic and numpy.
const ENVIRONMENT: &str = "python";

impl Setup {
    /// Puts a folder with these files into the volume, with an environment of its own.
    ///
    /// # Panics
    /// Where it can't be written.
    #[must_use]
    pub fn python(self, name: &str, files: &[(&str, &str)]) -> Self {
        let folder = self.volume().join(name);
        write(&folder, files);
        let environment = built().with_file_name(ENVIRONMENT);
        assert!(
            environment.exists(),
            "`cargo xtask test` installs the tests' Python tools in {environment:?}"
        );
        symlink(environment, folder.join(".venv")).expect("the folder is ours");
        self
    }
}

/// Writes files of a pipeline, each whole before it has its name.
///
/// # Panics
/// Where they can't be written.
pub fn write(folder: &Path, files: &[(&str, &str)]) {
    for (name, text) in files {
        let path = folder.join(name);
        let half = path.with_extension("part");
        fs::create_dir_all(path.parent().expect("it has one")).expect("the folder is ours");
        fs::write(&half, text).expect("the folder is ours");
        fs::rename(&half, &path).expect("the folder is ours");
    }
}
