//! What goes leaves nothing behind: models whose plugin or entry is gone, keys that are gone, batches that nobody fills any more; and
//! what could not be read for a moment is not gone.

use std::{
    fs,
    os::unix::fs::symlink,
    process::{Command, ExitStatus, Output},
    thread,
    time::{Duration, Instant},
};

use modalkit_tests::{
    Host, KEY, OPERATOR, Setup, Version, built, changes::NOTHING_HAPPENS, install, library, put, version,
    wait_until,
};
use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
use serde_json::{Value, json};

/// Far less than what is waited for where something is wrong (60 s), and far more than a busy machine needs.
const SOON: Duration = Duration::from_secs(20);
const PATIENT_BATCH: &str = "[app_settings.batch_config]\nmax_batch_size = 8\nwait_ms = 60000\n";

fn echo(host: &Host, path: &str) -> u16 {
    host.post(path, &json!({"text": "a"})).0
}

fn modalkit(host: &Host, args: &[&str]) -> (ExitStatus, String) {
    let Output { status, stdout, stderr } = Command::new(built().join("modalkit"))
        .args(args)
        .env("MODALKIT_SOCKET", host.socket.as_deref().unwrap())
        .output()
        .unwrap();
    (status, String::from_utf8(stdout).unwrap() + &String::from_utf8(stderr).unwrap())
}

fn lines_with(host: &Host, text: &str) -> usize {
    host.text("/metrics").lines().filter(|line| line.contains(text)).count()
}

#[test]
fn a_bad_file_that_is_removed_leaves_a_ready_host() {
    let setup =
        Setup::new().plugin("echo").config("[model_settings.model_entries.late]\nplugin = \"puppet\"");
    let garbage = setup.volume().join("garbage.so");
    put(b"this is no library, however long one looks at it; and a line more for the header", &garbage);
    let host = setup.start();
    wait_until("it was refused", || host.model("garbage")["state"] == "failed");
    wait_until("the other one serves", || host.model("echo")["state"] == "ready");
    let (status, body) = host.get("/readyz");
    assert_eq!(status, 503, "a configured model is required");
    // What an operator has configured is told from what lies about.
    assert_eq!(body["not_ready"]["garbage"]["configured"], false, "{body}");
    assert_eq!(
        body["not_ready"]["late"],
        json!({"state": "waiting", "expected": "puppet.so", "configured": true, "required": true})
    );
    let (_, body) = host.get("/health");
    assert_eq!(body["models"]["echo"], json!({"state": "ready", "configured": false, "required": false}));
    assert_eq!(host.model("late")["configured"], true);
    assert_eq!(host.report("garbage")["configured"], false);
    install(&library("puppet"), &host.volume().join("puppet.so"));
    wait_until("it serves", || host.model("late")["state"] == "ready");
    let (status, body) = host.get("/readyz");
    assert_eq!(
        (status, &body["not_ready"]["garbage"]["state"]),
        (200, &json!("failed")),
        "it keeps nobody out"
    );
    assert_eq!(host.get("/readyz?model=late").0, 200);
    let (status, body) = host.get("/readyz?model=garbage");
    assert_eq!((status, &body["ready"], &body["state"]), (503, &json!(false), &json!("failed")));
    let (status, body) = host.get("/readyz?model=none");
    assert!(status == 404 && body["detail"].as_str().unwrap().contains("garbage"), "{body}");
    fs::remove_file(garbage).unwrap();
    wait_until("nothing is told of it", || host.get("/readyz") == (200, json!({"ready": true})));
    assert_eq!(host.post("/predict_sync?model_name=garbage", &json!({})).0, 404);
    wait_until("nothing is left of it", || lines_with(&host, "garbage") == 0);
}

#[test]
fn a_model_needs_no_name_again_when_the_bad_file_beside_it_is_gone() {
    let setup = Setup::new().plugin("echo");
    let garbage = setup.volume().join("garbage.so");
    put(b"this is no library, however long one looks at it; and a line more for the header", &garbage);
    let host = setup.start();
    wait_until("it was refused", || host.model("garbage")["state"] == "failed");
    assert_eq!(echo(&host, "/predict_sync"), 404);
    // A configured one whose file was bad waits for another; here there is none.
    fs::remove_file(garbage).unwrap();
    wait_until("the only model is found", || echo(&host, "/predict_sync") == 200);
    assert_eq!(host.get("/readyz").0, 200);
}

