//! What clients of all kinds meet: refusals that they get to read whatever they are still sending, HEAD, connections that idle,
//! parameters that are nearly right, lists where objects belong.

use std::{
    io::{Read, Write},
    net::TcpStream,
    thread,
    time::{Duration, Instant},
};

use modalkit_tests::{Host, KEY, Setup, python_tool, wait_until};
use serde_json::{Value, json};

/// More than all buffers between a client and the host hold.
const LARGE_BYTES: usize = 24 << 20;
/// Each refusal is read this many times out of as many.
const TRIES: usize = 10;
/// Longer than an answer takes on a machine that does much else.
const PATIENCE: Duration = Duration::from_secs(30);

/// Sends a head, then all of a body, and only then reads: as `http.client` does.
fn sends_all_first(host: &Host, head: &str) -> String {
    let mut stream = host.connect();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(head.as_bytes()).unwrap();
    let part = vec![b' '; 1 << 20];
    for _ in 0..LARGE_BYTES / part.len() {
        stream.write_all(&part).unwrap_or_else(|error| panic!("{error} while the body is sent: {head}"));
    }
    let mut answer = Vec::new();
    stream
        .read_to_end(&mut answer)
        .unwrap_or_else(|error| panic!("{error} while the answer is read: {head}"));
    String::from_utf8(answer).unwrap()
}

fn large(method: &str, path: &str, header: &str) -> String {
    format!("{method} {path} HTTP/1.1\r\nhost: localhost\r\n{header}content-length: {LARGE_BYTES}\r\n\r\n")
}

const REFUSALS: [(&str, &str, &str, u16); 7] = [
    ("POST", "/nowhere", "", 404),
    ("POST", "/predict_sync?model_name=none", "", 404),
    ("POST", "/livez", "", 405),
    ("PUT", "/predict_sync", "", 405),
    ("POST", "/predict_sync", "x-request-timeout-ms: soon\r\n", 422),
    ("POST", "/predict_sync", "", 413),
    ("POST", "/predict_sync", "bad header\r\n", 400),
];

#[test]
fn a_refusal_is_read_by_who_sends_a_large_body_to_its_end_first() {
    let host = Setup::new().plugin("echo").ready();
    for (method, path, header, status) in REFUSALS {
        for _ in 0..TRIES {
            let answer = sends_all_first(&host, &large(method, path, header));
            assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{method} {path}: {answer}");
            let head = answer.to_ascii_lowercase();
            assert!(head.contains("connection: close"), "{method} {path}: {answer}");
        }
    }
    // Chunked, the length is known at the limit only.
    let mut stream = host.connect();
    stream
        .write_all(b"POST /predict_sync HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n")
        .unwrap();
    for _ in 0..LARGE_BYTES >> 20 {
        stream.write_all(b"100000\r\n").unwrap();
        stream.write_all(&vec![b' '; 1 << 20]).unwrap();
        stream.write_all(b"\r\n").unwrap();
    }
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");

    let key = format!("[app_settings.auth_config]\napi_key = {KEY:?}");
    let host = Setup::new().plugin("echo").config(&key).start();
    for path in ["/predict_sync", "/predict_batch", "/predict_async", "/jobs", "/metrics"] {
        let answer = sends_all_first(
            &host,
            &large(if path.starts_with("/predict") { "POST" } else { "GET" }, path, ""),
        );
        let refused = answer.starts_with("HTTP/1.1 401") || answer.starts_with("HTTP/1.1 403");
        assert!(refused, "{path}: {answer}");
    }
    wait_until("no connection is left", || host.metric("modalkit_connections") <= 1.0);
}

