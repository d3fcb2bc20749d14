//! Errors in the protocol's form.

use bytes::Bytes;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::protocol::object;

/// An error's answer in the protocol's form, made of the one that every other path gives.
#[must_use]
pub fn problem(body: &[u8]) -> Bytes {
    #[derive(Deserialize)]
    struct Problem {
        detail: Value,
    }
    let text = match serde_json::from_slice(body) {
        Ok(Problem { detail: Value::String(text) }) => text,
        Ok(Problem { detail: Value::Array(details) }) => {
            let one = |detail: &Value| {
                let steps = detail["loc"].as_array().into_iter().flatten().skip(1);
                let place: Vec<String> = steps
                    .map(|step| step.as_str().map_or_else(|| step.to_string(), ToOwned::to_owned))
                    .collect();
                let said = detail["msg"].as_str().unwrap_or_default();
                if place.is_empty() { said.to_owned() } else { format!("{}: {said}", place.join(".")) }
            };
            details.iter().map(one).collect::<Vec<_>>().join("; ")
        }
        // What is JSON already says something else than what is wrong, such as that something isn't ready.
        _ if serde_json::from_slice::<serde_json::Map<String, Value>>(body).is_ok() => {
            return Bytes::copy_from_slice(body);
        }
        _ => String::from_utf8_lossy(body).into_owned(),
    };
    object(&json!({ "error": text }))
}
