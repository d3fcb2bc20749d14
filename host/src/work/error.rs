//! What can become of a job beside an answer, and what is wrong with an input. It never knows statuses.

use std::{borrow::Cow, time::Duration};

use modalkit_engine::{Failure, FailureKind};
use serde::Serialize;

/// Why a job has no answer; each variant asks something else of the caller.
#[derive(Clone, Debug)]
pub enum JobError {
    /// The input isn't what the pipeline takes: correct it.
    Invalid(Vec<Detail>),
    /// No such model: choose one of these.
    UnknownModel {
        /// What was asked for; `None` where the request had to say and did not.
        name: Option<String>,
        /// The models there are.
        known: Vec<String>,
    },
    /// No such version of the model serves: ask for this one, or for none.
    UnknownVersion {
        /// The model.
        model: String,
        /// What was asked for.
        version: String,
        /// The one that serves.
        serving: u64,
    },
    /// More than the host ever takes: send less.
    TooLarge(String),
    /// Something else was sent under the same name: choose another name.
    Conflict(String),
    /// The queue has no room, or too many requests are in flight: come back.
    Busy(&'static str),
    /// The model or the host isn't ready: come back.
    Unavailable(String),
    /// The deadline passed.
    DeadlinePassed,
    /// The batch overran `batch_timeout_seconds`.
    BatchTimedOut(Duration),
    /// It overran `batch_timeout_seconds` with nothing beside it: it does so again.
    HungAlone(Duration),
    /// The caller read none of its chunks for as long as a batch waits for that.
    StoppedReading(Duration),
    /// The pipeline failed.
    Failed(Failure),
    /// A part of the host broke its contract.
    Lost,
}

/// One thing that is wrong with an input, in the form pydantic made common.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Detail {
    /// Where: `"body"`, then members and indices.
    pub loc: Vec<Location>,
    /// What was expected and found.
    pub msg: String,
    /// A short name for the kind of error.
    #[serde(rename = "type")]
    pub kind: Cow<'static, str>,
}

/// One step of a [`Detail::loc`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Location {
    /// A member's name.
    Key(String),
    /// An element's index.
    Index(u64),
}

impl From<&str> for Location {
    fn from(key: &str) -> Self {
        Self::Key(key.to_owned())
    }
}

impl JobError {
    /// Whether another attempt may help: never where the input is to blame.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Failed(failure) => match failure.kind {
                FailureKind::Transient
                | FailureKind::DeviceLost
                | FailureKind::DeviceSuspected
                | FailureKind::NeverBegan
                | FailureKind::Panicked => true,
                FailureKind::InvalidInput
                | FailureKind::Permanent
                | FailureKind::Died
                | FailureKind::Unwanted => false,
            },
            Self::BatchTimedOut(_) | Self::Lost | Self::Unavailable(_) | Self::Busy(_) => true,
            Self::Invalid(_)
            | Self::UnknownModel { .. }
            | Self::UnknownVersion { .. }
            | Self::TooLarge(_)
            | Self::Conflict(_)
            | Self::DeadlinePassed
            | Self::HungAlone(_)
            | Self::StoppedReading(_) => false,
        }
    }

    /// The same error of an input that stands behind these steps.
    #[must_use]
    pub fn inside(self, steps: &[Location]) -> Self {
        match self {
            Self::Invalid(details) => {
                Self::Invalid(details.into_iter().map(|detail| detail.inside(steps)).collect())
            }
            other => other,
        }
    }
}

impl Detail {
    /// The same, one level deeper: behind these steps after `"body"`.
    #[must_use]
    pub fn inside(mut self, steps: &[Location]) -> Self {
        let position = self.loc.len().min(1);
        self.loc.splice(position..position, steps.iter().cloned());
        self
    }
}
