//! Safe owners of the plugin's handles: each gives its handle back exactly once, to the library that made it.

use std::{marker::PhantomData, sync::Arc};

use modalkit_abi::{
    BatchHandle, Failure, InstanceHandle, ItemHandle, Rejection, VolumeChange,
    abi_stable::std_types::{RResult, RSlice, RStr, RVec},
};

use crate::{Plugin, ending::Entered};

/// What became of one item: the answer's JSON, or why there is none.
pub type Outcome = Result<RVec<u8>, Failure>;

/// A loaded pipeline; dropped, it is gone with its memory and its device.
pub struct Instance {
    plugin: Plugin,
    model: Arc<str>,
    handle: InstanceHandle,
}

/// One decoded input. It belongs to its library, not to an instance.
pub struct Item {
    plugin: Plugin,
    handle: ItemHandle,
    validated: bool,
}

/// Items on their way through the stages.
pub struct Batch<'i> {
    instance: &'i Instance,
    handle: BatchHandle,
    /// A batch holds a lock of the plugin's, which is released on the thread that took it.
    _stays_on_its_thread: PhantomData<*mut ()>,
}

/// Items that another library decoded, which this one can't run.
#[derive(Debug)]
pub struct Foreign;

impl Instance {
    pub(crate) fn new(plugin: Plugin, model: Arc<str>, handle: InstanceHandle) -> Self {
        Self { plugin, model, handle }
    }

    /// The model that it was loaded for.
    pub(crate) fn model(&self) -> &str {
        &self.model
    }

    pub(crate) fn handle(&self) -> InstanceHandle {
        self.handle
    }

    /// The library it came from.
    #[must_use]
    pub fn plugin(&self) -> &Plugin {
        &self.plugin
    }

    /// Runs the pipeline's `warmup`.
    ///
    /// # Errors
    /// What the hook said.
    pub fn warmup(&self) -> Result<(), Failure> {
        let _code = Entered::new(&self.model, "warmup");
        // SAFETY: the handle is live until `drop`.
        unsafe { self.plugin.module().warmup()(self.handle) }.into_result()
    }

    /// Runs the pipeline's `on_volume_reload`: waits for batches under way, and batches wait for it.
    ///
    /// `changed`: files relative to the mount point; none where nobody knows which.
    ///
    /// # Errors
    /// What the hook said.
    pub fn volume_reload(&self, volume: &str, mount_point: &str, changed: &[String]) -> Result<(), Failure> {
        let changed: Vec<RStr<'_>> = changed.iter().map(|file| file.as_str().into()).collect();
        let change = VolumeChange {
            volume: volume.into(),
            mount_point: mount_point.into(),
            changed: RSlice::from_slice(&changed),
        };
        let _code = Entered::new(&self.model, "on_volume_reload");
        // SAFETY: the handle is live until `drop`.
        unsafe { self.plugin.module().volume_reload()(self.handle, &change) }.into_result()
    }

    /// Validates an item that was decoded without an instance, and waits where the pipeline is changing.
    ///
    /// # Errors
    /// Why the pipeline turns it down.
    ///
    /// # Panics
    /// Where the item is not this library's; ask [`Instance::owns`] first.
    pub fn validate(&self, item: &Item) -> Result<(), Rejection> {
        assert!(self.owns(item), "an item is validated by the library that decoded it");
        let _code = Entered::new(&self.model, "validate");
        // SAFETY: both handles are live and, by the line before, of the same library.
        unsafe { self.plugin.module().validate()(self.handle, item.handle) }.into_result()
    }

    /// Whether this instance can run the item.
    #[must_use]
    pub fn owns(&self, item: &Item) -> bool {
        item.plugin.is_same(&self.plugin)
    }

    /// Makes a batch of items, in order; waits where the pipeline is changing.
    ///
    /// # Errors
    /// [`Foreign`] where one of them is another library's; all are dropped then.
    pub fn begin(&self, items: Vec<Item>) -> Result<Batch<'_>, Foreign> {
        if !items.iter().all(|item| self.owns(item)) {
            return Err(Foreign);
        }
        let handles: Vec<ItemHandle> = items.into_iter().map(Item::into_handle).collect();
        let _code = Entered::new(&self.model, "begin");
        // SAFETY: live items of the same library, each given up once by `into_handle`.
        let handle = unsafe { self.plugin.module().begin()(self.handle, RSlice::from_slice(&handles)) };
        Ok(Batch { instance: self, handle, _stays_on_its_thread: PhantomData })
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        let _code = Entered::new(&self.model, "drop");
        // SAFETY: this is the handle's only owner, and batches borrow `self`.
        unsafe { self.plugin.module().drop_instance()(self.handle) }
    }
}

impl Item {
    pub(crate) fn new(plugin: Plugin, handle: ItemHandle, validated: bool) -> Self {
        Self { plugin, handle, validated }
    }

    /// Whether an instance has validated it.
    #[must_use]
    pub fn is_validated(&self) -> bool {
        self.validated
    }

    fn into_handle(self) -> ItemHandle {
        let this = std::mem::ManuallyDrop::new(self);
        // SAFETY: `plugin` is read once from a value whose `drop` never runs, and so released once.
        drop(unsafe { std::ptr::read(&raw const this.plugin) });
        this.handle
    }
}

impl Drop for Item {
    fn drop(&mut self) {
        let _code = Entered::new(self.plugin.name(), "drop");
        // SAFETY: this is the handle's only owner; `into_handle` skips this.
        unsafe { self.plugin.module().drop_item()(self.handle) }
    }
}

impl Batch<'_> {
    /// First stage.
    ///
    /// # Errors
    /// What the pipeline said; the batch is over then.
    pub fn preprocess(&mut self) -> Result<(), Failure> {
        let _code = Entered::new(&self.instance.model, "preprocess");
        // SAFETY: the handle is live until `drop` and used by this thread alone.
        unsafe { self.instance.plugin.module().preprocess()(self.handle) }.into_result()
    }

    /// Second stage.
    ///
    /// # Errors
    /// What the pipeline said; the batch is over then.
    pub fn predict(&mut self) -> Result<(), Failure> {
        let _code = Entered::new(&self.instance.model, "predict");
        // SAFETY: as in `preprocess`.
        unsafe { self.instance.plugin.module().predict()(self.handle) }.into_result()
    }

    /// Third stage: one outcome an item, in order.
    ///
    /// # Errors
    /// What the pipeline said of the whole batch; it is over then.
    pub fn postprocess(&mut self) -> Result<Vec<Outcome>, Failure> {
        let _code = Entered::new(&self.instance.model, "postprocess");
        // SAFETY: as in `preprocess`.
        let outcomes = unsafe { self.instance.plugin.module().postprocess()(self.handle) }.into_result()?;
        Ok(outcomes.into_iter().map(RResult::into_result).collect())
    }
}

impl Drop for Batch<'_> {
    fn drop(&mut self) {
        let _code = Entered::new(&self.instance.model, "drop");
        // SAFETY: this is the handle's only owner, on the thread that made it.
        unsafe { self.instance.plugin.module().drop_batch()(self.handle) }
    }
}
