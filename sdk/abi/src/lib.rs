//! The boundary between host and plugin: one handshake symbol, one table of functions, opaque handles and bytes. There are two tables:
//! that of pipelines and that of queues.
//!
//! It owns the layout of everything that crosses, and knows neither serde nor threads nor what a pipeline does.
//! Nothing here may change without [`ABI_VERSION`] and this crate's own version changing with it.
//!
//! How a host takes a library, in this order:
//!
//! 1. `dlopen`, then look up [`HANDSHAKE_SYMBOL`] and read the [`Handshake`] behind it: plain C data whose first
//!    fields never move, so that a plugin of any age can be recognised and refused in words.
//! 2. Compare [`ABI_VERSION`] and [`Handshake::panic_aborts`].
//! 3. Let abi_stable compare the type layouts behind [`Handshake::header`], which gives a [`PluginModuleRef`].
//! 4. Only then call into it.

#![allow(non_local_definitions, reason = "abi_stable's derive expands to such impls")]

mod handshake;
mod module;
mod queue;

pub use handshake::{ABI_VERSION, DEBUG_ASSERTIONS_SYMBOL, HANDSHAKE_SYMBOL, Handshake, MAGIC, StaticStr};
pub use module::{
    BatchHandle, Description, Failure, FailureKind, HostApi, InputFault, InstanceHandle, ItemHandle,
    LeasedDevice, LoadArgs, LogLevel, LogRecord, Outcomes, PathSegment, PluginModule, PluginModuleRef,
    Rejection, Secret, VolumeChange,
};
pub use queue::{
    QUEUE_HANDSHAKE_SYMBOL, QueueDescription, QueueHandle, QueueMessage, QueueModule, QueueModuleRef,
    QueueOpenArgs, Sent,
};

pub use abi_stable;
