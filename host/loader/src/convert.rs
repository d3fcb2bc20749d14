//! What crosses the boundary in the ABI's types, in the host's, and back.

use std::collections::BTreeMap;

use modalkit_abi::{Secret, abi_stable::std_types::RResult};
use modalkit_engine::{Failure, FailureKind, InputFault, LogLevel, PathSegment, Rejection};

/// A call's result, with the failure as the host knows it.
pub(crate) fn result<T>(result: RResult<T, modalkit_abi::Failure>) -> Result<T, Failure> {
    result.into_result().map_err(failure)
}

pub(crate) fn failure(failure: modalkit_abi::Failure) -> Failure {
    use modalkit_abi::FailureKind as Kind;
    let kind = match failure.kind {
        Kind::InvalidInput => FailureKind::InvalidInput,
        Kind::Permanent => FailureKind::Permanent,
        Kind::Transient => FailureKind::Transient,
        Kind::DeviceLost => FailureKind::DeviceLost,
        Kind::DeviceSuspected => FailureKind::DeviceSuspected,
        Kind::Panicked => FailureKind::Panicked,
    };
    Failure { kind, message: failure.message.into() }
}

pub(crate) fn rejection(rejection: modalkit_abi::Rejection) -> Rejection {
    match rejection {
        modalkit_abi::Rejection::Malformed { message } => Rejection::Malformed { message: message.into() },
        modalkit_abi::Rejection::Invalid { faults } => {
            let fault = |fault: modalkit_abi::InputFault| InputFault {
                path: fault.path.into_iter().map(segment).collect(),
                message: fault.message.into(),
            };
            Rejection::Invalid { faults: faults.into_iter().map(fault).collect() }
        }
        modalkit_abi::Rejection::Failed(failed) => Rejection::Failed(failure(failed)),
        modalkit_abi::Rejection::Busy => Rejection::Busy,
    }
}

fn segment(segment: modalkit_abi::PathSegment) -> PathSegment {
    match segment {
        modalkit_abi::PathSegment::Key(key) => PathSegment::Key(key.into()),
        modalkit_abi::PathSegment::Index(index) => PathSegment::Index(index),
    }
}

pub(crate) fn level_of_plugins(level: LogLevel) -> modalkit_abi::LogLevel {
    match level {
        LogLevel::Off => modalkit_abi::LogLevel::Off,
        LogLevel::Error => modalkit_abi::LogLevel::Error,
        LogLevel::Warn => modalkit_abi::LogLevel::Warn,
        LogLevel::Info => modalkit_abi::LogLevel::Info,
        LogLevel::Debug => modalkit_abi::LogLevel::Debug,
        LogLevel::Trace => modalkit_abi::LogLevel::Trace,
    }
}

pub(crate) fn level(level: modalkit_abi::LogLevel) -> LogLevel {
    match level {
        modalkit_abi::LogLevel::Off => LogLevel::Off,
        modalkit_abi::LogLevel::Error => LogLevel::Error,
        modalkit_abi::LogLevel::Warn => LogLevel::Warn,
        modalkit_abi::LogLevel::Info => LogLevel::Info,
        modalkit_abi::LogLevel::Debug => LogLevel::Debug,
        modalkit_abi::LogLevel::Trace => LogLevel::Trace,
    }
}

pub(crate) fn secrets(secrets: &BTreeMap<String, String>) -> Vec<Secret<'_>> {
    secrets
        .iter()
        .map(|(name, value)| Secret { name: name.as_str().into(), value: value.as_str().into() })
        .collect()
}
