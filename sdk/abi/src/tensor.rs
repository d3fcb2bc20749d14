//! Tensors, and bytes that cross the boundary without being copied.

use std::{
    fmt,
    ops::Deref,
    panic::{AssertUnwindSafe, catch_unwind},
    slice,
};

use abi_stable::{
    StableAbi,
    std_types::{RString, RVec},
};

/// The bytes of a tensor that a host gives begin at a multiple of this, unless there are none.
pub const TENSOR_ALIGNMENT: usize = 64;

/// Bytes that belong to whoever made them, and stay as and where they are until this is dropped. Any thread may read and drop them.
#[repr(C)]
#[derive(StableAbi)]
pub struct Buffer {
    start: *const u8,
    len: usize,
    owner: *mut (),
    release: unsafe extern "C" fn(*mut ()),
}

// SAFETY: `from_owner` takes owners that any thread may read and drop.
unsafe impl Send for Buffer {}
// SAFETY: as above.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// The bytes of this owner, which is dropped with the buffer.
    #[must_use]
    pub fn from_owner<O: AsRef<[u8]> + Send + Sync + 'static>(owner: O) -> Self {
        unsafe extern "C" fn release<O>(owner: *mut ()) {
            // SAFETY: made by the `Box::into_raw` below, and a buffer is dropped once.
            let owner = unsafe { Box::from_raw(owner.cast::<O>()) };
            // No panic leaves this side; its payload may panic as well when it is dropped.
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| drop(owner))) {
                std::mem::forget(panic);
            }
        }
        let owner = Box::into_raw(Box::new(owner));
        // SAFETY: it was made in the line before; it lies still until `release` drops it, and nobody changes it meanwhile.
        let bytes: &[u8] = unsafe { &*owner }.as_ref();
        Self { start: bytes.as_ptr(), len: bytes.len(), owner: owner.cast(), release: release::<O> }
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the owner keeps them until this is dropped.
        unsafe { slice::from_raw_parts(self.start, self.len) }
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: once, with what `from_owner` made.
        unsafe { (self.release)(self.owner) };
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.len)
    }
}

/// What a tensor's elements are. Whoever meets an unknown one refuses the tensor.
#[repr(transparent)]
#[derive(StableAbi, Clone, Copy, Debug, PartialEq, Eq)]
pub struct Datatype(pub u32);

impl Datatype {
    /// A byte each, 0 or 1.
    pub const BOOL: Self = Self(1);
    /// Unsigned, 8 bits.
    pub const UINT8: Self = Self(2);
    /// Unsigned, 16 bits.
    pub const UINT16: Self = Self(3);
    /// Unsigned, 32 bits.
    pub const UINT32: Self = Self(4);
    /// Unsigned, 64 bits.
    pub const UINT64: Self = Self(5);
    /// Signed, 8 bits.
    pub const INT8: Self = Self(6);
    /// Signed, 16 bits.
    pub const INT16: Self = Self(7);
    /// Signed, 32 bits.
    pub const INT32: Self = Self(8);
    /// Signed, 64 bits.
    pub const INT64: Self = Self(9);
    /// IEEE 754, 16 bits.
    pub const FP16: Self = Self(10);
    /// The upper half of an [`Datatype::FP32`].
    pub const BF16: Self = Self(11);
    /// IEEE 754, 32 bits.
    pub const FP32: Self = Self(12);
    /// IEEE 754, 64 bits.
    pub const FP64: Self = Self(13);
    /// Strings of any bytes, each after its length in bytes, an unsigned number of 32 bits.
    pub const BYTES: Self = Self(14);
}

/// A tensor on its way across.
#[repr(C)]
#[derive(StableAbi, Debug)]
pub struct Tensor {
    /// Its name in the model's signature.
    pub name: RString,
    /// What its elements are.
    pub datatype: Datatype,
    /// Its dimensions, the slowest first; without the batch's, where the signature says that there is one.
    pub shape: RVec<u64>,
    /// Its elements one after the other, little-endian. As many as the shape says.
    pub data: Buffer,
    /// A document of what else was said of it; empty for one without members.
    pub parameters: RString,
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    };

    use super::*;

    struct Counted(Vec<u8>, Arc<AtomicUsize>);

    impl AsRef<[u8]> for Counted {
        fn as_ref(&self) -> &[u8] {
            &self.0
        }
    }

    impl Drop for Counted {
        fn drop(&mut self) {
            self.1.fetch_add(1, Ordering::SeqCst);
            assert!(self.0.len() != 3, "an owner that can't be dropped");
        }
    }

    #[test]
    fn an_owner_is_dropped_once_with_its_buffer_and_keeps_its_panics() {
        let dropped = Arc::new(AtomicUsize::new(0));
        for bytes in [&b""[..], b"one", b"some"] {
            let buffer = Buffer::from_owner(Counted(bytes.to_vec(), Arc::clone(&dropped)));
            let before = dropped.load(Ordering::SeqCst);
            std::thread::spawn(move || assert_eq!(&*buffer, bytes)).join().unwrap();
            assert_eq!(dropped.load(Ordering::SeqCst), before + 1);
        }
    }

    #[test]
    fn bytes_that_lie_inside_their_owner_stay_where_they_are() {
        let buffer = Buffer::from_owner(*b"inside");
        let moved = [buffer];
        assert_eq!(&*moved[0], b"inside");
    }
}
