//! What it costs to know who calls and to follow some of them: one host with nothing on, one with a key checked and 1 % of its
//! requests traced, under the same load in the same minutes.

use std::{
    fs,
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    path::Path,
    process::Command,
    thread,
};

use super::{Figures, free_port, median, process::Server, round, wrk, wrk::Load};
use crate::build;

const CONCURRENCY: usize = 128;
const KEY: &str = "a key of thirty-two characters, ok";
/// Bytes of one export that the collector reads at a time.
const EXPORT_BYTES: usize = 64 << 10;

pub(super) fn run(rounds: usize, seconds: usize) -> anyhow::Result<()> {
    wrk::ensure()?;
    build::cargo(&["build", "--release", "--package", "modalkit", "--package", "echo"])?;
    let folder = tempfile_folder()?;
    let measured = measure(rounds, seconds, &folder);
    // Left alone where it can't be removed: it is in the system's folder for such things.
    let _ = fs::remove_dir_all(&folder);
    measured
}

fn tempfile_folder() -> anyhow::Result<std::path::PathBuf> {
    let folder = std::env::temp_dir().join(format!("modalkit-insight-{}", std::process::id()));
    fs::create_dir_all(folder.join("volume"))?;
    fs::copy(build::release().join("libecho.so"), folder.join("volume/echo.so"))?;
    Ok(folder)
}

fn measure(rounds: usize, seconds: usize, folder: &Path) -> anyhow::Result<()> {
    let collector = collect()?;
    let body = folder.join("body.json");
    fs::write(&body, "{\"text\":\"hello world\"}")?;
    let traced = format!(
        "[server.traces]\nendpoint = \"http://127.0.0.1:{collector}\"\nsample_ratio = 0.01\n[app_settings.auth_config]\napi_key = {KEY:?}\n"
    );
    let off = host("off", "", folder)?;
    let on = host("on", &traced, folder)?;
    let (mut without, mut with) = (Figures::default(), Figures::default());
    for _ in 0..rounds {
        for (server, figures, header) in
            [(&off, &mut without, None), (&on, &mut with, Some(("x-api-key", KEY)))]
        {
            let script = folder.join("post.lua");
            round(
                server,
                &Load {
                    port: server.port,
                    path: "/predict_sync",
                    concurrency: CONCURRENCY,
                    seconds,
                    body: &body,
                    script: &script,
                    header,
                },
                figures,
            )?;
        }
    }
    println!("\necho at {CONCURRENCY} connections; {rounds} rounds of {seconds} s each, medians");
    for (name, figures) in [("nothing on", &without), ("a key, 1 % traced", &with)] {
        println!(
            "{name:>18}  {:>9.0} requests/s  {:>6.3} ms p50  {:>6.3} ms p99  {:.3} µs CPU a request",
            median(&figures.requests_per_second),
            median(&figures.p50_ms),
            median(&figures.p99_ms),
            median(&figures.cpu_seconds_per_1000) * 1e3,
        );
    }
    // Of each round by itself: what else runs on the machine changes slowly.
    let pairs = with.cpu_seconds_per_1000.iter().zip(&without.cpu_seconds_per_1000);
    let ratios: Vec<f64> = pairs.map(|(with, without)| with / without).collect();
    println!("CPU a request: {:.3} times (median of the rounds' ratios)", median(&ratios));
    Ok(())
}

fn host(name: &'static str, more: &str, folder: &Path) -> anyhow::Result<Server> {
    let (port, config) = (free_port()?, folder.join(format!("{name}.toml")));
    let [volume, state] =
        ["volume", &format!("state-{name}")].map(|name| folder.join(name).display().to_string());
    fs::write(
        &config,
        format!(
            "[server]\nlisten = \"127.0.0.1:{port}\"\nlog = \"warn\"\nstate_folder = {state:?}\n{more}[app_settings.deployment_config.volumes]\n{volume:?} = \"bench\"\n"
        ),
    )?;
    Server::start(name, Command::new(build::release().join("modalkit")).arg("--config").arg(&config), port)
}

/// Takes every export and looks at none.
fn collect() -> anyhow::Result<u16> {
    let listener = TcpListener::bind(("127.0.0.1", 0))?;
    let port = listener.local_addr()?.port();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || answer_all(stream));
        }
    });
    Ok(port)
}

fn answer_all(mut stream: TcpStream) {
    let mut bytes = Vec::new();
    let mut piece = vec![0; EXPORT_BYTES];
    while let Ok(length) = stream.read(&mut piece) {
        if length == 0 {
            return;
        }
        bytes.extend_from_slice(&piece[..length]);
        let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") else { continue };
        let head = String::from_utf8_lossy(&bytes[..end]).to_ascii_lowercase();
        let body = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse::<usize>().ok());
        if bytes.len() >= end + 4 + body.unwrap_or(0) {
            bytes.clear();
            if stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").is_err() {
                return;
            }
        }
    }
}
