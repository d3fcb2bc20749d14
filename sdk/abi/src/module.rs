//! The table of functions a plugin exports and the few plain types that its calls carry.
//!
//! Every function catches panics on the plugin's side: none unwinds into the host.
//!
//! # Ownership
//!
//! The three handles are pointers made by the plugin. A handle is used only with the table it came from; whoever
//! holds one gives it back exactly once, to the `drop_*` function of its kind or to a function whose text says that
//! it takes it over. Items belong to the library, not to an instance: any instance of the same library may run them.
//!
//! # Threads
//!
//! Every function may be called from any thread. An instance and an item are used by several at once; a batch by one after the other:
//! its stages may run on different threads, so that one batch's `preprocess` can run beside another's `predict`.

use abi_stable::{
    StableAbi, declare_root_module_statics,
    library::RootModule,
    package_version_strings,
    sabi_types::VersionStrings,
    std_types::{ROption, RResult, RSlice, RStr, RString, RVec},
};

use crate::{EventSinkRef, Failure, HostApiRef, LogLevel, SinkHandle, Tensor, handle::handle};

handle! {
    /// A loaded pipeline.
    InstanceHandle
}
handle! {
    /// One decoded input.
    ItemHandle
}
handle! {
    /// The inputs of one batch, what its finished stages left, and its hold on the instance.
    BatchHandle
}

// SAFETY: pointers that only the plugin's functions look behind, which bear any thread; the SDK makes these two of values that are
// `Send + Sync`, and batches of values that are `Send`.
unsafe impl Send for InstanceHandle {}
// SAFETY: as above.
unsafe impl Sync for InstanceHandle {}
// SAFETY: as above.
unsafe impl Send for ItemHandle {}
// SAFETY: as above.
unsafe impl Sync for ItemHandle {}
// SAFETY: as above.
unsafe impl Send for BatchHandle {}

/// How much work an input is, and what it can be batched with.
#[repr(C)]
#[derive(StableAbi, Clone, Copy, Debug, PartialEq, Eq)]
pub struct Measure {
    /// How much work, in a unit of the pipeline's own (tokens, pixels, rows); 1 where the pipeline doesn't say.
    pub cost: u64,
    /// Inputs with the same key fit into one batch without padding; 0 where the pipeline doesn't say.
    pub shape: u64,
}

impl Default for Measure {
    fn default() -> Self {
        Self { cost: 1, shape: 0 }
    }
}

/// An input that was decoded.
#[repr(C)]
#[derive(StableAbi, Clone, Copy, Debug)]
pub struct DecodedItem {
    /// The input.
    pub item: ItemHandle,
    /// By the instance that was given, or the default where none was.
    pub measure: Measure,
}

/// The functions of a plugin.
#[repr(C)]
#[derive(StableAbi)]
#[sabi(kind(Prefix(prefix_ref = PluginModuleRef)))]
#[sabi(missing_field(option))]
pub struct PluginModule {
    /// A document that describes the pipeline; fails where the pipeline's types can't be served. `name` and `version` of the plugin's crate;
    /// `input_schema`, `output_schema` and `settings_schema` are JSON Schemas of one input, one output and the model's own keys.
    pub describe: extern "C" fn() -> RResult<RString, Failure>,
    /// Connects the plugin's own `tracing`, `log` and panic hook to the host's log, for lines down to this level. Calling it again changes
    /// the level.
    pub attach: extern "C" fn(HostApiRef, LogLevel),
    /// Says whether a JSON object is the model's own keys, as `load` would find them.
    pub check_settings: extern "C" fn(RStr<'_>) -> RResult<(), Failure>,
    /// Builds a pipeline of a document. `model_name`; `all_model_data_folder`, which holds every model's data; `common_settings`, which all
    /// models share, and `settings`, the model's own keys: JSON objects; `secrets`: an object of strings by name; `devices`, a list: `ordinal`
    /// (the device's number in this process, as CUDA counts), `name`, `uuid`, `memory_bytes` of all of its memory, and `memory_budget_bytes`
    /// (null for all) that this instance may use.
    pub load: extern "C" fn(RStr<'_>) -> RResult<InstanceHandle, Failure>,
    /// Runs the pipeline's `warmup`.
    pub warmup: unsafe extern "C" fn(InstanceHandle) -> RResult<(), Failure>,
    /// A document of the tensors that the pipeline takes and gives, as it is loaded now; empty where it takes none. `inputs` and `outputs` are lists
    /// of objects: `name`, `datatype` (its name in the Open Inference Protocol, as `FP32`), `shape` (a list, -1 for any size) and, of an
    /// input, `optional` (false where it isn't said). `batched` (true where it isn't said) says that requests have one more dimension before
    /// these: that of the batch. It is asked again after `volume_reload`.
    pub signature: unsafe extern "C" fn(InstanceHandle) -> RResult<RString, Failure>,
    /// Runs the pipeline's `on_volume_reload` with a document: `volume`, its `mount_point`, and the files `changed`, relative to it. Waits for
    /// batches under way, and batches wait for it.
    pub volume_reload: unsafe extern "C" fn(InstanceHandle, RStr<'_>) -> RResult<(), Failure>,
    /// Parses one input, a JSON text. With an instance it is validated and measured too, unless that instance is
    /// [`FailureKind::BUSY`](crate::FailureKind::BUSY).
    pub decode:
        unsafe extern "C" fn(ROption<InstanceHandle>, RSlice<'_, u8>) -> RResult<DecodedItem, Failure>,
    /// Makes one input of tensors, as [`PluginModule::decode`] does of a text; with them comes a document of what else the request says (empty for
    /// one without members). They fit a signature that an instance gave before; after a `volume_reload` it may be another one. The tensors are the plugin's from here on: it keeps their buffers for as long as it likes.
    pub decode_tensors: unsafe extern "C" fn(
        ROption<InstanceHandle>,
        RVec<Tensor>,
        RStr<'_>,
    ) -> RResult<DecodedItem, Failure>,
    /// Validates and measures an item that was decoded without an instance.
    pub validate: unsafe extern "C" fn(InstanceHandle, ItemHandle) -> RResult<Measure, Failure>,
    /// Takes the items over and makes a batch of them, in order. The instance can't change until the batch has ended.
    pub begin: unsafe extern "C" fn(InstanceHandle, RSlice<'_, ItemHandle>) -> BatchHandle,
    /// First stage.
    pub preprocess: unsafe extern "C" fn(BatchHandle) -> RResult<(), Failure>,
    /// Second stage.
    pub predict: unsafe extern "C" fn(BatchHandle) -> RResult<(), Failure>,
    /// Third stage: gives each item's outcome to the host, and chunks before it where the pipeline has any. [`EventSink`](crate::EventSink) says
    /// what becomes of them where it fails.
    pub postprocess: unsafe extern "C" fn(BatchHandle, SinkHandle, EventSinkRef) -> RResult<(), Failure>,
    /// Ends an item that was not made part of a batch.
    pub drop_item: unsafe extern "C" fn(ItemHandle),
    /// Ends a batch.
    pub drop_batch: unsafe extern "C" fn(BatchHandle),
    /// Ends an instance; none of its batches may be left.
    #[sabi(last_prefix_field)]
    pub drop_instance: unsafe extern "C" fn(InstanceHandle),
}

impl RootModule for PluginModuleRef {
    declare_root_module_statics! {PluginModuleRef}
    const BASE_NAME: &'static str = "modalkit_plugin";
    const NAME: &'static str = "modalkit_plugin";
    const VERSION_STRINGS: VersionStrings = package_version_strings!();
}
