//! The table of functions a plugin exports and the few plain types that its calls carry.
//!
//! Every function catches panics on the plugin's side: none unwinds into the host.
//!
//! # Ownership
//!
//! The three handles are pointers made by the plugin. A handle is used only with the table it came from; whoever
//! holds one gives it back exactly once, to the `drop_*` function of its kind or to a function whose text says that
//! it takes it over. Items belong to the library, not to an instance: any instance of the same library may run them.

use std::fmt;

use abi_stable::{
    StableAbi, declare_root_module_statics,
    library::RootModule,
    package_version_strings,
    sabi_types::VersionStrings,
    std_types::{ROption, RResult, RSlice, RStr, RString, RVec},
};

macro_rules! handle {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[repr(transparent)]
        #[derive(StableAbi, Clone, Copy, Debug, PartialEq, Eq)]
        pub struct $name(*mut ());

        impl $name {
            /// Wraps the plugin's pointer.
            #[must_use]
            pub const fn from_raw(raw: *mut ()) -> Self {
                Self(raw)
            }

            /// The plugin's pointer.
            #[must_use]
            pub const fn into_raw(self) -> *mut () {
                self.0
            }
        }
    };
}

handle! {
    /// A loaded pipeline.
    InstanceHandle
}
handle! {
    /// One decoded input.
    ItemHandle
}
handle! {
    /// The inputs of one batch, what its finished stages left, and its hold on the instance. Stays on the thread that
    /// began it.
    BatchHandle
}

// SAFETY: the SDK makes these handles only of values that are `Send + Sync`; its trait bounds say so.
unsafe impl Send for InstanceHandle {}
// SAFETY: as above.
unsafe impl Sync for InstanceHandle {}
// SAFETY: as above.
unsafe impl Send for ItemHandle {}
// SAFETY: as above.
unsafe impl Sync for ItemHandle {}

/// What the caller of a failed call can do about it.
#[repr(u8)]
#[derive(StableAbi, Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailureKind {
    /// The input itself can't be served; the same input fails again.
    InvalidInput,
    /// The pipeline failed and would fail again.
    Permanent,
    /// The pipeline failed; the same input may succeed on another try.
    Transient,
    /// The device under the pipeline is lost until the process ends.
    DeviceLost,
    /// It may be, by the words of an error or panic that had no code to give. Words may be anybody's: the driver knows.
    DeviceSuspected,
    /// The plugin's code panicked.
    Panicked,
}

/// Why a call failed.
#[repr(C)]
#[derive(StableAbi, Clone, Debug)]
pub struct Failure {
    /// What can be done.
    pub kind: FailureKind,
    /// The error and its causes, one line.
    pub message: RString,
}

/// One step of the way to a value inside an input.
#[repr(u8)]
#[derive(StableAbi, Clone, Debug, PartialEq, Eq)]
pub enum PathSegment {
    /// A member of an object.
    Key(RString),
    /// An element of an array, from 0.
    Index(u64),
}

/// One thing that is wrong with an input.
#[repr(C)]
#[derive(StableAbi, Clone, Debug)]
pub struct InputFault {
    /// Where in the input.
    pub path: RVec<PathSegment>,
    /// What is wrong.
    pub message: RString,
}

/// Why an input was not taken.
#[repr(u8)]
#[derive(StableAbi, Clone, Debug)]
pub enum Rejection {
    /// The bytes are not the pipeline's `Input`.
    Malformed {
        /// What serde said.
        message: RString,
    },
    /// The input was parsed, and the pipeline's `validate` turned it down.
    Invalid {
        /// What is wrong with it; one fault at least.
        faults: RVec<InputFault>,
    },
    /// The plugin failed (or panicked) while it looked at the input.
    Failed(Failure),
    /// The instance is busy changing, so `validate` could not run: decode without an instance and validate later.
    Busy,
}

/// Log levels, the most severe first.
#[repr(u8)]
#[derive(StableAbi, Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum LogLevel {
    /// Nothing is logged.
    Off,
    /// Errors.
    Error,
    /// Warnings.
    Warn,
    /// What an operator wants to know.
    Info,
    /// What a developer wants to know.
    Debug,
    /// Everything.
    Trace,
}

/// One line on its way from a plugin to the host's log.
#[repr(C)]
#[derive(StableAbi, Clone, Debug)]
pub struct LogRecord<'a> {
    /// Its level.
    pub level: LogLevel,
    /// The model that the thread served last; on a thread of the plugin's own, the plugin's name.
    pub model: RStr<'a>,
    /// The module that logged.
    pub target: RStr<'a>,
    /// The text.
    pub message: RStr<'a>,
    /// The fields, as `key=value` separated by blanks; those of the enclosing spans come first.
    pub fields: RStr<'a>,
}

