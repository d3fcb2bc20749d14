//! Who manages a host: its own user over the management socket, and keys that have it; nobody for where they call from. And what is
//! left of who did what.

use std::{
    io::{Read, Write, copy},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    os::unix::{fs::MetadataExt, net::UnixStream},
    path::Path,
    thread,
    time::Duration,
};

use modalkit_tests::{Host, KEY, OPERATOR, PATIENCE, Setup, Version, management::request, wait_until};
use serde_json::{Value, json};

/// What only those who manage may ask, method and path.
const MANAGEMENT: [(&str, &str); 12] = [
    ("GET", "/metrics"),
    ("GET", "/models"),
    ("GET", "/models/echo"),
    ("GET", "/devices"),
    ("GET", "/config"),
    ("POST", "/config/reload"),
    ("POST", "/models/echo/reload"),
    ("POST", "/models/echo/rollback"),
    ("POST", "/volumes/test/reload"),
    ("GET", "/queues"),
    ("GET", "/queues/r"),
    ("DELETE", "/queues/r"),
];

/// A proxy that adds nothing, as a terminator of TLS on this machine does. It lives as long as the test.
fn proxy(host: SocketAddr) -> SocketAddr {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for caller in listener.incoming().map_while(Result::ok) {
            let Ok(host) = TcpStream::connect(host) else { return };
            let (mut from_caller, mut to_host) = (caller.try_clone().unwrap(), host.try_clone().unwrap());
            thread::spawn(move || {
                let _ = copy(&mut from_caller, &mut to_host);
                let _ = to_host.shutdown(Shutdown::Write);
            });
            let (mut from_host, mut to_caller) = (host, caller);
            thread::spawn(move || {
                let _ = copy(&mut from_host, &mut to_caller);
                let _ = to_caller.shutdown(Shutdown::Both);
            });
        }
    });
    address
}

