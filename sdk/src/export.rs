//! The exported functions: each turns handles back into values, catches panics, and calls the typed pipeline.
//!
//! Every `unsafe` here rests on the ownership rules in `modalkit_abi::PluginModule`, which the host's loader keeps.

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind},
};

use modalkit_abi::{
    ABI_MAJOR, BatchHandle, ChunkResult, DecodedItem, EventSinkRef, Failure, FailureKind, Features,
    Handshake, HostApiRef, InstanceHandle, Interest, ItemHandle, LogLevel, MAGIC, Measure, Needs,
    PluginModule, PluginModuleRef, SinkHandle, StaticStr, Tensor, WhenFull,
    abi_stable::{
        abi_stability::StableAbi,
        library::{LibHeader, RootModuleResult},
        marker_type::ErasedPrefix,
        prefix_type::{PrefixRefTrait, PrefixTypeTrait},
        std_types::{RErr, ROk, ROption, RResult, RSlice, RStr, RString, RVec},
    },
};

use serde_json::json;

use crate::{
    Chunks, ErrorKind, InferencePipeline, PipelineError, VolumeReload,
    chunks::ChunkSink,
    context::parse_settings,
    device::kind_of_text,
    document,
    error::failure,
    forward::{self, serving},
    instance::{Batch, Instance, Item, Refusal, Rendered},
    schema,
};

/// Exports a pipeline as this library's one plugin. The crate's type must be `cdylib`, once in a crate.
///
/// ```
/// # use modalkit_sdk::{InferencePipeline, LoadContext, NoSettings, Outcome, PipelineError};
/// # use std::collections::BTreeMap;
/// # struct Echo;
/// # impl InferencePipeline for Echo {
/// #     type Settings = NoSettings;
/// #     type Input = BTreeMap<String, f32>;
/// #     type Output = BTreeMap<String, f32>;
/// #     type Preprocessed = ();
/// #     type RawOutput = ();
/// #     fn load(_: LoadContext<NoSettings>) -> Result<Self, PipelineError> { Ok(Self) }
/// #     fn preprocess(&self, _: &[Self::Input]) -> Result<(), PipelineError> { Ok(()) }
/// #     fn predict(&self, _: &[Self::Input], (): ()) -> Result<(), PipelineError> { Ok(()) }
/// #     fn postprocess(&self, inputs: &[Self::Input], (): ()) -> Result<Vec<Outcome<Self::Output>>, PipelineError> {
/// #         Ok(inputs.iter().map(|input| Ok(input.clone())).collect())
/// #     }
/// # }
/// modalkit_sdk::export_pipeline!(Echo);
/// ```
#[macro_export]
macro_rules! export_pipeline {
    ($pipeline:ty) => {
        const _: () = {
            use $crate::__private as private;

            extern "C" fn constructor() -> private::RootModuleResult {
                private::constructor_of::<$pipeline>(env!("CARGO_PKG_NAME"), env!("CARGO_PKG_VERSION"))
            }

            static HEADER: private::LibHeader = private::header_of(constructor);

            #[unsafe(no_mangle)]
            static modalkit_plugin_handshake: private::Handshake =
                private::handshake_of(&HEADER, cfg!(panic = "abort"));

            // Beside the handshake, whose fields are frozen.
            #[unsafe(no_mangle)]
            static modalkit_plugin_needs: private::Needs = private::NEEDS;
            #[unsafe(no_mangle)]
            static modalkit_plugin_debug_assertions: u8 = cfg!(debug_assertions) as u8;
        };
    };
}

#[doc(hidden)]
pub const fn header_of(constructor: extern "C" fn() -> RootModuleResult) -> LibHeader {
    // SAFETY: `export_pipeline!` passes a constructor that returns what `constructor_of` made: a `PluginModuleRef`.
    unsafe {
        LibHeader::from_constructor::<PluginModuleRef>(
            constructor,
            modalkit_abi::abi_stable::library::CheckTypeLayout::Yes,
        )
    }
}

#[doc(hidden)]
pub const fn handshake_of(header: &'static LibHeader, panic_aborts: bool) -> Handshake {
    Handshake {
        magic: MAGIC,
        abi_major: ABI_MAJOR,
        panic_aborts: panic_aborts as u32,
        sdk_version: StaticStr::new(env!("CARGO_PKG_VERSION")),
        rustc_version: StaticStr::new(env!("MODALKIT_RUSTC_VERSION")),
        header,
    }
}

