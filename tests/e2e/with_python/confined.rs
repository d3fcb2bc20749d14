//! Pipelines in Python that are held: by a sandbox, by memory and cores without any table of their own, and by who may write what they import.

use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
};

use modalkit_tests::{Setup, built, python::write, signal, wait_until};
use serde_json::json;

use super::ask;

/// Tries what it is told to, and says what came of it.
const TRIES: &str = r#"
import os
import socket
import subprocess

import numpy


def attempt(what, argument):
    if what == "read":
        return open(argument).read()
    if what == "write":
        return open(argument, "w").write("x")
    if what == "connect":
        return str(socket.create_connection(("127.0.0.1", int(argument)), 1))
    if what == "start":
        return subprocess.run([argument], capture_output=True, text=True).stdout
    if what == "fork":
        pid = os.fork()
        return os.waitpid(pid, 0) if pid else os._exit(0)
    if what == "execute":
        os.execv(argument, [argument])
    return {"threads": os.environ.get("OMP_NUM_THREADS"), "sum": int(numpy.arange(4).sum())}


def predict(batch):
    said = []
    for item in batch:
        try:
            said.append({"did": attempt(item.get("do"), item.get("with"))})
        except OSError as error:
            said.append({"refused": type(error).__name__})
    return said
"#;

#[test]
fn a_sandbox_lets_the_interpreter_start_and_its_pipeline_read_its_folder_alone() {
    let config =
        "[app_settings.deployment_config]\nsandbox = true\n[model_settings.model_entries.tries.python]\n";
    let host = Setup::new()
        .python("tries", &[("pipeline.py", TRIES), ("words.txt", "in the folder")])
        .config(config)
        .ready();
    wait_until("it serves", || ask(&host, "tries", &json!({})).0 == 200);
    if host.log().iter().any(|line| line["message"].to_string().contains("the sandbox doesn't hold")) {
        return;
    }
    assert_eq!(ask(&host, "tries", &json!({})).1["did"]["sum"], 6);
    let words = json!({"do": "read", "with": "words.txt"});
    assert_eq!(ask(&host, "tries", &words).1["did"], "in the folder");
    let secret = host.folder().join("elsewhere.txt");
    fs::write(&secret, "not for it").unwrap();
    let port = host.connect().peer_addr().unwrap().port().to_string();
    for (what, argument, logged) in [
        ("read", secret.to_str().unwrap(), "elsewhere.txt"),
        ("read", "/etc/shadow", "/etc/shadow"),
        ("write", "words.txt", "write"),
        ("connect", &port, "socket"),
        ("start", "/bin/true", "refuses the system call"),
        ("fork", "", "clone"),
        ("execute", "/bin/true", "execve"),
    ] {
        let (_, answer) = ask(&host, "tries", &json!({"do": what, "with": argument}));
        assert!(answer["refused"].as_str().is_some_and(|kind| kind.contains("Error")), "{what}: {answer}");
        let _ = host.logged(what, |line| {
            let message = line["message"].as_str().unwrap();
            line["model"] == "tries" && message.contains("the sandbox") && message.contains(logged)
        });
    }
    assert_eq!(ask(&host, "tries", &words).1["did"], "in the folder");
}

#[test]
fn memory_and_cores_hold_a_folder_that_no_table_names() {
    let config = "[app_settings.deployment_config]\ncpu = 1.0\nmemory = 900.0\n";
    let code = TRIES.replace("def predict", "kept = []\n\ndef more():\n    kept.append(numpy.ones(50_000_000))\n\ndef predict")
        .replace("    if what == \"execute\":", "    if what == \"fill\":\n        return [more() for _ in range(8)]\n    if what == \"execute\":");
    let host = Setup::new().python("tries", &[("pipeline.py", &code)]).config(config).start();
    wait_until("it serves", || ask(&host, "tries", &json!({})).0 == 200);
    assert_eq!(ask(&host, "tries", &json!({})).1["did"]["threads"], "1");
    let (status, answer) = ask(&host, "tries", &json!({"do": "fill"}));
    assert!(status >= 500, "3.2 GB in 900 MB: {answer}");
    wait_until("it serves", || ask(&host, "tries", &json!({})).0 == 200);
}

