//! Which files a worker in a sandbox sees: its volumes and the system's own, to be read; none to be written. It never knows system calls.

use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetStatus, Scope,
};

use crate::{
    documents::{Hello, SandboxDocument},
    python::PythonDocument,
};

/// Libraries, their configuration, and what programs ask about the machine.
const SYSTEM: [&str; 17] = [
    "/usr",
    "/lib",
    "/lib32",
    "/lib64",
    "/bin",
    "/opt",
    "/etc/ld.so.cache",
    "/etc/ld.so.conf",
    "/etc/ld.so.conf.d",
    "/etc/localtime",
    "/etc/ssl",
    "/proc/self",
    "/proc/cpuinfo",
    "/proc/meminfo",
    "/proc/driver/nvidia",
    "/sys/devices/system",
    "/sys/fs/cgroup",
];
/// What connections to other machines need.
const NETWORK: [&str; 6] =
    ["/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf", "/etc/gai.conf", "/etc/services", "/etc/pki"];
/// What may be written as well: nothing of it is kept.
const SINKS: [&str; 5] = ["/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom"];
/// Where drivers of devices are spoken to.
const DEVICES: &str = "/dev";
const DEVICE: &str = "nvidia";
/// Where libraries are looked for.
const LIBRARY_PATH: &str = "LD_LIBRARY_PATH";
/// The newest of Landlock that is known here; of an older one, what it has.
const KNOWN: ABI = ABI::V6;

/// The files that may be read, below these.
pub(super) fn readable(hello: &Hello, sandbox: &SandboxDocument) -> Vec<PathBuf> {
    let mut readable = sandbox.readable.clone();
    readable.push(hello.file.clone());
    readable.extend(hello.python.iter().flat_map(PythonDocument::readable));
    readable.extend(SYSTEM.iter().chain(&SINKS).map(PathBuf::from));
    readable.extend(NETWORK.iter().filter(|_| sandbox.network).map(PathBuf::from));
    let libraries = std::env::var_os(LIBRARY_PATH).unwrap_or_default();
    readable.extend(std::env::split_paths(&libraries).filter(|folder| folder.is_absolute()));
    // Without links, as paths are told that are opened. What isn't there can't be read.
    readable.iter().filter_map(|path| path.canonicalize().ok()).collect()
}

/// Whether a path, without links, is one that may be opened so.
pub(super) fn may_open(readable: &[PathBuf], path: &Path, writes: bool) -> bool {
    let is_device = path.parent() == Some(Path::new(DEVICES))
        && path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(DEVICE.as_bytes()));
    let is_sink = SINKS.iter().any(|sink| path == Path::new(sink));
    is_sink || is_device || !writes && readable.iter().any(|folder| path.starts_with(folder))
}

/// From here on this thread, and those that it starts, open nothing else.
pub(super) fn restrict_files(readable: &[PathBuf], with_devices: bool) -> Result<(), String> {
    let (read, all) = (AccessFs::from_read(KNOWN), AccessFs::from_all(KNOWN));
    let failed = |error: &dyn std::fmt::Display| error.to_string();
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(all)
        .and_then(|rules| rules.scope(Scope::from_all(KNOWN)))
        .and_then(Ruleset::create)
        .map_err(|error| failed(&error))?;
    let devices = std::fs::read_dir(DEVICES).into_iter().flatten().flatten().map(|entry| entry.path());
    let devices: Vec<PathBuf> = devices.filter(|path| with_devices && may_open(&[], path, true)).collect();
    let sinks = SINKS.iter().map(PathBuf::from).chain(devices).map(|path| (path, all));
    for (path, access) in readable.iter().cloned().map(|path| (path, read)).chain(sinks) {
        // What isn't there needs no rule.
        let Ok(opened) = PathFd::new(&path) else { continue };
        let access = if path.is_dir() { access } else { access & AccessFs::from_file(KNOWN) };
        rules = rules.add_rule(PathBeneath::new(opened, access)).map_err(|error| failed(&error))?;
    }
    let status = rules.restrict_self().map_err(|error| failed(&error))?;
    match status.ruleset {
        RulesetStatus::NotEnforced => Err("this kernel has no Landlock".into()),
        RulesetStatus::PartiallyEnforced => {
            Err("this kernel's Landlock is older than 6.12's and holds a part of it".into())
        }
        RulesetStatus::FullyEnforced => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_below_a_folder_may_be_read_and_nothing_be_written() {
        let readable = [PathBuf::from("/mnt/models")];
        let may = |path: &str, writes| may_open(&readable, Path::new(path), writes);
        assert!(may("/mnt/models/a/b", false) && may("/dev/null", true) && may("/dev/nvidia0", true));
        assert!(!may("/mnt/models2/a", false) && !may("/mnt/models/a", true) && !may("/etc/passwd", false));
    }
}
