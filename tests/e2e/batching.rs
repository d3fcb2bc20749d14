//! Requests that come together run together, and replicas come and go with the work.

use std::thread;

use modalkit_tests::{Host, Setup, wait_until};
use serde_json::{Value, json};

fn together(host: &Host, bodies: &[Value]) -> Vec<Value> {
    thread::scope(|scope| {
        let callers: Vec<_> =
            bodies.iter().map(|body| scope.spawn(|| host.post("/predict_sync", body).1)).collect();
        callers.into_iter().map(|caller| caller.join().expect("a caller doesn't panic")).collect()
    })
}

#[test]
fn callers_that_come_together_share_a_batch_and_each_gets_its_own_answer() {
    let config = "[app_settings.batch_config]\nmax_batch_size = 8\nwait_ms = 2000";
    let host = Setup::new().plugin("puppet").config(config).ready();
    let bodies: Vec<Value> = (0..8).map(|value| json!({"value": value})).collect();
    for (value, answer) in together(&host, &bodies).iter().enumerate() {
        assert_eq!(*answer, json!({"status": "success", "value": value, "batch": 8}));
    }
    assert_eq!(host.metric(r#"modalkit_batches_closed_total{model="puppet",reason="full"}"#), 1.0);
}

#[test]
fn an_incomplete_batch_runs_when_it_has_waited() {
    let config = "[app_settings.batch_config]\nmax_batch_size = 8\nwait_ms = 20";
    let host = Setup::new().plugin("puppet").config(config).ready();
    assert_eq!(host.post("/predict_sync", &json!({"value": 1})).1["batch"], 1);
    assert_eq!(host.metric(r#"modalkit_batches_closed_total{model="puppet",reason="waited"}"#), 1.0);
}

#[test]
fn synchronous_and_asynchronous_jobs_share_a_batch() {
    let config = "[app_settings.batch_config]\nmax_batch_size = 2\nwait_ms = 5000";
    let host = Setup::new().plugin("puppet").config(config).ready();
    let (_, accepted) = host.post("/predict_async", &json!({"message": {"value": 1}}));
    assert_eq!(host.post("/predict_sync", &json!({"value": 2})).1["batch"], 2);
    let path = format!("/jobs/{}", accepted["job_id"].as_str().unwrap());
    wait_until("the job is done", || host.get(&path).1["state"] == "succeeded");
    assert_eq!(host.get(&path).1["result"]["batch"], 2);
}

#[test]
fn batches_in_flight_share_one_replica() {
    let config = "[app_settings.deployment_config]\nallow_concurrent_inputs = 4";
    let host = Setup::new().plugin("puppet").config(config).ready();
    thread::scope(|scope| {
        let slow: Vec<_> = (0..3)
            .map(|_| scope.spawn(|| host.post("/predict_sync", &json!({"do": "sleep", "ms": 800})).0))
            .collect();
        wait_until("all three run", || {
            host.metric(r#"modalkit_batch_size_items_count{model="puppet"}"#) == 3.0
        });
        assert_eq!(
            host.post("/predict_sync", &json!({"value": 4})).1["value"],
            4,
            "a fourth runs beside them"
        );
        assert_eq!(host.metric(r#"modalkit_stage_seconds_count{model="puppet",stage="predict"}"#), 1.0);
        slow.into_iter().for_each(|caller| assert_eq!(caller.join().unwrap(), 200));
    });
    assert_eq!(host.metric(r#"modalkit_replicas{model="puppet"}"#), 1.0);
}

#[test]
fn replicas_are_added_under_a_backlog_and_retired_when_it_is_gone() {
    let config = "[app_settings.deployment_config]\nconcurrency_limit = 3\ncontainer_idle_timeout = 1";
    let host = Setup::new().plugin("puppet").config(config).ready();
    let replicas = || host.metric(r#"modalkit_replicas{model="puppet"}"#);
    assert_eq!(replicas(), 1.0);
    let bodies: Vec<Value> = (0..24).map(|value| json!({"do": "sleep", "ms": 100, "value": value})).collect();
    thread::scope(|scope| {
        let load = scope.spawn(|| together(&host, &bodies));
        wait_until("there are more", || replicas() > 1.0);
        for (value, answer) in load.join().unwrap().iter().enumerate() {
            assert_eq!(answer["value"], value);
        }
    });
    assert!(replicas() <= 3.0);
    wait_until("there is one again", || replicas() == 1.0);
    wait_until("the others left", || {
        host.log().iter().filter(|line| line["message"] == "puppet leaves").count() > 0
    });
}

#[test]
fn a_model_kept_at_no_replica_wakes_with_the_first_request() {
    let config = "[app_settings.deployment_config]\nmin_replicas = 0\ncontainer_idle_timeout = 1";
    let host = Setup::new().plugin("puppet").config(config).ready();
    wait_until("it sleeps", || host.metric(r#"modalkit_replicas{model="puppet"}"#) == 0.0);
    assert_eq!(host.get("/readyz").0, 200);
    assert_eq!(host.post("/predict_sync", &json!({"value": 1})).1["value"], 1);
    let (status, body) = host.post("/predict_sync", &json!({"ms": 60_001}));
    assert_eq!((status, &body["detail"][0]["loc"]), (422, &json!(["body", "ms"])));
}