/// The status and the whole answer to a request, head as it stands.
fn raw(address: SocketAddr, head: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(head.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    (answer.split(' ').nth(1).unwrap_or_default().parse().unwrap(), answer)
}

fn with_message_in_a_queue(setup: Setup, headers: &[(&str, &str)]) -> Host {
    let host = setup.plugin("echo").ready();
    let envelope = json!({"message": {"text": "a"}, "success_queue": "r"});
    assert_eq!(host.post_with("/predict_async", &envelope, headers).0, 200);
    wait_until("the result is there", || host.get("/queues/r").1["length"] == 1);
    host
}

#[test]
fn nobody_manages_for_calling_from_this_machine() {
    let auth = format!("[app_settings.auth_config]\napi_key = {KEY:?}\n");
    for (config, headers, expected) in [("", &[][..], 403), (auth.as_str(), &[("x-api-key", KEY)][..], 401)] {
        let host = with_message_in_a_queue(Setup::new().config(config), headers);
        let generation = host.report("echo")["generation"].clone();
        for address in [host.address, proxy(host.address)] {
            for (method, path) in MANAGEMENT {
                // As a client of HTTP/1.1 asks, and as one of HTTP/1.0 that names no host.
                for head in [
                    format!(
                        "{method} {path} HTTP/1.1\r\nhost: {address}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
                    ),
                    format!("{method} {path} HTTP/1.0\r\n\r\n"),
                ] {
                    let (status, answer) = raw(address, &head);
                    assert_eq!(status, expected, "{head} {answer}");
                    assert!(
                        answer.contains("management = true") && answer.contains("modalkit reload"),
                        "{answer}"
                    );
                }
            }
        }
        for (method, path) in MANAGEMENT.iter().filter(|_| !headers.is_empty()) {
            let (status, answer) = match *method {
                "GET" => host.get_with(path, headers),
                "POST" => host.post_with(path, &json!({}), headers),
                _ => host.delete_with(path, headers),
            };
            assert_eq!(status, 403, "{method} {path} with a key that doesn't manage");
            let detail = answer["detail"].as_str().unwrap();
            assert!(detail.contains("management = true") && detail.contains("modalkit reload"), "{detail}");
        }
        assert_eq!(host.get("/queues/r").1["length"], 1, "nothing was taken");
        assert_eq!(host.report("echo")["generation"], generation, "nothing was reloaded");
        assert!(host.get("/config").1["last_change"].is_null(), "no configuration was read");
    }
}

#[test]
fn a_key_that_manages_does_so_from_anywhere() {
    let config =
        format!("[app_settings.auth_config.keys.operator]\napi_key = {OPERATOR:?}\nmanagement = true\n");
    let key = [("x-api-key", OPERATOR)];
    let host = with_message_in_a_queue(Setup::new().config(&config), &key);
    assert_eq!(host.get_with("/config", &key).0, 200);
    assert_eq!(host.post_with("/models/echo/reload", &json!({}), &key).1["outcome"], "swapped");
    assert_eq!(host.delete_with("/queues/r", &key).1["messages"].as_array().unwrap().len(), 1);
}

#[test]
fn the_socket_is_the_users_own_and_stands_until_the_host_has_drained() {
    let mut host = Setup::new().plugin("puppet").ready();
    let socket = host.socket.clone().unwrap();
    assert_eq!(socket, host.folder().join("state/manage.sock"));
    let is_ours = |socket: &Path| {
        let (file, ours) = (socket.symlink_metadata().unwrap(), host.folder().metadata().unwrap());
        (file.mode() & 0o7777, file.uid()) == (0o600, ours.uid())
    };
    assert!(is_ours(&socket));
    let (status, said) = request(&socket, "POST", "/predict_sync", "{}").unwrap();
    assert!(status == 421 && said.contains(&host.address.to_string()), "{status} {said}");
    let (status, said) = request(&socket, "GET", "/nowhere", "").unwrap();
    assert!(status == 404 && said.contains("/models/{name}/reload"), "{status} {said}");
    // A file that a dead host has left is replaced.
    host.kill();
    assert!(socket.exists());
    host.start_again();
    wait_until("it is ready", || host.get("/readyz").0 == 200);
    thread::scope(|scope| {
        let slow = scope.spawn(|| host.post("/predict_sync", &json!({"do": "sleep", "ms": 1500})).0);
        wait_until("a request is inside", || host.metric("modalkit_requests_in_flight") > 0.0);
        host.signal("TERM");
        wait_until("the port is closed", || TcpStream::connect(host.address).is_err());
        let (status, ready) = host.get("/readyz");
        assert!(status == 503 && ready["shutting_down"] == true, "{ready}");
        assert_eq!(slow.join().unwrap(), 200);
    });
    assert_eq!(host.wait().code(), Some(0));
    assert!(!socket.exists(), "it goes with the host");
}

#[test]
fn the_socket_may_lie_elsewhere_or_nowhere() {
    let setup = Setup::new().plugin("echo");
    // Longer than a socket's path may be.
    let folder = setup.folder().join("d".repeat(60)).join("e".repeat(60));
    std::fs::create_dir_all(&folder).unwrap();
    let config = format!("[server]\nmanagement_socket = {:?}\n", folder.join("own.sock"));
    let host = setup.config(&config).ready();
    assert_eq!(host.get("/config").0, 200);
    let (status, said) = Setup::new().config(&config).refuses_to_start();
    assert!(status.code() == Some(1) && said.contains("another host's management socket"), "{said}");
    let (status, said) =
        Setup::new().config("[server]\nmanagement_socket = \"/nowhere/own.sock\"\n").refuses_to_start();
    assert!(status.code() == Some(1) && said.contains("server.management_socket"), "{said}");

    let host = Setup::new().config("[server]\nmanagement_socket = \"\"\n").start();
    assert!(host.socket.is_none() && !host.folder().join("state/manage.sock").exists());
    assert_eq!(host.get("/config").0, 403);
}

/// The lines of the audit log.
fn audit(host: &Host) -> Vec<Value> {
    host.log().into_iter().filter(|line| line["target"] == "modalkit::audit").collect()
}

#[test]
fn who_changes_something_leaves_a_line() {
    let config = format!(
        "[app_settings.auth_config.keys.operator]\napi_key = {OPERATOR:?}\nmanagement = true\n[app_settings.auth_config.keys.caller]\napi_key = {KEY:?}\n"
    );
    let key = [("x-api-key", OPERATOR)];
    let host = with_message_in_a_queue(Setup::new().config(&config), &key);
    assert_eq!(host.get_with("/config", &key).0, 200);
    assert_eq!(host.delete_with("/queues/r", &key).0, 200);
    assert_eq!(host.post("/models/echo/reload", &json!({})).0, 200);
    assert_eq!(host.delete_with("/queues/r", &[("x-api-key", KEY)]).0, 403);
    // A caller who changed nothing leaves none; one who manages does.
    assert_eq!(host.delete_with("/jobs/none", &[("x-api-key", KEY)]).0, 404);
    assert_eq!(host.delete_with("/jobs/none", &key).0, 404);
    assert_eq!(host.get_with("/models", &key).0, 200);
    // The socket looked at the queue until the message was there: results are read with a line.
    let looks = |line: &Value| line["action"] == "GET /queues/{name}";
    let others = || audit(&host).into_iter().filter(|line| !looks(line)).collect::<Vec<_>>();
    wait_until("the last has its line", || others().len() >= 5);
    let _ =
        host.logged("who looked", |line| looks(line) && line["level"] == "INFO" && line["key"] == "socket");
    let lines = others();
    let of = |line: &Value, fields: &[&str]| -> Vec<Value> {
        fields.iter().map(|field| line[*field].clone()).collect()
    };
    let told: Vec<Vec<Value>> =
        lines.iter().map(|line| of(line, &["level", "action", "name", "key", "status"])).collect();
    assert_eq!(
        json!(told),
        json!([
            ["INFO", "GET /config", "", "operator", 200],
            ["INFO", "DELETE /queues/{name}", "r", "operator", 200],
            ["INFO", "POST /models/{name}/reload", "echo", "socket", 200],
            ["WARN", "DELETE /queues/{name}", "r", "caller", 403],
            ["INFO", "DELETE /jobs/{id}", "none", "operator", 404],
        ])
    );
    let address = |line: &Value| line["address"].as_str().unwrap().to_owned();
    assert!(address(&lines[0]).starts_with("127.0.0.1:"), "{lines:?}");
    let uid = host.folder().metadata().unwrap().uid();
    assert_eq!(address(&lines[2]), format!("uid {uid}"));
}

#[test]
fn a_caller_who_leaves_before_the_answer_leaves_a_line_as_well() {
    let setup = Setup::new();
    Version::good(1).install(&setup.volume());
    let host = setup.ready();
    Version::bad(2, "load-hangs").install(&host.volume());
    let asked = b"POST /models/versioned/reload HTTP/1.1\r\nhost: localhost\r\ncontent-length: 0\r\n\r\n";
    let left = |line: &Value| line["message"] == "management, whose caller left";
    wait_until("the line is there", || {
        let mut caller = UnixStream::connect(host.socket.as_ref().unwrap()).unwrap();
        caller.write_all(asked).unwrap();
        // Who leaves before the request has been looked at has asked for nothing.
        thread::sleep(Duration::from_millis(100));
        drop(caller);
        host.log().iter().any(left)
    });
    let line = host.logged("who left", left);
    assert_eq!((&line["action"], &line["name"]), (&json!("POST /models/{name}/reload"), &json!("versioned")));
    assert!(line["status"].is_null(), "{line}");
}

#[test]
fn fifty_wrong_keys_leave_ten_lines_and_a_count() {
    let auth = format!("[app_settings.auth_config]\napi_key = {KEY:?}\n");
    let host = Setup::new().plugin("echo").config(&auth).ready();
    for number in 0..50 {
        let wrong = format!("wrong-key-{number}");
        let headers = [("x-api-key", wrong.as_str())];
        let status = match number % 3 {
            0 => host.post_with("/predict_sync", &json!({}), &headers).0,
            1 => host.get_with("/config", &headers).0,
            _ => host.get_with("/jobs/none", &headers).0,
        };
        assert_eq!(status, 401);
    }
    // Also when nobody calls any more.
    let rest = host.log_line("further requests were refused");
    let lines = audit(&host);
    let told = lines.iter().filter(|line| line["message"] == "request refused").count() as u64;
    assert!(told <= 20 && rest["level"] == "WARN", "{lines:#?}");
    let counted: u64 = lines.iter().filter_map(|line| line["count"].as_u64()).sum();
    // A slow machine may need more than one interval.
    assert_eq!(told + counted, 50, "{lines:#?}");
    assert!(
        !host.whole_log().iter().any(|line| line.to_string().contains("wrong-key")),
        "keys are never told"
    );
}

#[test]
fn names_of_models_are_for_callers_with_a_key_where_there_are_keys() {
    let auth = format!("[app_settings.auth_config]\napi_key = {KEY:?}\n");
    let host = Setup::new().plugin("echo").config(&auth).ready();
    let keys: [&[(&str, &str)]; 2] = [&[], &[("x-api-key", "wrong")]];
    for headers in keys {
        assert_eq!(host.get_with("/health", headers), (200, json!({"status": "ok"})));
        assert_eq!(host.get_with("/readyz", headers), (200, json!({"ready": true})));
    }
    let named = json!({"status": "ok", "models": {"echo": {"state": "ready", "configured": false, "required": false}}});
    assert_eq!(host.get_with("/health", &[("x-api-key", KEY)]), (200, named));
    // One that can't be loaded.
    std::fs::write(host.volume().join("broken.so"), "this is no library").unwrap();
    wait_until("the socket tells why it isn't ready", || {
        host.get("/readyz").1["not_ready"]["broken"]["reason"].is_string()
    });
    for headers in keys {
        assert_eq!(host.get_with("/readyz", headers), (200, json!({"ready": true})));
        assert_eq!(host.get_with("/readyz?model=echo", headers).0, 401);
        assert_eq!(host.get_with("/health", headers).1, json!({"status": "degraded"}));
    }
    let seen = host.get_with("/readyz", &[("x-api-key", KEY)]).1;
    assert!(
        seen["not_ready"]["broken"].is_object() && seen["not_ready"]["broken"]["reason"].is_null(),
        "{seen}"
    );

    // Without keys everybody sees names, and nobody reasons.
    let host = Setup::new().plugin("echo").ready();
    assert_eq!(
        host.get_with("/health", &[]).1["models"]["echo"],
        json!({"state": "ready", "configured": false, "required": false})
    );
}
