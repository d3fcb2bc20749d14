//! Why a file did not become a plugin: each says what was found, what was expected and what to do.

use std::path::{Path, PathBuf};

use modalkit_abi::{ABI_MAJOR, ABI_MINOR, Features};
use modalkit_engine::LoadError;

/// Why a library was not taken into this process.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OpenError {
    /// It is a file of another kind.
    #[error("it is no ELF file, but {found}; expected a shared library: the crate's type must be cdylib")]
    NotElf {
        /// What it begins with.
        found: String,
    },
    /// It ends too early.
    #[error(
        "it is truncated: its headers speak of {expected} bytes and it has {found}; copy it again, to another name beside the target first, and rename it then"
    )]
    Truncated {
        /// Bytes that its headers speak of.
        expected: u64,
        /// Bytes there are.
        found: u64,
    },
    /// It was built for other machines.
    #[error(
        "it was built for {found}, and this host runs on {expected}; build it with `cargo build --target` of this host"
    )]
    Architecture {
        /// Its machine.
        found: String,
        /// This one.
        expected: String,
    },
    /// It is ELF and no shared library.
    #[error("it is an ELF file and no shared library; the crate's type must be cdylib")]
    NotALibrary,
    /// A library that it needs isn't where the dynamic linker looks.
    #[error("it needs the shared library {name}, which the dynamic linker doesn't find; {}", missing_hint(*.beside))]
    MissingLibrary {
        /// The library's name.
        name: String,
        /// It lies beside the plugin, where a private copy of the plugin doesn't see it.
        beside: bool,
    },
    /// The dynamic linker refused the file.
    #[error("the dynamic linker refuses the file: {reason}; build it as a cdylib for this machine")]
    Unloadable {
        /// What the linker said.
        reason: String,
    },
    /// Its private copy lies where no code may be run.
    #[error("the system does not let code be run from {folder}, where its private copy lies (the file system is mounted noexec, or a security policy forbids it); set TMPDIR to a folder of a file system without noexec, and restart the host", folder = folder.display())]
    NoExec {
        /// The folder of the copy.
        folder: PathBuf,
    },
    /// Our symbol isn't in it.
    #[error(
        "it exports no modalkit plugin; call `modalkit_sdk::export_pipeline!` once in a crate of type cdylib"
    )]
    NotAPlugin,
    /// It is a queue's plugin.
    #[error(
        "it exports a queue backend and no pipeline; name it in app_settings.queue_config.backends with kind = \"plugin\""
    )]
    IsAQueue,
    /// It was built for another boundary.
    #[error("it was built for plugin ABI {found} (SDK {sdk}, {rustc}), and this host takes {taken}; {hint}", taken = taken(), hint = abi_hint(*.is_newer))]
    AbiVersion {
        /// The plugin's number.
        found: String,
        /// Whether the host is the older one.
        is_newer: bool,
        /// The plugin's SDK.
        sdk: String,
        /// The compiler of the plugin's SDK.
        rustc: String,
    },
    /// It needs what this host can't do.
    #[error(
        "it needs what this host doesn't have: {}; run a host that has it, or build the plugin without it", missing.names().join(", ")
    )]
    Features {
        /// What.
        missing: Features,
    },
    /// A panic in it would end this process.
    #[error(
        "it was compiled with panic = \"abort\", so that a panic in it would end the host; expected \"unwind\": remove `panic` from the Cargo profile"
    )]
    PanicAborts,
    /// Its types are laid out differently.
    #[error("its layout differs from this host's although both say ABI {abi}; rebuild it with the SDK of this host: {difference}", abi = ABI_MAJOR)]
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

/// An ABI number in words.
pub(crate) fn number(major: u32, minor: u32) -> String {
    format!("{major}.{minor}")
}

/// What is taken, in words.
fn taken() -> String {
    match ABI_MINOR {
        0 => format!("ABI {}", number(ABI_MAJOR, 0)),
        _ => format!("ABI {} to {}", number(ABI_MAJOR, 0), number(ABI_MAJOR, ABI_MINOR)),
    }
}

fn abi_hint(is_newer: bool) -> &'static str {
    if is_newer {
        "update this host, or build the plugin with an SDK that is as old as it"
    } else {
        "rebuild it with the SDK of this host"
    }
}

fn missing_hint(beside: bool) -> &'static str {
    if beside {
        "a file of that name lies beside the plugin, but the host opens a private copy elsewhere, so that `$ORIGIN` doesn't lead there: link it statically, or put its folder into LD_LIBRARY_PATH and restart the host"
    } else {
        "install it on this machine, put its folder into LD_LIBRARY_PATH and restart the host, or link it statically"
    }
}

impl OpenError {
    /// The same of a copy of this file: a library that it needs may lie beside that.
    pub(crate) fn of(self, file: &Path) -> Self {
        match self {
            Self::MissingLibrary { name, .. } => {
                let beside = file.with_file_name(&name).exists();
                Self::MissingLibrary { name, beside }
            }
            other => other,
        }
    }
}

impl From<OpenError> for LoadError {
    fn from(error: OpenError) -> Self {
        Self::Refused(error.to_string())
    }
}
