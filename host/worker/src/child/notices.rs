//! The guard's answers to system calls of a worker in a sandbox: what is refused is refused with a line in the log; files are opened or not as
//! Landlock has it, and what that forbids is told as well. It never decides what is allowed.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{ffi::OsStrExt, fs::FileExt},
    },
    path::{Path, PathBuf},
};

use modalkit_engine::LogLevel;
use serde::{Deserialize, Serialize};

use super::{sandbox, seccomp};
use crate::lines;

/// Lines of one worker.
const LINES_MAX: u32 = 100;
/// Bytes of a path that is read.
const PATH_BYTES_MAX: usize = 4096;
const TARGET: &str = "modalkit::sandbox";
const WRITING: u64 = (libc::O_WRONLY | libc::O_RDWR | libc::O_CREAT | libc::O_TRUNC) as u64;

/// What a worker may do.
#[derive(Deserialize, Serialize)]
pub(super) struct Guarded {
    /// Files and folders, without links.
    pub(super) readable: Vec<PathBuf>,
    /// It is yet to become an interpreter: once, before it runs any code of others.
    pub(super) executes: bool,
}

/// What a worker may not do, as it tries it.
pub(super) struct Notices {
    listener: OwnedFd,
    log: OwnedFd,
    guarded: Guarded,
    lines: u32,
}

impl Notices {
    pub(super) fn new(listener: OwnedFd, log: OwnedFd, guarded: Guarded) -> Self {
        Self { listener, log, guarded, lines: 0 }
    }

    pub(super) fn listener(&self) -> &OwnedFd {
        &self.listener
    }

    /// Answers the next one.
    ///
    /// # Errors
    /// The worker is gone.
    pub(super) fn answer(&mut self) -> io::Result<()> {
        // SAFETY: zeroes are a valid value of this structure of integers, and what the kernel wants to find.
        let mut notice: libc::seccomp_notif = unsafe { std::mem::zeroed() };
        // SAFETY: the kernel writes one structure of this type, which is ours.
        self.control(libc::SECCOMP_IOCTL_NOTIF_RECV, unsafe { &mut *(&raw mut notice).cast() })?;
        let number = libc::c_long::from(notice.data.nr);
        let mut allowed = seccomp::OPENING.contains(&number);
        if number == libc::SYS_execve && std::mem::take(&mut self.guarded.executes) {
            allowed = true;
        } else if allowed {
            if let Some((path, writes)) = self.opened(&notice)
                && !sandbox::may_open(&self.guarded.readable, &path, writes)
            {
                // Reading is Landlock's to refuse; what is opened for writing is refused here as well, whatever that holds.
                allowed = !writes;
                let what = if writes { "write" } else { "read" };
                self.tell(&format!("the sandbox does not let it {what} {}", path.display()));
            }
        } else {
            let others = [&seccomp::CLONE, &seccomp::PAIR];
            let all =
                seccomp::REFUSED.iter().chain(&seccomp::NETWORK).chain(&seccomp::OF_A_PROCESS).chain(others);
            let name = all.into_iter().find(|(known, _)| *known == number).map_or("?", |(_, name)| name);
            self.tell(&format!("the sandbox refuses the system call {name}"));
        }
        let response = libc::seccomp_notif_resp {
            id: notice.id,
            val: 0,
            error: if allowed { 0 } else { -libc::EPERM },
            flags: if allowed { libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32 } else { 0 },
        };
        let mut response = response;
        // SAFETY: the kernel reads one structure of this type, which is ours.
        match self.control(libc::SECCOMP_IOCTL_NOTIF_SEND, unsafe { &mut *(&raw mut response).cast() }) {
            // Who asked has been killed meanwhile.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
            done => done,
        }
    }

    fn control(&self, request: libc::Ioctl, of: &mut libc::c_void) -> io::Result<()> {
        // SAFETY: each request is made with the structure that it is for.
        if unsafe { libc::ioctl(self.listener.as_raw_fd(), request, std::ptr::from_mut(of)) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        // Who asked is gone, or this was interrupted: the next look finds what there is.
        if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINTR))
            && request == libc::SECCOMP_IOCTL_NOTIF_RECV
        {
            return Err(io::ErrorKind::Interrupted.into());
        }
        Err(error)
    }

    /// The path that is to be opened, without links, and whether it is to be written. `None` where that can't be found out, or nothing is there.
    fn opened(&self, notice: &libc::seccomp_notif) -> Option<(PathBuf, bool)> {
        let thread = notice.pid;
        let memory = File::open(format!("/proc/{thread}/mem")).ok()?;
        let (folder, path, flags) = match libc::c_long::from(notice.data.nr) {
            libc::SYS_openat => (Some(notice.data.args[0]), notice.data.args[1], notice.data.args[2]),
            #[cfg(target_arch = "x86_64")]
            libc::SYS_creat => (None, notice.data.args[0], WRITING),
            _ => (None, notice.data.args[0], notice.data.args[1]),
        };
        let mut bytes = vec![0; PATH_BYTES_MAX];
        let length = memory.read_at(&mut bytes, path).ok()?;
        let end = bytes[..length].iter().position(|byte| *byte == 0)?;
        let path = Path::new(OsStr::from_bytes(&bytes[..end]));
        let path = match (folder.map(|folder| folder as i32), path.strip_prefix("/proc/self")) {
            // The guard's own would be another.
            (_, Ok(rest)) => Path::new("/proc").join(thread.to_string()).join(rest),
            _ if path.is_absolute() => path.to_owned(),
            (None | Some(libc::AT_FDCWD), _) => fs::read_link(format!("/proc/{thread}/cwd")).ok()?.join(path),
            (Some(folder), _) => fs::read_link(format!("/proc/{thread}/fd/{folder}")).ok()?.join(path),
        };
        let of_worker = path.starts_with(format!("/proc/{thread}"));
        let path = match path.canonicalize() {
            _ if of_worker => return None,
            Ok(path) => path,
            // What is to be made isn't there yet.
            Err(_) if flags & WRITING != 0 => path.parent()?.canonicalize().ok()?.join(path.file_name()?),
            Err(_) => return None,
        };
        Some((path, flags & WRITING != 0))
    }

    fn tell(&mut self, message: &str) {
        self.lines += 1;
        let message = match self.lines {
            ..LINES_MAX => message,
            LINES_MAX => "the sandbox refuses more than is logged",
            _ => return,
        };
        let packet = lines::write(LogLevel::Warn, TARGET, message, "");
        // The host has left: nobody reads any more.
        let _ = rustix::net::send(&self.log, &packet, rustix::net::SendFlags::NOSIGNAL);
    }
}
