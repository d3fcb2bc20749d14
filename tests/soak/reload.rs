//! 200 reloads in a row under load, in rounds that take turns with quiet ones of the same length: whether anybody notices.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use modalkit_tests::{
    Host, Setup, Version,
    load::{ECHO, Load, Requests, Served, VERSIONED},
    put, version, wait_until,
};

const RELOADS: u64 = 200;
const ROUNDS: u64 = 5;
/// Between the writing of a round's files and the round.
const SETTLE: Duration = Duration::from_millis(500);

/// At 8 and at 64 connections.
pub(crate) fn alone() {
    for connections in [8, 64] {
        measure(connections, VERSIONED, &[]);
    }
}

/// The same while another model serves as many callers, whose times are measured.
pub(crate) fn beside_another_model() {
    for connections in [8, 64] {
        measure(connections, ECHO, &[(connections, VERSIONED)]);
    }
}

struct Phase {
    from: Instant,
    until: Instant,
}

fn measure(connections: usize, measured: Requests, beside: &[(usize, Requests)]) {
    let setup = Setup::new().plugin("echo").config("[server]\nlog = \"warn,modalkit::app=info\"");
    Version::good(1).install(&setup.volume());
    let host = setup.ready();
    let load = Load::start(host.address, connections, measured);
    let others: Vec<Load> = beside
        .iter()
        .map(|(connections, requests)| Load::start(host.address, *connections, *requests))
        .collect();
    let reloaded = others.first().unwrap_or(&load);
    thread::sleep(Duration::from_secs(1));

    let (mut quiet, mut busy, mut times) = (Vec::new(), Vec::new(), Vec::new());
    let mut phases: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    let mut version = 1;
    for _ in 0..ROUNDS {
        // Written before, so that it is not the machine's work while callers are timed.
        let next: Vec<(u64, PathBuf)> = (version + 1..=version + RELOADS / ROUNDS)
            .map(|number| {
                let written = host.volume().join(format!("{number}.part"));
                put(&Version::good(number).bytes(), &written);
                (number, written)
            })
            .collect();
        thread::sleep(SETTLE);
        let from = Instant::now();
        for (number, written) in next {
            version = number;
            times.push(reload(&host, reloaded, number, &written));
        }
        let until = Instant::now();
        busy.push(Phase { from, until });
        thread::sleep(until - from);
        quiet.push(Phase { from: until, until: Instant::now() });
        note_phases(&host, &mut phases);
    }
    assert_eq!(host.report("versioned")["generation"]["number"], RELOADS + 1);
    let served = load.stop();
    served.assert_faultless();
    for other in others {
        other.stop().assert_faultless();
    }
    report(connections, &served, &quiet, &busy, times);
    for (phase, times) in phases {
        println!("  {phase}: {:.2}", median(times));
    }
}

/// What the host says of its last changes.
fn note_phases(host: &Host, phases: &mut BTreeMap<String, Vec<f64>>) {
    let report = host.report("versioned");
    for entry in report["history"].as_array().into_iter().flatten() {
        for (phase, took) in entry["phases"].as_object().into_iter().flatten() {
            phases.entry(phase.clone()).or_default().extend(took.as_f64());
        }
    }
}

/// From the rename to the first answer of the new code.
fn reload(host: &Host, load: &Load, number: u64, written: &Path) -> Duration {
    let renamed = Instant::now();
    fs::rename(written, version::path(&host.volume())).expect("the file is renamed");
    wait_until("the new version answers", || load.newest() == number);
    renamed.elapsed()
}

fn report(connections: usize, served: &Served, quiet: &[Phase], busy: &[Phase], mut times: Vec<Duration>) {
    let percentiles = |phases: &[Phase], share: f64| {
        median(phases.iter().map(|phase| served.percentile(share, phase.from, phase.until)).collect())
    };
    times.sort();
    let at =
        |share: f64| times[((times.len() as f64 * share) as usize).min(times.len() - 1)].as_secs_f64() * 1e3;
    println!("{connections} connections, {} right answers, none wrong, {RELOADS} reloads:", served.right);
    for (name, share) in [("p50", 0.5), ("p99", 0.99)] {
        let (quiet, busy) = (percentiles(quiet, share), percentiles(busy, share));
        println!(
            "  {name} ms: quiet {quiet:.3}, during reloads {busy:.3} = {:.2} x (medians of {ROUNDS} rounds)",
            busy / quiet
        );
    }
    println!("  rename to first answer, ms: p50 {:.0}, p95 {:.0}, max {:.0}", at(0.5), at(0.95), at(1.0));
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
