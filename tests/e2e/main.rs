//! End-to-end tests, by what they promise.

mod architecture;
mod batching;
mod digits;
mod failures;
mod hostile;
mod lifecycle;
mod other_compiler;
mod refusals;
mod serving;
