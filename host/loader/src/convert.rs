//! What crosses the boundary in the ABI's types, in the host's, and back.

use std::sync::Arc;

use bytes::Bytes;
use modalkit_abi::{Buffer, FailureKind as Kind, abi_stable::std_types::RResult};
use modalkit_engine::{
    ChunkResult, Datatype, Failure, FailureKind, Interest, LogLevel, Measure, Rejection, Shape, Signature,
    Tensor,
};

use crate::document;

/// A call's result, with the failure as the host knows it.
pub(crate) fn result<T>(result: RResult<T, modalkit_abi::Failure>) -> Result<T, Failure> {
    result.into_result().map_err(failure)
}

pub(crate) fn failure(failure: modalkit_abi::Failure) -> Failure {
    let kind = match failure.kind {
        Kind::INVALID_INPUT | Kind::MALFORMED_INPUT => FailureKind::InvalidInput,
        Kind::TRANSIENT | Kind::BUSY => FailureKind::Transient,
        Kind::DEVICE_LOST => FailureKind::DeviceLost,
        Kind::DEVICE_SUSPECTED => FailureKind::DeviceSuspected,
        Kind::PANICKED => FailureKind::Panicked,
        _ => FailureKind::Permanent,
    };
    Failure { kind, message: failure.message.into() }
}

/// A failure of a call that looks at an input.
pub(crate) fn rejection(refused: modalkit_abi::Failure) -> Rejection {
    match refused.kind {
        Kind::MALFORMED_INPUT => Rejection::Malformed { message: refused.message.into() },
        Kind::INVALID_INPUT => {
            Rejection::Invalid { faults: document::faults(refused.message.into(), &refused.details) }
        }
        Kind::BUSY => Rejection::Busy,
        _ => Rejection::Failed(failure(refused)),
    }
}

pub(crate) fn measure(measure: modalkit_abi::Measure) -> Measure {
    Measure { cost: measure.cost, shape: measure.shape }
}

pub(crate) fn interest_of_plugins(interest: Interest) -> modalkit_abi::Interest {
    match interest {
        Interest::Outcome => modalkit_abi::Interest::OUTCOME,
        Interest::Chunks => modalkit_abi::Interest::CHUNKS,
        Interest::Nothing => modalkit_abi::Interest::NOTHING,
    }
}

pub(crate) fn chunk_result_of_plugins(result: ChunkResult) -> modalkit_abi::ChunkResult {
    match result {
        ChunkResult::Taken => modalkit_abi::ChunkResult::TAKEN,
        ChunkResult::Full => modalkit_abi::ChunkResult::FULL,
        ChunkResult::Unwanted => modalkit_abi::ChunkResult::UNWANTED,
    }
}

const _: () = assert!(modalkit_engine::TENSOR_ALIGNMENT >= modalkit_abi::TENSOR_ALIGNMENT);

/// A tensor on its way to a plugin, which shares the bytes.
pub(crate) fn tensor_of_plugins(tensor: &Tensor) -> modalkit_abi::Tensor {
    modalkit_abi::Tensor {
        name: tensor.name().into(),
        datatype: number(tensor.datatype()),
        shape: tensor.shape().to_vec().into(),
        data: Buffer::from_owner(tensor.data().clone()),
        parameters: Default::default(),
    }
}

/// A tensor that a plugin gave. Its bytes stay where they are, and its name is that of its signature where it stands there.
///
/// # Errors
/// It is none.
pub(crate) fn tensor(tensor: modalkit_abi::Tensor, signature: Option<&Signature>) -> Result<Tensor, Failure> {
    let modalkit_abi::Tensor { name, datatype, shape, data, .. } = tensor;
    let unfit = |reason: String| Failure {
        kind: FailureKind::Permanent,
        message: format!("the plugin's tensor `{name}`: {reason}"),
    };
    let known = Datatype::ALL.iter().copied().find(|known| number(*known) == datatype);
    let known = known.ok_or_else(|| unfit(format!("this host doesn't know the datatype {}", datatype.0)))?;
    let outputs = signature.map_or(&[][..], |signature| &signature.outputs);
    let named = outputs.iter().find(|spec| *spec.name == *name);
    let shared_name = named.map_or_else(|| name.as_str().into(), |spec| Arc::clone(&spec.name));
    Tensor::new(shared_name, known, Shape::from_slice(&shape), Bytes::from_owner(data))
        .map_err(|error| unfit(error.to_string()))
}

