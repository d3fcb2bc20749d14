//! `gpu-test` and `bench similarity`: builds what they need in release, and runs it.

use std::process::Command;

use crate::build;

/// What `gpu_test` starts. Together with it this is all that a machine with a GPU needs, below `target/release`.
const PACKAGES: [&str; 3] = ["modalkit", "similarity", "fixture-gpu"];

pub(crate) fn test() -> anyhow::Result<()> {
    for package in PACKAGES {
        build::cargo(&["build", "--release", "--package", package])?;
    }
    build_measure()?;
    build::cargo(&["build", "--release", "--package", "modalkit-tests", "--bin", "gpu_test"])?;
    build::run(&mut Command::new(build::release().join("gpu_test")))
}

pub(crate) fn bench() -> anyhow::Result<()> {
    build_measure()?;
    build::run(&mut Command::new(build::release().join("examples/measure")))
}

fn build_measure() -> anyhow::Result<()> {
    build::cargo(&["build", "--release", "--package", "similarity", "--example", "measure"])
}
