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

fn write_weights(to: &Path, dtype: Dtype) {
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
            let numbers = numbers(shape.iter().product(), seed).into_iter();
            match dtype {
                Dtype::F16 => numbers.flat_map(|value| half::f16::from_f32(value).to_le_bytes()).collect(),
                _ => numbers.flat_map(f32::to_le_bytes).collect(),
            }
        })
        .collect();
    let views: HashMap<&String, TensorView<'_>> = shapes
        .iter()
        .zip(&bytes)
        .map(|((name, shape), bytes)| (name, TensorView::new(dtype, shape.clone(), bytes).unwrap()))
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

/// A folder's files, which a test may change before it is loaded.
fn folder(config: &Value) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("small");
    fs::create_dir_all(&model).unwrap();
    write_weights(&model.join("model.safetensors"), Dtype::F32);
    fs::write(model.join("config.json"), config.to_string()).unwrap();
    fs::write(model.join("tokenizer.json"), tokenizer().to_string()).unwrap();
    folder
}

fn load_from(
    folder: &tempfile::TempDir,
    settings: &Value,
) -> Result<LoadedPipeline<Pipeline>, PipelineError> {
    let mut whole = json!({"path": "small"});
    whole.as_object_mut().unwrap().extend(settings.as_object().unwrap().clone());
    TestKit::new().all_model_data_folder(folder.path()).settings(whole).load()
}

fn load(config: &Value, settings: &Value) -> Result<LoadedPipeline<Pipeline>, PipelineError> {
    load_from(&folder(config), settings)
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
    // Of four tokens at most, a text of four is not padded.
    let unpadded = load(&config(), &json!({"max_tokens": 4})).unwrap();
    let input = json!({"input": "the lamp"});
    let [exact, padded] =
        [&unpadded, &model].map(|model| model.run_json(std::slice::from_ref(&input)).remove(0).unwrap());
    assert!(are_near(&vector(&exact), &vector(&padded)), "{exact} {padded}");
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
fn a_text_of_as_many_tokens_as_there_may_be_is_whole() {
    let model = load(&config(), &json!({"max_tokens": 6})).unwrap();
    let answers =
        model.run_json(&[json!({"input": "the lamp is lit"}), json!({"input": "the lamp is lit the"})]);
    let said = |place: usize| {
        let answer: &Value = answers[place].as_ref().unwrap();
        (answer["truncated"].clone(), answer["usage"]["prompt_tokens"].clone())
    };
    assert_eq!(said(0), (json!(false), json!(6)));
    assert_eq!(said(1), (json!(true), json!(6)));
    let vectors = [0, 1].map(|place: usize| vector(answers[place].as_ref().unwrap()));
    assert!(are_near(&vectors[0], &vectors[1]), "the end is left out");
    let too_few = load(&config(), &json!({"max_tokens": 2})).err().unwrap().to_string();
    assert!(too_few.contains("`max_tokens` is 2; expected more than 2"), "{too_few}");
}

#[test]
fn what_is_no_text_is_refused() {
    let model = load(&config(), &json!({})).unwrap();
    let error = |input: Value| model.run_json(&[input]).remove(0).unwrap_err().to_string();
    assert!(error(json!({"input": [1, 8]})).contains("input: expected tokens from 0 to 7, found 8"));
    assert!(error(json!({"input": [-1]})).contains("expected a text, or a list of its tokens' numbers"));
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
    assert!(with("num_attention_heads", json!(3)).contains("hidden_size 8 can't be divided among 3 heads"));
    assert!(with("position_embedding_type", json!("relative_key")).contains("expected absolute positions"));
}

#[test]
fn half_precision_and_a_graph_in_the_folder_give_the_same_vectors() {
    let input = json!({"input": "the lamp is lit"});
    let embed = |model: LoadedPipeline<Pipeline>| {
        vector(&model.run_json(std::slice::from_ref(&input)).remove(0).unwrap())
    };
    let whole = embed(load(&config(), &json!({})).unwrap());

    let halves = folder(&config());
    write_weights(&halves.path().join("small/model.safetensors"), Dtype::F16);
    let halves = embed(load_from(&halves, &json!({})).unwrap());
    assert!(whole.iter().zip(&halves).all(|(one, other)| (one - other).abs() < 1e-2), "{whole:?} {halves:?}");

    // Of a type that isn't written here, with the graph beside the weights.
    let graph = folder(&json!({"model_type": "other"}));
    let model = graph.path().join("small");
    let shape = serde_json::from_value(config()).unwrap();
    let written = crate::bert::write(&shape, &fs::read(model.join("model.safetensors")).unwrap()).unwrap();
    fs::create_dir(model.join("onnx")).unwrap();
    fs::write(model.join("onnx/model.onnx"), written).unwrap();
    assert!(are_near(&whole, &embed(load_from(&graph, &json!({})).unwrap())));
}

#[test]
fn what_a_folder_says_of_pooling_and_lengths_is_done_or_refused() {
    let with = |files: &[(&str, Value)]| {
        let folder = folder(&config());
        for (name, content) in files {
            let file = folder.path().join("small").join(name);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, content.to_string()).unwrap();
        }
        folder
    };
    let modules = |last: &str| {
        json!([
            {"path": "", "type": "sentence_transformers.models.Transformer"},
            {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
            {"path": "2", "type": format!("sentence_transformers.models.{last}")}
        ])
    };
    let cls =
        ("1_Pooling/config.json", json!({"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}));
    let embed = |model: &LoadedPipeline<Pipeline>| {
        vector(&model.run_json(&[json!({"input": "the lamp is lit"})]).remove(0).unwrap())
    };
    let folder = with(&[("modules.json", modules("Normalize")), cls.clone()]);
    let said = embed(&load_from(&folder, &json!({})).unwrap());
    assert!((said.iter().map(|value| value * value).sum::<f64>() - 1.0).abs() < 1e-5, "{said:?}");
    let first = embed(&load(&config(), &json!({"pooling": "cls", "normalize": true})).unwrap());
    assert!(are_near(&said, &first));

    let both =
        ("1_Pooling/config.json", json!({"pooling_mode_mean_tokens": true, "pooling_mode_lasttoken": true}));
    let folder = with(&[("modules.json", modules("Normalize")), both]);
    let refused = load_from(&folder, &json!({})).err().unwrap().to_string();
    assert!(refused.contains("say `pooling` in the model's entry"), "{refused}");
    assert!(load_from(&folder, &json!({"pooling": "mean"})).is_ok());
    let dense = with(&[("modules.json", modules("Dense")), cls]);
    let refused = load_from(&dense, &json!({})).err().unwrap().to_string();
    assert!(refused.contains("has the module sentence_transformers.models.Dense"), "{refused}");

    // More tokens than there are positions: the positions count. RoBERTa's begin after the one for padding.
    let long = with(&[("sentence_bert_config.json", json!({"max_seq_length": 512}))]);
    let answer = load_from(&long, &json!({}))
        .unwrap()
        .run_json(&[json!({"input": "lamp ".repeat(60)})])
        .remove(0)
        .unwrap();
    assert_eq!(answer["usage"]["prompt_tokens"], 40);
    let mut roberta = config();
    roberta["model_type"] = json!("roberta");
    let refused = load(&roberta, &json!({"max_tokens": 39})).err().unwrap().to_string();
    assert!(refused.contains("expected at most 38"), "{refused}");
}