fn number(datatype: Datatype) -> modalkit_abi::Datatype {
    match datatype {
        Datatype::Bool => modalkit_abi::Datatype::BOOL,
        Datatype::Uint8 => modalkit_abi::Datatype::UINT8,
        Datatype::Uint16 => modalkit_abi::Datatype::UINT16,
        Datatype::Uint32 => modalkit_abi::Datatype::UINT32,
        Datatype::Uint64 => modalkit_abi::Datatype::UINT64,
        Datatype::Int8 => modalkit_abi::Datatype::INT8,
        Datatype::Int16 => modalkit_abi::Datatype::INT16,
        Datatype::Int32 => modalkit_abi::Datatype::INT32,
        Datatype::Int64 => modalkit_abi::Datatype::INT64,
        Datatype::Fp16 => modalkit_abi::Datatype::FP16,
        Datatype::Bf16 => modalkit_abi::Datatype::BF16,
        Datatype::Fp32 => modalkit_abi::Datatype::FP32,
        Datatype::Fp64 => modalkit_abi::Datatype::FP64,
        Datatype::Bytes => modalkit_abi::Datatype::BYTES,
    }
}

pub(crate) fn level_of_plugins(level: LogLevel) -> modalkit_abi::LogLevel {
    match level {
        LogLevel::Off => modalkit_abi::LogLevel::OFF,
        LogLevel::Error => modalkit_abi::LogLevel::ERROR,
        LogLevel::Warn => modalkit_abi::LogLevel::WARN,
        LogLevel::Info => modalkit_abi::LogLevel::INFO,
        LogLevel::Debug => modalkit_abi::LogLevel::DEBUG,
        LogLevel::Trace => modalkit_abi::LogLevel::TRACE,
    }
}

pub(crate) fn level(level: modalkit_abi::LogLevel) -> LogLevel {
    match level {
        modalkit_abi::LogLevel::OFF => LogLevel::Off,
        modalkit_abi::LogLevel::ERROR => LogLevel::Error,
        modalkit_abi::LogLevel::WARN => LogLevel::Warn,
        modalkit_abi::LogLevel::INFO => LogLevel::Info,
        modalkit_abi::LogLevel::DEBUG => LogLevel::Debug,
        _ => LogLevel::Trace,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn given(datatype: modalkit_abi::Datatype, shape: &[u64], data: &[u8]) -> Result<Tensor, String> {
        let made = tensor(
            modalkit_abi::Tensor {
                name: "t".into(),
                datatype,
                shape: shape.to_vec().into(),
                data: Buffer::from_owner(data.to_vec()),
                parameters: Default::default(),
            },
            None,
        );
        made.map_err(|failure| failure.message)
    }

    #[test]
    fn a_plugins_tensor_is_what_it_says_or_its_items_failure() {
        let fp32 = modalkit_abi::Datatype::FP32;
        assert_eq!(given(fp32, &[2], &[0; 8]).unwrap().shape(), [2]);
        for (datatype, shape, data, expected) in [
            (modalkit_abi::Datatype(99), &[1][..], &[0; 4][..], "doesn't know the datatype 99"),
            (fp32, &[2], &[0; 7], "expected 8 bytes for FP32 and the shape [2], found 7"),
            (fp32, &[u64::MAX], &[], "larger than memory"),
            (modalkit_abi::Datatype::BYTES, &[1], &[9, 0, 0, 0], "expected 1 strings"),
            (modalkit_abi::Datatype::BOOL, &[1], &[7], "0 or 1"),
        ] {
            let said = given(datatype, shape, data).unwrap_err();
            assert!(said.starts_with("the plugin's tensor `t`: ") && said.contains(expected), "{said}");
        }
    }

    #[test]
    fn every_datatype_crosses_and_comes_back() {
        for datatype in Datatype::ALL {
            let data = vec![0; datatype.element_bytes().unwrap_or(4) as usize];
            let there = Tensor::new("t".into(), *datatype, vec![1], data.into()).unwrap();
            assert_eq!(tensor(tensor_of_plugins(&there), None).unwrap(), there);
        }
    }
}
