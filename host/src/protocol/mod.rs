//! What callers write and read, as bytes and words: envelopes, messages, problems. It knows neither sockets nor models' insides.

mod envelope;
mod json;
mod problem;

pub use envelope::{Envelope, failed_job, with_meta};
pub use json::{object, raw_json};
pub use problem::{describe, failed_item, internal, invalid_item, job_failure};
