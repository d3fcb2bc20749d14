//! Every accepted asynchronous job, on disk: one SQLite file in WAL mode, synced at each commit, written by one thread in groups.
//!
//! It owns the jobs' ids, rows, states and the note of which are being run. It never knows models, brokers or HTTP, nor when a job
//! should run.
//!
//! A job costs two writes, or three where a queue gets its result: acceptance, end, delivery. Each shares its commit with whatever
//! else waits at that moment.

#![forbid(unsafe_code)]

mod change;
mod clock;
mod death;
mod id;
mod ledger;
mod reader;
mod record;
mod schema;
mod store;
#[cfg(test)]
mod tests;
mod writer;

use std::{
    fs::{self, File},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    thread::JoinHandle,
};

use bytes::Bytes;
use parking_lot::Mutex;

pub use change::Unfit;
pub use clock::Clock;
pub use death::{HostDeath, Suspicion};
pub use id::{JobId, NotAnId};
pub use ledger::{Ledger, SLOTS, Slot};
pub use record::{
    Accepted, Delivery, Filter, Finish, IdempotencyKey, NewJob, OpenJob, Page, Retry, State, Stored, Totals,
};
pub use writer::{Committed, OnCommit, Retention, unix_ms};

use change::Change;
use death::take_over;
use id::Ids;
use reader::Reader;
use schema::StoreError;
use store::{Opened, Store};
use writer::{Shared, Writer};

const FILE: &str = "jobs.sqlite";
const LEDGER: &str = "running";
const LOCK: &str = "lock";
/// Of the folder, where it is made here, and of all files in it.
const FOLDER_MODE: u32 = 0o700;
const FILE_MODE: u32 = 0o600;
/// Permission bits of others than the owner.
const OF_OTHERS: u32 = 0o077;

/// Why a journal can't be opened; each asks something else of the operator.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The folder can't be made or used.
    #[error("can't use the folder {folder} for the journal of asynchronous jobs")]
    Folder {
        /// The folder.
        folder: PathBuf,
        /// What happened.
        #[source]
        source: io::Error,
    },
    /// Another process has it.
    #[error("another host uses the journal in {0}: give each a folder of its own")]
    InUse(PathBuf),
    /// Its content is damaged; it may still hold accepted jobs.
    #[error("the journal {file} can't be read: {why}")]
    Damaged {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// It can't be read or written at the moment.
    #[error("can't open the journal {file}: {why}")]
    Unusable {
        /// The file.
        file: PathBuf,
        /// What happened.
        why: String,
    },
}

/// Why a job isn't accepted; each asks something else of whoever sent it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AcceptError {
    /// Something else was sent under its name.
    #[error("another body was sent before under the same name, for the job {0}")]
    Conflict(JobId),
    /// Too many wait to be written.
    #[error("too many jobs wait to be written")]
    Busy,
    /// Jobs that aren't done with take all the room there may be.
    #[error("the journal is full of jobs that are not done with")]
    Full,
    /// Names that are remembered take all the room there may be for them.
    #[error("the journal is full of names that are remembered")]
    FullOfNames,
    /// It is larger than the journal's format takes.
    #[error("the job can't be kept: {0}")]
    Unfit(Unfit),
    /// The disk is full, or fails.
    #[error("the journal can't be written: {0}")]
    Unwritable(String),
    /// The host is going away.
    #[error("the journal is closed")]
    Closed,
}

/// A file that can't be read at the moment.
#[derive(Debug, thiserror::Error)]
#[error("the journal can't be read")]
pub struct ReadError(#[from] rusqlite::Error);

/// The journal. Whoever drops it waits for what was handed to it.
pub struct Journal {
    shared: Arc<Shared>,
    /// For whoever runs and delivers jobs.
    reader: Mutex<Reader>,
    /// For those who ask after single jobs, and for those who list them: neither keeps the others waiting.
    asked: Mutex<Reader>,
    lists: Mutex<Reader>,
    ids: Ids,
    ledger: Arc<Ledger>,
    writer: Option<JoinHandle<()>>,
    /// Keeps other processes out; released last.
    _lock: FolderLock,
}

/// A folder that is this process's, for its journal and for what else a host keeps there.
#[derive(Debug)]
pub struct FolderLock {
    folder: PathBuf,
    _file: File,
}

impl FolderLock {
    /// Makes the folder where it isn't there, and takes it for this process.
    ///
    /// # Errors
    /// [`OpenError::Folder`], or [`OpenError::InUse`] where another process has it.
    pub fn take(folder: &Path) -> Result<Self, OpenError> {
        Ok(Self { folder: folder.to_owned(), _file: lock(folder)? })
    }

    /// Which it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.folder
    }
}

