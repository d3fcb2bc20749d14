//! Writes an answer over HTTP.

use std::sync::Arc;

use bytes::Bytes;
use modalkit_engine::{Failure, FailureKind, Tensor};
use serde::Serialize;
use serde_json::{Value, json, value::RawValue};

use super::{Wanted, elements, outputs_of};
use crate::protocol::{Answer, object};

#[derive(Serialize)]
struct Response<'a> {
    model_name: &'a str,
    model_version: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    outputs: Vec<OutputTensor<'a>>,
}

#[derive(Serialize)]
struct OutputTensor<'a> {
    name: &'a str,
    datatype: &'static str,
    shape: &'a [u64],
    #[serde(skip_serializing_if = "Option::is_none")]
    parameters: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<Box<RawValue>>,
}

/// An answer, and where its JSON part ends when bytes follow.
pub struct InferAnswer {
    /// The body.
    pub body: Answer,
    /// Bytes of the JSON part; `None` where it is all.
    pub json_bytes: Option<usize>,
}

/// Writes an answer of each input's output.
///
/// # Errors
/// As [`outputs_of`], or one of them can't be written as was asked.
pub fn write_infer(
    model_name: &str,
    model_version: u64,
    wanted: Wanted,
    outputs: &[Arc<[Tensor]>],
) -> Result<InferAnswer, Failure> {
    let tensors = outputs_of(&wanted, outputs)?;
    let tensors: Vec<(&Tensor, bool)> =
        tensors.iter().zip(wanted.outputs().map(|(_, as_bytes)| as_bytes)).collect();
    let mut described = Vec::with_capacity(tensors.len());
    for (tensor, as_bytes) in &tensors {
        let (parameters, data) = if *as_bytes {
            (Some(json!({"binary_data_size": tensor.data().len()})), None)
        } else {
            let failed = |message| Failure { kind: FailureKind::InvalidInput, message };
            (None, Some(elements::write(tensor).map_err(failed)?))
        };
        let (datatype, shape) = (tensor.datatype().name(), tensor.shape());
        described.push(OutputTensor { name: tensor.name(), datatype, shape, parameters, data });
    }
    let json = object(&Response {
        model_name,
        model_version: model_version.to_string(),
        id: wanted.id,
        outputs: described,
    });
    let bytes: Vec<Bytes> =
        tensors.iter().filter(|(_, as_bytes)| *as_bytes).map(|(tensor, _)| tensor.data().clone()).collect();
    let json_bytes = tensors.iter().any(|(_, as_bytes)| *as_bytes).then_some(json.len());
    Ok(InferAnswer { body: Answer::in_pieces(json, bytes), json_bytes })
}
