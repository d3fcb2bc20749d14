//! The house rules that a compiler doesn't check: which crate may know which, where `unsafe` and HTTP may stand, that
//! every file says what it is for, and that the README and the reference configuration are true.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use modalkit::config::{self, Environment};
use modalkit_tests::{Setup, built, library, wait_until, workspace};
use serde_json::{Value, json};

/// Every Rust file of the project, with its path in the workspace.
fn sources() -> Vec<(String, String)> {
    let mut files = Vec::new();
    for folder in ["sdk", "host", "plugins", "tests", "xtask"] {
        collect(&workspace().join(folder), &mut files);
    }
    assert!(files.len() > 50, "the walk found {} files", files.len());
    let name = |file: &PathBuf| file.strip_prefix(workspace()).unwrap().to_string_lossy().into_owned();
    files.iter().map(|file| (name(file), fs::read_to_string(file).unwrap())).collect()
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, files);
        } else if path.extension().is_some_and(|kind| kind == "rs") {
            files.push(path);
        }
    }
}

/// The lines that are code, without what follows `//`.
fn code(text: &str) -> impl Iterator<Item = &str> {
    text.lines().map(|line| line.split("//").next().unwrap_or_default())
}

fn only_in(word: &str, places: &[&str]) {
    for (file, text) in sources() {
        let allowed = places.iter().any(|place| file.starts_with(place));
        let found = code(&text).find(|line| line.contains(word));
        assert!(
            allowed || found.is_none(),
            "{file}: `{word}` belongs in {places:?} only: {}",
            found.unwrap_or_default().trim()
        );
    }
}

#[test]
fn every_file_opens_with_what_it_owns() {
    for (file, text) in sources() {
        assert!(text.starts_with("//! "), "{file} doesn't open with a `//!` line");
    }
}

#[test]
fn unsafe_code_stands_at_the_boundary_only() {
    // The attribute `#[unsafe(no_mangle)]` and this test's own words are no unsafe code.
    let boundary = [
        "sdk/",
        "host/loader/",
        "host/worker/src/child/",
        "host/device/src/driver.rs",
        "plugins/similarity/",
        "tests/e2e/architecture.rs",
        "tests/fixtures/",
    ];
    only_in("unsafe {", &boundary);
    only_in("unsafe fn", &boundary);
    only_in("unsafe impl", &boundary);
}

#[test]
fn each_library_is_known_where_it_belongs_only() {
    let itself = "tests/e2e/architecture.rs";
    only_in(
        "hyper::",
        &["host/src/ingress/", "host/src/egress/", "host/src/admin.rs", "xtask/bare/", itself],
    );
    only_in("libloading", &["host/loader/", itself]);
    only_in("abi_stable", &["sdk/", "host/loader/", "tests/fixtures/other_layout/", itself]);
    only_in("notify::", &["host/src/reload/", itself]);
    only_in(
        "prometheus::",
        &[
            "host/src/insight/metrics/",
            "host/src/access/",
            "host/src/ingress/connection.rs",
            "host/src/reload/build.rs",
            itself,
        ],
    );
    only_in("modalkit_loader", &["host/loader/", "host/src/app.rs", "tests/e2e/queues.rs", itself]);
    only_in("use rten", &["plugins/onnx/", "plugins/embed/", itself]);
    only_in("use tokenizers", &["plugins/embed/", itself]);
    only_in("use ort::", &["plugins/onnx/", itself]);
    only_in(
        "object_store::",
        &["host/bucket/", "host/src/access/ssm.rs", "host/queue/src/sqs.rs", "tests/src/stores.rs", itself],
    );
    only_in("rusqlite", &["host/journal/", itself]);
    only_in(
        "cudarc",
        &["host/device/src/driver.rs", "sdk/", "plugins/similarity/", "tests/fixtures/gpu/", itself],
    );
    only_in("nvml_wrapper", &["host/device/src/monitor.rs", itself]);
    only_in("redis::", &["host/queue/", "tests/", itself]);
    only_in(
        "opentelemetry",
        &[
            "host/src/insight/",
            "host/src/ingress/request_timings.rs",
            // The word for it in the Open Inference Protocol.
            "host/src/ingress/v2/settings.rs",
            itself,
        ],
    );
    only_in(
        "tonic::",
        &["host/proto/", "host/src/ingress/", "host/src/egress/grpc.rs", "xtask/bare/", itself],
    );
    only_in(
        "rustls::",
        &[
            "host/src/ingress/",
            "host/src/app.rs",
            "tests/e2e/https.rs",
            "tests/e2e/protocols/calls.rs",
            itself,
        ],
    );
    only_in("governor::", &["host/src/access/", itself]);
    only_in("base64::", &["host/src/protocol/", itself]);
    only_in("serde_saphyr", &["host/src/config/", itself]);
    only_in("clap", &["host/src/main.rs", "host/src/cli/", itself]);
}

