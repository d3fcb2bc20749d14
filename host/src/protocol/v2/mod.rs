//! The Open Inference Protocol: requests and answers of tensors over HTTP, as JSON, as bytes behind JSON (the binary extension), or as bytes alone; the
//! same as messages of gRPC; and what the protocol says of models. It knows neither sockets nor models' insides, but for the signature that a request is
//! held against.
//!
//! <https://github.com/kserve/open-inference-protocol>, and for the binary extension
//! <https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md>.

mod check;
mod describe;
mod elements;
mod form;
mod messages;
mod outputs;
mod problem;
mod request;
mod response;

pub use check::{BatchTensors, ID_BYTES_MAX, InferRequest, TENSORS_MAX, Wanted};
pub use describe::{ModelFacts, config, metadata, server};
pub use form::{Form, JSON_CHUNK, json_tensor};
pub use messages::{InferOutputs, chunk_message, read_message};
pub use outputs::outputs_of;
pub use problem::problem;
pub use request::read_infer;
pub use response::{InferAnswer, write_infer};

/// The header that says where the JSON part of a request or an answer ends.
pub const JSON_BYTES_HEADER: &str = "inference-header-content-length";

#[cfg(test)]
mod tests;
