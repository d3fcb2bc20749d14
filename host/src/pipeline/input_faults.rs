//! Explains a bad input in the form pydantic made common: where (`loc`), what (`msg`) and of which kind (`type`). Made
//! from the input's JSON Schema, on the failure path only.

use jsonschema::{ValidationError, Validator, error::ValidationErrorKind, paths::LocationSegment};
use modalkit_engine::{InputFault, PathSegment};
use serde_json::Value;

use crate::work::{Detail, Location};

/// The most details in one answer.
pub(super) const DETAILS_MAX: usize = 16;
/// The most characters of the caller's own value in a message.
const FOUND_CHARS_MAX: usize = 80;

impl Detail {
    /// The body isn't JSON, from this byte on.
    #[must_use]
    pub fn not_json(body: &[u8], error: &serde_json::Error) -> Self {
        let lines = body.split_inclusive(|byte| *byte == b'\n').take(error.line().saturating_sub(1));
        let offset = lines.map(<[u8]>::len).sum::<usize>() + error.column().saturating_sub(1);
        Self {
            loc: vec!["body".into(), Location::Index(offset as u64)],
            msg: format!("the body is not valid JSON: {error}"),
            kind: "json_invalid".into(),
        }
    }

    /// What a pipeline's `validate` said.
    #[must_use]
    pub fn invalid(fault: InputFault) -> Self {
        let steps = fault.path.iter().map(|step| match step {
            PathSegment::Key(key) => Location::Key(key.to_string()),
            PathSegment::Index(index) => Location::Index(*index),
        });
        Self {
            loc: std::iter::once("body".into()).chain(steps).collect(),
            msg: fault.message,
            kind: fault.kind.map_or("value_error".into(), Into::into),
        }
    }
}

/// Why bytes that serde refused are not what was expected: everything the schema finds, or else what serde said.
#[must_use]
pub fn malformed(schema: Option<&Validator>, input: &[u8], said: &str) -> Vec<Detail> {
    let value: Value = match serde_json::from_slice(input) {
        Ok(value) => value,
        Err(error) => return vec![Detail::not_json(input, &error)],
    };
    let found = schema.map_or_else(Vec::new, |schema| violations(schema, &value));
    if found.is_empty() {
        // The schema is looser than the type: a custom `Deserialize`, say.
        return vec![Detail { loc: vec!["body".into()], msg: said.to_owned(), kind: "value_error".into() }];
    }
    found
}

/// Compares an input with its schema in every part.
///
/// # Errors
/// What doesn't fit, up to a limit.
pub(super) fn check(schema: &Validator, input: &[u8]) -> Result<(), Vec<Detail>> {
    let value: Value =
        serde_json::from_slice(input).map_err(|error| vec![Detail::not_json(input, &error)])?;
    let found = violations(schema, &value);
    if found.is_empty() { Ok(()) } else { Err(found) }
}

fn violations(schema: &Validator, value: &Value) -> Vec<Detail> {
    schema.iter_errors(value).flat_map(|error| details(&error, value)).take(DETAILS_MAX).collect()
}

fn details(error: &ValidationError<'_>, whole: &Value) -> Vec<Detail> {
    let place = error.instance_path().as_str();
    let mut loc: Vec<Location> = vec!["body".into()];
    loc.extend(error.instance_path().iter().map(|step| match step {
        LocationSegment::Property(name) => Location::Key(name.to_string()),
        LocationSegment::Index(index) => Location::Index(index as u64),
    }));
    let (kind, msg) = match error.kind() {
        ValidationErrorKind::Required { property } => {
            let name = property.as_str().unwrap_or_default();
            loc.push(name.into());
            ("missing", format!("field required: `{name}`"))
        }
        ValidationErrorKind::AdditionalProperties { unexpected } => {
            return unexpected.iter().take(DETAILS_MAX).map(|name| extra(&loc, name)).collect();
        }
        // The members of an object that may have none: the error is the object's, and names no member.
        ValidationErrorKind::FalseSchema
            if error.schema_path().as_str().ends_with("/additionalProperties")
                && let Some(Value::Object(members)) = whole.pointer(place) =>
        {
            return members.keys().take(DETAILS_MAX).map(|name| extra(&loc, name)).collect();
        }
        ValidationErrorKind::Type { kind } => {
            let expected = type_names(kind);
            (type_kind(&expected), format!("expected {expected}, found {}", found(error.instance())))
        }
        ValidationErrorKind::Minimum { .. } => ("greater_than_equal", shortened(error)),
        ValidationErrorKind::ExclusiveMinimum { .. } => ("greater_than", shortened(error)),
        ValidationErrorKind::Maximum { .. } => ("less_than_equal", shortened(error)),
        ValidationErrorKind::ExclusiveMaximum { .. } => ("less_than", shortened(error)),
        ValidationErrorKind::MinItems { .. } | ValidationErrorKind::MinLength { .. } => {
            ("too_short", shortened(error))
        }
        ValidationErrorKind::MaxItems { .. } | ValidationErrorKind::MaxLength { .. } => {
            ("too_long", shortened(error))
        }
        ValidationErrorKind::Enum { .. } | ValidationErrorKind::Constant { .. } => {
            ("literal_error", shortened(error))
        }
        _ => ("value_error", shortened(error)),
    };
    vec![Detail { loc, msg, kind: kind.into() }]
}