impl Journal {
    /// Opens the journal in a folder that is this process's; where the host before this one was running jobs, it died like this.
    /// `on_commit` hears of every group. Returns the jobs that aren't done with, in the order in which they came.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(
        folder: FolderLock,
        death: &HostDeath,
        retention: Retention,
        on_commit: OnCommit,
    ) -> Result<(Self, Vec<OpenJob>), OpenError> {
        Self::open_prepared(folder, death, retention, on_commit, |_| ())
    }

    fn open_prepared(
        lock: FolderLock,
        death: &HostDeath,
        retention: Retention,
        on_commit: OnCommit,
        prepare: impl FnOnce(&Store),
    ) -> Result<(Self, Vec<OpenJob>), OpenError> {
        let folder = lock.path().to_owned();
        let of_folder = |source| OpenError::Folder { folder: folder.clone(), source };
        let path = folder.join(FILE);
        // What SQLite puts beside it has its mode from the first moment.
        private(&path).map_err(of_folder)?;
        let file = || path.clone();
        let Opened { mut store, mut open_jobs, last_row, clock } =
            Store::open(&path).map_err(|error| match error {
                StoreError::Damaged(why) => OpenError::Damaged { file: file(), why },
                other => OpenError::Unusable { file: file(), why: other.to_string() },
            })?;
        prepare(&store);
        let unusable = |error: rusqlite::Error| OpenError::Unusable { file: file(), why: error.to_string() };
        let clock = Clock::resume(clock, unix_ms());
        let (ledger, running) = Ledger::open(&folder.join(LEDGER)).map_err(of_folder)?;
        let is_written =
            take_over(&mut store, &mut open_jobs, &running, death, clock.now()).map_err(unusable)?;
        let ledger =
            if is_written { Ledger::begin(ledger).map_err(of_folder)? } else { Ledger::go_on(ledger) };
        let reader = || Reader::open(&path).map(Mutex::new).map_err(unusable);
        let (reader, asked, lists) = (reader()?, reader()?, reader()?);
        let shared = Shared::new(retention, clock);
        let writer = Writer::start(store, Arc::clone(&shared), on_commit).map_err(of_folder)?;
        let journal = Self {
            shared,
            reader,
            asked,
            lists,
            ids: Ids::after(last_row),
            ledger,
            writer: Some(writer),
            _lock: lock,
        };
        Ok((journal, open_jobs))
    }

    /// The name for the next job.
    #[must_use]
    pub fn next_id(&self) -> JobId {
        self.ids.next(unix_ms())
    }

    /// Writes a job. `done` is called on the journal's thread once it is on disk, or can't be; it must not block.
    pub fn accept(&self, job: NewJob, done: impl FnOnce(Result<Accepted, AcceptError>) + Send + 'static) {
        self.shared.push(Change::Accept(job, Box::new(done)));
    }

    /// Writes a job that is none, as one that has failed, in one step. `done` is called as for [`Journal::accept`].
    pub fn refuse(
        &self,
        job: NewJob,
        finish: Finish,
        done: impl FnOnce(Result<Accepted, AcceptError>) + Send + 'static,
    ) {
        self.shared.push(Change::Refuse(job, finish, Box::new(done)));
    }

    /// Writes that a job was taken back while it ran. `done` is called once that is on disk.
    pub fn cancel(&self, id: JobId, done: impl FnOnce() + Send + 'static) {
        self.shared.push(Change::Cancel(id, Box::new(done)));
    }

    /// Writes that an attempt failed and another follows.
    pub fn retry(&self, retry: Retry) {
        self.shared.push(Change::Retry(retry));
    }

    /// Writes how a job ended. `done` is called once that is on disk, however long it takes, or with [`Unfit`] where it never can be:
    /// the job is then as it was before.
    pub fn finish(&self, finish: Finish, done: impl FnOnce(Result<(), Unfit>) + Send + 'static) {
        self.shared.push(Change::Finish(finish, Box::new(done)));
    }

    /// Writes that a queue has a job's message. `done` is called once that is on disk.
    pub fn delivered(&self, id: JobId, done: impl FnOnce() + Send + 'static) {
        self.shared.push(Change::Delivered(id, unix_ms(), None, Box::new(done)));
    }

    /// Writes that a job's message was given up.
    pub fn dead(&self, id: JobId, why: String) {
        self.shared.push(Change::Delivered(id, unix_ms(), Some(why), Box::new(|| ())));
    }

    /// Has a message delivered again that was delivered or given up. `done` gets the job once that is on disk, and `None` where
    /// there is no such message or it is on its way.
    pub fn redeliver(&self, id: JobId, done: impl FnOnce(Option<OpenJob>) + Send + 'static) {
        self.shared.push(Change::Redeliver(id, Box::new(done)));
    }

    /// A job. Reads the disk.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn job(&self, id: JobId) -> Result<Option<Stored>, ReadError> {
        Ok(self.asked.lock().job(id)?)
    }

    /// What came in for a job that hasn't ended. Reads the disk.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn envelope(&self, id: JobId) -> Result<Option<Bytes>, ReadError> {
        Ok(self.reader.lock().body(id, false)?)
    }

    /// The message of a job that has ended. Reads the disk.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn result(&self, id: JobId) -> Result<Option<Bytes>, ReadError> {
        Ok(self.reader.lock().body(id, true)?)
    }

    /// Bytes of a job's message; 0 where there is none. Reads the disk.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn result_bytes(&self, id: JobId) -> Result<usize, ReadError> {
        Ok(self.asked.lock().result_bytes(id)?)
    }

    /// Jobs, the youngest first. Reads the disk.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn list(&self, filter: &Filter) -> Result<Page, ReadError> {
        Ok(self.lists.lock().list(filter)?)
    }

    /// How SQLite finds what a list is made of.
    #[cfg(test)]
    fn plan(&self, filter: &Filter) -> String {
        self.lists.lock().plan(filter).expect("a plan")
    }

    /// Looks through the whole file: what is wrong with it, if anything is. Takes as long as reading it.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn damage(&self) -> Result<Option<String>, ReadError> {
        Ok(self.reader.lock().damage()?)
    }

    /// Where running jobs are noted.
    #[must_use]
    pub fn ledger(&self) -> &Arc<Ledger> {
        &self.ledger
    }

    /// The journal's own time, by which ages are told.
    #[must_use]
    pub fn clock(&self) -> &Clock {
        &self.shared.clock
    }

    /// Why nothing can be written at the moment.
    #[must_use]
    pub fn failing(&self) -> Option<Arc<String>> {
        self.shared.failing.load_full()
    }

    /// Keeps finished jobs like this from now on.
    pub fn set_retention(&self, retention: Retention) {
        self.shared.retention.store(Arc::new(retention));
    }

    /// Accepts nothing more, and writes what was handed over; blocking. What can't be written is lost only with this process's
    /// memory: the jobs it tells of are still in the journal as they were.
    pub fn close(&mut self) {
        self.shared.stop();
        if let Some(writer) = self.writer.take() {
            // A writer that panicked has said so.
            let _ = writer.join();
        }
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        self.close();
    }
}

