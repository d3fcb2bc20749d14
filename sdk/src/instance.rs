//! A loaded pipeline and a batch on its way through the stages: what the exported functions and the test kit share.

use std::{path::PathBuf, sync::Arc};

use modalkit_abi::Measure;
use parking_lot::{ArcRwLockReadGuard, RawRwLock, RwLock};

use crate::{
    Chunks, InferencePipeline, Invalid, LoadContext, Outcome, PipelineError, Signature, Tensor, Tensors,
    VolumeReload,
    context::{Secrets, parse_settings},
    document, object, strict,
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
    /// Loads a pipeline with what the host's document says.
    pub(crate) fn load(given: document::Load<'_>) -> Result<Self, PipelineError> {
        let model: Arc<str> = given.model_name.as_str().into();
        let context = LoadContext {
            model_name: given.model_name,
            all_model_data_folder: PathBuf::from(given.all_model_data_folder),
            common_settings: serde_json::from_str(given.common_settings.get())
                .map_err(|error| PipelineError::permanent(error).context("`common` is no JSON"))?,
            settings: parse_settings(given.settings.get())?,
            secrets: Secrets(given.secrets),
            devices: given.devices,
        };
        Ok(Self { model, pipeline: Arc::new(RwLock::new(P::load(context)?)) })
    }

    pub(crate) fn warmup(&self) -> Result<(), PipelineError> {
        self.pipeline.read().warmup()
    }

    pub(crate) fn signature(&self) -> Option<Signature> {
        self.pipeline.read().signature()
    }

    pub(crate) fn volume_reload(&self, reload: &VolumeReload) -> Result<(), PipelineError> {
        self.pipeline.write().on_volume_reload(reload)
    }

    /// Validates and measures without waiting: the caller may be one of the host's network threads.
    pub(crate) fn try_validate(&self, item: &Item<P>) -> Result<Measure, Refusal> {
        examine(&*self.pipeline.try_read().ok_or(Refusal::Busy)?, &item.input)
    }

    pub(crate) fn validate(&self, item: &Item<P>) -> Result<Measure, Refusal> {
        examine(&*self.pipeline.read(), &item.input)
    }

    pub(crate) fn begin(&self, items: impl ExactSizeIterator<Item = Item<P>>) -> Batch<P> {
        let (mut inputs, mut of_tensors) = (Vec::with_capacity(items.len()), Vec::new());
        for (place, item) in items.enumerate() {
            if item.is_of_tensors {
                of_tensors.push(place);
            }
            inputs.push(item.input);
        }
        Batch {
            model: Arc::clone(&self.model),
            pipeline: self.pipeline.read_arc(),
            inputs,
            of_tensors,
            progress: Progress::Begun,
        }
    }
}

fn examine<P: InferencePipeline>(pipeline: &P, input: &P::Input) -> Result<Measure, Refusal> {
    pipeline.validate(input).map_err(Refusal::Invalid)?;
    Ok(Measure { cost: pipeline.cost(input), shape: pipeline.shape(input) })
}

/// One input, and what its output is to be.
pub(crate) struct Item<P: InferencePipeline> {
    pub(crate) input: P::Input,
    /// It was made of tensors, so that tensors are made of its output.
    pub(crate) is_of_tensors: bool,
}

impl<P: InferencePipeline> Item<P> {
    /// Parses one input.
    pub(crate) fn parse(json: &[u8]) -> Result<Self, Refusal> {
        Ok(Self { input: strict::from_slice(json).map_err(Refusal::Malformed)?, is_of_tensors: false })
    }

    /// Makes one input of tensors.
    pub(crate) fn of_tensors(tensors: Tensors) -> Result<Self, Refusal> {
        Ok(Self { input: P::input_from_tensors(tensors).map_err(Refusal::Invalid)?, is_of_tensors: true })
    }
}

/// An output as it leaves the plugin.
pub(crate) enum Rendered {
    Json(Vec<u8>),
    Tensors(Vec<Tensor>),
}

/// The inputs of one batch, what the last finished stage left, and the hold that keeps the pipeline as it is.
pub(crate) struct Batch<P: InferencePipeline> {
    pub(crate) model: Arc<str>,
    pipeline: ArcRwLockReadGuard<RawRwLock, P>,
    inputs: Vec<P::Input>,
    /// The places of those that were made of tensors, in order.
    of_tensors: Vec<usize>,
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
    pub(crate) fn postprocess(
        &mut self,
        chunks: &mut Chunks<'_>,
    ) -> Result<Vec<Outcome<P::Output>>, PipelineError> {
        let Progress::Predicted(raw) = self.advance() else { return Err(out_of_order("postprocess")) };
        let outcomes = self.pipeline.postprocess_stream(&self.inputs, raw, chunks)?;
        let (expected, found) = (self.inputs.len(), outcomes.len());
        if expected == found {
            return Ok(outcomes);
        }
        Err(PipelineError::permanent(format!(
            "postprocess must return one outcome for each input, in order: expected {expected}, found {found}"
        )))
    }

    /// Writes an item's outcome as it leaves the plugin. An output that is refused is its item's error, not the batch's.
    pub(crate) fn render(&self, place: usize, outcome: Outcome<P::Output>) -> Outcome<Rendered> {
        let output = outcome?;
        if self.of_tensors.binary_search(&place).is_ok() {
            return self.pipeline.output_to_tensors(output).map(Rendered::Tensors);
        }
        object::to_json(&output).map(Rendered::Json)
    }

    fn advance(&mut self) -> Progress<P> {
        std::mem::replace(&mut self.progress, Progress::Over)
    }
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
