//! Nearest neighbours over an embedding matrix: one product of the whole matrix with a batch of queries, and the best of each.
//!
//! It owns the way from a request to its neighbours, on the device that the host leased to it or, with `gpu = null`, on all cores.
//! It never knows what a row stands for, but for an optional label.
//!
//! ```toml
//! [model_settings.model_entries.articles]
//! plugin = "similarity"
//! matrix = "articles.npy"            # or .safetensors; within local_model_repository_folder
//! metric = "cosine"
//! labels = "articles.txt"            # a line for each row
//! batch_config = { max_batch_size = 64, wait_ms = 2 }
//! deployment_config = { gpu = "any" }
//! ```
//!
//! `{"vector": [0.12, …], "top_k": 3}` is answered by `{"neighbours": [{"row": 17, "score": 0.93, "label": "…"}, …]}`, the best first;
//! rows with the same score stand in their own order. As tensors, `vector` and `top_k` are answered by `rows`, `scores` and, where there are
//! labels, `labels`. A new matrix in the volume takes the old one's place between two batches.

pub mod cpu;
pub mod gpu;
pub mod matrix;
pub mod top;

use std::path::{Path, PathBuf};

use modalkit_sdk::{
    Datatype, Device, InferencePipeline, Invalid, LoadContext, Outcome, PipelineError, Signature, Tensor,
    Tensors, VolumeReload, export_pipeline,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use matrix::Matrix;
use top::Neighbour;

/// Neighbours that are answered where a request doesn't say how many.
const TOP_K: usize = 10;
/// Queries of the search before the first caller.
const WARMUP_QUERIES: usize = 64;

/// What makes two vectors similar.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// The cosine of the angle between them, from -1 to 1. Rows of zeros have a score of 0.
    #[default]
    Cosine,
    /// Their product.
    Dot,
}

/// The keys of a model's entry.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
pub struct Settings {
    /// The matrix, one row for each thing that may be found: a `.npy` or `.safetensors` file of 16, 32 or 64 bit floats, within the folder
    /// of all models' data.
    #[schemars(extend("x-modalkit-file" = true))]
    matrix: PathBuf,
    /// Which tensor of a `.safetensors` file it is; may be left out where there is one.
    #[serde(default)]
    tensor: Option<String>,
    /// What makes two vectors similar.
    #[serde(default)]
    metric: Metric,
    /// A text file with a line for each row, which is answered with it.
    #[serde(default)]
    #[schemars(extend("x-modalkit-file" = true))]
    labels: Option<PathBuf>,
}

/// One request.
#[derive(Debug, Deserialize, JsonSchema)]
pub struct Input {
    /// As many numbers as the matrix has columns.
    vector: Vec<f32>,
    /// How many neighbours are wanted, from 1 to 100; 10 where this is left out.
    #[serde(default)]
    top_k: Option<usize>,
}

/// One answer.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Output {
    /// The most similar rows, the best first.
    neighbours: Vec<Found>,
}

/// One of them.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Found {
    /// Its number, from 0.
    row: usize,
    /// How similar it is.
    score: f32,
    /// Its label, where there are labels.
    #[serde(skip_serializing_if = "Option::is_none")]
    label: Option<String>,
}

/// Where the product is made.
enum Engine {
    Cpu(cpu::Engine),
    Gpu(Box<gpu::Engine>),
}

/// A matrix that is ready to be searched.
struct Searchable {
    engine: Engine,
    width: usize,
    labels: Option<Vec<String>>,
}

/// The pipeline.
pub struct Similarity {
    settings: Settings,
    folder: PathBuf,
    device: Option<Device>,
    searchable: Searchable,
}

