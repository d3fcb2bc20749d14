//! What the SDK of ABI 5.0 can do, in one pipeline: settings, secrets, several faults of an input, cost and shape, JSON and tensors, chunks,
//! items that fail, a hook for volumes, and lines in the host's log.

use std::{fs, path::PathBuf, thread, time::Duration};

use modalkit_sdk::{
    Chunks, Datatype, InferencePipeline, Invalid, LoadContext, Outcome, PipelineError, Signature, Tensor,
    Tensors, VolumeReload, export_pipeline,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

#[derive(Deserialize, JsonSchema)]
struct Settings {
    /// A file with a number, which is added to everything.
    #[schemars(extend("x-modalkit-file" = true))]
    offset: PathBuf,
}

#[derive(Deserialize, JsonSchema)]
struct Input {
    values: Vec<f32>,
    #[serde(default)]
    note: String,
}

#[derive(Serialize, JsonSchema)]
struct Output {
    sums: Vec<f32>,
    token_bytes: usize,
}

struct Sums {
    file: PathBuf,
    offset: f32,
    token_bytes: usize,
}

fn read(file: &PathBuf) -> Result<f32, PipelineError> {
    Ok(fs::read_to_string(file)?.trim().parse()?)
}

impl InferencePipeline for Sums {
    type Settings = Settings;
    type Input = Input;
    type Output = Output;
    type Preprocessed = Vec<f32>;
    type RawOutput = Vec<f32>;

    fn load(ctx: LoadContext<Settings>) -> Result<Self, PipelineError> {
        let file = ctx.all_model_data_folder().join(&ctx.settings().offset);
        let token_bytes = ctx.secret("hub-token").map_or(0, str::len);
        tracing::info!(model = ctx.model_name(), devices = ctx.devices().len(), "frozen loads");
        Ok(Self { offset: read(&file)?, file, token_bytes })
    }

    fn validate(&self, input: &Input) -> Result<(), Invalid> {
        let negative = input.values.iter().enumerate().filter(|(_, value)| **value < 0.0);
        Invalid::all(negative.map(|(index, value)| {
            Invalid::new(format!("expected 0 or more, found {value}")).at("values").at(index)
        }))
    }

    fn cost(&self, input: &Input) -> u64 {
        input.values.len() as u64
    }

    fn shape(&self, input: &Input) -> u64 {
        input.values.len() as u64
    }

    fn signature(&self) -> Option<Signature> {
        let signature = Signature::new()
            .input("values", Datatype::Fp32, [-1])
            .optional_input("note", Datatype::Bytes, [1])
            .output("sums", Datatype::Fp32, [-1]);
        Some(signature)
    }

    fn input_from_tensors(mut tensors: Tensors) -> Result<Input, Invalid> {
        let values = tensors.take("values")?.values::<f32>()?.to_vec();
        let note = match tensors.take_optional("note") {
            Some(note) => String::from_utf8_lossy(note.strings()?[0]).into_owned(),
            None => String::new(),
        };
        Ok(Input { values, note })
    }

    fn output_to_tensors(&self, output: Output) -> Result<Vec<Tensor>, PipelineError> {
        Ok(vec![Tensor::new("sums", [output.sums.len()], output.sums)?])
    }

    fn preprocess(&self, inputs: &[Input]) -> Result<Vec<f32>, PipelineError> {
        Ok(vec![self.offset; inputs.len()])
    }

    fn predict(&self, _: &[Input], offsets: Vec<f32>) -> Result<Vec<f32>, PipelineError> {
        Ok(offsets)
    }

    fn postprocess(&self, inputs: &[Input], offsets: Vec<f32>) -> Result<Vec<Outcome<Output>>, PipelineError> {
        self.postprocess_stream(inputs, offsets, &mut Chunks::discarding())
    }

    fn postprocess_stream(
        &self,
        inputs: &[Input],
        offsets: Vec<f32>,
        chunks: &mut Chunks<'_>,
    ) -> Result<Vec<Outcome<Output>>, PipelineError> {
        let mut sums = |item: usize, input: &Input, mut sum: f32| {
            match input.note.as_str() {
                "fail" => return Err(PipelineError::transient("told to fail")),
                "panic" => panic!("told to panic"),
                _ => {}
            }
            let mut sums = Vec::new();
            for value in &input.values {
                sum += value;
                if input.note == "lossy" {
                    chunks.try_send(item, &sum)?;
                } else if chunks.are_wanted(item) {
                    chunks.send(item, &sum)?;
                }
                if input.note == "slow" {
                    thread::sleep(Duration::from_millis(100));
                }
                if chunks.is_abandoned(item) {
                    tracing::info!("frozen stops early");
                    return Err(PipelineError::transient("nobody waits"));
                }
                sums.push(sum);
            }
            Ok(Output { sums, token_bytes: self.token_bytes })
        };
        let items = inputs.iter().zip(offsets).enumerate();
        Ok(items.map(|(item, (input, offset))| sums(item, input, offset)).collect())
    }

    fn warmup(&self) -> Result<(), PipelineError> {
        tracing::info!("frozen warms up");
        Ok(())
    }

    fn on_volume_reload(&mut self, reload: &VolumeReload) -> Result<(), PipelineError> {
        tracing::info!(changed = reload.changed().len(), "frozen reads again");
        self.offset = read(&self.file)?;
        Ok(())
    }
}

export_pipeline!(Sums);
