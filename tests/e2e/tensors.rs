//! Tensors by the Open Inference Protocol: as its own client sends them, as bytes and as JSON, and as nobody should send them.

use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
    process::Command,
};

use modalkit_tests::{
    Host, Setup,
    embeddings::{self, npy},
    put, python_tool, wait_until, workspace,
};
use serde_json::{Value, json};

const ROWS: usize = 500;
pub(crate) const WIDTH: usize = 24;
/// Malformed requests that one host is sent.
const MALFORMED: u64 = 10_000;

/// Infers as its arguments say, a JSON list of calls, and prints the outputs of each as lists.
const CLIENT: &str = r#"
import json, sys
import numpy
import tritonclient.http as triton

address, calls = sys.argv[1], json.load(sys.stdin)
client = triton.InferenceServerClient(address, network_timeout=60)
answers = []
for call in calls:
    inputs = []
    for name, datatype, values in call["inputs"]:
        values = numpy.array(values, dtype=triton.triton_to_np_dtype(datatype))
        tensor = triton.InferInput(name, list(values.shape), datatype)
        tensor.set_data_from_numpy(values, binary_data=call["binary"])
        inputs.append(tensor)
    outputs = [triton.InferRequestedOutput(name, binary_data=call["binary"]) for name in call["outputs"]]
    try:
        result = client.infer(call["model"], inputs, outputs=outputs or None, request_id="7")
        response = result.get_response()
        assert response["id"] == "7" and response["model_name"] == call["model"], response
        names = call["outputs"] or [output["name"] for output in response["outputs"]]
        answer = {}
        for name in names:
            values = result.as_numpy(name)
            if values.dtype == object:
                values = numpy.vectorize(lambda text: text.decode() if isinstance(text, bytes) else text, otypes=[object])(values)
            answer[name] = values.tolist()
        answers.append(answer)
    except triton.InferenceServerException as error:
        answers.append({"error": error.message()})
print(json.dumps(answers))
"#;

