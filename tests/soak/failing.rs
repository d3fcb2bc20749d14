//! Updates that fail, each in its own way, under load: what callers see of them, and how soon the old generation is back.

use std::{
    thread,
    time::{Duration, Instant},
};

use modalkit_tests::{
    Setup, Version,
    load::{Load, VERSIONED},
    put, version, wait_until,
};
use serde_json::json;

const CONNECTIONS: usize = 16;
const BATCHES_MIN: u64 = 10;
const LANES: u64 = 2;

pub(crate) fn updates() {
    let config = format!(
        "[server]\nlog = \"off,modalkit::app=info\"\n[app_settings.deployment_config]\nprobation_seconds = 10\nprobation_batches_min = {BATCHES_MIN}\nbatches_in_flight = {LANES}\n\
         [model_settings.model_entries.versioned]\ngolden = \"golden.json\"\ngolden_latency_ms = 20"
    );
    let setup = Setup::new().config(&config);
    let golden = json!({"text": "GOLD", "version": 0, "data": "", "hooks": 0});
    put(
        json!([{"input": {"text": "gold"}, "output": golden, "tolerance": 1000}]).to_string().as_bytes(),
        &setup.volume().join("golden.json"),
    );
    Version::good(1).install(&setup.volume());
    let host = setup.ready();
    // Not an update that a golden request would notice: errors only under load.
    for (what, bytes) in [
        ("bad ELF", b"no library at all, however long one looks at it, whatever the linker may say".to_vec()),
        ("wrong golden answer", Version::bad(2, "wrong").bytes()),
        ("slow golden answer", Version::bad(3, "slow").bytes()),
        ("errors in probation", Version::bad(4, "fails-later").bytes()),
    ] {
        let load = Load::start(host.address, CONNECTIONS, VERSIONED);
        thread::sleep(Duration::from_secs(2));
        let changes = host.report("versioned")["history"].as_array().map_or(0, Vec::len);
        let begun = Instant::now();
        put(&bytes, &version::path(&host.volume()));
        let mut entry = json!(null);
        wait_until("it has ended", || {
            let history = host.report("versioned")["history"].clone();
            entry = history[0].clone();
            history.as_array().map_or(0, Vec::len) > changes && entry["outcome"] != "swapped"
        });
        let took = begun.elapsed();
        thread::sleep(Duration::from_secs(1));
        let served = load.stop();
        println!(
            "{what}: {} after {:.0} ms, {} of {} requests failed; {}",
            entry["outcome"],
            took.as_secs_f64() * 1e3,
            served.wrong,
            served.right + served.wrong,
            entry["reason"]
        );
        assert!(took < Duration::from_secs(10), "longer than probation_seconds");
        let allowed = if what == "errors in probation" { BATCHES_MIN + LANES } else { 0 };
        assert!(served.wrong <= allowed, "{} failed, {allowed} may: {:#?}", served.wrong, served.faults);
        assert_eq!(host.report("versioned")["generation"]["number"], 1);
    }
}
