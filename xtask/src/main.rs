//! What one does with this workspace. Each command prints what it is doing; a long one shows its progress.

#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "a command line tool talks on standard output")]

mod bench;
mod brokers;
mod build;
mod check;
mod dependencies;
mod freeze;
mod gpu;
mod new_plugin;
mod python;
mod run;
mod soak;
mod stores;
mod watch;

use std::{env, path::PathBuf, process::ExitCode};

use anyhow::{Context, bail};

const USAGE: &str = "\
cargo xtask COMMAND

  run [--volume DIR] [--watch]  build the host, start it on config/modalkit.toml, say how to ask it, build the demonstrations;
                                --watch: build and install a plugin again when its source changes
  plugin NAME [--volume DIR]    build one plugin and install it into the volume
  new-plugin NAME               make a new pipeline in plugins/NAME
  test [--without NAME] [ARGS...]
                                every test; ARGS go to `cargo test`. Without a broker or store (redis, moto, taskiq, azurite, s3s, gcs),
                                without a client (kserve, mlserver, openapi), without a browser, without python, people's models (models), root's mount or what rendered files are held against (rendering) those that need it are
                                left out, and the end says so
  brokers                       start Redis and SQS for a developer, and print configuration for them
  ci                            formatting, lints, documentation, dependencies, then every test
  audit                         what is linked in: published advisories, yanked versions, licences, bans and sources
  freeze                        keep the SDK as it is for tests/compat, once for each minor number of the ABI
  bench [WORKLOAD...]           compare with bare hyper: echo, batched, big, tensors
                                (--rounds N, --seconds N, default 5 and 4; --against FOLDER: beside the host and the
                                plugins in it as well, such as target/release of another checkout)
  bench jobs                    durable asynchronous jobs, beside TaskIQ and beside bare appends
  bench isolation               the same host with each replica in a process of its own, beside itself without
  bench buckets                 how fast a bucket of 1 GiB is mirrored, beside AWS's own command line
  bench models                  what the host adds to a run of other people's ONNX models, beside the engine alone
  bench embeddings              texts by plugins/embed, beside FastAPI with onnxruntime and the same weights
  bench python                  a pipeline in Python beside mosec 0.9.8, with the same model
  bench grpc                    ModelInfer over gRPC, beside bare tonic (--perf-analyzer COMMAND: asked by Triton's perf_analyzer)
  bench adaptive                waits that are learned beside fixed ones: callers, bursts, a ramp, a model whose time drifts; writes a figure
  bench stream                  answers in chunks: the first event, a thousand streams at once, /predict_sync beside them
  bench insight                 what a key, and traces of 1 % of requests, cost a request of echo
  bench reload                  200 reloads under load: what callers notice, and how soon new code answers
  bench similarity              nearest neighbours on the CPU, as a share of what the machine can do at most
  gpu-test                      what only a GPU shows: leases, reloads, out of memory, a device that is lost, similarity; puts
                                what it needs into target/release/gpu-test, which can be carried, and runs it
  soak [PART...]                what takes longer than a test should: reload, neighbour, failing, mounts, memory,
                                race, config, keys, metrics, jobs, sharing, million, hostile, killers, kills, workers

The volume is target/volume unless --volume says otherwise.";

fn main() -> ExitCode {
    let args: Vec<String> = env::args().skip(1).collect();
    match dispatch(args) {
        Ok(code) => code,
        Err(error) => {
            println!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(mut args: Vec<String>) -> anyhow::Result<ExitCode> {
    env::set_current_dir(workspace()?)?;
    if args.is_empty() {
        println!("{USAGE}");
        return Ok(ExitCode::FAILURE);
    }
    let command = args.remove(0);
    // What follows `test` may be meant for cargo.
    if command != "test" && args.iter().any(|arg| ["--help", "-h"].contains(&arg.as_str())) {
        println!("{USAGE}");
        return Ok(ExitCode::SUCCESS);
    }
    match command.as_str() {
        "run" => {
            let volume = take_volume(&mut args)?;
            let watch = take_flag(&mut args, run::WATCH);
            nothing_else(&args)?;
            run::run(&volume, watch)?;
        }
        run::FINISH => {
            let volume = take_volume(&mut args)?;
            run::finish(&volume, take_flag(&mut args, run::WATCH))?;
        }
        "plugin" => {
            let volume = take_volume(&mut args)?;
            let [name] = args.as_slice() else { bail!("expected one plugin's name\n\n{USAGE}") };
            build::plugin(name)?;
            let installed = build::install(name, &build::release(), &volume)?;
            println!(
                "installed {}; a running host serves it within seconds: `modalkit models {name}` says which content does",
                installed.display()
            );
        }
        "new-plugin" => {
            let [name] = args.as_slice() else { bail!("expected the new plugin's name\n\n{USAGE}") };
            new_plugin::create(name)?;
        }
        "brokers" => {
            nothing_else(&args)?;
            brokers::serve()?;
        }
        "test" => {
            let mut without = Vec::new();
            while let Some(name) = take(&mut args, "--without")? {
                without.push(name);
            }
            check::test(&args, &without)?;
        }
        "ci" => {
            nothing_else(&args)?;
            check::ci()?;
        }
        "audit" => {
            nothing_else(&args)?;
            dependencies::audit()?;
        }
        "freeze" => {
            nothing_else(&args)?;
            freeze::run()?;
        }
        "gpu-test" => {
            nothing_else(&args)?;
            gpu::test()?;
        }
        "soak" => soak::run(&args)?,
        "bench" => {
            let rounds = take_number(&mut args, "--rounds", 5)?;
            let seconds = take_number(&mut args, "--seconds", 4)?;
            let against = take(&mut args, "--against")?.map(PathBuf::from);
            let perf_analyzer = take(&mut args, "--perf-analyzer")?;
            if against.is_some() && (args == ["similarity"] || args == ["reload"]) {
                bail!("--against: expected with echo, batched, big and tensors, found it with {args:?}");
            }
            if args == ["similarity"] {
                gpu::bench()?;
            } else if args == ["reload"] {
                soak::run(&["reload".to_owned(), "neighbour".to_owned()])?;
            } else {
                bench::run(&args, &bench::Options { rounds, seconds, against, perf_analyzer })?;
            }
        }
        "help" | "--help" | "-h" => println!("{USAGE}"),
        other => bail!("no such command: {other}\n\n{USAGE}"),
    }
    Ok(ExitCode::SUCCESS)
}

fn workspace() -> anyhow::Result<PathBuf> {
    let here = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    Ok(here.parent().context("xtask lies in the workspace's folder")?.to_owned())
}

fn take(args: &mut Vec<String>, flag: &str) -> anyhow::Result<Option<String>> {
    let Some(at) = args.iter().position(|arg| arg == flag) else { return Ok(None) };
    args.remove(at);
    if at == args.len() {
        bail!("{flag} needs a value");
    }
    Ok(Some(args.remove(at)))
}

fn take_flag(args: &mut Vec<String>, flag: &str) -> bool {
    let before = args.len();
    args.retain(|arg| arg != flag);
    args.len() < before
}

fn take_volume(args: &mut Vec<String>) -> anyhow::Result<PathBuf> {
    Ok(take(args, "--volume")?.unwrap_or_else(|| "target/volume".into()).into())
}

fn take_number(args: &mut Vec<String>, flag: &str, default: usize) -> anyhow::Result<usize> {
    match take(args, flag)? {
        None => Ok(default),
        Some(text) => match text.parse() {
            Ok(number) if number > 0 => Ok(number),
            _ => bail!("{flag}: expected a number above 0, found {text:?}"),
        },
    }
}

fn nothing_else(args: &[String]) -> anyhow::Result<()> {
    match args.first() {
        Some(arg) => bail!("unexpected argument {arg:?}\n\n{USAGE}"),
        None => Ok(()),
    }
}