/// What the host offers to a plugin.
#[repr(C)]
#[derive(StableAbi, Clone, Copy)]
pub struct HostApi {
    /// Takes a line for the host's log. May be called from any thread, never after the process began to exit.
    pub log: extern "C" fn(&LogRecord<'_>),
    /// The least severe level worth sending.
    pub level: LogLevel,
}

/// What a plugin says of itself once its layout is known to match.
#[repr(C)]
#[derive(StableAbi, Clone, Debug)]
pub struct Description {
    /// The plugin crate's name.
    pub name: RString,
    /// The plugin crate's version.
    pub version: RString,
    /// JSON Schema of one input.
    pub input_schema: RString,
    /// JSON Schema of one output.
    pub output_schema: RString,
    /// JSON Schema of the model's own keys.
    pub settings_schema: RString,
}

/// A secret's name and value.
#[repr(C)]
#[derive(StableAbi, Clone)]
pub struct Secret<'a> {
    /// Its name.
    pub name: RStr<'a>,
    /// What nobody else should see.
    pub value: RStr<'a>,
}

impl fmt::Debug for Secret<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Secret").field("name", &self.name).finish_non_exhaustive()
    }
}

/// A device that is leased to an instance.
#[repr(C)]
#[derive(StableAbi, Clone, Debug)]
pub struct LeasedDevice<'a> {
    /// Its number in this process, as CUDA counts.
    pub ordinal: u32,
    /// As its maker calls it.
    pub name: RStr<'a>,
    /// Its own for ever: `GPU-…`.
    pub uuid: RStr<'a>,
    /// Bytes of all of its memory.
    pub memory_bytes: u64,
    /// Bytes that this instance may use, where others share the device.
    pub memory_budget_bytes: ROption<u64>,
}

/// What a pipeline is loaded with.
#[repr(C)]
#[derive(StableAbi, Clone, Debug)]
pub struct LoadArgs<'a> {
    /// The model's name.
    pub model_name: RStr<'a>,
    /// The folder that holds every model's data.
    pub all_model_data_folder: RStr<'a>,
    /// `model_settings.common`, a JSON object.
    pub common_settings: RStr<'a>,
    /// The model's own keys of its entry, a JSON object.
    pub settings: RStr<'a>,
    /// The secrets that its deployment names.
    pub secrets: RSlice<'a, Secret<'a>>,
    /// The devices that it was given; none where it asked for none.
    pub devices: RSlice<'a, LeasedDevice<'a>>,
}

/// What changed in a volume.
#[repr(C)]
#[derive(StableAbi, Clone, Debug)]
pub struct VolumeChange<'a> {
    /// The volume's name.
    pub volume: RStr<'a>,
    /// Its mount point.
    pub mount_point: RStr<'a>,
    /// Changed files, relative to the mount point.
    pub changed: RSlice<'a, RStr<'a>>,
}

/// What became of a batch: one entry an item, in order. A success is the output: a JSON object without white space around it or behind its first brace, and without
/// members named `status`, `error` and `meta`, which the host adds.
pub type Outcomes = RVec<RResult<RVec<u8>, Failure>>;

/// The functions of a plugin.
#[repr(C)]
#[derive(StableAbi)]
#[sabi(kind(Prefix(prefix_ref = PluginModuleRef)))]
#[sabi(missing_field(panic))]
pub struct PluginModule {
    /// Name, version and schemas; fails where the pipeline's types can't be served.
    pub describe: extern "C" fn() -> RResult<Description, Failure>,
    /// Connects the plugin's own `tracing`, `log` and panic hook to the host's log. Calling it again changes the level.
    pub attach: extern "C" fn(HostApi),
    /// Says whether a JSON object is the model's own keys, as `load` would find them.
    pub check_settings: extern "C" fn(RStr<'_>) -> RResult<(), Failure>,
    /// Builds a pipeline.
    pub load: extern "C" fn(LoadArgs<'_>) -> RResult<InstanceHandle, Failure>,
    /// Runs the pipeline's `warmup`.
    pub warmup: unsafe extern "C" fn(InstanceHandle) -> RResult<(), Failure>,
    /// Runs the pipeline's `on_volume_reload`; waits for batches under way, and batches wait for it.
    pub volume_reload: unsafe extern "C" fn(InstanceHandle, &VolumeChange<'_>) -> RResult<(), Failure>,
    /// Parses one input. With an instance it is validated too, unless that instance is [`Rejection::Busy`].
    pub decode:
        unsafe extern "C" fn(ROption<InstanceHandle>, RSlice<'_, u8>) -> RResult<ItemHandle, Rejection>,
    /// Validates an item that was decoded without an instance.
    pub validate: unsafe extern "C" fn(InstanceHandle, ItemHandle) -> RResult<(), Rejection>,
    /// Takes the items over and makes a batch of them, in order. The instance can't change until the batch has ended.
    pub begin: unsafe extern "C" fn(InstanceHandle, RSlice<'_, ItemHandle>) -> BatchHandle,
    /// First stage.
    pub preprocess: unsafe extern "C" fn(BatchHandle) -> RResult<(), Failure>,
    /// Second stage.
    pub predict: unsafe extern "C" fn(BatchHandle) -> RResult<(), Failure>,
    /// Third stage: one outcome an item, in order.
    pub postprocess: unsafe extern "C" fn(BatchHandle) -> RResult<Outcomes, Failure>,
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
