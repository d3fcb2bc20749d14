//! Why a caller may not, in words. It never knows the keys.

use std::{fmt, sync::Arc, time::Duration};

/// How somebody on the host's machine manages it without a key.
const SOCKET_HINT: &str = "on the host's machine, its own user needs none: `modalkit models`, `modalkit reload` and so on use the Unix socket (server.management_socket)";

/// Why a caller may not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AccessError {
    /// No key was sent.
    Missing {
        /// The header that it is expected in.
        header: String,
        /// Whether it would have to be one that manages.
        to_manage: bool,
    },
    /// The key is none of ours.
    Wrong {
        /// The header that it is expected in.
        header: String,
    },
    /// Management, of a caller over the network who shows no key that manages.
    NoManagement {
        /// The name of the key that it shows; `None` where this host has no keys.
        key: Option<Arc<str>>,
    },
    /// The key has called too often: come back after this time.
    TooOften(Duration),
    /// The key has too many requests in flight.
    TooMany,
    /// Nobody knows the keys yet: come back.
    Unknown,
}

impl fmt::Display for AccessError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing { header, to_manage: false } => {
                write!(f, "expected a key in the header {header}, found none")
            }
            Self::Missing { header, to_manage: true } => {
                write!(
                    f,
                    "expected a key with management = true in the header {header}, found none; {SOCKET_HINT}"
                )
            }
            Self::Wrong { header } => write!(f, "the key in the header {header} is none of this host's"),
            Self::NoManagement { key } => {
                let found = match key {
                    Some(_) => "the key shown may call models only",
                    None => "this host has no keys",
                };
                write!(f, "expected a key with management = true, found that {found}; {SOCKET_HINT}")
            }
            Self::TooOften(_) => f.write_str("this key has called too often (requests_per_second)"),
            Self::TooMany => f.write_str("this key has too many requests in flight (concurrency_max)"),
            Self::Unknown => f.write_str("the host doesn't know its keys yet; its log says why"),
        }
    }
}
