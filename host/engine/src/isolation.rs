//! How a plugin's code is kept apart from the host: what a model's entry says of it, in the words of engines.

use std::path::PathBuf;

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
}

/// What a process in a sandbox may see and do, beside the system's own files.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sandbox {
    /// Folders and files that it may read.
    pub readable: Vec<PathBuf>,
    /// Whether it may open sockets.
    pub network: bool,
}
