//! Which errors of reading a file say nothing about the file: it may be as it was, and is to be read again later; and how that is
//! logged. It never reads.

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

/// Tells of files that can't be read now: when that begins, when the reason is another, and when it is over.
#[derive(Debug)]
pub struct Outage {
    of: &'static str,
    /// The reason that was told.
    told: Option<String>,
}

impl Outage {
    /// There is none yet; `of` names what the files are, for the log.
    #[must_use]
    pub fn new(of: &'static str) -> Self {
        Self { of, told: None }
    }

    /// Notes a try: why it failed, for a reason that may pass, or `None` where everything was read. Says whether that was told.
    pub fn note(&mut self, reason: Option<&str>) -> bool {
        if reason == self.told.as_deref() {
            return false;
        }
        self.told = reason.map(str::to_owned);
        match reason {
            Some(reason) => {
                tracing::warn!(
                    reason,
                    "{} can't be read now: it stays as it was, and is tried again",
                    self.of
                );
            }
            None => tracing::info!("{} can be read again", self.of),
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outage_is_told_when_it_begins_and_when_it_is_over() {
        let mut outage = Outage::new("the configuration");
        let tries = [None, Some("EIO"), Some("EIO"), Some("ESTALE"), Some("ESTALE"), None, None, Some("EIO")];
        let told = tries.map(|reason| outage.note(reason));
        assert_eq!(told, [false, true, false, true, false, true, false, true]);
    }

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
