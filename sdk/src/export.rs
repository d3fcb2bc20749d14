//! The exported functions: each turns handles back into values, catches panics, and calls the typed pipeline.
//!
//! Every `unsafe` here rests on the ownership rules in `modalkit_abi::PluginModule`, which the host's loader keeps.

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind},
};

use modalkit_abi::{
    ABI_VERSION, BatchHandle, Description, Failure, FailureKind, Handshake, HostApi, InstanceHandle,
    ItemHandle, LoadArgs, MAGIC, Outcomes, PluginModule, PluginModuleRef, Rejection, StaticStr, VolumeChange,
    abi_stable::{
        abi_stability::StableAbi,
        library::{LibHeader, RootModuleResult},
        marker_type::ErasedPrefix,
        prefix_type::{PrefixRefTrait, PrefixTypeTrait},
        std_types::{RErr, ROk, ROption, RResult, RSlice, RStr, RString},
    },
};

use crate::{
    ErrorKind, InferencePipeline, PipelineError, VolumeReload,
    context::parse_settings,
    device::kind_of_text,
    forward::{self, serving},
    instance::{Batch, Instance, Refusal, parse, render},
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
        abi_version: ABI_VERSION,
        panic_aborts: panic_aborts as u32,
        sdk_version: StaticStr::new(env!("CARGO_PKG_VERSION")),
        rustc_version: StaticStr::new(env!("MODALKIT_RUSTC_VERSION")),
        header,
    }
}

