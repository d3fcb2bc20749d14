//! One unit of work. A job owns the handle that its answer goes through, so nothing that handles jobs knows where they came from.

use std::{fmt, sync::Arc, time::Instant};

use bytes::Bytes;
use modalkit_engine::{Decoded, Payload};

use super::ReplyHandle;
use crate::insight::JobTimings;

/// One input on its way through the host.
pub struct Job {
    /// Names the request in logs.
    pub request_id: RequestId,
    /// The input as it came; a generation that didn't decode it decodes this again.
    pub input: Payload,
    /// The decoded input: a cache that belongs to the generation that made it.
    pub decoded: Option<Decoded>,
    /// Where the answer goes.
    pub reply: ReplyHandle,
    /// Where its time goes, where somebody wants to know.
    pub timings: Option<Arc<JobTimings>>,
    /// What it has come back from.
    pub deaths: Deaths,
}

/// Processes that died while they ran a job, and it came back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Deaths {
    /// It may have been the job's doing.
    pub suspected: u32,
    /// It was somebody else's.
    pub uncharged: u32,
}

/// Names a request in logs and answers. One that this host makes is written out only where it is shown.
#[derive(Clone, Debug)]
pub enum RequestId {
    /// The caller's own: visible ASCII.
    Given(Bytes),
    /// Made here: a number of the process, and one that counts.
    Made {
        /// Differs from process to process.
        process: u32,
        /// Differs from request to request.
        number: u64,
    },
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Given(text) => f.write_str(&String::from_utf8_lossy(text)),
            Self::Made { process, number } => {
                let mut buffer = [0; Self::MADE_BYTES_MAX];
                f.write_str(&String::from_utf8_lossy(Self::write(*process, *number, &mut buffer)))
            }
        }
    }
}

impl RequestId {
    /// The longest that is made here.
    pub const MADE_BYTES_MAX: usize = 8 + 1 + 16;

    /// Writes one that was made here: both numbers in hexadecimal digits, the first with all eight. Every answer has one, which is
    /// why it isn't left to the formatter.
    #[must_use]
    pub fn write(process: u32, number: u64, buffer: &mut [u8; Self::MADE_BYTES_MAX]) -> &[u8] {
        const DIGITS: [u8; 16] = *b"0123456789abcdef";
        let (first, rest) = buffer.split_at_mut(8);
        for (place, digit) in first.iter_mut().rev().enumerate() {
            *digit = DIGITS[(process >> (4 * place)) as usize & 0xf];
        }
        rest[0] = b'-';
        let digits = (number.max(1).ilog2() / 4 + 1) as usize;
        for (place, digit) in rest[1..=digits].iter_mut().rev().enumerate() {
            *digit = DIGITS[(number >> (4 * place)) as usize & 0xf];
        }
        &buffer[..9 + digits]
    }
}

/// The moment after which nobody wants the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Deadline(pub Instant);
