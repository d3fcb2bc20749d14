//! Endpoints, shapes and statuses.

use std::{
    io::{Read, Write},
    process::Command,
};

use modalkit_tests::{Host, Setup, wait_until};
use serde_json::{Value, json};

fn echo() -> Host {
    Setup::new().plugin("echo").ready()
}

fn puppet() -> Host {
    Setup::new().plugin("puppet").ready()
}

#[test]
fn a_dropped_plugin_serves_under_its_own_name_with_no_configuration() {
    let host = echo();
    let expected = json!({"status": "success", "translated_text": "HELLO", "confidence": 0.95});
    assert_eq!(host.post("/predict_sync", &json!({"text": "hello"})), (200, expected.clone()));
    assert_eq!(host.post("/predict_sync?model_name=echo", &json!({"text": "hello"})), (200, expected));
    let model = host.model("echo");
    assert_eq!((model["state"].as_str(), model["replicas"].as_i64()), (Some("ready"), Some(1)));
    assert_eq!(model["generation"]["plugin_sha256"].as_str().map(str::len), Some(64));
}

#[test]
fn a_batch_answers_each_item_in_its_place() {
    let host = puppet();
    let items = json!([{"value": 1}, {"value": 2, "do": "fail"}, {"value": 3, "do": "refuse"}, {"value": 4}]);
    let (status, answers) = host.post("/predict_batch", &items);
    assert_eq!(status, 200);
    assert_eq!(answers[0], json!({"status": "success", "value": 1, "batch": 1}));
    assert_eq!(answers[1], json!({"status": "error", "error": "told to fail this item"}));
    assert_eq!(answers[2]["status"], "error");
    assert_eq!(answers[3]["value"], 4);
    assert_eq!(host.post("/predict_batch", &json!([])), (200, json!([])));
}

