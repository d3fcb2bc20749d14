//! What a message of inference becomes in memory, told from its bytes before anything is made of them: a few bytes may say that there are millions of tensors.

use bytes::Buf;
use modalkit_proto::{
    InferParameter, InferTensorContents,
    model_infer_request::{InferInputTensor, InferRequestedOutputTensor},
};
use prost::encoding::{WireType, decode_key, decode_varint};
use tonic::Status;

use crate::protocol::v2::TENSORS_MAX;

/// A parameter's name and value in a map.
const PARAMETER_BYTES: usize = size_of::<(String, InferParameter)>() + 16;

/// Bytes that a request takes in memory, with those of its message.
///
/// # Errors
/// It has more tensors than a request may have.
pub(super) fn of_request(message: &[u8]) -> Result<usize, Status> {
    let (mut inputs, mut outputs, mut raw) = (0, 0, 0);
    let mut cost = message.len();
    for (field, value) in Fields(message) {
        let (counted, size) = match field {
            4 => (None, PARAMETER_BYTES),
            5 => (Some(&mut inputs), size_of::<InferInputTensor>() + of_input(value)),
            6 => (Some(&mut outputs), size_of::<InferRequestedOutputTensor>() + of_output(value)),
            7 => (Some(&mut raw), size_of::<bytes::Bytes>()),
            _ => (None, 0),
        };
        cost = cost.saturating_add(size);
        if let Some(counted) = counted {
            *counted += 1;
            if *counted > TENSORS_MAX {
                return Err(Status::invalid_argument(format!(
                    "expected at most {TENSORS_MAX} tensors, found more"
                )));
            }
        }
    }
    Ok(cost)
}

fn of_input(input: &[u8]) -> usize {
    Fields(input)
        .map(|(field, value)| match field {
            // Numbers of 64 bits, each in a byte at least; alone they have none of their own here.
            3 => 8 * value.len().max(1),
            4 => PARAMETER_BYTES,
            5 => size_of::<InferTensorContents>() + of_contents(value),
            _ => 0,
        })
        .fold(0, usize::saturating_add)
}

fn of_output(output: &[u8]) -> usize {
    Fields(output).filter(|(field, _)| *field == 2).count().saturating_mul(PARAMETER_BYTES)
}

fn of_contents(contents: &[u8]) -> usize {
    Fields(contents)
        .map(|(field, value)| match field {
            2 | 4 | 6 => 4 * value.len().max(1),
            3 | 5 | 7 => 8 * value.len().max(1),
            8 => size_of::<bytes::Bytes>(),
            _ => value.len().max(1),
        })
        .fold(0, usize::saturating_add)
}

/// The fields of a message with their bytes, as far as it is one: of numbers there are no bytes.
struct Fields<'m>(&'m [u8]);

impl<'m> Iterator for Fields<'m> {
    type Item = (u32, &'m [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let (field, wire) = decode_key(&mut self.0).ok()?;
        let length = match wire {
            WireType::Varint => {
                decode_varint(&mut self.0).ok()?;
                0
            }
            WireType::SixtyFourBit | WireType::ThirtyTwoBit => {
                let bytes = if wire == WireType::SixtyFourBit { 8 } else { 4 };
                self.0 = self.0.get(bytes..)?;
                0
            }
            WireType::LengthDelimited => usize::try_from(decode_varint(&mut self.0).ok()?).ok()?,
            // Nobody sends groups any more, and prost reads none here.
            WireType::StartGroup | WireType::EndGroup => return None,
        };
        if length > self.0.remaining() {
            return None;
        }
        let (value, rest) = self.0.split_at(length);
        self.0 = rest;
        Some((field, value))
    }
}

#[cfg(test)]
mod tests {
    use modalkit_proto::ModelInferRequest;
    use proptest::prelude::*;
    use prost::Message;

    use super::*;

    #[test]
    fn a_few_bytes_dont_become_millions_of_tensors() {
        for (field, most) in [(0x2a_u8, TENSORS_MAX), (0x32, TENSORS_MAX), (0x3a, TENSORS_MAX)] {
            let empty = [field, 0];
            assert!(of_request(&empty.repeat(most)).is_ok());
            assert_eq!(of_request(&empty.repeat(most + 1)).unwrap_err().code(), tonic::Code::InvalidArgument);
        }
        // A tensor of a million empty strings, and one of a million numbers of 64 bits.
        let strings = InferTensorContents {
            bytes_contents: vec![bytes::Bytes::new(); 1_000_000],
            ..InferTensorContents::default()
        };
        let numbers =
            InferTensorContents { int64_contents: vec![1; 1_000_000], ..InferTensorContents::default() };
        for (contents, least) in [(strings, 32_000_000), (numbers, 8_000_000)] {
            let input = InferInputTensor { contents: Some(contents), ..InferInputTensor::default() };
            let request = ModelInferRequest { inputs: vec![input], ..ModelInferRequest::default() };
            assert!(of_request(&request.encode_to_vec()).unwrap() >= least);
        }
        let shape = InferInputTensor { shape: vec![1; 100_000], ..InferInputTensor::default() };
        let request = ModelInferRequest { inputs: vec![shape], ..ModelInferRequest::default() };
        assert!(of_request(&request.encode_to_vec()).unwrap() >= 800_000);
    }

    proptest! {
        #[test]
        fn any_bytes_have_a_cost(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            if let Ok(cost) = of_request(&bytes) {
                prop_assert!(cost >= bytes.len());
            }
        }
    }
}
