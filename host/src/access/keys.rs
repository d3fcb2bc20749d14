//! Keys as digests, compared in constant time, and each one's limits.

use std::{
    num::NonZeroU32,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use governor::{
    DefaultDirectRateLimiter, Quota, RateLimiter,
    clock::{Clock, DefaultClock},
};
use prometheus::IntCounter;
use sha2::{Digest as _, Sha256};
use subtle::{Choice, ConditionallySelectable, ConstantTimeEq};
use uuid::Uuid;

use super::AccessError;
use crate::config::KeyLimits;

/// What stands for a key: what it is compared by says nothing about it, and the time that takes nothing either.
#[derive(Clone, Copy)]
pub struct Digest([u8; 32]);

/// Makes digests that mean nothing to another process.
pub struct Digester(Sha256);

impl Default for Digester {
    fn default() -> Self {
        Self::new()
    }
}

impl Digester {
    /// With a salt of this process.
    #[must_use]
    pub fn new() -> Self {
        let mut salted = Sha256::new();
        // Two: 244 random bits between them.
        salted.update(Uuid::new_v4().as_bytes());
        salted.update(Uuid::new_v4().as_bytes());
        Self(salted)
    }

    /// Of what somebody sent, or of what is expected.
    #[must_use]
    pub fn digest(&self, key: &[u8]) -> Digest {
        let mut hasher = self.0.clone();
        hasher.update(key);
        Digest(hasher.finalize().into())
    }
}

impl Digest {
    /// In constant time.
    #[must_use]
    pub fn matches(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

/// One key.
pub(super) struct Key {
    pub(super) name: Arc<str>,
    pub(super) digest: Digest,
    pub(super) manages: bool,
    pub(super) explains: bool,
    pub(super) allowed_queues: Option<Arc<[String]>>,
    pub(super) limits: Arc<Limits>,
    pub(super) calls: IntCounter,
    pub(super) refused: IntCounter,
}

/// All keys.
pub(super) struct KeySet(Vec<Key>);

impl KeySet {
    pub(super) fn new(keys: Vec<Key>) -> Self {
        Self(keys)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The key of this name.
    pub(super) fn named(&self, name: &str) -> Option<&Key> {
        self.0.iter().find(|key| &*key.name == name)
    }

    /// The key with this digest. All are compared, whichever it is.
    pub(super) fn find(&self, digest: &Digest) -> Option<&Key> {
        let (mut found, mut place) = (Choice::from(0), 0u64);
        for (index, key) in self.0.iter().enumerate() {
            let same = key.digest.0.ct_eq(&digest.0);
            place.conditional_assign(&(index as u64), same);
            found |= same;
        }
        bool::from(found).then(|| &self.0[place as usize])
    }
}

/// How often one key may call, and how many of its calls may be inside at once.
pub(super) struct Limits {
    rate: Option<DefaultDirectRateLimiter>,
    concurrency_max: usize,
    inside: Arc<AtomicUsize>,
}

/// One call's place among those of its key.
#[derive(Debug)]
pub struct ConcurrencyPermit(Arc<AtomicUsize>);

impl Drop for ConcurrencyPermit {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Limits {
    pub(super) fn new(limits: &KeyLimits) -> Self {
        let rate = limits.requests_per_second.and_then(|rate| {
            let burst = NonZeroU32::new(limits.burst.unwrap_or_else(|| rate.ceil() as u32))?;
            Some(RateLimiter::direct(
                Quota::with_period(Duration::from_secs_f64(1.0 / rate))?.allow_burst(burst),
            ))
        });
        let concurrency_max = limits.concurrency_max.unwrap_or(usize::MAX);
        Self { rate, concurrency_max, inside: Arc::default() }
    }

    pub(super) fn enter(&self) -> Result<Option<ConcurrencyPermit>, AccessError> {
        let permit = (self.concurrency_max < usize::MAX)
            .then(|| {
                let inside = self.inside.fetch_add(1, Ordering::Relaxed);
                let permit = ConcurrencyPermit(Arc::clone(&self.inside));
                if inside < self.concurrency_max { Ok(permit) } else { Err(AccessError::TooMany) }
            })
            .transpose()?;
        if let Some(rate) = &self.rate {
            rate.check().map_err(|not_until| {
                AccessError::TooOften(not_until.wait_time_from(DefaultClock::default().now()))
            })?;
        }
        Ok(permit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_matches_its_own_key_alone() {
        let digester = Digester::new();
        let key = digester.digest(b"a key");
        assert!(key.matches(&digester.digest(b"a key")));
        for other in [&b"a kez"[..], b"a ke", b"a key ", b"", b"A key"] {
            assert!(!key.matches(&digester.digest(other)));
        }
        assert!(!key.matches(&Digester::new().digest(b"a key")), "another process has another salt");
    }

    #[test]
    fn a_key_is_held_to_its_rate_and_to_its_calls_at_once() {
        let limits = Limits::new(&KeyLimits {
            requests_per_second: Some(0.01),
            burst: Some(2),
            concurrency_max: Some(1),
        });
        let first = limits.enter().unwrap();
        assert_eq!(limits.enter().unwrap_err(), AccessError::TooMany);
        drop(first);
        drop(limits.enter().unwrap());
        let AccessError::TooOften(wait) = limits.enter().unwrap_err() else { panic!("expected a wait") };
        assert!(wait > Duration::from_secs(50), "{wait:?}");
        assert!(Limits::new(&KeyLimits::default()).enter().unwrap().is_none());
    }
}
