//! Who may call: keys, their limits and permissions, where their values come from, and that nobody ever sees one.

use std::{
    fs,
    path::Path,
    process::{Child, Command, Stdio},
};

use modalkit_tests::{
    Host, KEY, OPERATOR, SECRET, Setup, assert_no_secret, free_port, python_tool, wait_until,
};
use serde_json::{Value, json};

fn with_keys(more: &str) -> Setup {
    let keys = format!(
        "[app_settings.auth_config.keys.caller]\napi_key = {KEY:?}\n{more}\n[app_settings.auth_config.keys.operator]\napi_key = {OPERATOR:?}\nmanagement = true\n"
    );
    Setup::new().plugin("echo").config(&keys)
}

/// A host with keys; `/readyz` needs none.
fn ready(setup: Setup) -> Host {
    let host = setup.start();
    wait_until("the host is ready", || host.get("/readyz").0 == 200);
    host
}

fn predict(host: &Host, headers: &[(&str, &str)]) -> (u16, Value) {
    host.post_with("/predict_sync", &json!({"text": "a"}), headers)
}

/// Keys that are nearly right, and others: each differs from `key`.
fn near_misses(key: &str) -> Vec<String> {
    let mut all = Vec::new();
    for place in 0..key.len() {
        for byte in [b'a', b'0', b'-', b'Z', b'~', b'!'] {
            let mut other = key.as_bytes().to_vec();
            other[place] = byte;
            all.push(String::from_utf8(other).unwrap());
        }
        all.push(key[..place].to_owned());
        all.push(key[place..].to_owned() + "x");
        all.push(format!("{}{}", &key[..place], key[place..].to_uppercase()));
        let (front, back) = key.split_at(place);
        all.push(format!("{back}{front}"));
        all.push(format!("{front} {back}"));
    }
    for length in 0..200 {
        all.push("k".repeat(length));
        all.push(format!("{key}{}", "0".repeat(length + 1)));
    }
    for other in [
        "(hidden)",
        "null",
        "*",
        "%",
        "Bearer",
        "caller",
        "default",
        "''",
        "\"",
        KEY.trim_start_matches("sk-"),
    ] {
        all.push(other.to_owned());
    }
    let mut number: u64 = 7;
    while all.len() < 1_100 {
        number = number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        all.push(format!("sk-{number:016x}"));
    }
    // A header's value has no blanks at its ends: those would be the key itself.
    all.retain(|other| other.trim() != key && other.trim() != OPERATOR);
    all
}

