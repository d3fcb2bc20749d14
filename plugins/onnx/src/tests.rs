//! The pipeline as a host would run it, on the digits model, on two that have odd shapes, and on small graphs that are made here.

mod graphs;

use std::{fs, path::Path};

use modalkit_sdk::{
    Datatype, ErrorKind, PipelineError, Tensor, VolumeReload,
    testkit::{LoadedPipeline, TestKit},
};
use serde_json::{Value, json};

use super::{Pipeline, model::Model};

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
        Tensor::new("b", [2], vec![10_i64, -2_147_483_648]).unwrap(),
    ]]);
    let b_out = answers[0].as_ref().unwrap().iter().find(|tensor| tensor.name() == "b_out").unwrap();
    assert_eq!(b_out.values::<i64>().unwrap(), [10, -2_147_483_648]);
}

#[test]
fn errors_say_what_the_model_wanted() {
    let model = digits(json!({"path": "digits.onnx"}));
    let error = |input: Value| model.run_json(&[input]).remove(0).unwrap_err().to_string();
    assert_eq!(error(json!({"pixels": [1, 2]})), "pixels: expected f32[64], found the shape [2]");
    assert_eq!(error(json!({})), "pixels: field required: `pixels`, f32[64]");
    assert!(error(json!({"pixels": vec![0; 64], "x": 1})).contains("no input `x`; expected pixels f32[64]"));
    assert!(error(json!({"pixels": [[1, 2], [3]]})).contains("expected 2 elements, found 1"));
    assert!(error(json!({"pixels": [1, [2]]})).contains("side by side"));
    assert!(error(json!({"pixels": [[1], 2]})).contains("side by side"));
    assert!(error(json!({"pixels": [1, "a"]})).contains("numbers and strings stand side by side"));
    assert!(
        error(json!({"pixels": vec!["a"; 64]})).contains("pixels: expected numbers (f32), found strings")
    );
    assert!(error(json!({"pixels": ["a"]})).contains("expected f32[64], found the shape [1]"));
    assert!(error(json!({"pixels": {}})).contains("a number, a string or a nested list"));
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
        json!({"a": [0, 0, 0], "b": [-2_147_483_648_i64, 0]}),
    ]);
    assert_eq!(answers[0].as_ref().unwrap()["outputs"], json!({"sum": 36.5, "b_out": [10, 20]}));
    assert_eq!(answers[1].as_ref().unwrap()["outputs"]["b_out"], json!([-2_147_483_648_i64, 0]));
    let error = model.run_json(&[json!({"a": [1, 2, 3], "b": [1.5, 2]})]).remove(0).unwrap_err().to_string();
    assert!(error.contains("b: expected whole numbers"), "{error}");
    let wide = model.run_json(&[json!({"a": [1, 2, 3], "b": [1, 2_147_483_648_i64]})]).remove(0).unwrap_err();
    assert!(wide.to_string().contains("from -2147483648 to 2147483647 (i64), found 2147483648"), "{wide}");
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
    assert!(output.contains("expected one of probabilities f32[10]"), "{output}");
    let typo = load_error(&kit("model", json!({"path": "digits.onnx", "topk": 3})));
    assert!(typo.contains("`topk`"), "{typo}");
    assert!(
        load_error(&kit("model", json!({"path": "nowhere.onnx"}))).contains("nowhere.onnx: No such file")
    );
    assert!(load_error(&kit("model", json!({"path": "requirements.txt"}))).contains("requirements.txt: "));
}

fn load(graph: &graphs::Graph, settings: &Value) -> Result<LoadedPipeline<Pipeline>, PipelineError> {
    let folder = tempfile::tempdir().unwrap();
    graph.write(&folder.path().join("model.onnx"));
    let mut whole = json!({"path": "model.onnx"});
    whole.as_object_mut().unwrap().extend(settings.as_object().unwrap().clone());
    TestKit::new().all_model_data_folder(folder.path()).settings(whole).load()
}

fn refusal(graph: &graphs::Graph, settings: &Value) -> String {
    load(graph, settings).err().expect("it is refused").to_string()
}