#[test]
fn pythons_own_clients_read_refusals_of_large_bodies() {
    let host = Setup::new().plugin("echo").ready();
    let script = r#"
import http.client, sys, urllib.error, urllib.request
host, size, tries = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
for path, status in (("/nowhere", 404), ("/livez", 405), ("/predict_sync?model_name=none", 404), ("/predict_sync", 413)):
    for _ in range(tries):
        connection = http.client.HTTPConnection(host, timeout=60)
        connection.request("POST", path, body=b" " * size)
        answer = connection.getresponse()
        assert answer.status == status and b"detail" in answer.read(), (path, answer.status)
        connection.close()
        try:
            urllib.request.urlopen(urllib.request.Request(f"http://{host}{path}", data=b" " * size), timeout=60)
            raise AssertionError("it is refused")
        except urllib.error.HTTPError as error:
            assert error.code == status and b"detail" in error.read(), (path, error.code)
"#;
    let output = std::process::Command::new(python_tool("python3"))
        .args(["-c", script, &host.address.to_string(), &LARGE_BYTES.to_string(), &TRIES.to_string()])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// The first line of what comes.
fn first_line(stream: &mut TcpStream) -> String {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut answer = Vec::new();
    let mut byte = [0];
    while !answer.ends_with(b"\r\n") && stream.read(&mut byte).unwrap() == 1 {
        answer.push(byte[0]);
    }
    String::from_utf8(answer).unwrap()
}

#[test]
fn who_asks_before_sending_is_told_at_once_that_it_is_too_much() {
    let host = Setup::new().plugin("echo").ready();
    let ask = |path: &str, length: usize| {
        let mut stream = host.connect();
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: localhost\r\nexpect: 100-continue\r\ncontent-length: {length}\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).unwrap();
        let line = first_line(&mut stream);
        (stream, line)
    };
    assert_eq!(ask("/predict_sync", LARGE_BYTES).1, "HTTP/1.1 413 Payload Too Large\r\n");
    assert_eq!(ask("/nowhere", 12).1, "HTTP/1.1 404 Not Found\r\n");
    let body = br#"{"text": "a"}"#;
    let (mut stream, line) = ask("/predict_sync", body.len());
    assert_eq!(line, "HTTP/1.1 100 Continue\r\n");
    assert_eq!(first_line(&mut stream), "\r\n");
    stream.write_all(body).unwrap();
    assert_eq!(first_line(&mut stream), "HTTP/1.1 200 OK\r\n");
}

