//! How a plugin's code is kept apart from the host: what a model's entry says of it, in the words of engines.

use std::{collections::BTreeMap, path::PathBuf};

/// Where a plugin's code runs, and what it may use there.
#[derive(Clone, Debug, PartialEq)]
pub struct Isolation {
    /// Libraries run in the host's own process: fastest, and their crash is the host's. An interpreter has a process of its own in any case.
    pub in_process: bool,
    /// Of each process that is its instance's own.
    pub confinement: Confinement,
}

impl Default for Isolation {
    fn default() -> Self {
        Self { in_process: true, confinement: Confinement::default() }
    }
}

impl Isolation {
    /// Whether it means the same for a plugin that is, or isn't, in processes of its own.
    #[must_use]
    pub fn is_same_for(&self, is_isolated: bool, other: &Self) -> bool {
        let both_in_process = self.in_process && other.in_process;
        !is_isolated && both_in_process
            || self.in_process == other.in_process && self.confinement == other.confinement
    }
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
#[derive(Clone, Debug, PartialEq)]
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
    /// Whether the Python library's modules are the host's own.
    pub shim: bool,
}

impl Default for Python {
    fn default() -> Self {
        Self {
            pipeline: None,
            interpreter: None,
            input_model: None,
            output_model: None,
            environment: BTreeMap::new(),
            threads: None,
            shim: true,
        }
    }
}

/// What a process in a sandbox may see and do, beside the system's own files.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sandbox {
    /// Folders and files that it may read.
    pub readable: Vec<PathBuf>,
    /// Whether it may open sockets.
    pub network: bool,
}
