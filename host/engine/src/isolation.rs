//! How a plugin's code is kept apart from the host: what a model's entry says of it, in the words of engines.

use std::{collections::BTreeMap, path::PathBuf};

/// Where a plugin's code runs.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Isolation {
    /// In the host's own process: fastest, and its crash is the host's.
    #[default]
    InProcess,
    /// Each instance in a process of its own.
    Process(Confinement),
}

/// What a process of its own may use.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Confinement {
    /// Bytes of memory; `None` for as many as there are.
    pub memory_bytes: Option<u64>,
    /// Cores, also parts of them; `None` for all.
    pub cores: Option<f64>,
    /// What it may see and do; `None` for what the host's user may.
    pub sandbox: Option<Sandbox>,
    /// How its interpreter is made and what it runs, where it is one of Python.
    pub python: Python,
}

/// A pipeline in Python, as its model's entry has it. What it says nothing of is found in its folder.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Python {
    /// The class or function, as `module:Name`.
    pub pipeline: Option<String>,
    /// The interpreter.
    pub interpreter: Option<PathBuf>,
    /// The pydantic model of one input, as `module:Name`.
    pub input_model: Option<String>,
    /// The same of one output.
    pub output_model: Option<String>,
    /// Variables of its environment.
    pub environment: BTreeMap<String, String>,
    /// Threads that its libraries may use each.
    pub threads: Option<u32>,
}

/// What a process in a sandbox may see and do, beside the system's own files.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sandbox {
    /// Folders and files that it may read.
    pub readable: Vec<PathBuf>,
    /// Whether it may open sockets.
    pub network: bool,
}
