//! The pipeline on small models of random weights: what padding, lengths and limits do. Real weights are the end-to-end tests'.

use std::{collections::HashMap, fs, path::Path};

use modalkit_sdk::{
    ErrorKind, PipelineError,
    testkit::{LoadedPipeline, TestKit},
};
use safetensors::{Dtype, serialize_to_file, tensor::TensorView};
use serde_json::{Value, json};

use super::Pipeline;

const SIZE: usize = 8;
const WORDS: [&str; 8] = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "lamp", "is", "lit"];
const POSITIONS: usize = 40;

/// Numbers that look random and never change.
fn numbers(count: usize, seed: usize) -> Vec<f32> {
    (0..count).map(|place| (((place + 1) * (seed * 7919 + 104_729)) % 1009) as f32 / 1009.0 - 0.5).collect()
}

fn write_weights(to: &Path) {
    let mut shapes: Vec<(String, Vec<usize>)> = vec![
        ("embeddings.word_embeddings.weight".into(), vec![WORDS.len(), SIZE]),
        ("embeddings.token_type_embeddings.weight".into(), vec![2, SIZE]),
        ("embeddings.position_embeddings.weight".into(), vec![POSITIONS, SIZE]),
    ];
    let mut linear = |name: String, outputs: usize, inputs: usize| {
        shapes.push((format!("{name}.weight"), vec![outputs, inputs]));
        shapes.push((format!("{name}.bias"), vec![outputs]));
    };
    for layer in 0..2 {
        for part in
            ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"]
        {
            linear(format!("encoder.layer.{layer}.{part}"), SIZE, SIZE);
        }
        linear(format!("encoder.layer.{layer}.intermediate.dense"), 2 * SIZE, SIZE);
        linear(format!("encoder.layer.{layer}.output.dense"), SIZE, 2 * SIZE);
    }
    let norms = [
        "embeddings".to_owned(),
        "encoder.layer.0.attention.output".into(),
        "encoder.layer.0.output".into(),
        "encoder.layer.1.attention.output".into(),
        "encoder.layer.1.output".into(),
    ];
    for norm in norms {
        shapes.push((format!("{norm}.LayerNorm.weight"), vec![SIZE]));
        shapes.push((format!("{norm}.LayerNorm.bias"), vec![SIZE]));
    }
    let bytes: Vec<Vec<u8>> = shapes
        .iter()
        .enumerate()
        .map(|(seed, (_, shape))| {
            numbers(shape.iter().product(), seed).into_iter().flat_map(f32::to_le_bytes).collect()
        })
        .collect();
    let views: HashMap<&String, TensorView<'_>> = shapes
        .iter()
        .zip(&bytes)
        .map(|((name, shape), bytes)| (name, TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap()))
        .collect();
    serialize_to_file(views, None, to).unwrap();
}

fn tokenizer() -> Value {
    let vocabulary: HashMap<&str, usize> =
        WORDS.iter().enumerate().map(|(number, word)| (*word, number)).collect();
    json!({
        "version": "1.0",
        // As sentence-transformers saves them: every text padded to one length.
        "truncation": {"max_length": 8, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]"},
        "added_tokens": [],
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": {
            "type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]
        },
        "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"}
    })
}

fn config() -> Value {
    json!({
        "model_type": "bert", "hidden_size": SIZE, "num_attention_heads": 2, "num_hidden_layers": 2,
        "max_position_embeddings": POSITIONS, "vocab_size": WORDS.len()
    })
}

/// A folder's files, changed by the test.
fn load(config: &Value, settings: &Value) -> Result<LoadedPipeline<Pipeline>, PipelineError> {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("small");
    fs::create_dir_all(&model).unwrap();
    write_weights(&model.join("model.safetensors"));
    fs::write(model.join("config.json"), config.to_string()).unwrap();
    fs::write(model.join("tokenizer.json"), tokenizer().to_string()).unwrap();
    let mut whole = json!({"path": "small"});
    whole.as_object_mut().unwrap().extend(settings.as_object().unwrap().clone());
    TestKit::new().all_model_data_folder(folder.path()).settings(whole).load()
}

