//! Names of jobs: UUIDs of version 7 whose first 60 bits count up, so that a job's id is also its row in the journal and no index
//! is needed to find it. The rest is random: an id can't be guessed from another.

use std::{
    fmt,
    str::FromStr,
    sync::atomic::{AtomicI64, Ordering},
};

use uuid::Uuid;

/// A job's name.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct JobId(Uuid);

/// Bits of the counter within a millisecond.
const COUNTER_BITS: u32 = 12;

impl JobId {
    /// The number of its row, which grows from job to job.
    #[must_use]
    pub fn row(self) -> i64 {
        let bits = self.0.as_u128();
        (((bits >> 80) << COUNTER_BITS) | ((bits >> 64) & 0xfff)) as i64
    }

    /// What is random in it.
    pub(crate) fn tail(self) -> i64 {
        self.0.as_u128() as u64 as i64
    }

    pub(crate) fn from_parts(row: i64, tail: i64) -> Self {
        let row = row as u64;
        let time = u128::from(row >> COUNTER_BITS) << 80;
        let counter = u128::from(row & 0xfff) << 64;
        Self(Uuid::from_u128(time | (7 << 76) | counter | u128::from(tail as u64)))
    }

    /// As its 16 bytes.
    #[must_use]
    pub fn uuid(self) -> Uuid {
        self.0
    }
}

impl FromStr for JobId {
    type Err = NotAnId;

    fn from_str(text: &str) -> Result<Self, NotAnId> {
        let uuid: Uuid = text.parse().map_err(|_| NotAnId)?;
        if uuid.get_version_num() == 7 { Ok(Self(uuid)) } else { Err(NotAnId) }
    }
}

/// A text that no journal gave to a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected the id of a job, a UUID of version 7")]
pub struct NotAnId;

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.hyphenated().fmt(f)
    }
}

impl fmt::Debug for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Makes ids, each larger than all before, whatever the clock does.
pub(crate) struct Ids(AtomicI64);

impl Ids {
    /// After this row.
    pub(crate) fn after(row: i64) -> Self {
        Self(AtomicI64::new(row))
    }

    pub(crate) fn next(&self, unix_ms: u64) -> JobId {
        let of_now = (unix_ms << COUNTER_BITS) as i64;
        let mut last = self.0.load(Ordering::Relaxed);
        let row = loop {
            let next = of_now.max(last + 1);
            match self.0.compare_exchange_weak(last, next, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => break next,
                Err(found) => last = found,
            }
        };
        // The two bits of the variant, then 62 from the system's generator.
        let (_, tail) = Uuid::new_v4().as_u64_pair();
        JobId::from_parts(row, tail as i64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_version_7_grow_and_carry_their_row() {
        let ids = Ids::after(0);
        let now = 1_760_000_000_000;
        let made: Vec<JobId> = (0..10_000).map(|_| ids.next(now)).collect();
        for pair in made.windows(2) {
            assert!(pair[0] < pair[1] && pair[0].row() + 1 == pair[1].row());
        }
        for id in &made {
            assert_eq!(id.uuid().get_version_num(), 7);
            assert_eq!(id.uuid().get_variant(), uuid::Variant::RFC4122);
            assert_eq!(JobId::from_parts(id.row(), id.tail()), *id);
            assert_eq!(id.to_string().parse(), Ok(*id));
        }
        // A clock that goes back makes no id smaller.
        assert!(ids.next(now - 1_000_000) > made[9_999]);
        assert_eq!("01890a5d-ac96-474a-8a3d-0b7b1c1b1c1b".parse::<JobId>(), Err(NotAnId));
    }
}
