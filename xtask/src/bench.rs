//! `bench`: the host beside a bare hyper server that does the same work, under the same load, in the same minutes.
//!
//! Rounds are interleaved and medians compared, since machines are shared and noisy. The load comes from `wrk` in a process
//! of its own, so its cost is in neither server's figures. CPU time is what the kernel counted for the server's threads. A host that was
//! built before may take part, so that a change is measured against the state before it.

mod adaptive;
mod buckets;
mod embeddings;
mod grpc;
mod insight;
mod jobs;
mod models;
mod process;
mod python;
mod stream;
mod wrk;

use std::{
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, bail};

use crate::build;
use process::Server;
use wrk::Load;

#[derive(Clone, Copy)]
struct Workload {
    name: &'static str,
    plugin: &'static str,
    path: &'static str,
    concurrency: &'static [usize],
    config: &'static str,
    note: &'static str,
}

const WORKLOADS: [Workload; 4] = [
    Workload {
        name: "echo",
        plugin: "echo",
        path: PREDICT,
        concurrency: &[1, 32, 128],
        config: "",
        note: "max_batch_size 1",
    },
    Workload {
        name: "batched",
        plugin: "batched",
        path: PREDICT,
        concurrency: &[1, 32, 128],
        config: "[app_settings.batch_config]\nmax_batch_size = 32\nwait_ms = 5\n",
        note: "predict sleeps 5 ms + 0.1 ms an item, max_batch_size 32, wait_ms 5; the ceiling is 32 items in 8.2 ms: 3902/s",
    },
    Workload {
        name: "big",
        plugin: "big",
        path: PREDICT,
        concurrency: &[8],
        config: "",
        note: "256 KiB of JSON floats in",
    },
    Workload {
        name: "tensors",
        plugin: "tensors",
        path: "/v2/models/tensors/infer",
        concurrency: &[1, 8],
        config: "",
        note: "a tensor of 1 MiB in and out as bytes; bare gives the body back as it is",
    },
];

/// What is measured in one process and in two.
const ISOLATED: [Workload; 5] = [
    WORKLOADS[0],
    Workload {
        name: "echo in batches of 32",
        concurrency: &[32, 128],
        config: "[app_settings.batch_config]\nmax_batch_size = 32\n",
        note: "max_batch_size 32",
        ..WORKLOADS[0]
    },
    WORKLOADS[1],
    WORKLOADS[2],
    WORKLOADS[3],
];

/// Follows a workload's configuration.
const IN_PROCESS: &str = "[app_settings.deployment_config]\nisolation = \"in-process\"\n";
const PROCESS: &str = "[app_settings.deployment_config]\nisolation = \"process\"\n";

const PREDICT: &str = "/predict_sync";
/// Bytes of the tensor that `tensors` sends.
const TENSOR_BYTES: usize = 1 << 20;

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

/// How long and against what is measured.
pub(crate) struct Options {
    pub(crate) rounds: usize,
    pub(crate) seconds: usize,
    /// A folder with another build of the host and the plugins that the workloads ask.
    pub(crate) against: Option<PathBuf>,
    /// The command of perf_analyzer, which asks in place of our own load.
    pub(crate) perf_analyzer: Option<String>,
}

pub(crate) fn run(only: &[String], options: &Options) -> anyhow::Result<()> {
    let Options { rounds, seconds, .. } = *options;
    let has_others = only.iter().any(|name| !WORKLOADS.iter().any(|known| known.name == *name));
    if options.against.is_some() && has_others {
        bail!("--against: expected with echo, batched, big and tensors, found it with {only:?}");
    }
    if options.perf_analyzer.is_some() && only != ["grpc"] {
        bail!("--perf-analyzer: expected with grpc, found it with {only:?}");
    }
    if only == ["insight"] {
        return insight::run(rounds, seconds);
    }
    if only == ["isolation"] {
        return isolation(options);
    }
    if only == ["grpc"] {
        return grpc::run(options);
    }
    if only == ["buckets"] {
        return buckets::run();
    }
    if only == ["python"] {
        return python::run(options);
    }
    if only == ["embeddings"] {
        return embeddings::run(options);
    }
    if only == ["models"] {
        return models::run(options);
    }
    if only == ["stream"] {
        return stream::run(rounds, seconds);
    }
    if only == ["adaptive"] {
        return adaptive::run(options);
    }
    if only == ["jobs"] {
        return jobs::run(rounds, seconds);
    }
    if let Some(unknown) = only.iter().find(|name| !WORKLOADS.iter().any(|known| known.name == **name)) {
        bail!(
            "no workload {unknown:?}; expected echo, batched, big, tensors, isolation, python, stream, grpc, insight, buckets, adaptive, models, embeddings or jobs"
        );
    }
    build()?;
    for workload in
        WORKLOADS.iter().filter(|workload| only.is_empty() || only.iter().any(|name| name == workload.name))
    {
        measure(workload, options, false)?;
    }
    Ok(())
}

