//! Serves an ONNX model by configuration alone: inputs and outputs by the model's own names, types and shapes.
//!
//! It owns the way from requests to runs of the graph and back, and never knows what a model means, but for what its entry says: pooling, softmax, labels.
//!
//! ```toml
//! [model_settings.model_entries.digits]
//! plugin = "onnx"
//! path = "digits.onnx"     # within local_model_repository_folder
//! labels = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]
//! top_k = 3
//! ```
//!
//! Where the graph has a dimension for them, requests of one shape share a run: each gives one row of each input, `{"pixels": [0, 3, 12, …]}`.
//! Any other model runs its requests one after the other. The same inputs and outputs come and go as tensors, too
//! (`/v2/models/{name}/infer`); where the model classifies, `top_labels` and `top_scores` stand beside its outputs. `docs/onnx.md` has the rest.

mod array;
mod batching;
mod classify;
mod engine;
mod file;
mod finish;
mod json;
mod model;
mod port;
mod signature;

use std::{
    collections::BTreeMap,
    hash::{DefaultHasher, Hash, Hasher},
    num::NonZeroUsize,
    path::{Path, PathBuf},
};

use modalkit_sdk::{
    Device, InferencePipeline, Invalid, LoadContext, Outcome, PipelineError, Signature, Tensor, Tensors,
    VolumeReload, export_pipeline,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use array::Array;
use classify::{Classifier, Label};
use engine::{Kind, RunFault};
use finish::{Finish, Pooling};
use model::Model;
use port::{Arrays, Dim};

/// The keys of a model's entry.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
struct Settings {
    /// The model's file, within the folder of all models' data. Weights in files beside it are found by their names in it.
    #[schemars(extend("x-modalkit-file" = true, "x-modalkit-extensions" = ["onnx"]))]
    path: PathBuf,
    /// What runs the graph: `rten`, in this plugin, or `onnxruntime`, whose library is loaded at run time.
    #[serde(default)]
    engine: Kind,
    /// ONNX Runtime's shared library; without it `ORT_DYLIB_PATH` or the linker's `libonnxruntime.so`.
    #[serde(default)]
    library: Option<PathBuf>,
    /// Threads of each replica that share one run.
    #[serde(default = "one")]
    threads: NonZeroUsize,
    /// Sizes of dimensions that may have any, by their names in the file; of those without a name `INPUT.PLACE`, as in `"x.2"`.
    #[serde(default)]
    dimensions: BTreeMap<String, usize>,
    /// The most that dimensions of any size may have, by their names: larger requests are refused.
    #[serde(default)]
    dimensions_max: BTreeMap<String, usize>,
    /// Arrays of inputs that a request may leave out, as one request would have them: `{ sr = 16000 }`.
    #[serde(default)]
    defaults: BTreeMap<String, Array>,
    /// Whether requests share runs. Left out, that is found out at load.
    #[serde(default)]
    batched: Option<bool>,
    /// The outputs that are computed and answered; all where this is left out.
    #[serde(default)]
    outputs: Option<Vec<String>>,
    /// Makes one vector of a text's tokens' vectors, in the first output that has such; `attention_mask` says which tokens count.
    #[serde(default)]
    pooling: Option<Pooling>,
    /// Divides the pooled vector, or the first output's rows, by their length.
    #[serde(default)]
    normalize: bool,
    /// Makes probabilities of the classifying output's numbers.
    #[serde(default)]
    softmax: bool,
    /// Names of the classes, in the order of the classifying output's last dimension.
    #[serde(default)]
    labels: Option<Vec<String>>,
    /// How many of the best classes are answered; 1 where only `labels` are given.
    #[serde(default)]
    top_k: Option<usize>,
    /// The output that classifies; the first one where this is left out.
    #[serde(default)]
    classify: Option<String>,
}

impl Settings {
    /// What can be told without the file.
    fn check(&self) -> Result<(), PipelineError> {
        let refused = |what: &str| Err(PipelineError::permanent(what));
        let outputs = self.outputs.as_deref().unwrap_or_default();
        if self.outputs.is_some() && outputs.is_empty() {
            return refused("`outputs` is empty; expected the names of some, or no such key for all");
        }
        if outputs.iter().enumerate().any(|(place, name)| outputs[..place].contains(name)) {
            return refused("`outputs` names one twice");
        }
        if self.library.is_some() && self.engine != Kind::OnnxRuntime {
            return refused("`library` is ONNX Runtime's: say `engine = \"onnxruntime\"` as well");
        }
        Ok(())
    }
}

fn one() -> NonZeroUsize {
    NonZeroUsize::MIN
}

/// One request: an array for each of the model's inputs, by name.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(transparent)]
struct Input(BTreeMap<String, Array>);

/// One answer.
#[derive(Debug, Serialize, JsonSchema)]
struct Output {
    /// The best class, where the model classifies.
    #[serde(skip_serializing_if = "Option::is_none")]
    label: Option<String>,
    /// The best classes, the best first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    top: Vec<Label>,
    /// An array for each of the model's outputs, by name.
    outputs: BTreeMap<String, Array>,
}

struct Pipeline {
    path: PathBuf,
    settings: Settings,
    device: Option<Device>,
    loaded: Loaded,
}

/// What of a pipeline is read again when files change.
struct Loaded {
    model: Model,
    finish: Finish,
    classifier: Option<Classifier>,
}

/// Requests that run together, by their places in the batch.
struct Group {
    places: Vec<usize>,
    /// An error where they no longer fit: the model was read again meanwhile.
    inputs: Result<Vec<Array>, PipelineError>,
}

struct GroupOutput {
    places: Vec<usize>,
    outputs: Result<Vec<Array>, PipelineError>,
}

impl Loaded {
    fn read(path: &Path, settings: &Settings, device: Option<&Device>) -> Result<Self, PipelineError> {
        let read = || {
            settings.check()?;
            let model = Model::load(path, settings, device)?;
            let finish = Finish::new(model.item_outputs.clone(), settings)?;
            let classifier = Classifier::new(&finish.outputs, settings)?;
            Ok(Self { model, finish, classifier })
        };
        read().map_err(|error: PipelineError| error.context(format!("the ONNX model {}", path.display())))
    }

    /// Runs a group. Where that fails, each of it by itself: only the engine knows which of them it was.
    fn run(&self, inputs: &[Input], Group { places, inputs: arrays }: Group) -> Vec<GroupOutput> {
        let refused = |said: String| {
            PipelineError::invalid_input(format!(
                "the model can't be run with this input: {}: {said}",
                self.model.engine()
            ))
        };
        let ran = arrays.map_err(RunFault::Engine).and_then(|arrays| self.model.run(arrays));
        let outputs = match ran {
            Ok(outputs) => Ok(outputs),
            Err(RunFault::Engine(error)) => Err(error),
            Err(RunFault::Input(said)) if places.len() == 1 => Err(refused(said)),
            Err(RunFault::Input(_)) => {
                let alone = |place: usize| {
                    let outputs = self.model.join(&[&inputs[place].0]).and_then(|arrays| {
                        self.model.run(arrays).map_err(|fault| match fault {
                            RunFault::Input(said) => refused(said),
                            RunFault::Engine(error) => error,
                        })
                    });
                    GroupOutput { places: vec![place], outputs }
                };
                return places.into_iter().map(alone).collect();
            }
        };
        vec![GroupOutput { places, outputs }]
    }

    fn answer(&self, request: &Input, outputs: Vec<Array>) -> Outcome<Output> {
        let mask = self.model.input_named(&request.0, finish::MASK);
        let outputs = self.finish.apply(mask, outputs)?;
        let classifier = self.classifier.as_ref();
        let top = classifier.map_or(Ok(Vec::new()), |classifier| classifier.best(&outputs))?;
        let names = self.finish.outputs.iter().map(|port| port.name.clone());
        let label = top.first().map(|best| best.label.clone());
        Ok(Output { label, top, outputs: names.zip(outputs).collect() })
    }
}

impl InferencePipeline for Pipeline {
    type Settings = Settings;
    type Input = Input;
    type Output = Output;
    type Preprocessed = Vec<Group>;
    type RawOutput = Vec<GroupOutput>;

    fn load(ctx: LoadContext<Settings>) -> Result<Self, PipelineError> {
        let path = ctx.all_model_data_folder().join(&ctx.settings().path);
        let device = ctx.device().cloned();
        let settings = ctx.into_settings();
        let loaded = Loaded::read(&path, &settings, device.as_ref())?;
        Ok(Self { path, settings, device, loaded })
    }

    fn validate(&self, input: &Input) -> Result<(), Invalid> {
        self.loaded.model.check(&input.0)
    }

    /// Elements along the dimensions that may have any size: tokens, or pixels.
    fn cost(&self, input: &Input) -> u64 {
        let cost = |port: &port::Port| {
            let array = self.loaded.model.of_request(&input.0, port)?;
            let sizes = array.shape.iter().zip(&port.dims);
            Some(
                sizes
                    .filter(|(_, dim)| matches!(dim, Dim::Symbolic(_)))
                    .map(|(size, _)| *size as u64)
                    .product(),
            )
        };
        self.loaded.model.item_inputs.iter().filter_map(cost).max().unwrap_or(1).max(1)
    }

    /// Requests of other shapes would be another run.
    fn shape(&self, input: &Input) -> u64 {
        let ports = &self.loaded.model.item_inputs;
        let is_any = |port: &port::Port| port.dims.iter().any(|dim| matches!(dim, Dim::Symbolic(_)));
        if !self.loaded.model.is_batched() || !ports.iter().any(is_any) {
            return 0;
        }
        let mut hasher = DefaultHasher::new();
        for port in ports {
            self.loaded.model.of_request(&input.0, port).map(|array| &array.shape).hash(&mut hasher);
        }
        hasher.finish()
    }

    fn signature(&self) -> Option<Signature> {
        let Loaded { model, finish, classifier } = &self.loaded;
        let signature = || signature::signature(model, &finish.outputs, classifier.is_some());
        model.is_shaped().then(signature)
    }

    fn input_from_tensors(tensors: Tensors) -> Result<Input, Invalid> {
        signature::arrays(tensors).map(Input)
    }

    fn output_to_tensors(&self, output: Output) -> Result<Vec<Tensor>, PipelineError> {
        signature::tensors(&self.loaded.finish.outputs, self.loaded.classifier.is_some(), output)
    }

    fn preprocess(&self, inputs: &[Input]) -> Result<Vec<Group>, PipelineError> {
        let model = &self.loaded.model;
        let mut groups: Vec<Vec<usize>> = Vec::new();
        for (place, input) in inputs.iter().enumerate() {
            let fits = |group: &&mut Vec<usize>| model.go_together(&inputs[group[0]].0, &input.0);
            match groups.iter_mut().filter(|_| model.is_batched()).find(fits) {
                Some(group) => group.push(place),
                None => groups.push(vec![place]),
            }
        }
        let group = |places: Vec<usize>| {
            let members: Vec<&Arrays> = places.iter().map(|place| &inputs[*place].0).collect();
            Group { inputs: model.join(&members), places }
        };
        Ok(groups.into_iter().map(group).collect())
    }

    fn predict(&self, inputs: &[Input], groups: Vec<Group>) -> Result<Vec<GroupOutput>, PipelineError> {
        Ok(groups.into_iter().flat_map(|group| self.loaded.run(inputs, group)).collect())
    }

    fn postprocess(
        &self,
        inputs: &[Input],
        groups: Vec<GroupOutput>,
    ) -> Result<Vec<Outcome<Output>>, PipelineError> {
        let mut answers: Vec<Option<Outcome<Output>>> = inputs.iter().map(|_| None).collect();
        for GroupOutput { places, outputs } in groups {
            for (row, place) in places.iter().enumerate() {
                let item = match &outputs {
                    Ok(outputs) => self.loaded.model.item(outputs, row, places.len()),
                    Err(error) => Err(error.clone()),
                };
                answers[*place] = Some(item.and_then(|item| self.loaded.answer(&inputs[*place], item)));
            }
        }
        let unanswered = || Err(PipelineError::permanent("no group held this request"));
        Ok(answers.into_iter().map(|answer| answer.unwrap_or_else(unanswered)).collect())
    }

    fn on_volume_reload(&mut self, _reload: &VolumeReload) -> Result<(), PipelineError> {
        self.loaded = Loaded::read(&self.path, &self.settings, self.device.as_ref())?;
        Ok(())
    }
}

export_pipeline!(Pipeline);

#[cfg(test)]
mod tests;