#[test]
fn an_environment_that_others_may_write_is_refused_and_another_one_is_another_generation() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().join("told");
    let code = "import sys\ntry:\n    from extra import WORD\nexcept ImportError:\n    WORD = 'none'\n\ndef predict(batch):\n    return [{'word': WORD, 'prefix': sys.prefix} for _ in batch]\n";
    write(&place, &[("pipeline.py", code)]);
    let environment = |name: &str, word: &str| {
        let path = folder.path().join(name);
        let python = built().with_file_name("python").join("bin/python");
        let made = std::process::Command::new(python)
            .args(["-m", "venv", "--without-pip", path.to_str().unwrap()])
            .status()
            .unwrap();
        assert!(made.success());
        let packages =
            fs::read_dir(path.join("lib")).unwrap().next().unwrap().unwrap().path().join("site-packages");
        write(&packages, &[("extra.py", &format!("WORD = '{word}'\n"))]);
        packages
    };
    let first = environment("first", "one");
    symlink(folder.path().join("first"), place.join(".venv")).unwrap();
    fs::set_permissions(first.join("extra.py"), fs::Permissions::from_mode(0o666)).unwrap();
    let config =
        format!("[model_settings.model_entries.told.python]\nfolder = {:?}\n", place.to_str().unwrap());
    let host = Setup::new().config(&config).start();
    wait_until("it was refused", || {
        let reason = host.model("told")["reason"].to_string();
        reason.contains("extra.py") && reason.contains("may be written by everybody")
    });
    fs::set_permissions(first.join("extra.py"), fs::Permissions::from_mode(0o644)).unwrap();
    // What says where the interpreter's own modules are.
    let configuration = folder.path().join("first/pyvenv.cfg");
    fs::set_permissions(&configuration, fs::Permissions::from_mode(0o664)).unwrap();
    let _ = host.post("/models/told/reload", &json!({}));
    wait_until("it was refused", || {
        host.model("told")["reason"].to_string().contains("pyvenv.cfg may be written by its group")
    });
    fs::set_permissions(&configuration, fs::Permissions::from_mode(0o644)).unwrap();
    let _ = host.post("/models/told/reload", &json!({}));
    wait_until("it serves", || ask(&host, "told", &json!({})).1["word"] == "one");
    let _ = environment("second", "two");
    fs::remove_file(place.join(".venv")).unwrap();
    symlink(folder.path().join("second"), place.join(".venv")).unwrap();
    wait_until("the other environment serves", || ask(&host, "told", &json!({})).1["word"] == "two");
}

/// Says which process it is, which takes long to be there.
const SLOW: &str = r#"
import os
import time


class Slow:
    def __init__(self):
        time.sleep(1)
        self.hooks = 0
        with open("loads.txt", "a") as file:
            file.write(f"{os.getpid()}\n")

    def on_volume_reload(self):
        self.hooks += 1

    def predict(self, batch):
        return [{"pid": os.getpid(), "hooks": self.hooks} for _ in batch]
"#;

#[test]
fn a_spare_replica_takes_over_from_one_that_was_killed_and_hears_of_data_meanwhile() {
    let config =
        "[app_settings.deployment_config]\nspare_replicas = 1\n[model_settings.model_entries.slow]\n";
    let host = Setup::new().python("slow", &[("pipeline.py", SLOW)]).config(config).ready();
    let loads = host.volume().join("slow/loads.txt");
    let loaded = || -> Vec<u64> {
        let text = fs::read_to_string(&loads).unwrap_or_default();
        text.lines().map(|pid| pid.parse().unwrap()).collect()
    };
    let spare = |pid: u64| loaded().into_iter().find(|other| *other != pid);
    let answer = || ask(&host, "slow", &json!({})).1;
    let first = answer()["pid"].as_u64().unwrap();
    wait_until("a spare one is loaded", || spare(first).is_some());
    let _ =
        host.logged("it is there", |line| line["message"] == "replica started" && line["is_spare"] == true);
    // That it has loaded is a change of data itself: the hook runs in both.
    wait_until("the hook ran", || answer()["hooks"].as_u64() >= Some(1));
    let hooks = answer()["hooks"].as_u64().unwrap();
    let waiting = spare(first).unwrap();
    signal(first as u32, "KILL");
    wait_until("another one serves", || answer()["pid"].as_u64().is_some_and(|pid| pid != first));
    assert_eq!(answer()["pid"], waiting, "the one that was loaded already");
    assert!(answer()["hooks"].as_u64() >= Some(1), "of {hooks}");
    wait_until("there is another spare one", || loaded().len() == 3);
}
