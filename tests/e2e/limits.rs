//! Limits of what callers and plugins can take from others: memory, places, time of threads. Whatever they do or leave undone,
//! `/livez` is answered, good callers are served, and the host ends when it is told to.

use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
    thread,
    time::{Duration, Instant},
};

use modalkit_tests::{Host, Setup, http2, wait_until};
use serde_json::json;

const MIB: f64 = 1024.0 * 1024.0;
/// More than the kernel keeps of an answer for a caller that doesn't read.
const LARGE_BYTES: usize = 24 << 20;
/// Within this an answer comes at once, on a machine that does much else.
const AT_ONCE: Duration = Duration::from_secs(3);

fn resident(host: &Host) -> f64 {
    let status = fs::read_to_string(format!("/proc/{}/status", host.id())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().strip_suffix("kB").unwrap().trim().parse::<f64>().unwrap() * 1024.0
}

fn in_flight(host: &Host) -> (f64, f64) {
    (host.metric("modalkit_requests_in_flight"), host.metric("modalkit_bytes_in_flight"))
}

fn post(stream: &mut TcpStream, path: &str, body: &str) {
    let head = format!("POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {}\r\n\r\n", body.len());
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(body.as_bytes()).unwrap();
}

/// What comes until the end, however that comes.
fn rest(stream: &mut TcpStream) -> Vec<u8> {
    let mut all = Vec::new();
    let mut buffer = vec![0; 64 << 10];
    while let Ok(length) = stream.read(&mut buffer) {
        if length == 0 {
            break;
        }
        all.extend_from_slice(&buffer[..length]);
    }
    all
}

#[test]
fn unfinished_headers_take_no_more_than_their_limit() {
    let host = Setup::new().start();
    let before = resident(&host);
    let unfinished = |bytes: usize| {
        let mut stream = host.connect();
        // Beyond the limit the host hangs up.
        let _ = stream.write_all(b"GET /predict_sync HTTP/1.1\r\nx-long: ");
        let _ = stream.write_all(&vec![b'y'; bytes]);
        stream
    };
    let count = 400;
    let _longer: Vec<_> = (0..count).map(|_| unfinished(380 << 10)).collect();
    let held: Vec<_> = (0..count).map(|_| unfinished(60 << 10)).collect();
    wait_until("the longer ones are gone", || host.metric("modalkit_connections") <= count as f64 + 1.0);
    let each = (resident(&host) - before) / count as f64 / 1024.0;
    assert!(each < 64.0 + 40.0, "{each:.0} KiB each");
    drop(held);
    let mut told = unfinished(66 << 10);
    let answer = String::from_utf8(rest(&mut told)).unwrap();
    assert!(answer.starts_with("HTTP/1.1 431"), "{answer}");
}

#[test]
fn unfinished_bodies_take_no_more_than_the_budget_and_small_ones_still_pass() {
    let config = "[server]\nbytes_in_flight_max = 33554432\nbody_timeout_ms = 600000";
    let host = Setup::new().plugin("echo").config(config).ready();
    let before = resident(&host);
    let part = vec![b' '; 7 << 20];
    let mut callers = Vec::new();
    for _ in 0..60 {
        let mut stream = host.connect();
        stream.set_write_timeout(Some(Duration::from_secs(2))).unwrap();
        stream
            .write_all(b"POST /predict_sync HTTP/1.1\r\nhost: localhost\r\ncontent-length: 8388608\r\n\r\n")
            .unwrap();
        // Whoever is refused may not get it all off.
        let _ = stream.write_all(&part);
        callers.push(stream);
    }
    let grown = (resident(&host) - before) / MIB;
    assert!(grown < 32.0 + 32.0, "{grown:.0} MiB");
    let (_, bytes) = in_flight(&host);
    assert!((16.0 * MIB..=32.0 * MIB).contains(&bytes), "{bytes} bytes in flight");
    let refused = callers
        .iter_mut()
        .rev()
        .map(|caller| {
            caller.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            String::from_utf8_lossy(&rest(caller)).into_owned()
        })
        .find(|answer| !answer.is_empty())
        .expect("somebody reads why it was refused");
    assert!(refused.starts_with("HTTP/1.1 429"), "{refused}");
    assert!(
        refused.contains("retry-after: 1") && refused.contains("server.bytes_in_flight_max"),
        "{refused}"
    );
    assert_eq!(host.post("/predict_sync", &json!({"text": "a"})).0, 200);
    drop(callers);
    wait_until("all is given back", || in_flight(&host) == (0.0, 0.0));
}

#[test]
fn a_declared_length_takes_nothing_until_bytes_come() {
    let config =
        "[server]\nbody_bytes_max = 1048576\nbytes_in_flight_max = 1048576\nbody_timeout_ms = 600000";
    let host = Setup::new().plugin("echo").config(config).ready();
    let callers: Vec<_> = (0..10)
        .map(|_| {
            let mut stream = host.connect();
            stream
                .write_all(
                    b"POST /predict_sync HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000000\r\n\r\n{",
                )
                .unwrap();
            stream
        })
        .collect();
    wait_until("all are inside", || in_flight(&host) == (10.0, 0.0));
    drop(callers);
    wait_until("all is given back", || in_flight(&host) == (0.0, 0.0));
}

#[test]
fn a_caller_that_never_reads_is_in_flight_until_it_is_ended() {
    let config = "[server]\nwrite_timeout_ms = 5000";
    let host = Setup::new().plugin("puppet").config(config).ready();
    let body = json!({"padding_bytes": LARGE_BYTES}).to_string();
    let is_ended = || {
        wait_until("it is being written", || {
            let (requests, bytes) = in_flight(&host);
            requests == 1.0 && bytes >= LARGE_BYTES as f64
        });
        wait_until("it is ended", || in_flight(&host) == (0.0, 0.0));
        wait_until("it is closed", || host.metric("modalkit_connections") <= 1.0);
    };
    let mut stream = host.connect();
    post(&mut stream, "/predict_sync", &body);
    is_ended();
    assert!(rest(&mut stream).len() < LARGE_BYTES, "it was cut off");
    let mut connection = http2::Connection::open(host.connect());
    connection.post("/predict_sync", &body);
    is_ended();
    assert!(connection.read_body(Duration::ZERO) < LARGE_BYTES, "it was cut off");
}

#[test]
fn a_slow_reader_gets_everything_however_long_that_takes() {
    // Both limits are far shorter than the reading.
    let config = "[server]\nwrite_timeout_ms = 1000\nheader_timeout_ms = 300\nkeep_alive_timeout_ms = 300";
    let host = Setup::new().plugin("puppet").config(config).ready();
    thread::scope(|scope| {
        scope.spawn(|| {
            let bytes = 2 << 20;
            let mut connection = http2::Connection::open(host.connect());
            connection.post("/predict_sync", &json!({"padding_bytes": bytes}).to_string());
            // Frames of 16 KiB: 4 s.
            assert!(connection.read_body(Duration::from_millis(30)) > bytes);
        });
        scope.spawn(|| {
            let mut stream = host.connect();
            post(&mut stream, "/predict_sync", &json!({"padding_bytes": LARGE_BYTES}).to_string());
            let (mut read, mut buffer) = (0, vec![0; 64 << 10]);
            while read < LARGE_BYTES {
                let length = stream.read(&mut buffer).unwrap();
                assert!(length > 0, "it ended after {read} bytes");
                read += length;
                thread::sleep(Duration::from_millis(10));
            }
        });
    });
    wait_until("both are over", || in_flight(&host) == (0.0, 0.0));
}

#[test]
fn an_address_can_not_take_more_than_its_part_of_the_connections() {
    let host = Setup::new().plugin("echo").config("[server]\nconnections_per_address_max = 3").ready();
    let ask = |path: &str| {
        let mut stream = host.connect();
        let _ = write!(stream, "GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
        String::from_utf8(rest(&mut stream)).unwrap()
    };
    let held: Vec<_> = (0..3).map(|_| host.connect()).collect();
    wait_until("it has all that it may", || ask("/health").starts_with("HTTP/1.1 503"));
    let refused = ask("/health");
    assert!(refused.contains("server.connections_per_address_max"), "{refused}");
    assert!(ask("/livez").starts_with("HTTP/1.1 200"), "a monitor with the same address is answered");
    let mut further: Vec<_> = (0..9).map(|_| host.connect()).collect();
    let begun = Instant::now();
    assert!(rest(further.last_mut().unwrap()).is_empty(), "it is closed");
    assert!(begun.elapsed() < AT_ONCE, "at once");
    drop((held, further));
    wait_until("there is room again", || ask("/health").starts_with("HTTP/1.1 200"));
    assert!(host.metric(r#"modalkit_connections_refused_total{reason="address"}"#) >= 1.0);
    assert!(host.metric(r#"modalkit_connections_refused_total{reason="unavailable"}"#) >= 2.0);
    let _ = host.log_line("an address has too many connections open");
}

#[test]
fn probes_are_answered_while_every_connection_is_taken() {
    let config = "[server]\nconnections_max = 4\nconnections_per_address_max = 1000";
    let host = Setup::new().plugin("echo").config(config).ready();
    let mut held: Vec<_> = (0..4).map(|_| host.connect()).collect();
    // A part of a request: it is seen to be there.
    held.iter_mut().for_each(|stream| stream.write_all(b"POST").unwrap());
    let ask = |path: &str, version: &str| {
        let begun = Instant::now();
        let mut stream = host.connect();
        stream
            .write_all(
                format!("GET {path} HTTP/{version}\r\nhost: localhost\r\nconnection: close\r\n\r\n")
                    .as_bytes(),
            )
            .unwrap();
        let answer = String::from_utf8(rest(&mut stream)).unwrap();
        assert!(begun.elapsed() < AT_ONCE, "{:?}", begun.elapsed());
        answer
    };
    wait_until("the listener is full", || ask("/health", "1.1").starts_with("HTTP/1.1 503"));
    for _ in 0..20 {
        assert!(ask("/livez", "1.1").starts_with("HTTP/1.1 200"));
        assert!(ask("/readyz", "1.0").starts_with("HTTP/1.0 200"));
    }
    let full = ask("/models", "1.1");
    assert!(full.contains("retry-after: 1") && full.contains("server.connections_max"), "{full}");
    let _ = host.log_line("the listener is full");
    // Whoever says nothing holds a kept place for a second only.
    let silent: Vec<_> = (0..64).map(|_| host.connect()).collect();
    wait_until("a place is kept again", || {
        let mut stream = host.connect();
        let _ = stream.write_all(b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n");
        rest(&mut stream).starts_with(b"HTTP/1.1 200")
    });
    drop(silent);
    drop(held);
    wait_until("there is room again", || ask("/health", "1.1").starts_with("HTTP/1.1 200"));
    assert!(host.metric(r#"modalkit_connections_refused_total{reason="full"}"#) >= 1.0);
}

#[test]
fn a_validator_that_sleeps_stops_neither_probes_nor_other_models_nor_the_shutdown() {
    let config = "[server]\nio_threads = 2\ndrain_timeout_seconds = 1";
    let mut host = Setup::new().plugin("puppet").plugin("echo").config(config).ready();
    let asleep = json!({"do": "sleep in validate", "ms": 60_000}).to_string();
    let _sleepers: Vec<_> = (0..4)
        .map(|_| {
            let mut stream = host.connect();
            post(&mut stream, "/predict_sync?model_name=puppet", &asleep);
            stream
        })
        .collect();
    let line = host.log_line("the plugin held a thread");
    assert_eq!(line["model"], "puppet");
    let begun = Instant::now();
    for path in ["/livez", "/readyz", "/health"] {
        assert_eq!(host.get(path).0, 200, "{path}");
    }
    for _ in 0..20 {
        assert_eq!(host.post("/predict_sync?model_name=echo", &json!({"text": "a"})).0, 200);
    }
    // It decodes elsewhere by now: a deadline is kept.
    let limit = [("x-request-timeout-ms", "200")];
    let slow = json!({"do": "sleep in validate", "ms": 60_000});
    assert_eq!(host.post_with("/predict_sync?model_name=puppet", &slow, &limit).0, 504);
    assert!(begun.elapsed() < 4 * AT_ONCE, "{:?}", begun.elapsed());
    let begun = Instant::now();
    host.signal("TERM");
    let _ = host.wait();
    assert!(begun.elapsed() < Duration::from_secs(15), "it took {:?} to end", begun.elapsed());
}

#[test]
fn a_shutdown_waits_for_slow_readers_and_not_for_those_that_never_read() {
    let mut host = Setup::new().plugin("puppet").config("[server]\ndrain_timeout_seconds = 60").ready();
    let body = json!({"padding_bytes": LARGE_BYTES}).to_string();
    let mut never = host.connect();
    post(&mut never, "/predict_sync", &body);
    let mut slow = host.connect();
    post(&mut slow, "/predict_sync", &body);
    wait_until("both are being written", || in_flight(&host).1 >= 2.0 * LARGE_BYTES as f64);
    let begun = Instant::now();
    host.signal("TERM");
    // For longer than an answer may wait without progress then.
    let (mut read, mut buffer) = (0, vec![0; 64 << 10]);
    while let Ok(length @ 1..) = slow.read(&mut buffer) {
        read += length;
        thread::sleep(Duration::from_millis(20));
    }
    assert!(read > LARGE_BYTES && begun.elapsed() > Duration::from_secs(7), "{read} bytes");
    assert_eq!(host.wait().code(), Some(0));
    assert!(begun.elapsed() < Duration::from_secs(30), "it took {:?} to end", begun.elapsed());
}
