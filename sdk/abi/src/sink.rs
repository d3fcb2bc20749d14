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

/// What an item's caller wants to have of it. An unknown value is taken for [`Interest::OUTCOME`].
#[repr(transparent)]
#[derive(StableAbi, Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interest(pub u32);

impl Interest {
    /// The outcome and nothing before it.
    pub const OUTCOME: Self = Self(0);
    /// Chunks as they come, then the outcome.
    pub const CHUNKS: Self = Self(1);
    /// Nothing any more: nobody waits, or there is no such item.
    pub const NOTHING: Self = Self(2);
}

/// What became of a chunk. An unknown value is taken for [`ChunkState::TAKEN`].
#[repr(transparent)]
#[derive(StableAbi, Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkState(pub u32);

impl ChunkState {
    /// It goes to the caller, or to nobody where the caller wants none.
    pub const TAKEN: Self = Self(0);
    /// As many wait as may, until the caller reads on: it was not taken.
    pub const FULL: Self = Self(1);
    /// Nobody wants anything of this item any more: it was not taken.
    pub const UNWANTED: Self = Self(2);
}

/// Takes what comes of a batch's items, which are named by their place in the batch, from 0: any number of chunks, then one outcome. The order
/// between items doesn't matter. Called by the thread that called `postprocess`, and not after that has returned.
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
    /// What the item's caller wants to have now: chunks needn't be written for one who wants none, and an item that nobody wants needn't be
    /// finished.
    pub interest: unsafe extern "C" fn(SinkHandle, usize) -> Interest,
    /// A part of the item's output before its end: any JSON value. With `true` it waits for a caller who reads slowly, as long as the host lets a batch
    /// wait; then that caller is cut off.
    #[sabi(last_prefix_field)]
    pub chunk: unsafe extern "C" fn(SinkHandle, usize, RSlice<'_, u8>, bool) -> ChunkState,
}
