//! Errors in the protocol's form.

use bytes::Bytes;
use serde_json::{Map, Value, json};

use crate::protocol::{object, problem::text_of};

/// An error's answer in the protocol's form, made of the one that every other path gives.
#[must_use]
pub fn problem(body: &[u8]) -> Bytes {
    match text_of(body) {
        Some(text) => object(&json!({ "error": text })),
        // What is JSON already says something else than what is wrong, such as that something isn't ready.
        None if serde_json::from_slice::<Map<String, Value>>(body).is_ok() => Bytes::copy_from_slice(body),
        None => object(&json!({ "error": String::from_utf8_lossy(body) })),
    }
}
