//! JSON Schemas of a pipeline's input and output, and what can be refused from the output's schema alone.

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

fn generate<T: JsonSchema>(settings: SchemaSettings) -> Value {
    SchemaGenerator::new(settings).into_root_schema_for::<T>().to_value()
}
