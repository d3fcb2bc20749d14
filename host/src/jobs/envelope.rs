//! The envelope of an asynchronous request, taken apart by slicing. It never knows what is inside.

use bytes::Bytes;
use serde::Deserialize;
use serde_json::value::RawValue;

/// What `/predict_async` takes, and nothing else.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Envelope<'a> {
    #[serde(borrow)]
    message: &'a RawValue,
    #[serde(default)]
    success_queue: String,
    #[serde(default)]
    failure_queue: String,
    #[serde(borrow, default)]
    meta: Option<&'a RawValue>,
}

/// An envelope's parts.
#[derive(Clone, Debug)]
pub struct Parts {
    /// The model's input.
    pub message: Bytes,
    /// The queue that gets an answer; empty for none.
    pub success_queue: String,
    /// The queue that gets a failure; empty for none.
    pub failure_queue: String,
    /// What the caller wants to see again with the answer.
    pub meta: Option<Bytes>,
}

impl Parts {
    /// Of what is no envelope.
    #[must_use]
    pub fn of_nothing() -> Self {
        Self { message: Bytes::new(), success_queue: String::new(), failure_queue: String::new(), meta: None }
    }

    /// Takes an envelope apart.
    ///
    /// # Errors
    /// It isn't one.
    pub fn of(envelope: &Bytes) -> serde_json::Result<Self> {
        let Envelope { message, success_queue, failure_queue, meta } = serde_json::from_slice(envelope)?;
        let slice = |raw: &RawValue| envelope.slice_ref(raw.get().as_bytes());
        Ok(Self { message: slice(message), success_queue, failure_queue, meta: meta.map(slice) })
    }
}
