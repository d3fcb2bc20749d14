//! Answers in chunks: how soon the first event is there, what a chunk costs with a thousand streams at once, and what `/predict_sync` notices of
//! a thousand that are open beside it.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    path::{Path, PathBuf},
    process::Command,
    sync::Barrier,
    thread,
    time::{Duration, Instant},
};

use anyhow::Context;

use super::{
    MIB, PREDICT, free_port, median,
    process::Server,
    wrk::{self, Load},
};
use crate::build;

/// Callers at once.
const CALLERS: usize = 1000;
/// Chunks of each, and the time between two rounds of them.
const CHUNKS: usize = 100;
const PAUSE_MS: u64 = 50;
/// Bytes beside a chunk's number.
const PADDING_BYTES: usize = 32;
/// Requests, one after the other, of which the first events are timed.
const TIMED: usize = 500;
/// Callers of `/predict_sync` beside the streams.
const CONCURRENCY: usize = 32;
/// Enough for a thread that reads lines.
const STACK_BYTES: usize = 128 << 10;

pub(super) fn run(rounds: usize, seconds: usize) -> anyhow::Result<()> {
    wrk::ensure()?;
    let packages = ["modalkit", "echo", "fixture-streams"];
    let mut build = vec!["build", "--release"];
    packages.iter().for_each(|package| build.extend(["--package", package]));
    build::cargo(&build)?;
    let folder = std::env::temp_dir().join(format!("modalkit-bench-{}", std::process::id()));
    fs::create_dir_all(folder.join("volume"))?;
    for plugin in ["echo", "streams"] {
        let file = folder.join("volume").join(format!("{plugin}.so"));
        fs::copy(build::release().join(format!("lib{plugin}.so")), file)?;
    }
    let measured = Bench { rounds, seconds, folder: folder.clone() }.measure();
    // Left alone where it can't be removed: it is in the system's folder for such things.
    let _ = fs::remove_dir_all(&folder);
    measured
}

struct Bench {
    rounds: usize,
    seconds: usize,
    folder: PathBuf,
}

impl Bench {
    fn measure(&self) -> anyhow::Result<()> {
        let (mut firsts, mut wholes) = (Vec::new(), Vec::new());
        let mut many: [Vec<f64>; 5] = Default::default();
        let mut beside: [Vec<f64>; 3] = Default::default();
        for round in 0..self.rounds {
            println!("round {} of {}", round + 1, self.rounds);
            let host = self.host("")?;
            firsts.extend(one_by_one(host.port, "/predict_stream")?);
            wholes.extend(one_by_one(host.port, PREDICT)?);
            drop(host);
            for (figures, figure) in many.iter_mut().zip(self.thousand()?) {
                figures.push(figure);
            }
            for (figures, figure) in beside.iter_mut().zip(self.beside()?) {
                figures.push(figure);
            }
        }
        let (rounds, seconds) = (self.rounds, self.seconds);
        println!(
            "\nstreams; {rounds} rounds, {TIMED} requests one by one and {seconds} s beside streams in each, medians"
        );
        let share = |times: &mut Vec<f64>, share: f64| {
            times.sort_by(f64::total_cmp);
            times[((times.len() - 1) as f64 * share) as usize]
        };
        for (name, times) in [("first event", &mut firsts), ("/predict_sync", &mut wholes)] {
            let (p50, p99) = (share(times, 0.5), share(times, 0.99));
            println!("  one caller, {name:<14}  {p50:>8.3} ms p50  {p99:>8.3} ms p99");
        }
        let [p50, p99, rate, cpu, peak] = many.map(|figures| median(&figures));
        println!(
            "  {CALLERS} at once, first event  {p50:>8.1} ms p50  {p99:>8.1} ms p99  {rate:>7.0} chunks/s  {cpu:.2} µs CPU a chunk  {peak:.1} MiB over idle"
        );
        let [rate, p50, p99] = beside.map(|figures| median(&figures));
        println!(
            "  /predict_sync at {CONCURRENCY} beside {CALLERS} open streams, of that without: {rate:.3} requests/s, {p50:.3} p50, {p99:.3} p99"
        );
        Ok(())
    }

    fn host(&self, more: &str) -> anyhow::Result<Server> {
        let (port, config) = (free_port()?, self.folder.join("modalkit.toml"));
        let (volume, state) = (self.folder.join("volume"), self.folder.join("state"));
        fs::write(
            &config,
            format!(
                "[server]\nlisten = \"127.0.0.1:{port}\"\nlog = \"warn\"\nstate_folder = {state:?}\nconnections_max = 4096\n\
                 connections_per_address_max = 4096\n[app_settings.deployment_config]\nallow_concurrent_inputs_handler = 4096\n\
                 volumes = {{ {volume:?} = \"bench\" }}\n{more}"
            ),
        )?;
        Server::start(
            "host",
            Command::new(build::release().join("modalkit")).arg("--config").arg(&config),
            port,
        )
    }

    /// With a thousand callers in one batch: first events in milliseconds (median, 99 of 100), chunks a second, microseconds of CPU a chunk, MiB over
    /// idle.
    fn thousand(&self) -> anyhow::Result<[f64; 5]> {
        let host = self.host(&one_batch())?;
        host.reset_peak()?;
        let before = host.cpu_seconds()?;
        let streams = Streams::open(host.port, CHUNKS, PAUSE_MS)?;
        let (mut firsts, took) = streams.read()?;
        firsts.sort_by(f64::total_cmp);
        let chunks = (CALLERS * CHUNKS) as f64;
        let cpu = (host.cpu_seconds()? - before) / chunks * 1e6;
        let over_idle = (host.peak_bytes()? - host.idle_bytes) / MIB;
        Ok([median(&firsts), firsts[CALLERS * 99 / 100], chunks / took.as_secs_f64(), cpu, over_idle])
    }

