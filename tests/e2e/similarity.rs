//! Nearest neighbours as callers find them: over a real matrix, on the CPU, while the matrix changes.

use std::fs;

use modalkit_tests::{
    Host, Setup,
    embeddings::{self, npy, rows, safetensors},
    put, wait_until, workspace,
};
use serde_json::{Value, json};

const ROWS: usize = 2_000;
const WIDTH: usize = 24;

/// The best rows.
fn best(rows: &[Vec<f32>], query: &[f32], count: usize) -> Vec<usize> {
    embeddings::best(rows, query, count).into_iter().map(|(row, _)| row).collect()
}

fn start(matrix: &[u8], file: &str, keys: &str, data: &[(&str, &[u8])]) -> Host {
    let setup = Setup::new().plugin("similarity");
    let folder = setup.volume();
    put(matrix, &folder.join(file));
    for (name, bytes) in data {
        put(bytes, &folder.join(name));
    }
    let config = format!(
        "[model_settings]\nlocal_model_repository_folder = {:?}\n[model_settings.model_entries.similarity]\nmatrix = {file:?}\n{keys}\nbatch_config = {{ max_batch_size = 8, wait_ms = 2 }}\n",
        folder.display().to_string()
    );
    setup.config(&config).ready()
}

fn found(answer: &Value) -> Vec<usize> {
    let neighbours = answer["neighbours"].as_array().unwrap_or_else(|| panic!("{answer}"));
    neighbours.iter().map(|neighbour| neighbour["row"].as_u64().unwrap() as usize).collect()
}

#[test]
fn callers_get_the_nearest_rows_with_their_labels() {
    let rows = rows(1, ROWS, WIDTH);
    let labels: String = (0..ROWS).map(|row| format!("row {row}\n")).collect();
    let host =
        start(&npy(&rows), "rows.npy", "labels = \"labels.txt\"", &[("labels.txt", labels.as_bytes())]);
    let queries = embeddings::rows(2, 20, WIDTH);
    for query in &queries {
        let (status, answer) = host.post("/predict_sync", &json!({"vector": query, "top_k": 5}));
        assert_eq!(status, 200, "{answer}");
        assert_eq!(found(&answer), best(&rows, query, 5));
        assert_eq!(answer["neighbours"][0]["label"], format!("row {}", found(&answer)[0]));
    }
    // In one request, and with different wishes in one batch.
    let batch: Vec<Value> = queries
        .iter()
        .enumerate()
        .map(|(place, query)| json!({"vector": query, "top_k": place + 1}))
        .collect();
    let (status, answers) = host.post("/predict_batch", &json!(batch));
    assert_eq!(status, 200, "{answers}");
    for (place, query) in queries.iter().enumerate() {
        assert_eq!(found(&answers[place]), best(&rows, query, place + 1));
    }
    // A row is its own nearest neighbour.
    let (_, answer) = host.post("/predict_sync", &json!({"vector": rows[7]}));
    assert_eq!(found(&answer)[0], 7);
    assert!((answer["neighbours"][0]["score"].as_f64().unwrap() - 1.0).abs() < 1e-5, "{answer}");
}

#[test]
fn the_digits_that_come_with_it_look_like_themselves() {
    let folder = workspace().join("plugins/similarity/model");
    let (matrix, labels) =
        (fs::read(folder.join("digits.npy")).unwrap(), fs::read(folder.join("digits.labels")).unwrap());
    let host = start(&matrix, "digits.npy", "labels = \"digits.labels\"", &[("digits.labels", &labels)]);
    let digits = fs::read(workspace().join("plugins/onnx/model/digits_test.json")).unwrap();
    let digits: Value = serde_json::from_slice(&digits).unwrap();
    let (mut alike, cases) = (0, digits["cases"].as_array().unwrap());
    for (row, case) in cases.iter().enumerate() {
        let (status, answer) = host.post("/predict_sync", &json!({"vector": case["pixels"], "top_k": 2}));
        assert_eq!((status, found(&answer)[0]), (200, row), "{answer}");
        let label = |place: usize| answer["neighbours"][place]["label"].clone();
        assert_eq!(label(0), case["label"].to_string());
        alike += usize::from(label(1) == label(0));
    }
    assert!(
        alike * 100 > cases.len() * 90,
        "the next one shows the same digit in {alike} of {} cases",
        cases.len()
    );
}

