//! The documents that cross the boundary, as a plugin reads and writes them. What they say is the text of `modalkit_abi`'s functions. A member
//! that this SDK doesn't know is passed over, and one that an older host doesn't write has a default.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::{Device, PipelineError};

/// What `load` is given.
#[derive(Serialize, Deserialize)]
pub(crate) struct Load<'a> {
    pub(crate) model_name: String,
    pub(crate) all_model_data_folder: String,
    #[serde(borrow)]
    pub(crate) common_settings: &'a RawValue,
    #[serde(borrow)]
    pub(crate) settings: &'a RawValue,
    #[serde(default)]
    pub(crate) secrets: BTreeMap<String, String>,
    #[serde(default)]
    pub(crate) devices: Vec<Device>,
}

/// What `volume_reload` is given.
#[derive(Deserialize)]
pub(crate) struct VolumeChange {
    pub(crate) volume: String,
    pub(crate) mount_point: String,
    #[serde(default)]
    pub(crate) changed: Vec<String>,
}

/// What the `open` of a queue backend is given.
#[derive(Deserialize)]
pub(crate) struct OpenQueue<'a> {
    pub(crate) backend_name: String,
    #[serde(borrow)]
    pub(crate) settings: &'a RawValue,
    #[serde(default)]
    pub(crate) secrets: BTreeMap<String, String>,
}

/// Reads what a host wrote.
///
/// # Errors
/// The host wrote something else; `what` names the document.
pub(crate) fn read<'a, T: Deserialize<'a>>(what: &str, document: &'a str) -> Result<T, PipelineError> {
    serde_json::from_str(document).map_err(|error| {
        PipelineError::permanent(error).context(format!("the host's document for `{what}` is another one"))
    })
}
