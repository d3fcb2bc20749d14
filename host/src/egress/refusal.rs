//! Why a call of the Open Inference Protocol beside inference has no answer. What that is over HTTP is said here; over gRPC, by its sibling.

use hyper::StatusCode;
use serde_json::json;

use super::{HttpResponse, control_error, denied, error, object_response};
use crate::{access::AccessError, reload::ControlError, work::JobError};

/// Why there is no answer.
#[derive(Debug)]
pub enum Refusal {
    /// The model or the input isn't there, or isn't right.
    Job(JobError),
    /// The caller isn't let in.
    Denied(AccessError),
    /// The reload loop didn't do it.
    Control(ControlError),
    /// What was to be loaded wasn't taken.
    NotTaken(String),
    /// This host doesn't have that.
    Unsupported(String),
}

impl From<JobError> for Refusal {
    fn from(error: JobError) -> Self {
        Self::Job(error)
    }
}

impl Refusal {
    /// The answer over HTTP.
    #[must_use]
    pub fn into_response(self) -> HttpResponse {
        match self {
            Self::Job(job_error) => error(&job_error),
            Self::Denied(access) => denied(&access),
            Self::Control(control) => control_error(&control),
            Self::NotTaken(why) => object_response(StatusCode::CONFLICT, &json!({"detail": why})),
            Self::Unsupported(why) => object_response(StatusCode::NOT_IMPLEMENTED, &json!({"detail": why})),
        }
    }
}
