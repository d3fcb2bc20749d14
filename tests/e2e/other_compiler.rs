//! The promise of a stable boundary: a plugin built by another compiler, in another profile, loads and serves.

use std::process::Command;

use modalkit_tests::{Setup, built, install, workspace};
use serde_json::json;

#[test]
fn a_plugin_of_another_compiler_and_profile_serves() {
    let nightly = Command::new("rustup").args(["run", "nightly", "rustc", "--version"]).output();
    let nightly = nightly.ok().filter(|output| output.status.success());
    let mut build = match &nightly {
        Some(_) => {
            let mut rustup = Command::new("rustup");
            rustup.args(["run", "nightly", "cargo"]);
            rustup
        }
        // Without a second compiler the other profile is what is left to test.
        None => Command::new("cargo"),
    };
    let target = built().join("other-compiler");
    let status = build
        .args([
            "build",
            "--release",
            "--package",
            "echo",
            "--config",
            "profile.release.lto=false",
            "--target-dir",
        ])
        .arg(&target)
        .current_dir(workspace())
        .env_remove("RUSTC")
        .env_remove("RUSTUP_TOOLCHAIN")
        .env_remove("CARGO")
        .status();
    assert!(status.expect("cargo starts").success());
    let setup = Setup::new();
    install(&target.join("release/libecho.so"), &setup.volume().join("echo.so"));
    let host = setup.ready();
    assert_eq!(host.post("/predict_sync", &json!({"text": "abroad"})).1["translated_text"], "ABROAD");
    let rustc = host.model("echo")["generation"]["rustc_version"].as_str().unwrap().to_owned();
    if let Some(output) = nightly {
        assert_eq!(rustc, String::from_utf8_lossy(&output.stdout).trim());
    }
}
