//! What one generation has done, in sums: inputs that were answered, how long they waited, what the stages took, and the same by the size of their batch.
//! Clients of the Open Inference Protocol ask for it, and take the differences of two looks. It never judges anything.

use std::{collections::BTreeMap, time::Duration};

use modalkit_journal::unix_ms;
use parking_lot::Mutex;

/// The sums of one generation, added to once a batch.
#[derive(Default)]
pub struct InferenceStats(Mutex<InferenceTotals>);

/// The sums at one moment.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct InferenceTotals {
    /// When the last batch ended, in milliseconds since 1970; 0 before the first.
    pub last_ms: u64,
    /// Inputs that were answered, from their arrival to their answer.
    pub succeeded: Total,
    /// Inputs that their batch gave an error, likewise; not those of a batch that hung, or whose process died.
    pub failed: Total,
    /// How long inputs waited for their batch.
    pub queue: Total,
    /// What the three stages took, of each input of a batch that went through them.
    pub stages: [Total; 3],
    /// Batches that went through the stages, by how many inputs they had, and what each stage took of them.
    pub by_size: BTreeMap<usize, [Total; 3]>,
}

/// A number of times, and all of them together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Total {
    /// How many.
    pub count: u64,
    /// Together.
    pub time: Duration,
}

/// What one batch adds.
#[derive(Default)]
pub(super) struct BatchTotals {
    pub(super) succeeded: Total,
    pub(super) failed: Total,
    pub(super) queue: Total,
    /// Its inputs, and what each stage took; `None` where it failed as a whole.
    pub(super) stages: Option<(usize, [Duration; 3])>,
}

impl Total {
    pub(super) fn add(&mut self, time: Duration) {
        self.add_all(1, time);
    }

    fn add_all(&mut self, count: u64, time: Duration) {
        self.count += count;
        self.time += time;
    }
}

impl InferenceStats {
    /// The sums now.
    #[must_use]
    pub fn totals(&self) -> InferenceTotals {
        self.0.lock().clone()
    }

    /// An input turned out to be none when its batch began.
    pub(super) fn add_refused(&self, time: Duration) {
        self.0.lock().failed.add(time);
    }

    pub(super) fn add(&self, batch: &BatchTotals) {
        let mut totals = self.0.lock();
        let totals = &mut *totals;
        totals.last_ms = unix_ms();
        for (all, one) in [
            (&mut totals.succeeded, batch.succeeded),
            (&mut totals.failed, batch.failed),
            (&mut totals.queue, batch.queue),
        ] {
            all.add_all(one.count, one.time);
        }
        let Some((size, stages)) = batch.stages else { return };
        let of_size = totals.by_size.entry(size).or_default();
        for ((all, of_size), time) in totals.stages.iter_mut().zip(of_size).zip(stages) {
            all.add_all(size as u64, time * size as u32);
            of_size.add(time);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_counts_once_by_its_size_and_for_each_of_its_inputs() {
        let stats = InferenceStats::default();
        let ms = Duration::from_millis;
        let total = |count, time| Total { count, time: ms(time) };
        let stages = Some((3, [ms(1), ms(2), ms(3)]));
        stats.add(&BatchTotals { succeeded: total(2, 20), failed: total(1, 9), queue: total(3, 6), stages });
        stats.add(&BatchTotals { failed: total(1, 5), queue: total(1, 1), ..BatchTotals::default() });
        let totals = stats.totals();
        assert_eq!(
            (totals.succeeded, totals.failed, totals.queue),
            (total(2, 20), total(2, 14), total(4, 7))
        );
        assert_eq!(totals.stages, [total(3, 3), total(3, 6), total(3, 9)]);
        assert_eq!(totals.by_size, BTreeMap::from([(3, [total(1, 1), total(1, 2), total(1, 3)])]));
        assert!(totals.last_ms > 0);
    }
}