#[test]
fn a_configured_model_whose_bad_file_is_removed_waits_for_another() {
    let setup = Setup::new().config("[model_settings.model_entries.mine]\nplugin = \"echo\"");
    let file = setup.volume().join("echo.so");
    put(b"this is no library, however long one looks at it; and a line more for the header", &file);
    let host = setup.start();
    wait_until("it was refused", || host.model("mine")["state"] == "failed");
    fs::remove_file(file).unwrap();
    wait_until("it waits", || host.model("mine")["state"] == "waiting");
    assert_eq!(host.get("/readyz").0, 503);
}

#[test]
fn a_plugin_that_is_removed_unloads_after_the_time_that_is_set() {
    let host = Setup::new().plugin("echo").config("[server]\nremoved_plugin_seconds = 2").start();
    Version::good(1).install(&host.volume());
    wait_until("both serve", || host.get("/readyz").0 == 200 && host.models() == 2);
    // Another name is no removal; nor is it one where the file is back in time.
    fs::rename(host.volume().join("echo.so"), host.volume().join("libecho.so")).unwrap();
    fs::remove_file(version::path(&host.volume())).unwrap();
    assert_eq!(host.log_line("the model is unloaded where it isn't back by then")["model"], "versioned");
    Version::good(1).install(&host.volume());
    wait_until("it is back", || host.report("versioned")["source"]["present"] == true);
    thread::sleep(Duration::from_secs(2) + NOTHING_HAPPENS);
    assert_eq!((host.report("echo")["generations"].clone(), host.models()), (json!(1), 2));
    fs::remove_file(version::path(&host.volume())).unwrap();
    wait_until("it is unloaded", || host.models() == 1);
    assert_eq!(host.log_line("its plugin's file is gone: it is unloaded")["model"], "versioned");
    assert_eq!(echo(&host, "/predict_sync?model_name=versioned"), 404);
    assert_eq!((echo(&host, "/predict_sync"), host.get("/readyz").0), (200, 200));
}

#[test]
fn a_plugin_that_is_removed_serves_on_and_says_until_when() {
    let host = Setup::new().plugin("echo").plugin("puppet").ready();
    fs::remove_file(host.volume().join("echo.so")).unwrap();
    let line = host.log_line("serves on until `modalkit unload echo`, or until the host ends");
    assert_eq!(line["model"], "echo");
    assert_eq!((echo(&host, "/predict_sync?model_name=echo"), host.get("/readyz").0), (200, 200));
    let (status, said) = modalkit(&host, &["unload", "echo"]);
    assert!(status.success() && said == "echo: unloaded\n", "{said}");
    assert_eq!((echo(&host, "/predict_sync?model_name=echo"), lines_with(&host, "\"echo\"")), (404, 0));
    let (status, said) = modalkit(&host, &["unload", "echo"]);
    assert!(
        status.code() == Some(1) && said.contains("\"echo\": no such name; expected one of [\"puppet\"]"),
        "{said}"
    );
    install(&library("echo"), &host.volume().join("echo.so"));
    wait_until("it is dropped in again", || echo(&host, "/predict_sync?model_name=echo") == 200);
}

#[test]
fn people_unload_what_was_dropped_in_and_it_stays_so_until_something_changes() {
    let config = "[model_settings.model_entries.kept]\nplugin = \"puppet\"";
    let setup = Setup::new().plugin("puppet").plugin("echo").config(config);
    Version::good(1).install(&setup.volume());
    let host = setup.ready();
    let (status, body) = host.post("/models/kept/unload", &Value::Null);
    assert_eq!(status, 409);
    assert!(
        body["detail"].as_str().unwrap().contains("take kept out of model_settings.model_entries"),
        "{body}"
    );
    let (status, said) = modalkit(&host, &["unload", "kept"]);
    assert!(status.code() == Some(1) && said.contains("take kept out of"), "{said}");
    assert_eq!(host.post("/models/nobody/unload", &Value::Null).0, 404);
    assert_eq!(host.get("/models/versioned/unload").0, 405);

    let file = version::path(&host.volume());
    let (status, body) = host.post("/models/versioned/unload", &Value::Null);
    assert_eq!((status, body), (200, json!({"model": "versioned", "file": file})));
    assert_eq!(echo(&host, "/predict_sync?model_name=versioned"), 404);
    // The same content again, or another look, is no change.
    Version::good(1).install(&host.volume());
    assert_eq!(host.log_line("the content that somebody unloaded")["plugin"], "versioned");
    assert_eq!(host.post("/volumes/test/reload", &Value::Null).0, 200);
    assert_eq!(host.models(), 2);
    // New content is.
    Version::good(2).install(&host.volume());
    wait_until("it serves", || {
        host.post("/predict_sync?model_name=versioned", &json!({"text": "a"})).1["version"] == 2
    });
    let (status, said) = modalkit(&host, &["unload", "versioned"]);
    assert!(status.success() && said.contains("is taken again when its content changes"), "{said}");
    // So is somebody who asks for it.
    let (status, said) = modalkit(&host, &["reload", "versioned"]);
    assert!(status.success() && said == "versioned: swapped, generation 1 serves\n", "{said}");
    assert_eq!(echo(&host, "/predict_sync?model_name=versioned"), 200);
}

