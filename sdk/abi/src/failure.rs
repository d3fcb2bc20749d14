//! Why a call failed, and what can be done about it.

use abi_stable::{StableAbi, std_types::RString};

/// What the caller of a failed call can do about it. An unknown kind is taken for [`FailureKind::PERMANENT`].
#[repr(transparent)]
#[derive(StableAbi, Clone, Copy, Debug, PartialEq, Eq)]
pub struct FailureKind(pub u32);

impl FailureKind {
    /// The pipeline failed and would fail again.
    pub const PERMANENT: Self = Self(0);
    /// The pipeline failed; the same input may succeed on another try.
    pub const TRANSIENT: Self = Self(1);
    /// The device under the pipeline is lost until the process ends.
    pub const DEVICE_LOST: Self = Self(2);
    /// It may be, by the words of an error or panic that had no code to give. Words may be anybody's: the driver knows.
    pub const DEVICE_SUSPECTED: Self = Self(3);
    /// The plugin's code panicked.
    pub const PANICKED: Self = Self(4);
    /// The bytes are not the pipeline's `Input`.
    pub const MALFORMED_INPUT: Self = Self(5);
    /// The input itself can't be served; the same input fails again. Where `validate` turned it down, the details have `faults`: a
    /// list of objects with a `path`, which is a list of members' names and elements' indices, and a `message`.
    pub const INVALID_INPUT: Self = Self(6);
    /// The instance is busy changing, so `validate` could not run: decode without an instance and validate later.
    pub const BUSY: Self = Self(7);
}

/// Why a call failed.
#[repr(C)]
#[derive(StableAbi, Clone, Debug)]
pub struct Failure {
    /// What can be done.
    pub kind: FailureKind,
    /// The error and its causes, one line.
    pub message: RString,
    /// A document; empty for one without members.
    pub details: RString,
}