impl Searchable {
    fn read(settings: &Settings, folder: &Path, device: Option<&Device>) -> Result<Self, PipelineError> {
        let path = folder.join(&settings.matrix);
        let mut matrix = Matrix::read(&path, settings.tensor.as_deref())
            .map_err(|error| error.context(format!("the matrix {}", path.display())))?;
        let labels =
            settings.labels.as_ref().map(|file| labels(&folder.join(file), matrix.rows())).transpose()?;
        if settings.metric == Metric::Cosine {
            matrix.normalise();
        }
        let (rows, width) = (matrix.rows(), matrix.width());
        let engine = match device {
            Some(device) => Engine::Gpu(Box::new(gpu::Engine::new(device, &matrix, gpu::SCORES_BYTES_MAX)?)),
            None => Engine::Cpu(cpu::Engine::new(matrix)?),
        };
        let on = device.map_or("the CPU", Device::name);
        tracing::info!(path = %path.display(), rows, width, on, "embedding matrix loaded");
        Ok(Self { engine, width, labels })
    }

    fn search(&self, queries: &[f32], top_k: usize) -> Result<Vec<Vec<Neighbour>>, PipelineError> {
        match &self.engine {
            Engine::Cpu(engine) => Ok(engine.search(queries, top_k)),
            Engine::Gpu(engine) => engine.search(queries, top_k),
        }
    }
}

impl Similarity {
    /// Why an input fits no row: a new matrix may have another width than the one that it was held against.
    fn misfit(&self, input: &Input) -> Option<PipelineError> {
        let (width, found) = (self.searchable.width, input.vector.len());
        (width != found)
            .then(|| PipelineError::invalid_input(format!("expected {width} numbers, found {found}")))
    }
}

fn labels(path: &Path, rows: usize) -> Result<Vec<String>, PipelineError> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| PipelineError::from(error).context(format!("the labels {}", path.display())))?;
    let labels: Vec<String> = text.lines().map(str::to_owned).collect();
    if labels.len() == rows {
        return Ok(labels);
    }
    Err(PipelineError::permanent(format!(
        "{} has {} lines, expected {rows}: one for each row of the matrix",
        path.display(),
        labels.len()
    )))
}

impl InferencePipeline for Similarity {
    type Settings = Settings;
    type Input = Input;
    type Output = Output;
    /// The queries, one after the other.
    type Preprocessed = Vec<f32>;
    type RawOutput = Vec<Vec<Neighbour>>;

    fn load(ctx: LoadContext<Settings>) -> Result<Self, PipelineError> {
        let folder = ctx.all_model_data_folder().to_owned();
        let device = ctx.device().cloned();
        let settings = ctx.into_settings();
        let searchable = Searchable::read(&settings, &folder, device.as_ref())?;
        Ok(Self { settings, folder, device, searchable })
    }

    fn validate(&self, input: &Input) -> Result<(), Invalid> {
        let (width, found) = (self.searchable.width, input.vector.len());
        if found != width {
            return Err(Invalid::new(format!("expected {width} numbers, found {found}")).at("vector"));
        }
        if let Some(place) = input.vector.iter().position(|number| !number.is_finite()) {
            return Err(Invalid::new("expected a number that 32 bits can hold").at("vector").at(place));
        }
        match input.top_k {
            Some(top_k) if !(1..=top::MAX).contains(&top_k) => {
                Err(Invalid::new(format!("expected 1 to {}, found {top_k}", top::MAX)).at("top_k"))
            }
            _ => Ok(()),
        }
    }

    fn signature(&self) -> Option<Signature> {
        let width = i64::try_from(self.searchable.width).ok()?;
        let signature = Signature::new()
            .input("vector", Datatype::Fp32, [width])
            .optional_input("top_k", Datatype::Int64, [1])
            .output("rows", Datatype::Int64, [-1])
            .output("scores", Datatype::Fp32, [-1]);
        Some(match self.searchable.labels {
            Some(_) => signature.output("labels", Datatype::Bytes, [-1]),
            None => signature,
        })
    }

    fn input_from_tensors(mut tensors: Tensors) -> Result<Input, Invalid> {
        let vector = tensors.take("vector")?.values()?.to_vec();
        let top_k = tensors.take_optional("top_k").map(|tensor| {
            let wanted = tensor.values::<i64>()?.first().copied().unwrap_or_default();
            usize::try_from(wanted)
                .map_err(|_| Invalid::new(format!("expected 1 to {}, found {wanted}", top::MAX)).at("top_k"))
        });
        Ok(Input { vector, top_k: top_k.transpose()? })
    }

