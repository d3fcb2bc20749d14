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

/// In the host's process and in one of its own.
fn in_both(config: &str, test: impl Fn(&Host)) {
    for isolation in ["in-process", "process"] {
        let isolation = format!("\n[app_settings.deployment_config]\nisolation = \"{isolation}\"");
        test(&Setup::new().plugin("puppet").config(&(config.to_owned() + &isolation)).ready());
    }
}

#[test]
fn a_batch_costs_no_more_than_it_may_and_what_costs_more_runs_by_itself() {
    let config = "[app_settings.batch_config]\nmax_batch_size = 8\nmax_batch_cost = 10\nwait_ms = 2000";
    in_both(config, |host| {
        let batches_of = |costs: &[u64]| {
            let inputs: Vec<Value> = costs.iter().map(|cost| json!({"cost": cost})).collect();
            let (status, body) = host.post("/predict_batch", &json!(inputs));
            assert_eq!(status, 200, "{body}");
            let batches = body.as_array().unwrap().iter();
            batches.map(|output| output["batch"].as_u64().unwrap()).collect::<Vec<u64>>()
        };
        assert_eq!(batches_of(&[4, 4, 4, 6, 50, 10]), [2, 2, 2, 2, 1, 1]);
        assert_eq!(together(host, &[json!({"cost": 5}), json!({"cost": 5})])[0]["batch"], 2);
        assert_eq!(host.metric(r#"modalkit_batches_closed_total{model="puppet",reason="costly"}"#), 5.0);
        assert_eq!(host.metric(r#"modalkit_cost_total{model="puppet"}"#), 88.0);
        // A 4 beside a 6.
        assert_eq!(host.metric(r#"modalkit_padding_cost_total{model="puppet"}"#), 2.0);
        // Of jobs as well.
        let accepted = [5, 5]
            .map(|cost| host.post("/predict_async", &json!({"message": {"cost": cost}})).1["job_id"].clone());
        for id in accepted {
            let path = format!("/jobs/{}?wait_ms=5000", id.as_str().unwrap());
            assert_eq!(host.get(&path).1["result"]["batch"], 2);
        }
    });
}

#[test]
fn inputs_of_one_shape_share_a_batch_and_others_wait_no_longer_for_that() {
    let config = "[app_settings.batch_config]\nmax_batch_size = 2\nmax_batch_cost = 100\nwait_ms = 300";
    in_both(config, |host| {
        let inputs: Vec<Value> =
            [1, 2, 1, 3, 2, 1].iter().map(|shape| json!({"shape": shape, "value": shape})).collect();
        let (status, body) = host.post("/predict_batch", &json!(inputs));
        assert_eq!(status, 200, "{body}");
        let found: Vec<(i64, i64)> = body
            .as_array()
            .unwrap()
            .iter()
            .map(|output| (output["value"].as_i64().unwrap(), output["batch"].as_i64().unwrap()))
            .collect();
        assert_eq!(found, [(1, 2), (2, 2), (1, 2), (3, 1), (2, 2), (1, 1)]);
        assert_eq!(host.metric(r#"modalkit_batches_closed_total{model="puppet",reason="full"}"#), 2.0);
        assert_eq!(host.metric(r#"modalkit_batches_closed_total{model="puppet",reason="waited"}"#), 2.0);
    });
}

#[test]
fn an_adaptive_wait_fills_batches_of_many_callers() {
    const CALLERS: usize = 8;
    const REQUESTS: usize = 30;
    let config = "[app_settings.batch_config]\nmax_batch_size = 8\nwait_ms = \"adaptive\"";
    let host = Setup::new().plugin("puppet").config(config).ready();
    assert_eq!(host.get("/models/puppet").1["wait_ms"], "adaptive");
    let batches = || host.metric(r#"modalkit_batch_size_items_count{model="puppet"}"#);
    let body = json!({"do": "sleep", "ms": 10});
    // Where one waited for nobody, two groups of them would take turns.
    wait_until("more than five share a batch on average", || {
        let before = batches();
        thread::scope(|scope| {
            for _ in 0..CALLERS {
                scope.spawn(|| {
                    (0..REQUESTS).for_each(|_| assert_eq!(host.post("/predict_sync", &body).0, 200));
                });
            }
        });
        (CALLERS * REQUESTS) as f64 / (batches() - before) > 5.0
    });
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
