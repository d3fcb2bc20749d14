//! The modalkit host: loads pipelines, batches requests for them and serves them over HTTP.
//!
//! Modules stand in the order in which a request meets them; `ARCHITECTURE.md` walks through them.

#![forbid(unsafe_code)]

pub mod access;
pub mod admin;
pub mod admission;
pub mod app;
pub mod audit;
pub mod config;
pub mod dispatch;
pub mod egress;
pub mod identity;
pub mod ingress;
pub mod job;
pub mod jobs;
pub mod log;
pub mod mounts;
pub mod pipeline;
pub mod queues;
pub mod reconfigure;
pub mod reload;
pub mod telemetry;
pub mod traces;
pub mod trail;
pub mod transient;
pub mod unix_path;