#[test]
fn a_token_outside_the_vocabulary_is_the_fault_of_its_own_request() {
    let model = load(&graphs::tokens(), &json!({})).unwrap();
    let answers = model.run_json(&[
        json!({"ids": [1, 2], "mask": [1, 1]}),
        json!({"ids": [1, 10], "mask": [1, 1]}),
        json!({"ids": [1, 2, 3], "mask": [1, 1]}),
        json!({"ids": [9, 0], "mask": [1, 1]}),
    ]);
    assert_eq!(answers[0].as_ref().unwrap()["outputs"]["vectors"], json!([[1.0, 2.0], [2.0, 4.0]]));
    let vocabulary = answers[1].as_ref().unwrap_err();
    assert_eq!(vocabulary.kind(), ErrorKind::InvalidInput);
    assert!(
        vocabulary
            .to_string()
            .contains("ids.1: expected numbers from 0 to 9, the rows of the model's table; found 10"),
        "{vocabulary}"
    );
    let lengths = answers[2].as_ref().unwrap_err().to_string();
    let negative = model.run_json(&[json!({"ids": [-1, 2], "mask": [1, 1]})]).remove(0).unwrap_err();
    assert!(negative.to_string().contains("expected numbers from 0 to 9"), "{negative}");
    let none = model.run_json(&[json!({"ids": [], "mask": []})]).remove(0).unwrap_err();
    assert!(none.to_string().contains("found no element at all"), "{none}");
    assert_eq!(lengths, "mask: expected as many along `seq` as `ids` has, 3; found 2");
    assert_eq!(answers[3].as_ref().unwrap()["outputs"]["vectors"], json!([[9.0, 18.0], [0.0, 0.0]]));
}

#[test]
fn what_only_the_engine_finds_fails_one_request_of_a_run() {
    // Its rows are chosen by a sum, of which nobody knows before what it will be.
    let model = load(&graphs::sums(), &json!({})).unwrap();
    let answers = model.run_json(&[json!({"ids": [1, 2]}), json!({"ids": [1, 9]}), json!({"ids": [0, 3]})]);
    assert_eq!(answers[0].as_ref().unwrap()["outputs"]["vectors"], json!([[2.0, 4.0], [3.0, 6.0]]));
    let fault = answers[1].as_ref().unwrap_err();
    assert_eq!(fault.kind(), ErrorKind::InvalidInput);
    assert!(
        fault.to_string().contains("the model can't be run with this input: rten: operator \"look_up\""),
        "{fault}"
    );
    assert_eq!(answers[2].as_ref().unwrap()["outputs"]["vectors"], json!([[1.0, 2.0], [4.0, 8.0]]));
}

#[test]
fn requests_share_runs_only_where_that_changes_no_answer() {
    let is_batched = |graph: &graphs::Graph, mut settings: Value| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.onnx");
        graph.write(&path);
        settings["path"] = json!("model.onnx");
        Model::load(&path, &serde_json::from_value(settings).unwrap(), None).unwrap().is_batched()
    };
    assert!(is_batched(&graphs::tokens(), json!({})));
    assert!(!is_batched(&graphs::tokens(), json!({"batched": false})));
    // Along the first dimension each row is added to those after it.
    assert!(!is_batched(&graphs::running_sum(), json!({})));
    assert!(is_batched(&graphs::running_sum(), json!({"batched": true})));
    // To each row its place is added.
    assert!(!is_batched(&graphs::places(), json!({})));
    // A state with its batch in the middle, and one number for all.
    assert!(is_batched(&graphs::scaled_state(), json!({})));
}

#[test]
fn an_input_without_a_batch_divides_those_that_differ_in_it_and_may_have_a_default() {
    let model = load(&graphs::scaled_state(), &json!({"defaults": {"scale": 3}})).unwrap();
    let state = |value: f32| json!([[value, value], [value, value + 1.0]]);
    let answers = model.run_json(&[
        json!({"state": state(1.0), "scale": 2}),
        json!({"state": state(2.0)}),
        json!({"state": state(3.0), "scale": 2}),
    ]);
    let scaled = |place: usize| answers[place].as_ref().unwrap()["outputs"]["scaled"].clone();
    assert_eq!(scaled(0), json!([[2.0, 2.0], [2.0, 4.0]]));
    assert_eq!(scaled(1), json!([[6.0, 6.0], [6.0, 9.0]]));
    assert_eq!(scaled(2), json!([[6.0, 6.0], [6.0, 8.0]]));
    let unknown = refusal(&graphs::scaled_state(), &json!({"defaults": {"rate": 3}}));
    assert!(
        unknown.contains("`defaults` names `rate`; expected some of state f32[2, 2], scale f32[]"),
        "{unknown}"
    );
}