/// Status, headers in lower case, and body.
fn ask(host: &Host, method: &str, path: &str) -> (u16, String, String) {
    let mut stream = host.connect();
    write!(stream, "{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head[9..12].parse().unwrap(), head.to_ascii_lowercase(), body.to_owned())
}

fn length(head: &str) -> usize {
    head.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap().parse().unwrap()
}

#[test]
fn head_is_answered_wherever_get_is_with_the_same_headers_and_no_body() {
    let host = Setup::new().plugin("echo").ready();
    for path in
        ["/livez", "/readyz", "/health", "/jobs", "/jobs/none", "/metrics", "/models/echo", "/nowhere"]
    {
        let (status, _, body) = ask(&host, "GET", path);
        let (head_status, head, no_body) = ask(&host, "HEAD", path);
        assert_eq!((head_status, length(&head), no_body.as_str()), (status, body.len(), ""), "{path}");
    }
    let (status, head, _) = ask(&host, "HEAD", "/predict_sync");
    assert!(status == 405 && head.contains("allow: post, options"), "{head}");
    let (status, head, body) = ask(&host, "PUT", "/livez");
    assert!(status == 405 && head.contains("allow: get, head, options"), "{head}");
    assert!(body.contains("GET or HEAD"), "{body}");
    // A connection goes on after it.
    let mut stream = host.connect();
    stream.write_all(b"HEAD /health HTTP/1.1\r\nhost: localhost\r\n\r\nGET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").unwrap();
    let mut answers = String::new();
    stream.read_to_string(&mut answers).unwrap();
    assert_eq!(
        (answers.matches("HTTP/1.1 200").count(), answers.matches("\"status\"").count()),
        (2, 1),
        "{answers}"
    );
}

#[test]
fn names_in_addresses_are_decoded_and_a_parameter_that_is_nearly_right_is_named() {
    let host = Setup::new().plugin("echo").ready();
    let predict = |query: &str| host.post(&format!("/predict_sync?{query}"), &json!({"text": "a"}));
    assert_eq!(predict("model%5Fname=echo").0, 200);
    assert_eq!(predict("trace=1&v=2&model_name=ec%68o").0, 200);
    assert_eq!(predict("model%5Fname=none").0, 404);
    for query in ["model=none", "modelname=none", "Model_Name=echo", "model%5fnam=none"] {
        let (status, answer) = predict(query);
        assert_eq!(status, 422, "{query}: {answer}");
        assert!(answer["detail"][0]["msg"].as_str().unwrap().contains("expected model_name"), "{answer}");
        assert_eq!(answer["detail"][0]["loc"][0], "query", "{answer}");
    }
    let (status, answer) = host.get("/jobs?sate=failed");
    assert!(
        status == 422 && answer["detail"][0]["msg"].as_str().unwrap().contains("expected state"),
        "{answer}"
    );
    assert_eq!(host.get("/jobs?state=failed&_=1").0, 200);
    // A blank in a path is `%20`; a `+` is a `+`.
    let (status, answer) = host.post("/models/a+b%2Bc%20d/unload", &json!({}));
    assert_eq!(status, 404, "{answer}");
    let _ = host.logged("the name as it was meant", |line| line["name"] == "a+b+c d");
}

#[test]
fn a_connection_may_idle_for_longer_than_headers_may_take() {
    let config = "[server]\nheader_timeout_ms = 400\nkeep_alive_timeout_ms = 60000";
    let host = Setup::new().plugin("echo").config(config).ready();
    let request = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n";
    let mut stream = host.connect();
    let mut answer = vec![0; 4096];
    for _ in 0..3 {
        stream.write_all(request).unwrap();
        let length = stream.read(&mut answer).unwrap();
        assert!(answer[..length].starts_with(b"HTTP/1.1 200"));
        thread::sleep(Duration::from_millis(1000));
    }
    // Once they have begun, they have their own time, byte by byte or not.
    let begun = Instant::now();
    for byte in request[..20].iter().cycle() {
        if stream.write_all(&[*byte]).is_err() || begun.elapsed() > PATIENCE {
            break;
        }
        thread::sleep(Duration::from_millis(50));
    }
    assert!(begun.elapsed() < PATIENCE, "it was let go on for {:?}", begun.elapsed());

    let host = Setup::new().config("[server]\nkeep_alive_timeout_ms = 300").start();
    let mut stream = host.connect();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(request).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    assert!(answer.starts_with(b"HTTP/1.1 200"), "and then it ends");
}

#[test]
fn a_list_is_no_object_wherever_one_belongs() {
    let host = Setup::new().plugin("echo").ready();
    for (path, body, place) in [
        ("/predict_sync", json!(["a"]), json!(["body"])),
        ("/predict_batch", json!([{"text": "a"}, ["a"]]), json!(["body", 1])),
        ("/predict_async", json!([{"text": "a"}, "", ""]), json!(["body"])),
        ("/predict_async", json!({"message": ["a"]}), json!(["body", "message"])),
        ("/predict_async", json!({"message": {"text": "a"}, "meta": [1]}), json!(["body", "meta"])),
    ] {
        let (status, answer): (u16, Value) = host.post(path, &body);
        assert_eq!((status, &answer["detail"][0]["loc"]), (422, &place), "{path} {body}: {answer}");
        assert_eq!(answer["detail"][0]["type"], "dict_type", "{answer}");
    }
}

/// A request with these headers, in lines: status, headers in small letters, body.
fn ask_with(host: &Host, request: &str, headers: &str, body: &str) -> (u16, String, String) {
    let mut stream = host.connect();
    let length = body.len();
    write!(stream, "{request} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n{headers}content-length: {length}\r\n\r\n{body}").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head[9..12].parse().unwrap(), head.to_ascii_lowercase(), body.to_owned())
}

