//! Starting, waiting for plugins, draining, ending.

use std::{
    io::{Read, Write},
    thread,
};

use modalkit_tests::{Setup, install, library, wait_until};
use serde_json::json;

#[test]
fn a_plugin_that_comes_later_serves_at_once_and_its_model_waits_until_then() {
    let host = Setup::new().config("[model_settings.model_entries.late]\nplugin = \"puppet\"").start();
    let (status, body) = host.post("/predict_sync?model_name=late", &json!({}));
    assert_eq!(status, 503, "{body}");
    assert!(body["detail"].as_str().unwrap().contains("waits for its plugin puppet.so"), "{body}");
    assert_eq!(host.model("late")["state"], "waiting");
    let (status, body) = host.get("/readyz");
    assert_eq!((status, &body["not_ready"]["late"]["state"]), (503, &json!("waiting")));
    install(&library("puppet"), &host.volume().join("puppet.so"));
    wait_until("it serves", || host.post("/predict_sync?model_name=late", &json!({})).0 == 200);
    install(&library("echo"), &host.volume().join("libecho.so"));
    wait_until("another one serves", || {
        host.post("/predict_sync?model_name=echo", &json!({"text": "a"})).0 == 200
    });
    assert_eq!(host.get("/readyz").0, 200);
}

#[test]
fn a_shutdown_answers_what_was_admitted_and_exits_0() {
    let mut host = Setup::new().plugin("puppet").ready();
    thread::scope(|scope| {
        let slow = scope.spawn(|| host.post("/predict_sync", &json!({"do": "sleep", "ms": 700, "value": 1})));
        wait_until("it runs", || host.metric(r#"modalkit_batch_size_items_count{model="puppet"}"#) == 1.0);
        let queued = scope.spawn(|| host.post("/predict_sync", &json!({"value": 2})));
        wait_until("one waits", || host.metric(r#"modalkit_queued_jobs{model="puppet"}"#) == 1.0);
        host.signal("TERM");
        assert_eq!(slow.join().unwrap().1["value"], 1);
        assert_eq!(queued.join().unwrap().1["value"], 2);
    });
    assert_eq!(host.wait().code(), Some(0));
    assert!(host.log_line("puppet leaves")["model"] == "puppet", "instances are dropped before the end");
    let left = std::fs::read_dir(host.temporary_folder()).unwrap().count();
    assert_eq!(left, 0, "private copies vanish with the host");
}

#[test]
fn a_host_that_is_about_to_drain_says_so_and_goes_on_for_the_time_that_is_set() {
    let mut host = Setup::new().plugin("echo").config("[server]\ndrain_delay_seconds = 3").ready();
    host.signal("TERM");
    wait_until("balancers see it", || host.get("/readyz").0 == 503);
    assert_eq!(host.get("/readyz").1["shutting_down"], true);
    assert_eq!(host.get("/readyz?model=echo").0, 503);
    // Who hasn't heard of it yet is served, on connections old and new.
    assert_eq!(host.post("/predict_sync", &json!({"text": "a"})).0, 200);
    assert_eq!(host.get("/livez").0, 200);
    assert_eq!(host.wait().code(), Some(0));
}

#[test]
fn a_shutdown_takes_no_new_requests_and_says_so_on_open_connections() {
    let mut host = Setup::new().plugin("puppet").ready();
    let mut stream = host.connect();
    let body = r#"{"do": "sleep", "ms": 600}"#;
    write!(
        stream,
        "POST /predict_sync HTTP/1.1\r\nhost: localhost\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    wait_until("it runs", || host.metric(r#"modalkit_batch_size_items_count{model="puppet"}"#) == 1.0);
    let address = host.address;
    host.signal("TERM");
    wait_until("the port is closed", || std::net::TcpStream::connect(address).is_err());
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("connection: close"), "{answer}");
    assert_eq!(host.wait().code(), Some(0));
}

#[test]
fn a_second_signal_ends_it_at_once() {
    let mut host = Setup::new().plugin("puppet").ready();
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut stream = host.connect();
            let body = r#"{"do": "sleep", "ms": 30000}"#;
            write!(
                stream,
                "POST /predict_sync HTTP/1.1\r\nhost: localhost\r\ncontent-length: {}\r\n\r\n{body}",
                body.len()
            )
            .unwrap();
            let mut answer = Vec::new();
            // It is cut off, with an error or without.
            let _ = stream.read_to_end(&mut answer);
            assert!(answer.is_empty());
        });
        wait_until("it runs", || host.metric(r#"modalkit_batch_size_items_count{model="puppet"}"#) == 1.0);
        host.signal("TERM");
        assert_eq!(host.log_line("shutting down")["inside"], 1);
        host.signal("TERM");
    });
    assert_eq!(host.wait().code(), Some(130));
}

#[test]
fn a_drain_ends_at_its_limit_with_1() {
    let mut host = Setup::new().plugin("puppet").config("[server]\ndrain_timeout_seconds = 1").ready();
    let mut stream = host.connect();
    let body = r#"{"do": "sleep", "ms": 30000}"#;
    write!(
        stream,
        "POST /predict_sync HTTP/1.1\r\nhost: localhost\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    wait_until("it runs", || host.metric(r#"modalkit_batch_size_items_count{model="puppet"}"#) == 1.0);
    host.signal("TERM");
    assert_eq!(host.wait().code(), Some(1));
}

#[test]
fn an_accepted_job_is_finished_before_the_end() {
    let mut host = Setup::new().plugin("puppet").ready();
    assert_eq!(host.post("/predict_async", &json!({"message": {"do": "sleep", "ms": 500}})).0, 200);
    host.signal("TERM");
    assert_eq!(host.wait().code(), Some(0));
    assert_eq!(host.log_line("stopped")["drained"], true);
}

#[test]
fn wrong_configurations_end_with_2_and_a_hint() {
    let (status, said) = Setup::new()
        .config("[server]\nlisten = \"0.0.0.0:0\"")
        .variable("MODALKIT_SERVER__LISTEN", "0.0.0.0:0")
        .refuses_to_start();
    assert_eq!(status.code(), Some(2));
    assert!(said.contains("server.insecure = true"), "{said}");
    let (status, said) = Setup::new().config("[servr]").refuses_to_start();
    assert_eq!(status.code(), Some(2));
    assert!(said.contains("modalkit.toml:1:2  servr") && said.contains("did you mean server?"), "{said}");
    let (status, said) = Setup::new().variable("MODALKIT_SERVER__BODY_BYTES_MAX", "lots").refuses_to_start();
    assert_eq!(status.code(), Some(2));
    assert!(said.contains("$MODALKIT_SERVER__BODY_BYTES_MAX  server.body_bytes_max"), "{said}");
}

#[test]
fn a_taken_port_ends_it_with_1_and_a_hint() {
    let host = Setup::new().start();
    let (status, said) =
        Setup::new().variable("MODALKIT_SERVER__LISTEN", &host.address.to_string()).refuses_to_start();
    assert_eq!(status.code(), Some(1));
    assert!(said.contains("can't listen on") && said.contains("MODALKIT_SERVER__LISTEN"), "{said}");
}

#[test]
fn every_address_may_be_served_where_it_is_said_to_be_guarded() {
    let host = Setup::new()
        .plugin("echo")
        .variable("MODALKIT_SERVER__LISTEN", "0.0.0.0:0")
        .variable("MODALKIT_SERVER__INSECURE", "true")
        .start();
    assert!(host.address.ip().is_unspecified());
}
