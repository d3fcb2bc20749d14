//! `bench`: the host beside a bare hyper server that does the same work, under the same load, in the same minutes.
//!
//! Rounds are interleaved and medians compared, since machines are shared and noisy. The load comes from `wrk` in a process
//! of its own, so its cost is in neither server's figures. CPU time is what the kernel counted for the server's threads.

mod insight;
mod jobs;
mod process;
mod wrk;

use std::{collections::BTreeMap, fs, net::TcpListener, path::Path, process::Command};

use anyhow::{Context, bail};

use crate::build;
use process::Server;
use wrk::Load;

struct Workload {
    name: &'static str,
    plugin: &'static str,
    concurrency: &'static [usize],
    config: &'static str,
    note: &'static str,
}

const WORKLOADS: [Workload; 3] = [
    Workload {
        name: "echo",
        plugin: "echo",
        concurrency: &[1, 32, 128],
        config: "",
        note: "max_batch_size 1",
    },
    Workload {
        name: "batched",
        plugin: "batched",
        concurrency: &[1, 32, 128],
        config: "[app_settings.batch_config]\nmax_batch_size = 32\nwait_ms = 5\n",
        note: "predict sleeps 5 ms + 0.1 ms an item, max_batch_size 32, wait_ms 5; the ceiling is 32 items in 8.2 ms: 3902/s",
    },
    Workload { name: "big", plugin: "big", concurrency: &[8], config: "", note: "256 KiB of JSON floats in" },
];

/// One server's figures at one concurrency, one value a round.
#[derive(Default)]
struct Figures {
    requests_per_second: Vec<f64>,
    p50_ms: Vec<f64>,
    p99_ms: Vec<f64>,
    cpu_seconds_per_1000: Vec<f64>,
    peak_bytes: Vec<f64>,
    idle_bytes: f64,
}

pub(crate) fn run(only: &[String], rounds: usize, seconds: usize) -> anyhow::Result<()> {
    if only == ["insight"] {
        return insight::run(rounds, seconds);
    }
    if only == ["jobs"] {
        return jobs::run(rounds, seconds);
    }
    if let Some(unknown) = only.iter().find(|name| !WORKLOADS.iter().any(|known| known.name == **name)) {
        bail!("no workload {unknown:?}; expected echo, batched, big, insight or jobs");
    }
    wrk::ensure()?;
    let packages = ["modalkit", "bare", "echo", "fixture-batched", "fixture-big"];
    let mut build = vec!["build", "--release"];
    packages.iter().for_each(|package| build.extend(["--package", package]));
    build::cargo(&build)?;
    for workload in
        WORKLOADS.iter().filter(|workload| only.is_empty() || only.iter().any(|name| name == workload.name))
    {
        measure(workload, rounds, seconds)?;
    }
    Ok(())
}

fn measure(workload: &Workload, rounds: usize, seconds: usize) -> anyhow::Result<()> {
    let folder = std::env::temp_dir().join(format!("modalkit-bench-{}", std::process::id()));
    let volume = folder.join("volume");
    fs::create_dir_all(&volume)?;
    let measured = measure_in(workload, rounds, seconds, &folder, &volume);
    // Left alone where it can't be removed: it is in the system's folder for such things.
    let _ = fs::remove_dir_all(&folder);
    measured
}

