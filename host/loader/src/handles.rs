//! Safe owners of the plugin's handles: each gives its handle back exactly once, to the library that made it.

use std::{any::Any, marker::PhantomData, sync::Arc};

use bytes::Bytes;
use modalkit_abi::{
    BatchHandle, InstanceHandle, ItemHandle, VolumeChange,
    abi_stable::std_types::{ROption, RSlice, RStr, RVec},
};
use modalkit_engine::{
    Batch, Decoded, Failure, FailureKind, Foreign, Input, Instance, Outcome, Payload, Rejection,
};

use crate::{convert, ending::Entered, library::PipelineLibrary};

/// Outputs up to this many bytes are copied: an owner for the plugin's own bytes is an allocation as well, and it would be given back to
/// the plugin's allocator by another thread.
const COPIED_BYTES: usize = 4 << 10;
/// Bytes shown of an output that is no object.
const SHOWN_BYTES: usize = 40;

pub(crate) struct LibraryInstance {
    library: PipelineLibrary,
    model: Arc<str>,
    handle: InstanceHandle,
}

/// It belongs to its library, not to an instance.
struct LibraryInput {
    library: PipelineLibrary,
    handle: ItemHandle,
}

struct LibraryBatch<'i> {
    instance: &'i LibraryInstance,
    handle: BatchHandle,
    /// A batch holds a lock of the plugin's, which is released on the thread that took it.
    _stays_on_its_thread: PhantomData<*mut ()>,
}

impl LibraryInstance {
    pub(crate) fn new(library: PipelineLibrary, model: Arc<str>, handle: InstanceHandle) -> Self {
        Self { library, model, handle }
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

    /// The input, where this library decoded it.
    fn downcast_own<'d>(&self, decoded: &'d Decoded) -> Option<&'d LibraryInput> {
        let input: &dyn Any = &*decoded.input;
        input.downcast_ref::<LibraryInput>().filter(|input| input.library.is_same(&self.library))
    }
}

impl Instance for LibraryInstance {
    fn volume_reload(&self, volume: &str, mount_point: &str, changed: &[String]) -> Result<(), Failure> {
        let changed: Vec<RStr<'_>> = changed.iter().map(|file| file.as_str().into()).collect();
        let change = VolumeChange {
            volume: volume.into(),
            mount_point: mount_point.into(),
            changed: RSlice::from_slice(&changed),
        };
        let _code = Entered::new(&self.model, "on_volume_reload");
        // SAFETY: the handle is live until `drop`.
        convert::result(unsafe { self.library.module().volume_reload()(self.handle, &change) })
    }

    fn decode(&self, payload: &Payload) -> Result<Decoded, Rejection> {
        decode(&self.library, Some(self), payload)
    }

    fn owns(&self, decoded: &Decoded) -> bool {
        self.downcast_own(decoded).is_some()
    }

    fn validate(&self, decoded: &Decoded) -> Result<(), Rejection> {
        let input = self.downcast_own(decoded).expect("an input is validated by the library that decoded it");
        let _code = Entered::new(&self.model, "validate");
        // SAFETY: both handles are live and, by the line before, of the same library.
        let validated = unsafe { self.library.module().validate()(self.handle, input.handle) };
        validated.into_result().map_err(convert::rejection)
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
        Ok(Box::new(LibraryBatch { instance: self, handle, _stays_on_its_thread: PhantomData }))
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
    let Payload::Json(json) = payload;
    let instance = instance.filter(|instance| instance.library.is_same(library));
    let handle = instance.map(|instance| instance.handle);
    let _code = Entered::new(instance.map_or(library.name(), |instance| &instance.model), "decode");
    // SAFETY: the handle is of a live instance of this library, looked at before.
    let decoded = unsafe { library.module().decode()(ROption::from(handle), (&**json).into()) };
    let handle = decoded.into_result().map_err(convert::rejection)?;
    let input = Box::new(LibraryInput { library: library.clone(), handle });
    Ok(Decoded { input, is_validated: instance.is_some() })
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
        // SAFETY: the handle is live until `drop` and used by this thread alone.
        convert::result(unsafe { self.instance.library.module().preprocess()(self.handle) })
    }

    fn predict(&mut self) -> Result<(), Failure> {
        let _code = Entered::new(&self.instance.model, "predict");
        // SAFETY: as in `preprocess`.
        convert::result(unsafe { self.instance.library.module().predict()(self.handle) })
    }

    fn postprocess(&mut self) -> Result<Vec<Outcome>, Failure> {
        let _code = Entered::new(&self.instance.model, "postprocess");
        // SAFETY: as in `preprocess`.
        let outcomes = unsafe { self.instance.library.module().postprocess()(self.handle) };
        let outcome = |outcome| convert::result(outcome).and_then(output);
        Ok(convert::result(outcomes)?.into_iter().map(outcome).collect())
    }
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
        // SAFETY: this is the handle's only owner, on the thread that made it.
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
