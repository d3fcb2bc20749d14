//! Asynchronous jobs: how many are accepted and run in a second, each on disk before its id is told; how many results reach Redis; beside
//! TaskIQ doing the same work with the same Redis, and beside the same bytes appended to SQLite with nothing around them.

use std::{
    fs,
    path::PathBuf,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};

use super::{
    median,
    process::Server,
    wrk::{self, Load},
};
use crate::{
    brokers::{self, Broker, free_port},
    build, python,
};

const CONCURRENCY: [usize; 3] = [1, 64, 256];
/// The concurrency of what is compared.
const COMPARED: usize = 64;
/// Tasks of one round of TaskIQ.
const TASKS: u64 = 3000;
/// Characters of the text that is echoed: with what is around it, a request has about a kibibyte.
const TEXT_CHARS: usize = 970;
const QUEUE: &str = "results";

/// What TaskIQ is asked to do, and by whom.
const TASKIQ: &str = r#"
import asyncio, json, os, sys, time
from redis.asyncio import Redis
from taskiq_redis import ListQueueBroker

TEXT = "x" * int(os.environ["CHARS"])
broker = ListQueueBroker(os.environ["URL"], queue_name="tasks")
results = Redis.from_url(os.environ["URL"])

@broker.task(task_name="echo")
async def echo(text):
    await results.lpush("results", json.dumps({"status": "success", "translated_text": text.upper(), "confidence": 0.95}))

