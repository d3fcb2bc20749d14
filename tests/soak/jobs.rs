//! Jobs while hosts and brokers are killed; hosts that share a queue; a million jobs through one host.

use std::{
    env, fs, thread,
    time::{Duration, Instant},
};

use modalkit_tests::{
    Setup,
    chaos::{Broker, Chaos, Sharing, Victim},
    load::{Load, Requests},
};

fn rounds() -> usize {
    env::var("MODALKIT_SOAK_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(200)
}

/// Hosts and brokers are killed while jobs come in.
pub(crate) fn chaos() {
    let whole = rounds();
    let others = (whole / 4).max(1);
    for (rounds, victim, broker) in [
        (whole, Victim::Host, Broker::Redis),
        (others, Victim::Broker, Broker::Redis),
        (others, Victim::Both, Broker::Redis),
        (others, Victim::Host, Broker::Sqs),
        (others, Victim::Broker, Broker::Sqs),
        (others, Victim::Both, Broker::Sqs),
    ] {
        let begun = Instant::now();
        let counted = Chaos { rounds, victim, broker, ..Chaos::default() }.run();
        println!(
            "{victim:?} killed in {rounds} rounds, results to {broker:?}: {} jobs accepted, {} lost, {} duplicates, {} foreign; {} more were accepted and not heard of; {:.0} s",
            counted.accepted,
            counted.lost,
            counted.duplicates,
            counted.foreign,
            counted.unheard,
            begun.elapsed().as_secs_f64()
        );
        assert!(counted.lost == 0 && counted.foreign == 0, "{counted:?}");
    }
}

/// Three hosts, one queue, and every two seconds one of them dies.
pub(crate) fn sharing() {
    for broker in [Broker::Redis, Broker::Sqs] {
        let every = Duration::from_secs(2);
        let shared = Sharing { hosts: 3, messages: 10_000, every, broker, sleep_ms_max: 180 }.run();
        println!(
            "3 hosts, 10,000 requests in {broker:?}: {} answered in {:.1} s, {} hosts killed, {} duplicates",
            shared.answered,
            shared.took.as_secs_f64(),
            shared.kills,
            shared.duplicates
        );
        assert!(shared.kills as f64 + 1.0 >= shared.took.as_secs_f64() / 4.0, "{shared:?}");
    }
}

const JOBS: u64 = 1_000_000;
/// Of how many jobs a rate is taken.
const PART: u64 = 100_000;

const ECHO: Requests = Requests {
    path: "/predict_async",
    body: r#"{"message": {"text": "a small request that is echoed"}, "success_queue": "results"}"#,
    statuses: &[200],
    check: |answer| if answer["job_id"].is_string() { Ok(0) } else { Err(answer.to_string()) },
};

/// A million jobs, whose results somebody takes.
pub(crate) fn a_million() {
    let config = "[server]\nlog = \"warn,modalkit::app=info\"\njob_retention_seconds = 10\n";
    let host = Setup::new().plugin("echo").config(config).ready();
    let journal = host.folder().join("state/jobs.sqlite");
    let load = Load::start(host.address, 32, ECHO);
    let mut parts: Vec<(f64, f64, f64)> = Vec::new();
    let (mut taken, mut begun, mut receipt) = (0u64, Instant::now(), String::new());
    while taken < JOBS {
        // One call acknowledges what the one before took, and takes the next.
        let answer = host.delete(&format!("/queues/results?limit=1000{receipt}")).1;
        receipt = answer["receipt"].as_str().map(|receipt| format!("&receipt={receipt}")).unwrap_or_default();
        let count = answer["messages"].as_array().map_or(0, Vec::len) as u64;
        if count == 0 {
            thread::sleep(Duration::from_millis(5));
        }
        if (taken + count) / PART > taken / PART {
            let rate = PART as f64 / begun.elapsed().as_secs_f64();
            let size = fs::metadata(&journal).map_or(0.0, |file| file.len() as f64 / 1e6);
            let memory = host.metric("modalkit_resident_bytes") / 1e6;
            println!(
                "{:>9} jobs: {rate:.0} jobs/s, journal {size:.0} MB, resident {memory:.0} MB",
                taken + count
            );
            parts.push((rate, size, memory));
            begun = Instant::now();
        }
        taken += count;
    }
    let served = load.stop();
    served.assert_faultless();
    // The first part warms up.
    let mean = |parts: &[(f64, f64, f64)]| parts.iter().map(|part| part.0).sum::<f64>() / parts.len() as f64;
    let (first, last) = (mean(&parts[1..4]), mean(&parts[parts.len() - 3..]));
    println!("rate at the end {:.2} of that at the start", last / first);
    let (early, late) = (parts[1], parts[parts.len() - 1]);
    assert!(late.1 < 4.0 * early.1.max(50.0), "the journal grows: {early:?} {late:?}");
    assert!(late.2 < 2.0 * early.2, "memory grows: {early:?} {late:?}");
}
