//! Statistics of one generation: batches, failures and a histogram of their times, counted by its lanes without a lock. On probation,
//! they are compared with those of the generation before. It never knows what follows from a failed probation.

use std::{
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::config::Probation;

/// Each power of two of microseconds has this many buckets: a percentile is exact to a fifth.
const BUCKETS_PER_DOUBLING: u32 = 4;
/// Up to 2^40 µs, twelve days.
const BUCKETS: usize = 40 * BUCKETS_PER_DOUBLING as usize;

/// The counters of one generation.
pub struct BatchStats {
    batches: AtomicU64,
    failed: AtomicU64,
    times: [AtomicU64; BUCKETS],
    probation: OnceLock<ProbationRun>,
}

/// The figures at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StatsSnapshot {
    /// Batches that ended.
    pub batches: u64,
    /// Of those, the ones in which nothing succeeded.
    pub failed: u64,
    /// What 99 of 100 batches took at most.
    pub p99: Duration,
}

/// A generation's probation, from the swap on.
struct ProbationRun {
    bounds: Probation,
    before: StatsSnapshot,
    state: Mutex<ProbationState>,
    failed: Notify,
}

enum ProbationState {
    Running,
    Failed(String),
    Over,
}

impl Default for BatchStats {
    fn default() -> Self {
        Self {
            batches: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            times: [const { AtomicU64::new(0) }; BUCKETS],
            probation: OnceLock::new(),
        }
    }
}

impl BatchStats {
    /// Counts a batch. Calls `fails` where it is the one by which the generation fails its probation.
    pub fn count(&self, took: Duration, succeeded: bool, fails: impl FnOnce()) {
        self.times[bucket(took)].fetch_add(1, Ordering::Relaxed);
        self.batches.fetch_add(1, Ordering::Relaxed);
        if !succeeded {
            self.failed.fetch_add(1, Ordering::Relaxed);
            // Judged by each failure, and not by a clock: no more callers than needed are to see one.
            self.judge(fails);
        }
    }

    /// Notes the time of a batch that nobody wanted any more, which neither succeeded nor failed.
    pub fn note_time(&self, took: Duration) {
        self.times[bucket(took)].fetch_add(1, Ordering::Relaxed);
    }

    /// The figures now.
    #[must_use]
    pub fn snapshot(&self) -> StatsSnapshot {
        let counts: Vec<u64> = self.times.iter().map(|count| count.load(Ordering::Relaxed)).collect();
        let total: u64 = counts.iter().sum();
        let mut seen = 0;
        let p99 = counts.iter().position(|count| {
            seen += count;
            seen * 100 >= total * 99
        });
        StatsSnapshot {
            batches: self.batches.load(Ordering::Relaxed),
            failed: self.failed.load(Ordering::Relaxed),
            p99: if total == 0 { Duration::ZERO } else { p99.map_or(Duration::ZERO, upper_end) },
        }
    }

    /// Puts the generation on probation beside the one before; once in its life.
    pub fn begin_probation(&self, before: StatsSnapshot, bounds: Probation) {
        self.probation.get_or_init(|| ProbationRun {
            bounds,
            before,
            state: Mutex::new(ProbationState::Running),
            failed: Notify::new(),
        });
    }

    /// Judges by what was seen so far. Calls `fails`, once at most, where the probation is failed by this.
    pub fn judge(&self, fails: impl FnOnce()) {
        let Some(probation) = self.probation.get() else { return };
        let Some(reason) = verdict(&probation.bounds, &probation.before, &self.snapshot(), false) else {
            return;
        };
        let mut state = probation.state.lock();
        if matches!(*state, ProbationState::Running) {
            *state = ProbationState::Failed(reason);
            // Under the lock, so that it can't come after `end_probation`.
            fails();
            probation.failed.notify_one();
        }
    }

    /// Ends the probation, with the last verdict: why it was failed, if it was.
    #[must_use]
    pub fn end_probation(&self) -> Option<String> {
        let probation = self.probation.get()?;
        let mut state = probation.state.lock();
        match std::mem::replace(&mut *state, ProbationState::Over) {
            ProbationState::Failed(reason) => Some(reason),
            ProbationState::Running => verdict(&probation.bounds, &probation.before, &self.snapshot(), true),
            ProbationState::Over => None,
        }
    }

    /// Waits until the probation is failed before its end; [`BatchStats::end_probation`] says why.
    pub async fn probation_failed(&self) {
        match self.probation.get() {
            Some(probation) => probation.failed.notified().await,
            None => std::future::pending().await,
        }
    }
}

