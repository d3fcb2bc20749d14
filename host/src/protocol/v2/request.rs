//! Takes a request apart and holds it against the model's signature: what comes out fits it.

use std::{borrow::Cow, sync::Arc};

use bytes::Bytes;
use modalkit_engine::{Datatype, Signature, Tensor, TensorSpec};
use serde::{Deserialize, de::IgnoredAny};
use serde_json::value::RawValue;

use super::{JSON_BYTES_HEADER, elements};
use crate::{
    protocol::json::Object,
    work::{Detail, JobError, Location},
};

/// Tensors that a request may have.
const TENSORS_MAX: usize = 1024;
/// Characters of a name that an error repeats, and sizes of a shape.
const SHOWN_CHARS: usize = 80;
const SIZES_SHOWN: usize = 16;
const NO_SHARED_MEMORY: &str = "expected the elements in the request: this host has no shared memory";

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
    sequence_id: Option<IgnoredAny>,
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

/// A request that fits its model's signature.
pub struct InferRequest {
    /// Its tensors.
    pub tensors: BatchTensors,
    /// What is wanted back.
    pub wanted: Wanted,
}

/// A request's tensors, of one input or of a batch of them.
#[derive(Clone)]
pub struct BatchTensors {
    tensors: Vec<Tensor>,
    /// The size of the batch; `None` where the tensors have no such dimension.
    batch: Option<u64>,
}

impl BatchTensors {
    /// How many inputs they are.
    #[must_use]
    pub fn inputs(&self) -> u64 {
        self.batch.unwrap_or(1)
    }

    /// How many bytes of them are strings, which are taken one by one.
    #[must_use]
    pub fn bytes_of_strings(&self) -> usize {
        let strings = self.tensors.iter().filter(|tensor| tensor.datatype() == Datatype::Bytes);
        strings.map(|tensor| tensor.data().len()).sum()
    }

    /// The tensors of each input, without the dimension of the batch.
    #[must_use]
    pub fn into_inputs(self) -> Vec<Arc<[Tensor]>> {
        let Some(rows) = self.batch else {
            return vec![self.tensors.into_iter().map(Tensor::aligned).collect()];
        };
        let mut by_tensor: Vec<_> =
            self.tensors.into_iter().map(|tensor| tensor.rows().into_iter()).collect();
        (0..rows).map(|_| by_tensor.iter_mut().filter_map(Iterator::next).collect()).collect()
    }
}

/// What a request wants back.
pub struct Wanted {
    pub(super) id: Option<String>,
    /// The outputs, and whether as bytes.
    pub(super) outputs: Vec<(TensorSpec, bool)>,
    pub(super) batched: bool,
}

/// Takes a request apart and holds it against the signature.
///
/// # Errors
/// [`JobError::Invalid`], or [`JobError::TooLarge`] where it has more inputs than this.
pub fn read_infer(
    body: &Bytes,
    json_bytes: Option<usize>,
    signature: &Signature,
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
    if request.inputs.len() > TENSORS_MAX {
        let found = format!("expected at most {TENSORS_MAX} tensors, found {}", request.inputs.len());
        return Err(invalid(&["inputs".into()], found));
    }
    let Object(parameters) = request.parameters.unwrap_or_default();
    if parameters.sequence_id.is_some() {
        return Err(invalid(
            &["parameters".into()],
            "expected no sequence_id: no model here keeps a state".into(),
        ));
    }
    let all_as_bytes = parameters.binary_data_output.unwrap_or(false);
    let wanted = wanted(request.id, all_as_bytes, request.outputs.as_deref().unwrap_or_default(), signature)?;
    let mut rest = body.slice(json_bytes..);
    let mut tensors: Vec<Tensor> = Vec::with_capacity(request.inputs.len());
    for (index, Object(input)) in request.inputs.iter().enumerate() {
        let tensor = tensor(input, &mut rest, signature, index)?;
        if tensors.iter().any(|known| known.name() == tensor.name()) {
            let found = format!("expected each tensor once, found `{}` again", tensor.name());
            return Err(at(index, "name", found));
        }
        tensors.push(tensor);
    }
    if !rest.is_empty() {
        let found = format!("{} bytes stand behind those of the tensors (binary_data_size)", rest.len());
        return Err(invalid(&[], found));
    }
    if let Some(missing) = signature
        .inputs
        .iter()
        .find(|spec| !spec.optional && !tensors.iter().any(|tensor| *tensor.name() == *spec.name))
    {
        let expected = format!("expected a tensor `{}` of {}", missing.name, described(missing, signature));
        return Err(invalid(&["inputs".into()], expected));
    }
    let batch = signature.batched.then(|| batch(&tensors, inputs_max)).transpose()?;
    Ok(InferRequest { tensors: BatchTensors { tensors, batch }, wanted })
}

/// A body that is the bytes of the only input, of one row.
fn bytes_alone(body: &Bytes, signature: &Signature) -> Result<InferRequest, JobError> {
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
        return one_row(spec, vec![1; spec.shape.len()], data, signature);
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
    let shape: Vec<u64> =
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
    shape: Vec<u64>,
    data: Bytes,
    signature: &Signature,
) -> Result<InferRequest, JobError> {
    let tensor = Tensor::new(Arc::clone(&spec.name), spec.datatype, shape, data)
        .map_err(|error| invalid(&[], error.to_string()))?;
    let wanted = wanted(None, true, &[], signature)?;
    Ok(InferRequest { tensors: BatchTensors { tensors: vec![tensor], batch: None }, wanted })
}

