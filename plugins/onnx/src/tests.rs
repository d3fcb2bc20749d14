//! The pipeline as a host would run it, on the digits model and on two that have odd shapes.

use std::{fs, path::Path};

use modalkit_sdk::{
    Tensor,
    testkit::{LoadedPipeline, TestKit},
};
use serde_json::{Value, json};

use super::Pipeline;

fn kit(folder: &str, settings: Value) -> TestKit {
    TestKit::new()
        .all_model_data_folder(Path::new(env!("CARGO_MANIFEST_DIR")).join(folder))
        .settings(settings)
}

fn digits(settings: Value) -> LoadedPipeline<Pipeline> {
    kit("model", settings).load().unwrap()
}

fn fixture(name: &str) -> LoadedPipeline<Pipeline> {
    kit("tests/data", json!({"path": name})).load().unwrap()
}

fn load_error(kit: &TestKit) -> String {
    kit.load::<Pipeline>().err().expect("the settings are wrong").to_string()
}

#[test]
fn every_held_out_digit_gets_the_training_scripts_label_in_one_batch() {
    let model = digits(json!({"path": "digits.onnx", "top_k": 2}));
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("model/digits_test.json");
    let cases: Value = serde_json::from_slice(&fs::read(file).unwrap()).unwrap();
    let cases = cases["cases"].as_array().unwrap();
    let inputs: Vec<Value> = cases.iter().map(|case| json!({"pixels": case["pixels"]})).collect();
    for (case, answer) in cases.iter().zip(model.run_json(&inputs)) {
        let answer = answer.unwrap();
        assert_eq!(answer["label"], case["predicted"].to_string());
        let expected = case["probabilities"].as_array().unwrap();
        for (expected, found) in expected.iter().zip(answer["outputs"]["probabilities"].as_array().unwrap()) {
            assert!((expected.as_f64().unwrap() - found.as_f64().unwrap()).abs() < 1e-5);
        }
        assert_eq!(answer["top"].as_array().unwrap().len(), 2);
    }
}

#[test]
fn tensors_are_answered_as_arrays_are() {
    let model = digits(json!({"path": "digits.onnx", "top_k": 2}));
    let pixels: Vec<f32> = (0..64).map(|pixel| (pixel % 17) as f32).collect();
    let as_arrays = model.run_json(&[json!({"pixels": pixels})]).remove(0).unwrap();
    let pixels = Tensor::new("pixels", [64], pixels).unwrap();
    let as_tensors = model.run_tensors(vec![vec![pixels]]).remove(0).unwrap();
    let [probabilities, labels, scores] = &as_tensors[..] else { panic!("{as_tensors:?}") };
    let single = |value: &Value| value.as_f64().unwrap() as f32;
    let expected: Vec<f32> =
        as_arrays["outputs"]["probabilities"].as_array().unwrap().iter().map(single).collect();
    assert_eq!(probabilities.values::<f32>().unwrap(), expected);
    let best = as_arrays["top"].as_array().unwrap();
    let expected: Vec<&[u8]> = best.iter().map(|best| best["label"].as_str().unwrap().as_bytes()).collect();
    assert_eq!(labels.strings().unwrap(), expected);
    let expected: Vec<f32> = best.iter().map(|best| single(&best["score"])).collect();
    assert_eq!(scores.values::<f32>().unwrap(), expected);
    // Whole numbers keep their type.
    let answers = fixture("two_inputs.onnx").run_tensors(vec![vec![
        Tensor::new("a", [3], vec![1.5_f32, 2.0, 3.0]).unwrap(),
        Tensor::new("b", [2], vec![10_i64, -9_007_199_254_740_993]).unwrap(),
    ]]);
    let b_out = answers[0].as_ref().unwrap().iter().find(|tensor| tensor.name() == "b_out").unwrap();
    assert_eq!(b_out.values::<i64>().unwrap(), [10, -9_007_199_254_740_993]);
}

