//! One batch through the plugin: its inputs decoded and validated where that is still to be done, the three stages with their times, the
//! outcomes put in order, and what they say of the generation. It never knows lanes, nor who waits.

use std::time::Instant;

use modalkit_engine::{Decoded, Failure, FailureKind, Instance, Outcome, OutcomeSink, Payload};

use super::Generation;
use crate::work::JobError;

/// A job's input for this instance: decoded before, or now where another plugin did, and validated now where nobody could before.
pub(super) fn decoded_for(
    instance: &dyn Instance,
    decoded: Option<Decoded>,
    input: &Payload,
    generation: &Generation,
) -> Result<Decoded, JobError> {
    let mut decoded = match decoded.filter(|decoded| instance.owns(decoded)) {
        Some(decoded) => decoded,
        None => {
            let decoded = generation.plugin.decode(input);
            let decoded = decoded.map_err(|rejection| generation.rejected(rejection, input))?;
            generation.check_schema(input)?;
            decoded
        }
    };
    if !decoded.is_validated {
        let measure =
            instance.validate(&decoded).map_err(|rejection| generation.rejected(rejection, input))?;
        (decoded.measure, decoded.is_validated) = (measure, true);
    }
    Ok(decoded)
}

/// When stages ended.
#[derive(Default)]
pub(super) struct StageTimes {
    pub(super) preprocessed: Option<Instant>,
    pub(super) predicted: Option<Instant>,
}

/// The outcomes of one batch as they come, by item.
struct Outcomes {
    by_item: Vec<Option<Outcome>>,
    /// Outcomes of items that are none, or that had theirs.
    strays: usize,
}

impl Outcomes {
    fn of(items: usize) -> Self {
        Self { by_item: std::iter::repeat_with(|| None).take(items).collect(), strays: 0 }
    }

    /// One for each item, in order.
    ///
    /// # Errors
    /// The plugin has miscounted.
    fn in_order(self) -> Result<Vec<Outcome>, Failure> {
        let expected = self.by_item.len();
        let found = self.by_item.iter().flatten().count() + self.strays;
        let outcomes: Vec<Outcome> = self.by_item.into_iter().flatten().collect();
        if outcomes.len() == expected && found == expected {
            return Ok(outcomes);
        }
        Err(Failure {
            kind: FailureKind::Permanent,
            message: match (self.strays, expected - outcomes.len()) {
                (0, _) => format!("the plugin returned {found} outcomes for a batch of {expected}"),
                (strays, missing) => format!(
                    "the plugin returned {found} outcomes for a batch of {expected}: {strays} of them of items that had one or are none, and {missing} items have none"
                ),
            },
        })
    }
}

impl OutcomeSink for Outcomes {
    fn end(&mut self, item: usize, outcome: Outcome) {
        match self.by_item.get_mut(item) {
            Some(place @ None) => *place = Some(outcome),
            Some(Some(_)) | None => self.strays += 1,
        }
    }
}

/// Runs the stages. One outcome for each item, in order.
///
/// # Errors
/// What fails the whole batch.
pub(super) fn stages(
    instance: &dyn Instance,
    items: Vec<Decoded>,
    times: &mut StageTimes,
) -> Result<Vec<Outcome>, Failure> {
    let mut outcomes = Outcomes::of(items.len());
    let mut batch = instance.begin(items).expect("`decoded_for` made them all of this plugin");
    batch.preprocess()?;
    times.preprocessed = Some(Instant::now());
    batch.predict()?;
    times.predicted = Some(Instant::now());
    batch.postprocess(&mut outcomes)?;
    outcomes.in_order()
}

/// Whether anything in a batch succeeded; failures that an input caused count as success.
pub(super) fn counts_as_healthy(outcomes: &Result<Vec<Outcome>, Failure>) -> bool {
    let fit = |failure: &Failure| failure.kind == FailureKind::InvalidInput;
    match outcomes {
        Ok(outcomes) => outcomes.iter().any(|outcome| outcome.as_ref().map_or_else(fit, |_| true)),
        Err(failure) => fit(failure),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ends(items: usize, given: &[usize]) -> Result<Vec<Outcome>, Failure> {
        let mut outcomes = Outcomes::of(items);
        for item in given {
            outcomes.end(*item, Ok(Payload::Json(item.to_string().into())));
        }
        outcomes.in_order()
    }

    #[test]
    fn outcomes_stand_in_the_order_of_the_items_whichever_came_first() {
        let outcomes = ends(3, &[2, 0, 1]).unwrap();
        let texts: Vec<&[u8]> =
            outcomes.iter().map(|outcome| &**outcome.as_ref().unwrap().json().unwrap()).collect();
        assert_eq!(texts, [b"0", b"1", b"2"]);
    }

    #[test]
    fn an_item_without_an_outcome_or_with_two_or_that_is_none_fails_the_batch() {
        for (given, found) in [(&[0][..], 1), (&[0, 0], 2), (&[0, 1, 1], 3), (&[0, 1, 2], 3), (&[], 0)] {
            let failure = ends(2, given).err().unwrap();
            let said = format!("returned {found} outcomes for a batch of 2");
            assert!(failure.message.contains(&said), "{given:?}: {}", failure.message);
        }
    }
}