#[test]
fn what_is_no_query_is_told_where_it_is_wrong() {
    let rows = rows(1, 50, 3);
    let host = start(&safetensors(&rows), "rows.safetensors", "metric = \"dot\"", &[]);
    let (status, answer) = host.post("/predict_sync", &json!({"vector": [0.0, 0.0, 0.0], "top_k": 50}));
    assert_eq!(
        (status, found(&answer)),
        (200, (0..50).collect()),
        "the same scores stand in the rows' order"
    );
    for (input, place, said) in [
        (json!({"vector": [1.0, 2.0]}), json!(["body", "vector"]), "expected 3 numbers, found 2"),
        (json!({"vector": [1.0, 1e39, 0.0]}), json!(["body"]), "number out of range"),
        (json!({"vector": [1.0, 2.0, 0.0], "top_k": 0}), json!(["body", "top_k"]), "expected 1 to 100"),
        (json!({"vector": [1.0, 2.0, 0.0], "top_k": 101}), json!(["body", "top_k"]), "found 101"),
    ] {
        let (status, answer) = host.post("/predict_sync", &input);
        let detail = &answer["detail"][0];
        assert_eq!((status, &detail["loc"]), (422, &place), "{answer}");
        assert!(detail["msg"].as_str().unwrap().contains(said), "{answer}");
    }
}

#[test]
fn a_new_matrix_takes_the_old_ones_place_and_a_bad_one_does_not() {
    let (old, new) = (rows(1, ROWS, WIDTH), rows(3, ROWS / 2, WIDTH));
    let host = start(&npy(&old), "rows.npy", "", &[]);
    let query = rows(2, 1, WIDTH).remove(0);
    let ask = || found(&host.post("/predict_sync", &json!({"vector": query})).1);
    assert_eq!(ask(), best(&old, &query, 10));
    put(&npy(&new), &host.volume().join("rows.npy"));
    wait_until("the new one is searched", || ask() == best(&new, &query, 10));
    for (bad, said) in [
        (npy(&old)[..5_000].to_vec(), "rows.npy"),
        (npy(&[vec![f32::NAN, 1.0]]), "expected finite numbers of 32 bits, found NaN in row 0, column 0"),
    ] {
        put(&bad, &host.volume().join("rows.npy"));
        wait_until("the hook fails", || {
            let hook = host.report("similarity")["hook"].clone();
            hook["errors"].to_string().contains(said)
        });
        assert_eq!(ask(), best(&new, &query, 10));
    }
}

#[test]
fn a_matrix_that_is_none_is_refused_in_words() {
    let refused = |file: &str, bytes: &[u8], keys: &str| {
        let setup = Setup::new().plugin("similarity");
        put(bytes, &setup.volume().join(file));
        let config = format!(
            "[model_settings]\nlocal_model_repository_folder = {:?}\n[model_settings.model_entries.similarity]\nmatrix = {file:?}\n{keys}\n",
            setup.volume().display().to_string()
        );
        let host = setup.config(&config).start();
        wait_until("it is refused", || host.model("similarity")["state"] == "failed");
        host.model("similarity")["reason"].as_str().unwrap().to_owned()
    };
    let few = rows(1, 4, 2);
    for (file, bytes, keys, said) in [
        ("rows.csv", b"1,2".to_vec(), "", "expected a file that ends with .npy or .safetensors"),
        ("rows.npy", b"no numpy".to_vec(), "", "rows.npy"),
        (
            "rows.safetensors",
            safetensors(&few),
            "tensor = \"other\"",
            "expected the tensor \"other\", found rows",
        ),
        ("rows.npy", npy(&few), "labels = \"missing.txt\"", "missing.txt"),
    ] {
        let reason = refused(file, &bytes, keys);
        assert!(reason.contains(said), "{reason}");
    }
}
