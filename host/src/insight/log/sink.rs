//! Where lines wait until standard error takes them: a buffer bounded in bytes, and one thread that writes. Whoever logs never
//! waits for the reader: lines that don't fit are dropped and counted, and once the reader reads on, a line says how many. It
//! never knows what lines say.

use std::{
    fs::File,
    io::{self, IsTerminal, Write},
    mem,
    os::fd::AsFd,
    sync::atomic::{AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex};
use tracing_subscriber::fmt::{
    MakeWriter,
    format::Writer,
    time::{FormatTime, SystemTime},
};

/// Bytes of lines that wait for the reader, those that are being written among them.
const BUFFER_BYTES_MAX: usize = 1 << 20;
/// Bytes of one write: room for further lines comes in such steps.
const WRITE_BYTES_MAX: usize = 16 << 10;
/// How long a process that ends, or a thread that panics, waits for the reader.
const FLUSH_TIME_MAX: Duration = Duration::from_millis(250);
/// Between two tries to write to a standard error that was handed over as non-blocking.
const BETWEEN_TRIES: Duration = Duration::from_millis(10);

/// The lines that wait, and how those who log and the writer meet.
pub(super) struct Sink {
    waiting: Mutex<Waiting>,
    /// There is something to do for the writer.
    more: Condvar,
    /// All lines have been written.
    written: Condvar,
    /// Lines that were dropped since the start.
    dropped: AtomicU64,
    form: Form,
}

/// In which form this module's own line is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// For people, on a terminal.
    Text,
    /// For machines: a JSON object on each line.
    Json,
}

#[derive(Default)]
struct Waiting {
    lines: Vec<u8>,
    /// Bytes that the writer has taken and not yet written.
    taken: usize,
    /// Lines that were dropped and not told yet.
    untold: u64,
    /// A line didn't fit. All that follow are dropped until the writer comes back, so that the line that counts them stands where
    /// they would have stood.
    full: bool,
    /// When the write that is under way began.
    writing_since: Option<Instant>,
}

impl Sink {
    pub(super) fn new(form: Form) -> Self {
        Self {
            waiting: Mutex::default(),
            more: Condvar::new(),
            written: Condvar::new(),
            dropped: AtomicU64::new(0),
            form,
        }
    }

    /// In the form that fits standard error.
    pub(super) fn of_stderr() -> Self {
        Self::new(if io::stderr().is_terminal() { Form::Text } else { Form::Json })
    }

    pub(super) fn form(&self) -> Form {
        self.form
    }

    /// Starts the thread that writes to standard error.
    pub(super) fn start(&'static self) -> io::Result<()> {
        // A descriptor of its own: a write that hangs must not hold the lock of `io::stderr`.
        let stderr = File::from(io::stderr().as_fd().try_clone_to_owned()?);
        thread::Builder::new().name("log".into()).spawn(move || self.write_all_to(stderr)).map(drop)
    }