#[test]
fn of_ours_each_crate_imports_only_what_the_design_allows() {
    let allowed = BTreeMap::from([
        ("sdk/abi", vec![]),
        ("sdk", vec!["modalkit-abi"]),
        ("host/bucket", vec![]),
        ("host/batch", vec![]),
        ("host/engine", vec![]),
        ("host/loader", vec!["modalkit-abi", "modalkit-engine"]),
        ("host/device", vec![]),
        ("host/journal", vec![]),
        ("host/proto", vec![]),
        ("host/queue", vec!["modalkit-engine"]),
        ("host/worker", vec!["modalkit-engine"]),
        (
            "host",
            vec![
                "modalkit-batch",
                "modalkit-bucket",
                "modalkit-device",
                "modalkit-engine",
                "modalkit-journal",
                "modalkit-loader",
                "modalkit-proto",
                "modalkit-queue",
                "modalkit-worker",
            ],
        ),
        ("tests", vec!["modalkit", "modalkit-engine", "modalkit-loader", "modalkit-proto", "modalkit-queue"]),
        ("xtask", vec![]),
        ("xtask/bare", vec!["modalkit-proto"]),
    ]);
    let mut manifests = vec![];
    for (folder, imports) in allowed {
        manifests.push((folder.to_owned(), imports));
    }
    for parent in ["plugins", "tests/fixtures"] {
        for entry in fs::read_dir(workspace().join(parent)).unwrap() {
            let name = entry.unwrap().file_name().to_string_lossy().into_owned();
            if name == "python" {
                // Folders of another language.
                continue;
            }
            // It is a boundary of its own, made to be refused.
            let imports = if name == "other_layout" { "modalkit-abi" } else { "modalkit-sdk" };
            manifests.push((format!("{parent}/{name}"), vec![imports]));
        }
    }
    for (folder, imports) in manifests {
        let manifest = fs::read_to_string(workspace().join(&folder).join("Cargo.toml")).unwrap();
        let ours = manifest
            .lines()
            .filter_map(|line| line.split(['.', ' ', '=']).next())
            .filter(|name| name.starts_with("modalkit"));
        for name in ours {
            assert!(imports.contains(&name), "{folder} imports {name}; allowed are {imports:?}");
        }
    }
}

/// Host and SDK don't know each other, and must agree on which errors of CUDA last.
#[test]
fn both_sides_take_the_same_errors_for_lasting() {
    let table = |file: &str, end: &str| {
        let text = fs::read_to_string(workspace().join(file)).unwrap();
        let table = text.split_once("const LASTING: [").unwrap().1.split_once("= [").unwrap().1;
        let table = table.split_once(end).unwrap().0;
        let numbers =
            table.split(|letter: char| !letter.is_ascii_digit()).filter_map(|word| word.parse().ok());
        numbers.collect::<Vec<u32>>()
    };
    let host = table("host/device/src/driver.rs", "];");
    assert!(host.contains(&700) && host.len() > 10, "{host:?}");
    assert_eq!(host, table("sdk/src/device.rs", "];"));
}

#[test]
fn nothing_is_linked_with_cuda() {
    for file in [built().join("modalkit"), library("similarity"), library("gpu")] {
        let linked = Command::new("ldd").arg(&file).output().unwrap();
        let linked = String::from_utf8(linked.stdout).unwrap();
        assert!(linked.contains("libc.so"), "{}: {linked}", file.display());
        for name in ["libcu", "libnv"] {
            assert!(!linked.contains(name), "{} is linked with {name}: {linked}", file.display());
        }
    }
}