#[test]
fn models_that_have_come_and_gone_leave_no_series() {
    let host = Setup::new().plugin("echo").config("[server]\nremoved_plugin_seconds = 1").ready();
    let names = ["guest-a", "guest-b", "guest-c", "guest-d", "guest-e"];
    let file = |name: &str| host.volume().join(format!("{name}.so"));
    for name in names {
        install(&library("echo"), &file(name));
    }
    for name in names {
        let path = format!("/predict_sync?model_name={name}");
        wait_until("it serves", || echo(&host, &path) == 200);
        assert_eq!(host.post(&path, &json!({"text": 1})).0, 422);
        let job = host.job(name, &json!({"message": {"text": "a"}}));
        assert_eq!(host.ended(&job)["state"], "succeeded");
    }
    assert!(lines_with(&host, "guest-") > 500);
    for name in names {
        fs::remove_file(file(name)).unwrap();
    }
    wait_until("they are gone", || host.models() == 1);
    wait_until("their series are gone", || lines_with(&host, "guest-") == 0);
    assert_eq!(echo(&host, "/predict_sync?model_name=guest-a"), 404);
    assert_eq!(lines_with(&host, "guest-"), 0);
    // One that comes again begins anew.
    install(&library("echo"), &file("guest-a"));
    wait_until("it serves", || echo(&host, "/predict_sync?model_name=guest-a") == 200);
    assert_eq!(host.metric(r#"modalkit_model_ready{model="guest-a"}"#), 1.0);
    let answered = r#"modalkit_requests_total{endpoint="/predict_sync",model="guest-a",status="200"}"#;
    assert_eq!(host.metric(answered), 1.0);
}

#[test]
fn a_model_that_comes_again_while_the_one_before_leaves_has_its_own_series() {
    let host = Setup::new().plugin("puppet").ready();
    let ready = r#"modalkit_model_ready{model="puppet"}"#;
    let batches = r#"modalkit_batch_size_items_count{model="puppet"}"#;
    thread::scope(|scope| {
        let slow = scope.spawn(|| host.post("/predict_sync", &json!({"do": "sleep", "ms": 3000})).0);
        wait_until("it runs", || host.metric(batches) == 1.0);
        let unload = scope.spawn(|| host.post("/models/puppet/unload", &Value::Null).0);
        wait_until("it is on its way out", || host.models() == 0);
        assert_eq!(host.metric(ready), 0.0);
        let (status, entry) = host.post("/models/puppet/reload", &Value::Null);
        assert_eq!((status, &entry["generation"]), (200, &json!(1)), "{entry}");
        assert!(!slow.is_finished(), "the one before still runs");
        assert_eq!((host.metric(ready), host.metric(batches)), (1.0, 0.0));
        assert_eq!((slow.join().unwrap(), unload.join().unwrap()), (200, 200));
    });
    assert_eq!(host.metric(ready), 1.0);
    assert_eq!(host.metric(r#"modalkit_replicas{model="puppet"}"#), 1.0);
    assert_eq!(host.post("/predict_sync", &json!({})).0, 200);
    assert_eq!(host.metric(batches), 1.0);
}

#[test]
fn keys_that_are_gone_leave_no_series() {
    let keys = |names: &[&str]| {
        let operator =
            format!("[app_settings.auth_config.keys.operator]\napi_key = {OPERATOR:?}\nmanagement = true\n");
        let key = |name: &&str| format!("[app_settings.auth_config.keys.{name}]\napi_key = {KEY:?}\n");
        operator + &names.iter().map(key).collect::<String>()
    };
    let mut host = Setup::new().plugin("echo").config(&keys(&["guest"])).ready();
    let lines = |host: &Host| {
        let (_, text) = host.get_with("/metrics", &[("x-api-key", OPERATOR)]);
        text.as_str().unwrap().lines().filter(|line| line.contains("key=\"guest\"")).count()
    };
    let call = |host: &Host| host.post_with("/predict_sync", &json!({"text": "a"}), &[("x-api-key", KEY)]).0;
    assert_eq!((call(&host), lines(&host)), (200, 2));
    host.configure(&keys(&[]));
    host.signal("HUP");
    wait_until("it is no key any more", || call(&host) == 401);
    assert_eq!(lines(&host), 0);
}

#[test]
fn a_shutdown_closes_batches_that_nobody_will_fill() {
    let mut host = Setup::new().plugin("puppet").config(PATIENT_BATCH).ready();
    let begun = Instant::now();
    thread::scope(|scope| {
        let host = &host;
        let waits = scope.spawn(move || host.post("/predict_sync", &json!({"value": 7})));
        wait_until("it waits", || host.metric(r#"modalkit_queued_jobs{model="puppet"}"#) == 1.0);
        host.signal("TERM");
        let (status, body) = waits.join().unwrap();
        assert_eq!((status, &body["value"]), (200, &json!(7)), "{body}");
    });
    assert_eq!(host.wait().code(), Some(0));
    assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
}

#[test]
fn a_model_that_is_unloaded_closes_batches_that_nobody_will_fill() {
    let mut host = Setup::new().plugin("puppet").config(PATIENT_BATCH).ready();
    let waits = |host: &Host, model: &'static str| {
        let url = format!("http://{}/predict_sync?model_name={model}", host.address);
        let caller = thread::spawn(move || {
            ureq::post(url).send(r#"{"value": 7}"#).map(|answer| answer.status().as_u16())
        });
        wait_until("it waits", || host.metric(&format!("modalkit_queued_jobs{{model={model:?}}}")) == 1.0);
        (caller, Instant::now())
    };
    let (caller, begun) = waits(&host, "puppet");
    assert_eq!(host.post("/models/puppet/unload", &Value::Null).0, 200);
    assert_eq!(caller.join().unwrap().unwrap(), 200);
    assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
    // The same for one whose entry goes.
    host.configure(&format!("{PATIENT_BATCH}[model_settings.model_entries.entry]\nplugin = \"puppet\"\n"));
    host.signal("HUP");
    wait_until("it serves", || host.model("entry")["state"] == "ready");
    let (caller, begun) = waits(&host, "entry");
    host.configure(PATIENT_BATCH);
    host.signal("HUP");
    assert_eq!(caller.join().unwrap().unwrap(), 200);
    assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
}

#[test]
fn what_changes_behind_a_link_is_soon_noticed() {
    let config = "[server]\npoll_interval_ms = 200\n[server.volumes.test]\nwatch = \"native\"";
    let setup = Setup::new().config(config);
    let releases = setup.folder().join("releases");
    fs::create_dir(&releases).unwrap();
    Version::good(1).install(&releases);
    symlink(version::path(&releases), version::path(&setup.volume())).unwrap();
    let host = setup.ready();
    let begun = Version::good(2).install(&releases);
    wait_until("it serves", || host.post("/predict_sync", &json!({"text": "a"})).1["version"] == 2);
    assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
}

/// The most file descriptors that a host may have open from now on; what is open stays so.
fn limit_descriptors(host: &Host, most: u64) {
    let pid = Pid::from_raw(i32::try_from(host.id()).unwrap());
    let limit = Rlimit { current: Some(most), ..getrlimit(Resource::Nofile) };
    prlimit(pid, Resource::Nofile, limit).unwrap();
}

#[test]
fn what_could_not_be_read_for_a_moment_is_soon_looked_at_again_and_is_not_gone() {
    let secrets = tempfile::tempdir().unwrap();
    fs::write(secrets.path().join("ci-key"), KEY).unwrap();
    let config = format!(
        "[server]\nsecrets_folder = {:?}\n[server.volumes.test]\nwatch = \"native\"\n[app_settings.auth_config]\nrefresh_seconds = 0.05\n[app_settings.auth_config.keys.ci]\nsecret = \"ci-key\"\nmanagement = true\n",
        secrets.path()
    );
    let setup = Setup::new().config(&config);
    Version::good(1).install(&setup.volume());
    let host = setup.ready();
    let hooks = || host.get_with("/models/versioned", &[("x-api-key", KEY)]).1["hooks"].clone();
    wait_until("the key is known", || hooks() == 0);
    // No file can be opened, as where callers take all descriptors.
    limit_descriptors(&host, 3);
    put(b"new", &host.volume().join("versioned.txt"));
    assert!(
        host.log_line("can't read the volume")["message"].as_str().unwrap().contains("Too many open files")
    );
    assert!(host.log_line("the key ci is as it was fetched before")["message"].is_string());
    limit_descriptors(&host, getrlimit(Resource::Nofile).current.unwrap_or(1024));
    let begun = Instant::now();
    wait_until("the change is told", || hooks() == 1);
    assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
    let log = host.whole_log();
    let gone = log.iter().any(|line| line["message"].as_str().is_some_and(|text| text.contains("gone")));
    assert!(!gone, "{log:#?}");
}
