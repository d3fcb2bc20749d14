//! Has glibc's allocator keep some of the memory that was freed. It owns one call of the C library.
//!
//! By default each large body of a request is followed by giving the end of an arena back to the kernel, and the next one by having it zeroed again: of a
//! megabyte of tensors in and out that was half of the whole CPU time. How much is kept has a bound.

use std::{env, ffi::c_int};

/// Freed bytes at the end of an arena (there are a few for each core) beyond which they are given back, and as many as are left there then.
const KEPT_BYTES_MAX: c_int = 8 << 20;
const KEPT_BYTES: c_int = 4 << 20;
/// Blocks from this size on come from the kernel one by one, and go back there.
const BLOCK_BYTES_MAX: c_int = 4 << 20;
/// Whoever starts the host may say otherwise, by the names that glibc reads.
const TUNABLES: &str = "GLIBC_TUNABLES";
const TUNED: &str = "MALLOC_";

/// To be called once, when the process starts.
pub fn keep_freed_memory() {
    if env::vars_os()
        .any(|(name, _)| name == TUNABLES || name.as_encoded_bytes().starts_with(TUNED.as_bytes()))
    {
        return;
    }
    #[cfg(target_env = "gnu")]
    for (parameter, bytes) in [
        (libc::M_TRIM_THRESHOLD, KEPT_BYTES_MAX),
        (libc::M_TOP_PAD, KEPT_BYTES),
        (libc::M_MMAP_THRESHOLD, BLOCK_BYTES_MAX),
    ] {
        // SAFETY: it takes the allocator's own lock and sets a number. One that isn't taken leaves the default.
        unsafe { libc::mallopt(parameter, bytes) };
    }
}