/// One tensor of a request, with its bytes from `rest` where they stand there.
fn tensor(
    input: &InputTensor<'_>,
    rest: &mut Bytes,
    signature: &Signature,
    index: usize,
) -> Result<Tensor, JobError> {
    let Some(spec) = signature.inputs.iter().find(|spec| *spec.name == *input.name) else {
        let known: Vec<&str> = signature.inputs.iter().map(|spec| &*spec.name).collect();
        let found = format!("the model has no input `{}`; expected one of {known:?}", brief(&input.name));
        return Err(at(index, "name", found));
    };
    if input.datatype != spec.datatype.name() {
        let found =
            format!("expected {} for `{}`, found {}", spec.datatype, spec.name, brief(&input.datatype));
        return Err(at(index, "datatype", found));
    }
    let sizes = if signature.batched { input.shape.get(1..) } else { Some(&input.shape[..]) };
    let fits = |sizes: &[u64]| {
        sizes.len() == spec.shape.len()
            && sizes.iter().zip(&spec.shape).all(|(found, size)| size.is_none_or(|size| size == *found))
    };
    if !sizes.is_some_and(fits) {
        let (expected, shown) = (described(spec, signature), input.shape.len().min(SIZES_SHOWN));
        let found = format!("expected {expected} for `{}`, found {:?}", spec.name, &input.shape[..shown]);
        return Err(at(index, "shape", found));
    }
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
    Tensor::new(Arc::clone(&spec.name), spec.datatype, input.shape.clone(), data)
        .map_err(|error| at(index, "data", error.to_string()))
}

/// The size of a batch, which all of its tensors have.
fn batch(tensors: &[Tensor], inputs_max: usize) -> Result<u64, JobError> {
    let sizes: Vec<u64> = tensors.iter().filter_map(|tensor| tensor.shape().first().copied()).collect();
    let Some(&rows) = sizes.first() else {
        return Err(invalid(&["inputs".into()], "expected a tensor".into()));
    };
    if rows == 0 || sizes.iter().any(|size| *size != rows) {
        let found = format!("expected the same batch size in each tensor, at least 1; found {sizes:?}");
        return Err(invalid(&["inputs".into()], found));
    }
    // Rows of nothing would cost the caller nothing.
    if rows > 1 && tensors.iter().all(|tensor| tensor.data().is_empty()) {
        return Err(invalid(
            &["inputs".into()],
            "expected a batch with elements, found none in any tensor".into(),
        ));
    }
    if rows > inputs_max as u64 {
        return Err(JobError::TooLarge(format!(
            "expected a batch of at most {inputs_max} (queue_max), found {rows}: split it over several requests"
        )));
    }
    Ok(rows)
}

fn wanted(
    id: Option<String>,
    all_as_bytes: bool,
    outputs: &[Object<WantedOutput<'_>>],
    signature: &Signature,
) -> Result<Wanted, JobError> {
    let mut wanted: Vec<(TensorSpec, bool)> = Vec::new();
    for (index, Object(output)) in outputs.iter().enumerate() {
        let place = ["outputs".into(), Location::Index(index as u64)];
        let Some(spec) = signature.outputs.iter().find(|spec| *spec.name == *output.name) else {
            let known: Vec<&str> = signature.outputs.iter().map(|spec| &*spec.name).collect();
            let found =
                format!("the model has no output `{}`; expected one of {known:?}", brief(&output.name));
            return Err(invalid(&place, found));
        };
        if wanted.iter().any(|(known, _)| known.name == spec.name) {
            return Err(invalid(&place, format!("expected each output once, found `{}` again", spec.name)));
        }
        let (mut as_bytes, parameters) = (all_as_bytes, output.parameters.as_ref());
        if let Some(Object(OutputParameters { binary_data, classification, shared_memory_region })) =
            parameters
        {
            if classification.is_some_and(|classes| classes > 0) {
                let found = "expected no `classification`: this host doesn't have that extension";
                return Err(invalid(&place, found.into()));
            }
            if shared_memory_region.is_some() {
                return Err(invalid(&place, NO_SHARED_MEMORY.into()));
            }
            as_bytes = binary_data.unwrap_or(all_as_bytes);
        }
        wanted.push((spec.clone(), as_bytes));
    }
    if outputs.is_empty() {
        wanted = signature.outputs.iter().map(|spec| (spec.clone(), all_as_bytes)).collect();
    }
    if let Some((spec, _)) =
        wanted.iter().find(|(spec, as_bytes)| !as_bytes && !elements::fit_json(spec.datatype))
    {
        let found = format!(
            "the output `{}` is of {}, which JSON doesn't have: ask for it as bytes (binary_data)",
            spec.name, spec.datatype
        );
        return Err(invalid(&["outputs".into()], found));
    }
    Ok(Wanted { id, outputs: wanted, batched: signature.batched })
}

fn invalid(place: &[Location], msg: String) -> JobError {
    let detail = Detail { loc: vec!["body".into()], msg, kind: "value_error".into() };
    JobError::Invalid(vec![detail.inside(place)])
}

fn at(index: usize, member: &str, msg: String) -> JobError {
    invalid(&["inputs".into(), Location::Index(index as u64), member.into()], msg)
}

/// The beginning of what a caller wrote.
fn brief(text: &str) -> String {
    match text.char_indices().nth(SHOWN_CHARS) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

/// A tensor's datatype and shape, for people: `FP32 [batch, 3, any]`.
fn described(spec: &TensorSpec, signature: &Signature) -> String {
    let batch = signature.batched.then(|| "batch".to_owned());
    let sizes = spec.shape.iter().map(|size| size.map_or_else(|| "any".to_owned(), |size| size.to_string()));
    let shape: Vec<String> = batch.into_iter().chain(sizes).collect();
    format!("{} [{}]", spec.datatype, shape.join(", "))
}
