//! The Open Inference Protocol's `infer` over HTTP: requests and answers of tensors, as JSON, as bytes behind JSON (the binary extension), or as
//! bytes alone. It knows neither sockets nor models' insides, but for the signature that a request is held against.
//!
//! <https://github.com/kserve/open-inference-protocol>, and for the binary extension
//! <https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md>.

mod elements;
mod problem;
mod request;
mod response;

pub use problem::problem;
pub use request::{BatchTensors, InferRequest, Wanted, read_infer};
pub use response::{InferAnswer, write_infer};

/// The header that says where the JSON part of a request or an answer ends.
pub const JSON_BYTES_HEADER: &str = "inference-header-content-length";

#[cfg(test)]
mod tests;
