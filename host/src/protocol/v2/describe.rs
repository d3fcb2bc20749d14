//! What the protocol says of the server and of models: metadata, and a configuration as Triton's clients read it. It is given what there is, and asks
//! nobody.

use std::collections::HashMap;

use modalkit_engine::{Datatype, Signature, TensorSpec};
use modalkit_proto::{
    DataType, ModelConfig, ModelDynamicBatching, ModelInput, ModelInstanceGroup, ModelMetadataResponse,
    ModelOutput, ModelParameter, ModelTransactionPolicy, ServerMetadataResponse, model_instance_group::Kind,
    model_metadata_response::TensorMetadata,
};

/// What of the protocol's extensions there is.
const EXTENSIONS: [&str; 7] = [
    "model_repository",
    "model_repository(unload_dependents)",
    "model_configuration",
    "binary_tensor_data",
    "parameters",
    "statistics",
    "logging",
];
/// Where spans go somewhere.
const TRACE_EXTENSION: &str = "trace";
/// What runs every model.
const PLATFORM: &str = "modalkit";

/// What is known of a model beside its signature.
pub struct ModelFacts<'a> {
    /// Its name.
    pub name: &'a str,
    /// The generation that serves.
    pub version: u64,
    /// The plugin's name.
    pub plugin: &'a str,
    /// Items in a batch at most.
    pub batch_max: usize,
    /// How long a batch waits to be filled, in microseconds; 0 where that changes.
    pub wait_us: u64,
    /// Replicas that serve.
    pub replicas: i64,
    /// Whether each has a GPU.
    pub on_gpu: bool,
    /// What else is worth knowing.
    pub parameters: Vec<(&'static str, String)>,
}

/// What the server is.
#[must_use]
pub fn server(traces: bool) -> ServerMetadataResponse {
    let trace = traces.then_some(TRACE_EXTENSION);
    ServerMetadataResponse {
        name: PLATFORM.to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        extensions: EXTENSIONS.into_iter().chain(trace).map(ToOwned::to_owned).collect(),
    }
}

/// What tensors a model takes and gives.
#[must_use]
pub fn metadata(facts: &ModelFacts<'_>, signature: &Signature) -> ModelMetadataResponse {
    let batch = signature.batched.then_some(-1);
    let described = |spec: &TensorSpec| TensorMetadata {
        name: spec.name.to_string(),
        datatype: spec.datatype.name().to_owned(),
        shape: batch.into_iter().chain(dims(spec)).collect(),
    };
    ModelMetadataResponse {
        name: facts.name.to_owned(),
        versions: vec![facts.version.to_string()],
        platform: PLATFORM.to_owned(),
        inputs: signature.inputs.iter().map(described).collect(),
        outputs: signature.outputs.iter().map(described).collect(),
    }
}

/// How a model is served.
#[must_use]
pub fn config(facts: &ModelFacts<'_>, signature: &Signature) -> ModelConfig {
    let input = |spec: &TensorSpec| ModelInput {
        name: spec.name.to_string(),
        data_type: data_type(spec.datatype).into(),
        dims: dims(spec).collect(),
        optional: spec.optional,
    };
    let output = |spec: &TensorSpec| ModelOutput {
        name: spec.name.to_string(),
        data_type: data_type(spec.datatype).into(),
        dims: dims(spec).collect(),
    };
    let batches = ModelDynamicBatching {
        preferred_batch_size: Vec::new(),
        max_queue_delay_microseconds: facts.wait_us,
    };
    let kind = if facts.on_gpu { Kind::Gpu } else { Kind::Cpu };
    ModelConfig {
        name: facts.name.to_owned(),
        platform: PLATFORM.to_owned(),
        backend: PLATFORM.to_owned(),
        max_batch_size: if signature.batched {
            i32::try_from(facts.batch_max).unwrap_or(i32::MAX)
        } else {
            0
        },
        input: signature.inputs.iter().map(input).collect(),
        output: signature.outputs.iter().map(output).collect(),
        dynamic_batching: signature.batched.then_some(batches),
        instance_group: vec![ModelInstanceGroup {
            name: facts.name.to_owned(),
            count: i32::try_from(facts.replicas).unwrap_or_default(),
            kind: kind.into(),
        }],
        default_model_filename: facts.plugin.to_owned(),
        parameters: facts
            .parameters
            .iter()
            .map(|(name, value)| ((*name).to_owned(), ModelParameter { string_value: value.clone() }))
            .collect::<HashMap<_, _>>(),
        // Chunks come where somebody asks for a stream; whoever doesn't gets one answer.
        model_transaction_policy: Some(ModelTransactionPolicy { decoupled: false }),
    }
}

/// -1 for any size.
fn dims(spec: &TensorSpec) -> impl Iterator<Item = i64> + '_ {
    spec.shape.iter().map(|size| size.map_or(-1, |size| i64::try_from(size).unwrap_or(i64::MAX)))
}

fn data_type(datatype: Datatype) -> DataType {
    match datatype {
        Datatype::Bool => DataType::TypeBool,
        Datatype::Uint8 => DataType::TypeUint8,
        Datatype::Uint16 => DataType::TypeUint16,
        Datatype::Uint32 => DataType::TypeUint32,
        Datatype::Uint64 => DataType::TypeUint64,
        Datatype::Int8 => DataType::TypeInt8,
        Datatype::Int16 => DataType::TypeInt16,
        Datatype::Int32 => DataType::TypeInt32,
        Datatype::Int64 => DataType::TypeInt64,
        Datatype::Fp16 => DataType::TypeFp16,
        Datatype::Bf16 => DataType::TypeBf16,
        Datatype::Fp32 => DataType::TypeFp32,
        Datatype::Fp64 => DataType::TypeFp64,
        Datatype::Bytes => DataType::TypeString,
    }
}
