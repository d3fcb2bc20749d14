//! Safe owners of the plugin's handles: each gives its handle back exactly once, to the library that made it.

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, LazyLock},
};

use bytes::Bytes;
use modalkit_abi::{
    BatchHandle, EventSinkRef, InstanceHandle, ItemHandle, SinkHandle, Tensor, WhenFull,
    abi_stable::{
        prefix_type::PrefixTypeTrait,
        std_types::{ROption, RSlice, RStr, RString, RVec},
    },
};
use modalkit_engine::{
    Batch, Checked, ChunkResult, Decoded, EventSink, Failure, FailureKind, Foreign, Input, Instance,
    Interest, Measure, Outcome, Payload, Rejection, Signature,
};
use parking_lot::RwLock;

use crate::{convert, document, ending::Entered, library::PipelineLibrary};

/// Outputs up to this many bytes are copied: an owner for the plugin's own bytes is an allocation as well, and it would be given back to
/// the plugin's allocator by another thread.
const COPIED_BYTES: usize = 4 << 10;
/// Bytes shown of an output that is no object.
const SHOWN_BYTES: usize = 40;

pub(crate) struct LibraryInstance {
    library: PipelineLibrary,
    model: Arc<str>,
    handle: InstanceHandle,
    /// As it was when the pipeline changed last.
    signature: RwLock<Option<Arc<Signature>>>,
}

/// It belongs to its library, not to an instance.
struct LibraryInput {
    library: PipelineLibrary,
    handle: ItemHandle,
}

struct LibraryBatch<'i> {
    instance: &'i LibraryInstance,
    handle: BatchHandle,
}

impl LibraryInstance {
    pub(crate) fn new(library: PipelineLibrary, model: Arc<str>, handle: InstanceHandle) -> Self {
        Self { library, model, handle, signature: RwLock::default() }
    }

    /// Runs the pipeline's `warmup`.
    ///
    /// # Errors
    /// What the hook said.
    pub(crate) fn warmup(&self) -> Result<(), Failure> {
        let _code = Entered::new(&self.model, "warmup");
        // SAFETY: the handle is live until `drop`.
        convert::result(unsafe { self.library.module().warmup()(self.handle) })
    }

    /// Asks the pipeline for its signature.
    ///
    /// # Errors
    /// What it said, or its signature is none that this host reads.
    pub(crate) fn ask_for_signature(&self) -> Result<(), Failure> {
        let said = {
            let _code = Entered::new(&self.model, "signature");
            // SAFETY: the handle is live until `drop`.
            convert::result(unsafe { self.library.module().signature()(self.handle) })
        };
        let read = said.and_then(|said| document::signature(&said));
        // Where there is none to be had, the old one stands: it is better than none, and the failure is told.
        let signature = read?;
        *self.signature.write() = signature.map(Arc::new);
        Ok(())
    }

    /// The input, where this library decoded it.
    fn downcast_own<'d>(&self, decoded: &'d Decoded) -> Option<&'d LibraryInput> {
        let input: &dyn Any = &*decoded.input;
        input.downcast_ref::<LibraryInput>().filter(|input| input.library.is_same(&self.library))
    }
}

impl Instance for LibraryInstance {
    fn signature(&self) -> Option<Arc<Signature>> {
        self.signature.read().clone()
    }

    fn volume_reload(&self, volume: &str, mount_point: &str, changed: &[String]) -> Result<(), Failure> {
        let change = document::volume_change(volume, mount_point, changed)?;
        let changed = {
            let _code = Entered::new(&self.model, "on_volume_reload");
            // SAFETY: the handle is live until `drop`.
            convert::result(unsafe {
                self.library.module().volume_reload()(self.handle, change.as_str().into())
            })
        };
        // Of a hook that failed half-way, too.
        changed.and(self.ask_for_signature())
    }

    fn decode(&self, payload: &Payload) -> Result<Decoded, Rejection> {
        decode(&self.library, Some(self), payload)
    }

    fn owns(&self, decoded: &Decoded) -> bool {
        self.downcast_own(decoded).is_some()
    }

    fn validate(&self, inputs: &[&Decoded]) -> Vec<Result<Measure, Rejection>> {
        let validate = |decoded: &&Decoded| {
            let input =
                self.downcast_own(decoded).expect("an input is validated by the library that decoded it");
            let _code = Entered::new(&self.model, "validate");
            // SAFETY: both handles are live and, by the line before, of the same library.
            let validated = unsafe { self.library.module().validate()(self.handle, input.handle) };
            validated.into_result().map(convert::measure).map_err(convert::rejection)
        };
        inputs.iter().map(validate).collect()
    }

