//! Explains a model's own keys that its pipeline doesn't take: in the form of the configuration's faults, with file, line and
//! column. Made from the schema of the pipeline's settings, on the failure path only.

use modalkit_engine::Plugin;

use super::input_faults;
use crate::{
    config::{Fault, Faults, Settings},
    work::{Detail, Location},
};

/// Looks at a model's own keys as its pipeline would.
///
/// # Errors
/// Everything that is wrong with them.
pub fn check_settings(plugin: &dyn Plugin, settings: &Settings) -> Result<(), Faults> {
    let json = settings.json();
    let Err(failure) = plugin.check_settings(&json) else { return Ok(()) };
    let schema = serde_json::from_str(&plugin.description().settings_schema).unwrap_or_default();
    let validator = jsonschema::validator_for(&schema).ok();
    let details = input_faults::malformed(validator.as_ref(), json.as_bytes(), &failure.message);
    Err(details.into_iter().map(|detail| fault(detail, settings, &schema)).collect::<Vec<_>>().into())
}

fn fault(detail: Detail, settings: &Settings, schema: &serde_json::Value) -> Fault {
    let steps: Vec<String> = detail
        .loc
        .into_iter()
        .skip(1)
        .map(|step| match step {
            Location::Key(key) => key,
            Location::Index(index) => index.to_string(),
        })
        .collect();
    let path: Vec<&str> = steps.iter().map(String::as_str).collect();
    // What the pipeline's own keys are, where that is asked for: those of the settings themselves.
    let known: Vec<&str> =
        schema["properties"].as_object().into_iter().flatten().map(|(key, _)| key.as_str()).collect();
    settings.fault(&path, &detail.msg, detail.kind == "extra_forbidden", &known)
}