#[test]
fn an_invalid_item_fails_a_batch_whole_with_its_index_before_anything_runs() {
    let host = puppet();
    let (status, body) = host.post("/predict_batch", &json!([{"value": 1}, {"value": "x"}]));
    assert_eq!(status, 422);
    assert_eq!(body["detail"][0]["loc"], json!(["body", 1, "value"]));
    assert_eq!(body["detail"][0]["type"], "int_type");
    let (status, body) = host.post("/predict_batch", &json!([{"ms": 60_001}]));
    assert_eq!((status, &body["detail"][0]["loc"]), (422, &json!(["body", 0, "ms"])));
    let (_, body) = host.post("/predict_batch", &json!([{"ms": 60_001, "padding_bytes": (1 << 30) + 1}]));
    assert_eq!(body["detail"][0]["loc"], json!(["body", 0, "ms"]));
    assert_eq!(
        body["detail"][1],
        json!({
            "loc": ["body", 0, "padding_bytes"],
            "msg": "expected at most 1073741824, found 1073741825",
            "type": "value_error"
        })
    );
    let (status, body) = host.post("/predict_batch", &json!({"value": 1}));
    assert_eq!((status, &body["detail"][0]["loc"]), (422, &json!(["body"])));
    assert_eq!(host.metric(r#"modalkit_batch_size_items_count{model="puppet"}"#), 0.0);
}

#[test]
fn invalid_items_stand_in_their_places_where_the_caller_asks_for_that() {
    let host = puppet();
    let items =
        json!([{"value": 1}, {"value": "x"}, {"ms": 60_001}, {"value": 3, "do": "refuse"}, {"value": 4}]);
    let (status, answers) = host.post("/predict_batch?partial=true", &items);
    assert_eq!((status, answers.as_array().map(Vec::len)), (200, Some(5)), "{answers}");
    assert_eq!((&answers[0]["value"], &answers[4]["value"]), (&json!(1), &json!(4)));
    assert_eq!(answers[1]["status"], "error");
    assert_eq!(answers[1]["detail"][0]["loc"], json!(["body", 1, "value"]));
    assert!(answers[1]["error"].as_str().unwrap().contains("expected integer"), "{answers}");
    assert_eq!(answers[2]["detail"][0]["loc"], json!(["body", 2, "ms"]));
    assert_eq!(answers[3], json!({"status": "error", "error": "told to refuse this item"}));
    // All of them, and none.
    assert_eq!(host.post("/predict_batch?partial=true", &json!([{"value": "x"}])).1[0]["status"], "error");
    assert_eq!(host.post("/predict_batch?partial=true", &json!([])), (200, json!([])));
    assert_eq!(host.post("/predict_batch?partial=false", &items).0, 422);
    assert_eq!(host.post("/predict_batch?partial=yes", &items).0, 422);
    assert_eq!(host.post("/predict_batch?partial=true", &json!({"value": 1})).0, 422, "no list at all");
}

#[test]
fn what_only_the_schema_says_is_enforced_where_a_model_asks_for_it() {
    let config = "[model_settings.model_entries.strict]\nplugin = \"puppet\"\nenforce_schema = true\n\
                  [model_settings.model_entries.puppet]\n";
    let host = Setup::new().plugin("puppet").config(config).ready();
    let long = json!({"do": "x".repeat(101)});
    assert_eq!(host.post("/predict_sync?model_name=puppet", &long).0, 200);
    let (status, body) = host.post("/predict_sync?model_name=strict", &long);
    assert_eq!((status, &body["detail"][0]["loc"]), (422, &json!(["body", "do"])), "{body}");
    assert_eq!(body["detail"][0]["type"], "too_long");
    let (status, body) = host.post("/predict_batch?model_name=strict", &json!([{}, long]));
    assert_eq!((status, &body["detail"][0]["loc"]), (422, &json!(["body", 1, "do"])), "{body}");
    assert_eq!(host.post("/predict_sync?model_name=strict", &json!({"value": 1})).1["value"], 1);
}

#[test]
fn an_invalid_input_says_what_and_where() {
    let host = echo();
    let detail = |body: Value| {
        let (status, answer) = host.post("/predict_sync", &body);
        assert_eq!(status, 422, "{answer}");
        answer["detail"][0].clone()
    };
    assert_eq!(
        detail(json!({})),
        json!({"loc": ["body", "text"], "msg": "field required: `text`", "type": "missing"})
    );
    let wrong = detail(json!({"text": 5}));
    assert_eq!((&wrong["loc"], &wrong["type"]), (&json!(["body", "text"]), &json!("string_type")));
    assert_eq!(wrong["msg"], "expected string, found number 5");
    assert_eq!(detail(json!([]))["type"], "dict_type");
}

#[test]
fn an_asynchronous_job_can_be_asked_for_until_it_is_done() {
    let host = puppet();
    let done = |envelope: Value| {
        let (status, accepted) = host.post("/predict_async", &envelope);
        assert_eq!(status, 200, "{accepted}");
        let path = format!("/jobs/{}", accepted["job_id"].as_str().unwrap());
        let ended = || !["queued", "running"].contains(&host.get(&path).1["state"].as_str().unwrap());
        wait_until("the job is done", ended);
        host.get(&path).1
    };
    let job = done(json!({"message": {"value": 7}, "meta": {"order": 12}}));
    assert_eq!(job["state"], "succeeded");
    assert_eq!(job["result"], json!({"status": "success", "value": 7, "batch": 1, "meta": {"order": 12}}));
    let envelope = json!({"message": {"do": "fail"}, "success_queue": "", "meta": {"k": [1]}});
    let job = done(envelope.clone());
    assert_eq!(job["state"], "failed");
    assert_eq!(job["result"]["error"], "Internal Server Error. Error log: told to fail this item");
    assert_eq!(job["result"]["original_message"], envelope);
    // A number that JSON allows and no float holds is passed over, and comes back as it was written.
    let mut stream = host.connect();
    let body = r#"{"message": {"do": "fail"}, "meta": {"huge": 1e999}}"#;
    write!(stream, "POST /predict_async HTTP/1.0\r\ncontent-length: {}\r\n\r\n{body}", body.len()).unwrap();
    let mut accepted = String::new();
    stream.read_to_string(&mut accepted).unwrap();
    let id = accepted.split("\"job_id\":\"").nth(1).expect(&accepted).split('"').next().unwrap();
    wait_until("the job is done", || host.text(&format!("/jobs/{id}")).contains("\"state\":\"failed\""));
    assert!(host.text(&format!("/jobs/{id}")).contains(r#""huge": 1e999"#));
}

#[test]
fn an_envelope_is_taken_as_it_is_written_or_not_at_all() {
    let host = puppet();
    let refused = |envelope: Value| {
        let (status, answer) = host.post("/predict_async", &envelope);
        assert_eq!(status, 422, "{answer}");
        answer["detail"][0].clone()
    };
    assert_eq!(refused(json!({"message": {"value": "x"}}))["loc"], json!(["body", "message", "value"]));
    assert_eq!(refused(json!({"message": {}, "meta": [1]}))["loc"], json!(["body", "meta"]));
    let nowhere = refused(json!({"message": {}, "success_queue": "nowhere://q"}));
    assert_eq!(nowhere["loc"], json!(["body", "success_queue"]));
    assert!(nowhere["msg"].as_str().unwrap().contains("expected one of memory"), "{nowhere}");
    let unknown = refused(json!({"message": {}, "queue": "q"}));
    assert_eq!((&unknown["loc"], &unknown["type"]), (&json!(["body", "queue"]), &json!("extra_forbidden")));
    let missing = refused(json!({"meta": {}}));
    assert_eq!((&missing["loc"], &missing["type"]), (&json!(["body", "message"]), &json!("missing")));
    assert_eq!(host.get("/jobs/nonsense").0, 404);
}

#[test]
fn several_models_must_be_told_apart() {
    let host = Setup::new().plugin("echo").plugin("puppet").ready();
    wait_until("both are known", || host.models() == 2);
    wait_until("both serve", || host.get("/readyz").0 == 200);
    let (status, body) = host.post("/predict_sync", &json!({}));
    assert_eq!(status, 404);
    assert!(body["detail"].as_str().unwrap().contains(r#"["echo", "puppet"]"#), "{body}");
    let (status, body) = host.post("/predict_sync?model_name=nobody", &json!({}));
    assert_eq!(status, 404);
    assert!(body["detail"].as_str().unwrap().contains(r#"no model named "nobody""#), "{body}");
    assert_eq!(host.post("/predict_sync?model_name=puppet", &json!({})).0, 200);
}

#[test]
fn two_models_may_share_one_plugin() {
    let host = Setup::new()
        .plugin("puppet")
        .config("[model_settings.model_entries.left]\nplugin = \"puppet\"\n[model_settings.model_entries.right]\nplugin = \"puppet\"")
        .ready();
    assert_eq!(host.post("/predict_sync?model_name=left", &json!({"value": 1})).1["value"], 1);
    assert_eq!(host.post("/predict_sync?model_name=right", &json!({"value": 2})).1["value"], 2);
    assert_eq!(
        host.post("/predict_sync?model_name=puppet", &json!({})).0,
        404,
        "the plugin serves under its entries only"
    );
}

#[test]
fn limits_of_size_are_413() {
    let host = Setup::new()
        .plugin("puppet")
        .config("[server]\nbody_bytes_max = 1000\n[app_settings.batch_config]\nqueue_max = 3")
        .ready();
    let (status, body) = host.post("/predict_sync", &json!({"do": "x".repeat(2000)}));
    assert_eq!(status, 413);
    assert!(body["detail"].as_str().unwrap().contains("at most 1000 bytes"), "{body}");
    let (status, body) = host.post("/predict_batch", &json!([{}, {}, {}, {}]));
    assert_eq!(status, 413);
    assert!(body["detail"].as_str().unwrap().contains("at most 3 items"), "{body}");
}

#[test]
fn large_inputs_are_parsed_off_the_connections_threads_and_answered_alike() {
    let host = Setup::new().plugin("echo").config("[server]\ndecode_inline_bytes_max = 64").ready();
    let text = "long ".repeat(200_000);
    assert_eq!(host.post("/predict_sync", &json!({"text": text})).1["translated_text"], text.to_uppercase());
    assert_eq!(host.post("/predict_sync", &json!({"txt": text})).0, 422);
}

#[test]
fn a_callers_request_id_comes_back_and_a_missing_one_is_made() {
    let host = echo();
    let mut stream = host.connect();
    let body = r#"{"text":"a"}"#;
    let mut ask = |header: &str| {
        write!(
            stream,
            "POST /predict_sync HTTP/1.1\r\nhost: localhost\r\n{header}content-length: {}\r\n\r\n{body}",
            body.len()
        )
        .unwrap();
        let mut buffer = [0; 1024];
        let length = stream.read(&mut buffer).unwrap();
        String::from_utf8_lossy(&buffer[..length]).into_owned()
    };
    assert!(ask("x-request-id: mine-7\r\n").contains("x-request-id: mine-7\r\n"));
    let made = ask("");
    let id = made.split("x-request-id: ").nth(1).unwrap().split("\r\n").next().unwrap();
    assert!(id.len() > 8, "{made}");
}

#[test]
fn a_failed_request_is_logged_with_its_id() {
    let host = puppet();
    let (status, _) = host.post_with("/predict_sync", &json!({"do": "fail"}), &[("x-request-id", "find-me")]);
    assert_eq!(status, 500);
    let line = host.log_line("request failed");
    assert_eq!((line["request_id"].as_str(), line["model"].as_str()), (Some("find-me"), Some("puppet")));
    assert!(line["error"].as_str().unwrap().contains("told to fail this item"), "{line}");
}

#[test]
fn http2_without_tls_is_served_on_the_same_port() {
    let host = echo();
    // The connection preface and an empty SETTINGS frame: the server's own SETTINGS frame comes back.
    let mut stream = host.connect();
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00").unwrap();
    let mut frame = [0; 9];
    stream.read_exact(&mut frame).unwrap();
    assert_eq!(frame[3], 4, "a SETTINGS frame");
    // And a whole request, where a client for it is installed.
    let url = format!("http://{}/predict_sync", host.address);
    let curl = Command::new("curl")
        .args(["--silent", "--http2-prior-knowledge", "--data", r#"{"text":"two"}"#, &url])
        .output();
    if let Ok(output) = curl {
        assert!(String::from_utf8_lossy(&output.stdout).contains("TWO"), "{output:?}");
    }
}

#[test]
fn wrong_paths_and_methods_say_what_there_is() {
    let host = echo();
    assert_eq!(host.get("/predict_sync").0, 405);
    assert_eq!(host.post("/health", &json!({})).0, 405);
    let (status, body) = host.get("/nowhere");
    assert_eq!(status, 404);
    assert!(body["detail"].as_str().unwrap().contains("/predict_batch"), "{body}");
}

#[test]
fn health_and_metrics_tell_what_happened() {
    let host = echo();
    assert_eq!(host.get("/livez").0, 200);
    let (_, health) = host.get("/health");
    assert_eq!(
        health,
        json!({"status": "ok", "models": {"echo": {"state": "ready", "configured": false, "required": false}}})
    );
    for _ in 0..3 {
        assert_eq!(host.post("/predict_sync", &json!({"text": "a"})).0, 200);
    }
    assert_eq!(host.post("/predict_sync", &json!({})).0, 422);
    assert_eq!(host.post("/predict_batch", &json!([{"text": "a"}])).0, 200);
    let sample = |endpoint: &str, status: u16| {
        host.metric(&format!(
            r#"modalkit_requests_total{{endpoint="{endpoint}",model="echo",status="{status}"}}"#
        ))
    };
    assert_eq!(
        (sample("/predict_sync", 200), sample("/predict_sync", 422), sample("/predict_batch", 200)),
        (3.0, 1.0, 1.0)
    );
    for histogram in ["queue_wait_seconds", "batch_wait_seconds", "batch_size_items"] {
        assert_eq!(
            host.metric(&format!(r#"modalkit_{histogram}_count{{model="echo"}}"#)),
            4.0,
            "{histogram}"
        );
    }
    for stage in ["preprocess", "predict", "postprocess"] {
        assert_eq!(
            host.metric(&format!(r#"modalkit_stage_seconds_count{{model="echo",stage="{stage}"}}"#)),
            4.0
        );
    }
    assert_eq!(host.metric(r#"modalkit_batches_closed_total{model="echo",reason="full"}"#), 4.0);
    assert_eq!(host.metric(r#"modalkit_model_ready{model="echo"}"#), 1.0);
}

#[test]
fn a_deadline_passes_as_504_and_leaves_nothing_in_the_queue() {
    let host = puppet();
    let header = [("x-request-timeout-ms", "50")];
    let (status, body) = host.post_with("/predict_sync", &json!({"do": "sleep", "ms": 300}), &header);
    assert_eq!((status, body["detail"].as_str().unwrap().contains("deadline")), (504, true));
    // While that batch still runs, this one waits in vain, and takes no slot afterwards.
    let (status, _) = host.post_with("/predict_sync", &json!({"value": 1}), &[("x-request-timeout-ms", "1")]);
    assert_eq!(status, 504);
    wait_until("nothing waits", || host.metric(r#"modalkit_queued_jobs{model="puppet"}"#) == 0.0);
    assert_eq!(host.post("/predict_sync", &json!({"value": 2})).0, 200);
    assert_eq!(host.metric(r#"modalkit_batch_size_items_sum{model="puppet"}"#), 2.0);
    let (status, body) = host.post_with("/predict_sync", &json!({}), &[("x-request-timeout-ms", "soon")]);
    assert_eq!((status, &body["detail"][0]["loc"]), (422, &json!(["header", "x-request-timeout-ms"])));
}
