//! Which errors of reading a file say nothing about the file: it may be as it was, and is to be read again later. It never reads.

use std::io;

use rustix::io::Errno;

/// Whether the same file may be read on another try without any change to it.
#[must_use]
pub fn is_transient(error: &io::Error) -> bool {
    let of_the_moment = [
        // File descriptors of this process, of the machine; memory.
        Errno::MFILE,
        Errno::NFILE,
        Errno::NOMEM,
        Errno::NOBUFS,
        // Disks and mounts over a network.
        Errno::IO,
        Errno::STALE,
        Errno::TIMEDOUT,
        Errno::AGAIN,
        Errno::INTR,
        Errno::BUSY,
    ];
    Errno::from_io_error(error).is_some_and(|errno| of_the_moment.contains(&errno))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_of_descriptors_that_is_full_says_nothing_about_a_file() {
        let error = |errno: Errno| io::Error::from_raw_os_error(errno.raw_os_error());
        for errno in [Errno::MFILE, Errno::NFILE, Errno::IO, Errno::STALE] {
            assert!(is_transient(&error(errno)), "{errno}");
        }
        for errno in [Errno::NOENT, Errno::ACCESS, Errno::ISDIR, Errno::NOTDIR, Errno::LOOP] {
            assert!(!is_transient(&error(errno)), "{errno}");
        }
        assert!(!is_transient(&io::Error::new(io::ErrorKind::InvalidData, "no UTF-8")));
    }
}
