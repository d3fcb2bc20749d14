//! The promise of `docs/abi.md`: plugins that were built with the first SDK of a minor number of the boundary serve on this host, with what a pipeline of
//! that SDK can do, but for devices.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use modalkit_tests::{Host, KEY, SECRET, Setup, built, events::EventStream, install, workspace};
use serde_json::json;

/// The frozen SDKs, by minor number of the boundary.
fn frozen() -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> = fs::read_dir(workspace().join("tests/compat"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_dir())
        .collect();
    folders.sort();
    folders
}

/// Builds the plugin that lies beside an SDK with that SDK; returns the library.
fn build(sdk: &Path) -> PathBuf {
    let number = sdk.file_name().unwrap().to_str().unwrap();
    // Kept between runs, as everything that cargo builds is.
    let folder = built().join("compat").join(number);
    let files = fs::read_dir(sdk).unwrap().map(|entry| entry.unwrap().path());
    let crates: Vec<PathBuf> =
        files.filter(|file| file.extension().is_some_and(|kind| kind == "crate")).collect();
    let same = |from: &Path, to: &Path| fs::read(to).is_ok_and(|bytes| bytes == fs::read(from).unwrap());
    let kept = |file: &Path| folder.join(file.file_name().unwrap());
    // Files in a crate have no time of their own: another crate of the same name is built from nothing.
    if !crates.iter().all(|file| same(file, &kept(file))) {
        let _ = fs::remove_dir_all(&folder);
    }
    fs::create_dir_all(folder.join("plugin/src")).unwrap();
    for file in crates.iter().filter(|file| !same(file, &kept(file))) {
        let unpacked = Command::new("tar").arg("-xzf").arg(file).arg("-C").arg(&folder).status();
        assert!(unpacked.expect("there is tar").success(), "{}", file.display());
        fs::copy(file, kept(file)).unwrap();
    }
    for file in ["Cargo.toml", "Cargo.lock", "src/lib.rs"] {
        let (from, to) = (sdk.join("plugin").join(file), folder.join("plugin").join(file));
        // What is the same keeps its time, so that nothing is built anew.
        if !same(&from, &to) {
            fs::copy(&from, &to).unwrap();
        }
    }
    let status = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["build", "--locked", "--target-dir"])
        .arg(folder.join("target"))
        .current_dir(folder.join("plugin"))
        // What the tests themselves are built with says nothing about this.
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env_remove("CARGO_BUILD_TARGET")
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        .status();
    assert!(status.expect("cargo starts").success(), "{number}");
    folder.join("target/debug/libfrozen.so")
}

/// A host that serves it as the model `sums`, with the number 100 in its file.
fn serving(library: &Path) -> Host {
    let setup = Setup::new().variable("HUB_TOKEN", SECRET);
    install(library, &setup.volume().join("frozen.so"));
    fs::write(setup.volume().join("offset"), "100").unwrap();
    let folder = setup.volume().display().to_string();
    let config = format!(
        "[app_settings.auth_config.keys.one]\napi_key = {KEY:?}\nexplain = true\n\
         [app_settings.batch_config]\nmax_batch_size = 4\n\
         [app_settings.deployment_config]\nsecrets = [\"hub-token\"]\n\
         [model_settings]\nlocal_model_repository_folder = {folder:?}\n\
         [model_settings.model_entries.sums]\nplugin = \"frozen\"\noffset = \"offset\"\n"
    );
    setup.config(&config).ready()
}

#[test]
fn plugins_of_the_first_sdk_of_each_minor_number_serve_with_all_that_they_can_do() {
    let sdks = frozen();
    assert!(sdks.iter().any(|sdk| sdk.ends_with("5.0")), "{sdks:?}");
    for sdk in sdks {
        let number = sdk.file_name().unwrap().to_str().unwrap().to_owned();
        let library = build(&sdk);
        let inspected = Command::new(built().join("modalkit"))
            .args(["inspect", "--json"])
            .arg(&library)
            .output()
            .unwrap();
        let inspected: serde_json::Value = serde_json::from_slice(&inspected.stdout).unwrap();
        assert_eq!(inspected["abi_version"], number.as_str(), "{inspected}");
        all_of_it(&serving(&library));
    }
}

fn all_of_it(host: &Host) {
    let key: &[(&str, &str)] = &[("x-api-key", KEY)];
    let post = |path: &str, body| host.post_with(&format!("{path}?model_name=sums"), &body, key);
    let token_bytes = SECRET.len();
    let sums = json!({"status": "success", "sums": [101.0, 103.0], "token_bytes": token_bytes});
    // JSON: one input, a list, faults.
    assert_eq!(post("/predict_sync", json!({"values": [1, 2]})), (200, sums.clone()));
    let (status, list) =
        post("/predict_batch", json!([{"values": [1, 2]}, {"values": [1], "note": "fail"}, {"values": []}]));
    assert_eq!((status, &list[0], &list[1]["error"]), (200, &sums, &json!("told to fail")));
    let (status, refused) = post("/predict_sync", json!({"values": [1, -1, -2]}));
    let places: Vec<_> =
        refused["detail"].as_array().unwrap().iter().map(|detail| detail["loc"].clone()).collect();
    assert_eq!((status, places), (422, vec![json!(["body", "values", 1]), json!(["body", "values", 2])]));
    let (status, panicked) = post("/predict_sync", json!({"values": [1], "note": "panic"}));
    assert!(status == 500 && panicked["detail"].as_str().unwrap().contains("told to panic"), "{panicked}");
    // Tensors.
    let tensors = json!({"inputs": [
        {"name": "values", "datatype": "FP32", "shape": [2, 2], "data": [1, 2, 3, 4]},
    ]});
    let (status, inferred) = host.post_with("/v2/models/sums/infer", &tensors, key);
    assert_eq!((status, &inferred["outputs"][0]["data"]), (200, &json!([101.0, 103.0, 103.0, 107.0])));
    // Chunks.
    let headers = format!("x-api-key: {KEY}\r\n");
    let events = EventStream::open(host.connect(), "sums", &json!({"values": [1, 2]}), &headers).rest();
    let data: Vec<_> = events.iter().map(|event| (event.name.as_str(), event.json())).collect();
    assert_eq!(data, [("chunk", json!(101.0)), ("chunk", json!(103.0)), ("end", sums)]);
    let lossy = json!({"values": [1, 2], "note": "lossy"});
    let events = EventStream::open(host.connect(), "sums", &lossy, &headers).rest();
    assert_eq!(events.len(), 3);
    let slow = json!({"values": vec![1; 300], "note": "slow"});
    let mut leaves = EventStream::open(host.connect(), "sums", &slow, &headers);
    leaves.next_event().unwrap();
    drop(leaves);
    let _ = host.log_line("frozen stops early");
    // Jobs, cost, log, and the hook.
    let (_, accepted) = post("/predict_async", json!({"message": {"values": [5]}}));
    let id = accepted["job_id"].as_str().unwrap();
    let (_, job) = host.get_with(&format!("/jobs/{id}?wait_ms=30000"), key);
    assert_eq!(job["result"]["sums"], json!([105.0]));
    assert!(host.metric("modalkit_cost_total{model=\"sums\"}") >= 10.0);
    let _ = (host.log_line("frozen loads"), host.log_line("frozen warms up"));
    fs::write(host.volume().join("offset"), "200").unwrap();
    let _ = host.log_line("frozen reads again");
    assert_eq!(post("/predict_sync", json!({"values": [1]})).1["sums"], json!([201.0]));
}
