//! `bench models`: what the host adds to a run of a model. The files of other people's packages are served by `plugins/onnx`, and run by its engine alone, in the
//! same rounds; CPU of a request beside CPU of a run.

use std::{fs, path::Path, process::Command};

use anyhow::{Context, bail};

use super::{Options, free_port, median, process::Server, wrk};
use crate::{build, python};

/// The program that runs the engine alone.
const BARE: &str = "bare";
/// Callers of the host.
const CALLERS: usize = 4;

struct Model {
    name: &'static str,
    file: &'static str,
    keys: &'static str,
    inputs: &'static [Input],
}

struct Input {
    name: &'static str,
    datatype: &'static str,
    shape: &'static [usize],
    /// In a request.
    sent: &'static [usize],
    fixed: Option<i64>,
}

const fn floats(name: &'static str, shape: &'static [usize]) -> Input {
    Input { name, datatype: "FP32", shape, sent: shape, fixed: None }
}

const RATE: Input = Input { name: "sr", datatype: "INT64", shape: &[], sent: &[1], fixed: Some(16_000) };
const STATE: Input = Input { sent: &[1, 2, 128], ..floats("state", &[2, 1, 128]) };
const SPEECH: &str = "silero_vad/data/silero_vad";
const OCR: &str = "rapidocr_onnxruntime/models/ch_";

/// The eleven files, from the quickest to the slowest.
const MODELS: [(Model, &str); 11] = [
    (
        Model {
            name: "silero_op15",
            file: "_16k_op15.onnx",
            keys: "dimensions = { sequence = 576 }",
            inputs: &[floats("input", &[1, 576]), STATE, RATE],
        },
        SPEECH,
    ),
    (
        Model {
            name: "silero_half",
            file: "_half.onnx",
            keys: "dimensions = { sequence = 576 }",
            inputs: &[floats("input", &[1, 576]), STATE],
        },
        SPEECH,
    ),
    (
        Model {
            name: "silero_ifless",
            file: "_op18_ifless.onnx",
            keys: "dimensions = { sequence = 576 }",
            inputs: &[floats("input", &[1, 576]), RATE, STATE],
        },
        SPEECH,
    ),
    (
        Model {
            name: "silero",
            file: ".onnx",
            keys: "dimensions = { \"input.1\" = 576 }\ndefaults = { sr = 16000 }",
            inputs: &[floats("input", &[1, 576]), STATE, RATE],
        },
        SPEECH,
    ),
    (
        Model {
            name: "silero_openvino",
            file: "_openvino_16k.onnx",
            keys: "",
            inputs: &[floats("input", &[1, 576]), floats("state", &[2, 1, 128])],
        },
        SPEECH,
    ),
    (
        Model {
            name: "silero_sequence",
            file: "_16k_sequence.onnx",
            keys: "",
            inputs: &[floats("input", &[4, 576]), floats("h", &[1, 1, 128]), floats("c", &[1, 1, 128])],
        },
        SPEECH,
    ),
    (
        Model {
            name: "akiki",
            file: "vad.onnx",
            keys: "",
            inputs: &[floats("audio_with_context", &[1, 576]), floats("h", &[1, 1, 128])],
        },
        "akiki/models/akiki-",
    ),
    (
        Model {
            name: "turned",
            file: "ppocr_mobile_v2.0_cls_infer.onnx",
            keys: "dimensions = { \"x.2\" = 48, \"x.3\" = 192 }",
            inputs: &[floats("x", &[1, 3, 48, 192])],
        },
        OCR,
    ),
    (
        Model {
            name: "magika",
            file: "model.onnx",
            keys: "",
            inputs: &[Input { datatype: "INT32", fixed: Some(7), ..floats("bytes", &[1, 2048]) }],
        },
        "magika/models/standard_v3_3/",
    ),
    (
        Model {
            name: "recognise",
            file: "PP-OCRv4_rec_infer.onnx",
            keys: "dimensions = { \"x.2\" = 48 }",
            inputs: &[floats("x", &[1, 3, 48, 320])],
        },
        OCR,
    ),
    (
        Model {
            name: "detect",
            file: "PP-OCRv4_det_infer.onnx",
            keys: "",
            inputs: &[floats("x", &[1, 3, 320, 320])],
        },
        OCR,
    ),
];

pub(super) fn run(options: &Options) -> anyhow::Result<()> {
    wrk::ensure()?;
    python::ensure()?;
    python::ensure_models()?;
    build::cargo(&["build", "--release", "--package", "modalkit", "--package", "onnx"])?;
    build::cargo(&["build", "--release", "--package", "onnx", "--example", BARE])?;
    let Options { rounds, seconds, .. } = *options;
    println!(
        "\nmodels: one replica, {CALLERS} callers, tensors as bytes; {rounds} rounds of {seconds} s each, in turn with the engine alone; medians"
    );
    println!(
        "{:>16} {:>14} {:>14} {:>8} {:>14} {:>8}",
        "", "engine CPU ms", "host CPU ms", "ratio", "batches of 8", "ratio"
    );
    for (model, folder) in &MODELS {
        let scratch = std::env::temp_dir().join(format!("modalkit-bench-{}", std::process::id()));
        fs::create_dir_all(&scratch)?;
        let measured = measure(model, folder, options, &scratch);
        // Left alone where it can't be removed: it is in the system's folder for such things.
        let _ = fs::remove_dir_all(&scratch);
        measured.with_context(|| model.name)?;
    }
    Ok(())
}

