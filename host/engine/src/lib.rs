//! What the host knows of any pipeline, whatever runs it: an [`Engine`] takes files and opens them as a [`Plugin`], which loads an
//! [`Instance`], which runs batches. It calls neither `dlopen` nor processes, and never knows HTTP or queues of jobs; of how files are opened it has the
//! words of [`LoadError`], and the times and questions that every kind of file has.
//!
//! In the order in which a file meets them:
//!
//! 1. [`Engine::stage`] makes a private copy, named by its content.
//! 2. [`Engine::open`] tries the copy where a crash harms nobody, then opens it. What comes of it describes itself.
//! 3. [`Plugin::load`] builds an [`Instance`] of it with a model's settings.
//! 4. [`Plugin::decode`] or [`Instance::decode`] makes a [`Decoded`] input of a [`Payload`]; [`Instance::begin`] makes a [`Batch`] of
//!    them, which runs through the stages and gives an [`EventSink`] chunks and one [`Outcome`] of each.

#![forbid(unsafe_code)]

mod failure;
mod file;
mod instance;
mod isolation;
mod plugin;
mod queue;
mod tensor;
pub mod tree;

pub use failure::{Failure, FailureKind, InputFault, PathSegment, Rejection};
pub use file::{LoadError, Staged};
pub use instance::{
    Batch, Checked, ChunkResult, Death, Decoded, EndedBy, EventSink, Foreign, Input, Instance, Interest,
    Kept, Measure, Measured, Outcome, Payload, Process,
};
pub use isolation::{Confinement, Isolation, Python, Sandbox};
pub use plugin::{Description, Device, Engine, Load, LogLevel, OpenTimings, Plugin, PluginLog};
pub use queue::{Outgoing, QueueBackend, QueuePlugin};
pub use tensor::{Datatype, Shape, Signature, TENSOR_ALIGNMENT, Tensor, TensorError, TensorSpec};