    /// Takes a line, or several that belong together; never waits for the reader.
    pub(super) fn push(&self, lines: &[u8]) {
        let mut waiting = self.waiting.lock();
        let fits = waiting.taken + waiting.lines.len() + lines.len() <= BUFFER_BYTES_MAX;
        if fits && !waiting.full {
            waiting.lines.extend_from_slice(lines);
        } else {
            // One that never fits says nothing of those that follow.
            waiting.full |= lines.len() <= BUFFER_BYTES_MAX;
            waiting.untold += 1;
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
        drop(waiting);
        self.more.notify_one();
    }

    /// Lines that were dropped since the start.
    pub(super) fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    /// Waits until all is written, for a short time at most: not at all for a reader that has kept the writer that long already.
    pub(super) fn flush(&self) {
        let mut waiting = self.waiting.lock();
        let deadline = waiting.writing_since.unwrap_or_else(Instant::now) + FLUSH_TIME_MAX;
        while !waiting.lines.is_empty() || waiting.taken > 0 {
            if self.written.wait_until(&mut waiting, deadline).timed_out() {
                return;
            }
        }
    }

    /// The writer's loop.
    fn write_all_to(&self, mut stderr: impl Write) {
        let mut works = true;
        loop {
            let lines = self.take(works);
            let mut left = lines.as_slice();
            self.waiting.lock().writing_since = Some(Instant::now());
            works = true;
            while !left.is_empty() && works {
                match stderr.write(&left[..left.len().min(WRITE_BYTES_MAX)]) {
                    Ok(length) if length > 0 => {
                        left = &left[length..];
                        let mut waiting = self.waiting.lock();
                        (waiting.taken, waiting.writing_since) = (left.len(), Some(Instant::now()));
                    }
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => thread::sleep(BETWEEN_TRIES),
                    // The reader has left, or a disk is full: later lines may get through again.
                    Ok(_) | Err(_) => works = false,
                }
            }
            self.done(left);
        }
    }

    /// Waits for lines and takes them all, with one among them that says how many were dropped. One that says this alone is no
    /// reason to write where the last write failed.
    fn take(&self, works: bool) -> Vec<u8> {
        let mut waiting = self.waiting.lock();
        loop {
            let full = mem::take(&mut waiting.full);
            if !waiting.lines.is_empty() || (waiting.untold > 0 && works) {
                let mut lines = mem::take(&mut waiting.lines);
                if waiting.untold > 0 {
                    let notice = self.notice(mem::take(&mut waiting.untold));
                    // Where there was no room, lines are missing behind these; where a write failed, before them.
                    let at = if full { lines.len() } else { 0 };
                    lines.splice(at..at, notice.into_bytes());
                }
                waiting.taken = lines.len();
                return lines;
            }
            self.more.wait(&mut waiting);
        }
    }

    /// Notes that the write is over, and that what is left of it is lost.
    fn done(&self, left: &[u8]) {
        let lost = left.iter().filter(|byte| **byte == b'\n').count() as u64;
        let mut waiting = self.waiting.lock();
        (waiting.taken, waiting.writing_since) = (0, None);
        waiting.untold += lost;
        self.dropped.fetch_add(lost, Ordering::Relaxed);
        if waiting.lines.is_empty() {
            self.written.notify_all();
        }
    }

    /// Written here and not logged: no filter may hide it, and it stands where the lines are missing.
    fn notice(&self, lines: u64) -> String {
        let mut now = String::new();
        // A clock that can't be told leaves it empty.
        let _ = SystemTime.format_time(&mut Writer::new(&mut now));
        let message = "log lines were dropped here: standard error was not read";
        match self.form {
            Form::Text => format!("{now}  WARN modalkit::log: {message} lines_dropped={lines}\n"),
            Form::Json => {
                format!(
                    r#"{{"timestamp":"{now}","level":"WARN","message":"{message}","lines_dropped":{lines},"target":"modalkit::log"}}"#
                ) + "\n"
            }
        }
    }
}

/// The formatting layer hands each line over in one write.
pub(super) struct Lines(&'static Sink);

impl Write for Lines {
    fn write(&mut self, lines: &[u8]) -> io::Result<usize> {
        self.0.push(lines);
        Ok(lines.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for &'static Sink {
    type Writer = Lines;

    fn make_writer(&self) -> Lines {
        Lines(self)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, mpsc};

    use super::*;

    /// A reader that takes a write only when it is told to.
    struct Reader {
        may_read: mpsc::Receiver<io::Result<()>>,
        read: Arc<Mutex<Vec<u8>>>,
    }

    impl Write for Reader {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            // Who lets it go lets it read everything.
            self.may_read.recv().unwrap_or(Ok(()))?;
            self.read.lock().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// What a reader is told: to read, or to fail.
    type LetRead = mpsc::SyncSender<io::Result<()>>;

    fn started() -> (&'static Sink, LetRead, Arc<Mutex<Vec<u8>>>) {
        let sink: &'static Sink = Box::leak(Box::new(Sink::new(Form::Json)));
        let (let_read, may_read) = mpsc::sync_channel(1);
        let read = Arc::new(Mutex::new(Vec::new()));
        let reader = Reader { may_read, read: Arc::clone(&read) };
        thread::spawn(move || sink.write_all_to(reader));
        (sink, let_read, read)
    }

    fn flushed(sink: &Sink) {
        let mut waiting = sink.waiting.lock();
        while !waiting.lines.is_empty() || waiting.taken > 0 || waiting.untold > 0 {
            sink.written.wait(&mut waiting);
        }
    }

    #[test]
    fn nobody_waits_for_a_reader_and_what_was_dropped_is_said_where_it_is_missing() {
        let (sink, let_read, read) = started();
        let line = [&[b'x'; 1023], b"\n".as_slice()].concat();
        sink.push(&line);
        // From here on the writer hangs in its first write: what is dropped is missing in one place.
        while sink.waiting.lock().taken == 0 {
            thread::yield_now();
        }
        for _ in 1..3000 {
            sink.push(&line);
        }
        let dropped = sink.dropped();
        assert!(dropped >= 3000 - 1024, "the bound is in bytes: {dropped}");
        sink.flush();
        drop(let_read);
        flushed(sink);
        sink.push(b"after\n");
        flushed(sink);
        let read = String::from_utf8(read.lock().clone()).unwrap();
        let others: Vec<&str> = read.lines().filter(|line| !line.starts_with('x')).collect();
        assert_eq!(others.len(), 2, "{others:?}");
        let notice: serde_json::Value = serde_json::from_str(others[0]).unwrap();
        assert_eq!((&notice["lines_dropped"], &notice["level"]), (&dropped.into(), &"WARN".into()));
        assert_eq!(others[1], "after");
        assert_eq!(read.lines().count() as u64, 3000 - dropped + 2);
    }

    #[test]
    fn a_line_beyond_the_bound_is_dropped_alone() {
        let (sink, let_read, read) = started();
        drop(let_read);
        sink.push(&vec![b'x'; BUFFER_BYTES_MAX + 1]);
        flushed(sink);
        sink.push(b"after\n");
        flushed(sink);
        let read = String::from_utf8(read.lock().clone()).unwrap();
        assert!(read.contains("\"lines_dropped\":1") && read.ends_with("after\n"), "{read}");
    }

    #[test]
    fn a_reader_that_stalls_is_not_waited_for_a_second_time() {
        let (sink, let_read, _) = started();
        sink.push(b"a line\n");
        sink.flush();
        let begun = Instant::now();
        (0..1000).for_each(|_| sink.flush());
        assert!(begun.elapsed() < FLUSH_TIME_MAX, "{:?}", begun.elapsed());
        drop(let_read);
    }

    #[test]
    fn lines_that_fail_are_counted_and_later_ones_are_written() {
        let (sink, let_read, read) = started();
        let_read.send(Err(io::ErrorKind::StorageFull.into())).unwrap();
        sink.push(b"lost\nlost\n");
        while sink.dropped() < 2 {
            thread::yield_now();
        }
        drop(let_read);
        sink.push(b"after\n");
        flushed(sink);
        let read = String::from_utf8(read.lock().clone()).unwrap();
        assert!(read.contains("\"lines_dropped\":2") && read.ends_with("after\n"), "{read}");
    }
}
