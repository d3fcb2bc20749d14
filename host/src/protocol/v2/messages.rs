//! Requests and answers as messages of gRPC. Elements come as bytes or as numbers, and go out as bytes, as Triton's clients want them.

use std::{collections::HashMap, sync::Arc};

use bytes::{BufMut, Bytes, BytesMut};
use modalkit_engine::{Datatype, Failure, Shape, Signature, Tensor};
use modalkit_proto::{
    InferParameter, InferTensorContents, ModelInferRequest, ModelInferResponse,
    infer_parameter::ParameterChoice,
    model_infer_request::{InferInputTensor, InferRequestedOutputTensor},
    model_infer_response::InferOutputTensor,
};

use super::{
    InferRequest, JSON_CHUNK, Wanted,
    check::{self, InputDescription, NO_SHARED_MEMORY, OutputDescription, at, invalid},
    json_tensor, outputs_of,
};
use crate::work::JobError;

/// Parameters that mean something here; others are their senders'.
const SEQUENCE_ID: &str = "sequence_id";
const TIMEOUT: &str = "timeout";
const CLASSIFICATION: &str = "classification";
const REGION: &str = "shared_memory_region";

/// Takes a request apart and holds it against the signature.
///
/// # Errors
/// [`JobError::Invalid`], or [`JobError::TooLarge`] where it has more inputs than this.
pub fn read_message(
    request: ModelInferRequest,
    signature: &Arc<Signature>,
    inputs_max: usize,
) -> Result<InferRequest, JobError> {
    let ModelInferRequest { id, parameters, inputs, outputs, raw_input_contents, .. } = request;
    check::count(inputs.len())?;
    let sequence = number(&parameters, SEQUENCE_ID)?.is_some_and(|id| id != 0);
    if sequence
        || matches!(choice(&parameters, SEQUENCE_ID), Some(ParameterChoice::StringParam(id)) if !id.is_empty())
    {
        return Err(check::no_sequence());
    }
    let timeout = check::timeout(number(&parameters, TIMEOUT)?);
    if !raw_input_contents.is_empty() && raw_input_contents.len() != inputs.len() {
        let found = format!(
            "expected as many raw_input_contents as inputs ({}), or none, found {}",
            inputs.len(),
            raw_input_contents.len()
        );
        return Err(invalid(&[], found));
    }
    let descriptions: Vec<OutputDescription<'_>> =
        outputs.iter().map(description).collect::<Result<_, _>>()?;
    let wanted = check::wanted(Some(id), true, descriptions.into_iter(), signature)?;
    let mut raw = raw_input_contents.into_iter();
    let mut tensors = Vec::with_capacity(inputs.len());
    for (index, input) in inputs.into_iter().enumerate() {
        tensors.push(tensor(input, raw.next(), signature, index)?);
    }
    let tensors = check::whole(tensors, signature, inputs_max)?;
    Ok(InferRequest { tensors, wanted, timeout })
}

fn tensor(
    input: InferInputTensor,
    raw: Option<Bytes>,
    signature: &Signature,
    index: usize,
) -> Result<Tensor, JobError> {
    let InferInputTensor { name, datatype, shape, parameters, contents } = input;
    let negative = shape.iter().find(|size| **size < 0);
    if let Some(negative) = negative {
        let found = format!("expected sizes of 0 and more, found {negative}");
        return Err(at(index, "shape", found));
    }
    let shape: Shape = shape.into_iter().map(i64::unsigned_abs).collect();
    let described = InputDescription { name: &name, datatype: &datatype, shape: &shape };
    let spec = described.spec(signature, index)?;
    if parameters.contains_key(REGION) {
        return Err(at(index, "parameters", NO_SHARED_MEMORY.into()));
    }
    let data = match (raw, contents) {
        (Some(_), Some(contents)) if contents != InferTensorContents::default() => {
            return Err(at(index, "contents", "expected contents or raw_input_contents, found both".into()));
        }
        (Some(raw), _) => raw,
        (None, contents) => elements(contents.unwrap_or_default(), spec.datatype)
            .map_err(|found| at(index, "contents", found))?,
    };
    described.tensor(spec, data, index)
}

