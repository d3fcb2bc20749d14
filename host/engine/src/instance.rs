//! A loaded pipeline and what goes through it: inputs, batches, outcomes.

use std::{any::Any, sync::Arc, time::Duration};

use bytes::Bytes;

use crate::{Failure, FailureKind, Outgoing, Rejection, Signature, Tensor};

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
    /// How far it was looked at.
    pub checked: Checked,
}

/// How far an input was looked at before its batch runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Checked {
    /// Not at all: the plugin is elsewhere, and says with the batch what is wrong with an input, by [`EventSink::reject`].
    Nothing,
    /// Not to the end: the process that looked at it died of that, or of something beside it.
    Suspect,
    /// It is an input; no instance has validated it.
    Parsed,
    /// An instance has validated and measured it.
    Validated,
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

    /// Validates and measures inputs of which that is still to be done, and waits where the pipeline is changing. One result each, in order: why the
    /// pipeline turns it down, where it does.
    ///
    /// # Panics
    /// Where an input is not this plugin's; ask [`Instance::owns`] first.
    fn validate(&self, inputs: &[&Decoded]) -> Vec<Result<Measure, Rejection>>;

    /// Makes a batch of inputs, in order; waits where the pipeline is changing.
    ///
    /// # Errors
    /// [`Foreign`] where one of them is another plugin's; all are dropped then.
    fn begin(&self, inputs: Vec<Decoded>) -> Result<Box<dyn Batch + '_>, Foreign>;

    /// Sends messages to a queue by the pipeline's own code, where it has any for that. One result each, in order: what isn't said to be sent may have been
    /// sent all the same.
    fn send(&self, _queue: &str, messages: &[Outgoing<'_>]) -> Vec<Result<(), Failure>> {
        let message = "the model's pipeline has no queue backend of its own";
        let none = || Err(Failure { kind: FailureKind::Transient, message: message.to_owned() });
        messages.iter().map(|_| none()).collect()
    }

    /// The process that it runs in, where that is one of its own.
    fn process(&self) -> Option<&dyn Process> {
        None
    }
}

/// A process that an instance has for itself, which may end before the instance is dropped.
pub trait Process: Send + Sync {
    /// How it ended, where it has: every call fails from then on.
    fn death(&self) -> Option<Death>;

    /// Ends it, and all that it has started, for this reason, which lies with it or with the host. Calls that run return soon.
    fn kill(&self, why: &str, by: EndedBy);

    /// Waits until it has ended, at most so long.
    fn wait(&self, time: Duration) -> Option<Death>;

    /// Keeps from it, until what comes back is dropped, all that isn't a batch: inputs that are checked, and hooks.
    fn keep_to_batches(&self) -> Box<dyn Kept + '_>;

    /// Bytes of memory that it holds now; `None` where nobody knows.
    fn resident_bytes(&self) -> Option<u64>;
}

/// Something that is held until it is dropped.
pub trait Kept {}

/// How a process ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Death {
    /// What happened, for people: the signal or exit code, and in which stage, where that is known.
    pub how: String,
    /// Who ended it, as far as can be told.
    pub by: EndedBy,
}

/// Who ended a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndedBy {
    /// Its own code, or what that used up.
    Itself,
    /// The host, by [`Process::kill`].
    Host,
    /// A signal that others send.
    Others,
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

    /// In place of an outcome: the item is no input that the pipeline takes, as turned out when its batch began.
    fn reject(&mut self, item: usize, rejection: Rejection);
}

/// What a batch took elsewhere.
#[derive(Clone, Copy, Debug)]
pub struct Measured {
    /// How long each stage took.
    pub stages: [Duration; 3],
    /// The costs of its inputs together.
    pub cost: u64,
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

    /// What the stages took, where they don't run within the calls of their names. Asked after the last of them.
    fn measured(&self) -> Option<Measured> {
        None
    }
}
