//! `run`: the host is up as soon as it and `echo` are built; plugins that compile longer appear as they are done.
//!
//! This process becomes the host, so that signals and exit codes are the host's; a child finishes what is left.

use std::{
    collections::VecDeque,
    env,
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    os::unix::process::{CommandExt, parent_id},
    path::Path,
    process::{Child, Command},
    thread,
    time::Duration,
};

use anyhow::Context;
use rustix::process::{Pid, Signal, kill_process_group};

use crate::{build, watch::Sources};

/// This very program, also when another `cargo xtask` has built it anew meanwhile and its file is another one.
const THIS_PROGRAM: &str = "/proc/self/exe";
/// Where the child builds: a `cargo` of the user's, which builds in the usual folder, doesn't wait for it.
const BACKGROUND: &str = "background";
/// The command of the child.
pub(crate) const FINISH: &str = "run-finish";
/// The flag for building again what changes.
pub(crate) const WATCH: &str = "--watch";
const CONFIG: &str = "config/modalkit.toml";
/// Where the journal of asynchronous jobs lies, where the environment doesn't say.
const STATE_FOLDER: &str = "MODALKIT_SERVER__STATE_FOLDER";
const STATE: &str = "target/state";
const DEFAULT_LISTEN: &str = "127.0.0.1:8000";
/// How long the child waits for the host to answer before it prints how to ask it.
const HOST_LOOKS: u32 = 100;
const BETWEEN_LOOKS: Duration = Duration::from_millis(100);
/// Between two looks at the plugins' sources.
const BETWEEN_SOURCES: Duration = Duration::from_millis(300);

pub(crate) fn run(volume: &Path, watch: bool) -> anyhow::Result<()> {
    println!("building the host and its first plugin");
    build::cargo(&["build", "--release", "--package", "modalkit", "--package", "echo"])?;
    build::install("echo", &build::release(), volume)?;

    let volume = std::path::absolute(volume)?;
    Command::new(THIS_PROGRAM)
        // A group of its own: the terminal's Ctrl-C is for the host, and who follows it ends its compiler.
        .process_group(0)
        .arg(FINISH)
        .arg("--volume")
        .arg(&volume)
        .args(watch.then_some(WATCH))
        .spawn()
        .context("can't start the second half of `run`")?;
    let volumes = format!("{{{:?}: \"volume\"}}", volume.display().to_string());
    let state =
        env::var_os(STATE_FOLDER).map_or_else(|| std::path::absolute(STATE), |written| Ok(written.into()))?;
    let error = Command::new(build::release().join("modalkit"))
        .args(["--config", CONFIG])
        .env("MODALKIT_APP_SETTINGS__DEPLOYMENT_CONFIG__VOLUMES", volumes)
        .env("MODALKIT_MODEL_SETTINGS__LOCAL_MODEL_REPOSITORY_FOLDER", &volume)
        .env(STATE_FOLDER, state)
        .exec();
    Err(error).context("can't start the host")
}

/// Says how to ask the host, then builds and installs the other plugins, and again what changes where that is wanted; ends
/// when the host does.
pub(crate) fn finish(volume: &Path, watch: bool) -> anyhow::Result<()> {
    let host = parent_id();
    let listen = listen();
    for _ in 0..HOST_LOOKS {
        if parent_id() != host {
            return Ok(());
        }
        if answers(&listen) {
            break;
        }
        thread::sleep(BETWEEN_LOOKS);
    }
    print_urls(&listen);
    let mut watched = if watch { Some(Sources::look()?) } else { None };
    let others = build::plugins()?.into_iter().filter(|name| name != "echo" && build::serves_by_itself(name));
    let mut wanted: VecDeque<String> = others.collect();
    loop {
        while let Some(name) = wanted.pop_front() {
            println!("building the plugin {name}; it serves as soon as it is done");
            match build_and_install(&name, volume, host, watched.as_mut())? {
                Built::Done => {}
                Built::HostEnded => return Ok(()),
                Built::Interrupted(changed) => {
                    // Somebody waits for what changed; this one goes on afterwards, from where it was.
                    wanted.push_back(name);
                    changed.into_iter().for_each(|name| want(&mut wanted, name));
                }
            }
        }
        let Some(sources) = watched.as_mut() else { break };
        println!(
            "all plugins are in {}; what changes in plugins/ is built and installed again",
            volume.display()
        );
        while wanted.is_empty() {
            if parent_id() != host {
                return Ok(());
            }
            thread::sleep(BETWEEN_SOURCES);
            sources.changed()?.into_iter().for_each(|name| want(&mut wanted, name));
        }
    }
    println!("all plugins are in {}", volume.display());
    Ok(())
}