fn measure(model: &Model, folder: &str, options: &Options, scratch: &Path) -> anyhow::Result<()> {
    let file = Path::new(python::MODELS_FOLDER).join(format!("{folder}{}", model.file));
    let (head, bytes) = request(model);
    let (numbers, body) = (scratch.join("numbers"), scratch.join("body"));
    fs::write(&numbers, &bytes)?;
    fs::write(&body, [head.as_bytes(), &bytes].concat())?;
    let hosts = [start(model, &file, 1, scratch)?, start(model, &file, 8, scratch)?];
    let path = format!("/v2/models/{}/infer", model.name);
    let head_bytes = head.len().to_string();
    let (mut bare, mut ours) = (Vec::new(), [Vec::new(), Vec::new()]);
    for _ in 0..options.rounds {
        bare.push(alone(model, &file, options.seconds, &numbers)?);
        for (host, figures) in hosts.iter().zip(&mut ours) {
            let load = wrk::Load {
                port: host.port,
                path: &path,
                concurrency: if host.name == "host" { CALLERS } else { CALLERS * 4 },
                seconds: options.seconds,
                body: &body,
                script: &scratch.join("post.lua"),
                header: Some(("inference-header-content-length", &head_bytes)),
            };
            let before = host.cpu_seconds()?;
            let result = load.run()?;
            if result.failed > 0 || result.requests == 0 {
                bail!("{} of {} requests were not answered with 200", result.failed, result.requests);
            }
            figures.push((host.cpu_seconds()? - before) / result.requests as f64 * 1e3);
        }
    }
    let ratio = |figures: &[f64]| {
        let ratios: Vec<f64> = figures.iter().zip(&bare).map(|(ours, bare)| ours / bare).collect();
        median(&ratios)
    };
    println!(
        "{:>16} {:>14.3} {:>14.3} {:>8.3} {:>14.3} {:>8.3}",
        model.name,
        median(&bare),
        median(&ours[0]),
        ratio(&ours[0]),
        median(&ours[1]),
        ratio(&ours[1])
    );
    Ok(())
}

/// CPU milliseconds of a run of the engine by itself.
fn alone(model: &Model, file: &Path, seconds: usize, numbers: &Path) -> anyhow::Result<f64> {
    let mut command = Command::new(build::release().join("examples").join(BARE));
    command.arg(file).arg(seconds.to_string()).arg(numbers);
    for input in model.inputs {
        let kind = match input.datatype {
            "FP32" => "f32",
            "INT64" => "i64",
            _ => "i32",
        };
        let sizes: Vec<String> = input.shape.iter().map(usize::to_string).collect();
        command.arg(format!("{}:{kind}:{}", input.name, sizes.join(",")));
    }
    let output = command.output().context("can't start the engine alone")?;
    let said = String::from_utf8_lossy(&output.stdout);
    let numbers: Vec<f64> = said.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    let [runs, cpu_seconds] = numbers[..] else {
        bail!("the engine alone: {said}{}", String::from_utf8_lossy(&output.stderr))
    };
    Ok(cpu_seconds / runs * 1e3)
}

fn start(model: &Model, file: &Path, batch: usize, scratch: &Path) -> anyhow::Result<Server> {
    let name = if batch == 1 { "host" } else { "host in batches" };
    let volume = scratch.join(format!("volume-{batch}"));
    fs::create_dir_all(&volume)?;
    fs::copy(build::release().join("libonnx.so"), volume.join("onnx.so"))?;
    fs::copy(file, volume.join("model.onnx"))?;
    let (config, state, port) =
        (scratch.join(format!("host-{batch}.toml")), scratch.join(format!("state-{batch}")), free_port()?);
    fs::write(
        &config,
        format!(
            "[server]\nlisten = \"127.0.0.1:{port}\"\nlog = \"warn\"\nstate_folder = {state:?}\n\
             [app_settings.batch_config]\nmax_batch_size = {batch}\n\
             [app_settings.deployment_config.volumes]\n{volume:?} = \"bench\"\n\
             [model_settings]\nlocal_model_repository_folder = {volume:?}\n\
             [model_settings.model_entries.{}]\nplugin = \"onnx\"\npath = \"model.onnx\"\n{}\n",
            model.name, model.keys
        ),
    )?;
    let host = Server::start(
        name,
        Command::new(build::release().join("modalkit")).arg("--config").arg(&config),
        port,
    )?;
    host.wait_until_ready()?;
    Ok(host)
}

/// A request's JSON, and the bytes behind it.
fn request(model: &Model) -> (String, Vec<u8>) {
    let (mut inputs, mut bytes) = (Vec::new(), Vec::new());
    for input in model.inputs {
        let count: usize = input.shape.iter().product();
        let begin = bytes.len();
        for place in 0..count {
            match (input.datatype, input.fixed) {
                ("INT64", fixed) => bytes.extend(fixed.unwrap_or_default().to_le_bytes()),
                ("INT32", fixed) => bytes.extend((fixed.unwrap_or_default() as i32).to_le_bytes()),
                _ => bytes.extend(((place % 97) as f32 / 97.0).to_le_bytes()),
            }
        }
        inputs.push(format!(
            r#"{{"name":"{}","datatype":"{}","shape":{:?},"parameters":{{"binary_data_size":{}}}}}"#,
            input.name,
            input.datatype,
            input.sent,
            bytes.len() - begin
        ));
    }
    (format!(r#"{{"inputs":[{}],"parameters":{{"binary_data_output":true}}}}"#, inputs.join(",")), bytes)
}
