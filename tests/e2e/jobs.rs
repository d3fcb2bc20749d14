//! Asynchronous jobs over HTTP: what is accepted is run and delivered, whatever dies in between.

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    process::{Child, Command},
    thread,
    time::{Duration, Instant},
};

use modalkit_tests::{
    Host, Setup, brokers, built,
    chaos::{Broker, Chaos, Sharing},
    wait_until,
};
use serde_json::{Value, json};

fn puppet(config: &str) -> Host {
    Setup::new().plugin("puppet").config(config).ready()
}

/// A model that runs one job at a time.
const ONE: &str = "[model_settings.model_entries.puppet]\n";

fn messages(host: &Host, queue: &str) -> Vec<Value> {
    let (status, answer) = host.get(&format!("/queues/{queue}?limit=1000"));
    assert_eq!(status, 200, "{answer}");
    answer["messages"].as_array().unwrap().clone()
}

#[test]
fn results_go_to_the_queue_for_answers_or_the_one_for_failures() {
    let host = puppet("");
    let envelope = |message: Value| json!({"message": message, "success_queue": "good", "failure_queue": "bad", "meta": {"user": 7}});
    let good = host.job("puppet", &envelope(json!({"value": 5})));
    let report = host.ended(&good);
    assert_eq!((&report["state"], &report["attempts"]), (&json!("succeeded"), &json!(1)));
    wait_until("it is in its queue", || messages(&host, "good").len() == 1);
    let delivery = |job: &str| host.get(&format!("/jobs/{job}")).1["delivery"]["state"].clone();
    assert_eq!(delivery(&good), "pending", "nobody has taken it");
    let found = messages(&host, "good");
    let expected = json!({"status": "success", "value": 5, "batch": 1, "meta": {"user": 7}});
    assert_eq!(found, [json!({"job_id": good, "body": expected})]);

    let bad = host.job("puppet", &envelope(json!({"do": "fail"})));
    wait_until("it is in its queue", || messages(&host, "bad").len() == 1);
    let found = messages(&host, "bad");
    assert_eq!(found[0]["body"]["status"], "error");
    assert_eq!(found[0]["body"]["original_message"], envelope(json!({"do": "fail"})));
    assert!(found[0]["body"]["error"].as_str().unwrap().contains("told to fail this item"), "{found:?}");
    let report = host.ended(&bad);
    assert_eq!((&report["state"], &report["attempts"]), (&json!("failed"), &json!(1)), "it would fail again");

    // Without a queue there is no delivery. What is taken out of a queue is gone.
    let quiet = host.job("puppet", &json!({"message": {}}));
    assert_eq!(host.ended(&quiet)["delivery"]["state"], "none");
    assert_eq!(host.take("good").len(), 1);
    wait_until("it is delivered", || delivery(&good) == "delivered");
    assert_eq!(messages(&host, "good"), [json!(null); 0]);
    // Delivered again where somebody asks for it.
    let (status, answer) = host.post(&format!("/jobs/{good}/redeliver"), &json!({}));
    assert_eq!(status, 202, "{answer}");
    wait_until("it is there again", || messages(&host, "good").len() == 1);
    let (status, answer) = host.post(&format!("/jobs/{good}/redeliver"), &json!({}));
    assert_eq!(
        (status, answer["detail"].as_str()),
        (409, Some("its result is on its way to the queue \"good\""))
    );
    let (status, answer) = host.post(&format!("/jobs/{quiet}/redeliver"), &json!({}));
    assert!(
        status == 409 && answer["detail"].as_str().unwrap().starts_with("no queue was named"),
        "{answer}"
    );
}

