//! What the protocol asks beside inference, over HTTP.

use std::io::{Read, Write};

use modalkit_tests::{KEY, OPERATOR, Setup, wait_until};
use serde_json::{Value, json};

use crate::tensors::exchange;

fn echo_input(texts: &[&str]) -> Value {
    let data: Vec<String> = texts.iter().map(|text| json!({"text": text}).to_string()).collect();
    json!({"inputs": [{"name": "input", "datatype": "BYTES", "shape": [texts.len(), 1], "data": data}]})
}

#[test]
fn the_server_and_its_models_say_what_they_are() {
    let host = Setup::new().plugin("echo").plugin("tensors").ready();
    let server = host.get("/v2").1;
    assert_eq!(server["name"], "modalkit");
    assert!(server["extensions"].as_array().unwrap().contains(&json!("binary_tensor_data")));
    assert!(!server["extensions"].as_array().unwrap().contains(&json!("trace")), "spans go nowhere");
    assert_eq!(host.get("/v2/health/live"), (200, json!({"live": true})));
    assert_eq!(host.get("/v2/health/ready"), (200, json!({"ready": true})));
    assert_eq!(host.get("/v2/models").1, json!({"models": ["echo", "tensors"]}));
    let echo = host.get("/v2/models/echo").1;
    let text = |name: &str| json!([{"name": name, "datatype": "BYTES", "shape": [-1, 1]}]);
    assert_eq!((&echo["inputs"], &echo["outputs"]), (&text("input"), &text("output")));
    assert_eq!(host.get("/v2/models/echo/versions/1").1, echo);
    let tensors = host.get("/v2/models/tensors").1;
    assert_eq!(tensors["inputs"][0], json!({"name": "values", "datatype": "FP32", "shape": [-1, -1]}));
    let config = host.get("/v2/models/tensors/config").1;
    assert_eq!(config["input"][0]["data_type"], "TYPE_FP32");
    assert_eq!(config["input"][0]["dims"], json!([-1]));
    assert_eq!(config["instance_group"][0]["kind"], "KIND_CPU");
    assert_eq!(host.get("/v2/models/echo/ready"), (200, json!({"name": "echo", "ready": true})));
    for (path, status) in [
        ("/v2/models/nobody", 404),
        ("/v2/models/nobody/ready", 404),
        ("/v2/models/nobody/stats", 404),
        ("/v2/models/echo/versions/2", 404),
        ("/v2/models/echo/versions/2/ready", 404),
        ("/v2/models/echo/versions/x/config", 404),
        ("/v2/systemsharedmemory/status", 501),
        ("/v2/cudasharedmemory/region/r/status", 501),
        ("/v2/repository/index", 405),
        ("/v2/logging", 403),
        ("/v2/nothing", 404),
    ] {
        let (found, answer) = host.get(path);
        assert_eq!(found, status, "{path}: {answer}");
        assert!(answer["error"].as_str().is_some_and(|error| !error.is_empty()), "{path}: {answer}");
    }
    let (status, answer) = host.post("/v2/models/echo/versions/1/infer", &echo_input(&["a", "b"]));
    assert_eq!((status, &answer["outputs"][0]["shape"]), (200, &json!([2, 1])));
    assert_eq!(host.post("/v2/models/echo/versions/3/infer", &echo_input(&["a"])).0, 404);
    // The deadline that a client names in its request.
    let mut hurried = echo_input(&["a"]);
    hurried["parameters"] = json!({"timeout": 1, "mine": {"any": "thing"}});
    assert_eq!(host.post("/v2/models/echo/infer", &hurried).0, 504);
    hurried["parameters"]["timeout"] = json!(20_000_000);
    assert_eq!(host.post("/v2/models/echo/infer", &hurried).0, 200);
}

