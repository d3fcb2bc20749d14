//! MLServer's command line.

use std::{fs, process::Command};

use modalkit_tests::client_python;
use serde_json::{Value, json};

use super::calls::three_models;

#[test]
fn mlserver_infers_a_file_of_requests() {
    let host = three_models();
    let texts: Vec<Value> = (0..40).map(|number| json!({"text": format!("text {number}")})).collect();
    let requests: Vec<String> = texts
        .iter()
        .map(|text| {
            json!({"inputs": [{"name": "input", "datatype": "BYTES", "shape": [1, 1], "data": [text.to_string()]}]})
                .to_string()
        })
        .collect();
    let folder = tempfile::tempdir().unwrap();
    let (input, output) = (folder.path().join("input.jsonl"), folder.path().join("output.jsonl"));
    fs::write(&input, requests.join("\n")).unwrap();
    let ran = Command::new(client_python("mlserver").with_file_name("mlserver"))
        .args(["infer", "--model-name", "echo", "--url", &host.address.to_string()])
        .args(
            [
                ["--input-data-path".as_ref(), input.as_os_str()],
                ["--output-data-path".as_ref(), output.as_os_str()],
            ]
            .concat(),
        )
        .args(["--batch-size", "5", "--workers", "2"])
        .output()
        .unwrap();
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    let answers = fs::read_to_string(&output).unwrap();
    let mut found: Vec<Value> = answers
        .lines()
        .map(|line| {
            let answer: Value = serde_json::from_str(line).unwrap();
            let text = answer["outputs"][0]["data"][0].as_str().unwrap();
            serde_json::from_str(text).unwrap()
        })
        .collect();
    let mut expected: Vec<Value> = texts
        .iter()
        .map(|text| {
            let mut answer = host.post("/predict_sync?model_name=echo", text).1;
            answer.as_object_mut().unwrap().remove("status");
            answer
        })
        .collect();
    for list in [&mut found, &mut expected] {
        list.sort_by_key(ToString::to_string);
    }
    assert_eq!(found, expected);
}
