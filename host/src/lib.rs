//! The modalkit host: loads pipelines, batches requests for them and serves them over HTTP.
//!
//! `ARCHITECTURE.md` describes the modules in the order in which a request meets them, `docs/glossary.md` the terms.

#![forbid(unsafe_code)]

pub mod access;
pub mod admin;
pub mod app;
pub mod audit;
mod backoff;
pub mod buckets;
pub mod config;
mod death_note;
pub mod deploy;
pub mod egress;
mod fence;
pub mod identity;
pub mod ingress;
pub mod insight;
pub mod jobs;
pub mod models;
pub mod mounts;
pub mod pipeline;
pub mod protocol;
pub mod queues;
pub mod reconfigure;
pub mod reload;
pub mod transient;
pub mod ui;
pub mod unix_path;
pub mod work;
