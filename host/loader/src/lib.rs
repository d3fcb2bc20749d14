//! The engine of dynamic libraries: takes plugin files into the process. It owns the private copies, the preflight, `dlopen`, the
//! handshake and every call across the boundary; all of the host's `unsafe` but that of devices is here, so that the one setting of the allocator is as well. It never knows models, batches
//! in a queue, or HTTP.
//!
//! What the host sees of it is [`Libraries`], a `modalkit_engine::Engine`; the order in which a file meets the rest is:
//! `store`, `preflight`, `library` (handshake, layout, description), `pipeline` (load), `handles` (instances, inputs, batches).

mod allocator;
mod convert;
mod document;
mod elf;
pub mod ending;
mod engine;
mod error;
mod folder;
mod handles;
mod library;
mod pipeline;
mod preflight;
mod queue;
mod resident;
mod store;
mod thread_priority;
mod trust;

pub use allocator::keep_freed_memory;
pub use engine::{Libraries, OpenedInPlace, Settings, open_in_place};
pub use preflight::{Preflight, child as preflight_child};
pub use trust::Trust;

/// The boundary that this host has, as `5.0`; it takes what was built for an older minor number as well.
#[must_use]
pub fn abi() -> String {
    error::number(modalkit_abi::ABI_MAJOR, modalkit_abi::ABI_MINOR)
}
