//! What a worker may use and see, put in force before any plugin code runs. What is asked for and can't be had is said as a warning.

use std::os::{fd::OwnedFd, unix::net::UnixStream};

use rustix::{
    process::{Resource, Rlimit},
    thread::{CapabilitySet, CapabilitySets, CpuSet},
};

use super::{notices::Guarded, sandbox, seccomp};
use crate::{
    channel::{Channel, End, Outgoing, send_descriptors},
    documents::Hello,
    frame::Kind,
    items,
};

/// Confines this process; what comes back are warnings. The guard is told what it is to answer for.
///
/// # Errors
/// What every worker needs can't be had.
pub(super) fn confine(
    hello: &Hello,
    guard: Option<&UnixStream>,
    log: &OwnedFd,
) -> Result<Vec<String>, String> {
    let mut warnings = Vec::new();
    let confinement = &hello.confinement;
    if let Some(bytes) = confinement.memory_bytes {
        let limit = Rlimit { current: Some(bytes), maximum: Some(bytes) };
        if let Err(error) = rustix::process::setrlimit(Resource::Data, limit) {
            warnings.push(format!("memory is not limited: {error}"));
        }
    }
    if let Some(cpus) = confinement.cpus.as_ref().filter(|cpus| !cpus.is_empty()) {
        let mut set = CpuSet::new();
        cpus.iter().for_each(|cpu| set.set(*cpu as usize));
        if let Err(error) = rustix::thread::sched_setaffinity(None, &set) {
            warnings.push(format!("cores are not limited: {error}"));
        }
    }
    rustix::thread::set_no_new_privs(true)
        .map_err(|error| format!("can't give up new privileges: {error}"))?;
    let (Some(sandbox), Some(guard)) = (&confinement.sandbox, guard) else { return Ok(warnings) };
    // Of root's powers those are left that have files of other users read.
    let kept = CapabilitySet::DAC_OVERRIDE | CapabilitySet::DAC_READ_SEARCH;
    if let Ok(now) = rustix::thread::capabilities(None) {
        let sets = CapabilitySets {
            effective: now.effective & kept,
            permitted: now.permitted & kept,
            inheritable: CapabilitySet::empty(),
        };
        if let Err(error) = rustix::thread::set_capabilities(None, sets) {
            warnings.push(format!("the sandbox keeps the host's capabilities: {error}"));
        }
    }
    let readable = sandbox::readable(hello, sandbox);
    if let Err(why) = sandbox::restrict_files(&readable, !hello.devices.is_empty()) {
        warnings.push(format!("the sandbox doesn't hold files: {why}"));
    }
    // Last: whatever is forbidden from here on is told to the guard.
    let held = seccomp::install(sandbox.network).map_err(|error| error.to_string()).and_then(|notices| {
        let log = log.try_clone().map_err(|error| error.to_string())?;
        send_descriptors(guard, Kind::Lane, &[notices, log]).map_err(|error| error.to_string())?;
        let document = items::document(&Guarded { readable, executes: hello.python.is_some() });
        let frame = Outgoing::of(Kind::Hello, items::PAYLOAD, &document);
        let mut guard =
            Channel::new(guard.try_clone().map_err(|error| error.to_string())?, None, End::Worker);
        guard.send(&frame).map_err(|error| error.to_string())
    });
    if let Err(why) = held {
        warnings.push(format!("the sandbox doesn't hold system calls: {why}"));
    }
    Ok(warnings)
}
