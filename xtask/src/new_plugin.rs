//! `new-plugin`: a pipeline that compiles, passes its own tests and serves at once, made from `xtask/template` and the manifest of
//! `plugins/echo`.

use std::{fs, path::Path};

use anyhow::{Context, bail};

use crate::run;

const MANIFEST: &str = include_str!("../../plugins/echo/Cargo.toml");
const LOCK: &str = include_str!("../../Cargo.lock");
const SOURCE: &str = include_str!("../template/lib.rs");
/// Stands for the new plugin's name in the template.
const NAME: &str = "NAME";

pub(crate) fn create(name: &str) -> anyhow::Result<()> {
    let folder = Path::new("plugins").join(name);
    if folder.join("Cargo.toml").exists() {
        bail!("the plugin {name} is there already, in {}: edit it, or choose another name", folder.display());
    }
    check(name)?;
    if folder.exists() {
        bail!("{} is there already and is no plugin; choose another name", folder.display());
    }
    fs::create_dir_all(folder.join("src")).with_context(|| format!("can't make {}", folder.display()))?;
    fs::write(folder.join("Cargo.toml"), manifest(name))?;
    fs::write(folder.join("src/lib.rs"), source(name))?;
    println!(
        "made {folder}\n\n  \
         cargo test --package {name}        runs its tests, with no host\n  \
         cargo xtask plugin {name}          builds it and puts it into the volume: a running host serves it within seconds\n  \
         curl -d '{{\"text\": \"hello\"}}' 'http://{listen}/predict_sync?model_name={name}'",
        folder = folder.display(),
        listen = run::listen(),
    );
    Ok(())
}

fn check(name: &str) -> anyhow::Result<()> {
    let fits = |letter: char| letter.is_ascii_lowercase() || letter.is_ascii_digit() || letter == '-';
    let starts = name.chars().next().is_some_and(|first| first.is_ascii_lowercase());
    if !starts || !name.chars().all(fits) || name.ends_with('-') {
        bail!(
            "expected a name of lowercase letters, digits and inner hyphens, such as `face-detector`, found {name:?}"
        );
    }
    let locked = format!("name = \"{name}\"");
    let keyword = [
        "as", "async", "await", "crate", "dyn", "enum", "fn", "if", "impl", "in", "loop", "match", "mod",
        "move", "mut", "pub", "ref", "self", "static", "struct", "super", "trait", "type", "unsafe", "use",
        "where", "while", "test", "core", "std", "alloc",
    ];
    if keyword.contains(&name) {
        bail!("{name:?} is a word of Rust's own and can't name a crate; choose another name");
    }
    if name.starts_with("lib") {
        bail!("{name:?}: a plugin's file is lib….so already; choose a name without `lib`");
    }
    if LOCK.lines().any(|line| line == locked) {
        bail!("{name:?} is the name of a crate that this workspace uses; choose another name");
    }
    Ok(())
}

fn manifest(name: &str) -> String {
    let described = |line: &str| match line {
        "name = \"echo\"" => format!("name = \"{name}\"\n"),
        line if line.starts_with("description") => format!("description = \"The {name} pipeline\"\n"),
        line => format!("{line}\n"),
    };
    MANIFEST.lines().map(described).collect()
}

fn source(name: &str) -> String {
    SOURCE.replace(NAME, name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_template_takes_the_new_name_everywhere() {
        let manifest = manifest("face-detector");
        assert!(manifest.contains("name = \"face-detector\"") && !manifest.contains("echo"), "{manifest}");
        let source = source("face-detector");
        assert!(source.starts_with("//! The face-detector pipeline."), "{source}");
        assert!(source.contains("[model_settings.model_entries.face-detector]") && !source.contains(NAME));
    }

    #[test]
    fn names_that_would_not_compile_are_refused() {
        for name in ["", "Face", "1x", "a b", "a_b", "a-", "../x", "test", "libx", "serde", "match", "bare"] {
            assert!(check(name).is_err(), "{name}");
        }
        assert!(check("face-detector2").is_ok());
    }
}