#[test]
fn statistics_are_sums_of_what_was_done() {
    let host =
        Setup::new().plugin("echo").config("[app_settings.batch_config]\nmax_batch_size = 4\n").ready();
    let stats = || host.get("/v2/models/echo/stats").1["model_stats"][0].clone();
    assert_eq!((&stats()["inference_count"], &stats()["last_inference"]), (&json!(0), &json!(0)));
    assert_eq!(host.post("/v2/models/echo/infer", &echo_input(&["a", "b", "c", "d"])).0, 200);
    assert_eq!(host.post("/predict_sync", &json!({"text": "e"})).0, 200);
    let after = stats();
    assert_eq!((&after["name"], &after["version"]), (&json!("echo"), &json!("1")));
    assert_eq!(after["inference_count"], 5);
    let of = |member: &str| after["inference_stats"][member].clone();
    for member in ["success", "queue", "compute_input", "compute_infer", "compute_output"] {
        assert_eq!(of(member)["count"], 5, "{member}: {after}");
    }
    assert!(of("success")["ns"].as_u64().unwrap() >= of("queue")["ns"].as_u64().unwrap());
    assert_eq!(of("fail"), json!({"count": 0, "ns": 0}));
    let batches = after["batch_stats"].as_array().unwrap();
    let inputs: u64 = batches
        .iter()
        .map(|batch| {
            batch["batch_size"].as_u64().unwrap() * batch["compute_infer"]["count"].as_u64().unwrap()
        })
        .sum();
    assert_eq!(inputs, 5);
    assert_eq!(host.get("/v2/models/stats").1["model_stats"], json!([after]));
}

#[test]
fn the_repository_is_the_volume_and_versions_are_generations() {
    let keys = format!(
        "[app_settings.auth_config.keys.caller]\napi_key = {KEY:?}\n\
         [app_settings.auth_config.keys.operator]\napi_key = {OPERATOR:?}\nmanagement = true\n"
    );
    let host = Setup::new().plugin("echo").config(&keys).ready();
    let (key, operator) = (format!("Bearer {KEY}"), format!("Bearer {OPERATOR}"));
    let shown = [("authorization", key.as_str())];
    let managing = [("authorization", operator.as_str())];
    let index = |body: &Value| host.post_with("/v2/repository/index", body, &shown).1;
    let ready = |version: &str| json!([{"name": "echo", "version": version, "state": "READY", "reason": ""}]);
    assert_eq!(index(&json!({})), ready("1"));
    assert_eq!(host.post_with("/v2/repository/index", &json!({}), &[]).0, 401);
    for list in [json!([]), json!([true])] {
        assert_eq!(host.post_with("/v2/repository/index", &list, &shown).0, 400, "a list is no object");
    }
    let load = "/v2/repository/models/echo/load";
    assert_eq!(host.post_with(load, &json!({}), &shown).0, 403);
    assert_eq!(host.post_with(load, &json!({}), &managing), (200, json!({})));
    assert_eq!(index(&json!({"ready": true})), ready("2"));
    assert_eq!(host.post_with("/v2/models/echo/versions/1/infer", &echo_input(&["a"]), &shown).0, 404);
    assert_eq!(host.post_with("/v2/models/echo/versions/2/infer", &echo_input(&["a"]), &shown).0, 200);
    let config = json!({"parameters": {"config": "{}"}});
    assert_eq!(host.post_with(load, &config, &managing).0, 501);
    assert_eq!(host.post_with("/v2/repository/models/nobody/load", &json!({}), &managing).0, 404);
    assert_eq!(host.post_with(load, &json!([1]), &managing).0, 400);
    // A volume with something worse in it: what serves stays, and the answer says why.
    std::fs::remove_file(host.volume().join("echo.so")).unwrap();
    modalkit_tests::put(b"\x7fELF, and nothing behind it", &host.volume().join("echo.so"));
    wait_until("it is refused", || host.post_with(load, &json!({}), &managing).0 == 409);
    assert_eq!(index(&json!({"ready": true})), ready("2"));
    modalkit_tests::install(&modalkit_tests::library("echo"), &host.volume().join("echo.so"));
    let unload = "/v2/repository/models/echo/unload";
    assert_eq!(host.post_with(unload, &json!({"parameters": {"unload_dependents": true}}), &managing).0, 200);
    assert_eq!(index(&json!({"ready": true})), json!([]));
    assert_eq!(host.post_with("/v2/models/echo/infer", &echo_input(&["a"]), &shown).0, 404);
    wait_until("it is there again", || host.post_with(load, &json!({}), &managing).0 == 200);
    assert_eq!(host.post_with("/v2/models/echo/infer", &echo_input(&["a"]), &shown).0, 200);
    // The log's level and the traces' sampling.
    let log = "/v2/logging";
    let now = host.get_with(log, &managing).1;
    assert_eq!((&now["log_info"], &now["log_verbose_level"]), (&json!(true), &json!(0)));
    let more = host.post_with(log, &json!({"log_verbose_level": 1}), &managing).1;
    assert_eq!(more["log_verbose_level"], 1);
    assert_eq!(host.post_with("/v2/models/echo/infer", &echo_input(&["a"]), &shown).0, 200);
    let answered = |line: &Value| line["level"] == "DEBUG" && line["message"] == "request answered";
    wait_until("it is logged", || host.log().iter().any(answered));
    let less = json!({"log_info": false, "log_format": "default"});
    let now = host.post_with(log, &less, &managing).1;
    assert_eq!(
        (&now["log_info"], &now["log_warning"], &now["log_verbose_level"]),
        (&json!(false), &json!(true), &json!(0))
    );
    // Who turns the log down is in the audit log all the same, and so is whatever is done after that.
    assert_eq!(host.post_with(log, &json!({"log_error": false}), &managing).1["log_error"], json!(false));
    let changes = || {
        let is_change = |line: &&Value| {
            line["target"] == "modalkit::audit"
                && line["action"].as_str().is_some_and(|action| action.ends_with("/v2/logging"))
        };
        host.log().iter().filter(is_change).count()
    };
    wait_until("they are told of", || changes() >= 3);
    for (path, wrong) in [
        (log, json!({"log_file": "/elsewhere"})),
        (log, json!({"log_info": "yes"})),
        (log, json!({"other": 1})),
        ("/v2/trace/setting", json!({"trace_level": ["TIMESTAMPS"]})),
    ] {
        let (status, answer) = host.post_with(path, &wrong, &managing);
        assert_eq!(status, 400, "{path} {wrong}: {answer}");
    }
    let traces = host.get_with("/v2/trace/setting", &managing).1;
    assert_eq!((&traces["trace_level"], &traces["trace_rate"]), (&json!(["OFF"]), &json!("0")));
    assert_eq!(host.get_with("/v2/models/echo/trace/setting", &managing).1, traces);
    assert_eq!(
        host.post_with("/v2/models/echo/trace/setting", &json!({"trace_rate": "1"}), &managing).0,
        501
    );
    let large = json!({"parameters": {"padding": "x".repeat(70 << 10)}});
    assert_eq!(host.post_with(load, &large, &managing).0, 413);
}

