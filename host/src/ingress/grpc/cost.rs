//! What a message of inference becomes in memory, told from its bytes before anything is made of them: a few bytes may say that there are millions of tensors.

use modalkit_proto::{
    InferParameter, InferTensorContents,
    model_infer_request::{InferInputTensor, InferRequestedOutputTensor},
};
use prost::encoding::{WireType, decode_key, decode_varint};
use tonic::Status;

use crate::protocol::v2::TENSORS_MAX;

/// Lists and maps grow by doubling: room for twice what is in them.
const GROWTH: usize = 2;
/// A parameter's name and value in a map, and what a short text takes on the heap.
const PARAMETER_BYTES: usize = GROWTH * (size_of::<(String, InferParameter)>() + 16) + 64;
/// Fields that are looked at to find out whether all of a message is to be.
const QUICK_FIELDS_MAX: usize = 256;

/// The fields of a request that matter here.
const ID: u32 = 3;
const PARAMETERS: u32 = 4;
const INPUTS: u32 = 5;
const OUTPUTS: u32 = 6;
const RAW: u32 = 7;

/// Bytes that a request takes in memory, with those of its message.
///
/// # Errors
/// It has more tensors than a request may have, or is no message.
pub(super) fn of_request(message: &[u8]) -> Result<usize, Status> {
    let (mut inputs, mut outputs, mut raw) = (0, 0, 0);
    let mut cost = message.len();
    for field in Fields(message) {
        let (field, value) = field.map_err(|Broken| broken())?;
        let (counted, size) = match field {
            PARAMETERS => (None, PARAMETER_BYTES + value.len()),
            INPUTS => (Some(&mut inputs), GROWTH * size_of::<InferInputTensor>() + of_input(value)?),
            OUTPUTS => {
                (Some(&mut outputs), GROWTH * size_of::<InferRequestedOutputTensor>() + of_output(value)?)
            }
            // Their elements are slices of the message.
            RAW => (Some(&mut raw), GROWTH * size_of::<bytes::Bytes>()),
            _ => (None, value.len()),
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

fn broken() -> Status {
    Status::internal("expected a ModelInferRequest, found something else, or a part of one")
}

fn of_input(input: &[u8]) -> Result<usize, Status> {
    sum(input, |field, value| {
        Ok(match field {
            // The shape: numbers of 64 bits, each in a byte at least; alone they have no bytes of their own here.
            3 => GROWTH * 8 * value.len().max(1),
            4 => PARAMETER_BYTES + value.len(),
            5 => size_of::<InferTensorContents>() + of_contents(value)?,
            _ => value.len(),
        })
    })
}

fn of_output(output: &[u8]) -> Result<usize, Status> {
    sum(output, |field, value| Ok(if field == 2 { PARAMETER_BYTES + value.len() } else { value.len() }))
}

fn of_contents(contents: &[u8]) -> Result<usize, Status> {
    sum(contents, |field, value| {
        let count = value.len().max(1);
        Ok(match field {
            2 | 4 | 6 => GROWTH * 4 * count,
            3 | 5 | 7 => GROWTH * 8 * count,
            // Strings are slices of the message.
            8 => GROWTH * size_of::<bytes::Bytes>(),
            _ => GROWTH * count,
        })
    })
}

fn sum(message: &[u8], size: impl Fn(u32, &[u8]) -> Result<usize, Status>) -> Result<usize, Status> {
    Fields(message).try_fold(0_usize, |sum, field| {
        let (field, value) = field.map_err(|Broken| broken())?;
        Ok(sum.saturating_add(size(field, value)?))
    })
}

/// Whether a message is soon looked at: but for raw elements it has no more than so many bytes.
pub(super) fn is_quick(message: &[u8], bytes_max: usize) -> bool {
    if message.len() <= bytes_max {
        return true;
    }
    let fields = Fields(message).take(QUICK_FIELDS_MAX).map_while(Result::ok);
    let raw: usize = fields.filter(|(field, _)| *field == RAW).map(|(_, value)| value.len()).sum();
    message.len() - raw <= bytes_max
}

/// The id of a small request.
pub(super) fn id_of(message: &[u8]) -> String {
    let mut fields = Fields(message).map_while(Result::ok);
    let id = fields.find(|(field, _)| *field == ID).map(|(_, id)| id);
    String::from_utf8_lossy(id.unwrap_or_default()).into_owned()
}

/// The fields of a message with their bytes; of numbers there are none. The last one says where it is no message.
struct Fields<'m>(&'m [u8]);

/// A message ends within a field, or has a group, which nobody sends any more: what stands in one would go unseen here.
struct Broken;

impl<'m> Iterator for Fields<'m> {
    type Item = Result<(u32, &'m [u8]), Broken>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_none() {
            self.0 = &[];
        }
        Some(field.ok_or(Broken))
    }
}

impl<'m> Fields<'m> {
    fn field(&mut self) -> Option<(u32, &'m [u8])> {
        let (field, wire) = decode_key(&mut self.0).ok()?;
        let length = match wire {
            WireType::Varint => {
                decode_varint(&mut self.0).ok()?;
                0
            }
            WireType::SixtyFourBit => {
                self.0 = self.0.get(8..)?;
                0
            }
            WireType::ThirtyTwoBit => {
                self.0 = self.0.get(4..)?;
                0
            }
            WireType::LengthDelimited => usize::try_from(decode_varint(&mut self.0).ok()?).ok()?,
            WireType::StartGroup | WireType::EndGroup => return None,
        };
        let (value, rest) = self.0.split_at_checked(length)?;
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

    fn of_input(input: InferInputTensor) -> usize {
        let request = ModelInferRequest { inputs: vec![input], ..ModelInferRequest::default() };
        of_request(&request.encode_to_vec()).unwrap()
    }

    #[test]
    fn a_few_bytes_dont_become_millions_of_tensors() {
        for field in [0x2a_u8, 0x32, 0x3a] {
            let empty = [field, 0];
            assert!(of_request(&empty.repeat(TENSORS_MAX)).is_ok());
            let many = empty.repeat(TENSORS_MAX + 1);
            assert_eq!(of_request(&many).unwrap_err().code(), tonic::Code::InvalidArgument);
            // Nor behind, or in, a group that nobody knows.
            for hidden in [[&[0x7b, 0x7c][..], &many].concat(), [&[0x7b][..], &many, &[0x7c]].concat()] {
                assert_eq!(of_request(&hidden).unwrap_err().code(), tonic::Code::Internal);
            }
        }
        let in_input = [0x2a_u8, 4, 0x7b, 0x7c, 0x1a, 0];
        assert!(of_request(&in_input).is_err());
        let in_contents = [0x2a_u8, 4, 0x2a, 2, 0x7b, 0x7c];
        assert!(of_request(&in_contents).is_err());
    }

    #[test]
    fn elements_cost_what_they_become() {
        let strings = InferTensorContents {
            bytes_contents: vec![bytes::Bytes::new(); 1_000_000],
            ..InferTensorContents::default()
        };
        let numbers =
            InferTensorContents { int64_contents: vec![1; 1_000_000], ..InferTensorContents::default() };
        for (contents, least) in [(strings, 32_000_000), (numbers, 8_000_000)] {
            assert!(
                of_input(InferInputTensor { contents: Some(contents), ..InferInputTensor::default() })
                    >= least
            );
        }
        let shape = InferInputTensor { shape: vec![1; 100_000], ..InferInputTensor::default() };
        assert!(of_input(shape) >= 800_000);
    }

    #[test]
    fn raw_elements_are_no_work_and_an_id_is_found() {
        let mut request = ModelInferRequest { id: "seven".into(), ..ModelInferRequest::default() };
        request.raw_input_contents = vec![vec![0; 1 << 20].into()];
        assert!(is_quick(&request.encode_to_vec(), 1 << 10));
        assert_eq!(id_of(&request.encode_to_vec()), "seven");
        let many = ModelInferRequest { inputs: vec![InferInputTensor::default(); 1000], ..request };
        assert!(!is_quick(&many.encode_to_vec(), 1 << 10));
    }

    proptest! {
        /// What is decoded was looked at to its end.
        #[test]
        fn any_bytes_have_a_cost_or_are_no_message(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            match of_request(&bytes) {
                Ok(cost) => prop_assert!(cost >= bytes.len()),
                Err(_) => prop_assert!(Fields(&bytes).any(|field| field.is_err()) || !bytes.is_empty()),
            }
        }
    }
}