#[test]
fn a_thousand_wrong_keys_let_nobody_in_and_no_key_is_ever_seen() {
    let host = ready(with_keys("").config("[server]\nlog = \"trace\""));
    assert_eq!(predict(&host, &[("x-api-key", KEY)]).1["translated_text"], "A");
    assert_eq!(predict(&host, &[("authorization", &format!("Bearer {KEY}"))]).0, 200);
    let (status, missing) = predict(&host, &[]);
    assert_eq!(
        (status, &missing["detail"]),
        (401, &json!("expected a key in the header x-api-key, found none"))
    );
    let wrong = near_misses(KEY);
    assert!(wrong.len() >= 1_000);
    for (index, key) in wrong.iter().enumerate() {
        let header = if index % 5 == 0 {
            ("authorization", format!("Bearer {key}"))
        } else {
            ("x-api-key", key.clone())
        };
        let (status, body) = predict(&host, &[(header.0, &header.1)]);
        assert_eq!(status, 401, "{key:?}: {body}");
    }
    for path in ["/metrics", "/models", "/models/echo", "/config", "/jobs/0"] {
        assert_eq!(host.get_with(path, &[]).0, 401, "{path}");
    }
    for path in ["/models/echo/reload", "/models/echo/rollback", "/volumes/test/reload", "/config/reload"] {
        assert_eq!(host.post_with(path, &json!({}), &[("x-api-key", KEY)]).0, 403, "{path}");
    }
    // What operators see has the names of keys, and no key.
    let operator = [("x-api-key", OPERATOR)];
    let mut seen = String::new();
    for path in ["/metrics", "/models", "/models/echo", "/config"] {
        let (status, text) = host.get_with(path, &operator);
        assert_eq!(status, 200, "{path}");
        seen.push_str(&text.to_string());
    }
    assert!(seen.contains(r#"modalkit_key_calls_total{key=\"caller\",outcome=\"ok\"} 2"#), "{seen}");
    assert_no_secret(&seen);
    // To callers it says how its models are and not why, and to others that it is well.
    assert_eq!(
        host.get_with("/health", &[("x-api-key", KEY)]).1["models"]["echo"],
        json!({"state": "ready", "configured": false, "required": false})
    );
    assert_eq!(host.get_with("/health", &[]).1, json!({"status": "ok"}));
}

#[test]
fn a_key_is_held_to_its_limits() {
    let host = ready(with_keys("requests_per_second = 0.02\nburst = 2\n"));
    let key = [("x-api-key", KEY)];
    assert_eq!((predict(&host, &key).0, predict(&host, &key).0), (200, 200));
    let (status, body) = predict(&host, &key);
    assert_eq!(status, 429, "{body}");
    assert!(body["detail"].as_str().unwrap().contains("requests_per_second"), "{body}");
    assert_eq!(predict(&host, &[("x-api-key", OPERATOR)]).0, 200, "another key has limits of its own");

    let host = ready(with_keys("concurrency_max = 1\n").plugin("puppet"));
    let ask = |body: &Value| host.post_with("/predict_sync?model_name=puppet", body, &key).0;
    let inside = || {
        let (_, text) = host.get_with("/metrics", &[("x-api-key", OPERATOR)]);
        text.as_str().unwrap().contains("modalkit_key_calls_total{key=\"caller\",outcome=\"ok\"} 1")
    };
    std::thread::scope(|scope| {
        let slow = scope.spawn(|| ask(&json!({"do": "sleep", "ms": 4000})));
        wait_until("the first is inside", inside);
        assert_eq!(ask(&json!({})), 429);
        assert_eq!(slow.join().unwrap(), 200);
    });
    assert_eq!(ask(&json!({})), 200);
}

#[test]
fn keys_change_with_the_configuration_and_with_their_files() {
    let setup = Setup::new().plugin("echo");
    let secrets = setup.folder().join("secrets");
    fs::create_dir(&secrets).unwrap();
    fs::write(secrets.join("ci-key"), "first\n").unwrap();
    let config = format!(
        "[server]\nsecrets_folder = {:?}\n[app_settings.auth_config]\nrefresh_seconds = 0.05\nauth_header = \"X-Own-Header\"\n[app_settings.auth_config.keys.ci]\nsecret = \"ci-key\"\n",
        secrets.display().to_string()
    );
    let mut host = ready(setup.config(&config));
    let may = |host: &Host, key: &str| predict(host, &[("x-own-header", key)]).0 == 200;
    assert!(may(&host, "first") && !may(&host, "second"));
    fs::write(secrets.join("ci-key"), "second\n").unwrap();
    wait_until("the new key is known", || may(&host, "second"));
    assert!(!may(&host, "first"));
    fs::remove_file(secrets.join("ci-key")).unwrap();
    wait_until("the key is a key no more", || !may(&host, "second"));
    assert_eq!(predict(&host, &[("x-own-header", "second")]).0, 401);
    assert_eq!(host.get("/readyz").0, 200, "who takes a key away means it");
    host.configure(&format!("{config}[app_settings.auth_config.keys.other]\napi_key = \"third\"\n"));
    wait_until("the other key is known", || may(&host, "third"));
    assert!(!may(&host, "second"));
}

#[test]
fn secure_asks_for_the_two_headers_of_the_python_librarys_cloud() {
    let config = "[app_settings.deployment_config]\nsecure = true\n";
    let host = ready(
        Setup::new()
            .plugin("echo")
            .config(config)
            .variable("MODAL_KEY", KEY)
            .variable("MODAL_SECRET", SECRET),
    );
    assert_eq!(predict(&host, &[("modal-key", KEY), ("modal-secret", SECRET)]).0, 200);
    for (key, secret) in [(KEY, &SECRET[1..]), (&KEY[1..], SECRET), (SECRET, KEY), ("", "")] {
        assert_eq!(predict(&host, &[("modal-key", key), ("modal-secret", secret)]).0, 401, "{key} {secret}");
    }
    assert_eq!(predict(&host, &[("modal-key", KEY)]).0, 401);
    // Who asks for it and has no secrets, or empty ones, lets nobody in.
    for value in [None, Some("")] {
        let mut setup = Setup::new().plugin("echo").config(config);
        if let Some(value) = value {
            setup = setup.variable("MODAL_KEY", value).variable("MODAL_SECRET", value);
        }
        let host = setup.start();
        assert_eq!(predict(&host, &[("modal-key", ""), ("modal-secret", "")]).0, 503);
        assert_eq!(host.get("/readyz").0, 503);
    }
}

#[test]
fn a_key_that_is_taken_away_is_no_key_at_once_however_slow_others_are() {
    // It accepts, and never answers.
    let silent = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let slow = format!(
        "[app_settings.auth_config]\nssm_key = \"/slow\"\nssm_endpoint = \"http://{}\"\n",
        silent.local_addr().unwrap()
    );
    let leaked = format!("{slow}[app_settings.auth_config.keys.leaked]\napi_key = {KEY:?}\n");
    let setup = Setup::new().plugin("echo").config(&leaked);
    let mut host =
        setup.variable("AWS_ACCESS_KEY_ID", "id").variable("AWS_SECRET_ACCESS_KEY", "none").start();
    wait_until("the key is good", || predict(&host, &[("x-api-key", KEY)]).0 == 200);
    host.configure(&slow);
    assert_eq!(host.post("/config/reload", &json!({})).0, 200);
    assert_ne!(predict(&host, &[("x-api-key", KEY)]).0, 200);
}

#[test]
fn a_host_that_others_reach_never_stops_asking() {
    let auth = format!("[app_settings.auth_config]\napi_key = {KEY:?}\n");
    let mut host =
        Setup::new().plugin("echo").config(&auth).variable("MODALKIT_SERVER__LISTEN", "0.0.0.0:0").start();
    let address = std::net::SocketAddr::from(([127, 0, 0, 1], host.address.port()));
    host.address = address;
    wait_until("it serves", || predict(&host, &[("x-api-key", KEY)]).0 == 200);
    for without in ["[server]\nlog = \"info\"", ""] {
        host.configure(without);
        host.signal("HUP");
        wait_until("it is refused", || host.get("/config").1["last_change"]["outcome"] == "refused");
        assert_eq!(predict(&host, &[]).0, 401);
        host.configure(&auth);
        wait_until("it is as it was", || host.post("/config/reload", &json!({})).0 == 200);
    }
}

#[test]
fn a_reload_that_would_drop_the_last_key_or_empty_a_file_is_refused() {
    let auth = format!("[app_settings.auth_config]\napi_key = {KEY:?}\n");
    let mut host = Setup::new().plugin("echo").config(&auth).start();
    let file = host.folder().join("modalkit.toml");
    wait_until("it serves", || predict(&host, &[("x-api-key", KEY)]).0 == 200);
    let refused = |host: &Host, expected: &str| {
        let (status, change) = host.post("/config/reload", &json!({}));
        assert_eq!((status, &change["outcome"]), (409, &json!("refused")), "{change}");
        assert!(change.to_string().contains(expected), "{change}");
        assert_eq!(predict(host, &[]).0, 401);
        assert_eq!(predict(host, &[("x-api-key", KEY)]).0, 200);
    };
    host.configure("[server]\nlog = \"info\"\n");
    refused(&host, "this host asks callers who they are");
    refused(&host, "restart the host to let everybody in");
    for empty in ["", "\n\n", "# [app_settings.auth_config]\n"] {
        fs::write(&file, empty).unwrap();
        refused(&host, "a file without any setting");
    }
    fs::remove_file(&file).unwrap();
    refused(&host, "a file that can be read");
    // By itself as well, and said.
    fs::write(&file, "").unwrap();
    assert_eq!(host.log_line("the configuration stays as it was")["level"], "ERROR");
    assert_eq!(predict(&host, &[]).0, 401);
    // Another key is no less of a guard.
    host.configure(&auth.replace(KEY, OPERATOR));
    assert_eq!(host.post("/config/reload", &json!({})).0, 200);
    assert_eq!(predict(&host, &[("x-api-key", OPERATOR)]).0, 200);
    assert_eq!(predict(&host, &[("x-api-key", KEY)]).0, 401);
    // What can't be done to a running host is done by a restart.
    host.configure("[server]\nlog = \"info\"\n");
    host.kill();
    host.start_again();
    wait_until("everybody is let in", || predict(&host, &[]).0 == 200);
}

#[test]
fn a_key_file_that_is_being_written_opens_and_closes_no_door() {
    let setup = Setup::new().plugin("echo");
    let secrets = setup.folder().join("secrets");
    fs::create_dir(&secrets).unwrap();
    let file = secrets.join("ci-key");
    fs::write(&file, "the first key\n").unwrap();
    let config = format!(
        "[server]\nsecrets_folder = {:?}\n[app_settings.auth_config]\nrefresh_seconds = 0.05\n[app_settings.auth_config.keys.ci]\nsecret = \"ci-key\"\n",
        secrets.display().to_string()
    );
    let host = ready(setup.config(&config));
    let status = |key: &str| predict(&host, &[("x-api-key", key)]).0;
    assert_eq!(status("the first key"), 200);
    fs::write(&file, "").unwrap();
    let line = host.log_line("its file is empty");
    assert!(line.to_string().contains("the key ci is as it was fetched before"), "{line}");
    assert_eq!((status("the first key"), status("")), (200, 401));
    // The beginning of the key counts once it has held still for a round.
    fs::write(&file, "the first\n").unwrap();
    assert_eq!(host.log_line("its file holds the beginning of that value")["level"], "ERROR");
    wait_until("it was meant", || status("the first") == 200);
    fs::write(&file, "the first key\n").unwrap();
    wait_until("it is as it was", || status("the first key") == 200);
    fs::remove_file(&file).unwrap();
    fs::create_dir(&file).unwrap();
    assert_eq!(host.log_line("its file can't be read")["level"], "ERROR");
    assert_eq!((status("the first key"), host.get("/readyz").0), (200, 200));
    fs::remove_dir(&file).unwrap();
    wait_until("a file that is gone is a key no more", || status("the first key") == 401);
    fs::write(&file, "").unwrap();
    wait_until("an empty one is none yet", || host.get("/readyz").0 == 503);
    assert_ne!(status(""), 200);
    fs::write(&file, "the second key\n").unwrap();
    wait_until("the second is known", || status("the second key") == 200);
}

#[test]
fn authorization_may_be_the_header_and_a_job_belongs_to_its_key() {
    let other = "another-key-altogether";
    let config = format!(
        "[app_settings.auth_config]\nauth_header = \"Authorization\"\n[app_settings.auth_config.keys.one]\napi_key = {KEY:?}\n[app_settings.auth_config.keys.two]\napi_key = {other:?}\n"
    );
    let host = ready(Setup::new().plugin("echo").config(&config));
    let bearer = |scheme: &str, key: &str| format!("{scheme}{key}");
    assert_eq!(predict(&host, &[("authorization", &bearer("bearer ", KEY))]).0, 200);
    assert_eq!(predict(&host, &[("authorization", KEY)]).0, 401);
    let (one, two) = (bearer("Bearer ", KEY), bearer("Bearer ", other));
    let (_, job) =
        host.post_with("/predict_async", &json!({"message": {"text": "a"}}), &[("authorization", &one)]);
    let path = format!("/jobs/{}", job["job_id"].as_str().unwrap());
    assert_eq!(host.get_with(&path, &[("authorization", &one)]).0, 200);
    assert_eq!(host.get_with(&path, &[("authorization", &two)]).0, 404);
}

#[test]
fn a_pipeline_gets_the_secrets_that_it_names_and_nobody_else_sees_them() {
    let entry = |name: &str, secrets: &str| {
        format!(
            "[model_settings.model_entries.{name}]\nplugin = \"puppet\"\ndeployment_config = {{ secrets = [{secrets}] }}\n"
        )
    };
    let host = ready(
        Setup::new()
            .plugin("puppet")
            .config(&entry("named", "\"hub-token\""))
            .config(&entry("other", ""))
            .config("[server]\nlog = \"trace\"")
            .variable("HUB_TOKEN", SECRET),
    );
    let length = |model: &str| {
        let (status, body) =
            host.post(&format!("/predict_sync?model_name={model}"), &json!({"do": "count secret hub-token"}));
        assert_eq!(status, 200, "{body}");
        body["value"].clone()
    };
    assert_eq!((length("named"), length("other")), (json!(SECRET.len()), json!(-1)));
    assert_no_secret(&(host.text("/config") + &host.text("/models/named")));
}

/// A server, ended by its process id.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// moto with signatures verified; its first four calls, which make a user and put a parameter, are not.
struct Moto {
    _server: Server,
    endpoint: String,
    access: (String, String),
}

impl Moto {
    fn start(folder: &Path) -> Self {
        let port = free_port();
        let server = Command::new(python_tool("moto_server"))
            .args(["-H", "127.0.0.1", "-p", &port.to_string()])
            .env("INITIAL_NO_AUTH_ACTION_COUNT", "4")
            .current_dir(folder)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let endpoint = format!("http://127.0.0.1:{port}");
        let server = Server(server);
        wait_until("moto answers", || ureq::get(format!("{endpoint}/moto-api/data.json")).call().is_ok());
        let iam = |action: &str| {
            let url = format!("{endpoint}/?Version=2010-05-08&{action}");
            let answer = ureq::post(url).header("authorization", signed_by_nobody("iam")).send_empty();
            answer.unwrap().body_mut().read_to_string().unwrap()
        };
        iam("Action=CreateUser&UserName=host");
        let keys = iam("Action=CreateAccessKey&UserName=host");
        let inside =
            |tag: &str| keys.split(&format!("<{tag}>")).nth(1).unwrap().split('<').next().unwrap().to_owned();
        let access = (inside("AccessKeyId"), inside("SecretAccessKey"));
        let policy = "%7B%22Version%22%3A%222012-10-17%22%2C%22Statement%22%3A%5B%7B%22Effect%22%3A%22Allow%22%2C%22Action%22%3A%22ssm%3A%2A%22%2C%22Resource%22%3A%22%2A%22%7D%5D%7D";
        iam(&format!("Action=PutUserPolicy&UserName=host&PolicyName=p&PolicyDocument={policy}"));
        let put = json!({"Name": "/demo/api-key", "Value": KEY, "Type": "SecureString"});
        let answer = ureq::post(&endpoint)
            .header("authorization", signed_by_nobody("ssm"))
            .header("content-type", "application/x-amz-json-1.1")
            .header("x-amz-target", "AmazonSSM.PutParameter")
            .send(put.to_string());
        assert_eq!(answer.unwrap().status().as_u16(), 200);
        Self { _server: server, endpoint, access }
    }

    fn host(&self, secret: &str) -> Setup {
        let config = format!(
            "[app_settings.auth_config]\nssm_key = \"/demo/api-key\"\nssm_endpoint = {:?}\nssm_region = \"eu-west-1\"\nrefresh_seconds = 0.1\n",
            self.endpoint
        );
        Setup::new()
            .plugin("echo")
            .config(&config)
            .variable("AWS_ACCESS_KEY_ID", &self.access.0)
            .variable("AWS_SECRET_ACCESS_KEY", secret)
    }
}

/// Enough for moto to know which service is meant.
fn signed_by_nobody(service: &str) -> String {
    format!(
        "AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/20260101/eu-west-1/{service}/aws4_request, SignedHeaders=host, Signature=0"
    )
}

/// What needs moto, which speaks SSM.
mod with_moto {
    use super::*;

    #[test]
    fn a_key_comes_from_ssm_by_a_signed_request() {
        let folder = tempfile::tempdir().unwrap();
        let moto = Moto::start(folder.path());
        let host = ready(moto.host(&moto.access.1));
        assert_eq!(predict(&host, &[("x-api-key", KEY)]).0, 200);
        assert_eq!(predict(&host, &[("x-api-key", "another")]).0, 401);

        // A wrong secret: moto verifies the signature, so nobody gets in, and the host says why.
        let host = moto.host("wrong").start();
        let line = host.log_line("not all keys are known");
        assert!(line["message"].as_str().unwrap().contains("403"), "{line}");
        assert_eq!(predict(&host, &[("x-api-key", KEY)]).0, 503);
        assert_eq!(host.get("/readyz").0, 503);
    }

    #[test]
    fn a_key_that_was_fetched_once_stays_while_ssm_is_away() {
        let folder = tempfile::tempdir().unwrap();
        let moto = Moto::start(folder.path());
        let host = ready(moto.host(&moto.access.1));
        drop(moto);
        let _ = host.log_line("is as it was fetched before");
        // Over more than one further try to fetch it.
        for _ in 0..300 {
            assert_eq!(predict(&host, &[("x-api-key", KEY)]).0, 200);
        }
        assert_eq!(host.get("/readyz").0, 200);
    }
}
