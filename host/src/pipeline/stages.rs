//! One batch through the plugin: its inputs decoded and validated where that is still to be done, the three stages with their times, the
//! outcomes put in order, and what they say of the generation. It never knows lanes, nor who waits.

use std::time::Instant;

use modalkit_engine::{
    Checked, ChunkResult, Decoded, EventSink, Failure, FailureKind, Instance, Interest, Outcome, Payload,
    Rejection,
};

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
    // What was not looked at at all is, where it runs.
    if decoded.checked == Checked::Parsed {
        let measure = instance.validate(&[&decoded]).pop().unwrap_or(Err(Rejection::Busy));
        decoded.measure = measure.map_err(|rejection| generation.rejected(rejection, input))?;
        decoded.checked = Checked::Validated;
    }
    Ok(decoded)
}

/// When stages ended.
#[derive(Default)]
pub(super) struct StageTimes {
    pub(super) preprocessed: Option<Instant>,
    pub(super) predicted: Option<Instant>,
    /// The cost of the inputs together, where only who ran them knows it.
    pub(super) cost: Option<u64>,
}

/// What became of an item.
#[derive(Debug)]
pub(super) enum Ended {
    Outcome(Outcome),
    /// It turned out to be no input.
    Rejected(Rejection),
}

impl Ended {
    pub(super) fn failure(&self) -> Option<&Failure> {
        match self {
            Self::Outcome(Err(failure)) | Self::Rejected(Rejection::Failed(failure)) => Some(failure),
            Self::Outcome(Ok(_)) | Self::Rejected(_) => None,
        }
    }

    pub(super) fn failure_mut(&mut self) -> Option<&mut Failure> {
        match self {
            Self::Outcome(Err(failure)) | Self::Rejected(Rejection::Failed(failure)) => Some(failure),
            Self::Outcome(Ok(_)) | Self::Rejected(_) => None,
        }
    }
}

/// Who waits for the items of a batch, by their place in it.
pub(super) trait Callers: Send {
    /// What is wanted of an item now.
    fn interest(&self, item: usize) -> Interest;
    /// A part of an item's output, as [`EventSink::chunk`] has it.
    fn chunk(&mut self, item: usize, json: &[u8], waits: bool) -> ChunkResult;
    /// The batch is under way: time for what need not be done before.
    fn are_waiting(&mut self) {}
}

/// The host itself asks, for the outcome.
pub(super) struct NoCallers;

impl Callers for NoCallers {
    fn interest(&self, _: usize) -> Interest {
        Interest::Outcome
    }

    fn chunk(&mut self, _: usize, _: &[u8], _: bool) -> ChunkResult {
        ChunkResult::Taken
    }
}

/// What comes of one batch.
struct Events<'c> {
    by_item: Vec<Progress>,
    /// Outcomes of items that are none, or that had theirs.
    strays: usize,
    callers: &'c mut dyn Callers,
}

/// Where an item stands.
enum Progress {
    Open,
    /// The plugin was told that nobody wants it any more, so that it may end as it likes.
    Unwanted,
    Ended(Ended),
}

impl<'c> Events<'c> {
    fn of(items: usize, callers: &'c mut dyn Callers) -> Self {
        let by_item = std::iter::repeat_with(|| Progress::Open).take(items).collect();
        Self { by_item, strays: 0, callers }
    }

    fn are_all_unwanted(&self) -> bool {
        self.by_item.iter().all(|item| matches!(item, Progress::Unwanted))
    }

