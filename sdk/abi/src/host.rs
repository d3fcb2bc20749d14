//! What a host offers to its plugins.

use abi_stable::{StableAbi, std_types::RStr};

use crate::Features;

/// A log level, the most severe first. An unknown one is taken for [`LogLevel::TRACE`].
#[repr(transparent)]
#[derive(StableAbi, Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LogLevel(pub u32);

impl LogLevel {
    /// Nothing is logged.
    pub const OFF: Self = Self(0);
    /// Errors.
    pub const ERROR: Self = Self(1);
    /// Warnings.
    pub const WARN: Self = Self(2);
    /// What an operator wants to know.
    pub const INFO: Self = Self(3);
    /// What a developer wants to know.
    pub const DEBUG: Self = Self(4);
    /// Everything.
    pub const TRACE: Self = Self(5);
}

/// The functions of a host. The table lives as long as the process.
#[repr(C)]
#[derive(StableAbi)]
#[sabi(kind(Prefix(prefix_ref = HostApiRef)))]
#[sabi(missing_field(option))]
pub struct HostApi {
    /// The bits of the [`Features`] that the host has.
    pub features: u64,
    /// Takes a line for the host's log: its level; the model that the thread served last, or on a thread of the plugin's own the plugin's
    /// name; the module that logged; the text; the fields, as `key=value` separated by blanks, those of the enclosing spans first.
    /// May be called from any thread, never after the process began to exit.
    #[sabi(last_prefix_field)]
    pub log: extern "C" fn(LogLevel, RStr<'_>, RStr<'_>, RStr<'_>, RStr<'_>),
}

impl HostApiRef {
    /// The host's features as a set.
    #[must_use]
    pub fn offers(self) -> Features {
        Features(self.features())
    }
}