/// Why a generation is worse than the one before, by the configured bounds. `None`: it isn't, or too little was seen.
fn verdict(bounds: &Probation, before: &StatsSnapshot, now: &StatsSnapshot, ended: bool) -> Option<String> {
    if now.batches == 0 || now.batches < bounds.batches_min && !ended {
        return None;
    }
    let share = |snapshot: &StatsSnapshot| snapshot.failed as f64 / snapshot.batches.max(1) as f64;
    if share(now) > share(before) + bounds.failed_share_max {
        return Some(format!(
            "{} of its {} batches failed, and {} of {} did before: expected at most {} more of all (probation_failed_share_max)",
            now.failed, now.batches, before.failed, before.batches, bounds.failed_share_max
        ));
    }
    // With few batches, the 99th percentile is just the slowest one.
    let enough = now.batches >= P99_BATCHES_MIN && before.batches >= P99_BATCHES_MIN;
    let limit = before.p99.mul_f64(bounds.p99_ratio_max).max(before.p99 + P99_SLACK);
    if enough && now.p99 > limit {
        return Some(format!(
            "99 of 100 of its batches took up to {:?}, and {:?} before: expected at most {} times as long (probation_p99_ratio_max)",
            now.p99, before.p99, bounds.p99_ratio_max
        ));
    }
    None
}

/// Fewer batches have no 99th percentile worth the name.
const P99_BATCHES_MIN: u64 = 100;
/// A p99 that is worse by less than this is noise, whatever its ratio.
const P99_SLACK: Duration = Duration::from_millis(10);

fn bucket(took: Duration) -> usize {
    let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX).max(1);
    let doubling = micros.ilog2();
    // The two bits behind the leading one.
    let step = if doubling < 2 { 0 } else { (micros >> (doubling - 2)) as u32 & (BUCKETS_PER_DOUBLING - 1) };
    ((doubling * BUCKETS_PER_DOUBLING + step) as usize).min(BUCKETS - 1)
}

fn upper_end(bucket: usize) -> Duration {
    let (doubling, step) =
        (bucket as u32 / BUCKETS_PER_DOUBLING, u64::from(bucket as u32 % BUCKETS_PER_DOUBLING));
    let start = 1_u64 << doubling;
    if doubling < 2 {
        // Too few microseconds to be told apart.
        return Duration::from_micros(2 * start);
    }
    Duration::from_micros(start + start * (step + 1) / u64::from(BUCKETS_PER_DOUBLING))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: Probation = Probation {
        time: Duration::from_secs(1),
        batches_min: 10,
        failed_share_max: 0.1,
        p99_ratio_max: 2.0,
    };

    fn snapshot(batches: u64, failed: u64, p99_ms: u64) -> StatsSnapshot {
        StatsSnapshot { batches, failed, p99: Duration::from_millis(p99_ms) }
    }

    #[test]
    fn a_percentile_is_exact_to_a_bucket() {
        let batch_stats = BatchStats::default();
        for micros in 1..=1000 {
            batch_stats.count(Duration::from_micros(micros), true, || unreachable!());
        }
        let p99 = batch_stats.snapshot().p99.as_micros();
        assert!((990..=1280).contains(&p99), "{p99}");
        for micros in [1, 2, 3, 4, 5, 7, 8, 1000, 123_456_789] {
            let (took, end) =
                (Duration::from_micros(micros), upper_end(bucket(Duration::from_micros(micros))));
            assert!(end > took && end.as_micros() <= 2 * took.as_micros(), "{micros}: {end:?}");
        }
    }

    #[test]
    fn failures_are_judged_beside_those_before() {
        let before = snapshot(1000, 100, 1);
        assert_eq!(verdict(&BOUNDS, &before, &snapshot(9, 9, 1), false), None, "too few to tell");
        assert!(verdict(&BOUNDS, &before, &snapshot(9, 9, 1), true).is_some(), "no more will come");
        assert_eq!(verdict(&BOUNDS, &before, &snapshot(10, 2, 1), false), None);
        let reason = verdict(&BOUNDS, &before, &snapshot(10, 3, 1), false).unwrap();
        assert!(reason.starts_with("3 of its 10 batches failed, and 100 of 1000 did before"), "{reason}");
    }

    #[test]
    fn slowness_needs_a_hundred_batches_on_both_sides() {
        let slow = |before: u64, now: u64| {
            verdict(&BOUNDS, &snapshot(before, 0, 20), &snapshot(now, 0, 41), false).is_some()
        };
        assert!(slow(100, 100));
        assert!(!slow(99, 100) && !slow(100, 99));
        assert_eq!(
            verdict(&BOUNDS, &snapshot(100, 0, 1), &snapshot(100, 0, 9), false),
            None,
            "within the slack"
        );
    }

    #[tokio::test]
    async fn the_batch_that_fails_the_probation_reports_it_at_once() {
        let batch_stats = BatchStats::default();
        batch_stats.begin_probation(StatsSnapshot::default(), BOUNDS);
        let mut failed_at = Vec::new();
        (0..20)
            .for_each(|batch| batch_stats.count(Duration::from_millis(1), false, || failed_at.push(batch)));
        assert_eq!(failed_at, [9]);
        batch_stats.probation_failed().await;
        assert!(batch_stats.end_probation().unwrap().contains("10 of its 10 batches failed"));
        assert_eq!(batch_stats.end_probation(), None, "a probation ends once");
    }
}
