//! Errors as statuses of gRPC. It never knows how they came about.

use modalkit_engine::FailureKind;
use tonic::{Code, Status, metadata::MetadataMap};

use super::{GOING, RETRY_AFTER_TIME, Refusal};
use crate::{access::AccessError, protocol::describe_whole, reload::ControlError, work::JobError};

/// After how many milliseconds a caller should come back.
const RETRY_PUSHBACK: &str = "grpc-retry-pushback-ms";

/// A job's error.
#[must_use]
pub fn job_status(job_error: &JobError) -> Status {
    let code = match job_error {
        JobError::Invalid(_) => Code::InvalidArgument,
        JobError::UnknownModel { .. } | JobError::UnknownVersion { .. } => Code::NotFound,
        JobError::TooLarge(_) => Code::OutOfRange,
        JobError::Conflict(_) => Code::AlreadyExists,
        JobError::Busy(_) => Code::ResourceExhausted,
        JobError::Unavailable(_) => Code::Unavailable,
        JobError::StoppedReading(_) => Code::Aborted,
        JobError::DeadlinePassed | JobError::BatchTimedOut(_) | JobError::HungAlone(_) => {
            Code::DeadlineExceeded
        }
        JobError::Failed(failure) => match failure.kind {
            FailureKind::InvalidInput => Code::InvalidArgument,
            FailureKind::DeviceLost => Code::Unavailable,
            _ => Code::Internal,
        },
        JobError::Lost => Code::Internal,
    };
    let retry = matches!(code, Code::ResourceExhausted | Code::Unavailable);
    with_retry(code, describe_whole(job_error), retry.then_some(RETRY_AFTER_TIME.as_millis() as u64))
}

/// Why a caller wasn't let in.
#[must_use]
pub fn denied_status(access: &AccessError) -> Status {
    let retry_ms = RETRY_AFTER_TIME.as_millis() as u64;
    let (code, retry) = match access {
        AccessError::Missing { .. } | AccessError::Wrong { .. } => (Code::Unauthenticated, None),
        AccessError::NoManagement { .. } => (Code::PermissionDenied, None),
        AccessError::TooOften(wait) => (Code::ResourceExhausted, Some(wait.as_millis() as u64 + 1)),
        AccessError::TooMany => (Code::ResourceExhausted, Some(retry_ms)),
        AccessError::Unknown => (Code::Unavailable, Some(retry_ms)),
    };
    with_retry(code, access.to_string(), retry)
}

fn with_retry(code: Code, message: String, retry_ms: Option<u64>) -> Status {
    let Some(retry_ms) = retry_ms else { return Status::new(code, message) };
    let mut metadata = MetadataMap::new();
    metadata.insert(RETRY_PUSHBACK, retry_ms.into());
    Status::with_metadata(code, message, metadata)
}

impl Refusal {
    /// The status over gRPC.
    #[must_use]
    pub fn into_status(self) -> Status {
        match self {
            Self::Job(job_error) => job_status(&job_error),
            Self::Denied(access) => denied_status(&access),
            Self::Control(ControlError::Unknown { name, known }) => {
                job_status(&JobError::UnknownModel { name: Some(name), known })
            }
            Self::Control(ControlError::Configured(name)) => Status::failed_precondition(format!(
                "expected a model without an entry in the configuration; take {name} out of model_settings.model_entries instead"
            )),
            Self::Control(ControlError::Bucket { volume, why }) => {
                Status::unavailable(format!("the bucket of {volume:?} can't be mirrored now: {why}"))
            }
            Self::Control(ControlError::Stopping) => job_status(&JobError::Unavailable(GOING.into())),
            Self::NotTaken(why) => Status::failed_precondition(why),
            Self::Unsupported(why) => Status::unimplemented(why),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use modalkit_engine::Failure;

    use super::*;

    #[test]
    fn each_error_has_its_code_and_those_that_pass_say_when_to_come_back() {
        let failed = |kind| JobError::Failed(Failure { kind, message: "no luck".into() });
        let table = [
            (JobError::Invalid(Vec::new()), Code::InvalidArgument),
            (JobError::UnknownModel { name: None, known: Vec::new() }, Code::NotFound),
            (JobError::TooLarge(String::new()), Code::OutOfRange),
            (JobError::Busy("full"), Code::ResourceExhausted),
            (JobError::Unavailable(String::new()), Code::Unavailable),
            (JobError::DeadlinePassed, Code::DeadlineExceeded),
            (JobError::BatchTimedOut(Duration::ZERO), Code::DeadlineExceeded),
            (failed(FailureKind::InvalidInput), Code::InvalidArgument),
            (failed(FailureKind::Panicked), Code::Internal),
            (failed(FailureKind::DeviceLost), Code::Unavailable),
            (JobError::Lost, Code::Internal),
        ];
        for (error, code) in table {
            let status = job_status(&error);
            assert_eq!(status.code(), code, "{error:?}");
            let passes =
                matches!(error, JobError::Busy(_) | JobError::Unavailable(_)) || code == Code::Unavailable;
            assert_eq!(status.metadata().contains_key(RETRY_PUSHBACK), passes, "{error:?}");
        }
        let wait = denied_status(&AccessError::TooOften(Duration::from_millis(250)));
        assert_eq!(wait.metadata().get(RETRY_PUSHBACK).unwrap(), "251");
    }
}
