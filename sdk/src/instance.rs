//! A loaded pipeline and a batch on its way through the stages: what the exported functions and the test kit share.

use std::{path::PathBuf, sync::Arc};

use modalkit_abi::LoadArgs;
use parking_lot::{ArcRwLockReadGuard, RawRwLock, RwLock};

use crate::{
    Device, InferencePipeline, Invalid, LoadContext, Outcome, PipelineError, VolumeReload,
    context::{Secrets, parse_settings},
    object, strict,
};

/// One `load()`. The lock gives `on_volume_reload` the pipeline to itself, between batches. It knows no poisoning: a
/// pipeline whose hook panicked goes on serving, as the trait says.
pub(crate) struct Instance<P> {
    pub(crate) model: Arc<str>,
    pipeline: Arc<RwLock<P>>,
}

/// Why an input did not become an item.
pub(crate) enum Refusal {
    Malformed(serde_json::Error),
    Invalid(Invalid),
    Busy,
}

impl<P: InferencePipeline> Instance<P> {
    pub(crate) fn load(args: &LoadArgs<'_>) -> Result<Self, PipelineError> {
        let context = LoadContext {
            model_name: args.model_name.to_string(),
            all_model_data_folder: PathBuf::from(args.all_model_data_folder.as_str()),
            common_settings: serde_json::from_str(&args.common_settings)
                .map_err(|error| PipelineError::permanent(error).context("`common` is no JSON"))?,
            settings: parse_settings(&args.settings)?,
            secrets: Secrets(
                args.secrets.iter().map(|secret| (secret.name.into(), secret.value.into())).collect(),
            ),
            devices: args.devices.iter().map(Device::of).collect(),
        };
        Ok(Self {
            model: args.model_name.as_str().into(),
            pipeline: Arc::new(RwLock::new(P::load(context)?)),
        })
    }

    pub(crate) fn warmup(&self) -> Result<(), PipelineError> {
        self.pipeline.read().warmup()
    }

    pub(crate) fn volume_reload(&self, reload: &VolumeReload) -> Result<(), PipelineError> {
        self.pipeline.write().on_volume_reload(reload)
    }

    /// Validates without waiting: the caller may be one of the host's network threads.
    pub(crate) fn try_validate(&self, input: &P::Input) -> Result<(), Refusal> {
        self.pipeline.try_read().ok_or(Refusal::Busy)?.validate(input).map_err(Refusal::Invalid)
    }

    pub(crate) fn validate(&self, input: &P::Input) -> Result<(), Refusal> {
        self.pipeline.read().validate(input).map_err(Refusal::Invalid)
    }

    pub(crate) fn begin(&self, inputs: Vec<P::Input>) -> Batch<P> {
        Batch {
            model: Arc::clone(&self.model),
            pipeline: self.pipeline.read_arc(),
            inputs,
            progress: Progress::Begun,
        }
    }
}

/// Parses one input.
pub(crate) fn parse<P: InferencePipeline>(json: &[u8]) -> Result<P::Input, Refusal> {
    strict::from_slice(json).map_err(Refusal::Malformed)
}

/// The inputs of one batch, what the last finished stage left, and the hold that keeps the pipeline as it is.
pub(crate) struct Batch<P: InferencePipeline> {
    pub(crate) model: Arc<str>,
    pipeline: ArcRwLockReadGuard<RawRwLock, P>,
    inputs: Vec<P::Input>,
    progress: Progress<P>,
}

enum Progress<P: InferencePipeline> {
    Begun,
    Preprocessed(P::Preprocessed),
    Predicted(P::RawOutput),
    /// Answered, or a stage failed.
    Over,
}

impl<P: InferencePipeline> Batch<P> {
    pub(crate) fn preprocess(&mut self) -> Result<(), PipelineError> {
        let Progress::Begun = self.advance() else { return Err(out_of_order("preprocess")) };
        self.progress = Progress::Preprocessed(self.pipeline.preprocess(&self.inputs)?);
        Ok(())
    }

    pub(crate) fn predict(&mut self) -> Result<(), PipelineError> {
        let Progress::Preprocessed(preprocessed) = self.advance() else {
            return Err(out_of_order("predict"));
        };
        self.progress = Progress::Predicted(self.pipeline.predict(&self.inputs, preprocessed)?);
        Ok(())
    }

    /// The typed outcomes, as many as there were inputs.
    pub(crate) fn postprocess(&mut self) -> Result<Vec<Outcome<P::Output>>, PipelineError> {
        let Progress::Predicted(raw) = self.advance() else { return Err(out_of_order("postprocess")) };
        let outcomes = self.pipeline.postprocess(&self.inputs, raw)?;
        let (expected, found) = (self.inputs.len(), outcomes.len());
        if expected == found {
            return Ok(outcomes);
        }
        Err(PipelineError::permanent(format!(
            "postprocess must return one outcome for each input, in order: expected {expected}, found {found}"
        )))
    }

    fn advance(&mut self) -> Progress<P> {
        std::mem::replace(&mut self.progress, Progress::Over)
    }
}

/// Writes outcomes as they leave the plugin. An output that is refused is its item's error, not the batch's.
pub(crate) fn render<T: serde::Serialize>(
    outcomes: Vec<Outcome<T>>,
) -> impl ExactSizeIterator<Item = Outcome<Vec<u8>>> {
    outcomes.into_iter().map(|outcome| object::to_json(&outcome?))
}

fn out_of_order(stage: &str) -> PipelineError {
    PipelineError::permanent(format!("{stage} was called out of order, or after a stage had failed"))
}

impl Refusal {
    /// The same, as an error of the item.
    pub(crate) fn into_error(self) -> PipelineError {
        let message = match self {
            Self::Malformed(error) => error.to_string(),
            Self::Invalid(invalid) => invalid.to_string(),
            Self::Busy => return PipelineError::transient("the pipeline is changing"),
        };
        PipelineError::invalid_input(message)
    }
}
