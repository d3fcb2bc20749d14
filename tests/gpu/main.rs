//! What only a real GPU shows, through a real host: `cargo xtask gpu-test`, or this program alone where the others lie beside it. It
//! checks answers and prints timings; what is wrong ends it with another code than 0, and 3 says that there is no GPU.

#![allow(clippy::print_stdout, reason = "a program for the command line")]

use std::{
    process::{Command, ExitCode},
    time::{Duration, Instant},
};

use modalkit_tests::{
    Host, Setup, built,
    embeddings::{best, npy, rows},
    load::{Load, Requests},
    put, wait_at_most, wait_until,
};
use serde_json::{Value, json};

const ROWS: usize = 100_000;
const WIDTH: usize = 384;
const QUERIES: usize = 64;
/// How long callers ask.
const LOAD_TIME: Duration = Duration::from_secs(5);
/// A matrix is read, and a context made, from a cold disk and driver.
const LOAD_TIME_MAX: Duration = Duration::from_secs(120);
/// How a host ends that lost a device.
const DEVICE_LOST: i32 = 75;
const NO_GPU: u8 = 3;

fn main() -> ExitCode {
    let host = Setup::new().start();
    let devices = host.get("/devices").1;
    if let Some(why) = devices["why_none"].as_str() {
        println!("nothing was tested: {why}");
        return ExitCode::from(NO_GPU);
    }
    println!("{devices:#}");
    drop(host);
    let parts: [(&str, fn()); 4] = [
        ("out of memory fails its batch only", out_of_memory),
        ("a reload shares the device, and no request fails", reload),
        ("a kernel that breaks its context drains the host", lost),
        ("similarity answers as 64 bits do", similarity),
    ];
    for (name, part) in parts {
        println!("== {name}");
        let begun = Instant::now();
        part();
        println!("== {name}: {:.1} s", begun.elapsed().as_secs_f64());
    }
    println!("== similarity, and what the device can do at most");
    let measured = Command::new(built().join("examples/measure")).arg("--gpu").status();
    match measured {
        Ok(status) if status.success() => ExitCode::SUCCESS,
        other => {
            println!("examples/measure ended with {other:?}");
            ExitCode::FAILURE
        }
    }
}

fn gpu(deployment: &str) -> Host {
    let config = format!(
        "[model_settings.model_entries.gpu.deployment_config]\ngpu = \"any\"\nprobation_seconds = 0\n{deployment}\n"
    );
    Setup::new().plugin("gpu").config(&config).ready()
}

fn ask(host: &Host, input: &Value) -> (u16, Value) {
    host.post("/predict_sync", input)
}

fn out_of_memory() {
    let host = gpu("");
    let memory_mb = host.get("/devices").1["devices"][0]["memory_bytes"].as_u64().expect("a number") >> 20;
    let allocate = |mb: u64| ask(&host, &json!({"text": "a", "do": "allocate", "mb": mb}));
    assert_eq!(allocate(256).0, 200);
    let (status, answer) = allocate(memory_mb + 1024);
    assert_eq!(status, 500, "{answer}");
    assert!(answer.to_string().contains("CUDA_ERROR_OUT_OF_MEMORY"), "{answer}");
    assert_eq!(allocate(256).0, 200, "the device goes on");
    assert_eq!(host.get("/readyz").0, 200);
}

const ECHO: Requests = Requests {
    path: "/predict_sync",
    body: r#"{"text": "through the device and back"}"#,
    statuses: &[200],
    check: |answer| match answer["text"] == "through the device and back" {
        true => Ok(0),
        false => Err(answer.to_string()),
    },
};

fn reload() {
    let host = gpu("");
    let load = Load::start(host.address, 8, ECHO);
    for _ in 0..5 {
        let (status, outcome) = host.post("/models/gpu/reload", &Value::Null);
        assert_eq!((status, &outcome["outcome"]), (200, &json!("swapped")), "{outcome}");
    }
    let served = load.stop();
    served.assert_faultless();
    println!("{} answers beside 5 reloads", served.right);
}

fn lost() {
    let mut host = gpu("retries = 3");
    let envelope = json!({"message": {"text": "a job", "do": "sleep", "ms": 300}, "success_queue": "", "failure_queue": ""});
    let jobs: Vec<String> = (0..4).map(|_| host.job("gpu", &envelope)).collect();
    let (status, answer) = ask(&host, &json!({"text": "a", "do": "kernel at an illegal address"}));
    println!("{status}: {answer}");
    assert_eq!(status, 503, "{answer}");
    let begun = Instant::now();
    let status = host.wait();
    assert_eq!(status.code(), Some(DEVICE_LOST), "{status:?}");
    println!("the host had ended {:.2} s later", begun.elapsed().as_secs_f64());
    host.start_again();
    for job in jobs {
        let job = host.ended(&job);
        assert_eq!(job["state"], "succeeded", "{job}");
    }
    wait_until("the device is served again", || ask(&host, &json!({"text": "a"})).0 == 200);
}

fn similarity() {
    let matrix = rows(1, ROWS, WIDTH);
    let setup = Setup::new().plugin("similarity");
    put(&npy(&matrix), &setup.volume().join("rows.npy"));
    let config = format!(
        "[model_settings]\nlocal_model_repository_folder = {:?}\n[model_settings.model_entries.similarity]\nmatrix = \"rows.npy\"\nbatch_config = {{ max_batch_size = 64, wait_ms = 2 }}\ndeployment_config = {{ gpu = \"any\" }}\n",
        setup.volume().display().to_string()
    );
    let begun = Instant::now();
    let host = setup.config(&config).start();
    wait_at_most(LOAD_TIME_MAX, "the matrix is on the device", || host.get("/readyz").0 == 200);
    println!("loaded after {:.1} s", begun.elapsed().as_secs_f64());
    let queries = rows(2, QUERIES, WIDTH);
    let inputs: Vec<Value> = queries.iter().map(|query| json!({"vector": query})).collect();
    let (status, answers) = host.post("/predict_batch", &json!(inputs));
    assert_eq!(status, 200, "{answers}");
    let mut error = 0.0f64;
    for (query, answer) in queries.iter().zip(answers.as_array().expect("a list")) {
        let expected = best(&matrix, query, 10);
        let found = answer["neighbours"].as_array().expect("neighbours");
        assert_eq!(found.len(), expected.len(), "{answer}");
        for (found, (row, score)) in found.iter().zip(expected) {
            let off = ((found["score"].as_f64().expect("a number") - score) / score).abs();
            error = error.max(off);
            assert!(off < 1e-4, "{found}, expected row {row} with {score}");
            assert!(found["row"] == row || off < 1e-5, "{found}, expected row {row} with {score}");
        }
    }
    println!("relative error {error:.1e}");
    let body: &'static str = Box::leak(inputs[0].to_string().into_boxed_str());
    for callers in [1, 64, 256] {
        let query = Requests {
            path: "/predict_sync",
            body,
            statuses: &[200],
            check: |answer| match answer["neighbours"].as_array().map(Vec::len) {
                Some(10) => Ok(0),
                _ => Err(answer.to_string()),
            },
        };
        let (load, begun) = (Load::start(host.address, callers, query), Instant::now());
        std::thread::sleep(LOAD_TIME);
        let served = load.stop();
        let (took, now) = (begun.elapsed().as_secs_f64(), Instant::now());
        served.assert_faultless();
        println!(
            "{callers:>3} callers over HTTP: {:>8.1} queries/s, {:.2} ms median",
            served.right as f64 / took,
            served.percentile(0.5, begun, now)
        );
    }
}
