//! The one thread that starts worker processes and sees them end: it takes what they log and print, and writes down how they died. It never
//! waits for any of them, and knows nothing of what they run.

use std::{
    io::{self, PipeReader, Read},
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{Arc, OnceLock, mpsc},
    thread,
    time::{Duration, Instant},
};

use modalkit_engine::{LogLevel, PluginLog};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags},
};

use crate::{life::Life, lines};

/// The guard of a worker that was killed ends by itself, once all of its descendants have, and gives up on them before this; then it is killed
/// as well.
const GUARD_TIME_MAX: Duration = Duration::from_secs(12);
/// Looks at processes that should be gone come at least so often.
const BETWEEN_LOOKS: Duration = Duration::from_millis(200);
/// Workers that wait to be started; whoever wants a further one waits.
const ORDERS_MAX: usize = 64;
/// Lines of one worker that are taken before others have their turn.
const LINES_MAX: usize = 64;
/// The same of one that has ended: something that escaped may write on.
const LAST_LINES_MAX: usize = 1000;
/// Bytes of a printed line; what is longer becomes several.
const PRINTED_BYTES_MAX: usize = 16 << 10;
/// What printed lines are logged under.
const PRINTED: &str = "stdout";

/// What a worker is started with.
pub(crate) struct Order {
    pub(crate) program: PathBuf,
    pub(crate) arguments: Vec<String>,
    pub(crate) environment: Vec<(String, String)>,
    /// The worker's end of its first connection, as its standard input.
    pub(crate) control: OwnedFd,
    /// The host's end of the connection for the log.
    pub(crate) log: OwnedFd,
    pub(crate) life: Arc<Life>,
}

/// The thread, from outside.
pub(crate) struct Supervisor {
    orders: mpsc::SyncSender<(Order, mpsc::SyncSender<io::Result<()>>)>,
    waker: UnixStream,
}

struct Watched {
    life: Arc<Life>,
    child: Child,
    process: OwnedFd,
    output: Option<PipeReader>,
    printed: Vec<u8>,
    log: Option<OwnedFd>,
}

impl Supervisor {
    /// Starts the thread. It lasts as long as the process.
    pub(crate) fn start(log: Option<PluginLog>) -> io::Result<Self> {
        let (orders, taken) = mpsc::sync_channel(ORDERS_MAX);
        let (waker, woken) = UnixStream::pair()?;
        waker.set_nonblocking(true)?;
        woken.set_nonblocking(true)?;
        thread::Builder::new().name("supervisor".into()).spawn(move || run(&taken, &woken, log))?;
        Ok(Self { orders, waker })
    }

    /// Starts a worker.
    pub(crate) fn spawn(&self, order: Order) -> io::Result<()> {
        let (reply, started) = mpsc::sync_channel(1);
        let ended = |_| io::Error::other("the thread that starts workers has ended");
        self.orders.send((order, reply)).map_err(|_| ended(mpsc::RecvError))?;
        self.wake();
        started.recv().map_err(ended)?
    }

    /// Has the thread look at processes that were killed.
    pub(crate) fn wake(&self) {
        // Where it is full, the thread is woken already.
        let _ = rustix::io::write(&self.waker, &[1]);
    }
}

fn run(
    orders: &mpsc::Receiver<(Order, mpsc::SyncSender<io::Result<()>>)>,
    woken: &UnixStream,
    log: Option<PluginLog>,
) {
    let mut all: Vec<Watched> = Vec::new();
    loop {
        let now = Instant::now();
        let overdue = all.iter().filter_map(|watched| watched.life.killed_at());
        let wait =
            overdue.map(|at| (at + GUARD_TIME_MAX).saturating_duration_since(now).max(BETWEEN_LOOKS)).min();
        wait_for(&all, woken, wait);
        let mut bytes = [0; 64];
        while matches!(rustix::io::read(woken, &mut bytes), Ok(1..)) {}
        loop {
            match orders.try_recv() {
                Ok((order, reply)) => {
                    let started = start(order).map(|watched| all.push(watched));
                    // Whoever asked waits.
                    let _ = reply.send(started);
                }
                Err(mpsc::TryRecvError::Empty) => break,
                Err(mpsc::TryRecvError::Disconnected) if all.is_empty() => return,
                Err(mpsc::TryRecvError::Disconnected) => break,
            }
        }
        all.retain_mut(|watched| !watched.look(log.as_ref()));
    }
}

/// Waits until something has happened, or for so long.
fn wait_for(all: &[Watched], woken: &UnixStream, limit: Option<Duration>) {
    let mut wanted = vec![PollFd::new(woken, PollFlags::IN)];
    for watched in all {
        wanted.push(PollFd::new(&watched.process, PollFlags::IN));
        wanted.extend(watched.log.iter().map(|log| PollFd::new(log, PollFlags::IN)));
        wanted.extend(watched.output.iter().map(|output| PollFd::new(output, PollFlags::IN)));
    }
    let limit =
        limit.map(|limit| Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: limit.subsec_nanos().into() });
    // Interrupted, or for want of memory: everything is looked at all the same.
    if poll(&mut wanted, limit.as_ref()).is_err() {
        thread::sleep(Duration::from_millis(1));
    }
}

