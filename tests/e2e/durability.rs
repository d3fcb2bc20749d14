//! What an accepted job survives: a crash of the host that another job is to blame for, a clock that is set, a result that can't be
//! kept, a caller who hangs up while results are taken, a shutdown before its batch is full.

use std::{
    fs,
    io::{Read, Write},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use modalkit_tests::{Host, Setup, built, free_port, poison::Poison, wait_until};
use serde_json::{Value, json};

/// Sends a body as it stands, and returns the job's id.
fn job_of(host: &Host, model: &str, envelope: &str) -> String {
    let mut stream = host.connect();
    let head = format!(
        "POST /predict_async?model_name={model} HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
        envelope.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(envelope.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (_, body) = answer.split_once("\r\n\r\n").unwrap();
    let body: Value = serde_json::from_str(body).unwrap_or_else(|_| panic!("{answer}"));
    body["job_id"].as_str().unwrap_or_else(|| panic!("{answer}")).to_owned()
}

fn delivery(host: &Host, job: &str) -> String {
    host.get(&format!("/jobs/{job}")).1["delivery"]["state"].as_str().unwrap_or_default().to_owned()
}

/// Read from the text: what a queue holds may be JSON that no `Value` can hold.
fn length(host: &Host, queue: &str) -> u64 {
    let text = host.text(&format!("/queues/{queue}?limit=1"));
    let length = text.strip_prefix("{\"length\":").and_then(|rest| rest.split(',').next()?.parse().ok());
    length.unwrap_or_else(|| panic!("{text}"))
}

#[test]
fn results_in_memory_are_given_back_to_the_letter() {
    let host = Setup::new().plugin("puppet").ready();
    let deep = format!("{{\"x\":{}{}}}", "[".repeat(200), "]".repeat(200));
    let metas = [
        r#"{"x": 1e999}"#,
        r#"{"x":"\ud800"}"#,
        &deep,
        r#"{"z":123456789012345678901234567890, "a":0.10, "z" : 1}"#,
    ];
    for (value, meta) in metas.iter().enumerate() {
        let envelope = format!(r#"{{"message":{{"value":{value}}},"success_queue":"q","meta":{meta}}}"#);
        let job = job_of(&host, "puppet", &envelope);
        wait_until("it is in its queue", || length(&host, "q") == value as u64 + 1);
        let told = host.text(&format!("/jobs/{job}"));
        assert!(told.contains(meta), "{told}");
        let shown = Command::new(built().join("modalkit"))
            .args(["--config", host.folder().join("modalkit.toml").to_str().unwrap(), "jobs", &job])
            .args(["--url", &format!("http://{}", host.address)])
            .output()
            .unwrap();
        let shown = String::from_utf8(shown.stdout).unwrap();
        let tight: String = shown.split_whitespace().collect();
        assert!(tight.contains(&meta.replace(' ', "")), "{shown}");
    }
    for _ in 0..2 {
        let looked = host.text("/queues/q");
        assert!(metas.iter().all(|meta| looked.contains(meta)), "{looked}");
    }
    // A text: no `Value` holds it.
    let (status, Value::String(taken)) = host.delete("/queues/q") else {
        panic!("{}", host.text("/queues/q"))
    };
    assert_eq!(status, 200, "{taken}");
    assert!(metas.iter().all(|meta| taken.contains(meta)), "{taken}");
}

#[test]
fn what_is_taken_and_not_acknowledged_comes_back_and_is_delivered_only_then() {
    let mut host = Setup::new().plugin("echo").ready();
    let jobs: Vec<String> = (0..100)
        .map(|_| host.job("echo", &json!({"message": {"text": "a"}, "success_queue": "q"})))
        .collect();
    wait_until("all are in their queue", || length(&host, "q") == 100);
    // Callers who take all of them and hang up, before and after the answer.
    for _ in 0..3 {
        let (status, answer) = host.delete("/queues/q?limit=1000&lease_seconds=1");
        assert_eq!((status, answer["messages"].as_array().map(Vec::len)), (200, Some(100)), "{answer}");
        assert_eq!((length(&host, "q"), delivery(&host, &jobs[0]).as_str()), (0, "pending"));
        wait_until("they are there again", || length(&host, "q") == 100);
    }
    let (_, first) = host.delete("/queues/q?limit=60");
    // Killed now, the host has all of them again.
    host.kill();
    host.start_again();
    wait_until("they are there again", || length(&host, "q") == 100);
    let stale = format!("/queues/q?receipt={}", first["receipt"].as_str().unwrap());
    let (status, answer) = host.delete(&stale);
    assert_eq!(status, 404, "{answer}");
    assert!(answer["detail"].as_str().unwrap().contains("in their queue again"), "{answer}");

    let (_, first) = host.delete("/queues/q?limit=60");
    let next = format!("/queues/q?limit=1000&receipt={}", first["receipt"].as_str().unwrap());
    let (_, second) = host.delete(&next);
    assert_eq!((&second["acknowledged"], second["messages"].as_array().unwrap().len()), (&json!(60), 40));
    let ids = |answer: &Value| -> Vec<String> {
        let id = |message: &Value| message["job_id"].as_str().unwrap().to_owned();
        answer["messages"].as_array().unwrap().iter().map(id).collect()
    };
    let mut taken = ids(&first);
    taken.extend(ids(&second));
    taken.sort();
    assert_eq!(taken, jobs, "each once");
    wait_until("the first are delivered", || delivery(&host, &ids(&first)[59]) == "delivered");
    assert_eq!(delivery(&host, &ids(&second)[0]), "pending");
    let (status, _) = host.delete(&format!("/queues/q?receipt={}", second["receipt"].as_str().unwrap()));
    // Acknowledged is on disk: at once after that answer.
    host.kill();
    assert_eq!(status, 200);
    host.start_again();
    wait_until("it is ready", || host.get("/readyz").0 == 200);
    assert_eq!(length(&host, "q"), 0, "what was acknowledged is not there again");
    assert!(jobs.iter().all(|job| delivery(&host, job) == "delivered"));
}

#[test]
fn a_job_that_kills_hosts_is_found_and_those_that_ran_with_it_are_not_charged() {
    let config = "[model_settings.model_entries.together]\nplugin = \"puppet\"\n\
         batch_config = { max_batch_size = 8, wait_ms = 2000 }\ndeployment_config = { retries = 0 }\n\
         [model_settings.model_entries.other]\nplugin = \"puppet\"\ndeployment_config = { retries = 0 }\n";
    let mut host = Setup::new().plugin("puppet").config(config).ready();
    let slow = host.job("other", &json!({"message": {"do": "sleep", "ms": 3000, "value": 100}}));
    wait_until("it runs", || host.get(&format!("/jobs/{slow}")).1["state"] == "running");
    let good: Vec<String> = (0..7)
        .map(|value| host.job("together", &json!({"message": {"value": value}, "success_queue": "q"})))
        .collect();
    // Not before its acceptance is told.
    let message = json!({"do": "take the host down", "ms": 500});
    let poison = host.job("together", &json!({"message": message, "failure_queue": "bad"}));
    let mut deaths = 0;
    loop {
        let mut report = Value::Null;
        wait_until("the host dies, or the job has ended", || {
            host.has_exited() || {
                report = host.try_get(&format!("/jobs/{poison}")).map_or(Value::Null, |(_, report)| report);
                report["state"] == "failed"
            }
        });
        if report["state"] == "failed" {
            assert_eq!((&report["crashes"], &report["attempts"]), (&json!(2), &json!(0)), "{report}");
            assert!(report["error"].as_str().unwrap().contains("ended by SIGABRT in predict"), "{report}");
            break;
        }
        let _ = host.wait();
        deaths += 1;
        assert!(deaths <= 2, "once with the others, once alone");
        host.start_again();
    }
    for job in good.iter().chain([&slow]) {
        let report = host.ended(job);
        assert_eq!((&report["state"], &report["attempts"]), (&json!("succeeded"), &json!(1)), "{report}");
    }
    assert_eq!(host.ended(&slow)["crashes"], Value::Null, "it ran on another thread");
    wait_until("its failure is told", || length(&host, "bad") == 1 && length(&host, "q") == 7);
}

#[test]
fn each_job_that_ends_the_host_costs_it_two_lives_at_most_and_the_others_nothing() {
    let poison = Poison { good: 300, poison: 6, isolation: "in-process" };
    let deaths = poison.run();
    assert!(deaths.hosts >= 6 && deaths.hosts <= 12, "{deaths:?}");
}

#[test]
fn a_long_job_survives_hosts_that_are_killed_from_outside() {
    let config = "[app_settings.deployment_config]\nretries = 1\n";
    let mut host = Setup::new().plugin("puppet").config(config).ready();
    let job = host.job("puppet", &json!({"message": {"do": "sleep", "ms": 2500, "value": 1}}));
    // More often than `job_crashes_max`.
    for _ in 0..6 {
        wait_until("it runs", || host.get(&format!("/jobs/{job}")).1["state"] == "running");
        host.kill();
        host.start_again();
    }
    let report = host.ended(&job);
    assert_eq!((&report["state"], &report["attempts"]), (&json!("succeeded"), &json!(1)), "{report}");
    assert_eq!(report["crashes"], 6, "{report}");
}

#[test]
fn a_result_that_is_too_large_fails_its_job_and_no_other() {
    let host = Setup::new().plugin("echo").config("[server]\nresult_bytes_max = 2000\n").ready();
    let envelope = |bytes: usize| json!({"message": {"text": "x".repeat(bytes)}, "success_queue": "good", "failure_queue": "bad"});
    let jobs: Vec<String> = [10, 5000, 20].iter().map(|bytes| host.job("echo", &envelope(*bytes))).collect();
    let reports: Vec<Value> = jobs.iter().map(|job| host.ended(job)).collect();
    let states: Vec<&Value> = reports.iter().map(|report| &report["state"]).collect();
    assert_eq!(states, ["succeeded", "failed", "succeeded"]);
    let error = reports[1]["error"].as_str().unwrap();
    assert!(error.contains("server.result_bytes_max") && error.contains("at most 2000"), "{error}");
    wait_until("both queues have theirs", || length(&host, "good") == 2 && length(&host, "bad") == 1);
}

#[test]
fn a_shutdown_waits_for_no_job_that_has_not_begun() {
    let config = "[app_settings.batch_config]\nmax_batch_size = 8\nwait_ms = 60000\n";
    let mut host = Setup::new().plugin("puppet").config(config).ready();
    let job = host.job("puppet", &json!({"message": {"value": 5}}));
    wait_until("it waits for its batch", || host.metric("modalkit_queued_jobs{model=\"puppet\"}") == 1.0);
    host.signal("TERM");
    assert!(host.wait().success(), "nothing was cut off");
    let stopped = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64;
    host.configure("");
    host.start_again();
    let report = host.ended(&job);
    assert_eq!((&report["state"], &report["attempts"]), (&json!("succeeded"), &json!(1)), "{report}");
    assert!(report["started_unix_ms"].as_u64().unwrap() >= stopped, "the next start ran it: {report}");
}

#[test]
fn those_who_list_jobs_count_as_requests() {
    let config = "[app_settings.deployment_config]\nallow_concurrent_inputs_handler = 1\n";
    let host = Setup::new().plugin("puppet").config(config).ready();
    assert_eq!(host.get("/jobs").0, 200);
    let busy = std::thread::scope(|scope| {
        let busy = scope.spawn(|| host.post("/predict_sync", &json!({"do": "sleep", "ms": 1500})).0);
        wait_until("a request is in flight", || host.metric("modalkit_requests_in_flight") == 1.0);
        let (status, answer) = host.get("/jobs");
        assert_eq!(status, 429, "{answer}");
        busy.join().unwrap()
    });
    assert_eq!(busy, 200);
}

/// A library that moves the system's clock for one process, by as many seconds as a file says.
struct Clock {
    library: PathBuf,
    offset: PathBuf,
}

impl Clock {
    fn make(folder: &Path) -> Self {
        let (source, library, offset) =
            (folder.join("clock.c"), folder.join("clock.so"), folder.join("clock.offset"));
        fs::write(&source, include_str!("clock.c")).unwrap();
        let mut cc = Command::new("cc");
        let compiled =
            cc.args(["-shared", "-fPIC", "-O1", "-o"]).arg(&library).arg(&source).output().unwrap();
        assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
        let clock = Self { library, offset };
        clock.set(0);
        clock
    }

    /// In place: the process has the file mapped.
    fn set(&self, seconds: i64) {
        let mut file =
            fs::File::options().create(true).truncate(false).write(true).open(&self.offset).unwrap();
        file.write_all(&seconds.to_ne_bytes()).unwrap();
    }

    /// A host with this clock.
    fn host(self, setup: Setup) -> (Self, Setup) {
        let setup = setup
            .variable("LD_PRELOAD", self.library.to_str().unwrap())
            .variable("CLOCK_OFFSET_FILE", self.offset.to_str().unwrap());
        (self, setup)
    }
}

const HOUR: i64 = 3600;

#[test]
fn a_clock_that_is_set_keeps_no_retry_waiting_and_forgets_and_gives_up_nothing() {
    let setup = Setup::new().plugin("puppet");
    let clock = Clock::make(&setup.folder());
    // Nobody listens there.
    let config = format!(
        "[app_settings.deployment_config]\nretries = 3\n[app_settings.queue_config.backends.away]\nkind = \"redis\"\nbroker_url = \"redis://127.0.0.1:{}\"\n\
         [app_settings.queue_config.queues]\nresults = \"away\"\n",
        free_port()
    );
    let (clock, setup) = clock.host(setup.config(&config));
    let host = setup.ready();
    let send = || {
        let answer = host.post_with(
            "/predict_async",
            &json!({"message": {"value": 1}, "success_queue": "results"}),
            &[("idempotency-key", "a")],
        );
        assert_eq!(answer.0, 200, "{answer:?}");
        answer.1["job_id"].as_str().unwrap().to_owned()
    };
    let named = send();
    assert_eq!(host.ended(&named)["state"], "succeeded");
    let done = host.job("puppet", &json!({"message": {}}));
    let _ = host.ended(&done);

    // Back by two hours while a retry is due.
    let retried = host.job("puppet", &json!({"message": {"do": "fail the batch", "value": 7}}));
    wait_until("its next attempt is due", || {
        let report = host.get(&format!("/jobs/{retried}")).1;
        report["next_attempt_unix_ms"].is_u64()
    });
    clock.set(-2 * HOUR);
    assert_eq!(host.ended(&retried)["attempts"], 4, "all of its retries");
    let line = host.log_line("the system's clock was set");
    assert!(line["jump_ms"].as_i64().unwrap().abs_diff(-2 * HOUR * 1000) < 60_000, "{line}");
    // Forward by more than everything is kept for, and by more than results are tried to be delivered, while a job runs.
    let across = host.job("puppet", &json!({"message": {"do": "sleep", "ms": 1000}}));
    wait_until("it runs", || host.get(&format!("/jobs/{across}")).1["state"] == "running");
    clock.set(30 * HOUR);
    assert_eq!(host.ended(&across)["state"], "succeeded");
    wait_until("it is noticed", || {
        let jumps = host.log().into_iter().filter(|line| line["jump_ms"].is_i64());
        jumps.count() == 2
    });
    // The journal looks for what is to be forgotten each second.
    std::thread::sleep(Duration::from_millis(2500));
    assert_eq!(send(), named, "the name is remembered");
    assert_eq!(host.get(&format!("/jobs/{done}")).0, 200);
    assert_eq!(delivery(&host, &named), "pending", "{}", host.text(&format!("/jobs/{named}")));
    let seconds = host.metric("modalkit_job_seconds_sum");
    assert!(seconds < 600.0, "{seconds}");
    let (late, deadline) =
        host.post_with("/predict_async", &json!({"message": {}}), &[("x-request-timeout-ms", "60000")]);
    clock.set(60 * HOUR);
    assert_eq!(late, 200);
    assert_eq!(host.ended(deadline["job_id"].as_str().unwrap())["state"], "succeeded");
}
