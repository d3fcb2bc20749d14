//! Changes of plugins and of their data while the host serves: taken once, whole, and without a failed request; or refused, and
//! then nothing changes.

use std::{
    fs, thread,
    time::{Duration, Instant},
};

use modalkit_tests::{
    Host, Setup, Version,
    changes::{NOTHING_HAPPENS, each_change_is_taken_once, ended},
    install, library,
    load::{ECHO, Load, VERSIONED},
    put, version, wait_until,
};
use serde_json::{Value, json};

fn setup() -> Setup {
    let setup = Setup::new();
    Version::good(1).install(&setup.volume());
    setup
}

fn ask(host: &Host) -> Value {
    let (status, answer) = host.post("/predict_sync?model_name=versioned", &json!({"text": "a"}));
    assert_eq!(status, 200, "{answer}");
    answer
}

fn wait_for_version(host: &Host, number: u64) {
    wait_until(&format!("version {number} serves"), || ask(host)["version"] == number);
}

#[test]
fn new_content_serves_without_a_failed_request_and_the_old_one_leaves() {
    let host = setup().config("[app_settings.deployment_config]\nprobation_seconds = 0").ready();
    let load = Load::start(host.address, 8, VERSIONED);
    for number in 2..=12 {
        Version::good(number).install(&host.volume());
        wait_until("it answers", || load.newest() == number);
    }
    load.stop().assert_faultless();
    let report = host.report("versioned");
    assert_eq!(report["generation"]["number"], 12, "{report:#}");
    assert_eq!(report["history"].as_array().unwrap().len(), 12);
    let newest = &report["history"][0];
    assert_eq!((&newest["cause"], &newest["outcome"]), (&json!("file"), &json!("swapped")));
    for phase in ["preflight_ms", "open_ms", "load_ms", "swap_ms"] {
        assert!(newest["phases"][phase].as_f64().is_some(), "{phase}: {newest}");
    }
    assert_eq!(report["retired"]["libraries"], 11, "{report:#}");
    assert!(report["retired"]["bytes"].as_u64().unwrap() > 100_000, "{report:#}");
    wait_until("the old instances have left", || {
        host.log().iter().filter(|line| line["message"] == "versioned leaves").count() == 11
    });
    wait_until("the journal says how long that took", || {
        host.report("versioned")["history"][0]["phases"]["drain_ms"].is_number()
    });
}

#[test]
fn a_slow_copy_in_place_is_one_reload_and_never_half_a_file() {
    let host = setup().config("[server]\nsettle_ms = 100").ready();
    let load = Load::start(host.address, 2, VERSIONED);
    let pauses = [300, 1000, 50, 700, 200, 800].map(Duration::from_millis);
    Version::good(2).copy_slowly(&host.volume(), &pauses);
    wait_until("it answers", || load.newest() == 2);
    thread::sleep(NOTHING_HAPPENS);
    load.stop().assert_faultless();
    assert_eq!((ended(&host, "swapped"), ended(&host, "refused")), (2, 0));
}

#[test]
fn each_change_is_taken_once_with_events() {
    let setup = setup().config("[server.volumes.test]\nwatch = \"native\"");
    let volume = setup.volume();
    each_change_is_taken_once(&setup.ready(), &volume);
}

#[test]
fn each_change_is_taken_once_by_polling() {
    let config = "[server]\npoll_interval_ms = 100\n[server.volumes.test]\nwatch = \"poll\"";
    let setup = setup().config(config);
    let volume = setup.volume();
    each_change_is_taken_once(&setup.ready(), &volume);
}