fn start(order: Order) -> io::Result<Watched> {
    let (output, writer) = io::pipe()?;
    let mut child = Command::new(&order.program)
        .args(&order.arguments)
        .env_clear()
        .envs(order.environment)
        .stdin(Stdio::from(order.control))
        .stdout(writer.try_clone()?)
        .stderr(writer)
        .spawn()?;
    let watched = || {
        rustix::io::ioctl_fionbio(&output, true)?;
        rustix::io::ioctl_fionbio(&order.log, true)?;
        let pid = Pid::from_raw(child.id() as i32).ok_or(io::ErrorKind::InvalidData)?;
        Ok::<OwnedFd, io::Error>(rustix::process::pidfd_open(pid, PidfdFlags::empty())?)
    };
    match watched() {
        Ok(process) => Ok(Watched {
            life: order.life,
            child,
            process,
            output: Some(output),
            printed: Vec::new(),
            log: Some(order.log),
        }),
        Err(error) => {
            // It may have ended already.
            let _ = child.kill();
            let _ = child.wait();
            Err(error)
        }
    }
}

impl Watched {
    /// Takes what has come; whether the process has ended.
    fn look(&mut self, log: Option<&PluginLog>) -> bool {
        self.take_output(log, LINES_MAX);
        self.take_log(log, LINES_MAX);
        if self.life.killed_at().is_some_and(|at| at.elapsed() >= GUARD_TIME_MAX) {
            // The worker goes with its guard. It may have ended already.
            let _ = self.child.kill();
        }
        let status = match self.child.try_wait() {
            Ok(None) => return false,
            Ok(Some(status)) => Ok(status),
            Err(error) => Err(error),
        };
        // What it said last.
        self.take_log(log, LAST_LINES_MAX);
        self.take_output(log, LAST_LINES_MAX);
        let expected = self.life.was_expected();
        let death = self.life.ended(status);
        if let Some(log) = log.filter(|_| !expected) {
            let message = format!("a worker process has died: {}", death.how);
            (log.sink)(LogLevel::Error, &self.life.model, module_path!(), &message, "");
        }
        true
    }

    fn take_log(&mut self, log: Option<&PluginLog>, most: usize) {
        let mut bytes = vec![0; lines::BYTES_MAX];
        for _ in 0..most {
            let Some(socket) = &self.log else { return };
            let received = rustix::net::recv(socket, &mut bytes[..], rustix::net::RecvFlags::DONTWAIT);
            let length = match received {
                // The worker has closed its end.
                Ok((0, _)) => {
                    self.log = None;
                    return;
                }
                Ok((length, _)) => length,
                Err(_) => return,
            };
            let (Some(line), Some(log)) = (lines::read(&bytes[..length]), log) else { continue };
            (log.sink)(line.level, &self.life.model, &line.target, &line.message, &line.fields);
        }
    }

    fn take_output(&mut self, log: Option<&PluginLog>, most: usize) {
        let Some(output) = &mut self.output else { return };
        for _ in 0..most {
            let mut bytes = [0; PRINTED_BYTES_MAX];
            match output.read(&mut bytes) {
                Ok(0) => {
                    self.output = None;
                    break;
                }
                Ok(length) => self.printed.extend_from_slice(&bytes[..length]),
                Err(_) => break,
            }
            while let Some(end) = self.printed.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.printed.drain(..=end).collect();
                print(log, &self.life.model, &line);
            }
            if self.printed.len() >= PRINTED_BYTES_MAX {
                print(log, &self.life.model, &std::mem::take(&mut self.printed));
            }
        }
        if self.output.is_none() && !self.printed.is_empty() {
            print(log, &self.life.model, &std::mem::take(&mut self.printed));
        }
    }
}

fn print(log: Option<&PluginLog>, model: &str, line: &[u8]) {
    let text = String::from_utf8_lossy(line.trim_ascii_end());
    if let Some(log) = log.filter(|_| !text.is_empty()) {
        (log.sink)(LogLevel::Info, model, PRINTED, &text, "");
    }
}

/// The supervisor of this process.
pub(crate) fn shared(log: Option<PluginLog>) -> io::Result<&'static Supervisor> {
    static SHARED: OnceLock<Supervisor> = OnceLock::new();
    if let Some(supervisor) = SHARED.get() {
        return Ok(supervisor);
    }
    let supervisor = Supervisor::start(log)?;
    Ok(SHARED.get_or_init(|| supervisor))
}
