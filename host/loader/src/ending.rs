//! Says whose code it was when the process ends without being told to: a plugin that calls `exit`, and signals that its faults raise. Such
//! an end is never taken for a planned one. It owns what each thread says of the plugin code that it runs, and never knows models' states.
//!
//! What runs here at the end runs in a signal handler, or in a process that is coming apart: it reads what this thread wrote beforehand,
//! formats into a buffer of its own, and calls the kernel.

use std::{
    cell::Cell,
    fs::File,
    io,
    marker::PhantomData,
    os::fd::AsRawFd,
    ptr,
    sync::{
        OnceLock,
        atomic::{AtomicBool, AtomicI32, Ordering, compiler_fence},
    },
};

/// The exit code of a process that plugin code has ended by `exit` (`EX_SOFTWARE`), whatever code that gave.
pub const ENDED_BY_A_PLUGIN: i32 = 70;

/// Signals that faults of code raise, with their names.
const FAULTS: [(i32, &str); 5] = [
    (libc::SIGSEGV, "SIGSEGV"),
    (libc::SIGBUS, "SIGBUS"),
    (libc::SIGILL, "SIGILL"),
    (libc::SIGFPE, "SIGFPE"),
    (libc::SIGABRT, "SIGABRT"),
];
/// The longest line; what is longer is cut.
const LINE_BYTES: usize = 512;
/// Whoever reads the log and doesn't is waited for this long.
const WRITE_TIME_MAX_MS: i32 = 100;
/// What the log's thread gets to write what was logged before.
static LOG_TIME: libc::timespec = libc::timespec { tv_sec: 0, tv_nsec: 200_000_000 };

/// What the handlers for each of [`FAULTS`] were before.
static BEFORE: OnceLock<[libc::sigaction; FAULTS.len()]> = OnceLock::new();
/// The file into which the end is noted whichever thread's code brings it about, and nowhere else; -1 for none.
static NOTE_OF_ALL: AtomicI32 = AtomicI32::new(-1);
/// The file into which the end is noted with the thread whose code brings it about; -1 for none.
static NOTE_OF_THREADS: AtomicI32 = AtomicI32::new(-1);
static PLANNED: AtomicBool = AtomicBool::new(false);
/// The process that is watched: those that plugins fork have the handlers too, and end as they like.
static PROCESS: AtomicI32 = AtomicI32::new(0);

/// Plugin code that a thread runs; the texts live as long as the [`Entered`] that put it here.
#[derive(Clone, Copy)]
struct Code {
    model: *const [u8],
    stage: &'static str,
}

const NOTHING: Code = Code { model: ptr::slice_from_raw_parts(ptr::null(), 0), stage: "" };

thread_local! {
    static CODE: Cell<Code> = const { Cell::new(NOTHING) };
    static NOTE: Cell<i32> = const { Cell::new(-1) };
}

/// A call into a plugin, until it is dropped. Never passed on, so that it is dropped on its thread and in its turn.
pub(crate) struct Entered<'a> {
    before: Code,
    _texts: PhantomData<(&'a str, *const ())>,
}

impl<'a> Entered<'a> {
    /// This thread runs this stage of a model's plugin from here on.
    #[inline]
    pub(crate) fn new(model: &'a str, stage: &'static str) -> Self {
        let before = CODE.replace(Code { model: model.as_bytes(), stage });
        compiler_fence(Ordering::SeqCst);
        Self { before, _texts: PhantomData }
    }
}

impl Drop for Entered<'_> {
    #[inline]
    fn drop(&mut self) {
        compiler_fence(Ordering::SeqCst);
        CODE.set(self.before);
    }
}

/// A file into which the end of this thread's plugin code is written, should that end the process. Until it is dropped.
pub(crate) struct Note<'f> {
    before: i32,
    /// It is this thread's, and the file stays open as long.
    _here: PhantomData<(&'f File, *const ())>,
}

impl<'f> Note<'f> {
    /// Takes a file into use.
    pub(crate) fn new(file: &'f File) -> Self {
        Self { before: NOTE.replace(file.as_raw_fd()), _here: PhantomData }
    }
}

impl Drop for Note<'_> {
    fn drop(&mut self) {
        NOTE.set(self.before);
    }
}

