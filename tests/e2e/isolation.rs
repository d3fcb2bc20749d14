//! Pipelines in processes of their own: what ends such a process, and who pays for it.

use std::{
    collections::{BTreeMap, HashSet},
    fs,
    path::Path,
    thread,
    time::Duration,
};

use modalkit_tests::{Host, KEY, Setup, Version, signal, wait_until};
use serde_json::{Value, json};

const PROCESS: &str = "[app_settings.deployment_config]\nisolation = \"process\"\n";

/// What ends a worker, or its use, and what its caller is told.
const KILLERS: [(&str, &str); 9] = [
    ("segfault", "SIGSEGV in predict"),
    ("abort", "SIGABRT in predict"),
    ("exit", "exit() in predict"),
    // By its allocator, or by the kernel where a control group holds it.
    ("leak", "its worker process died"),
    ("spin", "batch_timeout_seconds"),
    ("panic in a destructor", "told to panic in a destructor"),
    ("fork and abort", "SIGABRT in predict"),
    ("close descriptors", "its worker process died"),
    ("garbage", "it sent "),
];

fn killer(more: &str) -> Host {
    let batches = "[app_settings.batch_config]\nmax_batch_size = 8\nwait_ms = 20\n";
    Setup::new().plugin("killer").plugin("echo").config(&format!("{batches}{PROCESS}{more}")).ready()
}

fn ask(host: &Host, body: &Value) -> (u16, Value) {
    host.post("/predict_sync?model_name=killer", body)
}

/// Processes that this host has started as workers, their guards and what they have forked.
fn workers(host: u32) -> Vec<u32> {
    let argument = host.to_string();
    let is_worker = |folder: &Path| {
        let line = fs::read(folder.join("cmdline")).unwrap_or_default();
        let words: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
        words.get(1) == Some(&&b"worker"[..]) && words.get(2) == Some(&argument.as_bytes())
    };
    let is_alive = |folder: &Path| {
        let stat = fs::read_to_string(folder.join("stat")).unwrap_or_default();
        stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.starts_with(" Z"))
    };
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let found = entries.filter(|entry| is_worker(&entry.path()) && is_alive(&entry.path()));
    found.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

