//! What the host says of itself: its log, its metrics, its traces, and where one request's time went. It never decides anything.

pub mod log;
pub mod metrics;
pub mod timings;
pub mod traces;

pub use timings::{BatchTimings, JobRun, JobTimings, SpanContext, explain};
