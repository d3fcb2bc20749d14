//! End-to-end tests, by what they promise.

#![allow(clippy::unwrap_used, reason = "a test ends at what it did not expect, and shows where")]

mod access;
mod architecture;
mod batching;
mod buckets;
mod clients;
mod command_line;
mod configuration;
mod copies;
mod deploy;
mod destinations;
mod devices;
mod digits;
mod durability;
mod failures;
mod frozen;
mod hostile;
mod https;
mod imports;
mod insight;
mod isolation;
mod jobs;
mod lifecycle;
mod limits;
mod log;
mod management;
mod newcomer;
mod other_compiler;
mod protocols;
mod queues;
mod refusals;
mod reload;
mod removal;
mod serving;
mod similarity;
mod state;
mod streams;
mod tensors;
mod with_models;
mod with_python;
