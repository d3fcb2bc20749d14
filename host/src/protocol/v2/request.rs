//! Takes a request over HTTP apart: JSON, bytes behind it, or bytes alone.

use std::{borrow::Cow, sync::Arc};

use bytes::Bytes;
use modalkit_engine::{Datatype, Shape, Signature, Tensor, TensorSpec};
use serde::{Deserialize, de::IgnoredAny};
use serde_json::{Value, value::RawValue};

use super::{
    JSON_BYTES_HEADER,
    check::{
        self, BatchTensors, InferRequest, InputDescription, NO_SHARED_MEMORY, OutputDescription, at,
        described, invalid,
    },
    elements,
};
use crate::{protocol::json::Object, work::JobError};

#[derive(Deserialize)]
struct Request<'a> {
    #[serde(default)]
    id: Option<String>,
    #[serde(default)]
    parameters: Option<Object<RequestParameters>>,
    #[serde(borrow)]
    inputs: Vec<Object<InputTensor<'a>>>,
    #[serde(default)]
    outputs: Option<Vec<Object<WantedOutput<'a>>>>,
}

#[derive(Default, Deserialize)]
struct RequestParameters {
    #[serde(default)]
    binary_data_output: Option<bool>,
    #[serde(default)]
    sequence_id: Option<Value>,
    /// In microseconds.
    #[serde(default)]
    timeout: Option<u64>,
}

#[derive(Deserialize)]
struct InputTensor<'a> {
    #[serde(borrow)]
    name: Cow<'a, str>,
    #[serde(borrow)]
    datatype: Cow<'a, str>,
    shape: Vec<u64>,
    #[serde(default)]
    parameters: Option<Object<InputParameters>>,
    #[serde(borrow, default)]
    data: Option<&'a RawValue>,
}

#[derive(Default, Deserialize)]
struct InputParameters {
    #[serde(default)]
    binary_data_size: Option<u64>,
    #[serde(default)]
    shared_memory_region: Option<IgnoredAny>,
}

#[derive(Deserialize)]
struct WantedOutput<'a> {
    #[serde(borrow)]
    name: Cow<'a, str>,
    #[serde(default)]
    parameters: Option<Object<OutputParameters>>,
}

#[derive(Default, Deserialize)]
struct OutputParameters {
    #[serde(default)]
    binary_data: Option<bool>,
    #[serde(default)]
    classification: Option<u64>,
    #[serde(default)]
    shared_memory_region: Option<IgnoredAny>,
}

impl InputTensor<'_> {
    fn description(&self) -> InputDescription<'_> {
        InputDescription { name: &self.name, datatype: &self.datatype, shape: &self.shape }
    }
}

impl WantedOutput<'_> {
    fn description(&self, all_as_bytes: bool) -> OutputDescription<'_> {
        let parameters = self.parameters.as_ref().map(|Object(parameters)| parameters);
        OutputDescription {
            name: &self.name,
            as_bytes: parameters.and_then(|parameters| parameters.binary_data).unwrap_or(all_as_bytes),
            classes: parameters.and_then(|parameters| parameters.classification).unwrap_or_default(),
            has_region: parameters.is_some_and(|parameters| parameters.shared_memory_region.is_some()),
        }
    }
}

/// Takes a request apart and holds it against the signature.
///
/// # Errors
/// [`JobError::Invalid`], or [`JobError::TooLarge`] where it has more inputs than this.
pub fn read_infer(
    body: &Bytes,
    json_bytes: Option<usize>,
    signature: &Arc<Signature>,
    inputs_max: usize,
) -> Result<InferRequest, JobError> {
    if json_bytes == Some(0) {
        return bytes_alone(body, signature);
    }
    let json_bytes = json_bytes.unwrap_or(body.len());
    if json_bytes > body.len() {
        let found = format!(
            "expected {JSON_BYTES_HEADER} to be at most the {} bytes of the body, found {json_bytes}",
            body.len()
        );
        return Err(invalid(&[], found));
    }
    let Object(request): Object<Request<'_>> = serde_json::from_slice(&body[..json_bytes])
        .map_err(|error| invalid(&[], format!("expected an inference request in JSON: {error}")))?;
    check::count(request.inputs.len())?;
    let Object(parameters) = request.parameters.unwrap_or_default();
    // What stands for no sequence.
    let none = |id: &Value| id.is_null() || id == 0 || id == "";
    if parameters.sequence_id.is_some_and(|id| !none(&id)) {
        return Err(check::no_sequence());
    }
    let all_as_bytes = parameters.binary_data_output.unwrap_or(false);
    let outputs = request.outputs.as_deref().unwrap_or_default().iter();
    let outputs = outputs.map(|Object(output)| output.description(all_as_bytes));
    let wanted = check::wanted(request.id, all_as_bytes, outputs, signature)?;
    let mut rest = body.slice(json_bytes..);
    let mut tensors: Vec<Tensor> = Vec::with_capacity(request.inputs.len());
    for (index, Object(input)) in request.inputs.iter().enumerate() {
        tensors.push(tensor(input, &mut rest, signature, index)?);
    }
    if !rest.is_empty() {
        let found = format!("{} bytes stand behind those of the tensors (binary_data_size)", rest.len());
        return Err(invalid(&[], found));
    }
    let tensors = check::whole(tensors, signature, inputs_max)?;
    Ok(InferRequest { tensors, wanted, timeout: check::timeout(parameters.timeout) })
}

