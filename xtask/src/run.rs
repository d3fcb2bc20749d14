//! `run`: the host is up as soon as it and `echo` are built; plugins that compile longer appear as they are done.
//!
//! This process becomes the host, so that signals and exit codes are the host's; a child finishes what is left.

use std::{
    env,
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    os::unix::process::{CommandExt, parent_id},
    path::Path,
    process::Command,
    thread,
    time::Duration,
};

use anyhow::Context;

use crate::{build, watch::Sources};

/// The command of the child.
pub(crate) const FINISH: &str = "run-finish";
/// The flag for building again what changes.
pub(crate) const WATCH: &str = "--watch";
const CONFIG: &str = "config/modalkit.toml";
const DEFAULT_LISTEN: &str = "127.0.0.1:8000";
/// How long the child waits for the host to answer before it prints how to ask it.
const HOST_LOOKS: u32 = 100;
const BETWEEN_LOOKS: Duration = Duration::from_millis(100);
/// Between two looks at the plugins' sources.
const BETWEEN_SOURCES: Duration = Duration::from_millis(300);

pub(crate) fn run(volume: &Path, watch: bool) -> anyhow::Result<()> {
    println!("building the host and its first plugin");
    build::cargo(&["build", "--release", "--package", "modalkit", "--package", "echo"])?;
    build::install("echo", volume)?;

    let this = env::current_exe().context("can't find this program")?;
    let volume = std::path::absolute(volume)?;
    Command::new(this)
        .arg(FINISH)
        .arg("--volume")
        .arg(&volume)
        .args(watch.then_some(WATCH))
        .spawn()
        .context("can't start the second half of `run`")?;
    let volumes = format!("{{{:?}: \"volume\"}}", volume.display().to_string());
    let error = Command::new(build::release().join("modalkit"))
        .args(["--config", CONFIG])
        .env("MODALKIT_APP_SETTINGS__DEPLOYMENT_CONFIG__VOLUMES", volumes)
        .env("MODALKIT_MODEL_SETTINGS__LOCAL_MODEL_REPOSITORY_FOLDER", &volume)
        .exec();
    Err(error).context("can't start the host")
}

/// Says how to ask the host, then builds and installs the other plugins, and again what changes where that is wanted; ends
/// when the host does.
pub(crate) fn finish(volume: &Path, watch: bool) -> anyhow::Result<()> {
    let host = parent_id();
    let listen = env::var("MODALKIT_SERVER__LISTEN").unwrap_or_else(|_| DEFAULT_LISTEN.into());
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
    let mut sources = Sources::look()?;
    for name in build::plugins()?.into_iter().filter(|name| name != "echo") {
        println!("building the plugin {name}; it serves as soon as it is done");
        if !build_and_install(&name, volume, host)? {
            return end_group();
        }
    }
    println!("all plugins are in {}", volume.display());
    if !watch {
        return Ok(());
    }
    println!("watching plugins/: what changes is built and installed again");
    while parent_id() == host {
        for name in sources.changed()? {
            println!("the source of {name} has changed; building it");
            if !build_and_install(&name, volume, host)? {
                return end_group();
            }
        }
        thread::sleep(BETWEEN_SOURCES);
    }
    Ok(())
}

/// `false` when the host has ended meanwhile. A plugin that doesn't build leaves what serves.
fn build_and_install(name: &str, volume: &Path, host: u32) -> anyhow::Result<bool> {
    let mut cargo = build::command(&["build", "--release", "--package", name]).spawn()?;
    while cargo.try_wait()?.is_none() {
        if parent_id() != host {
            return Ok(false);
        }
        thread::sleep(BETWEEN_LOOKS);
    }
    if cargo.wait()?.success() {
        println!("installed {}", build::install(name, volume)?.display());
    } else {
        println!("the plugin {name} did not build; what serves goes on serving");
    }
    Ok(true)
}

/// Ends this process with everything it has started: cargo, and the compilers that cargo has started.
fn end_group() -> anyhow::Result<()> {
    build::run(Command::new("sh").args(["-c", &format!("kill -TERM -{}", std::process::id())]))
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
        "\nmodalkit serves at http://{listen}  (models: http://{listen}/models, metrics: http://{listen}/metrics)\n\
         paste this:\n\n  \
         curl -d '{{\"text\": \"hello\"}}' 'http://{listen}/predict_sync?model_name=echo'\n"
    );
}