/// The bytes of elements that came as numbers or strings.
fn elements(contents: InferTensorContents, datatype: Datatype) -> Result<Bytes, String> {
    let InferTensorContents {
        bool_contents,
        int_contents,
        int64_contents,
        uint_contents,
        uint64_contents,
        fp32_contents,
        fp64_contents,
        bytes_contents,
    } = contents;
    let lists = [
        ("bool_contents", bool_contents.len(), &[Datatype::Bool][..]),
        ("int_contents", int_contents.len(), &[Datatype::Int8, Datatype::Int16, Datatype::Int32]),
        ("int64_contents", int64_contents.len(), &[Datatype::Int64]),
        ("uint_contents", uint_contents.len(), &[Datatype::Uint8, Datatype::Uint16, Datatype::Uint32]),
        ("uint64_contents", uint64_contents.len(), &[Datatype::Uint64]),
        ("fp32_contents", fp32_contents.len(), &[Datatype::Fp32]),
        ("fp64_contents", fp64_contents.len(), &[Datatype::Fp64]),
        ("bytes_contents", bytes_contents.len(), &[Datatype::Bytes]),
    ];
    let other = lists.iter().find(|(_, count, datatypes)| *count > 0 && !datatypes.contains(&datatype));
    let expected = lists.iter().find(|(.., datatypes)| datatypes.contains(&datatype));
    let expected = expected.map_or("raw_input_contents", |(list, ..)| list);
    if let Some((other, ..)) = other {
        return Err(format!("expected the elements of {datatype} in {expected}, found {other}"));
    }
    let mut data = BytesMut::new();
    macro_rules! numbers {
        ($list:ident, $type:ty, $put:ident) => {{
            data.reserve($list.len() * size_of::<$type>());
            for number in $list {
                let wrong = |_| format!("expected {datatype}, found {number}");
                data.$put(<$type>::try_from(number).map_err(wrong)?);
            }
        }};
    }
    match datatype {
        Datatype::Bool => data.extend(bool_contents.into_iter().map(u8::from)),
        Datatype::Int8 => numbers!(int_contents, i8, put_i8),
        Datatype::Int16 => numbers!(int_contents, i16, put_i16_le),
        Datatype::Int32 => int_contents.into_iter().for_each(|number| data.put_i32_le(number)),
        Datatype::Int64 => int64_contents.into_iter().for_each(|number| data.put_i64_le(number)),
        Datatype::Uint8 => numbers!(uint_contents, u8, put_u8),
        Datatype::Uint16 => numbers!(uint_contents, u16, put_u16_le),
        Datatype::Uint32 => uint_contents.into_iter().for_each(|number| data.put_u32_le(number)),
        Datatype::Uint64 => uint64_contents.into_iter().for_each(|number| data.put_u64_le(number)),
        Datatype::Fp32 => fp32_contents.into_iter().for_each(|number| data.put_f32_le(number)),
        Datatype::Fp64 => fp64_contents.into_iter().for_each(|number| data.put_f64_le(number)),
        Datatype::Bytes => {
            data.reserve(bytes_contents.iter().map(|string| string.len() + size_of::<u32>()).sum());
            for string in bytes_contents {
                let too_long = |_| format!("expected strings below 4 GiB, found {} bytes", string.len());
                data.put_u32_le(u32::try_from(string.len()).map_err(too_long)?);
                data.put_slice(&string);
            }
        }
        Datatype::Fp16 | Datatype::Bf16 => {}
    }
    Ok(data.freeze())
}

fn description(output: &InferRequestedOutputTensor) -> Result<OutputDescription<'_>, JobError> {
    Ok(OutputDescription {
        name: &output.name,
        as_bytes: true,
        classes: number(&output.parameters, CLASSIFICATION)?.unwrap_or_default(),
        has_region: output.parameters.contains_key(REGION),
    })
}

fn choice<'p>(parameters: &'p HashMap<String, InferParameter>, name: &str) -> Option<&'p ParameterChoice> {
    parameters.get(name)?.parameter_choice.as_ref()
}

/// A parameter that is a number, where it is one; a text is for its owner to look at.
fn number(parameters: &HashMap<String, InferParameter>, name: &str) -> Result<Option<u64>, JobError> {
    let wrong = |found: &dyn std::fmt::Display| {
        invalid(
            &["parameters".into()],
            format!("expected a whole number of 0 and more as `{name}`, found {found}"),
        )
    };
    match choice(parameters, name) {
        None | Some(ParameterChoice::StringParam(_)) => Ok(None),
        Some(ParameterChoice::Uint64Param(number)) => Ok(Some(*number)),
        Some(ParameterChoice::Int64Param(number)) => {
            u64::try_from(*number).map(Some).map_err(|_| wrong(number))
        }
        Some(ParameterChoice::BoolParam(truth)) => Err(wrong(truth)),
        Some(ParameterChoice::DoubleParam(number)) => Err(wrong(number)),
    }
}

/// An answer, before it is a message.
pub struct InferOutputs {
    /// The number of the generation that gave it.
    pub model_version: u64,
    /// That of its request.
    pub id: String,
    /// What was wanted.
    pub tensors: Vec<Tensor>,
}

impl InferOutputs {
    /// Those of each input.
    ///
    /// # Errors
    /// As [`outputs_of`].
    pub fn of(model_version: u64, wanted: Wanted, outputs: &[Arc<[Tensor]>]) -> Result<Self, Failure> {
        let tensors = outputs_of(&wanted, outputs)?;
        Ok(Self { model_version, id: wanted.id.unwrap_or_default(), tensors })
    }

    /// As a message of this model.
    #[must_use]
    pub fn into_message(self, model_name: &str) -> ModelInferResponse {
        let described = |tensor: &Tensor| InferOutputTensor {
            name: tensor.name().to_owned(),
            datatype: tensor.datatype().name().to_owned(),
            // A size is at most what memory can hold.
            shape: tensor.shape().iter().map(|size| size.cast_signed()).collect(),
            ..InferOutputTensor::default()
        };
        ModelInferResponse {
            model_name: model_name.to_owned(),
            model_version: self.model_version.to_string(),
            id: self.id,
            parameters: HashMap::new(),
            outputs: self.tensors.iter().map(described).collect(),
            raw_output_contents: self.tensors.iter().map(|tensor| tensor.data().clone()).collect(),
        }
    }
}

/// An answer that holds one chunk of an output, as JSON.
///
/// # Errors
/// As [`json_tensor`].
pub fn chunk_message(
    model_name: &str,
    model_version: u64,
    id: &str,
    chunk: &[u8],
) -> Result<ModelInferResponse, Failure> {
    let chunk = json_tensor(JSON_CHUNK, chunk)?.as_batch();
    let outputs = InferOutputs { model_version, id: id.into(), tensors: vec![chunk] };
    Ok(outputs.into_message(model_name))
}