/// Moves a journal that can't be read out of the way; returns its new name.
///
/// # Errors
/// It can't be moved, or another host uses it.
pub fn set_aside(folder: &Path) -> Result<PathBuf, OpenError> {
    let _lock = lock(folder)?;
    let aside = folder.join(format!("{FILE}.damaged-{}", unix_ms()));
    let of_folder = |source| OpenError::Folder { folder: folder.to_owned(), source };
    for suffix in ["-wal", "-shm"] {
        let with = |path: &Path| PathBuf::from(format!("{}{suffix}", path.display()));
        match fs::rename(with(&folder.join(FILE)), with(&aside)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(of_folder(error)),
            _ => {}
        }
    }
    fs::rename(folder.join(FILE), &aside).map_err(of_folder)?;
    Ok(aside)
}

/// Takes the folder for this process, and closes its files to others: they hold what callers sent.
fn lock(folder: &Path) -> Result<File, OpenError> {
    let of_folder = |source| OpenError::Folder { folder: folder.to_owned(), source };
    fs::DirBuilder::new().recursive(true).mode(FOLDER_MODE).create(folder).map_err(of_folder)?;
    let lock = private(&folder.join(LOCK)).map_err(of_folder)?;
    match lock.try_lock() {
        Ok(()) => {}
        Err(fs::TryLockError::WouldBlock) => return Err(OpenError::InUse(folder.to_owned())),
        Err(fs::TryLockError::Error(error)) => return Err(of_folder(error)),
    }
    for entry in fs::read_dir(folder).map_err(of_folder)? {
        let entry = entry.map_err(of_folder)?;
        let name = entry.file_name();
        let is_ours = name.to_str().is_some_and(|name| name.starts_with(FILE) || name == LEDGER);
        let metadata = entry.metadata().map_err(of_folder)?;
        if is_ours && metadata.is_file() && metadata.mode() & OF_OTHERS != 0 {
            // A file system without permissions has none to set.
            let _ = fs::set_permissions(entry.path(), fs::Permissions::from_mode(FILE_MODE));
        }
    }
    Ok(lock)
}

/// Opens a file, or makes one, that nobody else may read.
fn private(path: &Path) -> io::Result<File> {
    let file = File::options().write(true).create(true).truncate(false).mode(FILE_MODE).open(path)?;
    // One that was there; a file system without permissions has none to set.
    let _ = file.set_permissions(fs::Permissions::from_mode(FILE_MODE));
    Ok(file)
}