#[doc(hidden)]
pub const NEEDS: Needs = Needs::of(Features::NONE);

#[doc(hidden)]
pub fn constructor_of<P: InferencePipeline>(name: &'static str, version: &'static str) -> RootModuleResult {
    forward::set_plugin(name, version);
    let module = PluginModule {
        describe: describe::<P>,
        attach,
        check_settings: check_settings::<P>,
        load: load::<P>,
        warmup: warmup::<P>,
        signature: signature::<P>,
        volume_reload: volume_reload::<P>,
        decode: decode::<P>,
        decode_tensors: decode_tensors::<P>,
        validate: validate::<P>,
        begin: begin::<P>,
        preprocess: preprocess::<P>,
        predict: predict::<P>,
        postprocess: postprocess::<P>,
        drop_item: drop_item::<P>,
        drop_batch: drop_batch::<P>,
        drop_instance: drop_instance::<P>,
    };
    // SAFETY: `header_of` names the same type, and abi_stable checks its layout before the host turns it back.
    ROk(unsafe { module.leak_into_prefix().to_prefix_ref().cast::<ErasedPrefix>() })
}

extern "C" fn describe<P: InferencePipeline>() -> RResult<RString, Failure> {
    guarded(|| {
        let (name, version) = forward::plugin();
        let description = json!({
            "name": name,
            "version": version,
            "input_schema": schema::of_input::<P::Input>(),
            "output_schema": schema::of_output::<P::Output>()?,
            "settings_schema": schema::of_settings::<P::Settings>(),
        });
        Ok(description.to_string().into())
    })
}

pub(crate) extern "C" fn attach(host: HostApiRef, level: LogLevel) {
    let attached = guarded(|| {
        forward::attach(host, level);
        Ok(())
    });
    // A plugin whose log can't be connected still serves; there is nowhere to say so.
    drop(attached);
}

extern "C" fn check_settings<P: InferencePipeline>(json: RStr<'_>) -> RResult<(), Failure> {
    guarded(|| parse_settings::<P::Settings>(&json).map(drop))
}

extern "C" fn load<P: InferencePipeline>(given: RStr<'_>) -> RResult<InstanceHandle, Failure> {
    guarded(|| {
        let given: document::Load<'_> = document::read("load", given.as_str())?;
        serving(&given.model_name);
        Ok(InstanceHandle::from_raw(into_raw(Instance::<P>::load(given)?)))
    })
}

unsafe extern "C" fn warmup<P: InferencePipeline>(instance: InstanceHandle) -> RResult<(), Failure> {
    // SAFETY: a live instance of this library.
    let instance = unsafe { instance_ref::<P>(instance) };
    serving(&instance.model);
    guarded(|| instance.warmup())
}

unsafe extern "C" fn signature<P: InferencePipeline>(instance: InstanceHandle) -> RResult<RString, Failure> {
    // SAFETY: a live instance of this library.
    let instance = unsafe { instance_ref::<P>(instance) };
    serving(&instance.model);
    guarded(|| match instance.signature() {
        Some(signature) => Ok(serde_json::to_string(&signature)?.into()),
        None => Ok(RString::new()),
    })
}

unsafe extern "C" fn volume_reload<P: InferencePipeline>(
    instance: InstanceHandle,
    change: RStr<'_>,
) -> RResult<(), Failure> {
    // SAFETY: a live instance of this library.
    let instance = unsafe { instance_ref::<P>(instance) };
    serving(&instance.model);
    guarded(|| {
        let change: document::VolumeChange = document::read("volume_reload", change.as_str())?;
        instance.volume_reload(&VolumeReload::new(change.volume, change.mount_point, change.changed))
    })
}

unsafe extern "C" fn decode<P: InferencePipeline>(
    instance: ROption<InstanceHandle>,
    json: RSlice<'_, u8>,
) -> RResult<DecodedItem, Failure> {
    // SAFETY: a live instance of this library.
    unsafe { decoded::<P>(instance, || Item::parse(json.as_slice())) }
}

unsafe extern "C" fn decode_tensors<P: InferencePipeline>(
    instance: ROption<InstanceHandle>,
    tensors: RVec<Tensor>,
    _parameters: RStr<'_>,
) -> RResult<DecodedItem, Failure> {
    let item = || {
        let tensors: Result<Vec<_>, _> = tensors.into_iter().map(crate::Tensor::from_abi).collect();
        Item::of_tensors(tensors.map_err(Refusal::Invalid)?.into())
    };
    // SAFETY: a live instance of this library.
    unsafe { decoded::<P>(instance, item) }
}

