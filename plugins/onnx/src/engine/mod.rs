//! What runs a model's graph. An engine knows arrays and names, and nothing of requests and batches.

mod onnxruntime;
mod rten;

use std::path::{Path, PathBuf};

use modalkit_sdk::{Device, PipelineError};
use schemars::JsonSchema;
use serde::Deserialize;

use crate::{array::Array, port::Port};

pub(crate) trait Engine: Send + Sync {
    /// What it is called in the configuration.
    fn name(&self) -> &'static str;

    /// The least and the largest whole number of an input, where it has less room than the input's datatype.
    fn narrowed(&self, port: &Port) -> Option<(i64, i64)>;

    /// Runs the graph: arrays as its inputs, in their order, of their datatypes; arrays of its outputs, in theirs.
    ///
    /// It may panic over inputs that it doesn't expect.
    fn run(&self, inputs: Vec<Array>) -> Result<Vec<Array>, RunFault>;
}

/// Why a run failed.
#[derive(Clone, Debug)]
pub(crate) enum RunFault {
    /// An operator refused what this input led to.
    Input(String),
    /// Another input would have failed as well.
    Engine(PipelineError),
}

/// Which engine runs the model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Kind {
    /// In this plugin; on CPUs.
    #[default]
    Rten,
    /// A shared library of ONNX Runtime, 1.24 or later, loaded at run time; on CPUs, and on a GPU where the model has one.
    OnnxRuntime,
}

/// What an engine is made of.
pub(crate) struct Wanted<'w> {
    pub(crate) path: &'w Path,
    pub(crate) threads: usize,
    /// Of ONNX Runtime, where the configuration names it.
    pub(crate) library: Option<&'w PathBuf>,
    pub(crate) device: Option<&'w Device>,
    pub(crate) inputs: &'w [Port],
    pub(crate) outputs: &'w [Port],
}

pub(crate) fn open(kind: Kind, wanted: &Wanted<'_>) -> Result<Box<dyn Engine>, PipelineError> {
    match kind {
        Kind::Rten => Ok(Box::new(rten::Rten::open(wanted)?)),
        Kind::OnnxRuntime => Ok(Box::new(onnxruntime::OnnxRuntime::open(wanted)?)),
    }
}
