//! `bench buckets`: how fast a bucket is mirrored, beside AWS's own command line, from the same store in the same minutes. It owns the store, and
//! what both fetch.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Instant,
};

use anyhow::{Context, bail};

use super::{free_port, median};
use crate::build;

/// The store, built for speed, and AWS's command line.
const TOOLS: &str = "target/bench-tools";
const S3S_VERSION: &str = "0.14.1";
const AWS: &str = "awscli==1.46.3";
/// What is fetched: 1 GiB.
const OBJECTS: usize = 16;
const OBJECT_BYTES: usize = 64 << 20;
const ROUNDS: usize = 5;
const KEYS: [(&str, &str); 2] =
    [("AWS_ACCESS_KEY_ID", "AKIABENCH"), ("AWS_SECRET_ACCESS_KEY", "a-secret-of-the-bench")];

pub(super) fn run() -> anyhow::Result<()> {
    ensure()?;
    build::cargo(&["build", "--release", "--package", "modalkit"])?;
    let folder = std::env::temp_dir().join(format!("modalkit-bench-{}", std::process::id()));
    let measured = measure(&folder);
    // Left alone where it can't be removed: it is in the system's folder for such things.
    let _ = fs::remove_dir_all(&folder);
    measured
}

fn ensure() -> anyhow::Result<()> {
    let program = Path::new(TOOLS).join("bin/s3s-fs");
    if !program.is_file() {
        let mut install =
            build::command(&["install", "--locked", "--quiet", "--root", TOOLS, "--version", S3S_VERSION]);
        build::run(install.args(["--features", "binary", "s3s-fs"]))?;
    }
    let environment = Path::new(TOOLS).join("aws");
    if !environment.join("bin/aws").is_file() {
        build::run(Command::new("python3").args(["-m", "venv"]).arg(&environment))?;
        build::run(Command::new(environment.join("bin/pip")).args(["install", "--quiet", AWS]))?;
    }
    Ok(())
}

fn measure(folder: &Path) -> anyhow::Result<()> {
    let objects = folder.join("root/demo");
    fs::create_dir_all(&objects)?;
    fs::create_dir_all(folder.join("volume"))?;
    let mut content = vec![0_u8; OBJECT_BYTES];
    for number in 0..OBJECTS {
        content
            .iter_mut()
            .enumerate()
            .for_each(|(at, byte)| *byte = (at * 31 + number) as u8 ^ (at >> 8) as u8);
        let path = objects.join(format!("{number}.bin"));
        fs::write(&path, &content)?;
        // Old enough that nobody waits for more of the upload.
        let old = std::time::SystemTime::now() - std::time::Duration::from_secs(7200);
        fs::File::options().write(true).open(&path)?.set_modified(old)?;
    }
    drop(content);
    let port = free_port()?;
    let mut store = Command::new(Path::new(TOOLS).join("bin/s3s-fs"));
    store.args([
        "--host",
        "127.0.0.1",
        "--port",
        &port.to_string(),
        "--access-key",
        KEYS[0].1,
        "--secret-key",
        KEYS[1].1,
    ]);
    let mut store = store
        .arg(folder.join("root"))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("can't start s3s-fs")?;
    let url = format!("http://127.0.0.1:{port}");
    println!(
        "buckets: {OBJECTS} objects of {} MiB from s3s-fs; medians of {ROUNDS} alternating rounds",
        OBJECT_BYTES >> 20
    );
    let rounds = (0..ROUNDS).map(|_| Ok((aws(folder, &url)?, mirror(folder, &url)?)));
    let rounds: anyhow::Result<Vec<(f64, (f64, u64))>> = rounds.collect();
    let _ = store.kill();
    let _ = store.wait();
    let rounds = rounds?;
    let aws = median(&rounds.iter().map(|(aws, _)| *aws).collect::<Vec<_>>());
    let own = median(&rounds.iter().map(|(_, (own, _))| *own).collect::<Vec<_>>());
    let memory = rounds.iter().map(|(_, (_, memory))| *memory).max().unwrap_or_default();
    let rate = |seconds: f64| (OBJECTS * OBJECT_BYTES) as f64 / seconds / f64::from(1 << 20);
    println!("  aws s3 cp --recursive  {aws:.2} s  {:.0} MiB/s", rate(aws));
    println!(
        "  modalkit               {own:.2} s  {:.0} MiB/s, {:.2} times as fast; the host's memory at most {memory} KiB",
        rate(own),
        aws / own
    );
    Ok(())
}

fn aws(folder: &Path, url: &str) -> anyhow::Result<f64> {
    let target = folder.join("aws");
    let _ = fs::remove_dir_all(&target);
    let begun = Instant::now();
    let mut command = Command::new(Path::new(TOOLS).join("aws/bin/aws"));
    command.args(["--endpoint-url", url, "s3", "cp", "--recursive", "--quiet", "s3://demo/"]).arg(&target);
    build::run(command.envs(KEYS).env("AWS_DEFAULT_REGION", "us-east-1").env("NO_PROXY", "127.0.0.1"))?;
    let took = begun.elapsed().as_secs_f64();
    fs::remove_dir_all(&target)?;
    Ok(took)
}

/// Seconds until the first snapshot is shown, as the host's log says, and the most memory that it had, in KiB.
fn mirror(folder: &Path, url: &str) -> anyhow::Result<(f64, u64)> {
    for name in ["state", "mnt"] {
        let path: PathBuf = folder.join(name);
        let _ = fs::remove_dir_all(&path);
        let _ = fs::remove_file(&path);
    }
    let config = folder.join("bench.toml");
    let at = |name: &str| folder.join(name).display().to_string();
    write!(
        fs::File::create(&config)?,
        "[server]\nlisten = \"127.0.0.1:0\"\nstate_folder = {:?}\n[app_settings.deployment_config.volumes]\n{:?} = \"volume\"\n\
         [[app_settings.deployment_config.cloud_bucket_mounts]]\nmount_point = {:?}\nbucket_name = \"demo\"\nbucket_endpoint_url = {url:?}\nread_only = true\n",
        at("state"),
        at("volume"),
        at("mnt")
    )?;
    let mut command = Command::new("target/release/modalkit");
    command.arg("--config").arg(&config).envs(KEYS).env("AWS_REGION", "us-east-1");
    let mut host =
        Running(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?);
    let log = host.0.stderr.take().context("its log is piped")?;
    for line in BufReader::new(log).lines() {
        let line = line?;
        if line.contains("the mirror shows what the bucket has") {
            let took = line.split("\"took\":\"").nth(1).and_then(|rest| rest.split('s').next()?.parse().ok());
            let status = fs::read_to_string(format!("/proc/{}/status", host.0.id()))?;
            let peak = status.lines().find_map(|line| {
                line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.trim().parse().ok()
            });
            return Ok((took.context("the log says how long it took")?, peak.unwrap_or_default()));
        }
    }
    bail!("the host ended before it had mirrored the bucket")
}

/// A host that ends with its measurement.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
