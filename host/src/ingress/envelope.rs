//! Takes bodies apart: the list of `/predict_batch`, the envelope of `/predict_async`. It slices and never copies, and leaves
//! the inputs themselves to the plugin.

use std::{fmt, sync::OnceLock};

use bytes::Bytes;
use jsonschema::Validator;
use modalkit_engine::{Decoded, Payload};
use serde::{
    Deserializer,
    de::{DeserializeSeed, IgnoredAny, SeqAccess, Visitor},
};
use serde_json::{json, value::RawValue};

use crate::{
    pipeline::{Generation, malformed, too_many},
    protocol::{Envelope, envelope_schema},
    work::{Detail, JobError, Location},
};

/// An item of a list, as it came and decoded, or what is wrong with it.
pub(super) type ListItem = Result<(Payload, Decoded), JobError>;

/// The items of a list, each with its bytes. None is decoded where there are more than the queue can ever hold. With `partial`, one
/// that isn't what the pipeline takes leaves the others alone.
pub(super) fn decode_list(
    generation: &Generation,
    body: &Bytes,
    items_max: usize,
    partial: bool,
) -> Result<Vec<ListItem>, JobError> {
    let list = split(body, items_max)?;
    if list.count > items_max {
        return Err(too_many(list.count, items_max));
    }
    let payload = |input: &RawValue| Payload::Json(body.slice_ref(input.get().as_bytes()));
    let inputs: Vec<Payload> = list.first.into_iter().map(payload).collect();
    let decoded = generation.decode_each(&inputs).zip(&inputs).enumerate();
    let item = |(index, (decoded, input)): (usize, (Result<Decoded, JobError>, &Payload))| match decoded {
        Ok(decoded) => Ok(Ok((input.clone(), decoded))),
        Err(error) => match error.inside(&[Location::Index(index as u64)]) {
            invalid @ JobError::Invalid(_) if partial => Ok(Err(invalid)),
            error => Err(error),
        },
    };
    decoded.map(item).collect()
}

fn split(body: &Bytes, items_max: usize) -> Result<List<'_>, JobError> {
    let mut json = serde_json::Deserializer::from_slice(body);
    let list = AtMost(items_max).deserialize(&mut json).and_then(|list| json.end().map(|()| list));
    list.map_err(|error| {
        static SCHEMA: OnceLock<Option<Validator>> = OnceLock::new();
        let schema = SCHEMA.get_or_init(|| jsonschema::validator_for(&json!({"type": "array"})).ok());
        JobError::Invalid(malformed(schema.as_ref(), body, &error.to_string()))
    })
}

/// A list of which only the first few elements are kept: the rest is counted.
struct AtMost(usize);

struct List<'a> {
    first: Vec<&'a RawValue>,
    count: usize,
}

impl<'de> DeserializeSeed<'de> for AtMost {
    type Value = List<'de>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<List<'de>, D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for AtMost {
    type Value = List<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of inputs")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<List<'de>, A::Error> {
        let mut list = List { first: Vec::new(), count: 0 };
        while list.count < self.0
            && let Some(element) = elements.next_element()?
        {
            list.first.push(element);
            list.count += 1;
        }
        while elements.next_element::<IgnoredAny>()?.is_some() {
            list.count += 1;
        }
        Ok(list)
    }
}

/// What `/predict_async` takes: its parts, and the decoded input.
pub(super) fn decode_envelope(
    generation: &Generation,
    body: &Bytes,
) -> Result<(Envelope, Decoded), JobError> {
    let parts = open_envelope(body)?;
    let message = Payload::Json(parts.message.clone());
    let decoded =
        generation.decode_each(std::slice::from_ref(&message)).next().unwrap_or(Err(JobError::Lost));
    let decoded = decoded.map_err(|error| error.inside(&["message".into()]))?;
    Ok((parts, decoded))
}

