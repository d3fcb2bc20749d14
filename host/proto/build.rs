//! Makes Rust of the protocol's file, without a compiler of protocol buffers on the machine.

use std::{env, error::Error, fs, path::Path};

use prost::Message;

const FILE: &str = "open_inference.proto";
/// What is also JSON in answers over HTTP, with these members in this order.
const AS_JSON: [&str; 9] = [
    "ServerMetadataResponse",
    "ModelMetadataResponse",
    "ModelConfig",
    "ModelInput",
    "ModelOutput",
    "ModelInstanceGroup",
    "ModelDynamicBatching",
    "ModelTransactionPolicy",
    "ModelParameter",
];
const STATISTICS_AS_JSON: [&str; 6] = [
    "StatisticDuration",
    "InferStatistics",
    "InferBatchStatistics",
    "ModelStatistics",
    "ModelStatisticsResponse",
    "RepositoryIndexResponse",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed={FILE}");
    let descriptors = protox::compile([FILE], ["."])?;
    let out = env::var("OUT_DIR")?;
    fs::write(Path::new(&out).join("descriptors.bin"), descriptors.encode_to_vec())?;
    let mut generated = tonic_prost_build::configure()
        .build_transport(false)
        .build_client(false)
        // They are slices of what was received, and what a plugin gave.
        .bytes(".inference.ModelInferRequest.raw_input_contents")
        .bytes(".inference.InferTensorContents.bytes_contents")
        .bytes(".inference.ModelInferResponse.raw_output_contents");
    for message in AS_JSON.iter().chain(&STATISTICS_AS_JSON) {
        generated = generated.type_attribute(format!(".inference.{message}"), "#[derive(serde::Serialize)]");
    }
    for (field, attribute) in [
        ("ModelInput.data_type", "#[serde(serialize_with = \"crate::json::data_type\")]"),
        ("ModelOutput.data_type", "#[serde(serialize_with = \"crate::json::data_type\")]"),
        ("ModelInstanceGroup.kind", "#[serde(serialize_with = \"crate::json::kind\")]"),
        ("ModelConfig.dynamic_batching", "#[serde(skip_serializing_if = \"Option::is_none\")]"),
    ] {
        generated = generated.field_attribute(format!(".inference.{field}"), attribute);
    }
    generated.compile_fds(descriptors)?;
    Ok(())
}