async def main(tasks, concurrency):
    await broker.startup()
    # Until a worker has answered, and for as long as all of them may take to come.
    await echo.kiq("warm")
    while not await results.llen("results"):
        await asyncio.sleep(0.01)
    await asyncio.sleep(2)
    await results.delete("results")
    async def send(count):
        for _ in range(count):
            await echo.kiq(TEXT)
    begun = time.time()
    await asyncio.gather(*(send(tasks // concurrency) for _ in range(concurrency)))
    while await results.llen("results") < tasks // concurrency * concurrency:
        await asyncio.sleep(0.01)
    print((tasks // concurrency * concurrency) / (time.time() - begun))

if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2])))
"#;

pub(super) fn run(rounds: usize, seconds: usize) -> anyhow::Result<()> {
    wrk::ensure()?;
    brokers::ensure_redis()?;
    python::ensure()?;
    build::cargo(&["build", "--release", "--package", "modalkit", "--package", "echo"])?;
    build::cargo(&["build", "--release", "--package", "modalkit-journal", "--example", "appends"])?;
    let folder = fs::canonicalize("target")?.join(format!("bench-jobs-{}", std::process::id()));
    fs::create_dir_all(folder.join("volume"))?;
    fs::copy(build::release().join("libecho.so"), folder.join("volume/echo.so"))?;
    let measured = Bench { rounds, seconds, folder: folder.clone() }.measure();
    // On the disk of the workspace, and not in the system's folder, which may be in memory.
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
        let mut accepted = [(); CONCURRENCY.len()].map(|()| (Vec::new(), Vec::new(), Vec::new()));
        let (mut appended, mut delivered, mut tasks) = (Vec::new(), Vec::new(), Vec::new());
        for round in 0..self.rounds {
            println!("round {} of {}", round + 1, self.rounds);
            for (figures, concurrency) in accepted.iter_mut().zip(CONCURRENCY) {
                let (rate, p50, cpu) = self.accepted(concurrency)?;
                figures.0.push(rate);
                figures.1.push(p50);
                figures.2.push(cpu);
            }
            appended.push(self.appended()?);
            delivered.push(self.delivered()?);
            tasks.push(self.taskiq()?);
        }
        println!(
            "\njobs of echo, {} bytes each, {} rounds of {} s, medians; every acceptance synced to disk",
            envelope("").len(),
            self.rounds,
            self.seconds
        );
        for ((rate, p50, cpu), concurrency) in accepted.iter().zip(CONCURRENCY) {
            println!(
                "  accepted and run, {concurrency:>3} at once  {:>8.0} jobs/s  {:>7.3} ms p50  {:>6.1} µs CPU a job",
                median(rate),
                median(p50),
                median(cpu) * 1e6
            );
        }
        println!("  results in Redis, {COMPARED:>3} at once  {:>8.0} jobs/s", median(&delivered));
        println!("  TaskIQ,           {COMPARED:>3} at once  {:>8.0} jobs/s", median(&tasks));
        println!("  appends in groups of {COMPARED}        {:>8.0} rows/s", median(&appended));
        let ratio = |of: &[f64], to: &[f64]| {
            let pairs: Vec<f64> = of.iter().zip(to).map(|(of, to)| of / to).collect();
            median(&pairs)
        };
        let compared = &accepted[1].0;
        println!("jobs accepted and run, of the rate of appends: {:.2}", ratio(compared, &appended));
        println!("results in Redis, against TaskIQ: {:.1} times", ratio(&delivered, &tasks));
        Ok(())
    }

    fn host(&self, more: &str) -> anyhow::Result<Server> {
        let (port, config) = (free_port()?, self.folder.join("modalkit.toml"));
        let (volume, state) = (self.folder.join("volume"), self.folder.join("state"));
        let _ = fs::remove_dir_all(&state);
        fs::write(
            &config,
            format!(
                "[server]\nlisten = \"127.0.0.1:{port}\"\nlog = \"warn\"\nstate_folder = {state:?}\n{more}\n[app_settings.deployment_config.volumes]\n{volume:?} = \"bench\"\n"
            ),
        )?;
        Server::start(
            "modalkit",
            Command::new(build::release().join("modalkit")).arg("--config").arg(&config),
            port,
        )
    }

    fn load(&self, port: u16, concurrency: usize, body: &str) -> anyhow::Result<wrk::LoadResult> {
        let (file, script) = (self.folder.join("body.json"), self.folder.join("post.lua"));
        fs::write(&file, body)?;
        let load = Load {
            port,
            path: "/predict_async",
            concurrency,
            seconds: self.seconds,
            body: &file,
            script: &script,
            header: None,
        };
        let result = load.run()?;
        if result.failed > 0 {
            bail!("{} requests were not accepted", result.failed);
        }
        Ok(result)
    }

    /// Jobs that were accepted and have run: those that are left at the end are waited for, within the time.
    fn accepted(&self, concurrency: usize) -> anyhow::Result<(f64, f64, f64)> {
        let host = self.host("")?;
        let before = host.cpu_seconds()?;
        let begun = Instant::now();
        let result = self.load(host.port, concurrency, &envelope(""))?;
        while unended(host.port)? {
            thread::sleep(Duration::from_millis(1));
        }
        let rate = result.requests as f64 / begun.elapsed().as_secs_f64();
        let cpu = (host.cpu_seconds()? - before) / result.requests as f64;
        Ok((rate, result.p50_ms, cpu))
    }

    fn appended(&self) -> anyhow::Result<f64> {
        let folder = self.folder.join("appends");
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder)?;
        let program = build::release().join("examples/appends");
        let (bytes, group) = (envelope("").len().to_string(), COMPARED.to_string());
        let output =
            Command::new(program).arg(&folder).args([&bytes, &group, &self.seconds.to_string()]).output()?;
        let said = String::from_utf8_lossy(&output.stdout);
        said.trim()
            .parse()
            .with_context(|| format!("appends said {said:?}{}", String::from_utf8_lossy(&output.stderr)))
    }

    /// Results that lie in Redis, by the time from the first request to the last result.
    fn delivered(&self) -> anyhow::Result<f64> {
        let (redis, _data) = self.redis()?;
        let host = self.host(&format!(
            "[app_settings.queue_config]\nbackend = \"redis\"\nbroker_url = \"redis://127.0.0.1:{}\"\nallowed_queues = [\"results\"]",
            redis.port
        ))?;
        let begun = Instant::now();
        let result = self.load(host.port, COMPARED, &envelope(", \"success_queue\": \"results\""))?;
        while length(redis.port)? < result.requests {
            if begun.elapsed() > Duration::from_secs(120) {
                bail!("{} of {} results came", length(redis.port)?, result.requests);
            }
            thread::sleep(Duration::from_millis(1));
        }
        Ok(result.requests as f64 / begun.elapsed().as_secs_f64())
    }

    /// The same work by TaskIQ: a client, Redis, one worker with as many processes as there are cores.
    fn taskiq(&self) -> anyhow::Result<f64> {
        let (redis, _data) = self.redis()?;
        fs::write(self.folder.join("work.py"), TASKIQ)?;
        let cores = thread::available_parallelism().map_or(1, usize::from).to_string();
        let url = format!("redis://127.0.0.1:{}", redis.port);
        let mut worker = Command::new(python::tool("taskiq"));
        worker.args([
            "worker",
            "work:broker",
            "--workers",
            &cores,
            "--max-async-tasks",
            "100",
            "--no-configure-logging",
        ]);
        worker
            .current_dir(&self.folder)
            .env("URL", &url)
            .env("CHARS", TEXT_CHARS.to_string())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let _worker = Family(worker.spawn().context("can't start TaskIQ's worker")?);
        let client = Command::new(python::tool("python"))
            .args(["work.py", &TASKS.to_string(), &COMPARED.to_string()])
            .current_dir(&self.folder)
            .env("URL", &url)
            .env("CHARS", TEXT_CHARS.to_string())
            .output()?;
        let said = String::from_utf8_lossy(&client.stdout);
        said.trim()
            .parse()
            .with_context(|| format!("TaskIQ said {said:?}{}", String::from_utf8_lossy(&client.stderr)))
    }

    fn redis(&self) -> anyhow::Result<(Broker, Vanishes)> {
        let data = self.folder.join("redis");
        let _ = fs::remove_dir_all(&data);
        fs::create_dir_all(&data)?;
        Ok((Broker::redis(&data)?, Vanishes(data)))
    }
}