/// The same host and plugins, in one process and with each replica in one of its own.
fn isolation(options: &Options) -> anyhow::Result<()> {
    build()?;
    ISOLATED.iter().try_for_each(|workload| measure(workload, options, true))
}

fn build() -> anyhow::Result<()> {
    wrk::ensure()?;
    let packages = ["modalkit", "bare", "echo", "fixture-batched", "fixture-big", "fixture-tensors"];
    let mut build = vec!["build", "--release"];
    packages.iter().for_each(|package| build.extend(["--package", package]));
    build::cargo(&build)
}

fn measure(workload: &Workload, options: &Options, isolation: bool) -> anyhow::Result<()> {
    let folder = std::env::temp_dir().join(format!("modalkit-bench-{}", std::process::id()));
    fs::create_dir_all(&folder)?;
    let servers =
        if isolation { in_both_ways(workload, &folder) } else { beside_bare(workload, options, &folder) };
    let measured = servers.and_then(|servers| measure_in(workload, options, &folder, &servers));
    // Left alone where it can't be removed: it is in the system's folder for such things.
    let _ = fs::remove_dir_all(&folder);
    measured
}

fn beside_bare(w: &Workload, options: &Options, folder: &Path) -> anyhow::Result<Vec<Server>> {
    let bare_port = free_port()?;
    let mut bare = Command::new(build::release().join("bare"));
    let mut servers = vec![Server::start("bare", bare.args([w.name, &bare_port.to_string()]), bare_port)?];
    if let Some(against) = &options.against {
        servers.push(start_host("before", against, w, "", folder)?);
    }
    servers.push(start_host("host", &build::release(), w, "", folder)?);
    Ok(servers)
}

fn in_both_ways(w: &Workload, folder: &Path) -> anyhow::Result<Vec<Server>> {
    let start = |name, isolation| start_host(name, &build::release(), w, isolation, folder);
    Ok(vec![start("in-process", IN_PROCESS)?, start("process", PROCESS)?])
}

fn measure_in(w: &Workload, options: &Options, folder: &Path, servers: &[Server]) -> anyhow::Result<()> {
    let body = folder.join("body.json");
    fs::write(&body, request(w.name))?;
    let json_bytes = tensors_head().len().to_string();
    let header = (w.name == "tensors").then_some(("inference-header-content-length", json_bytes.as_str()));
    let Options { rounds, seconds, .. } = *options;
    println!(
        "\n{}: {}; {rounds} rounds of {seconds} s each, medians; ratios are medians of the rounds' own",
        w.name, w.note
    );
    println!("                c  requests/s      p50 ms      p99 ms   CPU s/1000    peak MiB  (over idle)");
    for &concurrency in w.concurrency {
        let mut figures: Vec<Figures> = servers.iter().map(|_| Figures::default()).collect();
        for number in 0..rounds {
            // Each goes first as often as the others do.
            for place in 0..servers.len() {
                let at = (place + number) % servers.len();
                let load = Load {
                    port: servers[at].port,
                    path: servers[at].path.unwrap_or(w.path),
                    concurrency,
                    seconds,
                    body: &body,
                    script: &folder.join("post.lua"),
                    header,
                };
                round(&servers[at], &load, &mut figures[at])?;
            }
        }
        report(concurrency, servers, &figures);
    }
    Ok(())
}

