//! Many people at the same controls: 1,024 reloads, rollbacks and lists from 32 threads, under load.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

use modalkit_tests::{
    Setup,
    load::{ECHO, Load},
};
use serde_json::Value;

const THREADS: u64 = 32;
const ROUNDS: u64 = 1024;

pub(crate) fn of_32_threads() {
    let config = "[server]\nlog = \"error,modalkit::app=info\"\n[app_settings.deployment_config]\nprobation_seconds = 1";
    let host = Setup::new().plugin("echo").config(config).ready();
    let load = Load::start(host.address, 8, ECHO);
    let round = AtomicU64::new(0);
    let outcomes = Mutex::new(BTreeMap::<String, u64>::new());
    thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                loop {
                    let number = round.fetch_add(1, Ordering::SeqCst);
                    if number >= ROUNDS {
                        return;
                    }
                    let (what, (status, body)) = match number % 3 {
                        0 => ("reload", host.post("/models/echo/reload", &Value::Null)),
                        1 => ("rollback", host.post("/models/echo/rollback", &Value::Null)),
                        _ => ("list", host.get("/models/echo")),
                    };
                    assert!(status == 200 || status == 409, "{what}: {status} {body}");
                    let outcome = format!("{what} {}", body["outcome"].as_str().unwrap_or("ok"));
                    *outcomes.lock().expect("no thread panics with it").entry(outcome).or_default() += 1;
                }
            });
        }
    });
    println!("{ROUNDS} rounds: {:?}", outcomes.lock().expect("nobody holds it"));
    let served = load.stop();
    served.assert_faultless();
    let report = host.report("echo");
    assert_eq!(report["state"], "ready", "{report:#}");
    println!("{} right answers, none wrong; {} generations", served.right, report["generations"]);
}
