//! Tries a library in a short-lived child process first, so that one that crashes while it is opened harms nobody.
//!
//! The child is this same program, told by its arguments to call [`child`]; it answers with one line of JSON.

use std::{
    io::{self, Read},
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{self, Command, ExitStatus, Stdio},
    sync::mpsc,
    thread,
    time::Duration,
};

use modalkit_engine::{LoadError, Staged};
use serde::{Deserialize, Serialize};

use crate::{error::OpenError, library::PipelineLibrary, queue::QueueLibrary, store::staged_in_place};

/// What the child found.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Verdict {
    Fit,
    Refused(String),
    /// A shared library that it needs wasn't found.
    Needs(String),
}

/// What a library prints while it is opened is read up to this; a child that prints more is killed at the limit.
const SAID_BYTES_MAX: u64 = 1 << 20;

/// How to start the child.
#[derive(Clone, Debug)]
pub struct Preflight {
    /// The program that calls [`child`].
    pub program: PathBuf,
    /// The argument that makes it do so; the library's path follows it.
    pub argument: &'static str,
    /// How long it may take.
    pub limit: Duration,
}

/// Opens a staged copy in a child process.
///
/// # Errors
/// The child refused the library, crashed, or took longer than the limit.
pub(crate) fn run(staged: &Staged, how: &Preflight) -> Result<(), LoadError> {
    let failed = |source| LoadError::Preflight { path: how.program.clone(), source };
    let mut child = Command::new(&how.program)
        .arg(how.argument)
        .arg(staged.path())
        // Never written to: it ends when this process does, however that happens, and the child with it.
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(failed)?;
    let mut stdout = child.stdout.take().expect("stdout was asked to be piped");
    let (sender, receiver) = mpsc::sync_channel(1);
    // The pipe ends with the child, killed or not, and this thread with the pipe.
    let read = move || {
        let mut said = Vec::new();
        let read = stdout.by_ref().take(SAID_BYTES_MAX).read_to_end(&mut said);
        // The receiver is gone when the limit has passed.
        let _ = sender.send(read.map(|_| String::from_utf8_lossy(&said).into_owned()));
    };
    if let Err(source) = thread::Builder::new().name("preflight".into()).spawn(read) {
        // It may have ended already.
        let _ = child.kill();
        child.wait().map_err(failed)?;
        return Err(failed(source));
    }
    let Ok(said) = receiver.recv_timeout(how.limit) else {
        // It may have ended between the limit and now; the verdict is the same.
        let _ = child.kill();
        child.wait().map_err(failed)?;
        return Err(LoadError::Hung { limit: how.limit });
    };
    let status = child.wait().map_err(failed)?;
    // The library may have printed something before it, or after it when the process ended.
    let said = said.map_err(failed)?;
    let verdict = said.lines().rev().find_map(|line| serde_json::from_str(line).ok());
    match verdict {
        Some(Verdict::Fit) if status.success() => Ok(()),
        Some(Verdict::Refused(reason)) => Err(LoadError::Refused(reason)),
        Some(Verdict::Needs(name)) => {
            Err(OpenError::MissingLibrary { name, beside: false }.of(staged.origin()).into())
        }
        Some(Verdict::Fit) | None => Err(LoadError::Crashed { how: describe(status) }),
    }
}

/// The child's whole work: opens the file and returns the line to print.
#[must_use]
pub fn child(file: &Path) -> String {
    leave_with_the_parent();
    let staged = staged_in_place(file);
    // The other kind of plugin is as fit as this one; whoever asked knows which it takes.
    let opened = match PipelineLibrary::open(&staged) {
        Err(OpenError::IsAQueue) => QueueLibrary::open(&staged).map(drop),
        opened => opened.map(drop),
    };
    let verdict = match opened {
        Ok(()) => Verdict::Fit,
        Err(OpenError::MissingLibrary { name, .. }) => Verdict::Needs(name),
        Err(error) => Verdict::Refused(error.to_string()),
    };
    serde_json::to_string(&verdict).expect("a verdict is a string at most")
}

/// A constructor that never returns must not outlive the host that wanted to know.
fn leave_with_the_parent() {
    let (started, waits) = mpsc::sync_channel(1);
    let leave = move || {
        let mut stdin = io::stdin().lock();
        // It is waited for below.
        let _ = started.send(());
        // Nothing comes but the end; an error means the same.
        let _ = io::copy(&mut stdin, &mut io::sink());
        process::abort();
    };
    // Without the thread it outlives the host in that one case. A thread that has not quite started yet would wait for the
    // dynamic linker's lock, which such a constructor holds for ever.
    if thread::Builder::new().name("parent".into()).spawn(leave).is_ok() {
        let _ = waits.recv();
    }
}

fn describe(status: ExitStatus) -> String {
    status.signal().map_or_else(|| status.to_string(), |signal| format!("signal {signal}"))
}
