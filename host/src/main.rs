//! Flags, signals and exit codes of the `modalkit` program.
//!
//! Exit codes: 0 drained after a signal, or done; 1 could not start, or the drain was cut off, or a running host was not
//! reached or did not do what was asked; 2 wrong usage or configuration; 130 a second signal.

#![forbid(unsafe_code)]

use std::{
    env,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    process::ExitCode,
};

use anyhow::Context;
use clap::{Parser, Subcommand};
use modalkit::{
    app::{self, Ended},
    client::{self, Ask},
    config::{self, Config},
    telemetry,
};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
};

/// Serves machine-learning pipelines: plugins in watched folders, over HTTP.
#[derive(Parser)]
#[command(version, about)]
struct Cli {
    /// Configuration files, TOML; later ones win. The environment (MODALKIT_…__…) beats them.
    #[arg(long, env = "MODALKIT_CONFIG", value_delimiter = ',', global = true)]
    config: Vec<PathBuf>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Serve until SIGTERM or SIGINT (what happens without a command).
    Serve,
    /// Show the models of a running host, or one of them with its history.
    Models {
        /// The model.
        name: Option<String>,
        #[command(flatten)]
        host: Host,
    },
    /// Have a running host take a model's plugin from its volume again, or look through a volume.
    Reload {
        /// The model.
        #[arg(required_unless_present = "volume")]
        model: Option<String>,
        /// The volume to look through instead.
        #[arg(long, conflicts_with = "model")]
        volume: Option<String>,
        #[command(flatten)]
        host: Host,
    },
    /// Have a running host go back to a model's generation before.
    Rollback {
        /// The model.
        model: String,
        #[command(flatten)]
        host: Host,
    },
    /// Open a plugin and say whether this host could take it; the host runs this on itself.
    #[command(hide = true)]
    Preflight {
        /// The library.
        file: PathBuf,
    },
}

/// Which host, and how to print what it says.
#[derive(clap::Args)]
struct Host {
    /// Where it listens. Default: what the configuration says.
    #[arg(long, env = "MODALKIT_URL")]
    url: Option<String>,
    /// Print the host's own JSON.
    #[arg(long)]
    json: bool,
}

const COULD_NOT_SERVE: u8 = 1;
const NOT_DONE: u8 = 1;
const WRONG_USAGE: u8 = 2;
const SECOND_SIGNAL: u8 = 130;

fn main() -> ExitCode {
    let cli = Cli::parse();
    match cli.command {
        None | Some(Command::Serve) => start(&cli.config),
        Some(Command::Preflight { file }) => preflight(&file),
        Some(Command::Models { name, host }) => ask(&cli.config, &Ask::Models(name), &host),
        Some(Command::Reload { model: Some(model), host, .. }) => {
            ask(&cli.config, &Ask::Reload(model), &host)
        }
        Some(Command::Reload { volume, host, .. }) => {
            ask(&cli.config, &Ask::ReloadVolume(volume.unwrap_or_default()), &host)
        }
        Some(Command::Rollback { model, host }) => ask(&cli.config, &Ask::RollBack(model), &host),
    }
}

/// Asks a running host, and ends with 1 where it didn't do what was asked.
#[expect(clippy::print_stdout, reason = "what it says is what was asked for")]
fn ask(files: &[PathBuf], what: &Ask, host: &Host) -> ExitCode {
    let url = match &host.url {
        Some(url) => url.trim_end_matches('/').to_owned(),
        None => match config::load(files, environment()) {
            Ok(config) => url_of(config.server.listen),
            Err(error) => {
                complain(&anyhow::Error::new(error));
                return ExitCode::from(WRONG_USAGE);
            }
        },
    };
    match client::ask(&url, what, host.json) {
        Ok(answered) => {
            print!("{}", answered.text);
            if answered.done { ExitCode::SUCCESS } else { ExitCode::from(NOT_DONE) }
        }
        Err(error) => {
            complain(&anyhow::Error::new(error));
            ExitCode::from(NOT_DONE)
        }
    }
}

