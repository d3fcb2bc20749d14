//! The object stores that tests of buckets run against, beside moto: azurite, by npm, and s3s-fs, by cargo. Both under `target/`.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Context;

use crate::{
    build::{command, run},
    python,
};

const AZURITE: &str = "target/azurite";
/// What is installed, with the digests of everything in it.
const AZURITE_LOCK: &str = "xtask/azurite/package-lock.json";
const TOOLS: &str = "target/tools";
const S3S_VERSION: &str = "0.14.1";

/// Installs azurite where it isn't there, by the npm of the Python tools.
pub(crate) fn ensure_azurite() -> anyhow::Result<()> {
    let wanted = fs::read_to_string(AZURITE_LOCK).with_context(|| format!("can't read {AZURITE_LOCK}"))?;
    let stamp = Path::new(AZURITE).join("installed.json");
    if fs::read_to_string(&stamp).is_ok_and(|installed| installed == wanted) {
        return Ok(());
    }
    println!("installing azurite for the tests of buckets into {AZURITE}");
    // One that was begun and not ended is begun again.
    let _ = fs::remove_dir_all(AZURITE);
    fs::create_dir_all(AZURITE)?;
    for file in ["package.json", "package-lock.json"] {
        fs::copy(Path::new("xtask/azurite").join(file), Path::new(AZURITE).join(file))?;
    }
    let mut npm = Command::new(python::tool("npm"));
    // Nothing of it is compiled.
    npm.args(["ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]).current_dir(AZURITE);
    run(&mut npm).with_context(|| {
        format!("can't install azurite: `npm ci` in {AZURITE}; or leave it out with `--without azurite`")
    })?;
    Ok(fs::write(stamp, wanted)?)
}

/// Installs s3s-fs where it isn't there.
pub(crate) fn ensure_s3s() -> anyhow::Result<()> {
    let program: PathBuf = Path::new(TOOLS).join("bin/s3s-fs");
    let has = Command::new(&program).arg("--version").output();
    if has.is_ok_and(|said| String::from_utf8_lossy(&said.stdout).contains(S3S_VERSION)) {
        return Ok(());
    }
    println!(
        "installing s3s-fs {S3S_VERSION} for the tests of buckets into {TOOLS}, which takes some minutes"
    );
    let mut install = command(&["install", "--locked", "--quiet", "--root", TOOLS, "--version", S3S_VERSION]);
    install.args(["--features", "binary", "--profile", "dev", "s3s-fs"]).env("CARGO_PROFILE_DEV_DEBUG", "0");
    run(&mut install)
        .with_context(|| "can't install s3s-fs with cargo; or leave it out with `--without s3s`".to_owned())
}