/// Makes an item, and has the instance look at it.
///
/// # Safety
/// The instance is a live one of this library.
unsafe fn decoded<P: InferencePipeline>(
    instance: ROption<InstanceHandle>,
    item: impl FnOnce() -> Result<Item<P>, Refusal>,
) -> RResult<DecodedItem, Failure> {
    // SAFETY: by the caller's promise.
    let instance = instance.into_option().map(|instance| unsafe { instance_ref::<P>(instance) });
    serving(instance.map_or("", |instance| &instance.model));
    examined(|| {
        let item = item()?;
        let measure = match instance {
            Some(instance) => instance.try_validate(&item)?,
            None => Measure::default(),
        };
        Ok(DecodedItem { item: ItemHandle::from_raw(into_raw(item)), measure })
    })
}

unsafe extern "C" fn validate<P: InferencePipeline>(
    instance: InstanceHandle,
    item: ItemHandle,
) -> RResult<Measure, Failure> {
    // SAFETY: a live instance and a live item of this library.
    let (instance, item) = unsafe { (instance_ref::<P>(instance), &*item.into_raw().cast::<Item<P>>()) };
    serving(&instance.model);
    examined(|| instance.validate(item))
}

unsafe extern "C" fn begin<P: InferencePipeline>(
    instance: InstanceHandle,
    items: RSlice<'_, ItemHandle>,
) -> BatchHandle {
    // SAFETY: a live instance of this library.
    let instance = unsafe { instance_ref::<P>(instance) };
    // SAFETY: live items of this library, each named once; the caller gives them up.
    let items = items.iter().map(|item| unsafe { *from_raw::<Item<P>>(item.into_raw()) });
    serving(&instance.model);
    BatchHandle::from_raw(into_raw(instance.begin(items)))
}

unsafe extern "C" fn preprocess<P: InferencePipeline>(batch: BatchHandle) -> RResult<(), Failure> {
    // SAFETY: a live batch of this library, used by one thread at a time.
    let batch = unsafe { batch_mut::<P>(batch) };
    serving(&batch.model);
    guarded(|| batch.preprocess())
}

unsafe extern "C" fn predict<P: InferencePipeline>(batch: BatchHandle) -> RResult<(), Failure> {
    // SAFETY: a live batch of this library, used by one thread at a time.
    let batch = unsafe { batch_mut::<P>(batch) };
    serving(&batch.model);
    guarded(|| batch.predict())
}

unsafe extern "C" fn postprocess<P: InferencePipeline>(
    batch: BatchHandle,
    handle: SinkHandle,
    sink: EventSinkRef,
) -> RResult<(), Failure> {
    // SAFETY: a live batch of this library, used by one thread at a time.
    let batch = unsafe { batch_mut::<P>(batch) };
    serving(&batch.model);
    guarded(|| {
        let mut host = HostSink { handle, sink };
        for (item, outcome) in batch.postprocess(&mut Chunks::of(&mut host))?.into_iter().enumerate() {
            match batch.render(item, outcome) {
                // SAFETY: the handle that goes with the table, on the thread and in the call that it was given for.
                Ok(Rendered::Json(json)) => unsafe { sink.json()(handle, item, json.into()) },
                Ok(Rendered::Tensors(tensors)) => {
                    let tensors = tensors.into_iter().map(crate::Tensor::into_abi).collect();
                    // SAFETY: as above.
                    unsafe { sink.tensors()(handle, item, tensors, RString::new()) };
                }
                // SAFETY: as above.
                Err(error) => unsafe { sink.failed()(handle, item, error.into_failure()) },
            }
        }
        Ok(())
    })
}

/// The host as it takes the chunks of a batch; made and dropped within one call of `postprocess`.
struct HostSink {
    handle: SinkHandle,
    sink: EventSinkRef,
}

impl ChunkSink for HostSink {
    fn interest(&mut self, item: usize) -> Interest {
        // SAFETY: the handle that goes with the table, within the call that it was given for, which `Chunks` can't leave, and one call at a time, as
        // `&mut self` says.
        unsafe { self.sink.interest()(self.handle, item) }
    }

