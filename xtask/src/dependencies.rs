//! What is linked into the product beside its own code: licences, sources and bans (`deny.toml`), versions that their authors took back,
//! and published advisories.
//!
//! The advisories' database is in no package registry but in a repository on the web. `cargo xtask ci` therefore checks what the registry
//! itself knows, which is whether a version was yanked, as one with a known fault usually is; `cargo xtask audit` checks the
//! advisories as well, where that repository can be reached. Neither passes over what it can't check.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, bail};

use crate::build::{command, run};

/// The version of cargo-deny that `deny.toml` is written for.
const VERSION: &str = "0.20.2";
const TOOLS: &str = "target/tools";
const YANKED: &str = "target/tools/yanked";

/// Licences, bans and sources.
pub(crate) fn deny() -> anyhow::Result<()> {
    run(Command::new(ensure()?).args(["check", "bans", "licenses", "sources"]))
}

/// Everything of `deny.toml`, advisories included.
pub(crate) fn audit() -> anyhow::Result<()> {
    yanked()?;
    run(Command::new(ensure()?).args(["check", "advisories", "bans", "licenses", "sources"]))
}

/// No version in `Cargo.lock` has been taken back: cargo chooses none that was for a package that is locked nowhere yet, so that one which
/// asks for all of them, each exactly as it is locked, can't be resolved.
pub(crate) fn yanked() -> anyhow::Result<()> {
    let lock = fs::read_to_string("Cargo.lock").context("can't read Cargo.lock")?;
    let locked = locked(&lock);
    println!("asking the registry whether one of {} versions was yanked", locked.len());
    let folder = Path::new(YANKED);
    // What an earlier run resolved would count as locked.
    let _ = fs::remove_dir_all(folder);
    fs::create_dir_all(folder.join("src")).with_context(|| format!("can't make {YANKED}"))?;
    fs::write(folder.join("src/lib.rs"), "")?;
    fs::write(folder.join("Cargo.toml"), manifest(&locked))?;
    let manifest = folder.join("Cargo.toml").display().to_string();
    let output = command(&["generate-lockfile", "--quiet", "--manifest-path", &manifest])
        .output()
        .context("can't start cargo")?;
    if !output.status.success() {
        bail!(
            "a version in Cargo.lock was yanked, or the registry can't be asked (then run this again):\n{}\n`cargo update PACKAGE` takes another version",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}

/// Names and versions of what comes from the registry.
fn locked(lock: &str) -> Vec<(&str, &str)> {
    let field = |package: &'static str| move |lines: &&str| lines.starts_with(package);
    lock.split("[[package]]")
        .filter(|package| package.contains("\nsource = \"registry+"))
        .filter_map(|package| {
            let value = |name| package.lines().find(field(name))?.split('"').nth(1);
            Some((value("name = ")?, value("version = ")?))
        })
        .collect()
}

/// A package that wants exactly these.
fn manifest(locked: &[(&str, &str)]) -> String {
    let mut text = "[package]\nname = \"yanked\"\nversion = \"0.0.0\"\nedition = \"2024\"\n\n[workspace]\n\n[dependencies]\n".to_owned();
    for (index, (name, version)) in locked.iter().enumerate() {
        // A version's part behind its `+` is no part of what is asked for.
        let version = version.split('+').next().unwrap_or(version);
        let _ = writeln!(
            text,
            "d{index} = {{ package = \"{name}\", version = \"={version}\", default-features = false }}"
        );
    }
    text
}

/// cargo-deny, installed where it isn't.
fn ensure() -> anyhow::Result<PathBuf> {
    let program = Path::new(TOOLS).join("bin/cargo-deny");
    let has = Command::new(&program).arg("--version").output();
    if !has.is_ok_and(|said| String::from_utf8_lossy(&said.stdout).contains(VERSION)) {
        println!("installing cargo-deny {VERSION} into {TOOLS}, which takes some minutes");
        let mut install = command(&["install", "--locked", "--quiet", "--root", TOOLS, "--version", VERSION]);
        run(install.arg("cargo-deny").env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "0"))
            .context("can't install cargo-deny, which checks licences, bans and sources")?;
    }
    Ok(program)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_registry_has_is_asked_for_exactly() {
        let lock = "version = 4\n\n[[package]]\nname = \"a\"\nversion = \"1.2.3+4\"\nsource = \"registry+x\"\ndependencies = [\n \"b\",\n]\n\n[[package]]\nname = \"own\"\nversion = \"0.1.0\"\n";
        let locked = locked(lock);
        assert_eq!(locked, [("a", "1.2.3+4")]);
        let text = manifest(&locked);
        assert!(
            text.ends_with("\nd0 = { package = \"a\", version = \"=1.2.3\", default-features = false }\n"),
            "{text}"
        );
    }
}
