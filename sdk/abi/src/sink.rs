//! Where what comes of a batch goes: a table of the host's, which the plugin calls while its `postprocess` runs.

use abi_stable::{
    StableAbi,
    std_types::{RSlice, RString, RVec},
};

use crate::{Failure, Tensor, handle::handle};

handle! {
    /// The host's side of one call of `postprocess`.
    SinkHandle
}

// SAFETY: a pointer that only the host's functions look behind; they may be called from any thread, one at a time.
unsafe impl Send for SinkHandle {}

/// What an item's caller wants to have of it. An unknown value is taken for [`Interest::OUTCOME`].
#[repr(transparent)]
#[derive(StableAbi, Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interest(pub u32);

impl Interest {
    /// The outcome and nothing before it. It may become [`Interest::CHUNKS`], and the other way round.
    pub const OUTCOME: Self = Self(0);
    /// Chunks of JSON as they come, then the outcome.
    pub const CHUNKS: Self = Self(1);
    /// Nothing any more: nobody waits for it, it has its outcome, or there is no such item. This is final.
    pub const NOTHING: Self = Self(2);
}

/// What a chunk does where its caller's queue is full. An unknown value is taken for [`WhenFull::RETURN`].
#[repr(transparent)]
#[derive(StableAbi, Clone, Copy, Debug, PartialEq, Eq)]
pub struct WhenFull(pub u32);

impl WhenFull {
    /// The call returns at once, with [`ChunkResult::FULL`].
    pub const RETURN: Self = Self(0);
    /// The call waits until the caller has read, or the host gives that caller up. It never returns [`ChunkResult::FULL`].
    pub const WAIT: Self = Self(1);
}

/// What became of a chunk. An unknown value is taken for [`ChunkResult::UNWANTED`]: a host gives a plugin no value that is newer than the plugin.
#[repr(transparent)]
#[derive(StableAbi, Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkResult(pub u32);

impl ChunkResult {
    /// It was taken, or dropped since the caller wants none.
    pub const TAKEN: Self = Self(0);
    /// The queue of the item's caller is full: it was not taken.
    pub const FULL: Self = Self(1);
    /// The item is [`Interest::NOTHING`] to everybody by now: it was not taken.
    pub const UNWANTED: Self = Self(2);
}

/// Takes what comes of a batch's items, which are named by their place in the batch, from 0: any number of chunks, then one outcome. The order
/// between items doesn't matter. Its functions may be called from any thread, one at a time, until `postprocess` returns.
///
/// An outcome may reach its caller as soon as it is given. Where `postprocess` fails afterwards, items without an outcome fail with it; of
/// the others the host takes the outcome or the failure.
#[repr(C)]
#[derive(StableAbi)]
#[sabi(kind(Prefix(prefix_ref = EventSinkRef)))]
#[sabi(missing_field(option))]
pub struct EventSink {
    /// The item has an output: a JSON object without white space around it or behind its first brace, and without members named
    /// `status`, `error` and `meta`, which the host adds. It is whole: what went in chunks before is in it as well.
    pub json: unsafe extern "C" fn(SinkHandle, usize, RVec<u8>),
    /// The item has an output of tensors, with a document of what else is to be said of it (empty for one without members). Only where it was
    /// decoded from tensors.
    pub tensors: unsafe extern "C" fn(SinkHandle, usize, RVec<Tensor>, RString),
    /// The item failed.
    pub failed: unsafe extern "C" fn(SinkHandle, usize, Failure),
    /// What the item's caller wants to have, as far as the host has heard. Chunks needn't be written for one who wants none. An item that is
    /// [`Interest::NOTHING`] to everybody may end early, with a failure of any kind or without an outcome.
    pub interest: unsafe extern "C" fn(SinkHandle, usize) -> Interest,
    /// A part of the item's output before its end, or word of how far it has come: any JSON value, as a text in UTF-8, which the host copies and
    /// doesn't look into.
    #[sabi(last_prefix_field)]
    pub chunk: unsafe extern "C" fn(SinkHandle, usize, RSlice<'_, u8>, WhenFull) -> ChunkResult,
}
