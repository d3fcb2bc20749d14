//! The boundary between host and plugin: one handshake symbol, tables of functions, opaque handles and bytes. A library exports the
//! table of a pipeline or that of a queue; the host has tables as well.
//!
//! It owns the layout of everything that crosses, and knows neither serde nor threads nor what a pipeline does.
//!
//! # How it grows
//!
//! Within a major number, nothing that is here changes. What comes is added in one of five ways, each with the next [`ABI_MINOR`] and this
//! crate's own minor version:
//!
//! - a **table** ([`PluginModule`], [`QueueModule`], [`HostApi`], [`EventSink`]) gets a function at its end. Whoever holds a table of an
//!   older number finds the function missing, and does without it;
//! - a **document** (a description, what is loaded, what changed, the details of a failure) gets a member. Documents are JSON objects;
//!   whoever reads one passes over members that it doesn't know, and takes the default for those that it misses;
//! - a **number** that stands for a kind ([`FailureKind`], [`LogLevel`], [`Datatype`], [`Interest`], [`WhenFull`], [`ChunkResult`]) gets a value. Each says what an unknown value is taken for;
//! - a **feature** ([`Features`]) is an ability that not every host of a number has;
//! - **[`Needs`]** gets a field at its end.
//!
//! The structs that calls carry by value never change: another struct comes with another function.
//!
//! How a host takes a library, in this order:
//!
//! 1. `dlopen`, then look up [`HANDSHAKE_SYMBOL`] and read the [`Handshake`] behind it: plain C data whose first
//!    fields never move, so that a plugin of any age can be recognised and refused in words.
//! 2. Compare [`ABI_MAJOR`], the [`Needs`] behind [`NEEDS_SYMBOL`], and [`Handshake::panic_aborts`].
//! 3. Let abi_stable compare the type layouts behind [`Handshake::header`], the plugin's as the ones that may lack what the host has;
//!    that gives a [`PluginModuleRef`].
//! 4. Only then call into it.

#![allow(non_local_definitions, reason = "abi_stable's derive expands to such impls")]

mod failure;
mod handle;
mod handshake;
mod host;
mod module;
mod queue;
mod sink;
mod tensor;

pub use failure::{Failure, FailureKind};
pub use handshake::{
    ABI_MAJOR, ABI_MINOR, DEBUG_ASSERTIONS_SYMBOL, Features, HANDSHAKE_SYMBOL, Handshake, MAGIC,
    NEEDS_SYMBOL, Needs, StaticStr,
};
pub use host::{HostApi, HostApiRef, LogLevel};
pub use module::{
    BatchHandle, DecodedItem, InstanceHandle, ItemHandle, Measure, PluginModule, PluginModuleRef,
};
pub use queue::{QUEUE_HANDSHAKE_SYMBOL, QueueHandle, QueueMessage, QueueModule, QueueModuleRef, Sent};
pub use sink::{ChunkResult, EventSink, EventSinkRef, Interest, SinkHandle, WhenFull};
pub use tensor::{Buffer, Datatype, TENSOR_ALIGNMENT, Tensor};

pub use abi_stable;