/// Starts the host that lies in this folder, with the workload's plugin beside it.
fn start_host(
    name: &'static str,
    built: &Path,
    w: &Workload,
    isolation: &str,
    folder: &Path,
) -> anyhow::Result<Server> {
    let (volume, state) = (folder.join(name).join("volume"), folder.join(name).join("state"));
    fs::create_dir_all(&volume)?;
    let plugin = built.join(format!("lib{}.so", w.plugin));
    fs::copy(&plugin, volume.join(format!("{}.so", w.plugin)))
        .with_context(|| format!("can't copy {}; build it there first", plugin.display()))?;
    let config = folder.join(format!("{name}.toml"));
    let port = free_port()?;
    fs::write(
        &config,
        format!(
            "[server]\nlisten = \"127.0.0.1:{port}\"\nlog = \"warn\"\nstate_folder = {state:?}\n{}\n{isolation}\n\
             [app_settings.deployment_config.volumes]\n{volume:?} = \"bench\"\n",
            w.config
        ),
    )?;
    Server::start(name, Command::new(built.join("modalkit")).arg("--config").arg(&config), port)
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

impl Figures {
    fn columns(&self) -> [&[f64]; 5] {
        [&self.requests_per_second, &self.p50_ms, &self.p99_ms, &self.cpu_seconds_per_1000, &self.peak_bytes]
    }
}

/// The medians of each server, and those of the host's share of each other's figures in the same round.
fn report(concurrency: usize, servers: &[Server], figures: &[Figures]) {
    for (server, of_server) in servers.iter().zip(figures) {
        let [rate, p50, p99, cpu, peak] = of_server.columns().map(median);
        let (peak, over) = (peak / MIB, (peak - of_server.idle_bytes) / MIB);
        let name = server.name;
        println!(
            "{name:>10} {concurrency:>6} {rate:>11.0} {p50:>11.3} {p99:>11.3} {cpu:>12.5} {peak:>11.1} {over:>12.1}"
        );
    }
    let Some((host, others)) = figures.split_last() else { return };
    for (server, other) in servers.iter().zip(others) {
        let paired = |(host, other): (&[f64], &[f64])| {
            let ratios: Vec<f64> = host.iter().zip(other).map(|(host, other)| host / other).collect();
            median(&ratios)
        };
        let columns: Vec<f64> = host.columns().into_iter().zip(other.columns()).map(paired).collect();
        let [rate, p50, p99, cpu, peak] = columns[..] else { return };
        let name = format!("/{}", server.name);
        println!("{name:>10} {concurrency:>6} {rate:>11.3} {p50:>11.3} {p99:>11.3} {cpu:>12.3} {peak:>11.2}");
    }
}

const MIB: f64 = 1024.0 * 1024.0;

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[middle] } else { f64::midpoint(sorted[middle - 1], sorted[middle]) }
}

/// What stands before the bytes of a tensor.
fn tensors_head() -> String {
    format!(
        r#"{{"inputs":[{{"name":"values","datatype":"FP32","shape":[1,{}],"parameters":{{"binary_data_size":{TENSOR_BYTES}}}}}],"outputs":[{{"name":"values","parameters":{{"binary_data":true}}}}]}}"#,
        TENSOR_BYTES / size_of::<f32>()
    )
}

fn request(workload: &str) -> Vec<u8> {
    match workload {
        "digits-python" => format!("{{\"pixels\":{:?}}}", [0.0, 4.0, 8.0, 12.0].repeat(16)).into_bytes(),
        "tensors" => {
            let mut body = tensors_head().into_bytes();
            body.extend(
                (0..TENSOR_BYTES / size_of::<f32>()).flat_map(|number| (number as f32).to_le_bytes()),
            );
            body
        }
        "big" => {
            let mut body = String::from("{\"values\":[");
            let mut number: u64 = 1;
            while body.len() < 256 * 1024 - 16 {
                number =
                    number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                body.push_str(&format!("{:.6},", (number >> 40) as f64 / 16_777.216));
            }
            body.push_str("0]}");
            body.into_bytes()
        }
        _ => b"{\"text\":\"hello world\"}".to_vec(),
    }
}

fn free_port() -> anyhow::Result<u16> {
    Ok(TcpListener::bind(("127.0.0.1", 0)).context("no free port")?.local_addr()?.port())
}
