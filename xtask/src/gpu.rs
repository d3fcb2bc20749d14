//! `gpu-test` and `bench similarity`: builds what they need in release, and runs it.

use std::{fs, process::Command};

use crate::build;

const PACKAGES: [&str; 3] = ["modalkit", "similarity", "fixture-gpu"];
/// All that a machine with a GPU needs, below `target/release`.
const FILES: [&str; 5] = ["gpu_test", "modalkit", "libsimilarity.so", "libgpu.so", "examples/measure"];
/// Where they are put together, without what debuggers want: some 40 MB, to be carried.
const FOLDER: &str = "gpu-test";

pub(crate) fn test() -> anyhow::Result<()> {
    for package in PACKAGES {
        build::cargo(&["build", "--release", "--package", package])?;
    }
    build_measure()?;
    build::cargo(&["build", "--release", "--package", "modalkit-tests", "--bin", "gpu_test"])?;
    let folder = build::release().join(FOLDER);
    fs::create_dir_all(folder.join("examples"))?;
    for file in FILES {
        build::run(
            Command::new("strip")
                .args(["--strip-debug", "-o"])
                .arg(folder.join(file))
                .arg(build::release().join(file)),
        )?;
    }
    println!("{} needs nothing else, neither cargo nor this tree", folder.display());
    build::run(&mut Command::new(folder.join("gpu_test")))
}

pub(crate) fn bench() -> anyhow::Result<()> {
    build_measure()?;
    build::run(&mut Command::new(build::release().join("examples/measure")))
}

fn build_measure() -> anyhow::Result<()> {
    build::cargo(&["build", "--release", "--package", "similarity", "--example", "measure"])
}
