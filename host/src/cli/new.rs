//! `new`: writes a folder that serves, with tests that need no host. It owns the templates, and overwrites nothing.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
};

use super::{
    DONE, NOT_DONE, WRONG_USAGE,
    print::{complain, print},
};

/// The files of a pipeline in Python.
const PYTHON: [(&str, &str); 4] = [
    ("pipeline.py", include_str!("new_python/pipeline.py")),
    ("test_pipeline.py", include_str!("new_python/test_pipeline.py")),
    ("pyproject.toml", include_str!("new_python/pyproject.toml")),
    ("README.md", include_str!("new_python/README.md")),
];

pub(crate) fn run(folder: &Path) -> u8 {
    let folder = std::path::absolute(folder).unwrap_or_else(|_| folder.to_owned());
    let name = folder.file_name().and_then(|name| name.to_str()).filter(|name| is_name(name));
    let Some(name) = name else {
        let found = folder.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        complain(&anyhow::anyhow!(
            "expected a folder whose name has letters, digits, - and _ alone and begins with a letter, found {found:?}: the model is served under it"
        ));
        return WRONG_USAGE;
    };
    match write(&folder, name) {
        Ok(files) => {
            let listed: String = files.iter().map(|file| format!("  {}\n", file.display())).collect();
            print(&format!("written:\n{listed}README.md says how it is tried, tested and served.\n"));
            DONE
        }
        Err(error) => {
            let context = format!("can't write a pipeline to {}", folder.display());
            complain(&anyhow::Error::new(error).context(context));
            NOT_DONE
        }
    }
}

fn write(folder: &Path, name: &str) -> io::Result<Vec<PathBuf>> {
    fs::create_dir_all(folder)?;
    let mut written = Vec::new();
    for (file, text) in PYTHON {
        let path = folder.join(file);
        let above = folder.parent().unwrap_or(folder).display().to_string();
        let text = text.replace("{{name}}", name).replace("{{above}}", &above);
        let text = text.replace("{{folder}}", &folder.display().to_string());
        OpenOptions::new().write(true).create_new(true).open(&path)?.write_all(text.as_bytes())?;
        written.push(path);
    }
    Ok(written)
}

fn is_name(name: &str) -> bool {
    name.starts_with(|first: char| first.is_ascii_alphabetic())
        && name.chars().all(|letter| letter.is_ascii_alphanumeric() || "-_".contains(letter))
}
