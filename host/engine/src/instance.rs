//! A loaded pipeline and what goes through it: inputs, batches, outcomes.

use std::{any::Any, sync::Arc};

use bytes::Bytes;

use crate::{Failure, FailureKind, Rejection, Signature, Tensor};

/// What goes into a pipeline and comes out of it: outputs are of the inputs' form. A clone shares the bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Payload {
    /// A JSON text. As an output it is an object.
    Json(Bytes),
    /// Tensors, without the dimension of the batch.
    Tensors(Arc<[Tensor]>),
}

impl Payload {
    /// The JSON text, where it is one.
    #[must_use]
    pub fn json(&self) -> Option<&Bytes> {
        match self {
            Self::Json(json) => Some(json),
            Self::Tensors(_) => None,
        }
    }

    /// The output to an input that was a JSON text.
    ///
    /// # Errors
    /// The plugin has mixed them up.
    pub fn into_json(self) -> Result<Bytes, Failure> {
        match self {
            Self::Json(json) => Ok(json),
            Self::Tensors(_) => Err(mixed_up("JSON", "tensors")),
        }
    }

    /// The output to an input of tensors.
    ///
    /// # Errors
    /// The plugin has mixed them up.
    pub fn into_tensors(self) -> Result<Arc<[Tensor]>, Failure> {
        match self {
            Self::Tensors(tensors) => Ok(tensors),
            Self::Json(_) => Err(mixed_up("tensors", "JSON")),
        }
    }
}

fn mixed_up(expected: &str, found: &str) -> Failure {
    let message = format!("the plugin gave {found} for an input that was {expected}");
    Failure { kind: FailureKind::Permanent, message }
}

/// What became of one item: its output, or why there is none.
pub type Outcome = Result<Payload, Failure>;

/// How much work an input is, and what it can be batched with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Measure {
    /// How much work, in a unit of the pipeline's own; 1 where it doesn't say.
    pub cost: u64,
    /// Inputs with the same key fit into one batch without padding; 0 where the pipeline doesn't say.
    pub shape: u64,
}

/// A decoded input, in the form of its engine.
pub trait Input: Any + Send {}

/// An input that was decoded by a plugin, and can be run by any instance of it.
pub struct Decoded {
    /// The input.
    pub input: Box<dyn Input>,
    /// By the instance that has validated it.
    pub measure: Measure,
    /// Whether an instance has validated it.
    pub is_validated: bool,
}

/// Inputs that another plugin decoded, which this one can't run.
#[derive(Debug)]
pub struct Foreign;

/// A loaded pipeline; dropped, it is gone with its memory and its device.
pub trait Instance: Any + Send + Sync {
    /// The tensors that the pipeline takes and gives, as it is loaded now; `None` where it takes none.
    fn signature(&self) -> Option<Arc<Signature>>;

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

    /// Validates and measures an input that was decoded without an instance, and waits where the pipeline is changing.
    ///
    /// # Errors
    /// Why the pipeline turns it down.
    ///
    /// # Panics
    /// Where the input is not this plugin's; ask [`Instance::owns`] first.
    fn validate(&self, decoded: &Decoded) -> Result<Measure, Rejection>;

    /// Makes a batch of inputs, in order; waits where the pipeline is changing.
    ///
    /// # Errors
    /// [`Foreign`] where one of them is another plugin's; all are dropped then.
    fn begin(&self, inputs: Vec<Decoded>) -> Result<Box<dyn Batch + '_>, Foreign>;
}

/// What an item's caller wants to have of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interest {
    /// The outcome and nothing before it.
    Outcome,
    /// Chunks as they come, then the outcome.
    Chunks,
    /// Nothing any more: nobody waits.
    Nothing,
}

/// What became of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChunkResult {
    /// It goes to the caller, or to nobody where the caller wants none.
    Taken,
    /// The caller's queue is full: it was not taken.
    Full,
    /// Nobody wants anything of this item any more: it was not taken.
    Unwanted,
}

/// Takes what comes of a batch's items, which are named by their place in it, from 0: any number of chunks, then one outcome. Which items there are,
/// and how often one ends, is the plugin's word: compare.
pub trait EventSink: Send {
    /// What the item's caller wants to have now; nothing of what is no item, or has ended.
    fn interest(&mut self, item: usize) -> Interest;

    /// A part of the item's output before its end: a JSON value. With `waits`, it is waited for a caller whose queue is full, within limits, and the
    /// result is never [`ChunkResult::Full`].
    fn chunk(&mut self, item: usize, json: &[u8], waits: bool) -> ChunkResult;

    /// The item's outcome.
    fn end(&mut self, item: usize, outcome: Outcome);
}

/// Inputs on their way through the stages, which are called in order and once each, on any thread.
pub trait Batch: Send {
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

    /// Third stage: gives one outcome an input, and chunks before it where the pipeline has any.
    ///
    /// # Errors
    /// What the pipeline said of the whole batch; it is over then.
    fn postprocess(&mut self, events: &mut dyn EventSink) -> Result<(), Failure>;
}
