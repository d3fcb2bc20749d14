//! What must hold of changes in a volume, however it is mounted and watched.

use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::Path,
    thread,
    time::{Duration, SystemTime},
};

use crate::{
    Host, Version,
    load::{Load, VERSIONED},
    put, version, wait_until,
};

/// Enough for a watch to have noticed whatever there was to notice: a look, a settling, a build.
pub const NOTHING_HAPPENS: Duration = Duration::from_millis(1500);

/// How many changes of this outcome the history of `versioned` holds.
#[must_use]
pub fn ended(host: &Host, outcome: &str) -> usize {
    let report = host.report("versioned");
    let history = report["history"].as_array().cloned().unwrap_or_default();
    history.iter().filter(|entry| entry["outcome"] == outcome).count()
}

/// A rename, a slow copy in place, a swap of the folder behind links: one reload each, and nobody notices. A touch, the same
/// bytes again, a deletion: none. The host serves version 1; `volume` is where its volume is written to.
///
/// # Panics
/// Where something else happens.
pub fn each_change_is_taken_once(host: &Host, volume: &Path) {
    let path = version::path(volume);
    let load = Load::start(host.address, 2, VERSIONED);
    let answers = |number: u64| wait_until("the new version answers", || load.newest() == number);
    Version::good(2).install(volume);
    answers(2);
    assert_eq!(ended(host, "swapped"), 2);

    fs::File::options()
        .append(true)
        .open(&path)
        .and_then(|file| file.set_modified(SystemTime::now()))
        .expect("it is touched");
    thread::sleep(NOTHING_HAPPENS);
    Version::good(2).install(volume);
    fs::write(&path, Version::good(2).bytes()).expect("it is written again");
    thread::sleep(NOTHING_HAPPENS);
    fs::remove_file(&path).expect("it is removed");
    assert_eq!(host.log_line("the plugin's file is gone")["model"], "versioned");
    assert_eq!(host.report("versioned")["source"]["present"], false);
    assert_eq!((ended(host, "swapped"), ended(host, "refused")), (2, 0), "{:#}", host.report("versioned"));

    // In pieces over 3 s, with pauses of up to 1 s.
    let pauses = [300, 1000, 50, 700, 200, 800].map(Duration::from_millis);
    Version::good(3).copy_slowly(volume, &pauses);
    answers(3);
    // The same over what lies there, which is whole from the first piece on.
    Version::good(4).write_slowly_over(volume, &pauses);
    answers(4);
    fs::remove_file(&path).expect("it is removed");

    // As Kubernetes does it: the file is a link through `..data`, which is replaced in one step.
    for number in [5, 6] {
        let name = format!("..{number}");
        let behind = volume.join(&name);
        fs::create_dir(&behind).expect("a folder is made");
        fs::set_permissions(&behind, fs::Permissions::from_mode(0o755)).expect("it is ours");
        put(&Version::good(number).bytes(), &version::path(&behind));
        symlink(name, volume.join("..data_tmp")).expect("a link is made");
        fs::rename(volume.join("..data_tmp"), volume.join("..data")).expect("the link is replaced");
        if !path.exists() {
            symlink("..data/versioned.so", &path).expect("a link is made");
        }
        answers(number);
    }
    thread::sleep(NOTHING_HAPPENS);
    load.stop().assert_faultless();
    assert_eq!((ended(host, "swapped"), ended(host, "refused")), (6, 0), "{:#}", host.report("versioned"));
}
