//! The worker's side: a guard and, its only child, the worker itself. The guard is there so that nothing stays: it runs no plugin code, sees the
//! host's end and the worker's, and then ends whatever the worker has started, wherever that has hidden.

mod confine;
mod guard;
mod interpreter;
mod notices;
mod sandbox;
mod seccomp;
mod serve;

use std::{
    fs::{self, File},
    io,
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    sync::Arc,
};

use modalkit_engine::{Plugin, PluginLog};
use rustix::process::{Pid, PidfdFlags, Signal};

use crate::{
    channel::{Channel, End, receive_descriptors},
    frame::Kind,
};

/// An opened plugin, and what tells it that another level of the log is wanted.
pub type Opened = (Arc<dyn Plugin>, Box<dyn Fn() + Send>);

/// What a worker needs of whoever makes plugins of files.
#[derive(Clone, Copy)]
pub struct Loader {
    /// Opens a private copy of a file in this process.
    pub open: fn(&Path, &Path, PluginLog) -> Result<Opened, String>,
    /// Has it noted in this file how plugin code ends the process.
    pub note_endings: fn(&'static File) -> io::Result<()>,
}

/// The connections that a worker is given.
struct Connections {
    control: Channel,
    checks: Channel,
    lanes: Vec<Channel>,
    note: &'static File,
    log: OwnedFd,
    /// Where the guard hears what it is to answer for; gone before plugin code runs.
    guard: Option<UnixStream>,
}

/// A worker's whole life; what comes back is its exit code. Called before the process has any other thread. The arguments are those that the host
/// gave: its process id, how many connections follow, and the control group to join, if any.
///
/// # Errors
/// The system refuses what every worker needs.
pub fn run(host: i32, connections: usize, cgroup: Option<PathBuf>, loader: Loader) -> io::Result<u8> {
    close_inherited()?;
    let control: OwnedFd = rustix::io::fcntl_dupfd_cloexec(io::stdin(), 3)?;
    rustix::stdio::dup2_stdin(File::open("/dev/null")?)?;
    if let Some(group) = cgroup {
        fs::write(group.join("cgroup.procs"), "0")?;
    }
    let host = Pid::from_raw(host).ok_or(io::ErrorKind::InvalidInput)?;
    let watched = rustix::process::pidfd_open(host, PidfdFlags::empty())?;
    if rustix::process::getppid() != Some(host) {
        return Err(io::Error::other("only a host starts workers, and it is gone"));
    }
    // Signals for the host's terminal, or for all processes of its service, are none for workers: the host ends them in its order.
    rustix::process::setsid()?;
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
        // SAFETY: a function that does nothing may run at any moment. Unlike a signal that is ignored, it isn't passed on to programs that a
        // pipeline starts.
        unsafe { libc::signal(signal, pass_over as *const () as usize) };
    }
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
    let guard = rustix::process::getpid();
    let (guards_end, workers_end) = UnixStream::pair()?;
    // SAFETY: this process has one thread, so that its copy finds everything as it is here.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            drop((watched, guards_end));
            rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
            if rustix::process::getppid() != Some(guard) {
                return Err(io::Error::other("its guard is gone"));
            }
            serve::run(take_connections(control.into(), connections, workers_end)?, loader)
        }
        worker => {
            let worker = Pid::from_raw(worker).ok_or(io::ErrorKind::InvalidData)?;
            drop(workers_end);
            guard::watch(&watched, &control, &guards_end, worker)
        }
    }
}

extern "C" fn pass_over(_: i32) {}

/// Whatever the host has open, plugins' files too, is none of the worker's.
fn close_inherited() -> io::Result<()> {
    // SAFETY: a plain system call; this process has opened nothing yet that it would use again.
    if unsafe { libc::syscall(libc::SYS_close_range, 3_u32, u32::MAX, 0_u32) } == 0 {
        return Ok(());
    }
    let open: Vec<i32> = fs::read_dir("/proc/self/fd")?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|descriptor| *descriptor > 2)
        .collect();
    for descriptor in open {
        // SAFETY: as above; the one that listed them is closed already.
        unsafe { libc::close(descriptor) };
    }
    Ok(())
}

fn take_connections(control: UnixStream, connections: usize, guard: UnixStream) -> io::Result<Connections> {
    let mut pairs = Vec::with_capacity(1 + connections);
    for _ in 0..=connections {
        let descriptors = receive_descriptors(&control, Kind::Lane).map_err(io::Error::other)?;
        let [one, other]: [OwnedFd; 2] =
            descriptors.try_into().map_err(|_| io::Error::other("a connection without its descriptors"))?;
        pairs.push((one, other));
    }
    let mut pairs = pairs.into_iter();
    let missing = || io::Error::other("a connection is missing");
    let (note, log) = pairs.next().ok_or_else(missing)?;
    let mut channels =
        pairs.map(|(socket, memory)| Channel::new(socket.into(), Some(memory.into()), End::Worker));
    let checks = channels.next().ok_or_else(missing)?;
    Ok(Connections {
        control: Channel::new(control, None, End::Worker),
        checks,
        lanes: channels.collect(),
        note: Box::leak(Box::new(note.into())),
        log,
        guard: Some(guard),
    })
}