#[test]
fn what_may_help_is_tried_again_and_what_cannot_is_not() {
    let host = puppet("[app_settings.deployment_config]\nretries = 2");
    let once = host.job("puppet", &json!({"message": {"do": "fail once", "value": 1}}));
    let report = host.ended(&once);
    assert_eq!((&report["state"], &report["attempts"]), (&json!("succeeded"), &json!(2)), "{report}");
    let always = host.job("puppet", &json!({"message": {"do": "fail the batch"}}));
    wait_until("it waits for its next attempt", || {
        host.get(&format!("/jobs/{always}")).1["next_attempt_unix_ms"].is_u64()
    });
    let report = host.ended(&always);
    assert_eq!((&report["state"], &report["attempts"]), (&json!("failed"), &json!(3)), "{report}");
    assert!(report["error"].as_str().unwrap().contains("told to fail the batch"), "{report}");
    for what in ["fail", "refuse"] {
        let report = host.ended(&host.job("puppet", &json!({"message": {"do": what}})));
        assert_eq!((&report["state"], &report["attempts"]), (&json!("failed"), &json!(1)), "{report}");
    }
}

#[test]
fn a_key_for_once_gives_the_same_job_and_refuses_another_body() {
    let mut host = puppet("");
    let send = |host: &Host, key: &str, value: i64| {
        host.post_with("/predict_async", &json!({"message": {"value": value}}), &[("idempotency-key", key)])
    };
    let (_, first) = send(&host, "a", 1);
    assert_eq!(send(&host, "a", 1), (200, first.clone()));
    let (status, answer) = send(&host, "a", 2);
    assert_eq!(status, 409, "{answer}");
    assert!(answer["detail"].as_str().unwrap().contains(first["job_id"].as_str().unwrap()), "{answer}");
    assert_ne!(send(&host, "b", 1).1, first);
    host.kill();
    host.start_again();
    wait_until("it is ready", || host.get("/readyz").0 == 200);
    assert_eq!(send(&host, "a", 1), (200, first), "also after a restart");
    let (status, answer) = send(&host, &"x".repeat(300), 1);
    assert_eq!((status, &answer["detail"][0]["loc"][1]), (422, &json!("idempotency-key")));
}

#[test]
fn a_job_can_be_taken_back_until_it_has_ended() {
    let host = puppet(ONE);
    let running = host
        .job("puppet", &json!({"message": {"do": "sleep", "ms": 1500, "value": 1}, "success_queue": "q"}));
    wait_until("it runs", || host.get(&format!("/jobs/{running}")).1["state"] == "running");
    assert!(host.text("/metrics").contains("modalkit_jobs{state=\"running\"} 1"));
    let queued = host.job("puppet", &json!({"message": {"value": 2}, "success_queue": "q"}));
    let (status, answer) = host.delete(&format!("/jobs/{queued}"));
    assert_eq!((status, &answer["state"]), (200, &json!("cancelled")), "{answer}");
    assert_eq!(host.get(&format!("/jobs/{queued}")).1["state"], "cancelled");
    let (status, answer) = host.delete(&format!("/jobs/{running}"));
    assert_eq!(status, 202, "{answer}");
    assert!(answer["detail"].as_str().unwrap().contains("can't be stopped"), "{answer}");
    assert_eq!(host.ended(&running)["state"], "cancelled");
    assert_eq!(host.delete(&format!("/jobs/{running}")).0, 200, "it is, whoever asks again");
    let ended = host.job("puppet", &json!({"message": {}}));
    assert_eq!(host.ended(&ended)["state"], "succeeded");
    assert_eq!(host.delete(&format!("/jobs/{ended}")).0, 409);
    assert_eq!(messages(&host, "q"), [json!(null); 0]);
    let unknown = "01890a5d-ac96-774a-8a3d-0b7b1c1b1c1b";
    for path in [format!("/jobs/{unknown}"), "/jobs/nonsense".to_owned()] {
        assert_eq!(host.delete(&path).0, 404);
    }
}

#[test]
fn a_caller_can_wait_for_a_job_and_its_deadline_ends_it() {
    let host = puppet(ONE);
    let job = host.job("puppet", &json!({"message": {"do": "sleep", "ms": 400}}));
    let begun = Instant::now();
    let (_, report) = host.get(&format!("/jobs/{job}?wait_ms=30000"));
    assert_eq!(report["state"], "succeeded", "{report}");
    assert!(begun.elapsed() < Duration::from_secs(20), "it was told when it had ended");
    let busy = host.job("puppet", &json!({"message": {"do": "sleep", "ms": 800}}));
    let (_, late) =
        host.post_with("/predict_async", &json!({"message": {}}), &[("x-request-timeout-ms", "100")]);
    let report = host.ended(late["job_id"].as_str().unwrap());
    assert_eq!((&report["state"], &report["attempts"]), (&json!("failed"), &json!(0)), "{report}");
    assert!(report["error"].as_str().unwrap().contains("deadline"), "{report}");
    let _ = host.ended(&busy);
    assert_eq!(host.get(&format!("/jobs/{job}?wait_ms=soon")).0, 422);
}

