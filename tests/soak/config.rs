//! Changes of the configuration under load: models come, change, break and go, fifty times.

use std::{thread, time::Duration};

use modalkit_tests::{
    Host, Setup, Version,
    load::{ECHO, Load, Requests},
};
use serde_json::{Value, json};

const ROUNDS: usize = 50;
const CONNECTIONS: usize = 16;

/// A model that is there at times: it answers, or nobody knows it. Nothing else may happen to a request.
const COMES_AND_GOES: Requests = Requests {
    path: "/predict_sync?model_name=guest",
    body: r#"{"text": "a"}"#,
    statuses: &[200, 404, 503],
    check: |answer| {
        let detail = answer["detail"].as_str().unwrap_or_default();
        // One that was found a moment before it went is told so.
        let gone =
            ["no model named", "is loading", "waits for its plugin", "stopped serving", "shutting down"];
        if answer["text"] == "A" || gone.iter().any(|words| detail.contains(words)) {
            return Ok(0);
        }
        Err(answer.to_string())
    },
};

fn entries(host_settings: &str, guest: Option<&str>) -> String {
    let guest = guest.map(|settings| {
        format!("[model_settings.model_entries.guest]\nplugin = \"versioned\"\n{settings}\n")
    });
    format!(
        "[server]\nlog = \"off,modalkit::app=info\"\n[model_settings.model_entries.echo]\n{host_settings}\n{}",
        guest.unwrap_or_default()
    )
}

fn apply(host: &mut Host, config: &str, expected: &str) -> Value {
    host.configure(config);
    let (_, change) = host.post("/config/reload", &json!({}));
    // The host may have seen the file before it was asked.
    assert!(
        change["outcome"] == expected || change["outcome"] == "unchanged",
        "expected {expected}, found {change}"
    );
    change
}

pub(crate) fn fifty_changes() {
    let setup = Setup::new().plugin("echo").config(&entries("", None));
    Version::good(1).install(&setup.volume());
    let mut host = setup.ready();
    let steady = Load::start(host.address, CONNECTIONS, ECHO);
    let guests = Load::start(host.address, 2, COMES_AND_GOES);
    for round in 0..ROUNDS {
        let batches =
            format!("batch_config = {{ max_batch_size = {}, wait_ms = {} }}", 1 + round % 8, round % 3);
        let replicas =
            format!("deployment_config = {{ min_replicas = {}, concurrency_limit = 4 }}", 1 + round % 3);
        // Added; changed, and echo with it; broken, each time in another way; a new generation of echo; removed.
        apply(&mut host, &entries("", Some("")), "applied");
        apply(
            &mut host,
            &entries(&format!("{batches}\n{replicas}"), Some("batch_config = { max_batch_size = 2 }")),
            "applied",
        );
        let broken = ["max_batch_size = 0", "wait_ms = \"soon\"", "no_such_key = 1"][round % 3];
        let change = apply(&mut host, &entries(&format!("batch_config = {{ {broken} }}"), None), "refused");
        assert_ne!(change["outcome"], "unchanged", "{change}");
        let lanes = format!("deployment_config = {{ batches_in_flight = {} }}", 1 + round % 2);
        apply(&mut host, &entries(&lanes, Some("batch_config = { max_batch_size = 2 }")), "applied");
        apply(&mut host, &entries("", None), "applied");
    }
    thread::sleep(Duration::from_millis(500));
    let (steady, guests) = (steady.stop(), guests.stop());
    println!(
        "{ROUNDS} rounds of 5 changes: {} answers to {CONNECTIONS} callers of a model that changed with each, {} to 2 callers of one that came and went; {} and {} wrong or lost",
        steady.right, guests.right, steady.wrong, guests.wrong
    );
    steady.assert_faultless();
    guests.assert_faultless();
    assert_eq!(host.model("echo")["state"], "ready");
}
