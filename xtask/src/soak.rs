//! `soak` and `bench reload`: builds host, fixtures and the soak program in release, and runs it.

use std::process::Command;

use crate::{build, python};

pub(crate) fn run(parts: &[String]) -> anyhow::Result<()> {
    python::ensure()?;
    let packages = ["modalkit", "echo", "fixture-puppet", "fixture-versioned"];
    let mut build = vec!["build", "--release"];
    packages.iter().for_each(|package| build.extend(["--package", package]));
    build::cargo(&build)?;
    build::cargo(&["build", "--release", "--package", "modalkit-tests", "--bin", "soak"])?;
    build::run(Command::new(build::release().join("soak")).args(parts))
}
