//! Which system calls a worker in a sandbox may make. The filter is one list of numbers: those on it are not made, and told to the guard, who
//! answers them. It never knows files.

use std::{
    io,
    os::fd::{FromRawFd, OwnedFd},
};

#[cfg(target_arch = "x86_64")]
const ARCHITECTURE: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const ARCHITECTURE: u32 = 0xc000_00b7;

/// Calls that open files: Landlock decides on them, and the guard tells of those that it forbids.
pub(super) const OPENING: &[libc::c_long] = &[
    libc::SYS_openat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_open,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_creat,
];

/// Calls that are refused, with their names: those that start programs or processes, change files, reach into other processes or into the
/// kernel, and the one that makes any of these without a call.
pub(super) const REFUSED: &[(libc::c_long, &str)] = &[
    (libc::SYS_execve, "execve"),
    (libc::SYS_execveat, "execveat"),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_fork, "fork"),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_vfork, "vfork"),
    (libc::SYS_io_uring_setup, "io_uring_setup"),
    (libc::SYS_ptrace, "ptrace"),
    (libc::SYS_process_vm_readv, "process_vm_readv"),
    (libc::SYS_process_vm_writev, "process_vm_writev"),
    (libc::SYS_pidfd_getfd, "pidfd_getfd"),
    (libc::SYS_mkdirat, "mkdirat"),
    (libc::SYS_unlinkat, "unlinkat"),
    (libc::SYS_renameat2, "renameat2"),
    (libc::SYS_linkat, "linkat"),
    (libc::SYS_symlinkat, "symlinkat"),
    (libc::SYS_mknodat, "mknodat"),
    (libc::SYS_truncate, "truncate"),
    (libc::SYS_fchmodat, "fchmodat"),
    (libc::SYS_fchownat, "fchownat"),
    (libc::SYS_utimensat, "utimensat"),
    (libc::SYS_fchmod, "fchmod"),
    (FCHMODAT2, "fchmodat2"),
    (SETXATTRAT, "setxattrat"),
    (REMOVEXATTRAT, "removexattrat"),
    (FILE_SETATTR, "file_setattr"),
    (libc::SYS_fchown, "fchown"),
    (libc::SYS_setxattr, "setxattr"),
    (libc::SYS_lsetxattr, "lsetxattr"),
    (libc::SYS_fsetxattr, "fsetxattr"),
    (libc::SYS_removexattr, "removexattr"),
    (libc::SYS_lremovexattr, "lremovexattr"),
    (libc::SYS_fremovexattr, "fremovexattr"),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_lchown, "lchown"),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_utime, "utime"),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_utimes, "utimes"),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_futimesat, "futimesat"),
    (libc::SYS_tkill, "tkill"),
    (libc::SYS_pidfd_send_signal, "pidfd_send_signal"),
    (libc::SYS_open_by_handle_at, "open_by_handle_at"),
    (libc::SYS_clock_settime, "clock_settime"),
    (libc::SYS_settimeofday, "settimeofday"),
    (libc::SYS_sethostname, "sethostname"),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_mkdir, "mkdir"),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_rmdir, "rmdir"),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_unlink, "unlink"),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_rename, "rename"),
    (libc::SYS_renameat, "renameat"),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_link, "link"),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_symlink, "symlink"),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_mknod, "mknod"),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_chmod, "chmod"),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_chown, "chown"),
    (libc::SYS_mount, "mount"),
    (libc::SYS_umount2, "umount2"),
    (libc::SYS_pivot_root, "pivot_root"),
    (libc::SYS_chroot, "chroot"),
    (libc::SYS_unshare, "unshare"),
    (libc::SYS_setns, "setns"),
    (libc::SYS_bpf, "bpf"),
    (libc::SYS_perf_event_open, "perf_event_open"),
    (libc::SYS_keyctl, "keyctl"),
    (libc::SYS_add_key, "add_key"),
    (libc::SYS_request_key, "request_key"),
    (libc::SYS_init_module, "init_module"),
    (libc::SYS_finit_module, "finit_module"),
    (libc::SYS_delete_module, "delete_module"),
    (libc::SYS_kexec_load, "kexec_load"),
    (libc::SYS_reboot, "reboot"),
    (libc::SYS_swapon, "swapon"),
    (libc::SYS_userfaultfd, "userfaultfd"),
];

/// Not all headers of C libraries have these names yet; the numbers are the same everywhere.
const FCHMODAT2: libc::c_long = 452;
const SETXATTRAT: libc::c_long = 463;
const REMOVEXATTRAT: libc::c_long = 466;
const FILE_SETATTR: libc::c_long = 469;

/// Refused where there is no network.
pub(super) const NETWORK: [(libc::c_long, &str); 4] = [
    (libc::SYS_socket, "socket"),
    (libc::SYS_connect, "connect"),
    (libc::SYS_bind, "bind"),
    (libc::SYS_listen, "listen"),
];

