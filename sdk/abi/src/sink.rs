//! Where a batch's outcomes go: a table of the host's, which the plugin calls while its `postprocess` runs.

use abi_stable::{
    StableAbi,
    std_types::{RString, RVec},
};

use crate::{Failure, Tensor, handle::handle};

handle! {
    /// The host's side of one call of `postprocess`.
    SinkHandle
}

/// Takes the outcomes of a batch's items, which are named by their place in the batch, from 0. Each item has one end; which order they
/// come in doesn't matter. Called by the thread that called `postprocess`, and not after that has returned.
#[repr(C)]
#[derive(StableAbi)]
#[sabi(kind(Prefix(prefix_ref = OutcomeSinkRef)))]
#[sabi(missing_field(option))]
pub struct OutcomeSink {
    /// The item has an output: a JSON object without white space around it or behind its first brace, and without members named
    /// `status`, `error` and `meta`, which the host adds.
    pub json: unsafe extern "C" fn(SinkHandle, usize, RVec<u8>),
    /// The item has an output of tensors, with a document of what else is to be said of it (empty for one without members). Only where it was
    /// decoded from tensors.
    pub tensors: unsafe extern "C" fn(SinkHandle, usize, RVec<Tensor>, RString),
    /// The item failed.
    #[sabi(last_prefix_field)]
    pub failed: unsafe extern "C" fn(SinkHandle, usize, Failure),
}
