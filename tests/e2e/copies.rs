//! The private folder of plugin copies: it is made again where a cleaner takes it away, it says by its lock that its host lives,
//! and what a killed host leaves there goes with the next start.

use std::{
    fs::{self, File, TryLockError},
    path::{Path, PathBuf},
};

use modalkit_tests::{Setup, install, library, wait_until};
use serde_json::json;

fn folders(temporary: &Path) -> Vec<PathBuf> {
    fs::read_dir(temporary).unwrap().map(|entry| entry.unwrap().path()).collect()
}

#[test]
fn a_cleaner_that_sweeps_the_private_folder_does_not_end_reloads() {
    let host = Setup::new().plugin("echo").ready();
    let swept = folders(&host.temporary_folder());
    assert_eq!(swept.len(), 1, "one folder for all copies, of pipelines and of queues: {swept:?}");
    fs::remove_dir_all(&swept[0]).unwrap();
    install(&library("puppet"), &host.volume().join("puppet.so"));
    wait_until("another one serves", || host.post("/predict_sync?model_name=puppet", &json!({})).0 == 200);
    // A change of what serves, after its copy has gone as well.
    folders(&host.temporary_folder()).iter().for_each(|folder| fs::remove_dir_all(folder).unwrap());
    assert_eq!(host.post("/models/echo/reload", &json!({})).0, 200);
    assert_eq!(host.post("/predict_sync?model_name=echo", &json!({"text": "a"})).0, 200);
    install(&library("batched"), &host.volume().join("echo.so"));
    wait_until("the new one serves", || host.report("echo")["generation"]["number"] == 3);
}

#[test]
fn what_a_killed_host_leaves_is_removed_and_what_a_living_one_holds_is_not() {
    let mut host = Setup::new().plugin("echo").ready();
    let temporary = host.temporary_folder();
    let held = folders(&temporary);
    let lock = File::open(&held[0]).unwrap();
    assert!(matches!(lock.try_lock(), Err(TryLockError::WouldBlock)), "cleaners respect this lock");
    drop(lock);
    // Beside it on the same folder for temporary files.
    let shared = temporary.display().to_string();
    let other = Setup::new().plugin("echo").variable("TMPDIR", &shared).ready();
    assert!(held[0].exists());
    host.kill();
    assert!(held[0].exists(), "nobody has removed it: {:?}", folders(&temporary));
    host.start_again();
    wait_until("it is ready", || host.get("/readyz").0 == 200);
    let now = folders(&temporary);
    assert!(now.len() == 2 && !now.contains(&held[0]), "{now:?}, after {held:?}");
    install(&library("puppet"), &other.volume().join("puppet.so"));
    wait_until("it serves", || other.post("/predict_sync?model_name=puppet", &json!({})).0 == 200);
}
