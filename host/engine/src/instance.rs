//! A loaded pipeline and what goes through it: inputs, batches, outcomes.

use std::any::Any;

use bytes::Bytes;

use crate::{Failure, Rejection};

/// What goes into a pipeline and comes out of it. A clone shares the bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Payload {
    /// A JSON text. As an output it is an object.
    Json(Bytes),
}

impl Payload {
    /// The payload as a JSON text.
    #[must_use]
    pub fn json(&self) -> &Bytes {
        let Self::Json(json) = self;
        json
    }
}

/// What became of one item: its output, or why there is none.
pub type Outcome = Result<Payload, Failure>;

/// A decoded input, in the form of its engine.
pub trait Input: Any + Send {}

/// An input that was decoded by a plugin, and can be run by any instance of it.
pub struct Decoded {
    /// The input.
    pub input: Box<dyn Input>,
    /// Whether an instance has validated it.
    pub is_validated: bool,
}

/// Inputs that another plugin decoded, which this one can't run.
#[derive(Debug)]
pub struct Foreign;

/// A loaded pipeline; dropped, it is gone with its memory and its device.
pub trait Instance: Any + Send + Sync {
    /// Runs the pipeline's `on_volume_reload`: waits for batches under way, and batches wait for it.
    ///
    /// `changed`: files relative to the mount point; none where nobody knows which.
    ///
    /// # Errors
    /// What the hook said.
    fn volume_reload(&self, volume: &str, mount_point: &str, changed: &[String]) -> Result<(), Failure>;

    /// Parses and validates one input.
    ///
    /// # Errors
    /// Why the input isn't one; [`Rejection::Busy`] where the instance can't look at it now.
    fn decode(&self, payload: &Payload) -> Result<Decoded, Rejection>;

    /// Whether this instance can run the input.
    fn owns(&self, decoded: &Decoded) -> bool;

    /// Validates an input that was decoded without an instance, and waits where the pipeline is changing.
    ///
    /// # Errors
    /// Why the pipeline turns it down.
    ///
    /// # Panics
    /// Where the input is not this plugin's; ask [`Instance::owns`] first.
    fn validate(&self, decoded: &Decoded) -> Result<(), Rejection>;

    /// Makes a batch of inputs, in order; waits where the pipeline is changing.
    ///
    /// # Errors
    /// [`Foreign`] where one of them is another plugin's; all are dropped then.
    fn begin(&self, inputs: Vec<Decoded>) -> Result<Box<dyn Batch + '_>, Foreign>;
}

/// Inputs on their way through the stages, which are called in order and once each. It stays on the thread that began it.
pub trait Batch {
    /// First stage.
    ///
    /// # Errors
    /// What the pipeline said; the batch is over then.
    fn preprocess(&mut self) -> Result<(), Failure>;

    /// Second stage.
    ///
    /// # Errors
    /// What the pipeline said; the batch is over then.
    fn predict(&mut self) -> Result<(), Failure>;

    /// Third stage: one outcome an input, in order. How many there are is the plugin's word: compare.
    ///
    /// # Errors
    /// What the pipeline said of the whole batch; it is over then.
    fn postprocess(&mut self) -> Result<Vec<Outcome>, Failure>;
}
