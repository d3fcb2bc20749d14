//! Lowers the priority of threads that prepare reloads, so that they don't slow those that answer callers. It owns one system call.

/// As `nice` counts; the most there is.
const NICE: i32 = 19;
/// What such a thread runs before one that answers callers may take its place: the least that the kernel takes.
const SLICE_NANOSECONDS: u64 = 100_000;

/// What `sched_setattr(2)` reads.
#[repr(C)]
struct Attributes {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    /// Of a thread of the usual policy: its time slice in nanoseconds, from Linux 6.12 on.
    runtime: u64,
    deadline: u64,
    period: u64,
}

/// Runs the calling thread, and the threads and processes that it starts afterwards, at nice 19 with the shortest time slice. An
/// unprivileged thread can't raise its priority again, so a plugin's own threads must not be started from such a one.
pub(crate) fn lower() {
    let size = size_of::<Attributes>();
    let attributes = Attributes {
        size: u32::try_from(size).expect("it is 48 bytes"),
        policy: 0,
        flags: 0,
        nice: NICE,
        priority: 0,
        runtime: SLICE_NANOSECONDS,
        deadline: 0,
        period: 0,
    };
    // SAFETY: the kernel reads `size` bytes of a structure that lives until it returns, and changes nothing of ours.
    // A kernel that doesn't take it leaves the priority as it was: callers may then notice a reload.
    unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
}
