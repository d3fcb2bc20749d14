//! The real model through a real host: every held-out image gets the training script's label on every endpoint.

use std::fs;

use modalkit_tests::{Host, Setup, wait_until, workspace};
use serde_json::{Value, json};

/// Labels an endpoint gives to pixels, in their order.
type Classify<'a> = &'a dyn Fn(&Host, &[Value]) -> Vec<String>;

const ACCURACY_MIN: f64 = 0.95;

fn label(answer: &Value) -> String {
    assert_eq!(answer["status"], "success", "{answer}");
    answer["label"].as_str().unwrap_or_default().to_owned()
}

fn one_by_one(host: &Host, inputs: &[Value]) -> Vec<String> {
    inputs.iter().map(|input| label(&host.post("/predict_sync?model_name=digits", input).1)).collect()
}

fn in_batches(host: &Host, inputs: &[Value]) -> Vec<String> {
    let answers = |part: &[Value]| host.post("/predict_batch?model_name=digits", &json!(part)).1;
    inputs
        .chunks(50)
        .flat_map(|part| answers(part).as_array().unwrap().iter().map(label).collect::<Vec<_>>())
        .collect()
}

fn as_jobs(host: &Host, inputs: &[Value]) -> Vec<String> {
    let accept = |input: &Value| {
        let (status, accepted) = host.post("/predict_async?model_name=digits", &json!({"message": input}));
        assert_eq!(status, 200, "{accepted}");
        format!("/jobs/{}", accepted["job_id"].as_str().unwrap())
    };
    let jobs: Vec<String> = inputs.iter().map(accept).collect();
    let result = |path: &String| {
        wait_until("the job is done", || host.get(path).1["state"] == "succeeded");
        label(&host.get(path).1["result"])
    };
    jobs.iter().map(result).collect()
}

#[test]
fn every_held_out_digit_is_labelled_as_the_training_script_does() {
    let model = workspace().join("plugins/onnx/model");
    let cases: Value = serde_json::from_slice(&fs::read(model.join("digits_test.json")).unwrap()).unwrap();
    let cases = cases["cases"].as_array().unwrap();
    let setup = Setup::new()
        .plugin("onnx")
        .config("[app_settings.batch_config]\nmax_batch_size = 32\nwait_ms = 2")
        .config(
            "[model_settings.model_entries.digits]\nplugin = \"onnx\"\npath = \"digits.onnx\"\ntop_k = 3",
        );
    fs::copy(model.join("digits.onnx"), setup.volume().join("digits.onnx")).unwrap();
    let host = setup.ready();
    let inputs: Vec<Value> = cases.iter().map(|case| json!({"pixels": case["pixels"]})).collect();
    let predicted: Vec<String> = cases.iter().map(|case| case["predicted"].to_string()).collect();
    let endpoints: [(&str, Classify<'_>); 3] =
        [("sync", &one_by_one), ("batch", &in_batches), ("async", &as_jobs)];
    for (endpoint, classify) in endpoints {
        let found = classify(&host, &inputs);
        assert_eq!(found, predicted, "{endpoint}");
        let right = cases
            .iter()
            .zip(&found)
            .filter(|(case, found)| case["label"].as_u64() == found.parse().ok())
            .count();
        let accuracy = right as f64 / cases.len() as f64;
        assert!(cases.len() == 360 && accuracy >= ACCURACY_MIN, "{endpoint}: {right} of {}", cases.len());
    }
    let (status, body) = host.post("/predict_sync?model_name=digits", &json!({"pixels": [1, 2, 3]}));
    assert_eq!(status, 422);
    assert_eq!(body["detail"][0]["msg"], "expected f32[64], found the shape [3]");
    assert_eq!(body["detail"][0]["loc"], json!(["body", "pixels"]));
}
