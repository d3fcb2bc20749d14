//! The Open Inference Protocol over gRPC: its messages and calls, made from `open_inference.proto`. Those that describe models are JSON too, as the
//! protocol has it over HTTP. It serves nothing.

#![forbid(unsafe_code)]

mod json;

/// What is made from the file.
#[expect(missing_docs, unused_qualifications, clippy::all, reason = "the file says what they are")]
mod generated {
    tonic::include_proto!("inference");
}

pub use generated::*;

/// The file's description, for clients that ask a server for it (reflection).
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
