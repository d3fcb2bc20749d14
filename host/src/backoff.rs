//! How long to wait after failures in a row. It never knows what is tried again.

use std::time::Duration;

/// Doublings after which no limit is so far away that it isn't reached.
const DOUBLINGS_MAX: u32 = 16;

/// The wait after so many failures in a row: `first`, twice as long after each further one, up to `limit`. It is shortened by up to a half,
/// by chance, so that what failed together doesn't come again together. Nothing without a failure.
#[must_use]
pub(crate) fn backoff(failures: u32, first: Duration, limit: Duration) -> Duration {
    let Some(doublings) = failures.checked_sub(1) else { return Duration::ZERO };
    let doubled = first.saturating_mul(1 << doublings.min(DOUBLINGS_MAX)).min(limit);
    doubled.mul_f64(0.5 + fastrand::f64() / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_up_to_a_limit() {
        let (first, limit) = (Duration::from_millis(250), Duration::from_secs(60));
        for (failures, longest) in
            [(1, first), (2, first * 2), (5, first * 16), (9, limit), (u32::MAX, limit)]
        {
            for _ in 0..100 {
                let wait = backoff(failures, first, limit);
                assert!(wait >= longest / 2 && wait <= longest, "{failures}: {wait:?}");
            }
        }
        assert_eq!(backoff(0, first, limit), Duration::ZERO);
    }
}