/// A host that listens everywhere is found here too.
fn url_of(mut listen: SocketAddr) -> String {
    if listen.ip().is_unspecified() {
        listen.set_ip(if listen.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() });
    }
    format!("http://{listen}")
}

fn start(files: &[PathBuf]) -> ExitCode {
    let config = config::load(files, environment()).map_err(anyhow::Error::new).and_then(|config| {
        telemetry::install_log(&config.server.log)
            .context("server.log is no list of levels such as \"info,modalkit=debug\"")?;
        Ok(config)
    });
    match config {
        Ok(config) => serve(config, files),
        Err(error) => {
            complain(&error);
            ExitCode::from(WRONG_USAGE)
        }
    }
}

fn serve(config: Config, files: &[PathBuf]) -> ExitCode {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        // Connections have threads of their own; what is left is to accept, to watch and to scale.
        .worker_threads(1)
        // Large inputs, one for each core, and the building of plugins.
        .max_blocking_threads(cores + 2)
        .thread_name("control")
        .enable_all()
        .build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => {
            complain(&anyhow::Error::new(error).context("can't start the async runtime"));
            return ExitCode::from(COULD_NOT_SERVE);
        }
    };
    let code = runtime.block_on(async {
        let (mut terminate, mut interrupt, mut hang_up) = match signals() {
            Ok(signals) => signals,
            Err(error) => {
                complain(&error);
                return COULD_NOT_SERVE;
            }
        };
        let (first, stop) = tokio::sync::oneshot::channel();
        let second = async {
            next(&mut terminate, &mut interrupt).await;
            // The run may have ended by itself.
            let _ = first.send(());
            next(&mut terminate, &mut interrupt).await;
        };
        let stop = async { drop(stop.await) };
        let (changed, changes) = mpsc::channel(1);
        tokio::select! {
            ended = app::run(config, changes, stop) => match ended {
                Ok(Ended::Drained) => 0,
                Ok(Ended::CutOff) => COULD_NOT_SERVE,
                Err(error) => {
                    complain(&error);
                    COULD_NOT_SERVE
                }
            },
            () = second => SECOND_SIGNAL,
            never = read_again(&mut hang_up, files, changed) => match never {},
        }
    });
    // Threads inside plugin code can't be told to stop; the process ends with them.
    runtime.shutdown_background();
    ExitCode::from(code)
}

/// Variables that aren't UTF-8 name none of our keys.
fn environment() -> impl Iterator<Item = (String, String)> {
    env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
}

fn signals() -> anyhow::Result<(Signal, Signal, Signal)> {
    let listen = |kind| signal(kind).context("can't listen for signals");
    Ok((listen(SignalKind::terminate())?, listen(SignalKind::interrupt())?, listen(SignalKind::hangup())?))
}

/// At each SIGHUP, reads the configuration again. A wrong one changes nothing.
async fn read_again(
    hang_up: &mut Signal,
    files: &[PathBuf],
    changed: mpsc::Sender<Config>,
) -> std::convert::Infallible {
    loop {
        if hang_up.recv().await.is_none() {
            std::future::pending::<()>().await;
        }
        match config::load(files, environment()) {
            // A host that is going away has no use for it.
            Ok(config) => drop(changed.send(config).await),
            Err(error) => tracing::error!(%error, "the configuration stays as it was"),
        }
    }
}

async fn next(terminate: &mut Signal, interrupt: &mut Signal) {
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}

#[expect(clippy::print_stdout, reason = "the parent process reads the verdict from there")]
fn preflight(file: &std::path::Path) -> ExitCode {
    // On a line of its own, whatever the library printed before.
    println!("\n{}", modalkit_loader::preflight::child(file));
    ExitCode::SUCCESS
}

#[expect(clippy::print_stderr, reason = "there may be no log yet")]
fn complain(error: &anyhow::Error) {
    eprintln!("error: {error:#}");
}