/// An envelope's parts.
pub(super) fn open_envelope(body: &Bytes) -> Result<Envelope, JobError> {
    let parts = Envelope::of(body)
        .map_err(|error| JobError::Invalid(malformed(envelope_schema(), body, &error.to_string())))?;
    // Looked at by itself: a message may be JSON that the schema's check can't hold, such as 1e999.
    if parts.meta.as_ref().is_some_and(|meta| !meta.starts_with(b"{")) {
        return Err(JobError::Invalid(vec![Detail {
            loc: vec!["body".into(), "meta".into()],
            msg: "expected an object".into(),
            kind: "dict_type".into(),
        }]));
    }
    Ok(parts)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    /// Bodies that are nearly envelopes and lists.
    fn nearly() -> impl Strategy<Value = Vec<u8>> {
        let words = prop::sample::select(vec![
            "{",
            "}",
            "[",
            "]",
            ",",
            ":",
            "\"message\"",
            "\"success_queue\"",
            "\"failure_queue\"",
            "\"meta\"",
            "\"\"",
            "\"x\"",
            "null",
            "true",
            "0",
            "-1",
            "1e999",
            "1e-999",
            "{}",
            "[]",
            " ",
            "\n",
            "\"\\ud800\"",
            "\"\\u0000\"",
            "\\",
            "\"",
            "é",
            "{\"message\":",
            "\"meta\":{}}",
            "NaN",
            "//",
            "\u{feff}",
        ]);
        prop_oneof![
            4 => prop::collection::vec(words, 0..24).prop_map(|words| words.concat().into_bytes()),
            1 => prop::collection::vec(any::<u8>(), 0..64),
        ]
    }

    /// More where somebody wants more: `MODALKIT_TEST_CASES=1000000`.
    fn cases() -> u32 {
        std::env::var("MODALKIT_TEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(10_000)
    }

    #[test]
    fn what_is_no_envelope_is_told_member_by_member() {
        let kinds = |body: &'static str| match open_envelope(&body.into()) {
            Ok(_) => Vec::new(),
            Err(JobError::Invalid(details)) => details
                .into_iter()
                .map(|detail| (serde_json::to_string(&detail.loc).unwrap(), detail.kind.into_owned()))
                .collect(),
            Err(other) => panic!("{other:?}"),
        };
        let fault = |loc: &str, kind: &str| (loc.to_owned(), kind.to_owned());
        assert_eq!(kinds(r#"{"message": 1, "success_queue": "a", "meta": {}}"#), []);
        assert_eq!(kinds(r#"{"message": null, "meta": null}"#), []);
        assert_eq!(kinds(r#"{"message": 1e999, "meta": 1}"#), [fault(r#"["body","meta"]"#, "dict_type")]);
        assert_eq!(kinds(r#"{"message": 1, "meta": []}"#), [fault(r#"["body","meta"]"#, "dict_type")]);
        let faults = [
            fault(r#"["body","message"]"#, "missing"),
            fault(r#"["body","queue"]"#, "extra_forbidden"),
            fault(r#"["body","success_queue"]"#, "string_type"),
        ];
        let mut found = kinds(r#"{"success_queue": 1, "queue": "a"}"#);
        found.sort();
        assert_eq!(found, faults);
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: cases(), failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn no_body_makes_it_panic_and_what_is_sliced_is_json(body in nearly(), items_max in 0usize..4) {
            let body = Bytes::from(body);
            if let Ok(parts) = open_envelope(&body) {
                prop_assert!(serde_json::from_slice::<&RawValue>(&parts.message).is_ok());
                let is_object = parts.meta.is_none_or(|meta| meta.starts_with(b"{"));
                prop_assert!(is_object);
            }
            if let Ok(list) = split(&body, items_max) {
                prop_assert!(list.first.len() == list.count.min(items_max));
                if let Ok(Value::Array(items)) = serde_json::from_slice::<Value>(&body) {
                    prop_assert_eq!(items.len(), list.count);
                }
            }
        }
    }
}