#[test]
fn a_generation_that_does_not_load_leaves_the_old_one_serving() {
    let config =
        "[server]\nsettle_timeout_seconds = 1\n[app_settings.deployment_config]\nload_timeout_seconds = 1.0";
    let host = setup().config(config).ready();
    let load = Load::start(host.address, 4, VERSIONED);
    let expected = [
        ("load-error", "the pipeline didn't load: told not to load"),
        ("load-panic", "the pipeline panicked: told to panic in load"),
        ("load-hangs", "did not return within 1s (load_timeout_seconds)"),
    ];
    for (number, (behaviour, reason)) in expected.into_iter().enumerate() {
        Version::bad(9, behaviour).install(&host.volume());
        wait_until("it was refused", || ended(&host, "refused") == number + 1);
        let entry = host.report("versioned")["history"][0].clone();
        assert_eq!((&entry["outcome"], &entry["phase"]), (&json!("refused"), &json!("load")));
        assert!(entry["reason"].as_str().unwrap().contains(reason), "{entry}");
    }
    fs::write(version::path(&host.volume()), "no library").unwrap();
    wait_until("it was refused", || ended(&host, "refused") == 4);
    let whole = Version::good(8).bytes();
    put(&whole[..whole.len() - 100], &version::path(&host.volume()));
    wait_until("it was refused", || ended(&host, "refused") == 5);
    assert!(host.report("versioned")["history"][0]["reason"].as_str().unwrap().contains("it is truncated"));
    let served = load.stop();
    served.assert_faultless();
    assert_eq!(ask(&host)["version"], 1);
    let report = host.report("versioned");
    assert_eq!((&report["state"], &report["generation"]["number"]), (&json!("ready"), &json!(1)));
    assert_eq!(host.metric(r#"modalkit_reloads_total{model="versioned",outcome="refused"}"#), 5.0);
    Version::good(2).install(&host.volume());
    wait_for_version(&host, 2);
}

#[test]
fn a_newer_file_replaces_one_that_is_loading() {
    let host = setup().ready();
    Version::bad(2, "load-hangs").install(&host.volume());
    wait_until("it loads", || host.report("versioned")["reload"] == "loading");
    Version::good(3).install(&host.volume());
    wait_for_version(&host, 3);
    assert_eq!((ended(&host, "superseded"), ended(&host, "swapped")), (1, 2));
}

#[test]
fn a_first_generation_that_hangs_is_replaced_by_a_fit_one() {
    let setup =
        Setup::new().plugin("echo").config("[app_settings.deployment_config]\nload_timeout_seconds = 0.5");
    Version::bad(1, "load-hangs").install(&setup.volume());
    let host = setup.start();
    wait_until("it says why", || host.model("versioned")["state"] == "failed");
    let reason = host.model("versioned")["reason"].as_str().unwrap().to_owned();
    assert!(reason.contains("did not return within 500ms"), "{reason}");
    assert_eq!(host.post("/predict_sync?model_name=echo", &json!({"text": "a"})).0, 200);
    Version::good(2).install(&host.volume());
    wait_until("it serves", || {
        host.post("/predict_sync?model_name=versioned", &json!({"text": "a"})).1["version"] == 2
    });
    let stuck = host.metric(r#"modalkit_replicas_stuck{model="versioned"}"#);
    assert!(stuck >= 1.0, "the thread of the one before hangs for an hour: {stuck}");
}

#[test]
fn golden_requests_keep_wrong_and_slow_generations_out() {
    let config =
        "[model_settings.model_entries.versioned]\ngolden = \"golden.json\"\ngolden_latency_ms = 200";
    let setup = setup().config(config);
    // Its answer holds the version, so that the file says which one may come next.
    let golden = |version: u64| {
        let answer = json!({"text": "GOLD", "version": version, "data": "", "hooks": 0});
        json!([{"input": {"text": "gold"}, "output": answer, "tolerance": 10}]).to_string()
    };
    fs::write(setup.volume().join("golden.json"), golden(1)).unwrap();
    let host = setup.ready();
    let load = Load::start(host.address, 4, VERSIONED);
    Version::bad(2, "wrong").install(&host.volume());
    wait_until("it was refused", || ended(&host, "refused") == 1);
    let entry = host.report("versioned")["history"][0].clone();
    let reason = entry["reason"].as_str().unwrap();
    assert_eq!(entry["phase"], "golden");
    assert!(reason.contains(r#"at /text, expected "GOLD", found "gold""#), "{reason}");
    Version::bad(3, "very-slow").install(&host.volume());
    wait_until("it was refused", || ended(&host, "refused") == 2);
    let reason = host.report("versioned")["history"][0]["reason"].as_str().unwrap().to_owned();
    assert!(reason.contains("golden request 0 took ") && reason.contains("golden_latency_ms"), "{reason}");
    // Within the tolerance.
    Version::good(9).install(&host.volume());
    wait_until("it answers", || load.newest() == 9);
    Version::good(12).install(&host.volume());
    wait_until("it was refused", || ended(&host, "refused") == 3);
    let reason = host.report("versioned")["history"][0]["reason"].as_str().unwrap().to_owned();
    assert!(reason.contains("at /version, expected 1, found 12"), "{reason}");
    load.stop().assert_faultless();
}

#[test]
fn a_generation_that_fails_its_probation_is_taken_back() {
    let config = "[app_settings.deployment_config]\nprobation_seconds = 60\nprobation_batches_min = 5";
    let host = setup().config(config).ready();
    let load = Load::start(host.address, 4, VERSIONED);
    wait_until("the old one has figures", || {
        host.report("versioned")["vitals"]["batches"].as_u64() > Some(200)
    });
    Version::bad(2, "fails").install(&host.volume());
    wait_until("it was taken back", || ended(&host, "rolled_back") == 1);
    let report = host.report("versioned");
    assert_eq!(report["generation"]["number"], 1, "{report:#}");
    let reason = report["history"][0]["reason"].as_str().unwrap();
    assert!(reason.contains("5 of its 5 batches failed, and 0 of"), "{reason}");
    assert_eq!(report["history"][0]["cause"], "probation");
    let served = load.stop();
    // Those that the verdict needed, and those that ran beside them on other lanes.
    assert!((5..=6).contains(&served.wrong), "{} failed: {:?}", served.wrong, served.faults);

    // Slowness needs a hundred batches on both sides.
    let load = Load::start(host.address, 4, VERSIONED);
    Version::bad(3, "slow").install(&host.volume());
    wait_until("it was taken back", || ended(&host, "rolled_back") == 2);
    let reason = host.report("versioned")["history"][0]["reason"].as_str().unwrap().to_owned();
    assert!(reason.contains("99 of 100 of its batches took up to"), "{reason}");
    wait_until("the old one answers", || ask(&host)["version"] == 1);
    let served = load.stop();
    assert_eq!(served.wrong, 0, "{:?}", served.faults);
    // Content that was taken back isn't taken again by itself.
    fs::write(version::path(&host.volume()), Version::bad(3, "slow").bytes()).unwrap();
    assert!(host.log_line("content that was refused before")["sha256"].is_string());
    assert_eq!(ask(&host)["version"], 1);
}

#[test]
fn a_probation_that_is_passed_retires_the_generation_before() {
    let config = "[app_settings.deployment_config]\nprobation_seconds = 3";
    let host = setup().config(config).ready();
    Version::good(2).install(&host.volume());
    wait_for_version(&host, 2);
    assert_eq!(host.report("versioned")["standby"], 1);
    wait_until("it has left", || host.report("versioned")["standby"].is_null());
    assert_eq!(host.log_line("versioned leaves")["fields"], "version=1");
    assert_eq!(host.report("versioned")["reload"], "idle");
}

#[test]
fn people_reload_and_roll_back() {
    let host = setup().ready();
    let (status, entry) = host.post("/models/versioned/rollback", &Value::Null);
    assert_eq!((status, &entry["phase"]), (409, &json!("roll_back")), "{entry}");
    assert_eq!(host.report("versioned")["last"], entry);
    // The same content: a new generation all the same.
    let (status, entry) = host.post("/models/versioned/reload", &Value::Null);
    assert_eq!((status, &entry["outcome"], &entry["generation"]), (200, &json!("swapped"), &json!(2)));
    assert_eq!(host.metric("modalkit_plugin_libraries"), 1.0, "the same content is opened once");
    Version::good(3).install(&host.volume());
    wait_for_version(&host, 3);
    // On probation the one before stands by.
    let (status, entry) = host.post("/models/versioned/rollback", &Value::Null);
    assert_eq!((status, &entry["outcome"], &entry["generation"]), (200, &json!("rolled_back"), &json!(2)));
    assert_eq!(ask(&host)["version"], 1);
    // Later it is loaded again.
    let (status, entry) = host.post("/models/versioned/rollback", &Value::Null);
    assert_eq!((status, &entry["generation"]), (200, &json!(1)), "{entry}");
    assert!(entry["phases"]["load_ms"].is_number(), "{entry}");
    // Forward again: what the volume holds.
    assert_eq!(host.post("/models/versioned/reload", &Value::Null).0, 200);
    assert_eq!(ask(&host)["version"], 3);
    fs::remove_file(version::path(&host.volume())).unwrap();
    assert_eq!(host.log_line("the plugin's file is gone")["model"], "versioned");
    let (status, entry) = host.post("/models/versioned/reload", &Value::Null);
    assert_eq!(status, 409);
    assert!(entry["reason"].as_str().unwrap().contains("there is no file"), "{entry}");
    let (status, body) = host.post("/models/nobody/reload", &Value::Null);
    assert_eq!(status, 404);
    assert!(body["detail"].as_str().unwrap().contains("versioned"), "{body}");
    assert_eq!(host.get("/models/versioned/reload").0, 405);
}

#[test]
fn changed_data_reaches_every_replica_one_after_the_other() {
    let config = "[app_settings.deployment_config]\nmin_replicas = 2\nconcurrency_limit = 2";
    let setup = setup().config(config);
    let file = setup.volume().join("versioned.txt");
    fs::write(&file, "one").unwrap();
    let host = setup.ready();
    wait_until("both replicas serve", || host.model("versioned")["replicas"] == 2);
    assert_eq!(ask(&host)["data"], "one");
    let load = Load::start(host.address, 4, VERSIONED);
    // The hook takes three seconds on each; the other answers meanwhile.
    let begun = Instant::now();
    put(b"slow", &file);
    wait_until("the hook has run", || host.report("versioned")["hooks"] == 1);
    let served = load.stop();
    served.assert_faultless();
    let slowest = served.percentile(1.0, begun, Instant::now());
    assert!(slowest < 2000.0, "somebody waited {slowest} ms for a hook");
    let report = host.report("versioned");
    assert_eq!(
        (&report["hook"]["errors"], &report["hook"]["changed"]),
        (&json!([null, null]), &json!(["versioned.txt"]))
    );
    for _ in 0..20 {
        let answer = ask(&host);
        assert_eq!(
            (&answer["data"], &answer["hooks"], &answer["version"]),
            (&json!("slow"), &json!(1), &json!(1))
        );
    }
    assert_eq!(report["generation"]["number"], 1, "data is no new generation");

    // An error is told, and what was loaded serves on.
    for (content, said) in [("broken", "versioned.txt is broken"), ("panics", "told to panic in the hook")] {
        put(content.as_bytes(), &file);
        wait_until("the hook has failed", || {
            host.report("versioned")["hook"]["errors"][1].as_str().is_some_and(|error| error.contains(said))
        });
        assert_eq!(ask(&host)["data"], "slow");
    }
    assert_eq!(host.metric(r#"modalkit_volume_hooks_total{model="versioned",outcome="error"}"#), 2.0);
    // The same bytes, a touch, a deletion: no call.
    put(b"panics", &file);
    fs::remove_file(&file).unwrap();
    thread::sleep(NOTHING_HAPPENS);
    assert_eq!(host.report("versioned")["hooks"], 3);
}

#[test]
fn a_hook_that_hangs_costs_its_replica_and_not_the_model() {
    let config = "[app_settings.deployment_config]\nload_timeout_seconds = 0.5";
    let host = setup().config(config).ready();
    put(b"hangs", &host.volume().join("versioned.txt"));
    wait_until("it was given up", || host.report("versioned")["hooks_failed"] == 1);
    let error = host.report("versioned")["hook"]["errors"][0].as_str().unwrap().to_owned();
    assert!(error.contains("on_volume_reload did not return within 500ms"), "{error}");
    // The new replica has read the new data at its load.
    wait_until("another replica answers", || ask(&host)["data"] == "hangs");
}

#[test]
fn data_that_comes_later_is_another_chance_for_a_generation_that_needs_it() {
    let host = setup().ready();
    Version::bad(2, "load-data").install(&host.volume());
    wait_until("it was refused", || ended(&host, "refused") == 1);
    put(b"here", &host.volume().join("versioned.txt"));
    wait_for_version(&host, 2);
    assert_eq!(ask(&host)["data"], "here");
}

#[test]
fn a_volume_is_looked_through_when_somebody_asks() {
    // Nothing would be noticed by itself.
    let config = "[server]\npoll_interval_ms = 3600000\n[server.volumes.test]\nwatch = \"poll\"";
    let host = setup().config(config).ready();
    Version::good(2).install(&host.volume());
    put(b"new", &host.volume().join("versioned.txt"));
    let (status, report) = host.post("/volumes/test/reload", &Value::Null);
    assert_eq!(status, 200, "{report:#}");
    let model = &report["models"]["versioned"];
    assert_eq!((&model["reload"]["outcome"], &model["reload"]["generation"]), (&json!("swapped"), &json!(2)));
    assert_eq!(model["hook"]["errors"], json!([null]), "{report:#}");
    assert_eq!(model["hook"]["changed"], json!(["versioned.txt"]), "{report:#}");
    assert_eq!(host.report("versioned")["hooks"], 1);
    let answer = ask(&host);
    assert_eq!((&answer["version"], &answer["data"]), (&json!(2), &json!("new")));
    // Nothing new: the hook is called all the same, as it was asked for.
    let (_, report) = host.post("/volumes/test/reload", &Value::Null);
    assert!(report["models"]["versioned"]["reload"].is_null(), "{report:#}");
    Version::bad(3, "load-error").install(&host.volume());
    let (status, report) = host.post("/volumes/test/reload", &Value::Null);
    assert_eq!((status, &report["models"]["versioned"]["reload"]["outcome"]), (409, &json!("refused")));
    assert_eq!(host.post("/volumes/nobody/reload", &Value::Null).0, 404);
}

#[test]
fn the_hook_is_called_at_intervals_where_that_is_configured() {
    let config = "[app_settings.deployment_config]\nvolume_reload_interval_seconds = 0.2";
    let host = setup().config(config).ready();
    wait_until("it was called thrice", || ask(&host)["hooks"].as_u64() >= Some(3));
    assert_eq!(host.report("versioned")["hook"]["changed"], json!([]));
}

#[test]
fn the_last_library_is_followed_by_a_refusal_and_the_host_serves_on() {
    let config = "[server]\ngenerations_max = 3\n[app_settings.deployment_config]\nprobation_seconds = 0";
    let host = setup().config(config).plugin("echo").ready();
    Version::good(2).install(&host.volume());
    wait_for_version(&host, 2);
    Version::good(3).install(&host.volume());
    wait_until("it was refused", || ended(&host, "refused") == 1);
    let reason = host.report("versioned")["history"][0]["reason"].as_str().unwrap().to_owned();
    assert!(reason.contains("has opened 3 plugin libraries (server.generations_max is 3)"), "{reason}");
    assert!(reason.contains("restart the host") && reason.contains("isolation = \"process\""), "{reason}");
    // What is opened already may still be gone back to.
    assert_eq!(host.post("/models/versioned/rollback", &Value::Null).0, 200);
    assert_eq!(ask(&host)["version"], 1);
    assert_eq!(host.post("/predict_sync?model_name=echo", &json!({"text": "a"})).0, 200);
}

#[test]
fn reloads_rollbacks_and_lists_at_once_lose_nothing() {
    let config = "[app_settings.deployment_config]\nprobation_seconds = 1";
    let host = setup().config(config).plugin("echo").ready();
    let load = Load::start(host.address, 4, ECHO);
    thread::scope(|scope| {
        for worker in 0..8 {
            let host = &host;
            scope.spawn(move || {
                for round in 0..8 {
                    let (status, body) = match (worker + round) % 4 {
                        0 => host.post("/models/echo/reload", &Value::Null),
                        1 => host.post("/models/echo/rollback", &Value::Null),
                        2 => host.get("/models"),
                        _ => host.get("/models/echo"),
                    };
                    assert!(status == 200 || status == 409, "{status} {body}");
                }
            });
        }
    });
    load.stop().assert_faultless();
    let report = host.report("echo");
    assert_eq!(report["state"], "ready", "{report:#}");
    assert_eq!(host.post("/models/echo/reload", &Value::Null).0, 200);
}

#[test]
fn a_shutdown_in_the_middle_of_a_change_ends_in_time_and_answers_what_is_inside() {
    for behaviour in ["load-slow", "load-hangs", "serves", "very-slow"] {
        let mut host = setup().plugin("puppet").ready();
        let (address, body) = (host.address, json!({"do": "sleep", "ms": 700, "value": 7}));
        let inside = thread::spawn(move || {
            let url = format!("http://{address}/predict_sync?model_name=puppet");
            let mut response = ureq::post(url).send(body.to_string()).unwrap();
            response.body_mut().read_to_string().unwrap()
        });
        wait_until("it runs", || host.metric(r#"modalkit_batch_size_items_count{model="puppet"}"#) == 1.0);
        Version::bad(2, behaviour).install(&host.volume());
        if behaviour.starts_with("load") {
            wait_until("it loads", || host.report("versioned")["reload"] == "loading");
        } else {
            wait_until("it stands by", || host.report("versioned")["standby"] == 1);
        }
        let begun = Instant::now();
        host.signal("TERM");
        assert!(inside.join().unwrap().contains("\"value\":7"), "{behaviour}");
        assert_eq!(host.wait().code(), Some(0), "{behaviour}");
        assert!(begun.elapsed() < Duration::from_secs(10), "{behaviour}: {:?}", begun.elapsed());
        let left = fs::read_dir(host.temporary_folder()).unwrap().count();
        assert_eq!(left, 0, "{behaviour}: private copies vanish with the host");
    }
}

#[test]
fn a_plugin_that_takes_its_other_name_is_taken_along() {
    let host = setup().ready();
    // While both are there the first counts, and it is the newer one here.
    let old = host.volume().join("versioned.so");
    put(&Version::good(2).bytes(), &host.volume().join("libversioned.so"));
    wait_for_version(&host, 2);
    fs::remove_file(host.volume().join("libversioned.so")).unwrap();
    wait_for_version(&host, 1);
    fs::rename(&old, host.volume().join("libversioned.so")).unwrap();
    wait_until("it is known by its new name", || {
        let source = host.report("versioned")["source"].clone();
        source["present"] == true && source["path"].as_str().unwrap().ends_with("libversioned.so")
    });
    put(&Version::good(3).bytes(), &host.volume().join("libversioned.so"));
    wait_for_version(&host, 3);
}

#[test]
fn a_model_that_is_no_longer_configured_is_unloaded_when_its_jobs_are_done() {
    let entries = "[model_settings.model_entries.kept]\nplugin = \"versioned\"\n[model_settings.model_entries.gone]\nplugin = \"puppet\"";
    let mut host = setup().plugin("puppet").config(entries).ready();
    thread::scope(|scope| {
        let host = &mut host;
        let address = host.address;
        let slow = scope.spawn(move || {
            let agent: ureq::Agent = ureq::Agent::config_builder().build().into();
            let url = format!("http://{address}/predict_sync?model_name=gone");
            agent.post(url).send(r#"{"do": "sleep", "ms": 500}"#).map(|response| response.status().as_u16())
        });
        wait_until("it runs", || host.metric(r#"modalkit_batch_size_items_count{model="gone"}"#) == 1.0);
        host.configure("[model_settings.model_entries.kept]\nplugin = \"versioned\"");
        host.signal("HUP");
        assert_eq!(slow.join().unwrap().unwrap(), 200);
    });
    assert_eq!(host.log_line("it was unloaded")["model"], "gone");
    assert_eq!(host.post("/predict_sync?model_name=gone", &json!({})).0, 404);
    assert_eq!(host.post("/predict_sync?model_name=kept", &json!({"text": "a"})).0, 200);
    // Its plugin lies in the volume and has no entry any more, so it serves under its own name, as after a restart.
    wait_until("it serves", || host.post("/predict_sync?model_name=puppet", &json!({})).0 == 200);
    host.configure("[server]\nno_such_key = 1");
    host.signal("HUP");
    let line = host.log_line("the configuration stays as it was");
    assert!(line["message"].as_str().unwrap().contains("server.no_such_key"), "{line}");
}

#[test]
fn two_files_of_one_name_are_told_and_the_first_counts() {
    let setup = Setup::new().plugin("echo");
    install(&library("puppet"), &setup.volume().join("libecho.so"));
    let host = setup.ready();
    assert_eq!(host.log_line("are the same plugin's; the first counts")["volume"], "test");
    assert_eq!(host.post("/predict_sync", &json!({"text": "a"})).1["translated_text"], "A");
}

#[test]
fn people_see_and_steer_it_from_the_command_line() {
    let host = setup().plugin("echo").ready();
    let modalkit = |args: &[&str]| {
        let output = std::process::Command::new(modalkit_tests::built().join("modalkit"))
            .args(args)
            .env("MODALKIT_SOCKET", host.socket.as_ref().unwrap())
            .output()
            .unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (output.status.code().unwrap(), text(output.stdout) + &text(output.stderr))
    };
    let (code, said) = modalkit(&["models"]);
    assert!(code == 0 && said.lines().count() == 3 && said.contains("versioned  ready"), "{said}");
    assert_eq!(
        modalkit(&["rollback", "versioned"]),
        (1, "versioned: refused: there is no generation to go back to\n".into())
    );
    assert_eq!(modalkit(&["reload", "versioned"]), (0, "versioned: swapped, generation 2 serves\n".into()));
    assert_eq!(
        modalkit(&["rollback", "versioned"]),
        (0, "versioned: rolled back to generation 1: it was asked for\n".into())
    );
    let (code, said) = modalkit(&["reload", "--volume", "test"]);
    assert!(code == 0 && said.contains("versioned: its plugin is as it was"), "{said}");
    let (code, said) = modalkit(&["models", "versioned"]);
    assert!(code == 0 && said.contains("generation    1") && said.contains("request  2"), "{said}");
    let (code, said) = modalkit(&["models", "versioned", "--json"]);
    assert_eq!(
        (code, &serde_json::from_str::<Value>(&said).unwrap()["generation"]["number"]),
        (0, &json!(1))
    );
    let (code, said) = modalkit(&["reload", "nobody"]);
    assert!(code == 1 && said.contains("no such name; expected one of"), "{said}");
    assert_eq!(modalkit(&["reload"]).0, 2);
    let (code, said) = modalkit(&["models", "--url", "http://127.0.0.1:1"]);
    assert!(code == 1 && said.contains("can't reach the host at http://127.0.0.1:1"), "{said}");
}