#[test]
fn half_and_double_precision_and_truth_values_keep_their_types() {
    let model = load(&graphs::kinds(), &json!({})).unwrap();
    let halves = half::f16::from_f32(1.5).to_le_bytes().repeat(2);
    let answers = model.run_tensors(vec![vec![
        Tensor::of_bytes("half", Datatype::Fp16, [2], halves.clone()).unwrap(),
        Tensor::new("double", [2], vec![0.25_f64, 4.0]).unwrap(),
        Tensor::of_bools("truth", [2], [true, false]).unwrap(),
    ]]);
    let answer = answers[0].as_ref().unwrap();
    let output = |name: &str| answer.iter().find(|tensor| tensor.name() == name).unwrap();
    assert_eq!((output("half_out").datatype(), output("half_out").bytes()), (Datatype::Fp16, &halves[..]));
    assert_eq!(output("double_out").values::<f64>().unwrap(), [0.25, 4.0]);
    assert_eq!(output("truth_out").datatype(), Datatype::Bool);
    let answers = model.run_json(&[json!({"half": [1.5, 0.1], "double": [1, 2], "truth": [true, false]})]);
    assert_eq!(answers[0].as_ref().unwrap()["outputs"]["truth_out"], json!([1, 0]));
    let error = model
        .run_json(&[json!({"half": [1.5, 0.1], "double": [1, 2], "truth": [2, 0]})])
        .remove(0)
        .unwrap_err();
    assert!(
        error.to_string().contains("truth: expected whole numbers from 0 to 1 (bool), found 2"),
        "{error}"
    );
    let large = json!({"half": [70_000, 0.1], "double": [1, 2], "truth": [1, 0]});
    let error = model.run_json(&[large]).remove(0).unwrap_err();
    assert!(error.to_string().contains("half: expected numbers up to 6.5504e4 (f16), found 7e4"), "{error}");
}

#[test]
fn outputs_are_pooled_normalised_and_made_probabilities_where_the_entry_says_so() {
    let tokens = |settings: Value| {
        let model = load(&graphs::tokens(), &settings).unwrap();
        model.run_json(&[json!({"ids": [1, 3, 8], "mask": [1, 1, 0]})]).remove(0).unwrap()["outputs"]["vectors"].clone()
    };
    // The graph's own name for its mask is not the one that is looked for.
    assert_eq!(tokens(json!({"pooling": "mean"})), json!([4.0, 8.0]));
    assert_eq!(tokens(json!({"pooling": "cls"})), json!([1.0, 2.0]));
    assert_eq!(tokens(json!({"pooling": "max"})), json!([8.0, 16.0]));
    let masked =
        load(&graphs::tokens_with_mask("attention_mask"), &json!({"pooling": "mean", "normalize": true}))
            .unwrap();
    let answer = masked.run_json(&[
        json!({"ids": [1, 3, 8], "attention_mask": [1, 1, 0]}),
        json!({"ids": [1, 3, 8], "attention_mask": [0, 0, 0]}),
    ]);
    let unit = answer[0].as_ref().unwrap()["outputs"]["vectors"].clone();
    let unit: Vec<f64> = unit.as_array().unwrap().iter().map(|value| value.as_f64().unwrap()).collect();
    assert!(
        (unit[0] - 1.0 / 5.0_f64.sqrt()).abs() < 1e-6 && (unit[1] - 2.0 / 5.0_f64.sqrt()).abs() < 1e-6,
        "{unit:?}"
    );
    let none = answer[1].as_ref().unwrap_err();
    assert!(none.to_string().contains("expected at least one token that counts"), "{none}");

    let settings = json!({"pooling": "mean", "softmax": true, "labels": ["even", "odd"], "top_k": 2});
    let model = load(&graphs::tokens(), &settings).unwrap();
    let answer = model.run_json(&[json!({"ids": [1, 1], "mask": [1, 1]})]).remove(0).unwrap();
    assert_eq!(answer["label"], "odd");
    let best = answer["top"][0]["score"].as_f64().unwrap();
    assert!((best - 1.0 / (1.0 + (-1.0_f64).exp())).abs() < 1e-6, "{answer}");
    let scalar = refusal(&graphs::running_sum(), &json!({"pooling": "mean", "batched": true}));
    assert!(scalar.contains("`pooling` wants an output of tokens' vectors"), "{scalar}");
}

#[test]
fn only_the_outputs_that_are_wanted_are_answered() {
    let model = load(&graphs::kinds(), &json!({"outputs": ["truth_out"]})).unwrap();
    let input = json!({"half": [1.5, 0.1], "double": [1, 2], "truth": [true, false]});
    assert_eq!(model.run_json(&[input])[0].as_ref().unwrap()["outputs"], json!({"truth_out": [1, 0]}));
    let unknown = refusal(&graphs::kinds(), &json!({"outputs": ["logits"]}));
    assert!(
        unknown.contains("`outputs` names `logits`; expected some of `half_out`, `double_out`, `truth_out`"),
        "{unknown}"
    );
}

