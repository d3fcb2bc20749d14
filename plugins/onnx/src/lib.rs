//! Serves an ONNX model by configuration alone: inputs and outputs by the model's own names and shapes.
//!
//! It owns the way from JSON arrays to tensors and back, and never knows what a model means, but for an optional
//! classification: labels and the best few.
//!
//! ```toml
//! [model_settings.model_entries.digits]
//! plugin = "onnx"
//! path = "digits.onnx"     # within local_model_repository_folder
//! labels = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]
//! top_k = 3
//! ```
//!
//! A model whose inputs and outputs all begin with the same symbolic dimension runs whole batches: one request gives one
//! row of each input, `{"pixels": [0, 3, 12, …]}`. Any other model runs its requests one after the other. The same inputs and outputs come
//! and go as tensors, too (`/v2/models/{name}/infer`); where the model classifies, `top_labels` and `top_scores` stand beside its outputs.

mod array;
mod classify;
mod model;
mod signature;
mod tensors;

use std::{collections::BTreeMap, path::PathBuf};

use modalkit_sdk::{
    InferencePipeline, Invalid, LoadContext, Outcome, PipelineError, Signature, Tensor as PlainTensor,
    Tensors, VolumeReload, export_pipeline,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tract_onnx::prelude::{TValue, TVec, Tensor};

use array::Array;
use classify::{Classifier, Label};
use model::Model;

/// The keys of a model's entry.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
struct Settings {
    /// The model's file, within the folder of all models' data.
    #[schemars(extend("x-modalkit-file" = true))]
    path: PathBuf,
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
    model: Model,
    classifier: Option<Classifier>,
}

/// Requests that run together, by their places in the batch.
struct Group {
    places: Vec<usize>,
    inputs: TVec<TValue>,
}

struct GroupOutput {
    places: Vec<usize>,
    outputs: Result<Vec<Tensor>, PipelineError>,
}

impl Pipeline {
    fn read(path: &PathBuf, settings: &Settings) -> Result<(Model, Option<Classifier>), PipelineError> {
        let said = || format!("the ONNX model {}", path.display());
        let bytes = std::fs::read(path).map_err(|error| PipelineError::from(error).context(said()))?;
        let model = Model::load(&bytes).map_err(|error| error.context(said()))?;
        let classifier = Classifier::new(&model, settings).map_err(|error| error.context(said()))?;
        Ok((model, classifier))
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
        let settings = ctx.into_settings();
        let (model, classifier) = Self::read(&path, &settings)?;
        tracing::info!(path = %path.display(), inputs = %model.inputs_text(), outputs = %model.outputs_text(), batched = model.is_batched(), "ONNX model loaded");
        Ok(Self { path, settings, model, classifier })
    }

    fn validate(&self, input: &Input) -> Result<(), Invalid> {
        tensors::check(&self.model, &input.0)
    }

    fn signature(&self) -> Option<Signature> {
        signature::signature(&self.model, self.classifier.as_ref())
    }

    fn input_from_tensors(tensors: Tensors) -> Result<Input, Invalid> {
        signature::arrays(tensors).map(Input)
    }

    fn output_to_tensors(&self, output: Output) -> Result<Vec<PlainTensor>, PipelineError> {
        signature::tensors(&self.model, self.classifier.is_some(), output)
    }

    fn preprocess(&self, inputs: &[Input]) -> Result<Vec<Group>, PipelineError> {
        let mut groups: BTreeMap<Vec<Vec<usize>>, Vec<usize>> = BTreeMap::new();
        for (place, input) in inputs.iter().enumerate() {
            let mut shapes = tensors::shapes(&self.model, &input.0);
            if !self.model.is_batched() {
                // One request a run: the place keeps each apart.
                shapes.push(vec![place]);
            }
            groups.entry(shapes).or_default().push(place);
        }
        groups
            .into_values()
            .map(|places| {
                let members: Vec<_> = places.iter().map(|place| &inputs[*place].0).collect();
                let inputs = tensors::join(&self.model, &members)?;
                Ok(Group { places, inputs })
            })
            .collect()
    }

    fn predict(&self, _inputs: &[Input], groups: Vec<Group>) -> Result<Vec<GroupOutput>, PipelineError> {
        let run = |group: Group| GroupOutput { outputs: self.model.run(group.inputs), places: group.places };
        Ok(groups.into_iter().map(run).collect())
    }

    fn postprocess(
        &self,
        inputs: &[Input],
        groups: Vec<GroupOutput>,
    ) -> Result<Vec<Outcome<Output>>, PipelineError> {
        let mut answers: Vec<Option<Outcome<Output>>> = inputs.iter().map(|_| None).collect();
        for GroupOutput { places, outputs } in groups {
            for (row, place) in places.iter().enumerate() {
                answers[*place] = Some(outputs.as_ref().map_err(Clone::clone).and_then(|outputs| {
                    let outputs = tensors::row(&self.model, outputs, row, places.len())?;
                    let top = self
                        .classifier
                        .as_ref()
                        .map_or(Ok(Vec::new()), |classifier| classifier.best(&outputs))?;
                    Ok(Output { label: top.first().map(|best| best.label.clone()), top, outputs })
                }));
            }
        }
        let unanswered = || Err(PipelineError::permanent("no group held this request"));
        Ok(answers.into_iter().map(|answer| answer.unwrap_or_else(unanswered)).collect())
    }

    fn on_volume_reload(&mut self, _reload: &VolumeReload) -> Result<(), PipelineError> {
        (self.model, self.classifier) = Self::read(&self.path, &self.settings)?;
        Ok(())
    }
}

export_pipeline!(Pipeline);

#[cfg(test)]
mod tests;
