//! JSON Schemas of a pipeline's input, output and settings, and what can be refused from the output's schema alone.

use schemars::{JsonSchema, SchemaGenerator, generate::SchemaSettings};
use serde_json::Value;

use crate::{PipelineError, object::RESERVED};

/// The schema of what is read.
pub(crate) fn of_input<T: JsonSchema>() -> Value {
    generate::<T>(SchemaSettings::draft2020_12().for_deserialize())
}

/// The schema of what is written.
///
/// # Errors
/// Where every value of `T` would be refused: it is no object, or has a member of the host's.
pub(crate) fn of_output<T: JsonSchema>() -> Result<Value, PipelineError> {
    let schema = generate::<T>(SchemaSettings::draft2020_12().for_serialize());
    let name = T::schema_name();
    if let Some(kind) = schema.get("type").and_then(Value::as_str)
        && kind != "object"
    {
        return Err(PipelineError::permanent(format!(
            "`Output` must be a JSON object, found `{name}`, which is of type {kind}: make it a struct with named fields"
        )));
    }
    let properties = schema.get("properties").and_then(Value::as_object);
    if let Some(key) =
        RESERVED.iter().find(|key| properties.is_some_and(|members| members.contains_key(**key)))
    {
        return Err(PipelineError::permanent(format!(
            "`Output` has a member `{key}`, which is the host's: rename it in `{name}`"
        )));
    }
    Ok(schema)
}

/// The schema of the model's own keys. A key that `T` doesn't have is refused when it is parsed, so the schema says so too, in
/// every table whose keys it lists.
pub(crate) fn of_settings<T: JsonSchema>() -> Value {
    let mut schema = of_input::<T>();
    close(&mut schema);
    if let Some(members) = schema.as_object_mut()
        && members.get("type").is_some_and(|kind| kind == "object")
        && !members.contains_key("properties")
    {
        // A struct without members, as `NoSettings`; a map says what its values are.
        members.entry("additionalProperties").or_insert(Value::Bool(false));
    }
    schema
}

fn close(schema: &mut Value) {
    match schema {
        Value::Array(list) => list.iter_mut().for_each(close),
        Value::Object(members) => {
            // What is composed of several schemas may have the keys of all of them.
            let composed = ["allOf", "anyOf", "oneOf", "$ref"].iter().any(|key| members.contains_key(*key));
            if members.get("properties").is_some_and(Value::is_object) && !composed {
                members.entry("additionalProperties").or_insert(Value::Bool(false));
            }
            members.values_mut().for_each(close);
        }
        _ => {}
    }
}

fn generate<T: JsonSchema>(settings: SchemaSettings) -> Value {
    SchemaGenerator::new(settings).into_root_schema_for::<T>().to_value()
}