    fn begin(&self, inputs: Vec<Decoded>) -> Result<Box<dyn Batch + '_>, Foreign> {
        if !inputs.iter().all(|decoded| self.owns(decoded)) {
            return Err(Foreign);
        }
        let handles: Vec<ItemHandle> = inputs
            .into_iter()
            .map(|decoded| (decoded.input as Box<dyn Any>).downcast::<LibraryInput>())
            .map(|input| input.expect("this library decoded it").into_handle())
            .collect();
        let _code = Entered::new(&self.model, "begin");
        // SAFETY: live items of the same library, each given up once by `into_handle`.
        let handle = unsafe { self.library.module().begin()(self.handle, RSlice::from_slice(&handles)) };
        Ok(Box::new(LibraryBatch { instance: self, handle }))
    }
}

impl Drop for LibraryInstance {
    fn drop(&mut self) {
        let _code = Entered::new(&self.model, "drop");
        // SAFETY: this is the handle's only owner, and batches borrow `self`.
        unsafe { self.library.module().drop_instance()(self.handle) }
    }
}

/// Parses one input, and validates it where an instance of this library is given.
pub(crate) fn decode(
    library: &PipelineLibrary,
    instance: Option<&LibraryInstance>,
    payload: &Payload,
) -> Result<Decoded, Rejection> {
    let instance = instance.filter(|instance| instance.library.is_same(library));
    let handle = instance.map(|instance| instance.handle);
    let _code = Entered::new(instance.map_or(library.name(), |instance| &instance.model), "decode");
    let decoded = match payload {
        // SAFETY: the handle is of a live instance of this library, looked at before.
        Payload::Json(json) => unsafe { library.module().decode()(ROption::from(handle), (&**json).into()) },
        Payload::Tensors(tensors) => {
            let tensors: RVec<Tensor> = tensors.iter().map(convert::tensor_of_plugins).collect();
            // SAFETY: as above.
            unsafe { library.module().decode_tensors()(ROption::from(handle), tensors, RStr::from_str("")) }
        }
    };
    let decoded = decoded.into_result().map_err(convert::rejection)?;
    let input = Box::new(LibraryInput { library: library.clone(), handle: decoded.item });
    let checked = if instance.is_some() { Checked::Validated } else { Checked::Parsed };
    Ok(Decoded { input, measure: convert::measure(decoded.measure), checked })
}

impl LibraryInput {
    fn into_handle(self) -> ItemHandle {
        let this = std::mem::ManuallyDrop::new(self);
        // SAFETY: `library` is read once from a value whose `drop` never runs, and so released once.
        drop(unsafe { std::ptr::read(&raw const this.library) });
        this.handle
    }
}

impl Input for LibraryInput {}

impl Drop for LibraryInput {
    fn drop(&mut self) {
        let _code = Entered::new(self.library.name(), "drop");
        // SAFETY: this is the handle's only owner; `into_handle` skips this.
        unsafe { self.library.module().drop_item()(self.handle) }
    }
}

impl Batch for LibraryBatch<'_> {
    fn preprocess(&mut self) -> Result<(), Failure> {
        let _code = Entered::new(&self.instance.model, "preprocess");
        // SAFETY: the handle is live until `drop` and used by one thread at a time, as `&mut self` says.
        convert::result(unsafe { self.instance.library.module().preprocess()(self.handle) })
    }

    fn predict(&mut self) -> Result<(), Failure> {
        let _code = Entered::new(&self.instance.model, "predict");
        // SAFETY: as in `preprocess`.
        convert::result(unsafe { self.instance.library.module().predict()(self.handle) })
    }

    fn postprocess(&mut self, events: &mut dyn EventSink) -> Result<(), Failure> {
        let mut sink = Sink { events, signature: self.instance.signature() };
        let _code = Entered::new(&self.instance.model, "postprocess");
        let sink = SinkHandle::from_raw((&raw mut sink).cast());
        // SAFETY: as in `preprocess`; the plugin calls the sink within this call and one call at a time, while it is borrowed for nothing else.
        convert::result(unsafe { self.instance.library.module().postprocess()(self.handle, sink, *SINK) })
    }
}

/// Where what a plugin gives goes.
struct Sink<'e> {
    events: &'e mut dyn EventSink,
    signature: Option<Arc<Signature>>,
}

/// What plugins give chunks and outcomes to.
static SINK: LazyLock<EventSinkRef> = LazyLock::new(|| {
    modalkit_abi::EventSink {
        json: take_json,
        tensors: take_tensors,
        failed: take_failure,
        interest: tell_interest,
        chunk: take_chunk,
    }
    .leak_into_prefix()
});

