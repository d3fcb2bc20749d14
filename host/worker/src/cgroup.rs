//! Control groups of workers, where this host may make them: version 2, with the controllers handed down to the host's own group. It never knows
//! why a limit is what it is.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process,
    sync::atomic::{AtomicU64, Ordering},
};

use modalkit_engine::Confinement;
use parking_lot::Mutex;

/// The host itself moves here: a group with processes in it hands nothing down.
const HOST: &str = "modalkit-host";
/// The period that cores are counted in, in microseconds.
const PERIOD_US: f64 = 100_000.0;

/// The group under which those of workers are made, once it was found.
static PARENT: Mutex<Option<PathBuf>> = Mutex::new(None);
static NEXT: AtomicU64 = AtomicU64::new(1);

/// A worker's group; removed with this.
#[derive(Debug)]
pub(crate) struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Makes a group with these limits; `None` where none is asked for.
    ///
    /// # Errors
    /// Why there can't be one.
    pub(crate) fn new(confinement: &Confinement) -> Result<Option<Self>, String> {
        if confinement.memory_bytes.is_none() && confinement.cores.is_none() {
            return Ok(None);
        }
        let parent = {
            let mut known = PARENT.lock();
            match &*known {
                Some(group) => group.clone(),
                None => {
                    let group = find()?;
                    prepare(&group).map_err(|error| error.to_string())?;
                    known.insert(group).clone()
                }
            }
        };
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = parent.join(format!("modalkit-worker-{}-{number}", process::id()));
        // One that a host of the same process id has left behind.
        let _ = fs::remove_dir(&path);
        fs::create_dir(&path).map_err(|error| format!("can't make {}: {error}", path.display()))?;
        let group = Self { path };
        if let Some(bytes) = confinement.memory_bytes {
            group.set("memory.max", &bytes.to_string())?;
            // Swap is memory that is only slower; where there is no such file there is no swap.
            let _ = group.set("memory.swap.max", "0");
        }
        if let Some(cores) = confinement.cores {
            group.set("cpu.max", &format!("{} {PERIOD_US}", (cores * PERIOD_US).round()))?;
        }
        Ok(Some(group))
    }

    fn set(&self, file: &str, value: &str) -> Result<(), String> {
        let path = self.path.join(file);
        fs::write(&path, value).map_err(|error| format!("can't write {}: {error}", path.display()))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the kernel has ended a process of it for want of memory.
    pub(crate) fn was_out_of_memory(&self) -> bool {
        let events = fs::read_to_string(self.path.join("memory.events")).unwrap_or_default();
        let kills = events.lines().find_map(|line| line.strip_prefix("oom_kill "));
        kills.is_some_and(|kills| kills.trim() != "0")
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // It is empty but for what can't be killed; that one stays until the machine ends.
        let _ = fs::remove_dir(&self.path);
    }
}

/// This process's group.
fn find() -> Result<PathBuf, String> {
    let said = fs::read_to_string("/proc/self/cgroup").map_err(|error| error.to_string())?;
    let path =
        said.lines().find_map(|line| line.strip_prefix("0::/")).ok_or("there are no groups of version 2")?;
    let mounts = fs::read_to_string("/proc/self/mounts").map_err(|error| error.to_string())?;
    let mut mounted = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let root =
        mounted.find(|mount| mount.get(2) == Some(&"cgroup2")).ok_or("no groups of version 2 are mounted")?;
    let group = Path::new(root[1]).join(path);
    let controllers =
        fs::read_to_string(group.join("cgroup.controllers")).map_err(|error| error.to_string())?;
    match ["memory", "cpu"].iter().find(|wanted| !controllers.split_whitespace().any(|one| one == **wanted)) {
        Some(missing) => Err(format!("the controller `{missing}` is not handed down to {}", group.display())),
        None => Ok(group),
    }
}

fn prepare(group: &Path) -> io::Result<()> {
    let hand_down = || fs::write(group.join("cgroup.subtree_control"), "+memory +cpu");
    if hand_down().is_ok() {
        return Ok(());
    }
    let host = group.join(HOST);
    match fs::create_dir(&host) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    fs::write(host.join("cgroup.procs"), "0")?;
    hand_down()
}
