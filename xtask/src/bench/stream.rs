//! Answers in chunks: how soon the first event is there, what a chunk costs with a thousand streams at once, and what `/predict_sync` notices of
//! a thousand that are open beside it.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicU8, Ordering},
    thread,
    time::{Duration, Instant},
};

use super::{
    MIB, PREDICT, free_port, median,
    process::Server,
    wrk::{self, Load},
};
use crate::build;

/// Callers at once, of whom so many read nothing until the others are done.
const CALLERS: usize = 1000;
const STALLED: usize = 100;
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
        let mut many: [Vec<f64>; 4] = Default::default();
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
        for (name, times) in [("first event", &mut firsts), ("/predict_sync", &mut wholes)] {
            times.sort_by(f64::total_cmp);
            let (p50, p99) = (median(times), share(times, 0.99));
            println!("  one caller, {name:<14}  {p50:>8.3} ms p50  {p99:>8.3} ms p99");
        }
        let [p50, p99, cpu, peak] = many.map(|figures| median(&figures));
        println!(
            "  {CALLERS} at once in one batch, {STALLED} of them not reading: first event {p50:.0} ms p50, {p99:.0} ms p99; {cpu:.2} µs CPU a chunk, {peak:.1} MiB over idle"
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

    /// With a thousand callers in one batch: first events in milliseconds (median, 99 of 100), microseconds of CPU a chunk, MiB over idle.
    fn thousand(&self) -> anyhow::Result<[f64; 4]> {
        let host = self.host(&one_batch())?;
        host.reset_peak()?;
        let before = host.cpu_seconds()?;
        let mut firsts = streams(host.port, CHUNKS, PAUSE_MS, || Ok(()))?.1;
        firsts.sort_by(f64::total_cmp);
        let cpu = (host.cpu_seconds()? - before) / (CALLERS * CHUNKS) as f64 * 1e6;
        let over_idle = (host.peak_bytes()? - host.idle_bytes) / MIB;
        Ok([median(&firsts), share(&firsts, 0.99), cpu, over_idle])
    }

    /// Requests a second, median and 99th of `/predict_sync` while a thousand streams are open, of those before and after.
    fn beside(&self) -> anyhow::Result<[f64; 3]> {
        let host = self.host(&one_batch())?;
        let (body, script) = (self.folder.join("body.json"), self.folder.join("post.lua"));
        fs::write(&body, "{\"text\":\"hello world\"}")?;
        let before = self.sync(&host, &body, &script)?;
        // A chunk a second, until after the load.
        let (beside, _) = streams(host.port, self.seconds + 5, 1000, || self.sync(&host, &body, &script))?;
        let after = self.sync(&host, &body, &script)?;
        Ok([0, 1, 2].map(|at| beside[at] / f64::midpoint(before[at], after[at])))
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
pub(super) fn read_head(connection: &mut BufReader<TcpStream>) -> anyhow::Result<Option<usize>> {
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

pub(super) fn share(sorted: &[f64], share: f64) -> f64 {
    sorted[((sorted.len() - 1) as f64 * share) as usize]
}

/// What the threads of a thousand callers wait for.
const CONNECT: u8 = 0;
const ASK: u8 = 1;
const READ_ALL: u8 = 2;
const GIVE_UP: u8 = 3;

/// Sets the step to the last one, however its thread leaves.
struct GiveUp<'s>(&'s AtomicU8);

impl Drop for GiveUp<'_> {
    fn drop(&mut self) {
        self.0.store(GIVE_UP, Ordering::SeqCst);
    }
}

/// Opens a thousand streams at once, does something beside them, and reads them to their ends; gives what that returned, and the milliseconds to the
/// first event of each caller that reads.
fn streams<T>(
    port: u16,
    chunks: usize,
    pause_ms: u64,
    beside: impl FnOnce() -> anyhow::Result<T>,
) -> anyhow::Result<(T, Vec<f64>)> {
    let step = AtomicU8::new(CONNECT);
    let wait_for = |wanted: u8| {
        while step.load(Ordering::SeqCst) < wanted {
            // Hundreds look at once: they leave the processors to what is measured.
            thread::sleep(Duration::from_millis(if wanted == ASK { 2 } else { 100 }));
        }
    };
    let request = request("/predict_stream", chunks, pause_ms);
    let read = |caller: usize| -> anyhow::Result<Option<f64>> {
        let mut stream = TcpStream::connect(("127.0.0.1", port))?;
        wait_for(ASK);
        let asked = Instant::now();
        stream.write_all(request.as_bytes())?;
        let stalls = caller < STALLED;
        if stalls {
            wait_for(READ_ALL);
        }
        let mut connection = BufReader::with_capacity(1 << 10, stream);
        read_head(&mut connection)?;
        connection.read_line(&mut String::new())?;
        let first = asked.elapsed().as_secs_f64() * 1e3;
        read_lines_to(&mut connection, "event: end\n")?;
        let mut end = String::new();
        connection.read_line(&mut end)?;
        anyhow::ensure!(end.starts_with("data: {\"status\":\"success\""), "a stream ended with {end:?}");
        Ok((!stalls).then_some(first))
    };
    thread::scope(|scope| {
        let _give_up = GiveUp(&step);
        let mut callers = Vec::with_capacity(CALLERS);
        for caller in 0..CALLERS {
            let read = &read;
            callers.push(
                thread::Builder::new().stack_size(STACK_BYTES).spawn_scoped(scope, move || read(caller))?,
            );
        }
        // As long as a thousand connections need.
        thread::sleep(Duration::from_millis(500));
        step.store(ASK, Ordering::SeqCst);
        let done = beside()?;
        let (stalled, reading): (Vec<_>, Vec<_>) =
            callers.into_iter().enumerate().partition(|(caller, _)| *caller < STALLED);
        let join = |callers: Vec<(usize, thread::ScopedJoinHandle<'_, _>)>| {
            let joined = callers.into_iter().map(|(_, caller)| caller.join().expect("it returns its errors"));
            joined.collect::<anyhow::Result<Vec<Option<f64>>>>()
        };
        let firsts = join(reading)?;
        step.store(READ_ALL, Ordering::SeqCst);
        join(stalled)?;
        Ok((done, firsts.into_iter().flatten().collect()))
    })
}