/// A body that is the bytes of the only input, of one row.
fn bytes_alone(body: &Bytes, signature: &Arc<Signature>) -> Result<InferRequest, JobError> {
    let [spec] = &signature.inputs[..] else {
        let found = format!(
            "expected a request in JSON, since the model has {} inputs; found {JSON_BYTES_HEADER}: 0, which is for one",
            signature.inputs.len()
        );
        return Err(invalid(&[], found));
    };
    if spec.datatype == Datatype::Bytes && spec.shape.iter().all(|size| size.is_none_or(|size| size == 1)) {
        // The body is the only string.
        let length = u32::try_from(body.len()).unwrap_or(u32::MAX).to_le_bytes();
        let data = [&length[..], body].concat().into();
        return one_row(spec, Shape::from_elem(1, spec.shape.len()), data, signature);
    }
    let unclear = || {
        let expected = described(spec, signature);
        invalid(
            &[],
            format!("{} bytes alone don't tell the shape of `{}`, {expected}", body.len(), spec.name),
        )
    };
    let fixed: Option<u64> =
        spec.shape.iter().flatten().try_fold(1, |count: u64, size| count.checked_mul(*size));
    let shape: Shape =
        match (spec.shape.iter().filter(|size| size.is_none()).count(), spec.datatype.element_bytes()) {
            (0, _) => spec.shape.iter().flatten().copied().collect(),
            (1, Some(element)) => {
                let row = fixed
                    .and_then(|fixed| fixed.checked_mul(element))
                    .filter(|row| *row > 0)
                    .ok_or_else(unclear)?;
                spec.shape.iter().map(|size| size.unwrap_or(body.len() as u64 / row)).collect()
            }
            _ => return Err(unclear()),
        };
    one_row(spec, shape, body.clone(), signature)
}

/// A request of one tensor without the dimension of the batch, whose outputs are wanted as bytes.
fn one_row(
    spec: &TensorSpec,
    shape: Shape,
    data: Bytes,
    signature: &Arc<Signature>,
) -> Result<InferRequest, JobError> {
    let tensor = Tensor::new(Arc::clone(&spec.name), spec.datatype, shape, data)
        .map_err(|error| invalid(&[], error.to_string()))?;
    let wanted = check::wanted(None, true, std::iter::empty(), signature)?;
    let tensors = BatchTensors { tensors: vec![tensor], batch: None };
    Ok(InferRequest { tensors, wanted, timeout: None })
}

/// One tensor of a request, with its bytes from `rest` where they stand there.
fn tensor(
    input: &InputTensor<'_>,
    rest: &mut Bytes,
    signature: &Signature,
    index: usize,
) -> Result<Tensor, JobError> {
    let description = input.description();
    let spec = description.spec(signature, index)?;
    let parameters = input.parameters.as_ref().map(|Object(parameters)| parameters);
    if parameters.is_some_and(|parameters| parameters.shared_memory_region.is_some()) {
        return Err(at(index, "parameters", NO_SHARED_MEMORY.into()));
    }
    let size = parameters.and_then(|parameters| parameters.binary_data_size);
    let data = match (size, input.data) {
        (Some(size), None) => match usize::try_from(size) {
            Ok(size) if size <= rest.len() => rest.split_to(size),
            _ => {
                let found = format!(
                    "expected at most the {} bytes that are left of the body, found the binary_data_size {size}",
                    rest.len()
                );
                return Err(at(index, "parameters", found));
            }
        },
        (None, Some(data)) => {
            elements::read(data, spec.datatype, &input.shape).map_err(|error| at(index, "data", error))?
        }
        (Some(_), Some(_)) => {
            return Err(at(index, "data", "expected data or binary_data_size, found both".into()));
        }
        (None, None) => return Err(at(index, "data", "expected data, or a binary_data_size".into())),
    };
    description.tensor(spec, data, index)
}