    fn chunk(&mut self, item: usize, json: &[u8], when_full: WhenFull) -> ChunkResult {
        // SAFETY: as above.
        unsafe { self.sink.chunk()(self.handle, item, json.into(), when_full) }
    }
}

unsafe extern "C" fn drop_item<P: InferencePipeline>(item: ItemHandle) {
    // SAFETY: a live item of this library, given up by the caller.
    discard(|| unsafe { from_raw::<Item<P>>(item.into_raw()) });
}

unsafe extern "C" fn drop_batch<P: InferencePipeline>(batch: BatchHandle) {
    // SAFETY: a live batch of this library, used by one thread at a time.
    serving(unsafe { &batch_mut::<P>(batch).model });
    // SAFETY: a live batch of this library, given up by the caller.
    discard(|| unsafe { from_raw::<Batch<P>>(batch.into_raw()) });
}

unsafe extern "C" fn drop_instance<P: InferencePipeline>(instance: InstanceHandle) {
    // SAFETY: a live instance of this library.
    serving(unsafe { &instance_ref::<P>(instance).model });
    // SAFETY: as above, and given up by the caller.
    discard(|| unsafe { from_raw::<Instance<P>>(instance.into_raw()) });
}

/// A value that any thread may use next: the host says which.
pub(crate) fn into_raw<T: Send>(value: T) -> *mut () {
    Box::into_raw(Box::new(value)).cast()
}

/// # Safety
/// `raw` came from [`into_raw`] with the same `T` and is given up.
pub(crate) unsafe fn from_raw<T>(raw: *mut ()) -> Box<T> {
    // SAFETY: by the caller's promise.
    unsafe { Box::from_raw(raw.cast()) }
}

/// # Safety
/// A live instance of this library, for as long as the reference is used.
unsafe fn instance_ref<'a, P>(instance: InstanceHandle) -> &'a Instance<P> {
    // SAFETY: by the caller's promise.
    unsafe { &*instance.into_raw().cast() }
}

/// # Safety
/// A live batch of this library that nobody else uses.
unsafe fn batch_mut<'a, P: InferencePipeline>(batch: BatchHandle) -> &'a mut Batch<P> {
    // SAFETY: by the caller's promise.
    unsafe { &mut *batch.into_raw().cast() }
}

/// Runs plugin code; errors and panics come back as a [`Failure`].
pub(crate) fn guarded<T>(run: impl FnOnce() -> Result<T, PipelineError>) -> RResult<T, Failure> {
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(value)) => ROk(value),
        Ok(Err(error)) => RErr(error.into_failure()),
        Err(panic) => RErr(panicked(panic)),
    }
}

/// Looks at an input; refusals and panics come back as a [`Failure`].
fn examined<T>(run: impl FnOnce() -> Result<T, Refusal>) -> RResult<T, Failure> {
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(value)) => ROk(value),
        Ok(Err(Refusal::Malformed(error))) => RErr(failure(FailureKind::MALFORMED_INPUT, error.to_string())),
        Ok(Err(Refusal::Invalid(invalid))) => RErr(invalid.into_failure()),
        Ok(Err(Refusal::Busy)) => RErr(failure(FailureKind::BUSY, "the pipeline is changing".into())),
        Err(panic) => RErr(panicked(panic)),
    }
}

/// Drops a value of the author's, whose `drop` may panic; the panic hook has logged it then.
pub(crate) fn discard<T>(take: impl FnOnce() -> Box<T>) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| drop(take()))) {
        std::mem::forget(panic);
    }
}

fn panicked(panic: Box<dyn Any + Send>) -> Failure {
    let message = if let Some(text) = panic.downcast_ref::<&str>() {
        format!("the pipeline panicked: {text}")
    } else if let Some(text) = panic.downcast_ref::<String>() {
        format!("the pipeline panicked: {text}")
    } else {
        "the pipeline panicked".to_owned()
    };
    // A payload of the author's own type may panic when it is dropped, outside every `catch_unwind`.
    std::mem::forget(panic);
    // A pipeline that unwraps what CUDA says panics with it.
    let lost = kind_of_text(&message) == Some(ErrorKind::DeviceLost);
    let kind = if lost { FailureKind::DEVICE_SUSPECTED } else { FailureKind::PANICKED };
    failure(kind, message)
}

const _: () = {
    const fn crosses_the_boundary<T: StableAbi>() {}
    crosses_the_boundary::<PluginModuleRef>();
};

#[cfg(test)]
mod tests;
