//! The object stores that tests of buckets run against, beside moto: azurite, by npm, and s3s-fs, by cargo; and what else comes by
//! npm. All of it under `target/`.

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

const NODE: &str = "target/node";
/// What is installed, with the digests of everything in it.
const NODE_LOCK: &str = "xtask/node-tools/package-lock.json";
const TOOLS: &str = "target/tools";
const S3S_VERSION: &str = "0.14.1";

/// Installs azurite, the schemas that rendered files are held against, and what looks at pages, where they aren't there, by the npm of the Python tools.
pub(crate) fn ensure_node() -> anyhow::Result<()> {
    let wanted = fs::read_to_string(NODE_LOCK).with_context(|| format!("can't read {NODE_LOCK}"))?;
    let stamp = Path::new(NODE).join("installed.json");
    if fs::read_to_string(&stamp).is_ok_and(|installed| installed == wanted) {
        return Ok(());
    }
    println!("installing the tests' tools for node into {NODE}, as {NODE_LOCK} has them");
    // One that was begun and not ended is begun again.
    let _ = fs::remove_dir_all(NODE);
    fs::create_dir_all(NODE)?;
    for file in ["package.json", "package-lock.json"] {
        fs::copy(Path::new("xtask/node-tools").join(file), Path::new(NODE).join(file))?;
    }
    let mut npm = Command::new(python::tool("npm"));
    // Nothing of it is compiled.
    npm.args(["ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]).current_dir(NODE);
    run(&mut npm).with_context(|| {
        format!("can't install the tests' tools for node: `npm ci` in {NODE}; or leave them out with `--without azurite --without rendering --without browser`")
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
