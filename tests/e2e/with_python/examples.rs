//! The examples in `plugins/python`, held against calling their libraries directly.

use std::{fs, path::Path, process::Command};

use modalkit_tests::{Setup, wait_until, workspace};
use serde_json::{Value, json};

use super::ask;

/// A folder with all that links lead to, as somebody copies it into a volume.
fn copied(setup: Setup, name: &str) -> Setup {
    let (from, to) = (workspace().join("plugins/python").join(name), setup.volume().join(name));
    fs::create_dir_all(&to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
        }
    }
    setup.python(name, &[])
}

fn python(folder: &Path, arguments: &[&str]) -> String {
    let output = Command::new(folder.join(".venv/bin/python"))
        .args(arguments)
        .current_dir(folder)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    said
}

fn images() -> Vec<Value> {
    let text = fs::read(workspace().join("plugins/onnx/model/digits_test.json")).unwrap();
    let cases: Value = serde_json::from_slice(&text).unwrap();
    cases["cases"].as_array().unwrap().iter().map(|case| case["pixels"].clone()).collect()
}

fn is_near(left: &Value, right: &Value) -> bool {
    (left.as_f64().unwrap() - right.as_f64().unwrap()).abs() < 1e-5
}

#[test]
fn digits_by_onnx_runtime_are_what_a_session_says_as_json_and_as_tensors() {
    let setup = copied(Setup::new(), "digits_onnx");
    let folder = setup.volume().join("digits_onnx");
    let tests = python(&folder, &["-m", "pytest", "-q", "-p", "no:cacheprovider"]);
    assert!(tests.contains("2 passed"), "{tests}");
    let images = images();
    fs::write(setup.folder().join("images.json"), json!(images).to_string()).unwrap();
    let program = format!(
        "import json, numpy, onnxruntime\nsession = onnxruntime.InferenceSession('digits.onnx', providers=['CPUExecutionProvider'])\npixels = numpy.array(json.load(open({:?})), dtype='float32')\nprint(json.dumps(session.run(None, {{session.get_inputs()[0].name: pixels}})[-1].tolist()))",
        setup.folder().join("images.json")
    );
    let direct: Vec<Vec<Value>> = serde_json::from_str(&python(&folder, &["-c", &program])).unwrap();
    let host = setup.config("[app_settings.batch_config]\nmax_batch_size = 32\nwait_ms = 2\n").ready();
    wait_until("it serves", || ask(&host, "digits_onnx", &json!({"pixels": images[0]})).0 == 200);
    for (image, expected) in images.iter().zip(&direct).take(50) {
        let (status, answer) = ask(&host, "digits_onnx", &json!({"pixels": image}));
        assert_eq!(status, 200, "{answer}");
        let said = answer["probabilities"].as_array().unwrap();
        assert!(said.iter().zip(expected).all(|(said, expected)| is_near(said, expected)), "{answer}");
    }
    let request =
        json!({"inputs": [{"name": "pixels", "datatype": "FP32", "shape": [32, 64], "data": images[..32]}]});
    let (status, answer) = host.post("/v2/models/digits_onnx/infer", &request);
    assert_eq!(status, 200, "{answer}");
    let output = |name: &str| {
        let outputs = answer["outputs"].as_array().unwrap();
        outputs.iter().find(|output| output["name"] == name).unwrap()["data"].as_array().unwrap().clone()
    };
    let expected = direct[..32].concat();
    let said = output("probabilities");
    assert!(said.len() == 320 && said.iter().zip(&expected).all(|(said, expected)| is_near(said, expected)));
    let (status, answer) = ask(&host, "digits_onnx", &json!({"pixels": [1, 2]}));
    assert_eq!((status, &answer["detail"][0]["type"]), (422, &json!("too_short")), "{answer}");
}

#[test]
fn digits_by_a_forest_of_scikit_learn_are_what_the_forest_says() {
    let setup = copied(Setup::new(), "digits_forest");
    let folder = setup.volume().join("digits_forest");
    let images = images();
    fs::write(setup.folder().join("images.json"), json!(images[..100]).to_string()).unwrap();
    let file = setup.folder().join("images.json");
    let host = setup.config("[app_settings.batch_config]\nmax_batch_size = 32\nwait_ms = 2\n").start();
    wait_until("it says what is missing", || {
        host.model("digits_forest")["reason"].to_string().contains("run `.venv/bin/python train.py`")
    });
    python(&folder, &["train.py"]);
    wait_until("it serves", || ask(&host, "digits_forest", &json!({"pixels": images[0]})).0 == 200);
    let program = format!(
        "import json, joblib\nforest = joblib.load('forest.joblib')\nsaid = forest.predict_proba(json.load(open({file:?})))\nprint(json.dumps([[int(row.argmax()), row.max()] for row in said]))"
    );
    let direct: Vec<(Value, Value)> = serde_json::from_str(&python(&folder, &["-c", &program])).unwrap();
    for (image, (label, sure)) in images.iter().zip(&direct) {
        let (status, answer) = ask(&host, "digits_forest", &json!({"pixels": image}));
        assert_eq!((status, &answer["label"]), (200, label), "{answer}");
        assert!(is_near(&answer["sure"], sure), "{answer}");
    }
}
