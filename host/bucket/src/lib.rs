//! A prefix of a bucket as a folder: listed again and again, fetched, and shown as one whole snapshot after another; what is written into the
//! folder goes up. It never knows models, plugins or HTTP servers.
//!
//! The folder of a mount is a link to `current` in the mirror's own folder, and that is a link to one of its snapshots:
//!
//! ```text
//! /mnt/weights -> FOLDER/current -> snapshots/000007/      what is shown; files that didn't change are hard links into the snapshot before
//!                 FOLDER/snapshots/000007.json             which object each of its files is
//!                 FOLDER/incoming/                         what is being fetched; goes on after a restart
//!                 FOLDER/conflicts/                        what was written here and changed in the bucket as well
//! ```
//!
//! Whoever needs several files that belong together resolves the folder first (`realpath /mnt/weights`) and reads them there: a snapshot
//! stays for a minute after the next one has taken its place.

#![forbid(unsafe_code)]

mod error;
mod fetch;
mod listing;
mod local;
mod manifest;
mod mirror;
mod progress;
mod snapshot;
mod spec;
mod status;
mod store;
mod upload;

pub use error::MirrorError;
pub use mirror::{Mirror, Mirrors, SyncHandle, Synced};
pub use spec::{BucketSpec, Credentials, Provider, Secret};
pub use status::{Counters, Status};