fn vector(answer: &Value) -> Vec<f64> {
    answer["embedding"].as_array().unwrap().iter().map(|value| value.as_f64().unwrap()).collect()
}

fn are_near(one: &[f64], other: &[f64]) -> bool {
    one.len() == other.len() && one.iter().zip(other).all(|(one, other)| (one - other).abs() < 1e-5)
}

#[test]
fn a_text_has_the_same_vector_alone_and_beside_longer_ones() {
    let model = load(&config(), &json!({})).unwrap();
    let texts =
        ["the lamp", "the lamp is lit the lamp is lit the lamp is lit the lamp is lit the lamp", "lit"];
    let inputs: Vec<Value> = texts.iter().map(|text| json!({"input": text})).collect();
    let together = model.run_json(&inputs);
    for (input, answer) in inputs.iter().zip(&together) {
        let (answer, alone) =
            (answer.as_ref().unwrap(), model.run_json(std::slice::from_ref(input)).remove(0).unwrap());
        assert_eq!(vector(answer).len(), SIZE);
        assert!(are_near(&vector(answer), &vector(&alone)), "{answer} {alone}");
    }
    let first = together[0].as_ref().unwrap();
    assert_eq!((&first["usage"]["prompt_tokens"], &first["truncated"]), (&json!(4), &json!(false)));
    assert!(!are_near(&vector(first), &vector(together[2].as_ref().unwrap())));
    // Its tokens are the text.
    let tokens = model.run_json(&[json!({"input": [2, 4, 5, 3]})]).remove(0).unwrap();
    assert!(are_near(&vector(first), &vector(&tokens)));
}

#[test]
fn long_texts_are_cut_and_say_so_or_are_refused() {
    let words = "lamp ".repeat(60);
    let model = load(&config(), &json!({"max_tokens": 10})).unwrap();
    let answer = model.run_json(&[json!({"input": words})]).remove(0).unwrap();
    assert_eq!((&answer["truncated"], &answer["usage"]["prompt_tokens"]), (&json!(true), &json!(10)));
    let strict = load(&config(), &json!({"max_tokens": 10, "truncate": false})).unwrap();
    let answers = strict.run_json(&[
        json!({"input": words}),
        json!({"input": "the lamp"}),
        json!({"input": vec![4; 11]}),
    ]);
    for refused in [&answers[0], &answers[2]] {
        let error = refused.as_ref().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        assert!(error.to_string().contains("input: expected at most 10 tokens, found"), "{error}");
    }
    assert!(answers[1].is_ok());
    let too_many = load(&config(), &json!({"max_tokens": 41})).err().unwrap().to_string();
    assert!(too_many.contains("`max_tokens` is 41; expected at most 40"), "{too_many}");
}

#[test]
fn what_is_no_text_is_refused() {
    let model = load(&config(), &json!({})).unwrap();
    let error = |input: Value| model.run_json(&[input]).remove(0).unwrap_err().to_string();
    assert!(error(json!({"input": [1, 8]})).contains("input: expected tokens from 0 to 7, found 8"));
    assert!(error(json!({"input": []})).contains("input: expected at least one token, found none"));
    assert!(error(json!({"input": "lamp", "dimensions": 4})).contains("dimensions: expected 8"));
    assert!(model.run_json(&[json!({"input": ""})])[0].is_ok(), "a text of nothing has the tokens around it");
}

#[test]
fn folders_that_are_not_what_they_should_be_are_refused() {
    let with = |key: &str, value: Value| {
        let mut config = config();
        config[key] = value;
        load(&config, &json!({})).err().expect("it is refused").to_string()
    };
    assert!(
        with("model_type", json!("t5"))
            .contains("expected the model_type bert, roberta, xlm-roberta or camembert, found t5")
    );
    assert!(with("model_type", json!("t5")).contains("optimum-cli export onnx"));
    assert!(
        with("num_hidden_layers", json!(3))
            .contains("the weights have no `encoder.layer.2.attention.self.query.weight`")
    );
    assert!(with("position_embedding_type", json!("relative_key")).contains("expected absolute positions"));
}