#[test]
fn jobs_are_listed_and_bounded() {
    let config = "[server]\njobs_max = 4\njobs_per_model_max = 3\n";
    let host = Setup::new().plugin("puppet").plugin("echo").config(config).ready();
    let blocker = host.job("puppet", &json!({"message": {"do": "sleep", "ms": 2000}}));
    let waiting: Vec<String> = (0..2).map(|_| host.job("puppet", &json!({"message": {}}))).collect();
    let (status, answer) = host.post("/predict_async?model_name=puppet", &json!({"message": {}}));
    assert_eq!(status, 429, "{answer}");
    assert!(answer["detail"].as_str().unwrap().contains("jobs_per_model_max"), "{answer}");
    // In all there may be one more, which waits for its model as long as that is asked for.
    let other = host.job("echo", &json!({"message": {"text": "a"}}));
    assert_eq!(host.ended(&other)["state"], "succeeded");
    let listed = |query: &str| {
        let (status, answer) = host.get(&format!("/jobs{query}"));
        assert_eq!(status, 200, "{answer}");
        let id = |job: &Value| job["job_id"].as_str().unwrap().to_owned();
        (answer["jobs"].as_array().unwrap().iter().map(id).collect::<Vec<_>>(), answer["next"].clone())
    };
    assert_eq!(listed("?model=echo").0, std::slice::from_ref(&other));
    wait_until("it runs", || listed("?state=running").0 == [blocker.clone()]);
    assert_eq!(listed("?state=queued").0.len(), 2);
    assert_eq!(listed("").0, [&other, &waiting[1], &waiting[0], &blocker].map(Clone::clone));
    let (first, next) = listed("?limit=3");
    let (rest, _) = listed(&format!("?limit=3&after={}", next.as_str().unwrap()));
    assert_eq!((first.len(), rest), (3, vec![blocker.clone()]));
    assert_eq!(host.get("/jobs?state=done").0, 422);
    for job in [&blocker, &waiting[0], &waiting[1]] {
        assert_eq!(host.ended(job)["state"], "succeeded");
    }
}

#[test]
fn a_result_that_is_not_delivered_in_time_is_given_up_and_can_be_sent_again() {
    // Nobody listens there.
    let config = format!(
        "[app_settings.queue_config]\nbackend = \"redis\"\nbroker_url = \"redis://127.0.0.1:{}\"\nallowed_queues = [\"results\"]\ndelivery_deadline_seconds = 1",
        modalkit_tests::free_port()
    );
    let host = puppet(&config);
    let job = host.job("puppet", &json!({"message": {}, "success_queue": "results"}));
    let delivery = || host.get(&format!("/jobs/{job}")).1["delivery"].clone();
    wait_until("it is given up", || delivery()["state"] == "dead");
    assert!(delivery()["error"].as_str().unwrap().contains("delivery_deadline_seconds"), "{}", delivery());
    let ended = host.ended(&job);
    assert_eq!(host.post(&format!("/jobs/{job}/redeliver"), &json!({})).0, 202);
    wait_until("it is given up again", || delivery()["state"] == "dead");
    assert_eq!(host.ended(&job)["finished_unix_ms"], ended["finished_unix_ms"], "it ended when it ended");
}

