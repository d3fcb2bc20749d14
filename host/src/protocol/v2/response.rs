//! Puts outputs together and writes the answer.

use std::sync::Arc;

use bytes::Bytes;
use modalkit_engine::{Failure, FailureKind, Tensor};
use serde::Serialize;
use serde_json::{Value, json, value::RawValue};

use super::{Wanted, elements};
use crate::protocol::{Answer, object};

/// Shapes that an error lists.
const SHAPES_SHOWN: usize = 8;

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

impl Wanted {
    /// How much of these outputs is copied or written as JSON.
    #[must_use]
    pub fn bytes_to_write(&self, outputs: &[Arc<[Tensor]>]) -> usize {
        let stays = |tensor: &&Tensor| {
            outputs.len() == 1
                && self.outputs.iter().any(|(spec, as_bytes)| *as_bytes && *spec.name == *tensor.name())
        };
        let tensors = outputs.iter().flat_map(|output| output.iter());
        tensors.filter(|tensor| !stays(tensor)).map(|tensor| tensor.data().len()).sum()
    }
}

/// Writes an answer of each input's output.
///
/// # Errors
/// The outputs are not those of the signature, which is the plugin's fault; or they are none that can be written as was asked, which is the
/// caller's.
pub fn write_infer(
    model_name: &str,
    model_version: u64,
    wanted: Wanted,
    outputs: &[Arc<[Tensor]>],
) -> Result<InferAnswer, Failure> {
    let failed = |kind, message: String| Failure { kind, message };
    let mut tensors = Vec::with_capacity(wanted.outputs.len());
    for (spec, as_bytes) in &wanted.outputs {
        let name = &spec.name;
        let mut rows = Vec::with_capacity(outputs.len());
        for output in outputs {
            let mut named = output.iter().filter(|tensor| *tensor.name() == **name);
            let (Some(tensor), None) = (named.next(), named.next()) else {
                let found =
                    format!("the plugin's signature has one output `{name}`, and it gave none or two");
                return Err(failed(FailureKind::Permanent, found));
            };
            if tensor.datatype() != spec.datatype || !fits(tensor.shape(), &spec.shape) {
                let (datatype, shape) = (tensor.datatype(), tensor.shape());
                let size = |size: &Option<u64>| size.map_or("any".to_owned(), |size| size.to_string());
                let sizes: Vec<String> = spec.shape.iter().map(size).collect();
                let found = format!(
                    "the plugin gave {datatype} {shape:?} for its output `{name}`, which is {} [{}] in its signature",
                    spec.datatype,
                    sizes.join(", ")
                );
                return Err(failed(FailureKind::Permanent, found));
            }
            rows.push(tensor.clone());
        }
        let whole = match (wanted.batched, &rows[..]) {
            (false, [one]) => Some(one.clone()),
            _ => Tensor::from_rows(&rows),
        };
        let whole = whole.ok_or_else(|| {
            let shapes: Vec<&[u64]> = rows.iter().map(Tensor::shape).take(SHAPES_SHOWN).collect();
            let found = format!(
                "the outputs `{name}` of this request's inputs can't be put together, their shapes are {shapes:?}: ask for each alone"
            );
            failed(FailureKind::InvalidInput, found)
        })?;
        tensors.push((whole, *as_bytes));
    }
    let mut described = Vec::with_capacity(tensors.len());
    for (tensor, as_bytes) in &tensors {
        let (parameters, data) = if *as_bytes {
            (Some(json!({"binary_data_size": tensor.data().len()})), None)
        } else {
            (None, Some(elements::write(tensor).map_err(|why| failed(FailureKind::InvalidInput, why))?))
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

fn fits(shape: &[u64], spec: &[Option<u64>]) -> bool {
    shape.len() == spec.len()
        && shape.iter().zip(spec).all(|(found, size)| size.is_none_or(|size| size == *found))
}