#[test]
fn bodies_are_compressed_as_clients_say_and_as_they_ask() {
    let host = Setup::new()
        .plugin("tensors")
        .plugin("echo")
        .config("[server]\nbody_bytes_max = 4_000_000\n")
        .ready();
    let gzip = |bytes: &[u8]| {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    };
    let mut stream = host.connect();
    let mut ask = |path: &str, headers: &str, body: &[u8]| {
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: localhost\r\n{headers}content-length: {}\r\n\r\n",
            body.len()
        );
        let (status, head, answer) = exchange(&mut stream, &head, body);
        if head.contains("connection: close") {
            stream = host.connect();
        }
        (status, head, answer)
    };
    // Every path takes them: an input, a list, and what reads a small body.
    let coded = "content-encoding: gzip\r\n";
    let (status, _, answer) = ask("/predict_sync?model_name=echo", coded, &gzip(br#"{"text":"a"}"#));
    assert_eq!(status, 200, "{}", String::from_utf8_lossy(&answer));
    let (status, _, answer) = ask("/predict_batch?model_name=echo", coded, &gzip(br#"[{"text":"a"}]"#));
    assert_eq!(status, 200, "{}", String::from_utf8_lossy(&answer));
    assert_eq!(ask("/v2/repository/index", coded, &gzip(br#"{"ready":true}"#)).0, 200);
    let zstd = "content-encoding: zstd\r\n";
    let body = zstd::encode_all(&br#"{"text":"a"}"#[..], 1).unwrap();
    assert_eq!(ask("/predict_sync?model_name=echo", zstd, &body).0, 200);
    // One that is small until it is decompressed, one that is broken, and one that nobody knows.
    let bomb = gzip(&vec![b' '; 64 << 20]);
    assert_eq!(ask("/predict_sync?model_name=echo", coded, &bomb).0, 413);
    assert_eq!(ask("/v2/models/tensors/infer", coded, &bomb).0, 413);
    assert_eq!(ask("/v2/repository/index", coded, &gzip(&vec![b' '; 100 << 10])).0, 413);
    assert_eq!(ask("/predict_sync?model_name=echo", coded, b"plain").0, 400);
    let (status, head, _) = ask("/predict_sync?model_name=echo", "content-encoding: br\r\n", b"x");
    assert!(status == 415 && head.contains("accept-encoding: gzip, deflate, zstd"), "{head}");
    // A long answer is compressed for who takes that; a short one, and tensors of who would take anything, aren't.
    let long = serde_json::json!({"text": "a long text ".repeat(4000)}).to_string();
    let asked = "accept-encoding: gzip, deflate, br\r\n";
    let (status, head, answer) = ask("/predict_sync?model_name=echo", asked, long.as_bytes());
    assert!(status == 200 && head.contains("content-encoding: gzip"), "{head}");
    assert!(
        head.contains("vary: accept-encoding") && answer.len() < long.len() / 10,
        "{} bytes",
        answer.len()
    );
    let mut whole = String::new();
    flate2::read::GzDecoder::new(&answer[..]).read_to_string(&mut whole).unwrap();
    let plain = ask("/predict_sync?model_name=echo", "", long.as_bytes());
    assert!(!plain.1.contains("content-encoding") && plain.2 == whole.as_bytes());
    let (_, head, _) = ask("/predict_sync?model_name=echo", asked, br#"{"text":"a"}"#);
    assert!(!head.contains("content-encoding"), "{head}");
    let json = json!({
        "inputs": [{"name": "values", "datatype": "FP32", "shape": [1, 100_000], "parameters": {"binary_data_size": 400_000}}],
        "outputs": [{"name": "values", "parameters": {"binary_data": true}}],
    })
    .to_string();
    let tensors = [json.as_bytes(), &vec![0; 400_000]].concat();
    for (accepts, compressed) in
        [("gzip, deflate, br", false), ("*", false), ("gzip", true), ("deflate", true)]
    {
        let headers =
            format!("accept-encoding: {accepts}\r\ninference-header-content-length: {}\r\n", json.len());
        let (status, head, answer) = ask("/v2/models/tensors/infer", &headers, &tensors);
        assert_eq!((status, head.contains("content-encoding")), (200, compressed), "{accepts}: {head}");
        assert_eq!(answer.len() < 100_000, compressed, "{accepts}: {} bytes", answer.len());
    }
    // Where a key would be asked for, nobody without one has anything decompressed, and small bodies stay small however they come.
    let large = format!("{:x}\r\n{}\r\n0\r\n\r\n", 100 << 10, " ".repeat(100 << 10));
    let chunked =
        "POST /v2/repository/index HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n";
    let (status, _, answer) = exchange(&mut host.connect(), chunked, large.as_bytes());
    assert_eq!(status, 413, "{}", String::from_utf8_lossy(&answer));
    wait_until("nothing is held", || host.metric("modalkit_bytes_in_flight").abs() < 0.5);
}

#[test]
fn what_isnt_ready_says_so_in_the_protocols_words() {
    let host = Setup::new().config("[model_settings.model_entries.nothing]\nplugin = \"nothing\"\n").start();
    wait_until("it answers", || host.get("/v2/health/live").0 == 200);
    assert_eq!(host.get("/v2/health/ready"), (503, json!({"ready": false})));
    assert_eq!(host.get("/v2/models/nothing/ready"), (503, json!({"name": "nothing", "ready": false})));
    let (status, answer) = host.get("/v2/models/nothing");
    assert_eq!((status, answer["error"].is_string()), (503, true), "{answer}");
}
