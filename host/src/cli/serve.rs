//! `serve`: signals, the control runtime, and how the run's end becomes an exit code.

use std::path::PathBuf;

use anyhow::Context;
use modalkit::{
    app::{self, Ended},
    config::{Loaded, Sources},
    ingress,
    insight::log::{self, Log, LogLevels},
};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
};

use super::{DEVICE_LOST, DONE, NOT_DONE, SECOND_SIGNAL, WRONG_USAGE, print::complain};

/// Threads of the blocking pool beside those on which plugins may hang: for the journal, the configuration and the building of plugins.
const OWN_BLOCKING_THREADS: usize = 64;

pub(crate) fn run(files: Vec<PathBuf>, set_journal_aside: bool) -> u8 {
    app::keep_freed_memory();
    // Before all else, so that nothing from here on waits for whoever reads standard error; dropped last, however this ends.
    let log = match log::start() {
        Ok(log) => log,
        Err(error) => {
            complain(&anyhow::Error::new(error).context("can't start the log"));
            return NOT_DONE;
        }
    };
    if let Err(error) = app::watch_endings() {
        complain(&anyhow::Error::new(error).context("can't watch over how the process ends"));
        return NOT_DONE;
    }
    let code = start(files, &log, set_journal_aside);
    app::mark_end_planned();
    code
}

fn start(files: Vec<PathBuf>, log: &Log, set_journal_aside: bool) -> u8 {
    let sources = Sources::new(files);
    let loaded = match sources.load() {
        Ok(loaded) => loaded,
        Err(faults) => {
            complain(&anyhow::Error::new(faults));
            return WRONG_USAGE;
        }
    };
    let levels = match log.install(&loaded.config.server.log) {
        Ok(levels) => levels,
        Err(error) => {
            complain(&anyhow::Error::new(error).context("server.log"));
            return WRONG_USAGE;
        }
    };
    if let Err(error) = log.take_standard_output() {
        complain(&anyhow::Error::new(error).context("can't take what plugins print into the log"));
        return NOT_DONE;
    }
    serve(sources, loaded, levels, set_journal_aside)
}

fn serve(sources: Sources, loaded: Loaded, levels: LogLevels, set_journal_aside: bool) -> u8 {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        // Connections have threads of their own; what is left is to accept, to watch and to scale.
        .worker_threads(1)
        .max_blocking_threads(ingress::DECODES_MAX + OWN_BLOCKING_THREADS)
        .thread_name("control")
        .enable_all()
        .build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => {
            complain(&anyhow::Error::new(error).context("can't start the async runtime"));
            return NOT_DONE;
        }
    };
    let code = runtime.block_on(async {
        let (mut terminate, mut interrupt, mut hang_up) = match signals() {
            Ok(signals) => signals,
            Err(error) => {
                complain(&error);
                return NOT_DONE;
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
        let (hung_up, hang_ups) = mpsc::channel(1);
        let pass_on = async {
            while hang_up.recv().await.is_some() {
                // One that waits stands for any number.
                let _ = hung_up.try_send(());
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            ended = app::run(sources, loaded, levels, set_journal_aside, hang_ups, stop) => match ended {
                Ok(Ended::Drained) => DONE,
                Ok(Ended::CutOff) => NOT_DONE,
                Ok(Ended::DeviceLost) => DEVICE_LOST,
                Err(error) => {
                    complain(&error);
                    NOT_DONE
                }
            },
            () = second => SECOND_SIGNAL,
            () = pass_on => NOT_DONE,
        }
    });
    // Threads inside plugin code can't be told to stop; the process ends with them.
    runtime.shutdown_background();
    code
}

fn signals() -> anyhow::Result<(Signal, Signal, Signal)> {
    let listen = |kind| signal(kind).context("can't listen for signals");
    Ok((listen(SignalKind::terminate())?, listen(SignalKind::interrupt())?, listen(SignalKind::hangup())?))
}

async fn next(terminate: &mut Signal, interrupt: &mut Signal) {
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}
