//! `freeze`: keeps the SDK as it is now beside the tests, which build plugins with it for as long as its ABI is taken.

use std::{fs, path::Path};

use anyhow::{Context, bail};

use crate::build;

/// Where frozen SDKs lie, by the ABI's numbers.
const COMPAT: &str = "tests/compat";
/// What an author's plugin is built with.
const CRATES: [(&str, &str); 2] =
    [("modalkit-abi", "sdk/abi/Cargo.toml"), ("modalkit-sdk", "sdk/Cargo.toml")];
const WORKSPACE: &str = "Cargo.toml";

/// Packs both crates into a folder of this ABI's minor number.
pub(crate) fn run() -> anyhow::Result<()> {
    let versions: Vec<String> =
        CRATES.iter().map(|(_, manifest)| version(Path::new(manifest))).collect::<anyhow::Result<_>>()?;
    let mut numbers = versions[0].split('.');
    let (Some(major), Some(minor)) = (numbers.next(), numbers.next()) else {
        bail!("{}: expected a version of three numbers, found {:?}", CRATES[0].1, versions[0]);
    };
    let folder = Path::new(COMPAT).join(format!("{major}.{minor}"));
    if fs::read_dir(&folder).is_ok_and(|files| {
        files.flatten().any(|file| file.path().extension().is_some_and(|kind| kind == "crate"))
    }) {
        bail!(
            "{} is there already, and a frozen SDK is never changed: an addition to the boundary takes the next minor number (docs/abi.md)",
            folder.display()
        );
    }
    let mut pack = vec!["package", "--no-verify", "--exclude-lockfile"];
    CRATES.iter().for_each(|(name, _)| pack.extend(["--package", name]));
    build::cargo(&pack)?;
    fs::create_dir_all(&folder)?;
    for ((name, _), version) in CRATES.iter().zip(&versions) {
        let file = format!("{name}-{version}.crate");
        let packed = build::target().join("package").join(&file);
        fs::copy(&packed, folder.join(&file)).with_context(|| format!("can't copy {}", packed.display()))?;
    }
    println!(
        "the SDK of ABI {major}.{minor} is in {}; a plugin that uses it belongs beside it",
        folder.display()
    );
    Ok(())
}

/// The version in a manifest, which may inherit the workspace's.
fn version(manifest: &Path) -> anyhow::Result<String> {
    let text = fs::read_to_string(manifest).with_context(|| format!("can't read {}", manifest.display()))?;
    if text.lines().any(|line| line == "version.workspace = true") {
        return version(Path::new(WORKSPACE));
    }
    let written = text.lines().find_map(|line| line.strip_prefix("version = "));
    let written = written.with_context(|| format!("{} says no version", manifest.display()))?;
    Ok(written.trim_matches('"').to_owned())
}
