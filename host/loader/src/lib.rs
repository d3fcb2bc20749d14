//! Takes plugin files into the process. It owns the private copies, the preflight, `dlopen`, the handshake and every
//! call across the boundary; all of the host's `unsafe` is here. It never knows models, batches in a queue, or HTTP.
//!
//! In the order in which a file meets them:
//!
//! 1. [`Store::stage`] copies it to a private path named by its content.
//! 2. [`preflight::run`] opens the copy in a short-lived child process, whose crash harms nobody.
//! 3. [`Plugin::open`] opens it here, checks handshake and layout, and asks it to describe itself.
//! 4. [`Plugin::load`] builds an [`Instance`]; [`Plugin::decode`] makes an [`Item`] of bytes; [`Instance::begin`] makes a
//!    [`Batch`] of items, which runs through the stages.

mod elf;
pub mod ending;
mod error;
mod folder;
mod handles;
mod library;
pub mod preflight;
mod queue;
mod store;
mod thread_priority;
mod trust;

pub use elf::{exports_queue, is_whole};
pub use error::{LoadError, OpenError};
pub use handles::{Batch, Foreign, Instance, Item, Outcome};
pub use library::{Device, Load, LogSink, Plugin, mapped_bytes};
pub use modalkit_abi::{ABI_VERSION, Failure, FailureKind, LogLevel, PathSegment, Rejection};
pub use queue::{Outgoing, Queue, QueuePlugin};
pub use store::{Staged, Store};
pub use thread_priority::lower_thread_priority;
pub use trust::Trust;
