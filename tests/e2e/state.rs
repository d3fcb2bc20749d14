//! The state folder: nobody else reads it, and a copy of it is no second host of the same name.

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::Path,
};

use modalkit_tests::{Host, Setup};
use serde_json::json;

fn modes(folder: &Path) -> Vec<(String, u32)> {
    let entries = fs::read_dir(folder).unwrap().map(Result::unwrap);
    let mode = |entry: fs::DirEntry| {
        (entry.file_name().into_string().unwrap(), entry.metadata().unwrap().mode() & 0o777)
    };
    entries.map(mode).collect()
}

fn accept_one(host: &Host) {
    let job = host.job("echo", &json!({"message": {"text": "nobody else\u{2019}s business"}}));
    assert_eq!(host.ended(&job)["state"], "succeeded");
}

#[test]
fn what_callers_send_is_readable_for_the_hosts_user_alone_from_the_first_start() {
    let setup = Setup::new().plugin("echo");
    let state = setup.folder().join("state");
    // As an administrator makes it.
    fs::create_dir(&state).unwrap();
    fs::set_permissions(&state, fs::Permissions::from_mode(0o755)).unwrap();
    let host = setup.ready();
    accept_one(&host);
    let found = modes(&state);
    assert!(found.iter().any(|(name, _)| name == "jobs.sqlite-wal"), "{found:?}");
    // What is in these two is closed with them.
    let expected = |name: &str| if ["loading", "served"].contains(&name) { 0o700 } else { 0o600 };
    assert!(found.iter().all(|(name, mode)| *mode == expected(name)), "{found:?}");
    assert_eq!(host.log_line("the state folder is open to other users")["mode"], "0755");

    // Made by the host it is closed.
    let host = Setup::new().plugin("echo").ready();
    assert_eq!(fs::metadata(host.folder().join("state")).unwrap().mode() & 0o777, 0o700);
    assert!(!host.whole_log().iter().any(|line| line.to_string().contains("open to other users")));
}

#[test]
fn a_copied_state_folder_belongs_to_a_host_of_another_name() {
    let mut host = Setup::new().plugin("echo").ready();
    accept_one(&host);
    let state = host.folder().join("state");
    let name =
        |folder: &Path| fs::read_to_string(folder.join("host")).unwrap().lines().next().unwrap().to_owned();
    let first = name(&state);

    let copy = Setup::new().plugin("echo");
    let copied = copy.folder().join("state");
    fs::create_dir(&copied).unwrap();
    // All but the management socket, which is no file to be copied.
    let files = fs::read_dir(&state).unwrap().map(Result::unwrap);
    for entry in files.filter(|entry| entry.file_type().unwrap().is_file()) {
        fs::copy(entry.path(), copied.join(entry.file_name())).unwrap();
    }
    let copy = copy.ready();
    let line = copy.log_line("the state folder was copied from another one");
    assert_eq!((line["level"].as_str(), line["name"].as_str()), (Some("WARN"), Some(first.as_str())));
    assert_ne!(name(&copied), first);

    host.kill();
    host.start_again();
    assert_eq!(name(&state), first, "the one that was copied from is who it was");
    assert!(!host.whole_log().iter().any(|line| line.to_string().contains("copied")));
}
