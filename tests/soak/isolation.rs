//! Workers under load: inputs that end them, `kill -9` from outside, and reloads by the thousand. Each part asserts that no answer was wrong,
//! and prints what was lost and how long it took.

use std::{
    collections::BTreeMap,
    env, fs,
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use modalkit_tests::{
    Host, Setup, Version,
    load::{Load, VERSIONED},
    poison::Poison,
    wait_until,
};
use serde_json::json;

const PROCESS: &str = "[app_settings.deployment_config]\nisolation = \"process\"\n";
const CLIENTS: usize = 64;
/// One input in so many is bad.
const BAD_ONE_IN: u64 = 50;
const KILLERS: [&str; 9] = [
    "segfault",
    "abort",
    "exit",
    "leak",
    "spin",
    "panic in a destructor",
    "fork and abort",
    "close descriptors",
    "garbage",
];
/// Minutes of `killers` and of `kills`, and reloads, where MODALKIT_SOAK_SHARE doesn't ask for a part of them.
const KILLERS_MINUTES: f64 = 10.0;
const KILLS_MINUTES: f64 = 2.0;
const RELOADS: f64 = 1000.0;
/// Reloads between two looks at memory.
const RELOADS_BETWEEN_LOOKS: u64 = 100;
const POISONED_JOBS: f64 = 10_000.0;
const POISON: u64 = 10;
const BETWEEN_KILLS: Duration = Duration::from_millis(200);

/// A smaller trial says so.
fn share() -> f64 {
    env::var("MODALKIT_SOAK_SHARE").ok().and_then(|share| share.parse().ok()).unwrap_or(1.0)
}

fn minutes(minutes: f64) -> Duration {
    Duration::from_secs_f64(minutes * 60.0 * share())
}

fn host(more: &str) -> Host {
    let config = format!(
        "[server]\nlog = \"error,modalkit::app=info\"\nrequest_timeout_ms = 120000\n[app_settings.batch_config]\nmax_batch_size = 8\nwait_ms = 2\n{PROCESS}{more}"
    );
    Setup::new().plugin("killer").config(&config).ready()
}

/// What clients saw.
#[derive(Default)]
struct Seen {
    good: AtomicU64,
    bad: AtomicU64,
    wrong: AtomicU64,
    failed: AtomicU64,
    latencies: Mutex<Vec<f64>>,
    said: Mutex<BTreeMap<String, u64>>,
}

impl Seen {
    fn percentile(&self, share: f64) -> f64 {
        let mut latencies = self.latencies.lock().expect("nobody panics with it").clone();
        latencies.sort_by(f64::total_cmp);
        latencies.get((latencies.len() as f64 * share) as usize).copied().unwrap_or_default() * 1e3
    }

    fn note(&self, what: &str) {
        *self
            .said
            .lock()
            .expect("nobody panics with it")
            .entry(what.chars().take(120).collect())
            .or_default() += 1;
    }
}

/// Asks until it is told to stop; each client has its own numbers.
fn client(host: &Host, number: u64, kills: bool, stop: &AtomicBool, seen: &Seen) {
    let mut value = number << 32;
    while !stop.load(Ordering::Relaxed) {
        value += 1;
        let is_bad = kills && fastrand::u64(..BAD_ONE_IN) == 0;
        let what = if is_bad { KILLERS[fastrand::usize(..KILLERS.len())] } else { "" };
        let begun = Instant::now();
        let (status, body) = host.post("/predict_sync", &json!({"value": value, "do": what}));
        if is_bad {
            let said = body["detail"].as_str().unwrap_or_default();
            if status < 400 || said.is_empty() {
                seen.wrong.fetch_add(1, Ordering::Relaxed);
                seen.note(&format!("{what}: {status} {body}"));
            }
            seen.bad.fetch_add(1, Ordering::Relaxed);
            continue;
        }
        seen.latencies.lock().expect("nobody panics with it").push(begun.elapsed().as_secs_f64());
        match status {
            200 if body["value"] == 2 * value => seen.good.fetch_add(1, Ordering::Relaxed),
            200 => {
                seen.note(&format!("wrong: {body}"));
                seen.wrong.fetch_add(1, Ordering::Relaxed)
            }
            _ => {
                seen.note(&format!("{status}: {}", body["detail"]));
                seen.failed.fetch_add(1, Ordering::Relaxed)
            }
        };
    }
}

/// Has clients ask for this long, while something else happens; the longest that `/livez` took comes back.
fn under_load(host: &Host, kills: bool, time: Duration, seen: &Seen, beside: impl Fn()) -> Duration {
    let stop = AtomicBool::new(false);
    let begun = Instant::now();
    let mut slowest = Duration::ZERO;
    thread::scope(|scope| {
        for number in 0..CLIENTS as u64 {
            let stop = &stop;
            scope.spawn(move || client(host, number, kills, stop, seen));
        }
        while begun.elapsed() < time {
            let asked = Instant::now();
            assert_eq!(host.get("/livez").0, 200);
            slowest = slowest.max(asked.elapsed());
            beside();
        }
        stop.store(true, Ordering::Relaxed);
    });
    slowest
}

/// Inputs that end their worker, or its use, in every way, among good ones.
pub(crate) fn killers() {
    let host = host("batch_timeout_seconds = 1.0\nmemory = 400\nmin_replicas = 2\n");
    let seen = Seen::default();
    let slowest = under_load(&host, true, minutes(KILLERS_MINUTES), &seen, || {
        thread::sleep(Duration::from_millis(100))
    });
    let deaths = host.metric(r#"modalkit_worker_deaths_total{model="killer"}"#);
    let (good, bad) = (seen.good.load(Ordering::Relaxed), seen.bad.load(Ordering::Relaxed));
    let (wrong, failed) = (seen.wrong.load(Ordering::Relaxed), seen.failed.load(Ordering::Relaxed));
    println!(
        "{good} good inputs answered, {failed} not, {bad} bad ones, {wrong} wrong; {deaths} deaths, {:.2} for each bad input; p50 {:.1} ms, p99 {:.0} ms; /livez within {slowest:?}",
        deaths / bad.max(1) as f64,
        seen.percentile(0.5),
        seen.percentile(0.99)
    );
    println!("{:#?}", seen.said.lock().expect("nobody panics with it"));
    assert_eq!(wrong, 0);
    assert!(deaths <= 2.0 * bad as f64);
    assert_eq!(failed, 0);
}

/// Workers killed from outside.
pub(crate) fn kills() {
    let host = host("min_replicas = 2\n");
    let seen = Seen::default();
    let killed = AtomicU64::new(0);
    let slowest = under_load(&host, false, minutes(KILLS_MINUTES), &seen, || {
        let workers = workers(host.id());
        if let Some(worker) = workers.get(fastrand::usize(..workers.len().max(1))) {
            modalkit_tests::signal(*worker, "KILL");
            killed.fetch_add(1, Ordering::Relaxed);
        }
        thread::sleep(BETWEEN_KILLS);
    });
    let (good, failed) = (seen.good.load(Ordering::Relaxed), seen.failed.load(Ordering::Relaxed));
    println!(
        "{} kills; {good} answers, {failed} errors ({:.4} %); p50 {:.1} ms, p99 {:.0} ms; /livez within {slowest:?}",
        killed.load(Ordering::Relaxed),
        100.0 * failed as f64 / (good + failed) as f64,
        seen.percentile(0.5),
        seen.percentile(0.99)
    );
    println!("{:#?}", seen.said.lock().expect("nobody panics with it"));
    assert_eq!(seen.wrong.load(Ordering::Relaxed), 0);
}

/// Processes that run a pipeline: children of guards, which are children of the host.
fn workers(host: u32) -> Vec<u32> {
    children(host).into_iter().flat_map(children).collect()
}

fn children(of: u32) -> Vec<u32> {
    let threads = fs::read_dir(format!("/proc/{of}/task")).into_iter().flatten().flatten();
    let lists = threads.filter_map(|thread| fs::read_to_string(thread.path().join("children")).ok());
    lists
        .flat_map(|list| list.split_whitespace().filter_map(|id| id.parse().ok()).collect::<Vec<_>>())
        .collect()
}

/// Memory that the host and all below it hold for themselves, in MiB; what they share counts by its share.
fn tree_mib(host: u32) -> f64 {
    [vec![host], children(host), workers(host)].concat().into_iter().map(pss_mib).sum()
}

fn pss_mib(process: u32) -> f64 {
    let said = fs::read_to_string(format!("/proc/{process}/smaps_rollup")).unwrap_or_default();
    let line = said.lines().find_map(|line| line.strip_prefix("Pss:")).unwrap_or("0 kB");
    line.trim().trim_end_matches(" kB").trim().parse::<f64>().unwrap_or_default() / 1024.0
}

/// Poison among good jobs, in both modes, on a host that is started again whenever it dies.
pub(crate) fn poison() {
    for isolation in ["in-process", "process"] {
        let poison = Poison { good: (POISONED_JOBS * share()) as u64, poison: POISON, isolation };
        let begun = Instant::now();
        let deaths = poison.run();
        println!(
            "{isolation}: {} good jobs succeeded at their first attempt, {POISON} poison ones failed with the reason: {} deaths of hosts, {} of workers, {:.0} s",
            poison.good,
            deaths.hosts,
            deaths.workers,
            begun.elapsed().as_secs_f64()
        );
        assert!(deaths.hosts.max(deaths.workers) <= 2 * POISON, "{deaths:?}");
    }
}

/// Reloads with each replica in a process of its own, under load.
pub(crate) fn reloads() {
    let config = format!(
        "[server]\nlog = \"error,modalkit::app=info\"\nsettle_ms = 10\n{PROCESS}probation_seconds = 0.1\nprobation_p99_ratio_max = 1000.0\n"
    );
    let setup = Setup::new().config(&config);
    Version::good(1).install(&setup.volume());
    let host = setup.ready();
    let load = Load::start(host.address, 8, VERSIONED);
    let reloads = (RELOADS * share()) as u64;
    let mut after_ten = 0.0;
    let begun = Instant::now();
    for number in 2..=reloads + 1 {
        Version::good(number).install(&host.volume());
        wait_until("it serves", || load.newest() >= number);
        if number == 11 {
            thread::sleep(Duration::from_secs(2));
            after_ten = tree_mib(host.id());
        }
        if (number - 1).is_multiple_of(RELOADS_BETWEEN_LOOKS) {
            println!(
                "after {} reloads: {:.1} MiB, of the host {:.1} MiB",
                number - 1,
                tree_mib(host.id()),
                pss_mib(host.id())
            );
        }
    }
    let took = begun.elapsed();
    thread::sleep(Duration::from_secs(2));
    let at_the_end = tree_mib(host.id());
    let served = load.stop();
    println!(
        "{reloads} reloads in {took:?}; {} answers, {} failed; memory of all processes {after_ten:.1} MiB after the tenth, {at_the_end:.1} MiB at the end ({:.3})",
        served.right,
        served.wrong,
        at_the_end / after_ten
    );
    served.assert_faultless();
    assert_eq!(host.metric("modalkit_plugin_libraries"), 0.0);
    assert!(at_the_end <= 1.05 * after_ten, "it grows");
}
