//! Errors as OpenAI's clients read them.

use bytes::Bytes;
use serde_json::{Value, json};

use crate::protocol::{
    object,
    problem::{place_of, text_of},
};

/// An error's answer with this status, made of the one that every other path gives; it may be that there is no such model.
#[must_use]
pub fn problem(body: &[u8], status: u16, is_of_model: bool) -> Bytes {
    let message = text_of(body).unwrap_or_else(|| String::from_utf8_lossy(body).into_owned());
    let (kind, code) = match status {
        401 => ("invalid_request_error", Some("invalid_api_key")),
        404 if is_of_model => ("invalid_request_error", Some("model_not_found")),
        429 => ("rate_limit_error", Some("rate_limit_exceeded")),
        500.. => ("server_error", None),
        _ => ("invalid_request_error", None),
    };
    let param = if is_of_model { Some("model".to_owned()) } else { first_place(body) };
    object(&json!({"error": {"message": message, "type": kind, "param": param, "code": code}}))
}

/// Where the first thing is that is wrong with a request.
fn first_place(body: &[u8]) -> Option<String> {
    let whole: Value = serde_json::from_slice(body).ok()?;
    let place = place_of(whole["detail"].get(0)?);
    (!place.is_empty()).then_some(place)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_names_its_kind_and_what_it_is_about() {
        let body =
            br#"{"detail":[{"loc":["body","n"],"msg":"expected 1 to 128, found 0","type":"value_error"}]}"#;
        let error = |body: &[u8], status| -> Value {
            serde_json::from_slice(&problem(body, status, status == 404)).unwrap()
        };
        let expected = json!({"error": {
            "message": "n: expected 1 to 128, found 0", "type": "invalid_request_error", "param": "n", "code": null,
        }});
        assert_eq!(error(body, 400), expected);
        let missing = error(br#"{"detail":"no model named \"x\""}"#, 404);
        assert_eq!(missing["error"]["code"], "model_not_found");
        assert_eq!(missing["error"]["param"], "model");
        assert_eq!(error(b"no JSON", 503)["error"]["message"], "no JSON");
    }
}
