//! `new-plugin`: a pipeline that compiles, passes its own tests and serves at once, made from `plugins/echo`.

use std::{fs, path::Path};

use anyhow::{Context, bail};

const MANIFEST: &str = include_str!("../../plugins/echo/Cargo.toml");
const LOCK: &str = include_str!("../../Cargo.lock");
const SOURCE: &str = include_str!("../../plugins/echo/src/lib.rs");

pub(crate) fn create(name: &str) -> anyhow::Result<()> {
    check(name)?;
    let folder = Path::new("plugins").join(name);
    if folder.exists() {
        bail!("{} is there already; choose another name or edit it", folder.display());
    }
    fs::create_dir_all(folder.join("src")).with_context(|| format!("can't make {}", folder.display()))?;
    fs::write(folder.join("Cargo.toml"), manifest(name))?;
    fs::write(folder.join("src/lib.rs"), source(name))?;
    println!(
        "made {folder}\n\n  \
         cargo test --package {name}        runs its tests, with no host\n  \
         cargo xtask plugin {name}          builds it and puts it into the volume: a running host serves it at once\n  \
         curl -d '{{\"text\": \"hello\"}}' 'http://127.0.0.1:8000/predict_sync?model_name={name}'",
        folder = folder.display()
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
    // A package of that name would be ambiguous, and a keyword is no crate's name.
    let locked = format!("name = \"{name}\"");
    let keyword = [
        "as", "async", "await", "crate", "dyn", "enum", "fn", "if", "impl", "in", "loop", "match", "mod",
        "move", "mut", "pub", "ref", "self", "static", "struct", "super", "trait", "type", "unsafe", "use",
        "where", "while", "test", "core", "std", "alloc",
    ];
    if keyword.contains(&name) || name.starts_with("lib") || LOCK.lines().any(|line| line == locked) {
        bail!("{name:?} names something else already; choose another");
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
    // The first paragraph speaks of echo; the rest is as good a start as any.
    let body = SOURCE.split_once("\n\n").map_or(SOURCE, |(_, body)| body);
    let body = body.trim_start_matches(|letter| letter != 'u');
    format!(
        "//! The {name} pipeline. It upper-cases a text: replace input, output and stages by your model's.\n\n{body}"
    )
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
        assert!(source.contains("\n\nuse modalkit_sdk::"), "{source}");
        assert!(source.contains("export_pipeline!(Pipeline);"));
    }

    #[test]
    fn names_that_would_not_compile_are_refused() {
        for name in ["", "Face", "1x", "a b", "a_b", "a-", "../x", "test", "libx", "serde", "match", "bare"] {
            assert!(check(name).is_err(), "{name}");
        }
        assert!(check("face-detector2").is_ok());
    }
}
