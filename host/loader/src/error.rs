//! Why a file did not become a plugin: each says what was found, what was expected and what to do.

use std::{io, path::PathBuf, time::Duration};

use modalkit_abi::ABI_VERSION;

/// Why a library was not taken into this process.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The dynamic linker refused the file.
    #[error("the dynamic linker refuses the file: {reason}; build it as a cdylib for this machine")]
    Unloadable {
        /// What the linker said.
        reason: String,
    },
    /// Our symbol isn't in it.
    #[error(
        "it exports no modalkit plugin; call `modalkit_sdk::export_pipeline!` once in a crate of type cdylib"
    )]
    NotAPlugin,
    /// It was built for another boundary.
    #[error("it was built for plugin ABI {found} (SDK {sdk}, {rustc}), and this host has ABI {expected}; rebuild it with the SDK of this host", expected = ABI_VERSION)]
    AbiVersion {
        /// The plugin's number.
        found: u32,
        /// The plugin's SDK.
        sdk: String,
        /// The compiler of the plugin's SDK.
        rustc: String,
    },
    /// A panic in it would end this process.
    #[error(
        "it was compiled with panic = \"abort\", so that a panic in it would end the host; expected \"unwind\": remove `panic` from the Cargo profile"
    )]
    PanicAborts,
    /// Its types are laid out differently.
    #[error("its layout differs from this host's although both say ABI {abi}; rebuild it with the SDK of this host: {difference}", abi = ABI_VERSION)]
    Layout {
        /// abi_stable's first difference.
        difference: String,
    },
    /// It failed to describe its pipeline.
    #[error("its pipeline can't be served: {reason}")]
    Description {
        /// What the plugin said.
        reason: String,
    },
}

/// Why a file was not taken.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The file can't be read, or its private copy can't be written.
    #[error("can't {doing} {path}", path = path.display())]
    Io {
        /// What was tried.
        doing: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The child process that opened it first was killed.
    #[error(
        "it crashes when it is opened ({how}, in the preflight process, so nothing else was harmed); look for constructors and static initialisers in it"
    )]
    Crashed {
        /// Signal or exit status.
        how: String,
    },
    /// The child process that opened it first did not come back.
    #[error(
        "it did not open within {limit:?} (in the preflight process); look for constructors that wait in it"
    )]
    Hung {
        /// The limit.
        limit: Duration,
    },
    /// The child process could not be started.
    #[error("can't start the preflight process {path}", path = path.display())]
    Preflight {
        /// The program.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The child process found it unfit.
    #[error("{0}")]
    Refused(String),
    /// This process found it unfit.
    #[error(transparent)]
    Open(#[from] OpenError),
}
