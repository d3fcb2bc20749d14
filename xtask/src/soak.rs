//! `soak` and `bench reload`: builds host, fixtures and the soak program in release, and runs it.

use std::process::Command;

use crate::{brokers, build, python};

/// The parts that need Redis and SQS, and those that need the Python tools alone.
const WITH_BROKERS: [&str; 2] = ["jobs", "sharing"];
const WITH_PYTHON: [&str; 1] = ["edits"];

pub(crate) fn run(parts: &[String]) -> anyhow::Result<()> {
    let has_any = |of: &[&str]| parts.is_empty() || parts.iter().any(|part| of.contains(&part.as_str()));
    if has_any(&WITH_BROKERS) {
        brokers::ensure_redis()?;
    }
    if has_any(&WITH_BROKERS) || has_any(&WITH_PYTHON) {
        python::ensure()?;
    }
    let packages = ["modalkit", "echo", "fixture-killer", "fixture-puppet", "fixture-versioned"];
    let mut build = vec!["build", "--release"];
    packages.iter().for_each(|package| build.extend(["--package", package]));
    build::cargo(&build)?;
    build::cargo(&["build", "--release", "--package", "modalkit-tests", "--bin", "soak"])?;
    build::run(Command::new(build::release().join("soak")).args(parts))
}
