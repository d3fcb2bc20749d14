//! The documents that cross at the start of a worker and with a change of its data, as JSON. Both ends are of the same program; what stands here
//! is what another program that is a worker would have to read and write.

use std::{collections::BTreeMap, path::PathBuf, sync::Arc};

use modalkit_engine::{Datatype, Description, Signature, TensorSpec};
use serde::{Deserialize, Serialize};

use crate::python::PythonDocument;

/// What a worker is to do.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Task {
    /// Say what the plugin says of itself, and end.
    Describe,
    /// Check settings, and end.
    CheckSettings,
    /// Load the pipeline and run batches.
    Serve,
}

/// The first document.
#[derive(Clone, Deserialize, Serialize)]
pub(crate) struct Hello {
    pub(crate) protocol: u32,
    pub(crate) task: Task,
    /// The private copy of the plugin's file, and the file that was copied.
    pub(crate) file: PathBuf,
    pub(crate) origin: PathBuf,
    pub(crate) model_name: String,
    pub(crate) all_model_data_folder: String,
    /// JSON objects.
    pub(crate) common_settings: String,
    pub(crate) application: String,
    pub(crate) settings: String,
    pub(crate) secrets: BTreeMap<String, String>,
    /// In the order in which this process sees them.
    pub(crate) devices: Vec<DeviceDocument>,
    pub(crate) confinement: ConfinementDocument,
    /// Where an interpreter is to run it; the file is a folder then.
    pub(crate) python: Option<PythonDocument>,
    /// What of its confinement couldn't be had; for an interpreter, which doesn't confine itself.
    pub(crate) warnings: Vec<String>,
}

#[derive(Clone, Deserialize, Serialize)]
pub(crate) struct DeviceDocument {
    pub(crate) name: String,
    pub(crate) uuid: String,
    pub(crate) memory_bytes: u64,
    pub(crate) memory_budget_bytes: Option<u64>,
}

#[derive(Clone, Default, Deserialize, Serialize)]
pub(crate) struct ConfinementDocument {
    /// Where no control group holds it to that.
    pub(crate) memory_bytes: Option<u64>,
    pub(crate) cpus: Option<Vec<u32>>,
    pub(crate) sandbox: Option<SandboxDocument>,
}

#[derive(Clone, Deserialize, Serialize)]
pub(crate) struct SandboxDocument {
    pub(crate) readable: Vec<PathBuf>,
    pub(crate) network: bool,
}

/// What a plugin says of itself.
#[derive(Deserialize, Serialize)]
pub(crate) struct Described {
    pub(crate) name: String,
    pub(crate) version: String,
    pub(crate) abi: String,
    pub(crate) sdk: String,
    pub(crate) rustc: String,
    pub(crate) has_debug_assertions: bool,
    pub(crate) input_schema: String,
    pub(crate) output_schema: String,
    pub(crate) settings_schema: String,
}

impl Described {
    pub(crate) fn of(said: &Description) -> Self {
        let said = said.clone();
        Self {
            name: said.name,
            version: said.version,
            abi: said.abi,
            sdk: said.sdk,
            rustc: said.rustc,
            has_debug_assertions: said.has_debug_assertions,
            input_schema: said.input_schema,
            output_schema: said.output_schema,
            settings_schema: said.settings_schema,
        }
    }
}

/// A worker serves.
#[derive(Deserialize, Serialize)]
pub(crate) struct Serves {
    pub(crate) pid: u32,
    pub(crate) signature: Option<SignatureDocument>,
    /// What of its confinement couldn't be had.
    pub(crate) warnings: Vec<String>,
}

/// Data has changed.
#[derive(Deserialize, Serialize)]
pub(crate) struct Change {
    pub(crate) volume: String,
    pub(crate) mount_point: String,
    pub(crate) changed: Vec<String>,
}

#[derive(Deserialize, Serialize)]
pub(crate) struct SignatureDocument {
    inputs: Vec<SpecDocument>,
    outputs: Vec<SpecDocument>,
    batched: bool,
}

#[derive(Deserialize, Serialize)]
struct SpecDocument {
    name: String,
    datatype: String,
    shape: Vec<Option<u64>>,
    optional: bool,
}

impl SignatureDocument {
    pub(crate) fn of(signature: &Signature) -> Self {
        let specs = |specs: &[TensorSpec]| specs.iter().map(SpecDocument::of).collect();
        Self {
            inputs: specs(&signature.inputs),
            outputs: specs(&signature.outputs),
            batched: signature.batched,
        }
    }

    /// `None` where a datatype is none.
    pub(crate) fn signature(self) -> Option<Arc<Signature>> {
        let specs =
            |specs: Vec<SpecDocument>| specs.into_iter().map(SpecDocument::spec).collect::<Option<_>>();
        let (inputs, outputs) = (specs(self.inputs)?, specs(self.outputs)?);
        Some(Arc::new(Signature { inputs, outputs, batched: self.batched }))
    }
}

impl SpecDocument {
    fn of(spec: &TensorSpec) -> Self {
        Self {
            name: spec.name.to_string(),
            datatype: spec.datatype.name().to_owned(),
            shape: spec.shape.clone(),
            optional: spec.optional,
        }
    }

    fn spec(self) -> Option<TensorSpec> {
        let datatype = Datatype::of_name(&self.datatype)?;
        Some(TensorSpec { name: self.name.into(), datatype, shape: self.shape, optional: self.optional })
    }
}