#[test]
fn errors_say_what_the_model_wanted() {
    let model = digits(json!({"path": "digits.onnx"}));
    let error = |input: Value| model.run_json(&[input]).remove(0).unwrap_err().to_string();
    assert_eq!(error(json!({"pixels": [1, 2]})), "pixels: expected f32[64], found the shape [2]");
    assert_eq!(error(json!({})), "pixels: field required: `pixels`, f32[64]");
    assert!(
        error(json!({"pixels": vec![0; 64], "x": 1})).contains("no input `x`; expected pixels f32[N, 64]")
    );
    assert!(error(json!({"pixels": [[1, 2], [3]]})).contains("expected 2 elements, found 1"));
    assert!(error(json!({"pixels": [1, [2]]})).contains("side by side"));
    assert!(error(json!({"pixels": [[1], 2]})).contains("side by side"));
    assert!(error(json!({"pixels": ["a"]})).contains("a number or a nested list"));
    assert!(error(json!({"pixels": "a"})).contains("a number or a nested list"));
}

#[test]
fn one_bad_item_leaves_its_neighbours_alone() {
    let model =
        digits(json!({"path": "digits.onnx", "labels": ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"]}));
    let answers = model.run_json(&[
        json!({"pixels": vec![0; 64]}),
        json!({"pixels": [1]}),
        json!({"pixels": vec![0; 64]}),
    ]);
    assert!(answers[0].is_ok() && answers[1].is_err());
    // A row's last bits depend on its place in the batch.
    assert_eq!(answers[0].as_ref().unwrap()["label"], answers[2].as_ref().unwrap()["label"]);
    assert_eq!(answers[0].as_ref().unwrap()["top"].as_array().unwrap().len(), 1);
}

#[test]
fn several_inputs_and_outputs_are_joined_by_name() {
    let model = fixture("two_inputs.onnx");
    let answers = model.run_json(&[
        json!({"a": [1.5, 2, 3], "b": [10, 20]}),
        json!({"a": [0, 0, 0], "b": [-9_007_199_254_740_993_i64, 0]}),
    ]);
    assert_eq!(answers[0].as_ref().unwrap()["outputs"], json!({"sum": 36.5, "b_out": [10, 20]}));
    assert_eq!(answers[1].as_ref().unwrap()["outputs"]["b_out"], json!([-9_007_199_254_740_993_i64, 0]));
    let error = model.run_json(&[json!({"a": [1, 2, 3], "b": [1.5, 2]})]).remove(0).unwrap_err().to_string();
    assert!(error.contains("b: expected whole numbers"), "{error}");
}

#[test]
fn a_model_with_a_fixed_batch_runs_its_requests_one_by_one() {
    let model = fixture("fixed_batch.onnx");
    let answers = model.run_json(&[json!({"x": [[1, 2, 3, 4]]}), json!({"x": [[5, 6, 7, 8]]})]);
    assert_eq!(answers[0].as_ref().unwrap()["outputs"]["y"], json!([[2.0, 4.0, 6.0, 8.0]]));
    assert_eq!(answers[1].as_ref().unwrap()["outputs"]["y"], json!([[10.0, 12.0, 14.0, 16.0]]));
}

#[test]
fn settings_that_do_not_fit_the_model_keep_it_from_loading() {
    let labels = load_error(&kit("model", json!({"path": "digits.onnx", "labels": ["a"]})));
    assert!(labels.contains("expected 10 labels, found 1"), "{labels}");
    let output = load_error(&kit("model", json!({"path": "digits.onnx", "classify": "logits"})));
    assert!(output.contains("expected one of probabilities f32[N, 10]"), "{output}");
    let typo = load_error(&kit("model", json!({"path": "digits.onnx", "topk": 3})));
    assert!(typo.contains("`topk`"), "{typo}");
    assert!(
        load_error(&kit("model", json!({"path": "nowhere.onnx"}))).contains("nowhere.onnx: No such file")
    );
    assert!(load_error(&kit("model", json!({"path": "requirements.txt"}))).contains("requirements.txt: "));
}
