//! JSON as it goes in and out: texts that stand as they came.

use std::borrow::Cow;

use bytes::Bytes;
use serde::Serialize;
use serde_json::value::{RawValue, to_raw_value};

/// Bytes as a part of a JSON text, as they stand; those that aren't JSON as a text.
#[must_use]
pub fn raw_json(bytes: &[u8]) -> Cow<'_, RawValue> {
    match serde_json::from_slice::<&RawValue>(bytes) {
        Ok(json) => Cow::Borrowed(json),
        Err(_) => Cow::Owned(to_raw_value(&String::from_utf8_lossy(bytes)).expect("a text is JSON")),
    }
}

/// A value of this host's own types as JSON.
#[must_use]
pub fn object(value: &impl Serialize) -> Bytes {
    serde_json::to_vec(value).expect("what this host writes are JSON values").into()
}
