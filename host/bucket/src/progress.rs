//! How far a fetch is: counted by those who fetch, told in the log. It decides nothing.

use std::{
    convert::Infallible,
    io::{IsTerminal, stderr},
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use tokio::sync::watch;

use crate::status::Status;

/// Between two looks at what has come.
const BETWEEN_LOOKS: Duration = Duration::from_millis(500);
/// Between two lines in a log, and where a person looks on.
const BETWEEN_LINES: Duration = Duration::from_secs(10);
const BETWEEN_LINES_ON_A_TERMINAL: Duration = Duration::from_secs(2);

/// One fetch of many objects.
#[derive(Debug)]
pub(crate) struct Progress {
    pub(crate) files: u64,
    pub(crate) bytes: u64,
    /// Whole files, and bytes that are there: those that an earlier try had fetched among them.
    pub(crate) files_done: AtomicU64,
    pub(crate) bytes_done: AtomicU64,
    /// Bytes that were there when it began.
    had: AtomicU64,
    begun: Instant,
}

impl Progress {
    pub(crate) fn new(files: u64, bytes: u64) -> Self {
        Self {
            files,
            bytes,
            files_done: AtomicU64::new(0),
            bytes_done: AtomicU64::new(0),
            had: AtomicU64::new(0),
            begun: Instant::now(),
        }
    }

    /// Bytes that need not be fetched again.
    pub(crate) fn had(&self, bytes: u64) {
        self.had.fetch_add(bytes, Ordering::Relaxed);
        self.bytes_done.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes a second since it began.
    pub(crate) fn rate(&self) -> f64 {
        let fetched =
            self.bytes_done.load(Ordering::Relaxed).saturating_sub(self.had.load(Ordering::Relaxed));
        fetched as f64 / self.begun.elapsed().as_secs_f64().max(0.001)
    }

    /// Tells how far it is, again and again: operators at once, the log from time to time. It never ends.
    pub(crate) async fn tell(&self, volume: &str, status: &watch::Sender<Status>) -> Infallible {
        let pause = if stderr().is_terminal() { BETWEEN_LINES_ON_A_TERMINAL } else { BETWEEN_LINES };
        let mut next = Instant::now() + pause;
        loop {
            tokio::time::sleep(BETWEEN_LOOKS).await;
            let (done, rate) = (self.bytes_done.load(Ordering::Relaxed), self.rate());
            status.send_modify(|status| status.fetching = Some((self.bytes, done)));
            if Instant::now() < next {
                continue;
            }
            next += pause;
            let left = self.bytes.saturating_sub(done) as f64 / rate.max(1.0);
            tracing::info!(
                volume,
                files = self.files_done.load(Ordering::Relaxed),
                of_files = self.files,
                bytes = done,
                of_bytes = self.bytes,
                bytes_per_second = rate as u64,
                seconds_left = left as u64,
                "mirroring: {}, {}/s",
                share(done, self.bytes),
                size(rate as u64)
            );
        }
    }
}

fn share(done: u64, all: u64) -> String {
    format!("{} of {} ({} %)", size(done), size(all), (done * 100).checked_div(all).unwrap_or(100))
}

/// Bytes for people.
pub(crate) fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_for_people() {
        assert_eq!([size(0), size(1023), size(1536), size(5 << 30)], ["0 B", "1023 B", "1.5 KiB", "5.0 GiB"]);
        assert_eq!(share(1 << 20, 4 << 20), "1.0 MiB of 4.0 MiB (25 %)");
        assert_eq!(share(0, 0), "0 B of 0 B (100 %)");
    }
}
