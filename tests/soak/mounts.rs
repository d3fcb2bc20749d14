//! Volumes behind mounts: changes that this kernel's events don't tell of are found by polling. Needs the right to mount, and
//! `bindfs` for FUSE; says so where it hasn't.

use std::{fs, path::Path, process::Command};

use modalkit_tests::{Setup, Version, changes::each_change_is_taken_once};

/// A mount, until it is dropped.
struct Mounted(String);

impl Drop for Mounted {
    fn drop(&mut self) {
        // Whatever still looks into it may finish.
        let _ = Command::new("umount").args(["--lazy", &self.0]).status();
    }
}

pub(crate) fn polled() {
    for (what, program, args) in [("bind", "mount", &["--bind"][..]), ("FUSE (bindfs)", "bindfs", &[])] {
        let behind = tempfile::tempdir().expect("a temporary folder");
        fs::set_permissions(behind.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))
            .expect("it is ours");
        Version::good(1).install(behind.path());
        let config = "[server]\npoll_interval_ms = 100\n[server.volumes.test]\nwatch = \"poll\"";
        let setup = Setup::new().config(config);
        let Some(mounted) = mount(program, args, behind.path(), &setup.volume()) else {
            println!("{what}: NOT RUN: `{program}` can't mount here");
            continue;
        };
        let host = setup.ready();
        each_change_is_taken_once(&host, behind.path());
        println!("{what}: each change was taken once");
        drop(mounted);
    }
}

fn mount(program: &str, args: &[&str], from: &Path, to: &Path) -> Option<Mounted> {
    let output = Command::new(program).args(args).arg(from).arg(to).output().ok()?;
    output.status.success().then(|| Mounted(to.display().to_string()))
}