#[test]
fn the_reference_configuration_shows_the_defaults() {
    let file = workspace().join("config/modalkit.toml");
    let shown = config::load(&[file], &Environment::default()).unwrap();
    let default = config::load(&[], &Environment::default()).unwrap();
    assert_eq!(shown.warnings, []);
    let (shown, default) = (shown.config, default.config);
    assert_eq!(format!("{:?}", shown.server), format!("{:?}", default.server));
    assert_eq!(shown.defaults.batch, default.defaults.batch);
    assert_eq!(shown.defaults.replicas, default.defaults.replicas);
    assert_eq!(shown.defaults.reload, default.defaults.reload);
    assert_eq!(shown.requests_max, default.requests_max);
    assert_eq!(shown.models.keys().collect::<Vec<_>>(), ["babble", "digits", "echo", "lookalikes"]);
}

/// Every key with its default, by its path; names of the user's own are `*`.
fn keys(schema: &Value, path: &str, found: &mut Vec<(String, Option<Value>)>) {
    let inside = |step: &str| if path.is_empty() { step.to_owned() } else { format!("{path}.{step}") };
    let properties = schema["properties"].as_object();
    for (key, inner) in properties.into_iter().flatten() {
        keys(inner, &inside(key), found);
    }
    if schema["additionalProperties"]["properties"].is_object() {
        keys(&schema["additionalProperties"], &inside("*"), found);
    } else if properties.is_none() {
        found.push((path.to_owned(), schema.get("default").cloned()));
    }
}

/// The value behind a path; `*` is any name.
fn behind(value: &Value, path: &str) -> Option<Value> {
    let Some((step, rest)) = path.split_once('.').or(Some((path, ""))).filter(|_| !path.is_empty()) else {
        return Some(value.clone());
    };
    match (step, value) {
        ("*", Value::Object(members)) => members.values().find_map(|member| behind(member, rest)),
        _ => behind(value.get(step)?, rest),
    }
}

#[test]
fn the_reference_configuration_has_every_key_with_its_default() {
    let text = fs::read_to_string(workspace().join("config/modalkit.toml")).unwrap();
    // With what stands behind a # as well.
    let is_written = |line: &str| {
        let word = line.split([' ', '.']).next().unwrap_or_default();
        line.starts_with('[')
            || line.contains(" = ")
                && word.bytes().all(|byte| byte.is_ascii_lowercase() || b"_0123456789".contains(&byte))
                && line.split(' ').nth(1) == Some("=")
    };
    let uncommented = |line: &str| match line.strip_prefix("# ").filter(|line| is_written(line)) {
        Some(written) => written.to_owned(),
        None => line.to_owned(),
    };
    let whole: String = text.lines().map(|line| uncommented(line) + "\n").collect();
    let whole: Value = serde_json::to_value(toml::from_str::<toml::Table>(&whole).unwrap()).unwrap();
    let schema = config::schema();
    let faults: Vec<String> = jsonschema::validator_for(&schema)
        .unwrap()
        .iter_errors(&whole)
        .map(|error| error.to_string())
        .collect();
    assert!(faults.is_empty(), "{faults:?}");
    let mut known = Vec::new();
    keys(&schema, "", &mut known);
    assert!(known.len() > 80, "{known:?}");
    for (path, default) in known {
        // An entry's own batches and deployment have the keys of the application's.
        if path.starts_with("model_settings.model_entries.*.") && path.contains("_config.") {
            continue;
        }
        let shown =
            behind(&whole, &path).unwrap_or_else(|| panic!("{path} is missing in config/modalkit.toml"));
        let is_example = [
            "app_settings.deployment_config.mounts",
            "app_settings.deployment_config.cloud_bucket_mounts",
            "app_settings.build_config.env",
            "app_settings.queue_config.backends.*.settings",
            "app_settings.queue_config.consume",
            "model_settings.common",
            // The demonstrations aren't.
            "model_settings.model_entries.*.required",
        ];
        if let Some(default) = default.filter(|_| !is_example.contains(&path.as_str())) {
            assert_eq!(shown, default, "{path}: the default in config/modalkit.toml");
        }
    }
}