/// A request, and what else stands in its envelope.
fn envelope(more: &str) -> String {
    format!("{{\"message\": {{\"text\": \"{}\"}}{more}}}", "x".repeat(TEXT_CHARS))
}

/// A folder that goes with this.
struct Vanishes(PathBuf);

impl Drop for Vanishes {
    fn drop(&mut self) {
        // The whole folder goes at the end.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A process that is ended with its children.
struct Family(Child);

impl Drop for Family {
    fn drop(&mut self) {
        end_children(self.0.id());
        // It may have ended with them.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn end_children(process: u32) {
    let file = format!("/proc/{process}/task/{process}/children");
    for child in fs::read_to_string(file).unwrap_or_default().split_whitespace() {
        end_children(child.parse().unwrap_or_default());
        // It may have ended by itself.
        let _ = Command::new("sh").args(["-c", &format!("kill -KILL {child} 2>/dev/null")]).status();
    }
}

/// Whether a job hasn't ended.
fn unended(port: u16) -> anyhow::Result<bool> {
    for state in ["queued", "running"] {
        if !get(port, &format!("/jobs?state={state}&limit=1"))?.contains("\"jobs\":[]") {
            return Ok(true);
        }
    }
    Ok(false)
}

fn get(port: u16, path: &str) -> anyhow::Result<String> {
    use std::io::{Read, Write};
    let mut stream = std::net::TcpStream::connect(("127.0.0.1", port))?;
    write!(stream, "GET {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n")?;
    let mut said = String::new();
    stream.read_to_string(&mut said)?;
    Ok(said)
}

/// Results in Redis.
fn length(port: u16) -> anyhow::Result<u64> {
    let said = brokers::ask(port, &format!("LLEN {QUEUE}\r\n"))?;
    said.trim().trim_start_matches(':').parse().with_context(|| format!("Redis said {said:?}"))
}
