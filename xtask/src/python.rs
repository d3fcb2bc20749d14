//! The Python tools that tests need, in a virtual environment of their own under `target/`.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Context;

use crate::build::run;

const FOLDER: &str = "target/python";
/// What is installed, with the digests of its files. A copy of it is written into the environment when that is complete.
const TOOLS: &str = "xtask/python-tools.txt";

/// Installs what isn't there.
pub(crate) fn ensure() -> anyhow::Result<()> {
    let wanted = fs::read_to_string(TOOLS).with_context(|| format!("can't read {TOOLS}"))?;
    let stamp = Path::new(FOLDER).join("installed.txt");
    if fs::read_to_string(&stamp).is_ok_and(|installed| installed == wanted) {
        return Ok(());
    }
    println!("installing the tests' Python tools into {FOLDER}, as {TOOLS} has them");
    // One that was begun and not ended is begun again.
    let _ = fs::remove_dir_all(FOLDER);
    make()
        .context("the tests need Python 3 with its venv module: `apt-get install python3-venv`, as root")?;
    run(Command::new(Path::new(FOLDER).join("bin/pip"))
        .args(["install", "--quiet", "--disable-pip-version-check", "--require-hashes", "--requirement", TOOLS]))
    .with_context(|| {
        format!("can't install the tests' Python tools into {FOLDER}: `{FOLDER}/bin/pip install --require-hashes --requirement {TOOLS}`, or leave them out with `--without moto --without taskiq --without python`")
    })?;
    Ok(fs::write(stamp, wanted)?)
}

/// A program of these tools.
pub(crate) fn tool(name: &str) -> PathBuf {
    // Absolute: some are started in folders of their own.
    std::env::current_dir().unwrap_or_default().join(FOLDER).join("bin").join(name)
}

fn make() -> anyhow::Result<()> {
    let venv = || run(Command::new("python3").args(["-m", "venv", FOLDER]));
    if venv().is_ok() {
        return Ok(());
    }
    // A fresh machine has no lists of packages.
    run(Command::new("apt-get").arg("update"))?;
    run(Command::new("apt-get").args(["install", "--yes", "python3-venv"]))?;
    venv()
}
