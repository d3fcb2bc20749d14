//! `bench grpc`: `ModelInfer` on this host beside bare tonic, which gives the tensors back as they came.

use std::{fs, path::Path, process::Command};

use anyhow::{Context, bail};

use super::{Figures, Options, Workload, free_port, process::Server, report, start_host};
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
    let Options { rounds, seconds, .. } = *options;
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