fn infer(host: &Host, calls: &[Value]) -> Vec<Value> {
    let mut client = Command::new(python_tool("python3"))
        .args(["-c", CLIENT, &host.address.to_string()])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    client.stdin.take().unwrap().write_all(json!(calls).to_string().as_bytes()).unwrap();
    let output = client.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

pub(crate) fn digits_and_similarity(setup: Setup) -> Host {
    let model = workspace().join("plugins/onnx/model");
    let setup = setup.plugin("onnx").plugin("similarity");
    let folder = setup.volume();
    fs::copy(model.join("digits.onnx"), folder.join("digits.onnx")).unwrap();
    put(&npy(&embeddings::rows(1, ROWS, WIDTH)), &folder.join("rows.npy"));
    let labels: String = (0..ROWS).map(|row| format!("row {row}\n")).collect();
    put(labels.as_bytes(), &folder.join("labels.txt"));
    let config = format!(
        "[app_settings.batch_config]\nmax_batch_size = 8\nwait_ms = 2\n[model_settings]\nlocal_model_repository_folder = {:?}\n\
         [model_settings.model_entries.digits]\nplugin = \"onnx\"\npath = \"digits.onnx\"\ntop_k = 3\n\
         [model_settings.model_entries.similarity]\nmatrix = \"rows.npy\"\nlabels = \"labels.txt\"\n",
        folder.display().to_string()
    );
    setup.config(&config).ready()
}

/// As far as 32 bits and another batch let them be equal.
pub(crate) fn assert_close(found: &Value, expected: &Value) {
    match (found, expected) {
        (Value::Array(found), Value::Array(expected)) => {
            assert_eq!(found.len(), expected.len());
            found.iter().zip(expected).for_each(|(found, expected)| assert_close(found, expected));
        }
        (Value::Number(found), Value::Number(expected)) => {
            let (found, expected) = (found.as_f64().unwrap(), expected.as_f64().unwrap());
            assert!((found - expected).abs() < 1e-5, "expected {expected}, found {found}");
        }
        _ => assert_eq!(found, expected),
    }
}

pub(crate) fn member(list: &Value, key: &str) -> Value {
    list.as_array().unwrap().iter().map(|entry| entry[key].clone()).collect()
}

#[test]
fn tritonclient_gets_what_predict_sync_gives_in_bytes_and_in_json() {
    let host = digits_and_similarity(Setup::new());
    let cases = fs::read(workspace().join("plugins/onnx/model/digits_test.json")).unwrap();
    let cases: Value = serde_json::from_slice(&cases).unwrap();
    let pixels: Vec<&Value> =
        cases["cases"].as_array().unwrap().iter().take(20).map(|case| &case["pixels"]).collect();
    let queries = embeddings::rows(2, 6, WIDTH);
    let mut calls = Vec::new();
    for binary in [true, false] {
        let digits = |rows: &[&Value]| json!({"model": "digits", "binary": binary, "outputs": [], "inputs": [["pixels", "FP32", rows]]});
        // One by one, and a batch that is larger than one of the model's.
        calls.extend(pixels.iter().map(|row| digits(&[row])));
        calls.push(digits(&pixels));
        let rows: Vec<[i64; 1]> = queries.iter().map(|_| [4]).collect();
        calls.push(json!({"model": "similarity", "binary": binary, "outputs": ["labels", "scores", "rows"],
            "inputs": [["vector", "FP32", queries], ["top_k", "INT64", rows]]}));
    }
    let answers = infer(&host, &calls);
    let digits: Vec<Value> = pixels
        .iter()
        .map(|pixels| host.post("/predict_sync?model_name=digits", &json!({"pixels": pixels})).1)
        .collect();
    let similar: Vec<Value> = queries
        .iter()
        .map(|query| {
            host.post("/predict_sync?model_name=similarity", &json!({"vector": query, "top_k": 4})).1
        })
        .collect();
    for answers in answers.chunks(pixels.len() + 2) {
        let (whole, of_similarity) = (&answers[pixels.len()], &answers[pixels.len() + 1]);
        for (place, expected) in digits.iter().enumerate() {
            let alone = &answers[place];
            for (answer, row) in [(alone, 0), (whole, place)] {
                assert_close(&answer["probabilities"][row], &expected["outputs"]["probabilities"]);
                assert_close(&answer["top_labels"][row], &member(&expected["top"], "label"));
                assert_close(&answer["top_scores"][row], &member(&expected["top"], "score"));
            }
        }
        for (place, expected) in similar.iter().enumerate() {
            for (output, key) in [("rows", "row"), ("scores", "score"), ("labels", "label")] {
                assert_close(&of_similarity[output][place], &member(&expected["neighbours"], key));
            }
        }
    }
}

#[test]
fn tritonclient_shows_what_is_wrong() {
    let host = digits_and_similarity(Setup::new());
    let call = |model: &str, input: Value, outputs: Value| json!({"model": model, "binary": true, "outputs": outputs, "inputs": [input]});
    let answers = infer(
        &host,
        &[
            call("nobody", json!(["x", "FP32", [[1.0]]]), json!([])),
            call("digits", json!(["pixels", "FP64", [vec![0.0; 64]]]), json!([])),
            call("digits", json!(["pixels", "FP32", [vec![0.0; 63]]]), json!([])),
            call("similarity", json!(["vector", "FP32", [vec![0.0; WIDTH]]]), json!(["distances"])),
        ],
    );
    for (answer, expected) in answers.iter().zip([
        r#"no model named "nobody"; expected one of ["digits", "similarity"]"#,
        "inputs.0.datatype: expected FP32 for `pixels`, found FP64",
        "inputs.0.shape: expected FP32 [batch, 64] for `pixels`, found [1, 63]",
        r#"outputs.0: the model has no output `distances`; expected one of ["rows", "scores", "labels"]"#,
    ]) {
        assert_eq!(answer["error"], expected);
    }
    // What the plugin itself finds, and what is asked of a model that takes no tensors.
    let ask = |top_k: i64| {
        json!({"inputs": [
            {"name": "vector", "datatype": "FP32", "shape": [1, WIDTH], "data": vec![0; WIDTH]},
            {"name": "top_k", "datatype": "INT64", "shape": [1, 1], "data": [top_k]},
        ]})
    };
    for (top_k, expected) in
        [(0, "0.top_k: expected 1 to 100, found 0"), (-1, "0.top_k: expected 1 to 100, found -1")]
    {
        let (status, answer) = host.post("/v2/models/similarity/infer", &ask(top_k));
        assert_eq!((status, &answer), (400, &json!({ "error": expected })));
    }
    let echo = Setup::new().plugin("echo").ready();
    let (status, answer) = echo.post("/v2/models/echo/infer", &json!({"inputs": []}));
    assert_eq!(status, 400);
    assert_eq!(answer["error"], "inputs: expected a tensor `input` of BYTES [batch, 1]");
    // Whatever is asked below /v2, errors have the protocol's form, and are counted as what callers see.
    let sample = |status: u16| {
        let labels = format!("endpoint=\"/v2/models/{{name}}/infer\",model=\"echo\",status=\"{status}\"");
        echo.metric(&format!("modalkit_requests_total{{{labels}}}"))
    };
    assert!(sample(400) > 0.5 && sample(422) < 0.5);
    for (path, status) in [
        ("/v2/models/echo/infer", 405),
        ("/v2/models/nobody", 404),
        ("/v2/models/echo/versions/1/infer", 405),
        ("/v2/models/echo/versions/1/2/infer", 404),
        ("/v2/models//infer", 404),
    ] {
        let (found, answer) = echo.get(path);
        assert_eq!(found, status, "{path}");
        assert!(answer["error"].as_str().is_some_and(|error| !error.is_empty()), "{path}: {answer}");
    }
    // The pattern is no path.
    assert_eq!(echo.post("/v2/models/%7Bname%7D/infer", &json!({"inputs": []})).0, 404);
    for (coding, status) in [("gzip", 400), ("br", 415), ("gzip, gzip", 415)] {
        // It isn't compressed.
        let headers = [("content-encoding", coding)];
        let (found, answer) = echo.post_with("/v2/models/echo/infer", &json!({"inputs": []}), &headers);
        assert_eq!((found, answer["error"].is_string()), (status, true), "{coding}: {answer}");
    }
    let keys = format!("[app_settings.auth_config.keys.caller]\napi_key = {:?}\n", modalkit_tests::KEY);
    let guarded = Setup::new().plugin("echo").config(&keys).ready();
    let (status, answer) = guarded.post_with("/v2/models/echo/infer", &json!({"inputs": []}), &[]);
    assert_eq!((status, answer["error"].is_string()), (401, true), "{answer}");
}

/// A request over a connection that stays: status, headers, body.
pub(crate) fn exchange(stream: &mut TcpStream, head: &str, body: &[u8]) -> (u16, String, Vec<u8>) {
    stream.write_all(&[head.as_bytes(), body].concat()).unwrap();
    let mut answer = Vec::new();
    let mut part = vec![0; 1 << 16];
    loop {
        let count = stream.read(&mut part).unwrap();
        assert!(count > 0, "the connection ended: {head}");
        answer.extend_from_slice(&part[..count]);
        let Some(end) = answer.windows(4).position(|window| window == b"\r\n\r\n") else { continue };
        let head = String::from_utf8(answer[..end].to_vec()).unwrap().to_ascii_lowercase();
        let header =
            |name: &str| head.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<usize>().ok());
        if answer.len() == end + 4 + header("content-length:").unwrap() {
            let status = head[9..12].parse().unwrap();
            return (status, head, answer.split_off(end + 4));
        }
    }
}