    /// One for each item, in order.
    ///
    /// # Errors
    /// The plugin has miscounted.
    fn in_order(self) -> Result<Vec<Ended>, Failure> {
        let expected = self.by_item.len();
        let ended = |item: Progress| match item {
            Progress::Ended(ended) => Some(ended),
            Progress::Unwanted => Some(Ended::Outcome(Err(unwanted()))),
            Progress::Open => None,
        };
        let outcomes: Vec<Ended> = self.by_item.into_iter().filter_map(ended).collect();
        let found = outcomes.len() + self.strays;
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

impl EventSink for Events<'_> {
    fn interest(&mut self, item: usize) -> Interest {
        let Some(place @ Progress::Open) = self.by_item.get_mut(item) else { return Interest::Nothing };
        let interest = self.callers.interest(item);
        if interest == Interest::Nothing {
            *place = Progress::Unwanted;
        }
        interest
    }

    fn chunk(&mut self, item: usize, json: &[u8], waits: bool) -> ChunkResult {
        let Some(place @ Progress::Open) = self.by_item.get_mut(item) else { return ChunkResult::Unwanted };
        let state = self.callers.chunk(item, json, waits);
        if state == ChunkResult::Unwanted {
            *place = Progress::Unwanted;
        }
        state
    }

    fn end(&mut self, item: usize, outcome: Outcome) {
        match self.by_item.get_mut(item) {
            Some(Progress::Ended(_)) | None => self.strays += 1,
            Some(place @ Progress::Open) => *place = Progress::Ended(Ended::Outcome(outcome)),
            // A device that is lost is lost to all others as well.
            Some(place @ Progress::Unwanted) => {
                let kept = |failure| if is_of_device(&failure) { failure } else { unwanted() };
                *place = Progress::Ended(Ended::Outcome(outcome.map_err(kept)));
            }
        }
    }

    fn reject(&mut self, item: usize, rejection: Rejection) {
        match self.by_item.get_mut(item) {
            Some(Progress::Ended(_)) | None => self.strays += 1,
            Some(place) => *place = Progress::Ended(Ended::Rejected(rejection)),
        }
    }
}

/// Whether a failure has to do with the device, or is said to.
pub(super) fn is_of_device(failure: &Failure) -> bool {
    matches!(failure.kind, FailureKind::DeviceLost | FailureKind::DeviceSuspected)
}

pub(super) fn unwanted() -> Failure {
    Failure { kind: FailureKind::Unwanted, message: "nobody waited for it any more".into() }
}

/// Runs the stages. One outcome for each item, in order.
///
/// # Errors
/// What fails the whole batch.
pub(super) fn stages(
    instance: &dyn Instance,
    items: Vec<Decoded>,
    times: &mut StageTimes,
    callers: &mut dyn Callers,
) -> Result<Vec<Ended>, Failure> {
    let begun = Instant::now();
    let count = items.len();
    let mut batch = instance.begin(items).expect("`decoded_for` made them all of this plugin");
    batch.preprocess()?;
    callers.are_waiting();
    let mut events = Events::of(count, callers);
    times.preprocessed = Some(Instant::now());
    batch.predict()?;
    times.predicted = Some(Instant::now());
    let postprocessed = batch.postprocess(&mut events);
    if let Some(measured) = batch.measured() {
        // They ran elsewhere, one after the other; the way there counts as the last one's.
        let [preprocess, predict, _] = measured.stages;
        times.preprocessed = Some(begun + preprocess);
        times.predicted = Some(begun + preprocess + predict);
        times.cost = Some(measured.cost);
    }
    match postprocessed {
        // The error of an item that nobody wants, taken for that of the batch.
        Err(failure) if events.are_all_unwanted() && failure.kind == FailureKind::Transient => {
            Ok(events.by_item.iter().map(|_| Ended::Outcome(Err(unwanted()))).collect())
        }
        Err(failure) => Err(failure),
        Ok(()) => events.in_order(),
    }
}

/// Whether a failure is none of the pipeline's: its input was to blame, or nobody wanted the item any more.
pub(super) fn is_no_fault(failure: &Failure) -> bool {
    matches!(failure.kind, FailureKind::InvalidInput | FailureKind::Unwanted)
}

/// Whether anything in a batch succeeded, of what somebody wanted; failures that an input caused count as success. `None` where nobody wanted any of it.
pub(super) fn counts_as_healthy<'e>(ends: impl Iterator<Item = &'e Ended>) -> Option<bool> {
    let is_unwanted =
        |ended: &&Ended| ended.failure().is_some_and(|failure| failure.kind == FailureKind::Unwanted);
    let mut wanted = ends.filter(|ended| !is_unwanted(ended)).peekable();
    wanted.peek()?;
    Some(wanted.any(|ended| ended.failure().is_none_or(is_no_fault)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ends(items: usize, given: &[usize]) -> Result<Vec<Ended>, Failure> {
        let mut callers = NoCallers;
        let mut events = Events::of(items, &mut callers);
        for item in given {
            events.end(*item, Ok(Payload::Json(item.to_string().into())));
        }
        events.in_order()
    }

    /// The caller of item 1 leaves after a chunk.
    struct Leaving(usize);

    impl Callers for Leaving {
        fn interest(&self, item: usize) -> Interest {
            if item == 1 && self.0 > 0 { Interest::Nothing } else { Interest::Chunks }
        }

        fn chunk(&mut self, _: usize, _: &[u8], _: bool) -> ChunkResult {
            self.0 += 1;
            ChunkResult::Taken
        }
    }

    #[test]
    fn an_item_that_was_given_up_since_nobody_wanted_it_is_no_fault_and_another_is() {
        let failed = || Err(Failure { kind: FailureKind::Permanent, message: "no luck".into() });
        let mut callers = Leaving(0);
        let mut events = Events::of(2, &mut callers);
        assert_eq!(events.chunk(1, b"1", true), ChunkResult::Taken);
        assert_eq!(events.interest(1), Interest::Nothing);
        assert_eq!(events.chunk(1, b"2", true), ChunkResult::Unwanted);
        assert_eq!(events.interest(0), Interest::Chunks);
        for item in [0, 1] {
            events.end(item, failed());
            assert_eq!((events.interest(item), events.interest(7)), (Interest::Nothing, Interest::Nothing));
        }
        let outcomes = events.in_order().unwrap();
        let kinds: Vec<FailureKind> = outcomes.iter().map(|ended| ended.failure().unwrap().kind).collect();
        assert_eq!(kinds, [FailureKind::Permanent, FailureKind::Unwanted]);
        assert_eq!(counts_as_healthy(outcomes.iter()), Some(false), "the other one's failure is what counts");
        let rejected = Ended::Rejected(Rejection::Malformed { message: "no luck".into() });
        assert_eq!(counts_as_healthy(outcomes.iter().chain([&rejected])), Some(true), "an input is to blame");
        // One without an outcome, and one whose device is lost.
        let lost = || Err(Failure { kind: FailureKind::DeviceLost, message: "no luck".into() });
        for (outcome, kind) in [(None, FailureKind::Unwanted), (Some(lost()), FailureKind::DeviceLost)] {
            let mut callers = Leaving(1);
            let mut events = Events::of(2, &mut callers);
            assert_eq!(events.interest(1), Interest::Nothing);
            events.end(0, Ok(Payload::Json("{}".into())));
            outcome.into_iter().for_each(|outcome| events.end(1, outcome));
            assert_eq!(events.in_order().unwrap()[1].failure().unwrap().kind, kind);
        }
        assert_eq!(counts_as_healthy([&Ended::Outcome(Err(unwanted()))].into_iter()), None);
    }

    #[test]
    fn outcomes_stand_in_the_order_of_the_items_whichever_came_first() {
        let outcomes = ends(3, &[2, 0, 1]).unwrap();
        let text = |ended: Ended| match ended {
            Ended::Outcome(Ok(Payload::Json(json))) => json,
            other => panic!("expected an output, found {other:?}"),
        };
        let texts: Vec<_> = outcomes.into_iter().map(text).collect();
        assert_eq!(texts, ["0", "1", "2"]);
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