/// What changed last is wanted first.
fn want(wanted: &mut VecDeque<String>, name: String) {
    wanted.retain(|other| *other != name);
    wanted.push_front(name);
}

enum Built {
    /// Installed, or it said why not.
    Done,
    /// The sources of these changed meanwhile.
    Interrupted(Vec<String>),
    HostEnded,
}

/// A plugin that doesn't build leaves what serves.
fn build_and_install(
    name: &str,
    volume: &Path,
    host: u32,
    mut watched: Option<&mut Sources>,
) -> anyhow::Result<Built> {
    let target = build::target().join(BACKGROUND);
    let mut cargo = build::command(&["build", "--release", "--package", name])
        .env("CARGO_TARGET_DIR", &target)
        .process_group(0)
        .spawn()?;
    while cargo.try_wait()?.is_none() {
        if parent_id() != host {
            end(&mut cargo)?;
            return Ok(Built::HostEnded);
        }
        thread::sleep(BETWEEN_LOOKS);
        if let Some(sources) = watched.as_mut() {
            let changed = sources.changed()?;
            if !changed.is_empty() {
                println!("the sources of {changed:?} have changed");
                end(&mut cargo)?;
                return Ok(Built::Interrupted(changed));
            }
        }
    }
    if cargo.wait()?.success() {
        println!("installed {}", build::install(name, &target.join("release"), volume)?.display());
    } else {
        println!("the plugin {name} did not build; what serves goes on serving");
    }
    Ok(Built::Done)
}

/// Ends cargo and the compilers that it has started: its process group.
fn end(cargo: &mut Child) -> anyhow::Result<()> {
    if let Some(group) = i32::try_from(cargo.id()).ok().and_then(Pid::from_raw) {
        // It may have ended by itself.
        let _ = kill_process_group(group, Signal::TERM);
    }
    cargo.wait()?;
    Ok(())
}

/// Where the host listens, as far as the environment says.
pub(crate) fn listen() -> String {
    env::var("MODALKIT_SERVER__LISTEN").unwrap_or_else(|_| DEFAULT_LISTEN.into())
}

fn answers(listen: &str) -> bool {
    let Ok(address) = listen.parse::<SocketAddr>() else { return false };
    let Ok(mut stream) = TcpStream::connect_timeout(&address, BETWEEN_LOOKS) else { return false };
    let asked = stream
        .set_read_timeout(Some(Duration::from_secs(1)))
        .and_then(|()| stream.write_all(b"GET /livez HTTP/1.0\r\n\r\n"));
    let mut answer = [0; 12];
    asked.is_ok() && stream.read_exact(&mut answer).is_ok() && answer.ends_with(b" 200")
}

fn print_urls(listen: &str) {
    if listen.ends_with(":0") {
        println!("\nthe host chose a port: see \"listening\" in its log\n");
        return;
    }
    println!(
        "\nmodalkit serves at http://{listen}\n\
         paste this:\n\n  \
         curl -d '{{\"text\": \"hello\"}}' 'http://{listen}/predict_sync?model_name=echo'\n\n\
         what it answers, to read and to try: http://{listen}/docs\n\n\
         its models, metrics and so on are seen over its management socket:\n\n  \
         export MODALKIT_SOCKET={}/manage.sock\n  \
         target/release/modalkit models\n",
        env::var(STATE_FOLDER).unwrap_or_else(|_| STATE.into())
    );
}