pub(crate) fn head(model: &str, json_bytes: Option<&str>, length: usize) -> String {
    let json_bytes =
        json_bytes.map_or_else(String::new, |bytes| format!("inference-header-content-length: {bytes}\r\n"));
    format!(
        "POST /v2/models/{model}/infer HTTP/1.1\r\nhost: localhost\r\n{json_bytes}content-length: {length}\r\n\r\n"
    )
}

#[test]
fn bytes_come_back_as_they_were_and_cost_is_counted() {
    let host = Setup::new().plugin("tensors").ready();
    let mut stream = host.connect();
    // A mebibyte that is one input's, and one that is a batch's.
    for rows in [1_usize, 256] {
        let columns = (1 << 20) / 4 / rows;
        let json = json!({
            "inputs": [{"name": "values", "datatype": "FP32", "shape": [rows, columns], "parameters": {"binary_data_size": 1 << 20}}],
            "outputs": [{"name": "values", "parameters": {"binary_data": true}}],
        })
        .to_string();
        let bytes: Vec<u8> =
            (0_u32..1 << 18).flat_map(|number| (number as f32 + 0.5).to_le_bytes()).collect();
        let body = [json.as_bytes(), &bytes].concat();
        let (status, head, answer) =
            exchange(&mut stream, &head("tensors", Some(&json.len().to_string()), body.len()), &body);
        assert_eq!(status, 200, "{head} {}", String::from_utf8_lossy(&answer));
        assert!(head.contains("content-type: application/octet-stream"), "{head}");
        let json_bytes: usize = head
            .lines()
            .find_map(|line| line.strip_prefix("inference-header-content-length: "))
            .unwrap()
            .parse()
            .unwrap();
        assert!(answer[json_bytes..] == bytes, "the bytes differ");
        let described: Value = serde_json::from_slice(&answer[..json_bytes]).unwrap();
        assert_eq!(described["outputs"][0]["shape"], json!([rows, columns]));
    }
    assert!((host.metric("modalkit_cost_total{model=\"tensors\"}") - f64::from(1 << 19)).abs() < 0.5);
    // Bytes that no JSON stands before are refused here, where there are two inputs; and the pipeline's own refusal is an item's.
    let (status, _, answer) = exchange(&mut stream, &head("tensors", Some("0"), 8), &[0; 8]);
    assert_eq!(status, 400, "{}", String::from_utf8_lossy(&answer));
    let (status, answer) = host.post(
        "/v2/models/tensors/infer",
        &json!({"inputs": [{"name": "values", "datatype": "FP32", "shape": [2, 1], "data": [1, 666]}]}),
    );
    assert_eq!((status, answer), (400, json!({"error": "1.values.0: expected another number than 666"})));
}

