//! How a worker is started: its connections, its surroundings, and the first words with it. It never knows what is done with a worker that
//! serves.

use std::{
    fs::File,
    io,
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::PathBuf,
    process,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use modalkit_engine::{Confinement, Failure, FailureKind, LogLevel, PluginLog};
use parking_lot::Mutex;
use rustix::{
    fs::MemfdFlags,
    net::{AddressFamily, SocketFlags, SocketType},
    thread::CpuSet,
};

use crate::{
    cgroup::Cgroup,
    channel::{Breaker, Broken, Channel, End, Incoming, Outgoing, arena, send_descriptors},
    documents::{ConfinementDocument, Hello, SandboxDocument, Task},
    frame::Kind,
    items,
    life::Life,
    lines, supervisor,
};

/// Variables of the host's environment that workers have as well: where libraries and programs are found, and how times and texts are
/// written. All others stay here: any of them may be a secret.
const VARIABLES: [&str; 7] = ["LD_LIBRARY_PATH", "PATH", "TZ", "LANG", "LC_ALL", "TMPDIR", "RUST_BACKTRACE"];
/// The devices that CUDA shows a process.
const CUDA_DEVICES: &str = "CUDA_VISIBLE_DEVICES";
/// After a worker's connection has ended, the time in which its own end is expected.
pub(crate) const END_TIME: Duration = Duration::from_secs(1);

/// How long a worker may take to read what it is sent at the start.
const SEND_TIME_MAX: Duration = Duration::from_secs(10);

/// How workers are made.
#[derive(Clone)]
pub struct Program {
    /// The program that calls [`crate::child::run`].
    pub path: PathBuf,
    /// The argument that makes it do so; further ones follow it.
    pub argument: &'static str,
}

/// A worker that was told what to do.
pub(crate) struct Started {
    pub(crate) life: Arc<Life>,
    pub(crate) control: Channel,
    pub(crate) checks: Channel,
    pub(crate) lanes: Vec<Channel>,
    /// Where it is told of other levels of the log.
    pub(crate) log: OwnedFd,
    /// What of its confinement can't be had, or otherwise than was asked for.
    pub(crate) warnings: Vec<String>,
}

/// Starts a worker with connections for so many batches at once, and sends it the first document.
pub(crate) fn start(
    program: &Program,
    log: Option<&PluginLog>,
    confinement: &Confinement,
    lanes: usize,
    mut hello: Hello,
) -> io::Result<Started> {
    let mut warnings = Vec::new();
    let cgroup = Cgroup::new(confinement).unwrap_or_else(|why| {
        let instead = "memory is held by RLIMIT_DATA and cores by affinity instead";
        warnings.push(format!("no control group can be had ({why}): {instead}"));
        None
    });
    hello.confinement = ConfinementDocument {
        memory_bytes: confinement.memory_bytes.filter(|_| cgroup.is_none()),
        cpus: confinement.cores.filter(|_| cgroup.is_none()).map(next_cpus),
        sandbox: confinement
            .sandbox
            .as_ref()
            .map(|sandbox| SandboxDocument { readable: sandbox.readable.clone(), network: sandbox.network }),
    };
    let note: File = rustix::fs::memfd_create("modalkit-note", MemfdFlags::CLOEXEC)?.into();
    let (log_here, log_there) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    // It waits for this.
    let level = log.map_or(LogLevel::Off, |log| (log.level)());
    rustix::net::send(&log_here, &[lines::level_number(level)], rustix::net::SendFlags::NOSIGNAL)?;
    let (control, control_there) = UnixStream::pair()?;
    // A worker that doesn't read is found out, and not waited for.
    control.set_write_timeout(Some(SEND_TIME_MAX))?;
    let (mut channels, mut theirs) = (Vec::with_capacity(1 + lanes), Vec::with_capacity(1 + lanes));
    for _ in 0..=lanes {
        let ((here, there), memory) = (UnixStream::pair()?, arena()?);
        theirs.push([there.into(), memory.try_clone()?.into()]);
        channels.push(Channel::new(here, Some(memory), End::Host));
    }
    let mut breakers: Vec<Breaker> = channels.iter().map(Channel::breaker).collect::<Result<_, _>>()?;
    breakers.push(Breaker::of(&control)?);
    let mut arguments = vec![program.argument.to_owned(), process::id().to_string(), (1 + lanes).to_string()];
    arguments.extend(cgroup.as_ref().map(|group| group.path().display().to_string()));
    let notes_of_worker: [OwnedFd; 2] = [note.try_clone()?.into(), log_there];
    let life = Arc::new(Life::new(hello.model_name.clone(), breakers, note, cgroup));
    if hello.task != Task::Serve {
        life.set_leaves();
    }
    let devices: Vec<&str> = hello.devices.iter().map(|device| device.uuid.as_str()).collect();
    let variable = |name: &&str| Some(((*name).to_owned(), std::env::var(name).ok()?));
    let mut environment: Vec<(String, String)> = VARIABLES.iter().filter_map(variable).collect();
    environment.push((CUDA_DEVICES.to_owned(), devices.join(",")));
    supervisor::shared(log.copied())?.spawn(supervisor::Order {
        program: program.path.clone(),
        arguments,
        environment,
        control: control_there.into(),
        log: log_here.try_clone()?,
        life: Arc::clone(&life),
    })?;
    // First: with descriptors, nothing may be read ahead. Where any of this fails the worker has died, which whoever waits for its answer hears.
    let mut sent = send_descriptors(&control, Kind::Lane, &notes_of_worker);
    for descriptors in &theirs {
        sent = sent.and_then(|()| send_descriptors(&control, Kind::Lane, descriptors));
    }
    let mut control = Channel::new(control, None, End::Host);
    let document = items::document(&hello);
    if sent.is_err() || control.send(&Outgoing::of(Kind::Hello, items::PAYLOAD, &document)).is_err() {
        life.kill("it did not take its connections");
    }
    let mut channels = channels.into_iter();
    let checks = channels.next().ok_or(io::ErrorKind::InvalidData)?;
    Ok(Started { life, control, checks, lanes: channels.collect(), log: log_here, warnings })
}

impl Started {
    /// Ends it where it doesn't end by itself: its work is done, or it never had any.
    pub(crate) fn end(self) {
        if self.life.wait(END_TIME).is_none() {
            self.life.kill("it did not end when its work was done");
            self.life.wait(END_TIME);
        }
    }

    /// Waits for the answer to the first document.
    ///
    /// # Errors
    /// What the worker said, how it died, or that it took too long, and was ended.
    pub(crate) fn answer(&mut self, limit: Duration, late: &str) -> Result<bytes::Bytes, Failure> {
        let until = Instant::now() + limit;
        let received = self
            .control
            .limit(Some(limit))
            .map_err(Broken::from)
            .and_then(|()| self.control.receive())
            .and_then(|incoming| Ok((incoming.kind, incoming.single("an answer to the first document")?)));
        let died = |how: String| Failure { kind: FailureKind::Died, message: how };
        match received {
            Ok((Kind::Ready, item)) => {
                self.control.limit(None).map_err(|error| died(error.to_string()))?;
                Ok(item.payload)
            }
            Ok((Kind::Failed, item)) => {
                // It ends now, and has said why.
                self.life.set_leaves();
                let unreadable = || died("it failed for a reason that can't be read".into());
                Err(items::failure(&item).unwrap_or_else(unreadable))
            }
            Err(Broken::TimedOut) => {
                let death = self.life.wait_for_death(Duration::ZERO, late);
                Err(died(death.how))
            }
            Ok((found, _)) => {
                Err(died(self.life.wait_for_death(Duration::ZERO, &format!("it sent {found:?}")).how))
            }
            Err(broken) => {
                let patience = END_TIME.min(until.saturating_duration_since(Instant::now()));
                Err(died(self.life.wait_for_death(patience, &broke(&broken)).how))
            }
        }
    }
}

/// Why a worker is ended whose connection broke.
pub(crate) fn broke(broken: &Broken) -> String {
    match broken {
        Broken::Ended | Broken::Reset => "it closed its connection to the host".into(),
        Broken::Garbage(garbage) => format!("it sent {garbage}"),
        other => format!("its connection broke: {other}"),
    }
}

/// Sends a frame and waits for one of this kind.
pub(crate) fn ask(channel: &Mutex<Channel>, frame: &Outgoing<'_>, kind: Kind) -> Result<Incoming, Broken> {
    let mut channel = channel.lock();
    channel.send(frame)?;
    let incoming = channel.receive()?;
    if incoming.kind == kind {
        return Ok(incoming);
    }
    Err(crate::frame::Garbage::Kinds { expected: "the answer", found: incoming.kind }.into())
}

/// Whole cores for a worker where they can't be had in parts, the next ones in turn of those that the host may use.
fn next_cpus(cores: f64) -> Vec<u32> {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let Ok(allowed) = rustix::thread::sched_getaffinity(None) else { return Vec::new() };
    let allowed: Vec<u32> =
        (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu)).map(|cpu| cpu as u32).collect();
    let wanted = (cores.ceil() as usize).clamp(1, allowed.len().max(1));
    if wanted >= allowed.len() {
        return Vec::new();
    }
    let first = NEXT.fetch_add(wanted, Ordering::Relaxed);
    (0..wanted).map(|offset| allowed[(first + offset) % allowed.len()]).collect()
}
