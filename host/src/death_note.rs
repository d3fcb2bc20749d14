//! A file in the state folder from which a host reads how the one before it died, and into which its own death is noted. It owns the file and
//! its form, and never knows which jobs ran.
//!
//! Its first line says which boot of the machine it was and how many processes the kernel had killed until then for want of memory. Whoever
//! watches over the end of the process adds a line for each thread whose code ends it.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    num::NonZeroU32,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use modalkit_journal::HostDeath;

const FILE: &str = "death";
/// Made anew at each boot.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// What the kernel counts, a name and a number in each line.
const COUNTS: &str = "/proc/vmstat";
const OOM_KILLS: &str = "oom_kill";
/// What stands for a fact that the kernel doesn't tell.
const UNKNOWN: &str = "-";

/// What is compared between the beginning of one host and that of the next.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Machine {
    boot: Option<String>,
    oom_kills: Option<u64>,
}

/// The file.
pub(crate) struct DeathNote {
    path: PathBuf,
    machine: Machine,
    death: HostDeath,
}

impl DeathNote {
    /// Reads what the last host has left in this state folder.
    pub(crate) fn open(state_folder: &Path) -> Self {
        let path = state_folder.join(FILE);
        let machine = Machine::now();
        let death = fs::read_to_string(&path)
            .map_or(HostDeath::Killed { memory_was_short: true }, |text| told(&text, &machine));
        Self { path, machine, death }
    }

    /// How the host before this one died, if it did.
    pub(crate) fn death(&self) -> &HostDeath {
        &self.death
    }

    /// Begins a note for this host, in place of the last one's.
    ///
    /// # Errors
    /// The file can't be written.
    pub(crate) fn begin(self) -> io::Result<File> {
        let mut file =
            OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&self.path)?;
        writeln!(file, "{}", self.machine.line())?;
        Ok(file)
    }
}

impl Machine {
    fn now() -> Self {
        let boot = fs::read_to_string(BOOT_ID).ok().map(|boot| boot.trim().to_owned());
        let counts = fs::read_to_string(COUNTS).unwrap_or_default();
        let oom_kills = counts
            .lines()
            .find_map(|line| line.strip_prefix(OOM_KILLS)?.strip_prefix(' ')?.trim().parse().ok());
        Self { boot, oom_kills }
    }

    fn of(line: &str) -> Self {
        let (boot, oom_kills) = line.split_once(' ').unwrap_or((line, ""));
        Self {
            boot: Some(boot).filter(|boot| !["", UNKNOWN].contains(boot)).map(ToOwned::to_owned),
            oom_kills: oom_kills.parse().ok(),
        }
    }

    fn line(&self) -> String {
        let boot = self.boot.as_deref().unwrap_or(UNKNOWN);
        let oom_kills = self.oom_kills.map_or_else(|| UNKNOWN.to_owned(), |kills| kills.to_string());
        format!("{boot} {oom_kills}")
    }
}

/// What a host's note says of its death, now that the machine stands like this.
fn told(text: &str, now: &Machine) -> HostDeath {
    let mut lines = text.lines();
    let then = Machine::of(lines.next().unwrap_or_default());
    // Several threads may have died at once, the first of them first.
    if let Some((thread, how)) = lines.next().and_then(|line| line.split_once(' ')) {
        return HostDeath::Code {
            thread: thread.parse().ok().and_then(NonZeroU32::new),
            how: how.to_owned(),
        };
    }
    if then.boot.is_some() && now.boot.is_some() && then.boot != now.boot {
        return HostDeath::MachineStopped;
    }
    let was_none_killed = then.oom_kills.is_some() && then.oom_kills == now.oom_kills;
    HostDeath::Killed { memory_was_short: !was_none_killed }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(boot: &str, oom_kills: Option<u64>) -> Machine {
        Machine { boot: Some(boot.to_owned()), oom_kills }
    }

    #[test]
    fn a_note_says_who_ended_the_host_and_else_whether_memory_was_short_or_the_machine_stopped() {
        let killed = |memory_was_short| HostDeath::Killed { memory_was_short };
        let code =
            |thread, how: &str| HostDeath::Code { thread: NonZeroU32::new(thread), how: how.to_owned() };
        for (text, now, expected) in [
            ("b 3\n", machine("b", Some(3)), killed(false)),
            ("b 3\n", machine("b", Some(4)), killed(true)),
            ("b 3\n", machine("b", None), killed(true)),
            ("b -\n", machine("b", Some(3)), killed(true)),
            ("b 3\n", machine("c", Some(0)), HostDeath::MachineStopped),
            ("- 3\n", machine("c", Some(3)), killed(false)),
            // Of a host that was ended while it wrote this.
            ("", machine("c", Some(3)), killed(true)),
            (
                "b 3\n71 SIGSEGV in predict\n72 SIGABRT in predict\n",
                machine("b", Some(3)),
                code(71, "SIGSEGV in predict"),
            ),
            ("b 3\n0 SIGABRT\n", machine("b", Some(4)), code(0, "SIGABRT")),
            ("b 3\n71", machine("b", Some(3)), killed(false)),
        ] {
            assert_eq!(told(text, &now), expected, "{text:?}");
        }
    }

    #[test]
    fn a_host_begins_its_note_with_where_its_machine_stands() {
        let folder = tempfile::tempdir().unwrap();
        let note = DeathNote::open(folder.path());
        assert_eq!(*note.death(), HostDeath::Killed { memory_was_short: true }, "there is none");
        let mut file = note.begin().unwrap();
        assert!(matches!(DeathNote::open(folder.path()).death(), HostDeath::Killed { .. }));
        file.write_all(b"5 exit() in postprocess\n").unwrap();
        let note = DeathNote::open(folder.path());
        let how = "exit() in postprocess".to_owned();
        assert_eq!(*note.death(), HostDeath::Code { thread: NonZeroU32::new(5), how });
        drop(note.begin().unwrap());
        let text = fs::read_to_string(folder.path().join(FILE)).unwrap();
        assert_eq!(Machine::of(text.trim()), Machine::now());
    }
}
