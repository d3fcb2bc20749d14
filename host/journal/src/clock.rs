//! The journal's own time: how long its hosts have run, in milliseconds, over all their starts. Ages are told by it (how long a
//! finished job is kept, a message tried to be delivered, a name remembered), so that a system clock that is set, or a host that
//! was down, makes nothing older. It never knows the time of day.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Instant,
};

/// A system clock that differs by more than this from what it should say was set.
const JUMP_MIN_MS: u64 = 1000;

/// Milliseconds that hosts have run on this journal.
#[derive(Debug)]
pub struct Clock {
    base: u64,
    begun: Instant,
    /// What the system's clock would have said when this began, had it always been as it is now.
    system_at_begin: AtomicU64,
}

impl Clock {
    /// Goes on from a moment, with what the system's clock says now.
    pub(crate) fn resume(base: u64, unix_ms: u64) -> Self {
        Self { base, begun: Instant::now(), system_at_begin: AtomicU64::new(unix_ms) }
    }

    /// Now, in the journal's time.
    #[must_use]
    pub fn now(&self) -> u64 {
        self.base + self.elapsed()
    }

    fn elapsed(&self) -> u64 {
        self.begun.elapsed().as_millis() as u64
    }

    /// By how many milliseconds the system's clock was set since this was last asked; `None` where it wasn't, or only slewed.
    pub(crate) fn jump(&self, unix_ms: u64) -> Option<i64> {
        self.jump_after(self.elapsed(), unix_ms)
    }

    fn jump_after(&self, elapsed: u64, unix_ms: u64) -> Option<i64> {
        let at_begin = unix_ms.saturating_sub(elapsed);
        let known = self.system_at_begin.swap(at_begin, Ordering::Relaxed);
        (at_begin.abs_diff(known) >= JUMP_MIN_MS).then(|| at_begin as i64 - known as i64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_is_set_is_noticed_once_and_one_that_is_slewed_never() {
        let start = 1_760_000_000_000;
        let clock = Clock::resume(5_000, start);
        assert!(clock.now() >= 5_000 && clock.now() < 65_000, "it goes on where it was");
        for second in 1..=10_000 {
            // 500 ppm: five seconds in all.
            assert_eq!(clock.jump_after(second * 1000, start + second * 1000 + second / 2), None);
        }
        let (elapsed, now) = (10_001_000, start + 10_001_000 + 5_000);
        assert_eq!(clock.jump_after(elapsed, now + 3_600_000), Some(3_600_000));
        assert_eq!(clock.jump_after(elapsed + 10, now + 3_600_010), None, "it is told once");
        assert_eq!(clock.jump_after(elapsed + 20, now - 7_200_000), Some(-10_800_020));
    }
}
