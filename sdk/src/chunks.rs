//! Chunks: parts of an item's output that its caller gets before the end. It knows neither how they are sent nor what is in them.

use modalkit_abi::{ChunkState, Interest};
use serde::Serialize;
use serde_json::Serializer;

use crate::{Outcome, PipelineError, finite::Finite};

/// Sends parts of outputs to callers who want them as they come (`POST /predict_stream`), by the item's place in the batch.
///
/// Callers who want the output whole, and jobs, get no chunks: for them sending costs next to nothing. An `Err` is about one item: it is that item's
/// outcome, and the others go on. [`crate::InferencePipeline::postprocess_stream`] has an example.
pub struct Chunks<'b> {
    listener: Option<&'b mut dyn Listener>,
    /// One chunk's JSON; kept, since there are many.
    json: Vec<u8>,
}

/// Who takes the chunks of a batch.
pub(crate) trait Listener {
    fn interest(&mut self, item: usize) -> Interest;
    fn chunk(&mut self, item: usize, json: &[u8], waits: bool) -> ChunkState;
}

impl<'b> Chunks<'b> {
    pub(crate) fn of(listener: &'b mut dyn Listener) -> Self {
        Self { listener: Some(listener), json: Vec::new() }
    }

    /// Goes nowhere: with it a pipeline's `postprocess` is its `postprocess_stream`.
    #[must_use]
    pub fn unwanted() -> Self {
        Self { listener: None, json: Vec::new() }
    }

    /// Whether the item's caller wants chunks. Only what it costs to make one is saved by asking: [`Chunks::send`] asks as well.
    pub fn are_wanted(&mut self, item: usize) -> bool {
        self.interest(item) == Interest::CHUNKS
    }

    /// Whether nobody waits for the item any more, whole or in chunks: what is left of it needn't be done.
    pub fn is_abandoned(&mut self, item: usize) -> bool {
        self.interest(item) == Interest::NOTHING
    }

    /// Sends a part of an item's output: whatever serde writes as JSON. It waits for a caller who reads slower than chunks come, and with it the whole
    /// batch waits; for how long, altogether, the host says (`stream_wait_seconds`).
    ///
    /// # Errors
    /// The item's outcome: nobody waits for it any more, or the chunk can't be written as JSON.
    pub fn send(&mut self, item: usize, chunk: &(impl Serialize + ?Sized)) -> Outcome<()> {
        self.put(item, chunk, true).map(drop)
    }

    /// As [`Chunks::send`], and never waits: `false` where the caller has no room for it now. What wasn't taken belongs into the next chunk.
    ///
    /// # Errors
    /// As [`Chunks::send`].
    pub fn try_send(&mut self, item: usize, chunk: &(impl Serialize + ?Sized)) -> Outcome<bool> {
        self.put(item, chunk, false)
    }

    fn interest(&mut self, item: usize) -> Interest {
        self.listener.as_mut().map_or(Interest::OUTCOME, |listener| listener.interest(item))
    }

    fn put(&mut self, item: usize, chunk: &(impl Serialize + ?Sized), waits: bool) -> Outcome<bool> {
        let interest = self.interest(item);
        let Some(listener) = self.listener.as_mut().filter(|_| interest == Interest::CHUNKS) else {
            return if interest == Interest::NOTHING { Err(abandoned()) } else { Ok(true) };
        };
        self.json.clear();
        Finite(chunk).serialize(&mut Serializer::new(&mut self.json)).map_err(|error| {
            PipelineError::permanent(format!("a chunk can't be written as JSON: {error}"))
        })?;
        match listener.chunk(item, &self.json, waits) {
            ChunkState::FULL => Ok(false),
            ChunkState::UNWANTED => Err(abandoned()),
            _ => Ok(true),
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

    impl Listener for Narrow {
        fn interest(&mut self, item: usize) -> Interest {
            if item == 0 { Interest::CHUNKS } else { Interest(999) }
        }

        fn chunk(&mut self, _: usize, json: &[u8], waits: bool) -> ChunkState {
            match (self.0.len(), waits) {
                (0, _) => self.0.push(String::from_utf8_lossy(json).into_owned()),
                (_, false) => return ChunkState::FULL,
                (_, true) => return ChunkState::UNWANTED,
            }
            ChunkState::TAKEN
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
        assert!(Chunks::unwanted().send(0, &f64::NAN).is_ok());
        assert!(narrow.0.is_empty());
    }
}