#[test]
fn options_says_what_a_path_takes_and_asks_nothing_of_it() {
    let host = Setup::new().plugin("echo").ready();
    for (path, methods) in [
        ("/predict_sync", "post, options"),
        ("/models/echo/predict", "post, options"),
        ("/health", "get, head, options"),
        ("/jobs/any", "get, head, delete, options"),
        ("/v2/models/echo/infer", "post, options"),
        ("/v2/logging", "get, head, post, options"),
    ] {
        let (status, head, body) = ask_with(&host, &format!("OPTIONS {path}"), "", "");
        assert_eq!((status, body.as_str()), (204, ""), "{path}: {head}");
        assert!(head.contains(&format!("allow: {methods}\r\n")), "{path}: {head}");
        assert!(!head.contains("access-control") && !head.contains("content-type"), "{path}: {head}");
    }
    assert_eq!(ask_with(&host, "OPTIONS /nowhere", "", "").0, 404);
}

#[test]
fn pages_of_the_origins_that_are_configured_may_call_and_no_others() {
    let config = "[server]\ncors_origins = [\"https://app.example\"]\n";
    let host = Setup::new().plugin("echo").config(config).ready();
    let (theirs, others) = ("origin: https://app.example\r\n", "origin: https://evil.example\r\n");
    let preflight = |origin: &str| {
        let asked = "access-control-request-method: POST\r\naccess-control-request-headers: content-type,x-request-id\r\n";
        ask_with(
            &host,
            "OPTIONS /predict_sync",
            &format!("{origin}sec-fetch-site: cross-site\r\n{asked}"),
            "",
        )
    };
    let (status, head, _) = preflight(theirs);
    assert_eq!(status, 204, "{head}");
    for expected in [
        "access-control-allow-origin: https://app.example",
        "access-control-allow-methods: post, options",
        "access-control-allow-headers: content-type,x-request-id",
        "access-control-max-age: 600",
        "vary: origin",
    ] {
        assert!(head.contains(&format!("{expected}\r\n")), "{expected}: {head}");
    }
    let call = |origin: &str| {
        let headers = format!("{origin}sec-fetch-site: cross-site\r\ncontent-type: application/json\r\n");
        ask_with(&host, "POST /predict_sync", &headers, "{\"text\":\"a\"}")
    };
    let (status, head, body) = call(theirs);
    assert!(status == 200 && body.contains("translated_text"), "{head} {body}");
    assert!(head.contains("access-control-allow-origin: https://app.example\r\n"), "{head}");
    assert!(
        head.contains("access-control-expose-headers: inference-header-content-length, retry-after"),
        "{head}"
    );
    // Errors are read by pages too.
    let (status, head, _) = ask_with(&host, "GET /nowhere", theirs, "");
    assert!(status == 404 && head.contains("access-control-allow-origin"), "{head}");
    for (status, head, _) in [preflight(others), call(others)] {
        assert_eq!(status, 403, "{head}");
        assert!(!head.contains("access-control") && head.contains("vary: origin"), "{head}");
    }
    // A name that leads to this host from elsewhere is still none of its own.
    let mut stream = host.connect();
    write!(stream, "GET /health HTTP/1.1\r\nhost: rebound.example\r\n{theirs}connection: close\r\n\r\n")
        .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 403"), "{answer}");
}

#[test]
fn a_models_name_may_stand_in_the_path() {
    let host = Setup::new().plugin("echo").plugin("tensors").ready();
    let by_query = host.post("/predict_sync?model_name=echo", &json!({"text": "a"}));
    assert_eq!(host.post_with("/models/echo/predict", &json!({"text": "a"}), &[]), by_query);
    assert_eq!(host.post_with("/models/nobody/predict", &json!({"text": "a"}), &[]).0, 404);
    assert_eq!(host.get_with("/models/echo/predict", &[]).0, 405);
}