/// Watches over how the process ends, from here on.
///
/// # Errors
/// The system takes no handler.
pub fn watch() -> io::Result<()> {
    // SAFETY: zeroes are a valid value of this structure of integers and one optional function.
    let mut before: [libc::sigaction; FAULTS.len()] = unsafe { std::mem::zeroed() };
    for ((signal, _), before) in FAULTS.iter().zip(&mut before) {
        // SAFETY: reads the handler in force into a structure that is ours.
        if unsafe { libc::sigaction(*signal, ptr::null(), before) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    if BEFORE.set(before).is_err() {
        return Ok(());
    }
    // SAFETY: a system call without arguments, which can't fail.
    PROCESS.store(unsafe { libc::getpid() }, Ordering::SeqCst);
    for (signal, _) in FAULTS {
        // SAFETY: as above.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = on_fault as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        // SAFETY: the handler has the signature that SA_SIGINFO asks for, and calls only what may be called in one.
        if unsafe { libc::sigaction(signal, &raw const action, ptr::null_mut()) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    watch_exit()
}

/// Watches over how this process ends, as [`watch`] does, and has it noted in this file alone: for a process whose end others tell of.
///
/// # Errors
/// The system takes no handler.
pub fn note_all(file: &'static File) -> io::Result<()> {
    NOTE_OF_ALL.store(file.as_raw_fd(), Ordering::SeqCst);
    watch()
}

/// Has this file say, after what it says already, on which thread plugin code ends this process, and how: `THREAD HOW`, a line, with the
/// kernel's number of the thread, or 0 where that was outside of any call into a plugin.
pub fn note_threads(file: &'static File) {
    NOTE_OF_THREADS.store(file.as_raw_fd(), Ordering::SeqCst);
}

/// Has [`on_exit`] run before what was to run at the end of the process until now. Called again after each library that is opened, whose
/// destructors would run first otherwise, in a process that others still work in.
pub(crate) fn watch_exit() -> io::Result<()> {
    if BEFORE.get().is_none() {
        return Ok(());
    }
    // SAFETY: the function lives as long as the process and unwinds into nobody.
    if unsafe { libc::atexit(on_exit) } != 0 {
        return Err(io::Error::other("no more functions can be run at the process's end"));
    }
    Ok(())
}

fn is_watched_process() -> bool {
    // SAFETY: a system call without arguments, which can't fail.
    PROCESS.load(Ordering::SeqCst) == unsafe { libc::getpid() }
}

/// What ends the process from here on does so by the host's will.
pub fn planned() {
    PLANNED.store(true, Ordering::SeqCst);
}

extern "C" fn on_fault(signal: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let place = FAULTS.iter().position(|(known, _)| *known == signal);
    let (Some(place), Some(before)) = (place, BEFORE.get()) else { return };
    if is_watched_process() {
        tell(FAULTS[place].1);
        give_log_time();
    }
    // SAFETY: the kernel gives a live structure to a handler that asked for one.
    let was_sent = unsafe { (*info).si_code } <= 0;
    if was_sent {
        // A fault comes again when this returns; what was sent doesn't, and has no other end than the process's.
        // SAFETY: sends this thread a signal, which is delivered when this returns.
        unsafe {
            libc::signal(signal, libc::SIG_DFL);
            libc::raise(signal);
        }
    } else {
        // SAFETY: puts back what was in force before, which handles a stack that overflowed and otherwise lets the process die of it.
        unsafe { libc::sigaction(signal, &raw const before[place], ptr::null_mut()) };
    }
}

extern "C" fn on_exit() {
    if PLANNED.load(Ordering::SeqCst) || !is_watched_process() {
        return;
    }
    tell("exit()");
    give_log_time();
    // SAFETY: a plain system call. Destructors that were to run after this are left out.
    unsafe { libc::_exit(ENDED_BY_A_PLUGIN) }
}

/// The log's thread writes meanwhile what was logged and printed before. A process that notes its end has no such thread.
fn give_log_time() {
    if NOTE_OF_ALL.load(Ordering::SeqCst) < 0 {
        // SAFETY: a plain system call.
        unsafe { libc::nanosleep(&raw const LOG_TIME, ptr::null_mut()) };
    }
}

/// Writes what happened, and in whose code, to standard error and into the note.
fn tell(how: &str) {
    let code = CODE.get();
    // SAFETY: `Entered` put it there on this thread, which is inside the call that its texts outlive.
    let model = if code.stage.is_empty() { &b""[..] } else { unsafe { &*code.model } };
    let mut line = Line { bytes: [0; LINE_BYTES], length: 0 };
    line.put(b"{\"level\":\"ERROR\",\"message\":\"the process is ended by ");
    line.put(how.as_bytes());
    if code.stage.is_empty() {
        line.put(b", outside of any call into a plugin\"");
    } else {
        line.put(b" in a plugin's ");
        line.put(code.stage.as_bytes());
        line.put(b"\",\"model\":\"");
        line.put_text(model);
        line.put(b"\",\"stage\":\"");
        line.put(code.stage.as_bytes());
        line.put(b"\"");
    }
    line.put(b",\"target\":\"modalkit::ending\"}\n");
    let of_all = NOTE_OF_ALL.load(Ordering::SeqCst);
    if of_all < 0 {
        line.write(libc::STDERR_FILENO, true);
    }
    let mut line = Line { bytes: [0; LINE_BYTES], length: 0 };
    line.put_how(how, code.stage);
    let note = if of_all < 0 { NOTE.get() } else { of_all };
    if note >= 0 {
        line.write(note, false);
    }
    let note = NOTE_OF_THREADS.load(Ordering::SeqCst);
    if note >= 0 {
        // SAFETY: a system call without arguments, which can't fail.
        let thread = if code.stage.is_empty() { 0 } else { unsafe { libc::gettid() } };
        let mut line = Line { bytes: [0; LINE_BYTES], length: 0 };
        line.put_number(thread.unsigned_abs());
        line.put(b" ");
        line.put_how(how, code.stage);
        line.put(b"\n");
        line.write(note, false);
    }
}

struct Line {
    bytes: [u8; LINE_BYTES],
    length: usize,
}

impl Line {
    fn put(&mut self, text: &[u8]) {
        let length = text.len().min(LINE_BYTES - self.length);
        self.bytes[self.length..self.length + length].copy_from_slice(&text[..length]);
        self.length += length;
    }

    fn put_how(&mut self, how: &str, stage: &str) {
        self.put(how.as_bytes());
        if !stage.is_empty() {
            self.put(b" in ");
            self.put(stage.as_bytes());
        }
    }

    fn put_number(&mut self, number: u32) {
        if number >= 10 {
            self.put_number(number / 10);
        }
        self.put(&[b'0' + (number % 10) as u8]);
    }

    /// As a part of a text in JSON.
    fn put_text(&mut self, text: &[u8]) {
        for byte in text {
            match byte {
                b'"' | b'\\' | 0..0x20 => self.put(b"?"),
                byte => self.put(&[*byte]),
            }
        }
    }

    fn write(&self, file: i32, may_block: bool) {
        let mut ready = libc::pollfd { fd: file, events: libc::POLLOUT, revents: 0 };
        // SAFETY: `poll` changes one structure that is ours, and `write` reads bytes that are.
        unsafe {
            if may_block && libc::poll(&raw mut ready, 1, WRITE_TIME_MAX_MS) != 1 {
                return;
            }
            // Where it isn't taken, there is nobody to tell.
            let _ = libc::write(file, self.bytes.as_ptr().cast(), self.length);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_nest_and_each_thread_has_its_own() {
        // SAFETY: only asked for while an `Entered` is there, whose text is a literal.
        let model = |code: Code| unsafe { &*code.model }.to_vec();
        let outer = Entered::new("outer", "predict");
        {
            let _inner = Entered::new("inner", "load");
            assert_eq!((model(CODE.get()), CODE.get().stage), (b"inner".to_vec(), "load"));
            std::thread::spawn(|| assert_eq!(CODE.get().stage, "")).join().unwrap();
        }
        assert_eq!((model(CODE.get()), CODE.get().stage), (b"outer".to_vec(), "predict"));
        drop(outer);
        assert_eq!(CODE.get().stage, "");
    }

    #[test]
    fn lines_are_cut_and_texts_break_no_json() {
        let mut line = Line { bytes: [0; LINE_BYTES], length: 0 };
        line.put_text(b"a\"b\\c\n");
        assert_eq!(&line.bytes[..line.length], b"a?b?c?");
        let mut number = Line { bytes: [0; LINE_BYTES], length: 0 };
        number.put_number(40_507);
        assert_eq!(&number.bytes[..number.length], b"40507");
        line.put(&[b'x'; 2 * LINE_BYTES]);
        assert_eq!(line.length, LINE_BYTES);
    }
}