#[test]
fn what_a_changed_model_takes_is_what_requests_are_held_against() {
    let host = digits_and_similarity(Setup::new());
    let ask = |width: usize| {
        let vector =
            json!({"name": "vector", "datatype": "FP32", "shape": [1, width], "data": vec![1; width]});
        host.post("/v2/models/similarity/infer", &json!({"inputs": [vector], "outputs": [{"name": "rows"}]}))
            .0
    };
    assert_eq!((ask(WIDTH), ask(WIDTH + 1)), (200, 400));
    put(&npy(&embeddings::rows(3, ROWS, WIDTH + 1)), &host.volume().join("rows.npy"));
    wait_until("the new matrix is searched", || ask(WIDTH + 1) == 200);
    assert_eq!(ask(WIDTH), 400);
}

/// Numbers that look random and are the same in each run.
pub(crate) struct Numbers(pub(crate) u64);

impl Numbers {
    pub(crate) fn next(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % below
    }

    pub(crate) fn one_of<'a, T>(&mut self, list: &'a [T]) -> &'a T {
        &list[self.next(list.len() as u64) as usize]
    }
}

#[test]
fn ten_thousand_malformed_requests_get_an_error_each_and_harm_nobody() {
    let host = Setup::new().plugin("tensors").ready();
    let mut stream = host.connect();
    let mut numbers = Numbers(7);
    let (mut refused, mut taken) = (0, 0);
    for number in 0..MALFORMED {
        let shapes = [
            json!([1, 2]),
            json!([2, 1]),
            json!([1]),
            json!([]),
            json!([1, 2, 1]),
            json!([0, 2]),
            json!([1, u64::MAX]),
            json!([1_u64 << 32, 1_u64 << 32]),
            json!([-1, 2]),
            json!(["1", 2]),
            json!(null),
        ];
        let mut tensor = json!({
            "name": numbers.one_of(&["values", "values", "words", "other", ""]),
            "datatype": numbers.one_of(&["FP32", "FP32", "BYTES", "FP64", "fp32", "TENSOR"]),
            "shape": numbers.one_of(&shapes),
        });
        if numbers.next(2) == 0 {
            let sizes = [json!(8), json!(9), json!(0), json!(u64::MAX), json!(-1), json!("8"), json!(1.5)];
            tensor["parameters"] = json!({"binary_data_size": numbers.one_of(&sizes)});
        } else {
            let lists = [
                json!([1, 2]),
                json!([[1], [2]]),
                json!([1, "a"]),
                json!([1e39, 0]),
                json!([]),
                json!({}),
                json!(""),
            ];
            tensor["data"] = numbers.one_of(&lists).clone();
        }
        let mut json = json!({"inputs": [tensor]}).to_string().into_bytes();
        if numbers.next(8) == 0 {
            // Cut off, or with a byte that doesn't belong there.
            match numbers.next(2) {
                0 => json.truncate(numbers.next(json.len() as u64) as usize),
                _ => {
                    let place = numbers.next(json.len() as u64) as usize;
                    json[place] = numbers.next(256) as u8;
                }
            }
        }
        let tail = vec![0; numbers.next(20) as usize];
        let wrong = ["", "-1", "1e3", "99999999999999999999", "0x10", "1000000"];
        let json_bytes = match numbers.next(10) {
            0 => (*numbers.one_of(&wrong)).to_owned(),
            1 => (json.len() as u64 + numbers.next(5)).saturating_sub(2).to_string(),
            _ => json.len().to_string(),
        };
        let body = [json.clone(), tail].concat();
        let (status, head, answer) =
            exchange(&mut stream, &head("tensors", Some(&json_bytes), body.len()), &body);
        let said: Value = serde_json::from_slice(&answer).unwrap_or_default();
        let about = || {
            format!("request {number} ({json_bytes}) {:?}: {status} {said}", String::from_utf8_lossy(&body))
        };
        match status {
            200 => taken += 1,
            400 => {
                refused += 1;
                assert!(said["error"].as_str().is_some_and(|error| !error.is_empty()), "{}", about());
            }
            _ => panic!("{}", about()),
        }
        if head.contains("connection: close") {
            stream = host.connect();
        }
    }
    assert_eq!(refused + taken, MALFORMED);
    // By chance some are right: nearly all aren't, and the next one is answered.
    assert!(refused > MALFORMED * 9 / 10 && taken > 0, "{taken} of {MALFORMED} were taken");
    let right = json!({"inputs": [{"name": "values", "datatype": "FP32", "shape": [1, 1], "data": [1]}]});
    assert_eq!(host.post("/v2/models/tensors/infer", &right).0, 200);
}
