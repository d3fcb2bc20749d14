//! What goes wrong, in the words that callers read: the text of an error, and an item's error in the place of its answer. Statuses are the
//! transport's.

use bytes::Bytes;
use modalkit_engine::{Failure, FailureKind};
use serde::Deserialize;
use serde_json::{Value, json};

use super::json::object;
use crate::work::{Detail, JobError, Location};

/// An error in words.
#[must_use]
pub fn describe(job_error: &JobError) -> String {
    match job_error {
        JobError::Invalid(details) => details.first().map(placed).unwrap_or_default(),
        JobError::UnknownModel { name: Some(name), known } => {
            format!("no model named {name:?}; expected one of {known:?}")
        }
        JobError::UnknownModel { name: None, known } if known.is_empty() => {
            "no model is served yet: put a plugin into the volume".to_owned()
        }
        JobError::UnknownModel { name: None, known } => {
            format!("several models are served: name one with model_name; expected one of {known:?}")
        }
        JobError::UnknownVersion { model, version, serving } => {
            format!("no version {version:?} of the model {model} serves; expected {serving}, or none")
        }
        JobError::TooLarge(reason) | JobError::Conflict(reason) | JobError::Unavailable(reason) => {
            reason.clone()
        }
        JobError::Busy(reason) => (*reason).to_owned(),
        JobError::DeadlinePassed => "the deadline passed before there was an answer".to_owned(),
        JobError::BatchTimedOut(limit) | JobError::HungAlone(limit) => {
            format!("the batch ran longer than batch_timeout_seconds ({limit:?})")
        }
        JobError::StoppedReading(limit) => {
            format!(
                "the caller read none of its chunks for {limit:?}, and its batch waits no longer (stream_wait_seconds)"
            )
        }
        JobError::Failed(failure) => failure.message.clone(),
        JobError::Lost => "Internal Server Error. Error log: the job was lost inside the host".to_owned(),
    }
}

/// An error in words, and all that is wrong with an input.
#[must_use]
pub fn describe_whole(job_error: &JobError) -> String {
    match job_error {
        JobError::Invalid(details) => details.iter().map(placed).collect::<Vec<_>>().join("; "),
        other => job_failure(other),
    }
}

/// Why an asynchronous job failed, in words.
#[must_use]
pub fn job_failure(job_error: &JobError) -> String {
    match job_error {
        // Its own input's fault is none of the server's.
        JobError::Failed(failure) if failure.kind == FailureKind::InvalidInput => failure.message.clone(),
        JobError::Failed(failure) => internal(failure),
        other => describe(other),
    }
}

/// An item's error in the place of its answer.
#[must_use]
pub fn failed_item(failure: &Failure) -> Bytes {
    object(&json!({"status": "error", "error": failure.message.as_str()}))
}

/// What is wrong with an item, in the place of its answer.
#[must_use]
pub fn invalid_item(details: Vec<Detail>) -> Bytes {
    let error = details.first().map(placed).unwrap_or_default();
    object(&json!({"status": "error", "error": error, "detail": details}))
}

/// A pipeline's failure in words.
#[must_use]
pub fn internal(failure: &Failure) -> String {
    format!("Internal Server Error. Error log: {}", failure.message)
}

/// What an error's answer says (`detail`), in one line; `None` where it says nothing.
pub(super) fn text_of(body: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Problem {
        detail: Value,
    }
    match serde_json::from_slice(body).ok()? {
        Problem { detail: Value::String(text) } => Some(text),
        Problem { detail: Value::Array(details) } => {
            let one = |detail: &Value| {
                let place = place_of(detail);
                let said = detail["msg"].as_str().unwrap_or_default();
                if place.is_empty() { said.to_owned() } else { format!("{place}: {said}") }
            };
            Some(details.iter().map(one).collect::<Vec<_>>().join("; "))
        }
        _ => None,
    }
}

/// Where a [`Detail`] says that something is wrong, behind its first step.
pub(super) fn place_of(detail: &Value) -> String {
    let steps = detail["loc"].as_array().into_iter().flatten().skip(1);
    let place: Vec<String> =
        steps.map(|step| step.as_str().map_or_else(|| step.to_string(), ToOwned::to_owned)).collect();
    place.join(".")
}

/// What is wrong with an input, with its place.
fn placed(detail: &Detail) -> String {
    let step = |step: &Location| match step {
        Location::Key(key) => key.clone(),
        Location::Index(index) => index.to_string(),
    };
    // The first step says that it is the body.
    let place: Vec<String> = detail.loc.iter().skip(1).map(step).collect();
    if place.is_empty() { detail.msg.clone() } else { format!("{}: {}", place.join("."), detail.msg) }
}
