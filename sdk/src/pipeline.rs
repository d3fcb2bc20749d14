//! The trait that a pipeline implements.

use schemars::JsonSchema;
use serde::{Serialize, de::DeserializeOwned};

use crate::{Invalid, LoadContext, PipelineError, VolumeReload};

/// What became of one item of a batch. An `Err` fails this item alone; its neighbours are answered.
///
/// ```
/// use modalkit_sdk::{Outcome, PipelineError};
///
/// fn divide(a: i64, b: i64) -> Outcome<i64> {
///     a.checked_div(b).ok_or_else(|| PipelineError::invalid_input("expected a divisor other than 0, found 0"))
/// }
///
/// let outcomes: Vec<_> = [(6, 3), (1, 0)].into_iter().map(|(a, b)| divide(a, b)).collect();
/// assert_eq!(outcomes[0], Ok(2));
/// assert!(outcomes[1].is_err());
/// ```
pub type Outcome<T> = Result<T, PipelineError>;

/// A model behind three stages: `preprocess`, `predict`, `postprocess`.
///
/// The host calls `load` once for each replica, then runs batches through the stages. Inputs were parsed and
/// validated before; every stage sees the whole batch, in the order in which it has to be answered. A panic in a stage
/// fails that batch and nothing else.
///
/// The crate's front page has a whole example.
pub trait InferencePipeline: Send + Sync + Sized + 'static {
    /// The pipeline's own keys of the model's entry in the configuration; [`crate::NoSettings`] where it has none.
    /// A key that it doesn't know is an error at load.
    type Settings: DeserializeOwned;
    /// One request. Its JSON Schema explains to callers what was wrong with theirs.
    type Input: DeserializeOwned + JsonSchema + Send + Sync + 'static;
    /// One answer: a JSON object, without members named `status`, `error` or `meta`, which the host adds.
    type Output: Serialize + JsonSchema;
    /// What `preprocess` hands to `predict`: tensors, token ids.
    type Preprocessed: Send + 'static;
    /// What `predict` hands to `postprocess`.
    type RawOutput: Send + 'static;

    /// Reads weights, builds the model. Runs on the replica's own thread and may take its time.
    ///
    /// # Errors
    /// Whatever keeps the pipeline from serving; the host shows it and doesn't serve the model.
    fn load(ctx: LoadContext<Self::Settings>) -> Result<Self, PipelineError>;

    /// Looks at one parsed input before it is queued; what it refuses gets a 422 and never takes a slot in a batch.
    ///
    /// It may run on the host's network threads: check shapes and ranges here, and leave real work to `preprocess`.
    ///
    /// # Errors
    /// What is wrong with the input, and where.
    fn validate(&self, input: &Self::Input) -> Result<(), Invalid> {
        let _ = input;
        Ok(())
    }

    /// Prepares a batch for the model.
    ///
    /// # Errors
    /// Fails the whole batch. To fail one item, carry its error through to `postprocess`.
    fn preprocess(&self, inputs: &[Self::Input]) -> Result<Self::Preprocessed, PipelineError>;

    /// Runs the model.
    ///
    /// # Errors
    /// Fails the whole batch.
    fn predict(
        &self,
        inputs: &[Self::Input],
        preprocessed: Self::Preprocessed,
    ) -> Result<Self::RawOutput, PipelineError>;

    /// Turns the model's output into answers: exactly one for each input, in the inputs' order.
    ///
    /// # Errors
    /// Fails the whole batch; an `Err` inside the list fails that item alone.
    fn postprocess(
        &self,
        inputs: &[Self::Input],
        raw_output: Self::RawOutput,
    ) -> Result<Vec<Outcome<Self::Output>>, PipelineError>;

    /// Runs once after `load`, before the replica takes work: the place for a first slow run.
    ///
    /// # Errors
    /// Keeps the replica from serving, as an error of `load` does.
    fn warmup(&self) -> Result<(), PipelineError> {
        Ok(())
    }

    /// Called when files of a volume changed and the plugin itself did not, between batches.
    ///
    /// # Errors
    /// Is logged; the pipeline goes on serving as it is.
    fn on_volume_reload(&mut self, reload: &VolumeReload) -> Result<(), PipelineError> {
        let _ = reload;
        Ok(())
    }
}
