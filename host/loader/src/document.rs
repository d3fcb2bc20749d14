//! The documents that cross the boundary, as the host writes and reads them. What they say is the text of `modalkit_abi`'s functions. A member
//! that this host doesn't know is passed over.

use std::{
    collections::{BTreeMap, HashSet},
    sync::Arc,
};

use modalkit_engine::{
    Datatype, Device, Failure, FailureKind, InputFault, Load, PathSegment, Signature, TensorSpec,
};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

/// What a pipeline says of itself.
#[derive(Deserialize)]
pub(crate) struct Description<'a> {
    pub(crate) name: String,
    pub(crate) version: String,
    #[serde(borrow)]
    pub(crate) input_schema: &'a RawValue,
    #[serde(borrow)]
    pub(crate) output_schema: &'a RawValue,
    #[serde(borrow)]
    pub(crate) settings_schema: &'a RawValue,
}

#[derive(Deserialize)]
struct SignatureDocument {
    inputs: Vec<SpecDocument>,
    outputs: Vec<SpecDocument>,
    #[serde(default = "yes")]
    batched: bool,
}

#[derive(Deserialize)]
struct SpecDocument {
    name: String,
    datatype: String,
    shape: Vec<i64>,
    #[serde(default)]
    optional: bool,
}

fn yes() -> bool {
    true
}

/// What a queue backend says of itself.
#[derive(Deserialize)]
pub(crate) struct QueueDescription {
    pub(crate) version: String,
}

#[derive(Serialize)]
struct LoadDocument<'a> {
    model_name: &'a str,
    all_model_data_folder: &'a str,
    common_settings: &'a RawValue,
    settings: &'a RawValue,
    secrets: &'a BTreeMap<String, String>,
    devices: Vec<LeasedDevice<'a>>,
}

#[derive(Serialize)]
struct LeasedDevice<'a> {
    ordinal: u32,
    name: &'a str,
    uuid: &'a str,
    memory_bytes: u64,
    memory_budget_bytes: Option<u64>,
}

#[derive(Serialize)]
struct OpenDocument<'a> {
    backend_name: &'a str,
    settings: &'a RawValue,
    secrets: &'a BTreeMap<String, String>,
}

#[derive(Serialize)]
struct VolumeChange<'a> {
    volume: &'a str,
    mount_point: &'a str,
    changed: &'a [String],
}

/// The details of a failure.
#[derive(Default, Deserialize)]
struct Details {
    #[serde(default)]
    faults: Vec<Fault>,
}

#[derive(Deserialize)]
struct Fault {
    #[serde(default)]
    path: Vec<Step>,
    message: String,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Step {
    Index(u64),
    Key(String),
}

/// What `load` is given.
///
/// # Errors
/// The settings are no JSON.
pub(crate) fn load(with: &Load<'_>) -> Result<String, Failure> {
    write(&LoadDocument {
        model_name: with.model_name,
        all_model_data_folder: with.all_model_data_folder,
        common_settings: raw(with.common_settings)?,
        settings: raw(with.settings)?,
        secrets: with.secrets,
        devices: with.devices.iter().map(leased).collect(),
    })
}

/// What the `open` of a queue backend is given.
///
/// # Errors
/// The settings are no JSON.
pub(crate) fn open(
    backend_name: &str,
    settings: &str,
    secrets: &BTreeMap<String, String>,
) -> Result<String, Failure> {
    write(&OpenDocument { backend_name, settings: raw(settings)?, secrets })
}

/// What `volume_reload` is given.
///
/// # Errors
/// Never: all of it is text.
pub(crate) fn volume_change(volume: &str, mount_point: &str, changed: &[String]) -> Result<String, Failure> {
    write(&VolumeChange { volume, mount_point, changed })
}

/// Reads what a pipeline says of its tensors; `None` where it takes none.
///
/// # Errors
/// It is none that this host reads.
pub(crate) fn signature(document: &str) -> Result<Option<Signature>, Failure> {
    let unreadable = |reason: String| Failure {
        kind: FailureKind::Permanent,
        message: format!("the pipeline's signature can't be read: {reason}"),
    };
    if document.is_empty() {
        return Ok(None);
    }
    let read: SignatureDocument =
        serde_json::from_str(document).map_err(|error| unreadable(error.to_string()))?;
    let spec = |spec: SpecDocument| {
        let SpecDocument { name, datatype, shape, optional } = spec;
        let known = Datatype::of_name(&datatype).ok_or_else(|| {
            unreadable(format!("this host doesn't know the datatype {datatype} of `{name}`"))
        })?;
        let size = |size: i64| match size {
            -1 => Ok(None),
            _ => u64::try_from(size).map(Some).map_err(|_| {
                unreadable(format!("expected sizes from 0 on, or -1 for any, found {size} in `{name}`"))
            }),
        };
        let shape = shape.into_iter().map(size).collect::<Result<_, _>>()?;
        if name.is_empty() {
            return Err(unreadable("a tensor has no name".into()));
        }
        Ok(TensorSpec { name: name.into(), datatype: known, shape, optional })
    };
    let specs = |specs: Vec<SpecDocument>| {
        let specs = specs.into_iter().map(spec).collect::<Result<Vec<_>, Failure>>()?;
        let mut names = HashSet::new();
        match specs.iter().find(|spec| !names.insert(Arc::clone(&spec.name))) {
            Some(twice) => Err(unreadable(format!("`{}` stands in it twice", twice.name))),
            None => Ok(specs),
        }
    };
    let signature =
        Signature { inputs: specs(read.inputs)?, outputs: specs(read.outputs)?, batched: read.batched };
    if signature.inputs.iter().all(|spec| spec.optional) {
        return Err(unreadable("it has no input that a request must have".into()));
    }
    Ok(Some(signature))
}

/// What is wrong with an input, by the details of a failure; its message where they don't say.
pub(crate) fn faults(message: String, details: &str) -> Vec<InputFault> {
    let Details { faults } = serde_json::from_str(details).unwrap_or_default();
    if faults.is_empty() {
        return vec![InputFault { path: Vec::new(), message, kind: None }];
    }
    let step = |step| match step {
        Step::Key(key) => PathSegment::Key(key),
        Step::Index(index) => PathSegment::Index(index),
    };
    let fault = |Fault { path, message }| InputFault {
        path: path.into_iter().map(step).collect(),
        message,
        kind: None,
    };
    faults.into_iter().map(fault).collect()
}

fn leased<'a>(device: &Device<'a>) -> LeasedDevice<'a> {
    LeasedDevice {
        ordinal: device.ordinal,
        name: device.name,
        uuid: device.uuid,
        memory_bytes: device.memory_bytes,
        memory_budget_bytes: device.memory_budget_bytes,
    }
}

