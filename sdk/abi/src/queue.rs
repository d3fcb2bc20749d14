//! The table of functions that a queue plugin exports. It stands beside the pipeline's: a library exports one of the two.
//!
//! What was said of handles, panics and ownership in [`crate::PluginModule`] holds here.

use abi_stable::{
    StableAbi, declare_root_module_statics,
    library::RootModule,
    package_version_strings,
    sabi_types::VersionStrings,
    std_types::{ROption, RResult, RSlice, RStr, RString, RVec},
};

use crate::{Failure, HostApiRef, LogLevel, handle::handle};

/// The name under which a queue plugin exports its [`crate::Handshake`], NUL-terminated for `dlsym`.
pub const QUEUE_HANDSHAKE_SYMBOL: &[u8] = b"modalkit_queue_handshake\0";

handle! {
    /// An opened queue backend.
    QueueHandle
}

// SAFETY: the SDK makes these handles only of values that are `Send + Sync`; its trait bounds say so.
unsafe impl Send for QueueHandle {}
// SAFETY: as above.
unsafe impl Sync for QueueHandle {}

/// A message on its way to a queue.
#[repr(C)]
#[derive(StableAbi, Clone, Debug)]
pub struct QueueMessage<'a> {
    /// The job that it tells of.
    pub job_id: RStr<'a>,
    /// JSON.
    pub body: RSlice<'a, u8>,
    /// The trace that it belongs to.
    pub traceparent: ROption<RStr<'a>>,
}

/// What became of messages: one entry each, in order.
pub type Sent = RVec<RResult<(), Failure>>;

/// The functions of a queue plugin.
#[repr(C)]
#[derive(StableAbi)]
#[sabi(kind(Prefix(prefix_ref = QueueModuleRef)))]
#[sabi(missing_field(option))]
pub struct QueueModule {
    /// A document that describes the backend: `name` and `version` of the plugin's crate, and `settings_schema`, a JSON Schema of the
    /// backend's own keys.
    pub describe: extern "C" fn() -> RResult<RString, Failure>,
    /// As in [`crate::PluginModule::attach`].
    pub attach: extern "C" fn(HostApiRef, LogLevel),
    /// Opens a backend of a document: `backend_name` in the configuration, `settings`, an object of the backend's own keys, and `secrets`, an
    /// object of strings by name.
    pub open: extern "C" fn(RStr<'_>) -> RResult<QueueHandle, Failure>,
    /// Says whether messages could be sent.
    pub check: unsafe extern "C" fn(QueueHandle) -> RResult<(), Failure>,
    /// Sends messages to a queue, in order; fails whole where the plugin panicked.
    pub send:
        unsafe extern "C" fn(QueueHandle, RStr<'_>, RSlice<'_, QueueMessage<'_>>) -> RResult<Sent, Failure>,
    /// Ends a backend.
    #[sabi(last_prefix_field)]
    pub drop_queue: unsafe extern "C" fn(QueueHandle),
}

impl RootModule for QueueModuleRef {
    declare_root_module_statics! {QueueModuleRef}
    const BASE_NAME: &'static str = "modalkit_queue";
    const NAME: &'static str = "modalkit_queue";
    const VERSION_STRINGS: VersionStrings = package_version_strings!();
}
