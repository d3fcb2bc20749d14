//! What a newcomer does, command by command as the README says, in a copy of this tree: make a pipeline, test it, install
//! it, run the host.

use std::{
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use modalkit_tests::{built, signal, wait_at_most, wait_until, workspace};
use serde_json::{Value, json};

/// The tree without what is built: a newcomer's clone, with what isn't committed yet.
fn copy_of_the_tree(to: &Path) {
    let listed = Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard"])
        .current_dir(workspace())
        .output();
    let listed = String::from_utf8(listed.expect("git is there").stdout).unwrap();
    assert!(listed.lines().count() > 50, "git lists the tree");
    for file in listed.lines().filter(|file| workspace().join(file).is_file()) {
        let target = to.join(file);
        fs::create_dir_all(target.parent().unwrap()).unwrap();
        fs::copy(workspace().join(file), target).unwrap();
    }
}

struct Newcomer {
    tree: PathBuf,
    /// Kept between runs, so that only what changed is built again.
    target: PathBuf,
}

impl Newcomer {
    fn cargo(&self, args: &[&str]) -> Command {
        let mut command = Command::new("cargo");
        command.args(args).current_dir(&self.tree).env("CARGO_TARGET_DIR", &self.target).stdin(Stdio::null());
        // What the commands do is looked at here, and not how fast the program is that they build: that takes a third of the time so.
        command.envs(UNOPTIMIZED);
        command
    }

    fn does(&self, args: &[&str]) -> String {
        let output = self.cargo(args).output().unwrap();
        let said =
            format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "cargo {args:?}: {said}");
        said
    }
}

const UNOPTIMIZED: [(&str, &str); 3] = [
    ("CARGO_PROFILE_RELEASE_OPT_LEVEL", "0"),
    ("CARGO_PROFILE_RELEASE_LTO", "off"),
    ("CARGO_PROFILE_RELEASE_DEBUG", "0"),
];

/// `cargo xtask run` becomes the host, so its process id is the host's.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended before.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn ask(port: u16, model: &str) -> Option<Value> {
    let url = format!("http://127.0.0.1:{port}/predict_sync?model_name={model}");
    let mut response = ureq::post(url).send(json!({"text": "hello"}).to_string()).ok()?;
    serde_json::from_str(&response.body_mut().read_to_string().ok()?).ok()
}

/// Processes whose working folder is in this one, by their names.
fn processes_in(folder: &Path) -> Vec<String> {
    let ids = fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path());
    let inside = ids.filter(|process| {
        fs::read_link(process.join("cwd")).is_ok_and(|working| working.starts_with(folder))
    });
    inside.map(|process| fs::read_to_string(process.join("comm")).unwrap_or_default()).collect()
}

/// A small plugin, in release, on a machine that has other things to do.
const BUILD_TIME_MAX: Duration = Duration::from_secs(600);

#[test]
fn the_readmes_commands_make_test_install_and_serve_a_new_pipeline() {
    let folder = tempfile::tempdir().unwrap();
    let newcomer = Newcomer { tree: folder.path().join("modalkit"), target: built().join("newcomer") };
    copy_of_the_tree(&newcomer.tree);
    let volume = folder.path().join("volume");
    let volume = volume.to_str().unwrap();

    assert!(newcomer.does(&["xtask", "new-plugin", "sentiment"]).contains("plugins/sentiment"));
    assert!(newcomer.does(&["test", "--package", "sentiment"]).contains("3 passed"));

    let port = TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port();
    let mut run = newcomer.cargo(&["xtask", "run", "--volume", volume, "--watch"]);
    run.env("MODALKIT_SERVER__LISTEN", format!("127.0.0.1:{port}")).env("TMPDIR", folder.path());
    let log = fs::File::create(folder.path().join("log")).unwrap();
    let mut run = Running(run.stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap());
    let said = || fs::read_to_string(folder.path().join("log")).unwrap();
    // Building the host takes minutes on a fresh machine.
    while !said().contains("modalkit serves at") {
        assert!(run.0.try_wait().unwrap().is_none(), "`cargo xtask run` ended: {}", said());
        wait_until("its log grows", || !said().is_empty());
        std::thread::sleep(Duration::from_millis(100));
    }
    wait_until("echo serves", || {
        ask(port, "echo").is_some_and(|answer| answer["translated_text"] == "HELLO")
    });

    newcomer.does(&["xtask", "plugin", "sentiment", "--volume", volume]);
    wait_until("the new pipeline serves", || {
        ask(port, "sentiment").is_some_and(|answer| answer["translated_text"] == "HELLO")
    });

    // From here on whatever changes in its source serves as soon as it is built.
    let source = newcomer.tree.join("plugins/sentiment/src/lib.rs");
    let changed = fs::read_to_string(&source).unwrap().replace("to_uppercase", "to_lowercase");
    fs::write(&source, changed).unwrap();
    wait_at_most(BUILD_TIME_MAX, "the changed pipeline serves", || {
        ask(port, "sentiment").is_some_and(|answer| answer["translated_text"] == "hello")
    });

    signal(run.0.id(), "TERM");
    assert_eq!(run.0.wait().unwrap().code(), Some(0), "{}", said());
    wait_until("what it was building is ended too", || processes_in(&newcomer.tree).is_empty());
}
