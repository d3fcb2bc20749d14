//! `bench python`: a pipeline in Python on this host beside mosec, which serves the same model with as many workers. It owns the environment that
//! both run in.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use super::{Options, PREDICT, Workload, free_port, measure_in, process::Server, wrk};
use crate::build;

/// Both servers' environment.
const ENVIRONMENT: &str = "target/python-bench";
const PACKAGES: [&str; 4] = ["mosec==0.9.8", "pydantic==2.14.4", "numpy==2.4.6", "onnxruntime"];
const ECHO: &str = include_str!("python/echo.py");
const DIGITS: &str = include_str!("python/digits.py");
const MOSEC: &str = include_str!("python/mosec_server.py");
const FRAMES: &str = include_str!("python/frames.py");
/// The package that workers run.
const PACKAGE: &str = "host/worker/python";
const MODEL: &str = "plugins/onnx/model/digits.onnx";

/// Workers, and callers.
const CASES: [(usize, &[usize]); 2] = [(1, &[32, 128]), (2, &[64])];

pub(super) fn run(options: &Options) -> anyhow::Result<()> {
    wrk::ensure()?;
    build::cargo(&["build", "--release", "--package", "modalkit"])?;
    ensure(ENVIRONMENT, &PACKAGES)?;
    for (name, code) in [("echo-python", ECHO), ("digits-python", DIGITS)] {
        for (workers, concurrency) in CASES {
            let folder = std::env::temp_dir().join(format!("modalkit-bench-{}", std::process::id()));
            fs::create_dir_all(&folder)?;
            let workload = Workload {
                name,
                plugin: "served",
                path: PREDICT,
                concurrency,
                config: "[app_settings.batch_config]\nmax_batch_size = 32\nwait_ms = 2\n",
                note: if workers == 1 {
                    "max_batch_size 32, one worker"
                } else {
                    "max_batch_size 32, two workers"
                },
            };
            let measured = both(code, workers, &workload, &folder)
                .and_then(|servers| measure_in(&workload, options, &folder, &servers));
            // Left alone where it can't be removed: it is in the system's folder for such things.
            let _ = fs::remove_dir_all(&folder);
            measured?;
        }
    }
    println!(
        "\nframes: CPU of an item in a batch of 32, by direct calls and through a worker's connection; medians of 15 alternating rounds"
    );
    build::run(Command::new(Path::new(ENVIRONMENT).join("bin/python")).args(["-c", FRAMES, PACKAGE]))
}

/// Makes an environment with these packages, where it isn't there.
pub(super) fn ensure(environment: &str, packages: &[&str]) -> anyhow::Result<()> {
    let stamp = Path::new(environment).join("installed.txt");
    let wanted = packages.join("\n");
    if fs::read_to_string(&stamp).is_ok_and(|installed| installed == wanted) {
        return Ok(());
    }
    // One that was begun and not ended is begun again.
    let _ = fs::remove_dir_all(environment);
    build::run(Command::new("python3").args(["-m", "venv", environment]))?;
    let pip = Path::new(environment).join("bin/pip");
    build::run(Command::new(pip).args(["install", "--quiet", "--disable-pip-version-check"]).args(packages))?;
    Ok(fs::write(stamp, wanted)?)
}

fn both(code: &str, workers: usize, w: &Workload, folder: &Path) -> anyhow::Result<Vec<Server>> {
    let absolute = |path: &str| -> std::io::Result<PathBuf> { std::path::absolute(path) };
    let (environment, model) = (absolute(ENVIRONMENT)?, absolute(MODEL)?);
    let theirs = folder.join("mosec");
    fs::create_dir_all(&theirs)?;
    fs::write(theirs.join("served.py"), code)?;
    fs::write(theirs.join("mosec_server.py"), MOSEC)?;
    let port = free_port()?;
    let mut mosec = Command::new(environment.join("bin/python"));
    mosec
        .args(["mosec_server.py", "--address", "127.0.0.1", "--port", &port.to_string()])
        .current_dir(&theirs)
        .env("WORKERS", workers.to_string())
        .env("DIGITS", &model);
    let mosec = Server::start("mosec", &mut mosec, port)?.with_path("/inference");

    let ours = folder.join("volume/served");
    fs::create_dir_all(&ours)?;
    fs::write(ours.join("pipeline.py"), code)?;
    let (config, state, port) = (folder.join("host.toml"), folder.join("state"), free_port()?);
    let volume = folder.join("volume");
    let interpreter = environment.join("bin/python");
    fs::write(
        &config,
        format!(
            "[server]\nlisten = \"127.0.0.1:{port}\"\nlog = \"warn\"\nstate_folder = {state:?}\n{}\
             [app_settings.deployment_config]\nmin_replicas = {workers}\n\
             [app_settings.deployment_config.volumes]\n{volume:?} = \"bench\"\n\
             [model_settings.model_entries.served.python]\ninterpreter = {interpreter:?}\nenv = {{ DIGITS = {model:?} }}\n",
            w.config
        ),
    )?;
    let host = Server::start(
        "host",
        Command::new(build::release().join("modalkit")).arg("--config").arg(&config),
        port,
    )?;
    host.wait_until_ready()?;
    Ok(vec![mosec, host])
}
