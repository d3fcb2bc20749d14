//! Configuration: what was written (`raw`) and what it means (`resolved`) are different types. It owns files,
//! environment and limits, and never knows who uses them.

mod layers;
mod raw;
mod resolve;
mod resolved;
mod values;

use std::path::PathBuf;

pub use resolved::{
    BatchPolicy, Config, GoldenSpec, ModelSpec, Probation, ReloadPolicy, Replicas, Server, Volume, Watching,
};

/// Reads the files, lays the environment over them and resolves the whole.
///
/// `files`: later ones win. `environment`: every variable; those that don't start with `MODALKIT_` are passed over.
///
/// # Errors
/// A file can't be read or parsed, or a value is out of its range.
pub fn load(
    files: &[PathBuf],
    environment: impl IntoIterator<Item = (String, String)>,
) -> Result<Config, ConfigError> {
    let raw = layers::merge(files, environment)?;
    resolve::resolve(raw)
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file can't be read.
    #[error("can't read the configuration file {}", path.display())]
    Unreadable {
        /// Which.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// A file isn't TOML, or has keys or types that don't belong there. The text names line and column.
    #[error("in {}: {error}", path.display())]
    Malformed {
        /// Which.
        path: PathBuf,
        /// What the parser said.
        error: toml::de::Error,
    },
    /// A variable has a name or value that doesn't belong there.
    #[error("in the environment variables MODALKIT_…: {0}")]
    Environment(toml::de::Error),
    /// Two environment variables contradict each other.
    #[error("the environment variable {name} names a key inside {parent}, which has a value of its own")]
    Nested {
        /// The variable.
        name: String,
        /// The key above.
        parent: String,
    },
    /// A value is outside its range.
    #[error("{key} is {found}; expected {expected}")]
    Range {
        /// The key's path.
        key: String,
        /// What it holds.
        found: String,
        /// What it may hold.
        expected: String,
    },
}