#[doc(hidden)]
pub fn constructor_of<P: InferencePipeline>(name: &'static str, version: &'static str) -> RootModuleResult {
    forward::set_plugin(name, version);
    let module = PluginModule {
        describe: describe::<P>,
        attach,
        check_settings: check_settings::<P>,
        load: load::<P>,
        warmup: warmup::<P>,
        volume_reload: volume_reload::<P>,
        decode: decode::<P>,
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

extern "C" fn describe<P: InferencePipeline>() -> RResult<Description, Failure> {
    guarded(|| {
        let (name, version) = forward::plugin();
        Ok(Description {
            name: name.into(),
            version: version.into(),
            input_schema: schema::of_input::<P::Input>().to_string().into(),
            output_schema: schema::of_output::<P::Output>()?.to_string().into(),
            settings_schema: schema::of_settings::<P::Settings>().to_string().into(),
        })
    })
}

pub(crate) extern "C" fn attach(host: HostApi) {
    let attached = guarded(|| {
        forward::attach(host);
        Ok(())
    });
    // A plugin whose log can't be connected still serves; there is nowhere to say so.
    drop(attached);
}

extern "C" fn check_settings<P: InferencePipeline>(json: RStr<'_>) -> RResult<(), Failure> {
    guarded(|| parse_settings::<P::Settings>(&json).map(drop))
}

extern "C" fn load<P: InferencePipeline>(args: LoadArgs<'_>) -> RResult<InstanceHandle, Failure> {
    serving(args.model_name.as_str());
    guarded(|| Ok(InstanceHandle::from_raw(into_raw(Instance::<P>::load(&args)?))))
}

unsafe extern "C" fn warmup<P: InferencePipeline>(instance: InstanceHandle) -> RResult<(), Failure> {
    // SAFETY: a live instance of this library.
    let instance = unsafe { instance_ref::<P>(instance) };
    serving(&instance.model);
    guarded(|| instance.warmup())
}

unsafe extern "C" fn volume_reload<P: InferencePipeline>(
    instance: InstanceHandle,
    change: &VolumeChange<'_>,
) -> RResult<(), Failure> {
    // SAFETY: a live instance of this library.
    let instance = unsafe { instance_ref::<P>(instance) };
    serving(&instance.model);
    guarded(|| {
        let changed = change.changed.iter().map(|file| file.as_str());
        instance.volume_reload(&VolumeReload::new(change.volume, change.mount_point.as_str(), changed))
    })
}

unsafe extern "C" fn decode<P: InferencePipeline>(
    instance: ROption<InstanceHandle>,
    json: RSlice<'_, u8>,
) -> RResult<ItemHandle, Rejection> {
    // SAFETY: a live instance of this library.
    let instance = instance.into_option().map(|instance| unsafe { instance_ref::<P>(instance) });
    serving(instance.map_or("", |instance| &instance.model));
    examined(|| {
        let input = parse::<P>(json.as_slice())?;
        if let Some(instance) = instance {
            instance.try_validate(&input)?;
        }
        Ok(ItemHandle::from_raw(into_raw(input)))
    })
}

unsafe extern "C" fn validate<P: InferencePipeline>(
    instance: InstanceHandle,
    item: ItemHandle,
) -> RResult<(), Rejection> {
    // SAFETY: a live instance and a live item of this library.
    let (instance, input) = unsafe { (instance_ref::<P>(instance), &*item.into_raw().cast::<P::Input>()) };
    serving(&instance.model);
    examined(|| instance.validate(input))
}

unsafe extern "C" fn begin<P: InferencePipeline>(
    instance: InstanceHandle,
    items: RSlice<'_, ItemHandle>,
) -> BatchHandle {
    // SAFETY: a live instance of this library.
    let instance = unsafe { instance_ref::<P>(instance) };
    // SAFETY: live items of this library, each named once; the caller gives them up.
    let inputs = items.iter().map(|item| unsafe { *from_raw::<P::Input>(item.into_raw()) }).collect();
    BatchHandle::from_raw(into_raw(instance.begin(inputs)))
}

unsafe extern "C" fn preprocess<P: InferencePipeline>(batch: BatchHandle) -> RResult<(), Failure> {
    // SAFETY: a live batch of this library, used by one thread.
    let batch = unsafe { batch_mut::<P>(batch) };
    serving(&batch.model);
    guarded(|| batch.preprocess())
}

unsafe extern "C" fn predict<P: InferencePipeline>(batch: BatchHandle) -> RResult<(), Failure> {
    // SAFETY: a live batch of this library, used by one thread.
    let batch = unsafe { batch_mut::<P>(batch) };
    serving(&batch.model);
    guarded(|| batch.predict())
}

unsafe extern "C" fn postprocess<P: InferencePipeline>(batch: BatchHandle) -> RResult<Outcomes, Failure> {
    // SAFETY: a live batch of this library, used by one thread.
    let batch = unsafe { batch_mut::<P>(batch) };
    serving(&batch.model);
    guarded(|| {
        let outcomes = render(batch.postprocess()?);
        Ok(outcomes
            .map(|outcome| outcome.map(Into::into).map_err(PipelineError::into_failure).into())
            .collect())
    })
}

unsafe extern "C" fn drop_item<P: InferencePipeline>(item: ItemHandle) {
    // SAFETY: a live item of this library, given up by the caller.
    discard(|| unsafe { from_raw::<P::Input>(item.into_raw()) });
}

unsafe extern "C" fn drop_batch<P: InferencePipeline>(batch: BatchHandle) {
    // SAFETY: a live batch of this library, given up by the caller.
    discard(|| unsafe { from_raw::<Batch<P>>(batch.into_raw()) });
}

unsafe extern "C" fn drop_instance<P: InferencePipeline>(instance: InstanceHandle) {
    // SAFETY: a live instance of this library.
    serving(unsafe { &instance_ref::<P>(instance).model });
    // SAFETY: as above, and given up by the caller.
    discard(|| unsafe { from_raw::<Instance<P>>(instance.into_raw()) });
}

pub(crate) fn into_raw<T>(value: T) -> *mut () {
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

/// Looks at an input; refusals and panics come back as a [`Rejection`].
fn examined<T>(run: impl FnOnce() -> Result<T, Refusal>) -> RResult<T, Rejection> {
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(value)) => ROk(value),
        Ok(Err(Refusal::Malformed(error))) => {
            RErr(Rejection::Malformed { message: error.to_string().into() })
        }
        Ok(Err(Refusal::Invalid(invalid))) => RErr(Rejection::Invalid { faults: invalid.into_faults() }),
        Ok(Err(Refusal::Busy)) => RErr(Rejection::Busy),
        Err(panic) => RErr(Rejection::Failed(panicked(panic))),
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
    let kind = if lost { FailureKind::DeviceSuspected } else { FailureKind::Panicked };
    Failure { kind, message: RString::from(message) }
}

const _: () = {
    const fn crosses_the_boundary<T: StableAbi>() {}
    crosses_the_boundary::<PluginModuleRef>();
};