#[test]
fn keys_that_would_do_nothing_are_refused() {
    for (settings, expected) in [
        (json!({"outputs": []}), "`outputs` is empty"),
        (json!({"outputs": ["vectors", "vectors"]}), "`outputs` names one twice"),
        (json!({"library": "/lib/libonnxruntime.so"}), "`library` is ONNX Runtime's"),
        (json!({"labels": ["a", "b"], "outputs": ["vectors"]}), "can't classify"),
    ] {
        let said = refusal(&graphs::tokens(), &settings);
        assert!(said.contains(expected), "{said}");
    }
    let said = refusal(&graphs::of_kind(graphs::FLOAT32), &json!({"softmax": true, "classify": "z"}));
    assert!(said.contains("`softmax` wants an output of numbers with fractions"), "{said}");
    let said = refusal(&graphs::fixed(), &json!({"batched": true}));
    assert!(said.contains("`batched` is true, and requests can't share runs"), "{said}");
}

#[test]
fn a_file_that_is_bad_after_a_reload_leaves_the_model_as_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.onnx");
    graphs::tokens().write(&file);
    let kit = TestKit::new().all_model_data_folder(folder.path()).settings(json!({"path": "model.onnx"}));
    let model = kit.load::<Pipeline>().unwrap();
    let ask =
        |model: &LoadedPipeline<Pipeline>| model.run_json(&[json!({"ids": [1], "mask": [1]})]).remove(0);
    fs::write(&file, "no model").unwrap();
    let reload = VolumeReload::new("models", folder.path(), ["model.onnx"]);
    assert!(model.volume_reload(&reload).is_err());
    assert_eq!(ask(&model).unwrap()["outputs"]["vectors"], json!([[1.0, 2.0]]));
    graphs::sums().write(&file);
    model.volume_reload(&reload).unwrap();
    assert!(ask(&model).unwrap_err().to_string().contains("no input `mask`"));
}

#[test]
fn sizes_that_are_set_are_those_of_requests() {
    let model = load(&graphs::tokens(), &json!({"dimensions": {"seq": 2}})).unwrap();
    let error =
        model.run_json(&[json!({"ids": [1, 2, 3], "mask": [1, 1, 1]})]).remove(0).unwrap_err().to_string();
    assert_eq!(error, "ids: expected i64[2], found the shape [3]");
    let limited = load(&graphs::tokens(), &json!({"dimensions_max": {"seq": 2}})).unwrap();
    let long = limited.run_json(&[json!({"ids": [1, 2, 3], "mask": [1, 1, 1]})]).remove(0).unwrap_err();
    assert_eq!(long.to_string(), "ids: expected at most 2 along `seq`, found 3");
    assert!(limited.run_json(&[json!({"ids": [1, 2], "mask": [1, 1]})])[0].is_ok());
    let typo = refusal(&graphs::tokens(), &json!({"dimensions_max": {"sequence": 2}}));
    assert!(typo.contains("`dimensions_max` names `sequence`"), "{typo}");
    let unknown = refusal(&graphs::tokens(), &json!({"dimensions": {"width": 2}}));
    assert!(
        unknown.contains("`dimensions` names `width`; the dimensions that can be set are `batch`, `seq`"),
        "{unknown}"
    );
}

#[test]
fn what_an_engine_does_not_take_is_refused_by_name_with_what_to_try() {
    for (graph, expected) in [
        (graphs::of_kind(graphs::UINT16), "its input `x` has elements of type u16; rten has bool, i8, u8"),
        (graphs::of_kind(graphs::STRING), "its input `x` has elements of type string"),
        (
            graphs::of_kind(graphs::BFLOAT16),
            "its input `x` has elements of type BFLOAT16; expected numbers of 8 to 64 bits",
        ),
        (graphs::sequence(), "its input `x` is a sequence of tensors; expected a tensor"),
        (graphs::unknown_operator(), "Frobnicate"),
    ] {
        let said = refusal(&graph, &json!({}));
        assert!(said.contains(expected) && said.contains("the ONNX model "), "{said}");
    }
    for graph in [graphs::of_kind(graphs::UINT16), graphs::unknown_operator()] {
        let said = refusal(&graph, &json!({}));
        assert!(said.ends_with("try `engine = \"onnxruntime\"`"), "{said}");
    }
    let library = refusal(
        &graphs::tokens(),
        &json!({"engine": "onnxruntime", "library": "/nowhere/libonnxruntime.so"}),
    );
    assert!(
        library.contains("ONNX Runtime can't be loaded from /nowhere/libonnxruntime.so")
            && library.contains("set `library`"),
        "{library}"
    );
}