#[test]
fn the_glossary_names_what_there_is() {
    let glossary = fs::read_to_string(workspace().join("docs/glossary.md")).unwrap();
    let code: String = sources().into_iter().map(|(_, text)| text).collect();
    let is_word = |letter: char| letter.is_alphanumeric() || letter == '_';
    let words: BTreeSet<&str> = code.split(|letter| !is_word(letter)).collect();
    let mut names = 0;
    for row in glossary.lines().filter(|line| line.starts_with("| ") && line.matches('|').count() == 5) {
        let cell = row.rsplit('|').nth(1).unwrap();
        for name in cell.split('`').skip(1).step_by(2).filter(|name| !name.contains('/')) {
            let last = name.rsplit("::").next().unwrap();
            assert!(words.contains(last), "the glossary has `{name}`, the code hasn't");
            names += 1;
        }
    }
    assert!(names > 80, "{names} names were found");
}

#[test]
fn jobs_know_nothing_of_http() {
    for (file, text) in sources() {
        if ["host/src/jobs/", "host/src/work/", "host/src/protocol/", "host/src/pipeline/"]
            .iter()
            .any(|room| file.starts_with(room))
        {
            let found = code(&text)
                .find(|line| ["egress", "ingress", "hyper"].iter().any(|word| line.contains(word)));
            assert_eq!(found, None, "{file}");
        }
    }
}

/// The README's fenced blocks.
fn readme_blocks() -> Vec<String> {
    let readme = fs::read_to_string(workspace().join("README.md")).unwrap();
    readme.split("```").skip(1).step_by(2).map(ToOwned::to_owned).collect()
}

#[test]
fn the_readme_names_commands_that_there_are() {
    let usage = fs::read_to_string(workspace().join("xtask/src/main.rs")).unwrap();
    let mut commands = 0;
    for block in readme_blocks() {
        for command in block.lines().filter_map(|line| line.trim().strip_prefix("cargo xtask ")) {
            let word = command.split_whitespace().next().unwrap();
            assert!(usage.contains(&format!("\n  {word} ")), "`cargo xtask {word}` is not in the usage text");
            commands += 1;
        }
    }
    assert!(commands >= 2);
}

/// `curl` lines as (path, body), each with the answer that the README prints below it.
fn readme_requests() -> Vec<(String, Value, Value)> {
    let mut requests = Vec::new();
    for block in readme_blocks() {
        let joined = block.replace("\\\n", " ");
        let mut lines = joined.lines().peekable();
        while let Some(line) = lines.next() {
            if !line.starts_with("curl ") || !line.contains("-d '") {
                continue;
            }
            let body = line.split("-d '").nth(1).unwrap().split('\'').next().unwrap();
            let path = line.split("127.0.0.1:8000").nth(1).unwrap().split('\'').next().unwrap();
            let Some(answer) = lines.next_if(|line| line.starts_with(['{', '['])) else { continue };
            requests.push((
                path.to_owned(),
                serde_json::from_str(body).unwrap(),
                serde_json::from_str(answer).unwrap(),
            ));
        }
    }
    requests
}

#[test]
fn the_readmes_requests_are_answered_as_it_prints() {
    let requests = readme_requests();
    assert!(requests.len() >= 2, "{requests:?}");
    let entry = "plugin = \"onnx\"\npath = \"digits.onnx\"\ntop_k = 3\nlabels = [\"0\", \"1\", \"2\", \"3\", \"4\", \"5\", \"6\", \"7\", \"8\", \"9\"]";
    let setup = Setup::new()
        .plugin("echo")
        .plugin("onnx")
        .config("[model_settings.model_entries.echo]")
        .config(&format!("[model_settings.model_entries.digits]\n{entry}"));
    fs::copy(workspace().join("plugins/onnx/model/digits.onnx"), setup.volume().join("digits.onnx")).unwrap();
    let host = setup.ready();
    wait_until("both serve", || host.get("/readyz").0 == 200);
    for (path, body, expected) in requests {
        let (status, found) = host.post(&path, &body);
        assert_eq!(status, 200, "{found}");
        for (key, value) in expected.as_object().into_iter().flatten() {
            // Scores differ in their last bits from machine to machine, and job ids always.
            if !["top", "outputs", "job_id"].contains(&key.as_str()) {
                assert_eq!(found[key], *value, "{path}: {key}");
            }
        }
    }
    assert_eq!(host.post("/predict_sync?model_name=digits", &json!({})).0, 422);
}
