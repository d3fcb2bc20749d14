//! `bench grpc`: `ModelInfer` on this host beside bare tonic, which gives the tensors back as they came. The load is our own, or perf_analyzer's.

use std::{fs, path::Path, process::Command};

use anyhow::{Context, bail};

use super::{Figures, Options, Workload, free_port, median, process::Server, report, start_host};
use crate::build;

/// Bytes of the tensor, callers, and what that is.
const CASES: [(usize, &[usize], &str); 2] =
    [(16, &[1, 32, 128], "four numbers in and out"), (1 << 20, &[1, 8], "a tensor of 1 MiB in and out")];

pub(super) fn run(options: &Options) -> anyhow::Result<()> {
    build::cargo(&[
        "build",
        "--release",
        "--package",
        "modalkit",
        "--package",
        "bare",
        "--package",
        "fixture-tensors",
    ])?;
    let folder = std::env::temp_dir().join(format!("modalkit-bench-{}", std::process::id()));
    fs::create_dir_all(&folder)?;
    let measured = measure(options, &folder);
    // Left alone where it can't be removed: it is in the system's folder for such things.
    let _ = fs::remove_dir_all(&folder);
    measured
}

fn measure(options: &Options, folder: &Path) -> anyhow::Result<()> {
    let Options { rounds, seconds, ref perf_analyzer, .. } = *options;
    let port = free_port()?;
    let mut bare = Command::new(build::release().join("bare"));
    let bare = Server::start("bare", bare.args(["grpc", &port.to_string()]), port)?;
    let workload = Workload {
        name: "grpc",
        plugin: "tensors",
        path: "",
        concurrency: &[],
        config: "",
        note: "max_batch_size 1",
    };
    let host = start_host("host", &build::release(), &workload, "", folder)?;
    let servers = [bare, host];
    if let Some(program) = perf_analyzer {
        return by_perf_analyzer(program, rounds, &servers);
    }
    for (bytes, concurrency, note) in CASES {
        println!(
            "\ngrpc: {note}; {rounds} rounds of {seconds} s each, medians; ratios are medians of the rounds' own"
        );
        println!(
            "                c  requests/s      p50 ms      p99 ms   CPU s/1000    peak MiB  (over idle)"
        );
        for &callers in concurrency {
            let mut figures: Vec<Figures> = servers.iter().map(|_| Figures::default()).collect();
            for number in 0..rounds {
                for place in 0..servers.len() {
                    let at = (place + number) % servers.len();
                    round(&servers[at], (callers, seconds, bytes), &mut figures[at])?;
                }
            }
            report(callers, &servers, &figures);
        }
    }
    Ok(())
}

fn round(
    server: &Server,
    (callers, seconds, bytes): (usize, usize, usize),
    figures: &mut Figures,
) -> anyhow::Result<()> {
    figures.idle_bytes = server.idle_bytes;
    server.reset_peak()?;
    let before = server.cpu_seconds()?;
    let numbers = [server.port as usize, callers, seconds, bytes].map(|number| number.to_string());
    let output = Command::new(build::release().join("bare")).arg("grpc-load").args(numbers).output()?;
    let cpu = server.cpu_seconds()? - before;
    let text = String::from_utf8_lossy(&output.stdout);
    let figures_of_load: Vec<f64> =
        text.split_whitespace().filter_map(|number| number.parse().ok()).collect();
    let [rate, p50, p99, calls, failed] = figures_of_load[..] else {
        bail!("the load has no figures: {}", String::from_utf8_lossy(&output.stderr))
    };
    if failed > 0.0 {
        bail!("{}: {failed} of {calls} calls failed", server.name);
    }
    figures.requests_per_second.push(rate);
    figures.p50_ms.push(p50);
    figures.p99_ms.push(p99);
    figures.cpu_seconds_per_1000.push(cpu / calls * 1000.0);
    figures.peak_bytes.push(server.peak_bytes().context("the server is gone")?);
    Ok(())
}

/// Requests of one round, by their tensor's bytes, and callers.
const BY_PERF_ANALYZER: [(usize, usize, usize); 3] = [(16, 1, 20_000), (16, 32, 60_000), (1 << 20, 4, 2_000)];

/// The same asked by perf_analyzer, a command which may have arguments: its throughput, and each server's CPU time for as many requests.
fn by_perf_analyzer(program: &str, rounds: usize, servers: &[Server; 2]) -> anyhow::Result<()> {
    println!(
        "\ngrpc, asked by perf_analyzer: a tensor of numbers and one of a word; medians of {rounds} rounds"
    );
    println!("       bytes    c   server   requests/s   CPU s/1000   of bare");
    for (bytes, callers, requests) in BY_PERF_ANALYZER {
        let mut rates = [Vec::new(), Vec::new()];
        let mut costs = [Vec::new(), Vec::new()];
        for number in 0..rounds {
            for place in 0..servers.len() {
                let at = (place + number) % servers.len();
                let before = servers[at].cpu_seconds()?;
                let rate = ask_by_perf_analyzer(program, servers[at].port, bytes, callers, requests)?;
                rates[at].push(rate);
                costs[at].push((servers[at].cpu_seconds()? - before) / requests as f64 * 1000.0);
            }
        }
        let of_bare: Vec<f64> = costs[1].iter().zip(&costs[0]).map(|(host, bare)| host / bare).collect();
        for (at, server) in servers.iter().enumerate() {
            let ratio = if at == 0 { String::new() } else { format!("{:.2}", median(&of_bare)) };
            let (rate, cost) = (median(&rates[at]), median(&costs[at]));
            println!(
                "  {bytes:>10} {callers:>4}   {:<6}   {rate:>10.0}   {cost:>10.4}   {ratio:>7}",
                server.name
            );
        }
    }
    Ok(())
}

/// Has perf_analyzer ask; returns its throughput.
fn ask_by_perf_analyzer(
    program: &str,
    port: u16,
    bytes: usize,
    callers: usize,
    requests: usize,
) -> anyhow::Result<f64> {
    let mut words = program.split_whitespace();
    let output = Command::new(words.next().context("--perf-analyzer: expected a command")?)
        .args(words)
        .args(["-m", "tensors", "-i", "grpc", "-b", "1", "--shape", "words:1"])
        .args(["-u", &format!("127.0.0.1:{port}"), "--shape", &format!("values:{}", bytes / 4)])
        .args(["--concurrency-range", &callers.to_string(), "--request-count", &requests.to_string()])
        .output()
        .with_context(|| format!("--perf-analyzer: {program} can't be started"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let throughput = text.lines().find_map(|line| line.trim().strip_prefix("Throughput: "));
    throughput.and_then(|rest| rest.split(' ').next()?.parse().ok()).with_context(|| {
        format!("perf_analyzer has no throughput: {text}{}", String::from_utf8_lossy(&output.stderr))
    })
}
