//! Whoever reads a host's log may stop: the host serves on, ends when it is told to, and says later how many lines are missing.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use modalkit_tests::{Host, Setup, wait_until};
use serde_json::json;

const DROPPED: &str = "modalkit_log_lines_dropped_total";
const CALLERS: usize = 8;
/// For an answer without any work, on a machine that others use as well.
const AT_ONCE: Duration = Duration::from_secs(5);

/// Fails requests, which logs a line for each, until lines are dropped; asks all the while whether the host lives.
fn fill_the_log(host: &Host) {
    host.stop_reading_log();
    let done = AtomicBool::new(false);
    let before = host.metric(DROPPED);
    thread::scope(|scope| {
        for _ in 0..CALLERS {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    assert_eq!(host.post("/predict_sync", &json!({"do": "fail the batch"})).0, 500);
                }
            });
        }
        wait_until("lines are dropped", || {
            let begun = Instant::now();
            assert_eq!(host.get("/livez").0, 200);
            assert!(begun.elapsed() < AT_ONCE, "/livez took {:?}", begun.elapsed());
            host.metric(DROPPED) > before
        });
        done.store(true, Ordering::Relaxed);
    });
}

fn host() -> Host {
    Setup::new().plugin("puppet").ready()
}

#[test]
fn a_host_whose_log_nobody_reads_serves_and_says_later_how_many_lines_are_missing() {
    let mut host = host();
    fill_the_log(&host);
    let (status, answer) = host.post("/predict_sync", &json!({"value": 7}));
    assert_eq!((status, &answer["value"]), (200, &json!(7)));
    let dropped = host.metric(DROPPED);
    host.read_log_on();
    let notice = host.log_line("log lines were dropped here");
    assert_eq!(notice["lines_dropped"].as_f64(), Some(dropped), "{notice}");
    assert_eq!(notice["level"], "WARN");
    assert!(host.log().iter().all(serde_json::Value::is_object), "no line is cut");
    // What comes later is written again.
    assert_eq!(host.post("/predict_sync", &json!({"do": "log"})).0, 200);
    assert_eq!(host.log_line("a line through tracing")["level"], "WARN");
    let printed = host.log_line("a line through println");
    assert_eq!(
        (&printed["level"], &printed["from"]),
        (&serde_json::json!("INFO"), &serde_json::json!("stdout"))
    );
    // It ends as ever while nobody reads.
    fill_the_log(&host);
    host.signal("TERM");
    assert_eq!(host.wait().code(), Some(0));
}

#[test]
fn a_second_signal_ends_a_host_whose_log_nobody_reads() {
    let mut host = host();
    fill_the_log(&host);
    thread::scope(|scope| {
        scope.spawn(|| {
            use std::io::{Read, Write};
            let mut stream = host.connect();
            let body = r#"{"do": "sleep", "ms": 30000}"#;
            let length = body.len();
            write!(
                stream,
                "POST /predict_sync HTTP/1.1\r\nhost: localhost\r\ncontent-length: {length}\r\n\r\n{body}"
            )
            .unwrap();
            // It is cut off, with an error or without.
            let _ = stream.read_to_end(&mut Vec::new());
        });
        let batches = host.metric(r#"modalkit_batch_size_items_count{model="puppet"}"#);
        wait_until("it runs", || {
            host.metric(r#"modalkit_batch_size_items_count{model="puppet"}"#) > batches
                || host.metric("modalkit_requests_in_flight") >= 1.0
        });
        host.signal("TERM");
        let address = host.address;
        wait_until("the port is closed", || std::net::TcpStream::connect(address).is_err());
        host.signal("TERM");
    });
    assert_eq!(host.wait().code(), Some(130));
}
