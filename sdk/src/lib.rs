//! All that the author of a modalkit pipeline sees: a typed trait, an error type, a macro and a test kit.
//!
//! It owns the plugin's side of the boundary, and never knows HTTP, queues, threads or which host loads it.
//!
//! A whole plugin, to be compiled as a `cdylib` and dropped into a volume of the host:
//!
//! ```
//! use modalkit_sdk::{InferencePipeline, LoadContext, NoSettings, Outcome, PipelineError, export_pipeline};
//! use schemars::JsonSchema;
//! use serde::{Deserialize, Serialize};
//!
//! #[derive(Deserialize, JsonSchema)]
//! struct Input {
//!     text: String,
//! }
//!
//! #[derive(Serialize, JsonSchema)]
//! struct Output {
//!     length: usize,
//! }
//!
//! struct Length;
//!
//! impl InferencePipeline for Length {
//!     type Settings = NoSettings;
//!     type Input = Input;
//!     type Output = Output;
//!     type Preprocessed = ();
//!     type RawOutput = Vec<usize>;
//!
//!     fn load(_: LoadContext<NoSettings>) -> Result<Self, PipelineError> {
//!         Ok(Self)
//!     }
//!     fn preprocess(&self, _: &[Input]) -> Result<(), PipelineError> {
//!         Ok(())
//!     }
//!     fn predict(&self, inputs: &[Input], (): ()) -> Result<Vec<usize>, PipelineError> {
//!         Ok(inputs.iter().map(|input| input.text.chars().count()).collect())
//!     }
//!     fn postprocess(&self, _: &[Input], lengths: Vec<usize>) -> Result<Vec<Outcome<Output>>, PipelineError> {
//!         Ok(lengths.into_iter().map(|length| Ok(Output { length })).collect())
//!     }
//! }
//!
//! export_pipeline!(Length);
//!
//! let model = modalkit_sdk::testkit::TestKit::new().load::<Length>()?;
//! let answers = model.run_json(&[serde_json::json!({"text": "four"})]);
//! assert_eq!(answers[0].as_ref().unwrap()["length"], 4);
//! # Ok::<(), PipelineError>(())
//! ```

mod chunks;
mod context;
mod device;
mod document;
mod error;
mod export;
mod finite;
mod forward;
mod instance;
mod object;
mod pipeline;
mod queue;
mod schema;
mod signature;
mod strict;
mod tensor;
pub mod testkit;

pub use chunks::Chunks;
pub use context::{LoadContext, NoSettings, VolumeReload};
pub use device::Device;
pub use error::{ErrorKind, Invalid, PathStep, PipelineError};
pub use pipeline::{InferencePipeline, Outcome};
pub use queue::{QueueBackend, QueueContext, QueueError, QueuedMessage};
pub use signature::Signature;
pub use tensor::{Datatype, Element, Tensor, Tensors};

/// The CUDA bindings whose types [`Device::cuda`] speaks. A pipeline that wants more of them (`cublas`, `nvrtc`) depends on the same
/// version with those features.
#[cfg(feature = "cuda")]
pub use cudarc;

/// What [`export_pipeline!`] expands to; nothing here is for an author's hands.
#[doc(hidden)]
pub mod __private {
    pub use crate::export::{NEEDS, constructor_of, handshake_of, header_of};
    pub use crate::queue::{queue_constructor_of, queue_header_of};
    pub use modalkit_abi::{
        Handshake, Needs,
        abi_stable::library::{LibHeader, RootModuleResult},
    };
}
