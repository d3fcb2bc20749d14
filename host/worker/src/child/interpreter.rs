//! A worker that becomes an interpreter of Python: the same process, with the same connections and the same confinement, running another program.
//! It never knows what that does.

use std::{
    fs::File,
    io::{self, Seek, Write},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::process::CommandExt,
    },
    process::Command,
};

use rustix::{fs::MemfdFlags, io::FdFlags};

use super::Connections;
use crate::{documents::Hello, items, python::PythonDocument};

/// Has a crash say where in the user's code it was.
const OPTIONS: [&str; 2] = ["-X", "faulthandler"];

const NO_BYTECODE: &str = "PYTHONDONTWRITEBYTECODE";

/// Runs the package of workers in Python in the place of this program, which logs from this level on. What comes back is why that can't be.
pub(super) fn become_one(
    python: &PythonDocument,
    hello: &Hello,
    connections: &Connections,
    log: &OwnedFd,
    level: u8,
) -> io::Error {
    exec(python, hello, connections, log, level).unwrap_or_else(|error| error)
}

fn exec(
    python: &PythonDocument,
    hello: &Hello,
    connections: &Connections,
    log: &OwnedFd,
    level: u8,
) -> io::Result<io::Error> {
    let mut first: File = rustix::fs::memfd_create("modalkit-hello", MemfdFlags::CLOEXEC)?.into();
    first.write_all(&items::document(hello))?;
    first.rewind()?;
    let (control, _) = connections.control.descriptors();
    let (checks, memory_of_checks) = connections.checks.descriptors();
    let lane = connections.lanes.first().map(|lane| lane.descriptors());
    let (lane, memory_of_lane) = lane.map_or((None, None), |(lane, memory)| (Some(lane), memory));
    let passed: [Option<BorrowedFd<'_>>; 7] = [
        Some(control),
        Some(log.as_fd()),
        Some(checks),
        memory_of_checks,
        lane,
        memory_of_lane,
        Some(first.as_fd()),
    ];
    for descriptor in passed.into_iter().flatten() {
        rustix::io::fcntl_setfd(descriptor, FdFlags::empty())?;
    }
    // What there is none of is 0, which nobody is given.
    let number =
        |descriptor: Option<BorrowedFd<'_>>| descriptor.map_or(0, |open| open.as_raw_fd()).to_string();
    let numbers = format!("{},{level}", passed.map(number).join(","));
    let mut command = Command::new(&python.interpreter);
    command.args(OPTIONS).arg(&python.package).arg(numbers).envs(&python.environment);
    if hello.confinement.sandbox.is_some() {
        // It may write nothing, and would be told so for each module.
        command.env(NO_BYTECODE, "1");
    }
    Ok(command.exec())
}
