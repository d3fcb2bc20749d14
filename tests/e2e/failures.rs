//! What a plugin can do wrong at run time, and who pays for it.

use std::{
    fs,
    io::Write,
    thread,
    time::{Duration, Instant},
};

use modalkit_tests::{Host, Setup, Version, put, wait_until};
use serde_json::{Value, json};

fn batching_puppet(more: &str) -> Host {
    let config = format!("[app_settings.batch_config]\nmax_batch_size = 4\nwait_ms = 100\n{more}");
    Setup::new().plugin("puppet").plugin("echo").config(&config).ready()
}

fn ask(host: &Host, body: &Value) -> (u16, Value) {
    host.post("/predict_sync?model_name=puppet", body)
}

/// What a plugin does that ends the process, and how that ends.
const ENDS: [(&str, &str, Option<i32>); 2] = [("exits", "exit()", Some(70)), ("faults", "SIGSEGV", None)];

#[test]
fn a_plugin_that_ends_the_process_is_named_and_its_end_is_never_taken_for_a_planned_one() {
    for (behaviour, how, code) in ENDS {
        let setup = Setup::new().plugin("echo");
        Version::bad(1, behaviour).install(&setup.volume());
        let mut host = setup.start();
        wait_until("both serve", || host.models() == 2 && host.get("/readyz").0 == 200);
        let mut stream = host.connect();
        let body = r#"{"text": "a"}"#;
        write!(
            stream,
            "POST /predict_sync?model_name=versioned HTTP/1.1\r\nhost: localhost\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        )
        .unwrap();
        let ended = host.wait();
        assert_eq!(ended.code(), code, "{behaviour}: {ended:?}");
        assert!(!ended.success());
        let line = host.log_line("the process is ended by");
        assert_eq!(line["message"], format!("the process is ended by {how} in a plugin's predict"));
        assert_eq!((&line["model"], &line["stage"]), (&json!("versioned"), &json!("predict")), "{line}");
    }
}

#[test]
fn content_that_ends_the_host_in_its_load_is_not_loaded_again_and_the_version_before_serves() {
    for (behaviour, how) in [("load-exit", "exit()"), ("load-fault", "SIGSEGV")] {
        let setup = Setup::new().plugin("echo");
        Version::good(1).install(&setup.volume());
        let mut host = setup.start();
        let version = |host: &Host| host.post("/predict_sync?model_name=versioned", &json!({"text": "a"}));
        wait_until("it serves", || version(&host).0 == 200);
        wait_until("a copy of it is kept", || {
            fs::read_dir(host.folder().join("state/served")).unwrap().flatten().any(|file| {
                file.path().extension().is_some_and(|kind| kind == "so")
                    && fs::read(file.path()).unwrap() == Version::good(1).bytes()
            })
        });
        Version::bad(2, behaviour).install(&host.volume());
        assert!(!host.wait().success());
        host.start_again();
        wait_until("the version before serves", || version(&host).0 == 200);
        assert_eq!(version(&host).1["version"], 1);
        wait_until("the other model serves", || {
            host.post("/predict_sync?model_name=echo", &json!({"text": "a"})).0 == 200
        });
        let line = host.log_line("content is fenced");
        assert_eq!(
            (&line["model"], &line["why"]),
            (
                &json!("versioned"),
                &json!(format!("this content ended the host while it was loaded: {how} in load"))
            )
        );
        let report = host.report("versioned");
        let history = report["history"].as_array().unwrap();
        assert!(
            history.iter().any(|entry| entry["reason"].to_string().contains("modalkit reload versioned")),
            "{report}"
        );
        assert_eq!(report["last"]["cause"], "fence", "{report}");
        // Another version is taken as ever, and somebody may ask for the fenced one.
        Version::good(3).install(&host.volume());
        wait_until("the new one serves", || version(&host).1["version"] == 3);
        Version::bad(2, behaviour).install(&host.volume());
        wait_until("it was refused", || {
            host.report("versioned")["last"]["reason"].to_string().contains("ended the host")
        });
        assert_eq!(version(&host).1["version"], 3);
        host.signal("TERM");
        assert_eq!(host.wait().code(), Some(0));
    }
}

#[test]
fn a_panic_in_any_stage_fails_its_batch_only() {
    let host = batching_puppet("");
    for stage in ["preprocess", "predict", "postprocess"] {
        let what = format!("panic in {stage}");
        let (failed, body) = ask(&host, &json!({"do": what}));
        assert_eq!(failed, 500);
        let detail = body["detail"].as_str().unwrap();
        assert!(
            detail.starts_with("Internal Server Error. Error log: the pipeline panicked: told to panic"),
            "{detail}"
        );
        assert_eq!(ask(&host, &json!({"value": 5})).1["value"], 5);
    }
    assert_eq!(host.metric(r#"modalkit_batches_failed_total{model="puppet",reason="panic"}"#), 3.0);
    let line = host.log_line("told to panic in predict");
    assert_eq!(
        (line["model"].as_str(), line["from"].as_str(), line["level"].as_str()),
        (Some("puppet"), Some("panic"), Some("ERROR"))
    );
    assert!(line["fields"].as_str().unwrap().contains("puppet/src/lib.rs"), "{line}");
}

#[test]
fn a_panic_while_an_input_is_looked_at_fails_that_request_only() {
    let host = batching_puppet("");
    assert_eq!(ask(&host, &json!({"do": "panic in validate"})).0, 500);
    assert_eq!(ask(&host, &json!({"value": 1})).0, 200);
}

#[test]
fn a_wrong_count_of_outcomes_is_an_error_and_never_a_misrouted_answer() {
    let host = batching_puppet("");
    let (status, answers) = host.post(
        "/predict_batch?model_name=puppet",
        &json!([{"value": 1}, {"do": "one too few"}, {"value": 3}]),
    );
    assert_eq!(status, 200);
    for answer in answers.as_array().unwrap() {
        assert_eq!(answer["status"], "error");
        assert!(answer["error"].as_str().unwrap().contains("expected 3, found 2"), "{answer}");
    }
}

#[test]
fn a_batch_that_fails_as_a_whole_fails_those_items_alone_that_fail_without_the_others() {
    let host = batching_puppet("");
    let (status, answers) =
        host.post("/predict_batch?model_name=puppet", &json!([{"do": "fail the batch"}, {"value": 2}]));
    assert_eq!(status, 200);
    assert_eq!(answers[0], json!({"status": "error", "error": "told to fail the batch"}));
    assert_eq!((&answers[1]["value"], &answers[1]["batch"]), (&json!(2), &json!(1)), "it ran again, alone");
    assert_eq!(host.metric(r#"modalkit_batches_failed_total{model="puppet",reason="error"}"#), 1.0);
    assert_eq!(host.metric(r#"modalkit_item_reruns_total{model="puppet",reason="halved"}"#), 2.0);
    let (status, body) = ask(&host, &json!({"do": "refuse"}));
    assert_eq!((status, &body["detail"][0]["msg"]), (422, &json!("told to refuse this item")));
}

#[test]
fn what_a_plugin_logs_stands_in_the_hosts_log_with_the_models_name() {
    let host = batching_puppet("");
    assert_eq!(ask(&host, &json!({"do": "log", "value": 9})).0, 200);
    let line = host.log_line("a line through tracing");
    assert_eq!(
        (line["model"].as_str(), line["level"].as_str(), line["from"].as_str()),
        (Some("puppet"), Some("WARN"), Some("puppet"))
    );
    assert_eq!(line["fields"], "value=9 answer=42");
    assert_eq!(host.log_line("a line through log")["model"], "puppet");
    assert_eq!(host.log_line("puppet loads")["model"], "puppet");
}

#[test]
fn a_batch_that_overruns_fails_with_504_and_its_replica_is_replaced() {
    let host = batching_puppet("[app_settings.deployment_config]\nbatch_timeout_seconds = 0.2\n");
    let (status, body) = ask(&host, &json!({"do": "sleep", "ms": 2000}));
    assert_eq!(status, 504);
    assert!(body["detail"].as_str().unwrap().contains("batch_timeout_seconds"), "{body}");
    wait_until("it serves again", || ask(&host, &json!({"value": 1})).0 == 200);
    assert_eq!(host.metric(r#"modalkit_replicas_stuck{model="puppet"}"#), 1.0);
    assert_eq!(host.metric(r#"modalkit_replicas_given_up_total{model="puppet"}"#), 1.0);
    wait_until("the thread came back", || host.metric(r#"modalkit_replicas_stuck{model="puppet"}"#) == 0.0);
    assert_eq!(host.metric(r#"modalkit_replicas{model="puppet"}"#), 1.0);
}

#[test]
fn a_thread_of_an_earlier_generation_is_stuck_until_it_comes_back() {
    let host = batching_puppet("[app_settings.deployment_config]\nbatch_timeout_seconds = 0.2\n");
    let stuck = || host.metric(r#"modalkit_replicas_stuck{model="puppet"}"#);
    let sleeper = Instant::now();
    assert_eq!(ask(&host, &json!({"do": "sleep", "ms": 4000})).0, 504);
    // Bytes behind the library's own make other content that does the same.
    let file = host.volume().join("puppet.so");
    let mut bytes = fs::read(&file).unwrap();
    bytes.push(b'\n');
    put(&bytes, &file);
    wait_until("the next generation serves", || host.report("puppet")["generation"]["number"] == 2);
    wait_until("it came back", || stuck() == 0.0);
    assert!(sleeper.elapsed() >= Duration::from_secs(4), "it was forgotten while it slept");
}

#[test]
fn a_model_whose_replicas_hang_is_given_up_and_comes_back_with_its_threads() {
    let host = batching_puppet(
        "[app_settings.deployment_config]\nbatch_timeout_seconds = 0.1\nstuck_replicas_max = 0\n",
    );
    assert_eq!(ask(&host, &json!({"do": "sleep", "ms": 1500})).0, 504);
    wait_until("it is given up", || host.model("puppet")["state"] == "stuck");
    let (status, body) = ask(&host, &json!({"value": 1}));
    assert_eq!(status, 503, "{body}");
    assert_eq!(host.get("/readyz?model=puppet").0, 503);
    assert_eq!(host.get("/readyz").0, 200, "it has no entry, and another one serves");
    assert_eq!(host.post("/predict_sync?model_name=echo", &json!({"text": "a"})).0, 200, "others serve on");
    wait_until("it serves again", || ask(&host, &json!({"value": 1})).0 == 200);
}

#[test]
fn each_batch_of_a_given_up_replica_has_its_own_end() {
    let config =
        "[app_settings.deployment_config]\nallow_concurrent_inputs = 2\nbatch_timeout_seconds = 0.5\n";
    let host = Setup::new().plugin("puppet").config(config).ready();
    let sleep = json!({"do": "sleep", "ms": 3000});
    thread::scope(|scope| {
        let first = scope.spawn(|| host.post("/predict_sync", &sleep).0);
        wait_until("it runs", || host.metric(r#"modalkit_batch_size_items_count{model="puppet"}"#) == 1.0);
        thread::sleep(Duration::from_millis(200));
        let second = scope.spawn(|| host.post("/predict_sync", &sleep).0);
        assert_eq!((first.join().unwrap(), second.join().unwrap()), (504, 504));
    });
    assert_eq!(host.metric(r#"modalkit_replicas_given_up_total{model="puppet"}"#), 1.0);
    wait_until("it serves again", || host.post("/predict_sync", &json!({"value": 1})).0 == 200);
    wait_until("both came back", || host.metric(r#"modalkit_replicas_stuck{model="puppet"}"#) == 0.0);
}

#[test]
fn a_full_queue_is_429_and_an_answered_one_takes_more() {
    let host = Setup::new().plugin("puppet").config("[app_settings.batch_config]\nqueue_max = 2").ready();
    thread::scope(|scope| {
        let busy = scope.spawn(|| host.post("/predict_sync", &json!({"do": "sleep", "ms": 1000})).0);
        wait_until("it runs", || host.metric(r#"modalkit_batch_size_items_count{model="puppet"}"#) == 1.0);
        let waiting: Vec<_> =
            (0..2).map(|_| scope.spawn(|| host.post("/predict_sync", &json!({})).0)).collect();
        wait_until("two wait", || host.metric(r#"modalkit_queued_jobs{model="puppet"}"#) == 2.0);
        let (status, body) = host.post("/predict_sync", &json!({}));
        assert_eq!(status, 429, "{body}");
        // A job waits in the journal for room.
        assert_eq!(host.post("/predict_async", &json!({"message": {}})).0, 200);
        assert_eq!(busy.join().unwrap(), 200);
        waiting.into_iter().for_each(|caller| assert_eq!(caller.join().unwrap(), 200));
    });
    assert_eq!(host.post("/predict_sync", &json!({})).0, 200);
}

#[test]
fn too_many_requests_in_flight_are_429() {
    let config = "[app_settings.deployment_config]\nallow_concurrent_inputs_handler = 1";
    let host = Setup::new().plugin("puppet").config(config).ready();
    thread::scope(|scope| {
        let busy = scope.spawn(|| host.post("/predict_sync", &json!({"do": "sleep", "ms": 500})).0);
        wait_until("it runs", || host.metric(r#"modalkit_batch_size_items_count{model="puppet"}"#) == 1.0);
        assert_eq!(host.post("/predict_sync", &json!({})).0, 429);
        assert_eq!(busy.join().unwrap(), 200);
    });
    assert_eq!(host.metric("modalkit_requests_in_flight"), 0.0);
}

#[test]
fn a_pipeline_that_does_not_load_says_why_and_is_tried_again() {
    let host = Setup::new()
        .plugin("puppet")
        .plugin("echo")
        .config("[model_settings.model_entries.puppet]\nneeds = \"weights.bin\"")
        .config("[model_settings.model_entries.loud]\nplugin = \"puppet\"\nload = \"panic\"")
        .config("[model_settings.model_entries.asleep]\nplugin = \"puppet\"\nneeds = \"weights.bin\"\ndeployment_config = { min_replicas = 0 }")
        .config("[model_settings.model_entries.typo]\nplugin = \"puppet\"\nlaod = \"error\"")
        .start();
    let reason = |name: &str| {
        wait_until("it has failed", || host.model(name)["state"] == "failed");
        host.model(name)["reason"].as_str().unwrap().to_owned()
    };
    assert!(reason("puppet").contains("looking for weights.bin: No such file"));
    assert!(reason("loud").contains("the pipeline panicked: told to panic in load"));
    let typo = reason("typo");
    assert!(typo.contains("model_entries.typo.laod") && typo.contains("did you mean load?"), "{typo}");
    let (status, body) = ask(&host, &json!({}));
    assert_eq!(status, 503, "{body}");
    wait_until("echo serves", || host.post("/predict_sync?model_name=echo", &json!({"text": "a"})).0 == 200);
    fs::write(host.volume().join("weights.bin"), "weights").unwrap();
    for name in ["puppet", "asleep"] {
        let path = format!("/predict_sync?model_name={name}");
        wait_until("it is tried again", || host.post(&path, &json!({"value": 3})).0 == 200);
    }
}