#[test]
fn an_item_that_ends_its_process_fails_alone_with_the_reason_and_its_neighbours_get_their_answers() {
    let host = killer("batch_timeout_seconds = 1.0\nmemory = 400\n");
    let deaths = || host.metric(r#"modalkit_worker_deaths_total{model="killer"}"#);
    for (what, expected) in KILLERS {
        let before = deaths();
        let items: Vec<Value> =
            (0..8).map(|value| json!({"value": value, "do": if value == 3 { what } else { "" }})).collect();
        let (status, answers) = host.post("/predict_batch?model_name=killer", &json!(items));
        assert_eq!(status, 200, "{what}: {answers}");
        for (value, answer) in answers.as_array().unwrap().iter().enumerate() {
            if value == 3 {
                let error = answer["error"].as_str().unwrap_or_default();
                assert!(error.contains(expected), "{what}: {answer}");
            } else {
                assert_eq!(answer["value"], 2 * value, "{what}: {answer}");
            }
        }
        wait_until("its deaths are counted", || {
            ask(&host, &json!({"value": 4})).1["value"] == 8
                && (what.starts_with("panic") || deaths() > before)
        });
        assert!(deaths() - before <= 2.0, "{what}: {} deaths", deaths() - before);
        assert_eq!(host.post("/predict_sync?model_name=echo", &json!({"text": "a"})).0, 200, "{what}");
    }
    assert!(host.metric(r#"modalkit_item_reruns_total{model="killer",reason="alone"}"#) >= 8.0);
    assert_eq!(host.metric(r#"modalkit_replicas_stuck{model="killer"}"#), 0.0, "nothing is left behind");
    // The forked child went with its worker, and so did every guard.
    wait_until("one worker a model is left", || workers(host.id()).len() == 4);
}

#[test]
fn several_such_items_in_a_row_take_neither_the_model_nor_their_neighbours_along() {
    let host = killer("");
    let killers = [0, 1, 2, 5];
    let item = |value| json!({"value": value, "do": if killers.contains(&value) { "segfault" } else { "" }});
    let items: Vec<Value> = (0..8).map(item).collect();
    let (status, answers) = host.post("/predict_batch?model_name=killer", &json!(items));
    assert_eq!(status, 200, "{answers}");
    for (value, answer) in answers.as_array().unwrap().iter().enumerate() {
        let is_error = answer["error"].as_str().is_some_and(|error| error.contains("SIGSEGV"));
        assert_eq!(is_error, killers.contains(&value), "{answers}");
        assert!(is_error || answer["value"] == 2 * value, "{answers}");
    }
    // Where they end their process when they are looked at, before they are taken.
    let item =
        |value: i64| json!({"value": value, "do": if value == 1 { "segfault in validate" } else { "" }});
    let before = host.metric(r#"modalkit_worker_deaths_total{model="killer"}"#);
    let (status, answers) =
        host.post("/predict_batch?model_name=killer", &json!([item(0), item(1), item(2)]));
    assert_eq!(status, 200, "{answers}");
    assert!(answers[1]["error"].to_string().contains("SIGSEGV in decode"), "{answers}");
    assert_eq!((&answers[0]["value"], &answers[2]["value"]), (&json!(0), &json!(4)), "{answers}");
    assert!(host.metric(r#"modalkit_worker_deaths_total{model="killer"}"#) - before <= 2.0);
    assert_eq!(host.model("killer")["state"], "ready");
}

#[test]
fn an_item_that_overruns_its_time_alone_gets_the_504() {
    let host = killer("batch_timeout_seconds = 0.5\n");
    let (status, body) = ask(&host, &json!({"do": "spin"}));
    assert_eq!(status, 504, "{body}");
    assert!(body["detail"].as_str().unwrap().contains("batch_timeout_seconds"), "{body}");
    assert_eq!(ask(&host, &json!({"value": 1})).1["value"], 2);
    assert_eq!(host.metric(r#"modalkit_replicas_stuck{model="killer"}"#), 0.0);
    assert_eq!(host.metric(r#"modalkit_batches_failed_total{model="killer",reason="timeout"}"#), 1.0);
}

#[test]
fn lanes_of_one_process_find_the_culprit_among_their_batches() {
    let host = killer("batches_in_flight = 3\n");
    thread::scope(|scope| {
        let ask = |value: i64| {
            let host = &host;
            let body =
                json!({"value": value, "do": if value == 7 { "segfault" } else { "sleep" }, "ms": 200});
            scope.spawn(move || ask(host, &body))
        };
        let callers: Vec<_> = (0..20).map(ask).collect();
        for (value, caller) in callers.into_iter().enumerate() {
            let (status, body) = caller.join().unwrap();
            if value == 7 {
                assert_eq!(status, 500, "{body}");
                assert!(body["detail"].as_str().unwrap().contains("SIGSEGV in predict"), "{body}");
            } else {
                assert_eq!((status, &body["value"]), (200, &json!(2 * value)), "{body}");
            }
        }
    });
    assert!(host.metric(r#"modalkit_worker_deaths_total{model="killer"}"#) <= 2.0);
}

#[test]
fn a_worker_ends_with_its_host_and_so_does_what_it_has_forked() {
    let mut host = killer("");
    let (status, body) = ask(&host, &json!({"do": "fork"}));
    assert_eq!((status, &body["said"]), (200, &json!("done")), "{body}");
    let id = host.id();
    assert_eq!(workers(id).len(), 5, "two guards, two workers, and a forked child");
    host.kill();
    thread::sleep(Duration::from_secs(1));
    assert_eq!(workers(id), [0; 0], "a second later");
}

#[test]
fn a_guard_that_is_killed_takes_its_worker_along_and_another_one_serves() {
    let host = killer("");
    let process = |host: &Host| ask(host, &json!({})).1["process"].as_u64().unwrap() as u32;
    let worker = process(&host);
    let stat = fs::read_to_string(format!("/proc/{worker}/stat")).unwrap();
    let guard = stat.rsplit_once(')').unwrap().1.split_whitespace().nth(1).unwrap().parse().unwrap();
    signal(guard, "KILL");
    wait_until("another one serves", || process(&host) != worker);
    assert!(!workers(host.id()).contains(&worker));
}

#[test]
fn a_load_that_ends_its_process_says_how_and_what_served_serves_on() {
    let setup = Setup::new().plugin("echo").config(PROCESS);
    Version::good(1).install(&setup.volume());
    let host = setup.ready();
    let version = |host: &Host| host.post("/predict_sync?model_name=versioned", &json!({"text": "a"})).1;
    for (number, behaviour, expected) in
        [(2, "load-fault", "SIGSEGV in load"), (3, "load-exit", "exit() in load")]
    {
        Version::bad(number, behaviour).install(&host.volume());
        wait_until("it was refused", || {
            host.report("versioned")["last"]["reason"].to_string().contains(expected)
        });
        assert_eq!(version(&host)["version"], 1);
    }
    Version::good(4).install(&host.volume());
    wait_until("a fit one serves", || version(&host)["version"] == 4);
    assert_eq!(host.metric("modalkit_plugin_libraries"), 0.0, "none of them was opened in the host");
    wait_until("those before are gone", || workers(host.id()).len() == 4);
}

#[test]
fn a_pipeline_that_says_it_cannot_load_is_asked_again_when_its_data_have_changed_and_not_before() {
    let models = "[model_settings.model_entries.killer]\nload = \"data\"\n";
    let config = format!("{PROCESS}{models}");
    let host = Setup::new().plugin("killer").config(&config).start();
    wait_until("it has failed, and says why", || {
        let model = host.model("killer");
        model["state"] == "failed" && model["reason"].to_string().contains("No such file")
    });
    // Longer than the pause after which another kind of failure is tried again.
    thread::sleep(Duration::from_secs(3));
    let said = host
        .log()
        .into_iter()
        .filter(|line| line["message"].to_string().contains("the pipeline didn't load"));
    assert_eq!(said.count(), 1);
    fs::write(host.volume().join("data"), "x").unwrap();
    wait_until("it serves", || ask(&host, &json!({"value": 2})).0 == 200);
}

#[test]
fn a_model_whose_processes_keep_dying_is_failed_visibly_and_comes_back() {
    let host = killer("");
    wait_until("it is failed", || {
        let (status, _) = ask(&host, &json!({"do": "abort"}));
        assert!(status == 500 || status == 503, "{status}");
        host.model("killer")["state"] == "failed"
    });
    let model = host.model("killer");
    assert!(model["reason"].as_str().unwrap().contains("SIGABRT in predict"), "{model}");
    wait_until("it comes back", || ask(&host, &json!({"value": 1})).0 == 200);
}

#[test]
fn a_worker_gets_what_is_its_own_and_nothing_else() {
    let config = format!("{PROCESS}secrets = [\"hub-token\"]\ncpu = 1.0\n");
    let host = Setup::new()
        .plugin("killer")
        .plugin("puppet")
        .config(&config)
        .variable("HUB_TOKEN", modalkit_tests::SECRET)
        .variable("SOME_KEY", KEY)
        .variable("LANG", "C.UTF-8")
        .ready();
    let said = |what: &str| ask(&host, &json!({"do": what})).1["said"].as_str().unwrap().to_owned();
    let variables = said("variables");
    let variables: HashSet<&str> = variables.split(',').collect();
    assert!(variables.contains("LANG") && variables.contains("CUDA_VISIBLE_DEVICES"), "{variables:?}");
    assert!(!variables.contains("HUB_TOKEN") && !variables.contains("SOME_KEY"), "{variables:?}");
    assert!(!variables.iter().any(|name| name.starts_with("MODALKIT")), "{variables:?}");
    // The secret came over the connection.
    let (_, body) = host.post("/predict_sync?model_name=puppet", &json!({"do": "count secret hub-token"}));
    assert_eq!(body["value"], modalkit_tests::SECRET.len());
    let descriptors = said("descriptors");
    let mut kinds: BTreeMap<&str, usize> = BTreeMap::new();
    for descriptor in descriptors.split(',') {
        let kind = descriptor.split_once(":[").map_or(descriptor, |(kind, _)| kind);
        *kinds.entry(kind).or_default() += 1;
    }
    kinds.retain(|kind, _| !kind.starts_with("/memfd:modalkit") && !kind.starts_with("/proc/"));
    let expected = BTreeMap::from([("/dev/null", 1), ("pipe", 2), ("socket", kinds["socket"])]);
    assert_eq!(kinds, expected, "{descriptors}");
    assert_eq!(said("cores"), "1");
}

#[test]
fn a_sandbox_refuses_what_is_not_its_own_and_says_so_in_the_log() {
    let host = killer("sandbox = true\n");
    if host.log().iter().any(|line| line["message"].to_string().contains("the sandbox doesn't hold")) {
        // A kernel without Landlock or seccomp: that it says so is all that can be had.
        return;
    }
    let inside = host.volume().join("data.txt");
    fs::write(&inside, "x").unwrap();
    let outside = host.folder().join("outside.txt");
    fs::write(&outside, "x").unwrap();
    let attempt = |what: &str, path: &Path| {
        let (status, body) = ask(&host, &json!({"do": what, "path": path.display().to_string()}));
        assert_eq!(status, 200, "{body}");
        body["said"].as_str().unwrap().to_owned()
    };
    assert_eq!(attempt("read", &inside), "done");
    for (what, path, line) in [
        ("read", outside.as_path(), format!("does not let it read {}", outside.display())),
        ("write", &inside, format!("does not let it write {}", inside.display())),
        ("listen", Path::new(""), "refuses the system call socket".into()),
        ("fork", Path::new(""), "refuses the system call clone".into()),
        ("exec", Path::new("/bin/true"), "refuses the system call".into()),
    ] {
        let said = attempt(what, path);
        assert!(said.contains("denied") || said.contains("not permitted"), "{what}: {said}");
        let logged = host.log_line(&line);
        assert_eq!(logged["model"], "killer", "{logged}");
    }
    assert_eq!(fs::read_to_string(&inside).unwrap(), "x");
    assert_eq!(ask(&host, &json!({"value": 1})).1["value"], 2, "it serves on");
}

#[test]
fn a_process_is_replaced_after_so_many_batches_and_no_request_notices() {
    let host = killer("recycle_after_batches = 5\n");
    let mut processes = HashSet::new();
    wait_until("there were three processes", || {
        let (status, body) = ask(&host, &json!({"value": 1}));
        assert_eq!(status, 200, "{body}");
        processes.insert(body["process"].as_u64().unwrap());
        processes.len() >= 3
    });
    assert!(host.metric(r#"modalkit_workers_recycled_total{model="killer"}"#) >= 2.0);
    assert_eq!(host.metric(r#"modalkit_worker_deaths_total{model="killer"}"#), 0.0);
}

#[test]
fn an_invalid_input_is_refused_before_its_list_or_job_is_taken() {
    let host = Setup::new().plugin("puppet").config(PROCESS).ready();
    let (status, body) = host.post("/predict_batch", &json!([{"value": 1}, {"ms": 60_001}]));
    assert_eq!((status, &body["detail"][0]["loc"]), (422, &json!(["body", 1, "ms"])), "{body}");
    let (status, body) = host.post("/predict_async", &json!({"message": {"value": "x"}}));
    assert_eq!((status, &body["detail"][0]["loc"]), (422, &json!(["body", "message", "value"])), "{body}");
    assert_eq!(host.metric(r#"modalkit_batch_size_items_count{model="puppet"}"#), 0.0, "nothing ran");
    let (status, body) = host.post("/predict_sync", &json!({"ms": 60_001}));
    assert_eq!((status, &body["detail"][0]["loc"]), (422, &json!(["body", "ms"])), "{body}");
}

#[test]
fn a_job_that_ends_its_process_fails_with_the_reason_and_those_beside_it_succeed_at_their_first_attempt() {
    let host = killer("");
    let job = |value: i64| {
        let what = if value % 10 == 3 { "segfault" } else { "" };
        host.job("killer", &json!({"message": {"value": value, "do": what}}))
    };
    let jobs: Vec<String> = (0..30).map(job).collect();
    for (value, job) in jobs.iter().enumerate() {
        let ended = host.ended(job);
        if value % 10 == 3 {
            assert_eq!(ended["state"], "failed", "{ended}");
            assert!(ended["error"].to_string().contains("SIGSEGV in predict"), "{ended}");
        } else {
            assert_eq!(
                (&ended["state"], &ended["result"]["value"]),
                (&json!("succeeded"), &json!(2 * value))
            );
            assert_eq!(ended["attempts"], 1, "{ended}");
        }
    }
    assert!(host.metric(r#"modalkit_worker_deaths_total{model="killer"}"#) <= 6.0);
}