unsafe extern "C" fn take_json(sink: SinkHandle, item: usize, json: RVec<u8>) {
    // SAFETY: by the plugin's promise.
    unsafe { end(sink, item, |_| output(json)) };
}

unsafe extern "C" fn take_tensors(
    sink: SinkHandle,
    item: usize,
    tensors: RVec<Tensor>,
    _parameters: RString,
) {
    let outcome = |signature: Option<&Signature>| {
        let tensors = tensors.into_iter().map(|tensor| convert::tensor(tensor, signature));
        tensors.collect::<Result<_, _>>().map(Payload::Tensors)
    };
    // SAFETY: by the plugin's promise.
    unsafe { end(sink, item, outcome) };
}

unsafe extern "C" fn take_failure(sink: SinkHandle, item: usize, failure: modalkit_abi::Failure) {
    // SAFETY: by the plugin's promise.
    unsafe { end(sink, item, |_| Err(convert::failure(failure))) };
}

unsafe extern "C" fn tell_interest(sink: SinkHandle, item: usize) -> modalkit_abi::Interest {
    // SAFETY: by the plugin's promise.
    let interest = unsafe { with_sink(sink, |sink| sink.events.interest(item)) };
    convert::interest_of_plugins(interest.unwrap_or(Interest::Nothing))
}

unsafe extern "C" fn take_chunk(
    sink: SinkHandle,
    item: usize,
    json: RSlice<'_, u8>,
    when_full: WhenFull,
) -> modalkit_abi::ChunkResult {
    let waits = when_full == WhenFull::WAIT;
    // SAFETY: by the plugin's promise.
    let result = unsafe { with_sink(sink, |sink| sink.events.chunk(item, json.as_slice(), waits)) };
    convert::chunk_result_of_plugins(result.unwrap_or(ChunkResult::Unwanted))
}

/// Gives an outcome to the host. Where that panics the item has no outcome, which fails its batch.
///
/// # Safety
/// As [`with_sink`].
unsafe fn end(sink: SinkHandle, item: usize, outcome: impl FnOnce(Option<&Signature>) -> Outcome) {
    // SAFETY: by the caller's promise.
    unsafe { with_sink(sink, |sink| sink.events.end(item, outcome(sink.signature.as_deref()))) };
}

/// Calls the host. No panic goes back through the plugin: there is nothing then.
///
/// # Safety
/// The handle is one that `postprocess` has made, its call has not returned, and no other call with the handle runs.
unsafe fn with_sink<T>(sink: SinkHandle, call: impl FnOnce(&mut Sink<'_>) -> T) -> Option<T> {
    // SAFETY: by the caller's promise.
    let sink = unsafe { &mut *sink.into_raw().cast::<Sink<'_>>() };
    let called = catch_unwind(AssertUnwindSafe(|| call(sink)));
    called.map_err(std::mem::forget).ok()
}

/// An output as the host takes it: it looks at both ends, where members are to be added, and at nothing between them.
fn output(json: RVec<u8>) -> Outcome {
    if *json == *b"{}" || json.starts_with(b"{\"") && json.ends_with(b"}") {
        let bytes =
            if json.len() <= COPIED_BYTES { Bytes::copy_from_slice(&json) } else { Bytes::from_owner(json) };
        return Ok(Payload::Json(bytes));
    }
    let begins = String::from_utf8_lossy(&json[..json.len().min(SHOWN_BYTES)]);
    let message = format!(
        "the plugin's output must be a JSON object without white space around its braces, found one of {} bytes that begins with {begins:?}",
        json.len()
    );
    Err(Failure { kind: FailureKind::Permanent, message })
}

impl Drop for LibraryBatch<'_> {
    fn drop(&mut self) {
        let _code = Entered::new(&self.instance.model, "drop");
        // SAFETY: this is the handle's only owner.
        unsafe { self.instance.library.module().drop_batch()(self.handle) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_output_is_an_object_or_its_items_failure() {
        let output = |json: &str| output(json.as_bytes().to_vec().into());
        for object in ["{}", "{\"a\":1}", "{\"a\": {\"b\": []} }"] {
            assert_eq!(output(object).unwrap(), Payload::Json(object.into()));
        }
        for other in ["", "{", "[]", "{ }", " {}", "{}\n", "{1}", "null"] {
            let failure = output(other).unwrap_err();
            assert!(
                failure.kind == FailureKind::Permanent && failure.message.contains("JSON object"),
                "{other}"
            );
        }
    }
}
