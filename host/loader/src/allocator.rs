//! Has glibc's allocator keep memory that was freed for what comes next, and give it back when a version of a model has ended. It owns these two calls of the C library.
//!
//! By default it may give the end of an arena back to the kernel with each large buffer that is freed, and have it zeroed again for the next: of a
//! megabyte of tensors in and out at 8 connections that was half of the CPU time.

use std::env;

/// Whoever starts the host may set the same, by the names that glibc reads.
const NAMES: [&str; 4] =
    ["MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_"];
const TUNABLES: &str = "GLIBC_TUNABLES";
const TUNABLES_OF_THE_ALLOCATOR: &str = "glibc.malloc.";

/// To be called once, when the process starts.
pub fn keep_freed_memory() {
    let is_tuned = env::var(TUNABLES).is_ok_and(|tunables| tunables.contains(TUNABLES_OF_THE_ALLOCATOR));
    if !is_tuned && NAMES.iter().all(|name| env::var_os(name).is_none()) {
        set();
    }
}

/// Gives freed memory back to the kernel, page by page, from all arenas: for when much of it is free that nothing will need soon. Allocations
/// wait for it meanwhile.
pub(crate) fn return_freed_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes the allocator's own locks, and changes nothing that is in use.
    unsafe {
        libc::malloc_trim(0)
    };
}

#[cfg(target_env = "gnu")]
fn set() {
    /// Blocks from this size on come from the kernel one by one and go back there; and freed bytes at the end of an arena, of which glibc makes up
    /// to eight for each core, beyond which they are given back. Both are what its defaults reach by themselves, once a block of 32 MiB was freed;
    /// set, they stay.
    const BLOCK_BYTES_MAX: libc::c_int = 32 << 20;
    const KEPT_BYTES_MAX: libc::c_int = 64 << 20;
    /// An arena grows by so much.
    const GROWTH_BYTES: libc::c_int = 4 << 20;
    for (parameter, bytes) in [
        (libc::M_MMAP_THRESHOLD, BLOCK_BYTES_MAX),
        (libc::M_TRIM_THRESHOLD, KEPT_BYTES_MAX),
        (libc::M_TOP_PAD, GROWTH_BYTES),
    ] {
        // SAFETY: it takes the allocator's own lock and sets a number. One that isn't taken leaves the default.
        unsafe { libc::mallopt(parameter, bytes) };
    }
}

#[cfg(not(target_env = "gnu"))]
fn set() {}
