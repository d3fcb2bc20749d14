//! Chunks: parts of an item's output that its caller gets before the end. It knows neither how they are sent nor what is in them.

use modalkit_abi::{ChunkResult, Interest, WhenFull};
use serde::Serialize;
use serde_json::Serializer;

use crate::{Outcome, PipelineError, finite::Finite};

/// Sends parts of outputs to callers who want them as they come (`POST /predict_stream`), by the item's place in the batch.
///
/// Callers who want the output whole, and jobs, get no chunks: for them sending costs next to nothing. An `Err` is about one item: put it in the place of
/// that item's outcome, and go on with the others. (Returned for the whole batch, it fails the neighbours as well.)
/// [`crate::InferencePipeline::postprocess_stream`] has an example.
pub struct Chunks<'b> {
    sink: Option<&'b mut dyn ChunkSink>,
    /// One chunk's JSON; kept, since there are many.
    json: Vec<u8>,
}

/// Who takes the chunks of a batch.
pub(crate) trait ChunkSink: Send {
    fn interest(&mut self, item: usize) -> Interest;
    fn chunk(&mut self, item: usize, json: &[u8], when_full: WhenFull) -> ChunkResult;
}

impl<'b> Chunks<'b> {
    pub(crate) fn of(sink: &'b mut dyn ChunkSink) -> Self {
        Self { sink: Some(sink), json: Vec::new() }
    }

    /// Chunks that go nowhere: with them a pipeline's `postprocess` is its `postprocess_stream`.
    #[must_use]
    pub fn discarding() -> Self {
        Self { sink: None, json: Vec::new() }
    }

    /// Made by [`Chunks::discarding`].
    pub(crate) fn are_discarded(&self) -> bool {
        self.sink.is_none()
    }

    /// Whether the item's caller wants chunks. [`Chunks::send`] asks as well: only what it costs to make one is saved.
    pub fn are_wanted(&mut self, item: usize) -> bool {
        self.interest(item) == Interest::CHUNKS
    }

    /// Whether nobody waits for the item any more, whole or in chunks: what is left of it needn't be done.
    pub fn is_abandoned(&mut self, item: usize) -> bool {
        self.interest(item) == Interest::NOTHING
    }

    /// Sends a part of an item's output: whatever serde writes as JSON. Where its caller has not read what came before, it waits, and with it the
    /// whole batch, until that caller reads, leaves, or is cut off (`stream_wait_seconds`).
    ///
    /// # Errors
    /// The item's outcome: nobody waits for it any more, or the chunk can't be written as JSON.
    pub fn send(&mut self, item: usize, chunk: &(impl Serialize + ?Sized)) -> Outcome<()> {
        match self.put(item, chunk, WhenFull::WAIT)? {
            true => Ok(()),
            false => Err(PipelineError::permanent("the host neither took a chunk nor gave its caller up")),
        }
    }

    /// As [`Chunks::send`], and never waits: `false` where the caller has no room for it now. What wasn't taken belongs into the next chunk.
    ///
    /// # Errors
    /// As [`Chunks::send`].
    pub fn try_send(&mut self, item: usize, chunk: &(impl Serialize + ?Sized)) -> Outcome<bool> {
        self.put(item, chunk, WhenFull::RETURN)
    }

    fn interest(&mut self, item: usize) -> Interest {
        self.sink.as_mut().map_or(Interest::OUTCOME, |sink| sink.interest(item))
    }

    fn put(&mut self, item: usize, chunk: &(impl Serialize + ?Sized), when_full: WhenFull) -> Outcome<bool> {
        let interest = self.interest(item);
        let Some(sink) = self.sink.as_mut().filter(|_| interest == Interest::CHUNKS) else {
            return if interest == Interest::NOTHING { Err(abandoned()) } else { Ok(true) };
        };
        self.json.clear();
        Finite(chunk).serialize(&mut Serializer::new(&mut self.json)).map_err(|error| {
            PipelineError::permanent(format!("a chunk can't be written as JSON: {error}"))
        })?;
        match sink.chunk(item, &self.json, when_full) {
            ChunkResult::TAKEN => Ok(true),
            ChunkResult::FULL => Ok(false),
            _ => Err(abandoned()),
        }
    }
}

fn abandoned() -> PipelineError {
    PipelineError::transient("nobody waits for this item any more")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Has room for one chunk.
    struct Narrow(Vec<String>);

    impl ChunkSink for Narrow {
        fn interest(&mut self, item: usize) -> Interest {
            if item == 0 { Interest::CHUNKS } else { Interest(999) }
        }

        fn chunk(&mut self, _: usize, json: &[u8], when_full: WhenFull) -> ChunkResult {
            match (self.0.len(), when_full) {
                (0, _) => self.0.push(String::from_utf8_lossy(json).into_owned()),
                (_, WhenFull::RETURN) => return ChunkResult::FULL,
                _ => return ChunkResult::UNWANTED,
            }
            ChunkResult::TAKEN
        }
    }

    #[test]
    fn a_caller_without_room_is_told_of_and_one_that_was_waited_for_in_vain_is_an_error() {
        let mut narrow = Narrow(Vec::new());
        let mut chunks = Chunks::of(&mut narrow);
        assert!(chunks.try_send(0, "a\n").unwrap());
        assert!(!chunks.try_send(0, "b").unwrap());
        assert!(chunks.send(0, "b").unwrap_err().is_retryable());
        assert_eq!(narrow.0, [r#""a\n""#]);
    }

    #[test]
    fn what_is_no_json_is_its_items_error_and_nothing_is_written_for_who_wants_no_chunks() {
        let mut narrow = Narrow(Vec::new());
        let mut chunks = Chunks::of(&mut narrow);
        let error = chunks.send(0, &[1.0, f64::NAN]).unwrap_err().to_string();
        assert!(error.contains("a chunk can't be written as JSON: expected a finite number"), "{error}");
        assert!(chunks.send(1, &f64::NAN).is_ok() && !chunks.are_wanted(1) && !chunks.is_abandoned(1));
        assert!(Chunks::discarding().send(0, &f64::NAN).is_ok());
        assert!(narrow.0.is_empty());
    }
}
