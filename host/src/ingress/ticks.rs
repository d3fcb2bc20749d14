//! A coarse clock that requests read without a system call; the watch over io threads advances it.

use std::sync::atomic::{AtomicU64, Ordering};

/// What a plugin may take to decode an input on such a thread, in ticks: 100 ms. A busy machine may take the thread off its core for
/// tens of milliseconds; that is not the plugin's doing.
pub(super) const DECODE_TICKS_MAX: u64 = 4;

/// Ticks since the start. They stand still with the process, as when it is suspended.
#[derive(Default)]
pub(super) struct Ticks(AtomicU64);

impl Ticks {
    pub(super) fn now(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// Whether what began then has taken too long.
    pub(super) fn are_too_many_since(&self, then: u64) -> bool {
        self.now().saturating_sub(then) > DECODE_TICKS_MAX
    }

    pub(super) fn advance(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}
