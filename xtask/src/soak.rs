//! `soak` and `bench reload`: builds host, fixtures and the soak program in release, and runs it.

use std::process::Command;

use crate::{brokers, build, python};

/// The parts that need Redis and SQS.
const WITH_BROKERS: [&str; 2] = ["jobs", "sharing"];

pub(crate) fn run(parts: &[String]) -> anyhow::Result<()> {
    if parts.is_empty() || parts.iter().any(|part| WITH_BROKERS.contains(&part.as_str())) {
        brokers::ensure_redis()?;
        python::ensure()?;
    }
    let packages = ["modalkit", "echo", "fixture-killer", "fixture-puppet", "fixture-versioned"];
    let mut build = vec!["build", "--release"];
    packages.iter().for_each(|package| build.extend(["--package", package]));
    build::cargo(&build)?;
    build::cargo(&["build", "--release", "--package", "modalkit-tests", "--bin", "soak"])?;
    build::run(Command::new(build::release().join("soak")).args(parts))
}
