//! Where a caller comes from. It never knows what that caller may do.

use std::{fmt, net::SocketAddr};

/// Where a caller comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The network. A loopback address is no identity: proxies, pages in browsers and other users have it too.
    Network(SocketAddr),
    /// The management socket, by a process of this user.
    Socket {
        /// The user's number.
        uid: u32,
    },
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Network(address) => address.fmt(f),
            Self::Socket { uid } => write!(f, "uid {uid}"),
        }
    }
}
