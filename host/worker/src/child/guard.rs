//! The guard: waits for the end of the host, of its connection to the worker, or of the worker, then ends all that is left below it and goes the
//! way that the worker went.

use std::{
    fs, io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    process, thread,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, Resource, Rlimit, Signal, WaitOptions, WaitStatus, kill_process, wait},
};

use super::notices::Notices;
use crate::{
    channel::{Channel, End, receive_descriptors},
    frame::Kind,
    items,
};

/// Between two looks for descendants that came meanwhile.
const BETWEEN_LOOKS: Duration = Duration::from_millis(1);
/// What can't be killed by then stays: it hangs in the kernel.
const KILL_TIME_MAX: Duration = Duration::from_secs(10);
/// The exit code where nobody knows the worker's.
const UNKNOWN: u8 = 70;
/// Has a worker that catches it print where its threads are: the worker of Python does, by `faulthandler`.
pub(super) const STACK_SIGNAL: i32 = 62;
/// How long that may take.
const STACK_TIME: Timespec = Timespec { tv_sec: 0, tv_nsec: 200_000_000 };

/// Returns the worker's exit code, or ends as it did.
pub(super) fn watch(host: &OwnedFd, control: &OwnedFd, confined: &UnixStream, worker: Pid) -> io::Result<u8> {
    // For people who look at lists of processes.
    let _ = rustix::thread::set_name(c"modalkit-guard");
    let ends = rustix::process::pidfd_open(worker, PidfdFlags::empty());
    let mut notices = None;
    // Says nothing, or that there is a sandbox, once.
    let mut confined = Some(confined);
    while let Ok(ends) = &ends {
        let mut wanted = vec![
            PollFd::new(host, PollFlags::IN),
            PollFd::from_borrowed_fd(control.as_fd(), PollFlags::RDHUP),
            PollFd::new(ends, PollFlags::IN),
        ];
        wanted.extend(confined.map(|confined| PollFd::new(confined, PollFlags::IN)));
        wanted.extend(notices.iter().map(|notices: &Notices| PollFd::new(notices.listener(), PollFlags::IN)));
        match poll(&mut wanted, None) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(_) => break,
        }
        let [of_host, of_control, of_worker] = [0, 1, 2].map(|at: usize| !wanted[at].revents().is_empty());
        if of_host || of_control || of_worker {
            drop(wanted);
            // The host has had enough of it, and is there to hear why that took so long.
            if of_control && !of_host && !of_worker {
                ask_for_stack(worker, ends);
            }
            break;
        }
        let has_something = wanted[3..].iter().any(|one| !one.revents().is_empty());
        drop(wanted);
        if let (Some(socket), true) = (confined, has_something) {
            notices = take_notices(socket);
            confined = None;
        } else if let (Some(answering), true) = (&mut notices, has_something) {
            match answering.answer() {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => notices = None,
                _ => {}
            }
        }
    }
    let status = end_all(worker);
    match status {
        Some(status) => Ok(end_like(status)),
        None => Ok(UNKNOWN),
    }
}

/// A worker that left by itself is gone, one that hangs says where.
fn ask_for_stack(worker: Pid, ends: &OwnedFd) {
    let mut wanted = [PollFd::new(ends, PollFlags::IN)];
    if catches(worker, STACK_SIGNAL) && poll(&mut wanted, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) == Ok(0)
    {
        // SAFETY: a plain system call. The process is this one's child and not waited for yet: no other has its number.
        unsafe { libc::kill(worker.as_raw_pid(), STACK_SIGNAL) };
        let _ = poll(&mut wanted, Some(&STACK_TIME));
    }
}

/// Whether a process has a handler for a signal.
fn catches(process: Pid, signal: i32) -> bool {
    let status = fs::read_to_string(format!("/proc/{}/status", process.as_raw_pid())).unwrap_or_default();
    let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
    let caught = caught.and_then(|caught| u64::from_str_radix(caught.trim(), 16).ok()).unwrap_or_default();
    caught >> (signal - 1) & 1 == 1
}

/// What the worker sends once it is confined; nothing comes where it isn't.
fn take_notices(socket: &UnixStream) -> Option<Notices> {
    let [listener, log] = <[OwnedFd; 2]>::try_from(receive_descriptors(socket, Kind::Lane).ok()?).ok()?;
    let guarded = Channel::new(socket.try_clone().ok()?, None, End::Host).receive().ok()?;
    let guarded = guarded.single("what is guarded").ok()?;
    Some(Notices::new(listener, log, items::read(&guarded.payload).ok()?))
}

/// Ends every descendant. Those whose parents end become children of this process, which is their reaper. How the worker ended comes back.
fn end_all(worker: Pid) -> Option<WaitStatus> {
    let (begun, mut status) = (Instant::now(), None);
    loop {
        kill_descendants(begun);
        loop {
            match wait(WaitOptions::NOHANG) {
                Ok(Some((pid, ended))) if pid == worker => status = Some(ended),
                Ok(Some(_)) => {}
                // Some are still there.
                Ok(None) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => return status,
            }
        }
        if begun.elapsed() > KILL_TIME_MAX {
            return status;
        }
        thread::sleep(BETWEEN_LOOKS);
    }
}

/// Each as it is found, before its own are looked for: one that forks without end is to have no time for that.
fn kill_descendants(begun: Instant) {
    let mut parents = vec![process::id() as i32];
    while let Some(parent) = parents.pop() {
        for child in children(parent) {
            if let Some(pid) = Pid::from_raw(child) {
                // Its children are looked for while it can't make more. It may have ended already.
                let _ = kill_process(pid, Signal::STOP);
                parents.push(child);
            }
        }
        if let Some(pid) = Pid::from_raw(parent).filter(|_| parent != process::id() as i32) {
            let _ = kill_process(pid, Signal::KILL);
        }
        if begun.elapsed() > KILL_TIME_MAX {
            return;
        }
    }
}

fn children(parent: i32) -> Vec<i32> {
    if let Ok(threads) = fs::read_dir(format!("/proc/{parent}/task")) {
        let mut lists = threads.flatten().map(|thread| fs::read_to_string(thread.path().join("children")));
        let mut found = Vec::new();
        if lists.all(|list| {
            list.map(|list| found.extend(list.split_whitespace().filter_map(|pid| pid.parse::<i32>().ok())))
                .is_ok()
        }) {
            return found;
        }
    }
    // It has ended meanwhile, or the kernel has no such lists.
    let parent_of = |pid: i32| -> Option<i32> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
    };
    let all = fs::read_dir("/proc").into_iter().flatten();
    all.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|pid| parent_of(*pid) == Some(parent))
        .collect()
}

fn end_like(status: WaitStatus) -> u8 {
    if let Some(signal) = status.terminating_signal() {
        // The worker has left a core, where one is wanted.
        let _ = rustix::process::setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) });
        // SAFETY: restores a signal's own effect and raises it; the process has one thread and nothing to lose.
        unsafe {
            libc::signal(signal, libc::SIG_DFL);
            libc::raise(signal);
        }
    }
    status.exit_status().map_or(UNKNOWN, |code| code as u8)
}