    /// Requests a second, median and 99th of `/predict_sync` while a thousand streams are open, of those without.
    fn beside(&self) -> anyhow::Result<[f64; 3]> {
        let host = self.host(&one_batch())?;
        let (body, script) = (self.folder.join("body.json"), self.folder.join("post.lua"));
        fs::write(&body, "{\"text\":\"hello world\"}")?;
        let alone = self.sync(&host, &body, &script)?;
        // A chunk a second, until after the load.
        let streams = Streams::open(host.port, self.seconds + 3, 1000)?;
        let beside = self.sync(&host, &body, &script)?;
        streams.read()?;
        Ok([0, 1, 2].map(|at| beside[at] / alone[at]))
    }

    fn sync(&self, host: &Server, body: &Path, script: &Path) -> anyhow::Result<[f64; 3]> {
        let path = format!("{PREDICT}?model_name=echo");
        let (port, seconds) = (host.port, self.seconds);
        let load = Load { port, path: &path, concurrency: CONCURRENCY, seconds, body, script, header: None };
        let result = load.run()?;
        anyhow::ensure!(result.failed == 0, "{} requests of {} failed", result.failed, result.requests);
        Ok([result.requests_per_second, result.p50_ms, result.p99_ms])
    }
}

/// All callers' inputs in one batch of the model that streams.
fn one_batch() -> String {
    format!(
        "[model_settings.model_entries.streams]\nbatch_config = {{ max_batch_size = {CALLERS}, wait_ms = 5000 }}\n"
    )
}

fn request(path: &str, chunks: usize, pause_ms: u64) -> String {
    let body =
        format!("{{\"id\":1,\"chunks\":{chunks},\"pause_ms\":{pause_ms},\"padding_bytes\":{PADDING_BYTES}}}");
    format!(
        "POST {path}?model_name=streams HTTP/1.1\r\nhost: localhost\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}

/// Milliseconds to the first line of each of some answers' bodies, on one connection and one after the other.
fn one_by_one(port: u16, path: &str) -> anyhow::Result<Vec<f64>> {
    let mut connection = BufReader::new(TcpStream::connect(("127.0.0.1", port))?);
    let request = request(path, 1, 0);
    let mut times = Vec::with_capacity(TIMED);
    for _ in 0..TIMED {
        let begun = Instant::now();
        connection.get_mut().write_all(request.as_bytes())?;
        let length = read_head(&mut connection)?;
        match length {
            Some(length) => {
                let mut body = vec![0; length];
                connection.read_exact(&mut body)?;
                times.push(begun.elapsed().as_secs_f64() * 1e3);
            }
            None => {
                connection.read_line(&mut String::new())?;
                times.push(begun.elapsed().as_secs_f64() * 1e3);
                read_lines_to(&mut connection, "0\r\n")?;
                connection.read_line(&mut String::new())?;
            }
        }
    }
    Ok(times)
}

/// Reads an answer's headers; returns its length, where it says one.
fn read_head(connection: &mut BufReader<TcpStream>) -> anyhow::Result<Option<usize>> {
    let (mut length, mut first) = (None, true);
    loop {
        let mut line = String::new();
        connection.read_line(&mut line)?;
        anyhow::ensure!(!first || line.contains(" 200 "), "the host answered {line:?}");
        first = false;
        if line == "\r\n" {
            return Ok(length);
        }
        if let Some(value) = line.strip_prefix("content-length: ") {
            length = Some(value.trim().parse()?);
        }
    }
}

fn read_lines_to(connection: &mut BufReader<TcpStream>, last: &str) -> anyhow::Result<()> {
    let mut line = String::new();
    while line != last {
        line.clear();
        let read = connection.read_line(&mut line)?;
        anyhow::ensure!(read > 0, "a stream broke off");
    }
    Ok(())
}

/// A thousand streams that were asked for, each at its moment.
struct Streams(Vec<(TcpStream, Instant)>);

impl Streams {
    fn open(port: u16, chunks: usize, pause_ms: u64) -> anyhow::Result<Self> {
        let request = request("/predict_stream", chunks, pause_ms);
        let open = |_| {
            let mut stream = TcpStream::connect(("127.0.0.1", port))?;
            stream.write_all(request.as_bytes())?;
            Ok((stream, Instant::now()))
        };
        (0..CALLERS).map(open).collect::<anyhow::Result<_>>().map(Self)
    }

    /// Reads all of them to their ends: milliseconds to each one's first event, and how long it took from the first of those on.
    fn read(self) -> anyhow::Result<(Vec<f64>, Duration)> {
        let begin = Barrier::new(CALLERS);
        thread::scope(|scope| {
            let read = |(stream, asked): (TcpStream, Instant)| -> anyhow::Result<(f64, Instant)> {
                begin.wait();
                let mut connection = BufReader::with_capacity(1 << 10, stream);
                read_head(&mut connection)?;
                connection.read_line(&mut String::new())?;
                let first = Instant::now();
                read_lines_to(&mut connection, "0\r\n")?;
                Ok(((first - asked).as_secs_f64() * 1e3, first))
            };
            let mut callers = Vec::with_capacity(CALLERS);
            for stream in self.0 {
                let thread = thread::Builder::new().stack_size(STACK_BYTES);
                callers.push(thread.spawn_scoped(scope, move || read(stream))?);
            }
            let read = callers.into_iter().map(|caller| caller.join().expect("it returns its errors"));
            let read = read.collect::<anyhow::Result<Vec<_>>>()?;
            let begun = read.iter().map(|(_, first)| *first).min().context("there are callers")?;
            Ok((read.into_iter().map(|(first, _)| first).collect(), begun.elapsed()))
        })
    }
}
