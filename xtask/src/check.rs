//! `test` and `ci`.

use std::time::Instant;

use anyhow::bail;

use crate::{
    brokers,
    build::{cargo, command, run},
    dependencies, python,
};

/// What tests may be left without. A module of tests that needs one is called `with_NAME`.
const NEEDS: [&str; 4] = ["redis", "moto", "taskiq", "mount"];

/// Every test. The end-to-end tests start real hosts with real plugins, so these are built first.
pub(crate) fn test(args: &[String], without: &[String]) -> anyhow::Result<()> {
    if let Some(unknown) = without.iter().find(|name| !NEEDS.contains(&name.as_str())) {
        bail!("--without {unknown}: expected one of {}", NEEDS.join(", "));
    }
    let has = |name: &str| !without.iter().any(|without| without == name);
    if has("redis") {
        brokers::ensure_redis()?;
    }
    if has("moto") || has("taskiq") {
        python::ensure()?;
    }
    println!("building the host, the plugins and the fixtures");
    cargo(&["build", "--workspace"])?;
    let mut tests = vec!["test".to_owned(), "--workspace".to_owned()];
    tests.extend_from_slice(args);
    if !without.is_empty() {
        if !args.iter().any(|arg| arg == "--") {
            tests.push("--".to_owned());
        }
        // Tests that need a broker stand in modules that say so.
        tests.extend(without.iter().flat_map(|name| ["--skip".to_owned(), format!("with_{name}::")]));
    }
    cargo(&tests)?;
    for name in without {
        println!("not tested: what needs {name} (--without {name})");
    }
    Ok(())
}

/// What has to hold before a change is taken, each step with the time it took.
pub(crate) fn ci() -> anyhow::Result<()> {
    timed("formatting", || cargo(&["fmt", "--all", "--check"]))?;
    timed("lints", || cargo(&["clippy", "--workspace", "--all-targets", "--", "--deny", "warnings"]))?;
    timed("documentation", || {
        let mut doc = command(&["doc", "--workspace", "--no-deps", "--document-private-items"]);
        run(doc.env("RUSTDOCFLAGS", "--deny warnings"))
    })?;
    timed("yanked versions", dependencies::yanked)?;
    timed("licences, bans and sources", dependencies::deny)?;
    timed("tests", || test(&[], &[]))
}

fn timed(what: &str, step: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<()> {
    println!("== {what}");
    let begun = Instant::now();
    step()?;
    println!("== {what}: {:.0} s", begun.elapsed().as_secs_f64());
    Ok(())
}