#[test]
fn a_damaged_journal_is_kept_and_started_over_only_where_somebody_says_so() {
    let mut host = puppet("");
    let job = host.job("puppet", &json!({"message": {}}));
    let _ = host.ended(&job);
    host.kill();
    let state = host.folder().join("state");
    fs::write(state.join("jobs.sqlite"), "this is no journal, and was one").unwrap();
    let run = |arguments: &[&str]| {
        Command::new(built().join("modalkit"))
            .args(["--config", host.folder().join("modalkit.toml").to_str().unwrap()])
            .args(arguments)
            .env("MODALKIT_SERVER__LISTEN", "127.0.0.1:0")
            .env("MODALKIT_SERVER__STATE_FOLDER", &state)
            .output()
            .unwrap()
    };
    for _ in 0..2 {
        let output = run(&[]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains("jobs.sqlite") && said.contains("--set-journal-aside"), "{said}");
    }
    let mut started = Ended(
        Command::new(built().join("modalkit"))
            .args([
                "--config",
                host.folder().join("modalkit.toml").to_str().unwrap(),
                "serve",
                "--set-journal-aside",
            ])
            .env("MODALKIT_SERVER__LISTEN", "127.0.0.1:0")
            .env("MODALKIT_SERVER__STATE_FOLDER", &state)
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap(),
    );
    let aside = || {
        let names =
            fs::read_dir(&state).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        // Its log goes with it.
        names
            .filter(|name| name.contains("damaged") && !name.ends_with("-wal") && !name.ends_with("-shm"))
            .collect::<Vec<_>>()
    };
    wait_until("it is set aside, and a new one is there", || {
        aside().len() == 1 && fs::metadata(state.join("jobs.sqlite")).is_ok_and(|file| file.len() > 100)
    });
    assert_eq!(fs::read_to_string(state.join(&aside()[0])).unwrap(), "this is no journal, and was one");
    modalkit_tests::signal(started.0.id(), "TERM");
    assert!(started.0.wait().unwrap().success());
}

/// A process that ends with this.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn results_go_into_a_file_by_a_plugin_that_is_dropped_into_the_volume() {
    let setup = Setup::new().plugin("puppet").plugin("queue-file");
    let results = setup.folder().join("results");
    let config = format!(
        "[app_settings.queue_config.backends.file]\nkind = \"plugin\"\nplugin = \"queue-file\"\nsettings = {{ folder = {results:?} }}\n[app_settings.queue_config.queues]\nanswers = \"file\""
    );
    let host = setup.config(&config).ready();
    assert_eq!(host.models(), 1, "a queue is no model");
    let job = host.job("puppet", &json!({"message": {"value": 9}, "success_queue": "answers"}));
    wait_until("it is delivered", || host.get(&format!("/jobs/{job}")).1["delivery"]["state"] == "delivered");
    let line: Value =
        serde_json::from_str(&fs::read_to_string(results.join("answers.jsonl")).unwrap()).unwrap();
    assert_eq!(line, json!({"job_id": job, "body": {"status": "success", "value": 9, "batch": 1}}));
}

/// Two hosts take from one queue, and one of them dies now and then.
fn hosts_share(broker: Broker) {
    let every = Duration::from_millis(700);
    let shared = Sharing { hosts: 2, messages: 200, every, broker, sleep_ms_max: 800 }.run();
    assert!(shared.kills > 0, "{shared:?}");
}

/// What needs Redis.
mod with_redis {
    use super::*;

    #[test]
    fn a_host_that_is_killed_goes_on_where_it_was() {
        let mut redis = brokers::redis(&[]);
        redis.start();
        let mut host = puppet(&format!(
            "[app_settings.queue_config]\nbackend = \"redis\"\nbroker_url = \"redis://127.0.0.1:{}\"\nallowed_queues = [\"results\"]",
            redis.port
        ));
        let envelope = |value: i64| json!({"message": {"value": value, "do": "sleep", "ms": 30}, "success_queue": "results"});
        let jobs: BTreeMap<String, i64> =
            (0..40).map(|value| (host.job("puppet", &envelope(value)), value)).collect();
        // Some have ended, one runs, others wait.
        wait_until("some are delivered", || brokers::redis_list(redis.port, "results").len() > 3);
        host.kill();
        redis.kill();
        host.start_again();
        wait_until("the rest has run", || {
            host.get("/jobs?state=queued").1["jobs"].as_array().is_some_and(Vec::is_empty)
        });
        assert!(host.get("/jobs?delivery=pending").1["jobs"].as_array().unwrap().len() > 3);
        wait_until("it says who is away", || {
            host.get("/readyz").1["queues_not_usable"]["redis"]["error"].is_string()
        });
        assert_eq!(host.get("/readyz").0, 200, "a broker that is away keeps nobody out");
        redis.start();
        wait_until("all are delivered", || {
            jobs.keys().all(|job| host.get(&format!("/jobs/{job}")).1["delivery"]["state"] == "delivered")
        });
        let mut found: Vec<i64> = brokers::redis_list(redis.port, "results")
            .iter()
            .map(|body| serde_json::from_slice::<Value>(body).unwrap()["value"].as_i64().unwrap())
            .collect();
        found.sort_unstable();
        let delivered = found.len();
        found.dedup();
        assert_eq!(found, (0..40).collect::<Vec<i64>>(), "{delivered} messages");
        for (job, value) in &jobs {
            assert_eq!(host.ended(job)["result"]["value"], *value, "no result belongs to another job");
        }
    }