    fn output_to_tensors(&self, Output { neighbours }: Output) -> Result<Vec<Tensor>, PipelineError> {
        let found = neighbours.len();
        let mut tensors = vec![
            Tensor::new("rows", [found], neighbours.iter().map(|found| found.row as i64).collect())?,
            Tensor::new("scores", [found], neighbours.iter().map(|found| found.score).collect())?,
        ];
        if self.searchable.labels.is_some() {
            let labels = neighbours.iter().map(|found| found.label.as_deref().unwrap_or_default());
            tensors.push(Tensor::of_strings("labels", [found], labels)?);
        }
        Ok(tensors)
    }

    fn preprocess(&self, inputs: &[Input]) -> Result<Vec<f32>, PipelineError> {
        let mut queries = Vec::with_capacity(inputs.len() * self.searchable.width);
        for input in inputs {
            match self.misfit(input) {
                None => queries.extend_from_slice(&input.vector),
                // It has a place and no query; `postprocess` says why.
                Some(_) => queries.resize(queries.len() + self.searchable.width, 0.0),
            }
        }
        if self.settings.metric == Metric::Cosine {
            queries.chunks_exact_mut(self.searchable.width).for_each(matrix::normalise);
        }
        Ok(queries)
    }

    fn predict(&self, inputs: &[Input], queries: Vec<f32>) -> Result<Vec<Vec<Neighbour>>, PipelineError> {
        let top_k = inputs.iter().map(wanted).max().unwrap_or(TOP_K);
        self.searchable.search(&queries, top_k)
    }

    fn postprocess(
        &self,
        inputs: &[Input],
        found: Vec<Vec<Neighbour>>,
    ) -> Result<Vec<Outcome<Output>>, PipelineError> {
        let labels = self.searchable.labels.as_ref();
        let found_by = |neighbour: Neighbour| Found {
            row: neighbour.row,
            score: neighbour.score,
            label: labels.map(|labels| labels[neighbour.row].clone()),
        };
        let answer = |(input, neighbours): (&Input, Vec<Neighbour>)| {
            if let Some(error) = self.misfit(input) {
                return Err(error);
            }
            if let Some(neighbour) = neighbours.iter().find(|neighbour| !neighbour.score.is_finite()) {
                return Err(PipelineError::invalid_input(format!(
                    "its product with row {} is more than 32 bits can hold",
                    neighbour.row
                )));
            }
            Ok(Output { neighbours: neighbours.into_iter().take(wanted(input)).map(found_by).collect() })
        };
        Ok(inputs.iter().zip(found).map(answer).collect())
    }

    /// One search, as large as most: what the device needs for it is taken before the first caller comes.
    fn warmup(&self) -> Result<(), PipelineError> {
        let queries = vec![0.0; WARMUP_QUERIES * self.searchable.width];
        self.searchable.search(&queries, top::MAX).map(drop)
    }

    fn on_volume_reload(&mut self, reload: &VolumeReload) -> Result<(), PipelineError> {
        let own = [Some(&self.settings.matrix), self.settings.labels.as_ref()];
        // Both may be written in more than one way.
        let whole = |path: PathBuf| std::path::absolute(&path).unwrap_or(path);
        let own: Vec<PathBuf> = own.into_iter().flatten().map(|file| whole(self.folder.join(file))).collect();
        let changed = |file: &PathBuf| own.contains(&whole(reload.mount_point().join(file)));
        // Where nobody knows what changed, it may have been these.
        if reload.changed().is_empty() || reload.changed().iter().any(changed) {
            // The old one is there until the new one is, so that a bad file changes nothing.
            self.searchable = Searchable::read(&self.settings, &self.folder, self.device.as_ref())?;
        }
        Ok(())
    }
}

fn wanted(input: &Input) -> usize {
    input.top_k.unwrap_or(TOP_K)
}

export_pipeline!(Similarity);