fn measure_in(
    w: &Workload,
    rounds: usize,
    seconds: usize,
    folder: &Path,
    volume: &Path,
) -> anyhow::Result<()> {
    fs::copy(build::release().join(format!("lib{}.so", w.plugin)), volume.join(format!("{}.so", w.plugin)))?;
    let config = folder.join("bench.toml");
    let (host_port, bare_port) = (free_port()?, free_port()?);
    fs::write(
        &config,
        format!(
            "[server]\nlisten = \"127.0.0.1:{host_port}\"\nlog = \"warn\"\nstate_folder = {:?}\n{}\n\
             [app_settings.deployment_config.volumes]\n{:?} = \"bench\"\n",
            folder.join("state").display().to_string(),
            w.config,
            volume.display().to_string()
        ),
    )?;
    let body = folder.join("body.json");
    fs::write(&body, request(w.name))?;
    let mut bare = Command::new(build::release().join("bare"));
    let mut host = Command::new(build::release().join("modalkit"));
    let bare = Server::start("bare", bare.args([w.name, &bare_port.to_string()]), bare_port)?;
    let host = Server::start("host", host.arg("--config").arg(&config), host_port)?;
    println!("\n{}: {}; {rounds} rounds of {seconds} s each, medians", w.name, w.note);
    println!("            c  requests/s      p50 ms      p99 ms   CPU s/1000    peak MiB  (over idle)");
    for &concurrency in w.concurrency {
        let mut figures: BTreeMap<&str, Figures> = BTreeMap::new();
        for _ in 0..rounds {
            for server in [&bare, &host] {
                let load = Load {
                    port: server.port,
                    path: "/predict_sync",
                    concurrency,
                    seconds,
                    body: &body,
                    script: &folder.join("post.lua"),
                    header: None,
                };
                round(server, &load, figures.entry(server.name).or_default())?;
            }
        }
        report(concurrency, &figures["bare"], &figures["host"]);
    }
    Ok(())
}

fn round(server: &Server, load: &Load<'_>, figures: &mut Figures) -> anyhow::Result<()> {
    figures.idle_bytes = server.idle_bytes;
    server.reset_peak()?;
    let before = server.cpu_seconds()?;
    let result = load.run()?;
    let cpu = server.cpu_seconds()? - before;
    if result.failed > 0 {
        bail!(
            "{}: {} of {} requests were not answered with 200",
            server.name,
            result.failed,
            result.requests
        );
    }
    figures.requests_per_second.push(result.requests_per_second);
    figures.p50_ms.push(result.p50_ms);
    figures.p99_ms.push(result.p99_ms);
    figures.cpu_seconds_per_1000.push(cpu / result.requests as f64 * 1000.0);
    figures.peak_bytes.push(server.peak_bytes()?);
    Ok(())
}

fn report(concurrency: usize, bare: &Figures, host: &Figures) {
    let values = |figures: &Figures| {
        [
            median(&figures.requests_per_second),
            median(&figures.p50_ms),
            median(&figures.p99_ms),
            median(&figures.cpu_seconds_per_1000),
            median(&figures.peak_bytes) / MIB,
        ]
    };
    let (bare_values, host_values) = (values(bare), values(host));
    for (name, v, idle) in [("bare", bare_values, bare.idle_bytes), ("host", host_values, host.idle_bytes)] {
        let over = v[4] - idle / MIB;
        println!(
            "{name:>6} {concurrency:>6} {:>11.0} {:>11.3} {:>11.3} {:>12.5} {:>11.1} {over:>12.1}",
            v[0], v[1], v[2], v[3], v[4]
        );
    }
    let r: Vec<f64> = host_values.iter().zip(bare_values).map(|(host, bare)| host / bare).collect();
    println!(
        " ratio {concurrency:>6} {:>11.3} {:>11.3} {:>11.3} {:>12.3} {:>11.2}",
        r[0], r[1], r[2], r[3], r[4]
    );
}

const MIB: f64 = 1024.0 * 1024.0;

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[middle] } else { f64::midpoint(sorted[middle - 1], sorted[middle]) }
}

fn request(workload: &str) -> String {
    match workload {
        "big" => {
            let mut body = String::from("{\"values\":[");
            let mut number: u64 = 1;
            while body.len() < 256 * 1024 - 16 {
                number =
                    number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                body.push_str(&format!("{:.6},", (number >> 40) as f64 / 16_777.216));
            }
            body.push_str("0]}");
            body
        }
        _ => "{\"text\":\"hello world\"}".to_owned(),
    }
}

fn free_port() -> anyhow::Result<u16> {
    Ok(TcpListener::bind(("127.0.0.1", 0)).context("no free port")?.local_addr()?.port())
}