    #[test]
    fn a_broker_that_refuses_this_host_is_told_of_and_stops_nothing() {
        let mut redis = brokers::redis(&["--requirepass", "right"]);
        redis.start();
        let host = Setup::new()
        .plugin("puppet")
        .config(&format!(
            "[app_settings.queue_config]\nallowed_queues = [\"main://q\"]\n[app_settings.queue_config.backends.main]\nkind = \"redis\"\nbroker_url = \"redis://127.0.0.1:{}\"\npassword = \"{}\"",
            redis.port, modalkit_tests::SECRET
        ))
        .start();
        let mut ready = json!(null);
        wait_until("it is known", || {
            ready = host.get("/readyz").1;
            ready["queues_not_usable"]["main"]["denied"] == true
        });
        assert_eq!(host.get("/readyz").0, 200, "synchronous callers need no broker");
        let line = host.log_line("does not let this host in");
        assert_eq!(line["level"], "ERROR", "{line}");
        wait_until("it serves all the same", || host.post("/predict_sync", &json!({"value": 1})).0 == 200);
        let job = host.job("puppet", &json!({"message": {}, "success_queue": "main://q"}));
        assert_eq!(host.ended(&job)["state"], "succeeded");
        assert_eq!(host.get(&format!("/jobs/{job}")).1["delivery"]["state"], "pending");
    }