/// Calls whose first argument says which process they are for: refused for any other than this one.
pub(super) const OF_A_PROCESS: [(libc::c_long, &str); 5] = [
    (libc::SYS_kill, "kill"),
    (libc::SYS_tgkill, "tgkill"),
    (libc::SYS_rt_sigqueueinfo, "rt_sigqueueinfo"),
    (libc::SYS_rt_tgsigqueueinfo, "rt_tgsigqueueinfo"),
    (libc::SYS_prlimit64, "prlimit64"),
];
/// Refused but for streams and packets in order: datagrams reach sockets that have a path.
pub(super) const PAIR: (libc::c_long, &str) = (libc::SYS_socketpair, "socketpair");
const SECOND_ARGUMENT: u32 = 24;
/// The kind of a socket, without its flags.
const KIND_OF_SOCKET: u32 = 0xf;
/// A process and a thread are started by the same call.
pub(super) const CLONE: (libc::c_long, &str) = (libc::SYS_clone, "clone");

/// Offsets in what a filter is shown: the number of the call, the architecture, the lower half of the first argument.
const NUMBER: u32 = 0;
const OF_ARCHITECTURE: u32 = 4;
const FIRST_ARGUMENT: u32 = 16;
/// Numbers from here on are those of another set of calls on the same processor.
const OTHER_SET: u32 = 0x4000_0000;

/// The filter: instructions that jump over the next `n` where a comparison holds, or doesn't.
fn filter(network: bool) -> Vec<libc::sock_filter> {
    let statement = |code: u32, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
    let unless = |code: u32, k: u32, jf: u8| libc::sock_filter {
        code: (libc::BPF_JMP | code | libc::BPF_K) as u16,
        jt: 0,
        jf,
        k,
    };
    let load = |offset| statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset);
    let end = |k| statement(libc::BPF_RET | libc::BPF_K, k);
    let equal = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    let notify = libc::SECCOMP_RET_USER_NOTIF;
    let errno = |error: i32| libc::SECCOMP_RET_ERRNO | error as u32;
    let mut program = vec![
        load(OF_ARCHITECTURE),
        unless(libc::BPF_JEQ, ARCHITECTURE, 1),
        libc::sock_filter { code: (libc::BPF_JMP | libc::BPF_JA) as u16, jt: 0, jf: 0, k: 1 },
        end(libc::SECCOMP_RET_KILL_PROCESS),
        load(NUMBER),
        unless(libc::BPF_JGE, OTHER_SET, 1),
        end(errno(libc::EPERM)),
        // The C library falls back to `clone`, whose flags can be looked at.
        unless(libc::BPF_JEQ, libc::SYS_clone3 as u32, 1),
        end(errno(libc::ENOSYS)),
        // The same with `openat`: flags in memory may change after they were looked at.
        unless(libc::BPF_JEQ, libc::SYS_openat2 as u32, 1),
        end(errno(libc::ENOSYS)),
    ];
    let of_network = NETWORK.iter().filter(|_| !network).map(|(number, _)| *number);
    let refused = REFUSED.iter().map(|(number, _)| *number);
    for (number, _) in OF_A_PROCESS {
        program.extend([
            unless(libc::BPF_JEQ, number as u32, 5),
            load(FIRST_ARGUMENT),
            // A process that names itself, as 0 does.
            libc::sock_filter { code: equal, jt: 1, jf: 0, k: 0 },
            unless(libc::BPF_JEQ, std::process::id(), 1),
            end(libc::SECCOMP_RET_ALLOW),
            end(notify),
        ]);
    }
    if !network {
        program.extend([
            unless(libc::BPF_JEQ, PAIR.0 as u32, 6),
            load(SECOND_ARGUMENT),
            statement(libc::BPF_ALU | libc::BPF_AND | libc::BPF_K, KIND_OF_SOCKET),
            libc::sock_filter { code: equal, jt: 1, jf: 0, k: libc::SOCK_STREAM as u32 },
            unless(libc::BPF_JEQ, libc::SOCK_SEQPACKET as u32, 1),
            end(libc::SECCOMP_RET_ALLOW),
            end(notify),
        ]);
    }
    for number in OPENING.iter().copied().chain(refused).chain(of_network) {
        program.push(unless(libc::BPF_JEQ, number as u32, 1));
        program.push(end(notify));
    }
    program.extend([
        unless(libc::BPF_JEQ, CLONE.0 as u32, 3),
        load(FIRST_ARGUMENT),
        unless(libc::BPF_JSET, libc::CLONE_THREAD as u32, 2),
        end(libc::SECCOMP_RET_ALLOW),
        end(libc::SECCOMP_RET_ALLOW),
        end(notify),
    ]);
    program
}

/// From here on this thread, and those that it starts, make no other calls; what they try comes to whoever holds what is returned.
///
/// # Errors
/// The kernel has no such filters.
pub(super) fn install(network: bool) -> io::Result<OwnedFd> {
    let mut program = filter(network);
    let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: the kernel copies the program, which lives until the call returns.
    let listener = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
            &raw const program,
        )
    };
    if listener < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a descriptor that the kernel has just made for this process.
    Ok(unsafe { OwnedFd::from_raw_fd(listener as i32) })
}
