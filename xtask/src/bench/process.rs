//! A server under test: started, asked what the kernel counted for it, and ended by its process id.

use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context, bail};

const LOOKS: u32 = 200;
const BETWEEN_LOOKS: Duration = Duration::from_millis(50);
/// After the port answers, plugins may still be loading.
const SETTLE: Duration = Duration::from_millis(1000);

pub(super) struct Server {
    pub(super) name: &'static str,
    pub(super) port: u16,
    pub(super) idle_bytes: f64,
    /// Where it is asked, if not where the others are.
    pub(super) path: Option<&'static str>,
    child: Child,
}

impl Server {
    pub(super) fn start(name: &'static str, command: &mut Command, port: u16) -> anyhow::Result<Self> {
        let child = command.stdin(Stdio::null()).spawn().with_context(|| format!("can't start {name}"))?;
        let mut server = Self { name, port, idle_bytes: 0.0, path: None, child };
        for _ in 0..LOOKS {
            if TcpStream::connect(("127.0.0.1", port)).is_ok() {
                thread::sleep(SETTLE);
                server.idle_bytes = server.status("VmRSS:")?;
                return Ok(server);
            }
            if let Some(status) = server.child.try_wait()? {
                bail!("{name} ended: {status}");
            }
            thread::sleep(BETWEEN_LOOKS);
        }
        bail!("{name} did not answer on port {port}")
    }

    pub(super) fn with_path(mut self, path: &'static str) -> Self {
        self.path = Some(path);
        self
    }

    /// Waits for models that load after the port answers; of this host alone.
    pub(super) fn wait_until_ready(&self) -> anyhow::Result<()> {
        let request = b"GET /readyz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";
        for _ in 0..LOOKS {
            let mut stream = TcpStream::connect(("127.0.0.1", self.port))?;
            stream.write_all(request)?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            if answer.starts_with("HTTP/1.1 200") {
                return Ok(());
            }
            thread::sleep(BETWEEN_LOOKS);
        }
        bail!("{} was not ready", self.name)
    }

    /// CPU time of all threads there are now, of the server and of what it has started, from the scheduler: in nanoseconds, where `stat` counts
    /// hundredths.
    pub(super) fn cpu_seconds(&self) -> anyhow::Result<f64> {
        let mut nanoseconds = 0.0;
        for process in self.processes() {
            for thread in fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten() {
                let Ok(schedule) = fs::read_to_string(thread.path().join("schedstat")) else { continue };
                let spent: f64 = schedule.split_whitespace().next().context("schedstat is empty")?.parse()?;
                nanoseconds += spent;
            }
        }
        Ok(nanoseconds / 1e9)
    }

    /// Lets the peak of memory begin anew.
    pub(super) fn reset_peak(&self) -> anyhow::Result<()> {
        for process in self.processes() {
            // One that has ended meanwhile has none.
            let _ = fs::write(format!("/proc/{process}/clear_refs"), "5");
        }
        Ok(())
    }

    pub(super) fn peak_bytes(&self) -> anyhow::Result<f64> {
        self.status("VmHWM:")
    }

    /// The server's process, and all below it.
    fn processes(&self) -> Vec<u32> {
        let mut all = vec![self.child.id()];
        let mut next = 0;
        while let Some(process) = all.get(next) {
            let threads = fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten();
            let children =
                threads.filter_map(|thread| fs::read_to_string(thread.path().join("children")).ok());
            let children: Vec<u32> = children
                .flat_map(|line| line.split_whitespace().filter_map(|id| id.parse().ok()).collect::<Vec<_>>())
                .collect();
            all.extend(children);
            next += 1;
        }
        all
    }

    /// The sum of a line of the processes' status.
    fn status(&self, key: &str) -> anyhow::Result<f64> {
        let mut bytes = 0.0;
        for process in self.processes() {
            // One that has ended meanwhile has no memory any more.
            let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
            let Some(line) = status.lines().find_map(|line| line.strip_prefix(key)) else { continue };
            let kibibytes: f64 = line.trim().trim_end_matches("kB").trim().parse()?;
            bytes += kibibytes * 1024.0;
        }
        Ok(bytes)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Others than this host leave what they started.
        let below: Vec<String> = self.processes().iter().skip(1).map(u32::to_string).collect();
        // Each may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = Command::new("kill").arg("-9").args(below).stderr(Stdio::null()).status();
    }
}
