//! What every client is asked for, and what `/predict_sync` gives for it.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use modalkit_tests::{Host, Setup, embeddings, python_tool, workspace};
use reqwest::blocking::{Client, ClientBuilder};
use serde_json::{Value, json};

use crate::tensors::{WIDTH, assert_close, digits_and_similarity, member};

/// Has a script of these tests, by an interpreter that has its client, ask a host: one of its scenarios, which ends with an error where something isn't as it
/// should be.
pub(super) fn scenario(python: PathBuf, script: &str, host: &Host, name: &str, arguments: &[&str]) {
    let output = Command::new(python)
        .arg(workspace().join("tests/e2e/protocols").join(script))
        .args([&host.address.to_string(), name])
        .args(arguments)
        .output()
        .unwrap();
    assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
}

/// One that shows headers, and what is compressed as it came.
pub(super) fn client() -> ClientBuilder {
    // The only provider of cryptography here, which the client wants to be chosen all the same.
    let _ = rustls::crypto::ring::default_provider().install_default();
    Client::builder().no_proxy()
}

/// A host with the digits' model, the one of similar rows and echo, which takes JSON alone.
pub(super) fn three_models() -> Host {
    digits_and_similarity(Setup::new().plugin("echo"))
}

/// Calls, and what is compared of their answers.
pub(super) struct Calls {
    pub(super) calls: Vec<Value>,
    digits: Vec<Value>,
    similar: Vec<Value>,
    echoed: Vec<Value>,
}

impl Calls {
    /// Of [`three_models`]: inputs one by one, and batches that are larger than those of the models.
    pub(super) fn of(host: &Host) -> Self {
        let cases = fs::read(workspace().join("plugins/onnx/model/digits_test.json")).unwrap();
        let cases: Value = serde_json::from_slice(&cases).unwrap();
        let pixels: Vec<&Value> =
            cases["cases"].as_array().unwrap().iter().take(12).map(|case| &case["pixels"]).collect();
        let queries = embeddings::rows(2, 6, WIDTH);
        let texts: Vec<Value> = (0..10).map(|number| json!({"text": format!("text {number}")})).collect();
        let of_digits = |rows: &[&Value]| json!({"model": "digits", "inputs": [["pixels", "FP32", rows]]});
        let mut calls: Vec<Value> = pixels.iter().map(|row| of_digits(&[row])).collect();
        calls.push(of_digits(&pixels));
        let top: Vec<[i64; 1]> = queries.iter().map(|_| [4]).collect();
        calls.push(
            json!({"model": "similarity", "inputs": [["vector", "FP32", queries], ["top_k", "INT64", top]]}),
        );
        let rows: Vec<[String; 1]> = texts.iter().map(|text| [text.to_string()]).collect();
        calls.push(json!({"model": "echo", "inputs": [["input", "BYTES", rows]]}));
        let ask =
            |model: &str, input: &Value| host.post(&format!("/predict_sync?model_name={model}"), input).1;
        Self {
            calls,
            digits: pixels.iter().map(|pixels| ask("digits", &json!({"pixels": pixels}))).collect(),
            similar: queries
                .iter()
                .map(|query| ask("similarity", &json!({"vector": query, "top_k": 4})))
                .collect(),
            echoed: texts.iter().map(|text| ask("echo", text)).collect(),
        }
    }

    /// Every answer is what `/predict_sync` has given.
    pub(super) fn assert_same(&self, answers: &[Value]) {
        let [alone @ .., of_digits, of_similarity, of_echo] = answers else {
            panic!("expected answers to all calls, found {answers:?}");
        };
        for (place, expected) in self.digits.iter().enumerate() {
            for (answer, row) in [(&alone[place], 0), (of_digits, place)] {
                assert_close(&answer["probabilities"][row], &expected["outputs"]["probabilities"]);
                assert_close(&answer["top_labels"][row], &member(&expected["top"], "label"));
                assert_close(&answer["top_scores"][row], &member(&expected["top"], "score"));
            }
        }
        for (place, expected) in self.similar.iter().enumerate() {
            for (output, key) in [("rows", "row"), ("scores", "score"), ("labels", "label")] {
                assert_close(&of_similarity[output][place], &member(&expected["neighbours"], key));
            }
        }
        for (place, expected) in self.echoed.iter().enumerate() {
            let text = of_echo["output"][place][0].as_str().unwrap();
            let mut output: Value = serde_json::from_str(text).unwrap();
            output["status"] = json!("success");
            assert_eq!(&output, expected);
        }
    }
}

/// Runs a client's program, which is given calls and prints answers.
pub(super) fn run(python: &Path, program: &str, arguments: &[&str], calls: &[Value]) -> Vec<Value> {
    let program = workspace().join("tests/e2e/protocols").join(program);
    let mut client = Command::new(python)
        .arg(&program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    client.stdin.take().unwrap().write_all(json!(calls).to_string().as_bytes()).unwrap();
    let output = client.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{} {arguments:?}: {said}", program.display());
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Infers with one of Triton's clients.
pub(super) fn triton(host: &Host, client: &str, calls: &[Value]) -> Vec<Value> {
    run(&python_tool("python3"), "triton_client.py", &[&host.address.to_string(), client], calls)
}
