//! The command line: what there is to be said (`args`), and a module for each kind of command. It owns exit codes, and decides
//! nothing about serving.

pub(crate) mod args;
mod ask;
mod check;
mod client;
mod deploy;
mod inspect;
mod inspect_model;
mod new;
mod print;
mod request;
mod serve;
mod show;

use std::process::ExitCode;

use clap::CommandFactory;
use modalkit::{
    app,
    config::{self, Environment, Faults},
};

use args::{Cli, Command, ConfigCommand, DeployCommand};
use print::{complain, print};
use request::{Ask, How};

/// Drained after a signal, or done.
pub(crate) const DONE: u8 = 0;
/// The host could not start or its drain was cut off; what was asked of a running host was not done; `check` found errors;
/// `inspect` would not take the file.
pub(crate) const NOT_DONE: u8 = 1;
/// Wrong usage or, where the host was to be started, a wrong configuration.
pub(crate) const WRONG_USAGE: u8 = 2;
/// A GPU failed in a way that lasts until the process ends (`EX_TEMPFAIL`): start it again.
pub(crate) const DEVICE_LOST: u8 = 75;
/// A second signal.
pub(crate) const SECOND_SIGNAL: u8 = 130;

/// Carries a command out.
pub(crate) fn run(cli: Cli) -> ExitCode {
    // What needs no configuration is not stopped by a wrong one.
    match &cli.command {
        Some(Command::Config { command: ConfigCommand::Schema }) => {
            print(&format!("{:#}\n", config::schema()));
            return ExitCode::from(DONE);
        }
        Some(Command::New { folder, .. }) => return ExitCode::from(new::run(folder)),
        Some(Command::Completions { shell }) => {
            clap_complete::generate(*shell, &mut Cli::command(), "modalkit", &mut std::io::stdout());
            return ExitCode::from(DONE);
        }
        Some(Command::Preflight { file }) => {
            // On a line of its own, whatever the library printed before.
            print(&format!("\n{}\n", app::preflight(file)));
            return ExitCode::from(DONE);
        }
        Some(Command::Worker { host, connections, cgroup }) => {
            return match app::worker(*host, *connections, cgroup.clone()) {
                Ok(code) => ExitCode::from(code),
                Err(error) => {
                    complain(&anyhow::Error::new(error).context("a worker could not go on"));
                    ExitCode::from(NOT_DONE)
                }
            };
        }
        _ => {}
    }
    let environment = match Environment::of_process() {
        Ok(environment) => environment,
        Err(faults) => return refuse(&faults, &cli),
    };
    let files = cli.files(&environment);
    let code = match cli.command {
        None => serve::run(files, false),
        Some(Command::Serve { set_journal_aside }) => serve::run(files, set_journal_aside),
        Some(
            Command::Config { command: ConfigCommand::Schema }
            | Command::Completions { .. }
            | Command::New { .. }
            | Command::Preflight { .. }
            | Command::Worker { .. },
        ) => DONE,
        Some(Command::Image { build, tag }) => deploy::image(&files, &environment, build, tag),
        Some(Command::Deploy { command: DeployCommand::Render(args) }) => {
            deploy::render(&files, &environment, args)
        }
        Some(Command::Check { json, strict }) => check::run(&files, &environment, json, strict),
        Some(Command::Inspect { file, plugin, settings, json }) => {
            let asked = inspect_model::Asked { file: &file, plugin: plugin.as_deref(), settings: &settings };
            inspect::run(&asked, &files, &environment, json)
        }
        Some(Command::Models { name, host }) => ask::run(&Ask::Models(name), &host, &files, &environment),
        Some(Command::Devices { host }) => ask::run(&Ask::Devices, &host, &files, &environment),
        Some(Command::Metrics { host }) => ask::run(&Ask::Metrics, &host, &files, &environment),
        Some(Command::Reload { model: Some(model), host, .. }) => {
            ask::run(&Ask::Reload(model), &host, &files, &environment)
        }
        Some(Command::Reload { volume, host, .. }) => {
            ask::run(&Ask::ReloadVolume(volume.unwrap_or_default()), &host, &files, &environment)
        }
        Some(Command::Config { command: ConfigCommand::Show { host } }) => {
            ask::run(&Ask::Config, &host, &files, &environment)
        }
        Some(Command::Config { command: ConfigCommand::Reload { host } }) => {
            ask::run(&Ask::ReloadConfig, &host, &files, &environment)
        }
        Some(Command::Jobs { id, cancel, redeliver, wait, state, delivery, model, after, limit, host }) => {
            let what = match id {
                Some(id) if cancel => Ask::CancelJob(id),
                Some(id) if redeliver => Ask::Redeliver(id),
                Some(id) => Ask::Job(id, wait),
                None => Ask::Jobs { state, delivery, model, after, limit },
            };
            ask::run(&what, &host, &files, &environment)
        }
        Some(Command::Predict { model, input, batch, later, host }) => match ask::input(&input) {
            Ok(input) => {
                let how = match (batch, later) {
                    (true, _) => How::Batch,
                    (_, true) => How::Later,
                    _ => How::Now,
                };
                ask::run(&Ask::Predict { model, input, how }, &host, &files, &environment)
            }
            Err(error) => {
                complain(&anyhow::Error::new(error).context("can't read the input"));
                WRONG_USAGE
            }
        },
        Some(Command::Rollback { model, host }) => {
            ask::run(&Ask::RollBack(model), &host, &files, &environment)
        }
        Some(Command::Unload { model, host }) => ask::run(&Ask::Unload(model), &host, &files, &environment),
    };
    ExitCode::from(code)
}

fn refuse(faults: &Faults, cli: &Cli) -> ExitCode {
    if let Some(Command::Check { json, .. }) = cli.command {
        check::tell_faults(faults, json);
        return ExitCode::from(NOT_DONE);
    }
    complain(&anyhow::Error::new(faults.clone()));
    ExitCode::from(WRONG_USAGE)
}
