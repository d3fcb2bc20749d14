//! Pipelines in Python, of tensors and of JSON, as Triton's clients ask them.

use modalkit_tests::{Setup, wait_until};
use serde_json::{Value, json};

use super::super::calls::triton;

const LABELS: &str = r#"
class Labels:
    signature = {"inputs": {"values": ("FP32", [3])}, "outputs": {"label": ("BYTES", [])}}

    def predict(self, batch):
        return [{"label": "high" if sum(item["values"]) > 5 else "low"} for item in batch]
"#;

const TEXTS: &str = r#"
class Texts:
    def predict(self, batch):
        return [{"label": "good" if "good" in item["text"] else "bad"} for item in batch]
"#;

#[test]
fn tritons_clients_get_labels_of_pipelines_in_python() {
    let host = Setup::new()
        .python("labels", &[("pipeline.py", LABELS)])
        .python("texts", &[("pipeline.py", TEXTS)])
        .config("[app_settings.batch_config]\nmax_batch_size = 8\nwait_ms = 5\n")
        .ready();
    let values = [[1.0, 2.0, 3.0], [0.0, 1.0, 2.0]];
    let texts = [json!({"text": "a good one"}), json!({"text": "another"})];
    let label = |model: &str, input: &Value| {
        host.post(&format!("/predict_sync?model_name={model}"), input).1["label"].clone()
    };
    wait_until("they serve", || {
        label("labels", &json!({"values": [1, 2, 3]})) == "high" && label("texts", &texts[0]) == "good"
    });
    let strings: Vec<[String; 1]> = texts.iter().map(|text| [text.to_string()]).collect();
    let calls = [
        json!({"model": "labels", "inputs": [["values", "FP32", values]]}),
        json!({"model": "texts", "inputs": [["input", "BYTES", strings]]}),
    ];
    let expected: Value =
        values.iter().map(|row| label("labels", &json!({"values": row}))).collect::<Vec<_>>().into();
    for client in ["http", "http.aio", "grpc", "grpc.aio", "stream"] {
        let answers = triton(&host, client, &calls);
        assert_eq!(answers[0]["label"], expected, "{client}");
        for (row, text) in texts.iter().enumerate() {
            let output = answers[1]["output"][row][0].as_str().unwrap();
            let output: Value = serde_json::from_str(output).unwrap();
            assert_eq!(output["label"], label("texts", text), "{client}");
        }
    }
}
