//! `test` and `ci`.

use std::{path::Path, process::Command, time::Instant};

use anyhow::{Context, bail};

use crate::{
    brokers,
    build::{cargo, command, run},
    dependencies, python, stores,
};

/// What tests may be left without. A module of tests that needs one is called `with_NAME`.
const NEEDS: [&str; 14] = [
    "redis",
    "moto",
    "taskiq",
    "python",
    "mount",
    "azurite",
    "s3s",
    "gcs",
    "rendering",
    "kserve",
    "mlserver",
    "openapi",
    "browser",
    "models",
];
/// Of these, clients in Python that want an environment of their own.
const CLIENTS: [&str; 3] = ["kserve", "mlserver", "openapi"];

/// Where Debian puts it.
const CHROMIUM: &str = "/usr/bin/chromium";

/// End-to-end tests of what callers see of a pipeline: they run again with each replica in a process of its own.
const ISOLATED: [&str; 7] =
    ["batching::", "digits::", "failures::", "lifecycle::", "serving::", "streams::", "tensors::"];
/// Of these, the ones of what is otherwise there: a host that ends with a pipeline, threads that are left hanging, and inputs that are turned down
/// before they take a place in a batch.
const IN_PROCESS_ONLY: [&str; 7] = [
    "failures::a_plugin_that_ends_the_process",
    "failures::content_that_ends_the_host",
    "failures::a_batch_that_overruns",
    "failures::a_thread_of_an_earlier_generation",
    "failures::a_model_whose_replicas_hang",
    "failures::each_batch_of_a_given_up_replica",
    "serving::health_and_metrics_tell_what_happened",
];
/// Sets how hosts of tests run their pipelines.
const ISOLATION: (&str, &str) = ("MODALKIT_APP_SETTINGS__DEPLOYMENT_CONFIG__ISOLATION", "process");
/// Tests that run at once, for each two cores: most of them wait.
const THREADS_OF_TWO_CORES: usize = 3;

/// Every test. The end-to-end tests start real hosts with real plugins, so these are built first.
pub(crate) fn test(args: &[String], without: &[String]) -> anyhow::Result<()> {
    if let Some(unknown) = without.iter().find(|name| !NEEDS.contains(&name.as_str())) {
        bail!("--without {unknown}: expected one of {}", NEEDS.join(", "));
    }
    let has = |name: &str| !without.iter().any(|without| without == name);
    if has("redis") {
        brokers::ensure_redis()?;
    }
    if ["moto", "taskiq", "python", "azurite", "gcs", "rendering", "browser", "models"].into_iter().any(has) {
        python::ensure()?;
    }
    for client in CLIENTS.into_iter().filter(|client| has(client)) {
        python::ensure_client(client)?;
    }
    if has("azurite") || has("rendering") || has("browser") {
        stores::ensure_node()?;
    }
    if has("browser") {
        ensure_browser()?;
    }
    if has("rendering") || has("gcs") {
        python::ensure_archives()?;
    }
    if has("models") {
        python::ensure_models()?;
    }
    if has("s3s") {
        stores::ensure_s3s()?;
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
    let cores = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
    let threads = (cores * THREADS_OF_TWO_CORES).div_ceil(2).to_string();
    let threads = ("RUST_TEST_THREADS", std::env::var("RUST_TEST_THREADS").unwrap_or(threads));
    let tests: Vec<&str> = tests.iter().map(String::as_str).collect();
    run(command(&tests).env(threads.0, &threads.1))?;
    if args.is_empty() {
        // With the workspace's own choice of features: what is built already will do.
        println!("end-to-end tests again, with each replica in a process of its own");
        let mut tests = vec!["test", "--workspace", "--test", "e2e", "--"];
        tests.extend(ISOLATED);
        tests.extend(IN_PROCESS_ONLY.iter().flat_map(|name| ["--skip", name]));
        run(command(&tests).env(threads.0, &threads.1).env(ISOLATION.0, ISOLATION.1))?;
    }
    for name in without {
        println!("not tested: what needs {name} (--without {name})");
    }
    Ok(())
}

/// Installs Chromium, which looks at pages, where it isn't there.
fn ensure_browser() -> anyhow::Result<()> {
    if Path::new(CHROMIUM).is_file() {
        return Ok(());
    }
    println!("installing Chromium, for the tests of pages");
    let hint = "the tests of pages need Chromium: `apt-get install chromium`, as root, or leave them out with `--without browser`";
    run(Command::new("apt-get").arg("update")).context(hint)?;
    run(Command::new("apt-get").args(["install", "--yes", "--no-install-recommends", "chromium"]))
        .context(hint)
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