    #[test]
    fn requests_from_a_queue_are_run_once_and_acknowledged_when_their_results_are_on_disk() {
        let mut redis = brokers::redis(&[]);
        redis.start();
        let config = format!(
            "[app_settings.queue_config]\nbackend = \"main\"\ndead_letter_queue = \"dead\"\nallowed_queues = [\"results\", \"bad\"]\n\
         [app_settings.queue_config.backends.main]\nkind = \"redis\"\nbroker_url = \"redis://127.0.0.1:{}\"\nredis_type = \"stream\"\n\
         [[app_settings.queue_config.consume]]\nqueue = \"requests\"\nmodel = \"puppet\"\nin_flight_max = 4\nvisibility_seconds = 2\n",
            redis.port
        );
        let mut host = puppet(&config);
        let mut connection = brokers::redis_connection(redis.port);
        let mut add = |body: &str| {
            let _: String = brokers::xadd(&mut connection, "requests", body);
        };
        for value in 0..10 {
            add(&json!({"message": {"value": value, "do": "sleep", "ms": 200}, "success_queue": "results"})
                .to_string());
        }
        add("no JSON at all");
        add(r#"{"message": {"ms": "x"}, "failure_queue": "bad"}"#);
        add(r#"{"massage": {}, "failure_queue": "bad"}"#);
        // Nobody asks what became of these: they name no failure queue.
        add(r#"{"message": {"ms": "y"}}"#);
        add(r#"[{"ms": 1}]"#);
        wait_until("some are taken", || !brokers::redis_stream(redis.port, "results").is_empty());
        assert!(
            host.get("/jobs?state=queued").1["jobs"].as_array().unwrap().len() <= 4,
            "no more is taken than may be in flight"
        );
        // Longer than their visibility, so that what nobody extends would come again.
        host.kill();
        thread::sleep(Duration::from_millis(200));
        host.start_again();
        let results = || {
            let mut values: Vec<i64> = brokers::redis_stream(redis.port, "results")
                .iter()
                .map(|(body, _)| serde_json::from_slice::<Value>(body).unwrap()["value"].as_i64().unwrap())
                .collect();
            values.sort_unstable();
            values
        };
        wait_until("all have results", || {
            let mut values = results();
            values.dedup();
            values == (0..10).collect::<Vec<i64>>()
        });
        let bodies = |queue: &str| -> Vec<Value> {
            brokers::redis_stream(redis.port, queue)
                .iter()
                .map(|(body, _)| serde_json::from_slice(body).unwrap())
                .collect()
        };
        wait_until("those that are no requests are told", || {
            bodies("dead").len() == 3 && bodies("bad").len() == 2
        });
        let dead: Vec<Value> = bodies("dead").iter().map(|body| body["original_message"].clone()).collect();
        for original in [json!("no JSON at all"), json!({"message": {"ms": "y"}}), json!([{"ms": 1}])] {
            assert!(dead.contains(&original), "{original} is not among {dead:?}");
        }
        assert_eq!(host.log_line("a request from a queue failed and names no failure queue")["to"], "dead");
        let errors: Vec<String> =
            bodies("bad").iter().map(|body| body["error"].as_str().unwrap().to_owned()).collect();
        assert!(errors.iter().any(|error| error.contains("massage")), "{errors:?}");
        wait_until("everything is acknowledged", || brokers::redis_stream(redis.port, "requests").is_empty());
        assert!(results().len() <= 14, "what was running when the host died ran twice at most");
    }

    #[test]
    fn hosts_share_a_stream_of_redis() {
        hosts_share(Broker::Redis);
    }

    /// The short form of `cargo xtask soak jobs`.
    #[test]
    fn jobs_survive_hosts_and_brokers_that_are_killed() {
        let chaos = Chaos { rounds: 3, jobs: 100, clients: 8, ..Default::default() };
        let counted = chaos.run();
        assert!(counted.accepted > 0 && counted.lost == 0 && counted.foreign == 0, "{counted:?}");
    }
}

/// What needs moto, which speaks SQS.
mod with_moto {
    use super::*;

    #[test]
    fn hosts_share_a_queue_of_sqs() {
        hosts_share(Broker::Sqs);
    }

    #[test]
    fn a_message_that_a_broker_never_takes_is_dead_and_can_be_sent_again() {
        let mut moto = brokers::moto(false);
        moto.start();
        let backend = |limit: usize| {
            format!(
                "[app_settings.queue_config]\nbackend = \"sqs\"\nallowed_queues = [\"results\"]\n[app_settings.queue_config.backends.sqs]\nbroker_url = \"http://127.0.0.1:{}/\"\n\
             access_key_id = \"k\"\nsecret_access_key = \"s\"\nmessage_bytes_max = {limit}",
                moto.port
            )
        };
        let mut host = puppet(&backend(300));
        let envelope =
            json!({"message": {"value": 1}, "success_queue": "results", "meta": {"x": "y".repeat(400)}});
        let job = host.job("puppet", &envelope);
        let mut report = json!(null);
        wait_until("it is given up", || {
            report = host.get(&format!("/jobs/{job}")).1;
            report["delivery"]["state"] == "dead"
        });
        assert!(report["delivery"]["error"].as_str().unwrap().contains("message_bytes_max"), "{report}");
        assert_eq!(report["result"]["value"], 1, "the result is there all the same");
        assert!(
            host.text("/metrics").contains("modalkit_deliveries_total{backend=\"sqs\",outcome=\"dead\"} 1")
        );
        host.configure(&backend(1 << 20));
        host.kill();
        host.start_again();
        assert_eq!(host.post(&format!("/jobs/{job}/redeliver"), &json!({})).0, 202);
        wait_until("it is delivered", || {
            host.get(&format!("/jobs/{job}")).1["delivery"]["state"] == "delivered"
        });
        assert_eq!(brokers::sqs_drain(moto.port, "results").len(), 1);
    }
}

/// What needs a small file system, which only root may mount.
mod with_mount {
    use super::*;

    /// A file system of its own size, that vanishes with this.
    struct SmallDisk<'f>(&'f Path);

    impl<'f> SmallDisk<'f> {
        fn mount(folder: &'f Path, bytes: u64) -> Self {
            fs::create_dir_all(folder).unwrap();
            let options = format!("size={bytes}");
            let mounted =
                Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tests"]).arg(folder).output();
            assert!(
                mounted.is_ok_and(|output| output.status.success()),
                "a small file system can't be mounted: run the tests as root, or leave this out with `cargo xtask test --without mount`"
            );
            Self(folder)
        }

        fn grow(&self, bytes: u64) {
            let options = format!("remount,size={bytes}");
            assert!(Command::new("mount").args(["-o", &options]).arg(self.0).status().unwrap().success());
        }
    }

    impl Drop for SmallDisk<'_> {
        fn drop(&mut self) {
            // Lazily: a host may still have it open.
            let _ = Command::new("umount").arg("-l").arg(self.0).status();
        }
    }

    #[test]
    fn a_full_disk_refuses_new_jobs_and_loses_none_that_was_accepted() {
        const DISK: u64 = 8 << 20;
        let setup = Setup::new().plugin("puppet").plugin("queue-file");
        let (state, results) = (setup.folder().join("state"), setup.folder().join("results"));
        let disk = SmallDisk::mount(&state, DISK);
        // Results go where they outlive the host.
        let config = format!(
            "[app_settings.batch_config]\nmax_batch_size = 8\n[app_settings.deployment_config]\nretries = 100\n\
             [app_settings.queue_config]\nallowed_queues = [\"file://*\"]\n\
             [app_settings.queue_config.backends.file]\nkind = \"plugin\"\nplugin = \"queue-file\"\nsettings = {{ folder = {results:?} }}"
        );
        let mut host = setup.config(&config).ready();
        let padding = "x".repeat(20_000);
        let send = |host: &Host, value: i64, what: &str| {
            // Longer than it takes to fill the disk and look at the host, on a slow machine too.
            let message = json!({"value": value, "do": what, "ms": 6000});
            let envelope =
                json!({"message": message, "success_queue": "file://results", "meta": {"padding": padding}});
            host.post("/predict_async", &envelope)
        };
        // Those at the head take their time, so that the others wait, and fill the disk.
        let (mut accepted, mut refused) = (Vec::new(), 0);
        for value in 0..2000 {
            let (status, answer) = send(&host, value, if value < 2 { "sleep" } else { "" });
            match status {
                200 => accepted.push(value),
                503 => {
                    assert!(answer["detail"].as_str().unwrap().contains("full"), "{answer}");
                    refused += 1;
                }
                other => panic!("{other}: {answer}"),
            }
            if refused > 20 {
                break;
            }
        }
        assert!(refused > 0, "{} were accepted on a disk of {DISK} bytes", accepted.len());
        assert_eq!(host.get("/livez").0, 200);
        assert_eq!(
            host.post("/predict_sync", &json!({"value": 1})).0,
            200,
            "other requests are served as before"
        );
        let _ = host.log_line("the journal of jobs can't be written");
        assert_eq!(host.metric("modalkit_journal_writable"), 0.0);
        assert!(host.get("/readyz").1["journal_not_writable"].as_str().unwrap().contains("full"));

        // The host dies, and starts, while the disk is full. Then space returns.
        host.kill();
        host.start_again();
        disk.grow(8 * DISK);
        wait_until("jobs are accepted again", || send(&host, 5000, "").0 == 200);
        assert_eq!(host.metric("modalkit_journal_writable"), 1.0);
        wait_until("all have a result", || {
            let lines = fs::read_to_string(results.join("results.jsonl")).unwrap_or_default();
            let value = |line: &str| serde_json::from_str::<Value>(line).ok()?["body"]["value"].as_i64();
            let found: Vec<i64> = lines.lines().filter_map(value).collect();
            accepted.iter().all(|value| found.contains(value))
        });
    }
}
