//! The load: wrk, from Debian's packages, in a process of its own.

use std::{fs, path::Path, process::Command};

use anyhow::{Context, bail};

use crate::build;

pub(super) struct Load<'a> {
    pub(super) port: u16,
    pub(super) path: &'a str,
    pub(super) concurrency: usize,
    pub(super) seconds: usize,
    pub(super) body: &'a Path,
    pub(super) script: &'a Path,
    /// A header that each request has.
    pub(super) header: Option<(&'a str, &'a str)>,
}

pub(super) struct LoadResult {
    pub(super) requests: u64,
    pub(super) failed: u64,
    pub(super) requests_per_second: f64,
    pub(super) p50_ms: f64,
    pub(super) p99_ms: f64,
}

/// Installs wrk where that is possible, or says how.
pub(super) fn ensure() -> anyhow::Result<()> {
    if Command::new("wrk").arg("--version").output().is_ok() {
        return Ok(());
    }
    println!("wrk makes the load; installing it");
    build::run(Command::new("apt-get").args(["install", "--yes", "wrk"]))
        .context("the benchmark needs wrk: install it with `apt-get install wrk`, as root")
}

const THREADS_MAX: usize = 2;

impl Load<'_> {
    pub(super) fn run(&self) -> anyhow::Result<LoadResult> {
        let header = self
            .header
            .map(|(name, value)| format!("wrk.headers[{name:?}] = {value:?}\n"))
            .unwrap_or_default();
        // The figures come from Lua, in microseconds and whole numbers, rather than from text made for people.
        let script = format!(
            "local file = io.open({:?}, 'rb')\nwrk.method = 'POST'\nwrk.body = file:read('*a')\nfile:close()\n\
             wrk.headers['content-type'] = 'application/json'\n{header}\
             done = function(summary, latency, requests)\n  \
             local e = summary.errors\n  \
             print(string.format('RESULT %d %d %d %f %f', summary.requests, summary.duration, \
             e.connect + e.read + e.write + e.status + e.timeout, latency:percentile(50), latency:percentile(99)))\nend\n",
            self.body.display().to_string()
        );
        fs::write(self.script, script)?;
        let out = Command::new("wrk")
            .arg(format!("-t{}", self.concurrency.min(THREADS_MAX)))
            .arg(format!("-c{}", self.concurrency))
            .arg(format!("-d{}s", self.seconds))
            .arg("-s")
            .arg(self.script)
            .arg(format!("http://127.0.0.1:{}{}", self.port, self.path))
            .output()
            .context("can't start wrk")?;
        let text = String::from_utf8_lossy(&out.stdout);
        let Some(line) = text.lines().find_map(|line| line.strip_prefix("RESULT ")) else {
            bail!("wrk gave no result: {text}{}", String::from_utf8_lossy(&out.stderr));
        };
        let numbers: Vec<f64> = line.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
        let [requests, microseconds, failed, p50, p99] = numbers[..] else {
            bail!("wrk's result is {line:?}")
        };
        Ok(LoadResult {
            requests: requests as u64,
            failed: failed as u64,
            requests_per_second: requests / (microseconds / 1e6),
            p50_ms: p50 / 1e3,
            p99_ms: p99 / 1e3,
        })
    }
}
