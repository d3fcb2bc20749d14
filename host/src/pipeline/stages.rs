//! One batch through the plugin: its inputs decoded and validated where that is still to be done, the three stages with their times, and
//! what their outcomes say of the generation. It never knows lanes, nor who waits.

use std::time::Instant;

use modalkit_engine::{Decoded, Failure, FailureKind, Instance, Outcome, Payload};

use super::Generation;
use crate::work::JobError;

/// A job's input for this instance: decoded before, or now where another plugin did, and validated now where nobody could before.
pub(super) fn decoded_for(
    instance: &dyn Instance,
    decoded: Option<Decoded>,
    input: &Payload,
    generation: &Generation,
) -> Result<Decoded, JobError> {
    let decoded = match decoded.filter(|decoded| instance.owns(decoded)) {
        Some(decoded) => decoded,
        None => {
            let decoded = generation.plugin.decode(input);
            let decoded = decoded.map_err(|rejection| generation.rejected(rejection, input))?;
            generation.check_schema(input)?;
            decoded
        }
    };
    if !decoded.is_validated {
        instance.validate(&decoded).map_err(|rejection| generation.rejected(rejection, input))?;
    }
    Ok(decoded)
}

/// When stages ended.
#[derive(Default)]
pub(super) struct StageTimes {
    pub(super) preprocessed: Option<Instant>,
    pub(super) predicted: Option<Instant>,
}

pub(super) fn stages(
    instance: &dyn Instance,
    items: Vec<Decoded>,
    times: &mut StageTimes,
) -> Result<Vec<Outcome>, Failure> {
    let mut batch = instance.begin(items).expect("`decoded_for` made them all of this plugin");
    batch.preprocess()?;
    times.preprocessed = Some(Instant::now());
    batch.predict()?;
    times.predicted = Some(Instant::now());
    batch.postprocess()
}

/// Whether anything in a batch succeeded; failures that an input caused count as success.
pub(super) fn counts_as_healthy(outcomes: &Result<Vec<Outcome>, Failure>, waiters: usize) -> bool {
    let fit = |failure: &Failure| failure.kind == FailureKind::InvalidInput;
    match outcomes {
        Ok(outcomes) => {
            outcomes.len() == waiters
                && outcomes.iter().any(|outcome| outcome.as_ref().map_or_else(fit, |_| true))
        }
        Err(failure) => fit(failure),
    }
}

/// The failure of a batch whose plugin miscounts.
pub(super) fn wrong_count(expected: usize, found: usize) -> Failure {
    Failure {
        kind: FailureKind::Permanent,
        message: format!("the plugin returned {found} outcomes for a batch of {expected}"),
    }
}
