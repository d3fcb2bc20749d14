//! What callers write and read, as bytes and words: envelopes, messages, problems. It knows neither sockets nor models' insides.

mod answer;
mod envelope;
mod events;
mod json;
pub mod openai;
mod problem;
pub mod v2;

pub use answer::Answer;
pub use envelope::{Envelope, accepted, envelope_schema, failed_job, succeeded_job};
pub use events::{EVENT_STREAM, HEARTBEAT, put_comment, put_data, put_event};
pub use json::{object, raw_json};
pub use problem::{describe, describe_whole, failed_item, internal, invalid_item, job_failure};