fn raw(json: &str) -> Result<&RawValue, Failure> {
    serde_json::from_str(json).map_err(unwritable)
}

fn write(document: &impl Serialize) -> Result<String, Failure> {
    serde_json::to_string(document).map_err(unwritable)
}

fn unwritable(error: serde_json::Error) -> Failure {
    let message = format!("the host can't write the plugin's document: {error}");
    Failure { kind: FailureKind::Permanent, message }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_those_of_the_details_or_else_the_message() {
        let details =
            r#"{"faults": [{"path": ["a", 3], "message": "wrong"}, {"message": "worse"}], "later": 1}"#;
        let found = faults("all".into(), details);
        assert_eq!(found[0].path, [PathSegment::Key("a".into()), PathSegment::Index(3)]);
        assert_eq!((found[0].message.as_str(), found[1].message.as_str()), ("wrong", "worse"));
        for details in ["", "{}", "[]", r#"{"faults": 1}"#, r#"{"faults": [{"path": [-1], "message": ""}]}"#]
        {
            let found = faults("all".into(), details);
            assert_eq!((found.len(), found[0].message.as_str()), (1, "all"), "{details}");
        }
    }

    #[test]
    fn a_signature_is_read_or_refused_in_words() {
        assert_eq!(signature("").unwrap(), None);
        let read = |document: &str| signature(document).map_err(|failure| failure.message);
        let found = read(
            r#"{"inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 3], "later": 1}], "outputs": [], "later": 1}"#,
        );
        let found = found.unwrap().unwrap();
        assert_eq!(found.inputs[0].shape, [None, Some(3)]);
        assert!(found.batched && !found.inputs[0].optional);
        let input = |name: &str, datatype: &str, size: i64| {
            format!(r#"{{"name": "{name}", "datatype": "{datatype}", "shape": [{size}]}}"#)
        };
        let of = |inputs: &[String]| format!(r#"{{"inputs": [{}], "outputs": []}}"#, inputs.join(", "));
        for (document, expected) in [
            ("7".to_owned(), "can't be read: "),
            (r#"{"inputs": []}"#.to_owned(), "missing field `outputs`"),
            (of(&[]), "no input that a request must have"),
            (of(&[input("x", "FP99", 1)]), "doesn't know the datatype FP99 of `x`"),
            (of(&[input("x", "FP32", -5)]), "found -5 in `x`"),
            (of(&[input("", "FP32", 1)]), "has no name"),
            (of(&[input("x", "FP32", 1), input("x", "INT8", 1)]), "`x` stands in it twice"),
        ] {
            let said = read(&document).unwrap_err();
            assert!(said.contains(expected), "{document}: {said}");
        }
    }
}