fn extra(parent: &[Location], name: &str) -> Detail {
    let loc = parent.iter().cloned().chain([Location::Key(cut(name))]).collect();
    Detail { loc, msg: format!("unknown field: `{}`", cut(name)), kind: "extra_forbidden".into() }
}

fn type_names(kind: &jsonschema::error::TypeKind) -> String {
    match kind {
        jsonschema::error::TypeKind::Single(kind) => kind.to_string(),
        jsonschema::error::TypeKind::Multiple(kinds) => {
            kinds.iter().map(|kind| kind.to_string()).collect::<Vec<_>>().join(" or ")
        }
    }
}

fn type_kind(expected: &str) -> &'static str {
    match expected {
        "string" => "string_type",
        "integer" => "int_type",
        "number" => "float_type",
        "boolean" => "bool_type",
        "array" => "list_type",
        "object" => "dict_type",
        "null" => "none_type",
        _ => "type_error",
    }
}

fn found(value: &Value) -> String {
    let kind = match value {
        Value::Null => return "null".to_owned(),
        Value::Bool(_) => "boolean",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(items) => return format!("an array of {}", items.len()),
        Value::Object(_) => return "an object".to_owned(),
    };
    format!("{kind} {}", cut(&value.to_string()))
}

fn shortened(error: &ValidationError<'_>) -> String {
    cut(&error.to_string())
}

fn cut(text: &str) -> String {
    match text.char_indices().nth(FOUND_CHARS_MAX) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;

    use serde_json::json;

    use super::*;

    fn faults_of(input: &str) -> Vec<(String, Cow<'static, str>)> {
        let schema = json!({
            "type": "object",
            "required": ["text", "top_k"],
            "additionalProperties": false,
            "properties": {"text": {"type": "string"}, "top_k": {"type": "integer", "minimum": 1}, "tags": {"type": "array", "items": {"type": "string"}}}
        });
        let schema = jsonschema::validator_for(&schema).unwrap();
        malformed(Some(&schema), input.as_bytes(), "serde's words")
            .into_iter()
            .map(|detail| (serde_json::to_string(&detail.loc).unwrap(), detail.kind))
            .collect()
    }

    #[test]
    fn every_fault_is_named_with_its_place() {
        assert_eq!(
            faults_of(r#"{"text": 5, "top_k": 0, "tags": ["a", 1]}"#),
            [
                (r#"["body","tags",1]"#.to_owned(), "string_type".into()),
                (r#"["body","text"]"#.to_owned(), "string_type".into()),
                (r#"["body","top_k"]"#.to_owned(), "greater_than_equal".into()),
            ]
        );
        assert_eq!(faults_of(r#"{"text": "a"}"#), [(r#"["body","top_k"]"#.to_owned(), "missing".into())]);
        assert_eq!(
            faults_of(r#"{"text": "a", "top_k": 1, "x": 1}"#),
            [(r#"["body","x"]"#.to_owned(), "extra_forbidden".into())]
        );
        assert_eq!(faults_of("[]"), [(r#"["body"]"#.to_owned(), "dict_type".into())]);
        assert_eq!(faults_of("{\"text\": 1,\n x}"), [(r#"["body",13]"#.to_owned(), "json_invalid".into())]);
    }

    #[test]
    fn a_key_of_an_object_that_has_none_is_named() {
        let none = json!({"type": "object", "additionalProperties": false});
        let inside = json!({"type": "object", "properties": {"a": none}});
        for (schema, input, loc) in [
            (none, r#"{"top_k": {}}"#, r#"["body","top_k"]"#),
            (inside, r#"{"a": {"top_k": 1}}"#, r#"["body","a","top_k"]"#),
        ] {
            let schema = jsonschema::validator_for(&schema).unwrap();
            let [detail] = &malformed(Some(&schema), input.as_bytes(), "")[..] else { panic!("one fault") };
            assert_eq!((detail.msg.as_str(), &*detail.kind), ("unknown field: `top_k`", "extra_forbidden"));
            assert_eq!(serde_json::to_string(&detail.loc).unwrap(), loc);
        }
    }

    #[test]
    fn serde_has_the_word_where_the_schema_finds_nothing() {
        assert_eq!(
            faults_of(r#"{"text": "a", "top_k": 1}"#),
            [(r#"["body"]"#.to_owned(), "value_error".into())]
        );
    }

    #[test]
    fn a_detail_moves_into_a_batch() {
        let detail = Detail::invalid(InputFault {
            path: vec![PathSegment::Key("a".into())],
            message: "x".into(),
            kind: None,
        })
        .inside(&[Location::Index(3)]);
        assert_eq!(serde_json::to_string(&detail.loc).unwrap(), r#"["body",3,"a"]"#);
    }

    #[test]
    fn long_values_are_cut() {
        let detail = malformed(
            Some(&jsonschema::validator_for(&json!({"type": "integer"})).unwrap()),
            format!("\"{}\"", "é".repeat(500)).as_bytes(),
            "",
        );
        assert!(detail[0].msg.chars().count() < 140);
    }
}
