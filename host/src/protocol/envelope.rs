//! The envelope of an asynchronous request, taken apart by slicing, and the messages that its result goes in. It never knows what is inside.

use std::{borrow::Cow, fmt, sync::OnceLock};

use bytes::{Buf, Bytes};
use jsonschema::Validator;
use schemars::{JsonSchema, schema_for};
use serde::{Deserialize, Serialize, de::Error};
use serde_json::{Map, Value, value::RawValue};

use super::{
    answer::Answer,
    json::{object, raw_json},
};

/// What `/predict_async` takes, and nothing else. Its schema comes from here as well.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Members<'a> {
    #[serde(borrow)]
    #[schemars(with = "Value")]
    message: &'a RawValue,
    #[serde(default)]
    success_queue: String,
    #[serde(default)]
    failure_queue: String,
    #[serde(borrow, default)]
    #[schemars(with = "Map<String, Value>")]
    meta: Option<&'a RawValue>,
}

/// An envelope, taken apart.
#[derive(Clone, Debug)]
pub struct Envelope {
    /// The model's input.
    pub message: Bytes,
    /// The queue that gets an answer; empty for none.
    pub success_queue: String,
    /// The queue that gets a failure; empty for none.
    pub failure_queue: String,
    /// What the caller wants to see again with the answer.
    pub meta: Option<Bytes>,
}

impl Envelope {
    /// Of what is no envelope.
    #[must_use]
    pub fn of_nothing() -> Self {
        Self { message: Bytes::new(), success_queue: String::new(), failure_queue: String::new(), meta: None }
    }

    /// Takes an envelope apart.
    ///
    /// # Errors
    /// `serde_json::Error` where the bytes are no envelope object; what its `meta` is, isn't looked at. A list is refused: serde would
    /// take its elements for the members, in the order in which they stand above.
    pub fn of(envelope: &Bytes) -> serde_json::Result<Self> {
        if envelope.trim_ascii_start().starts_with(b"[") {
            return Err(serde_json::Error::custom("expected an object, found a list"));
        }
        let Members { message, success_queue, failure_queue, meta } = serde_json::from_slice(envelope)?;
        let slice = |raw: &RawValue| envelope.slice_ref(raw.get().as_bytes());
        Ok(Self { message: slice(message), success_queue, failure_queue, meta: meta.map(slice) })
    }
}

/// The envelope's JSON Schema, for the details of one that [`Envelope::of`] refuses.
#[must_use]
pub fn envelope_schema() -> Option<&'static Validator> {
    static SCHEMA: OnceLock<Option<Validator>> = OnceLock::new();
    let compile = || jsonschema::validator_for(schema_for!(Members<'static>).as_value()).ok();
    SCHEMA.get_or_init(compile).as_ref()
}

/// What a successful asynchronous job leaves: its answer with the caller's `meta` attached, where there is any.
#[must_use]
pub fn succeeded_job(output: Bytes, meta: Option<&[u8]>) -> Bytes {
    const META: &[u8] = b",\"meta\":";
    let answer = Answer::of(output);
    let meta_bytes = meta.map_or(0, |meta| META.len() + meta.len());
    let mut body = Vec::with_capacity(answer.remaining() + meta_bytes);
    answer.put_into(&mut body);
    if let Some(meta) = meta {
        body.pop();
        body.extend_from_slice(META);
        body.extend_from_slice(meta);
        body.push(b'}');
    }
    body.into()
}

/// What the caller of an asynchronous request is told.
#[must_use]
pub fn accepted(id: impl fmt::Display) -> Bytes {
    format!("{{\"job_id\":\"{id}\"}}").into()
}

/// What a failed asynchronous job leaves: the reference's message for failures, with what came in. What isn't JSON is told as a text.
#[must_use]
pub fn failed_job(error: String, envelope: &[u8]) -> Bytes {
    object(&FailedJob { status: "error", error, original_message: raw_json(envelope) })
}

/// Written as it stands: turned into a `Value`, the envelope would be parsed again, and what JSON allows and `Value` doesn't
/// hold (`1e999`) would fail here.
#[derive(Serialize)]
struct FailedJob<'a> {
    status: &'static str,
    error: String,
    original_message: Cow<'a, RawValue>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_job_carries_its_envelope_to_the_letter() {
        let message = failed_job("no luck".to_owned(), br#"{"message": 1e999, "meta": {"s": "\ud800"}}"#);
        let text = String::from_utf8_lossy(&message);
        assert!(
            text.ends_with(r#""original_message":{"message": 1e999, "meta": {"s": "\ud800"}}}"#),
            "{text}"
        );
    }

    #[test]
    fn meta_is_attached_to_an_answer_of_any_size() {
        let message = |output: &'static str| succeeded_job(output.into(), Some(br#"{"k":1}"#));
        assert_eq!(message("{}"), br#"{"status":"success","meta":{"k":1}}"#.as_slice());
        assert_eq!(message(r#"{"a":2}"#), br#"{"status":"success","a":2,"meta":{"k":1}}"#.as_slice());
    }
}
