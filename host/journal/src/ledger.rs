//! Which jobs are being run at this moment, in a small file of slots that is written in place and never synced: it has to outlive
//! the process, not the machine. The host that is started after one that died finds in it which jobs that was running, and on which threads.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read},
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
};

use parking_lot::Mutex;

use crate::JobId;

/// Jobs that can be noted at once: more run without being noted.
pub const SLOTS: u32 = 4096;
const SLOT_BYTES: usize = 16;

/// The file, and which of its slots are free.
pub struct Ledger {
    file: File,
    free: Mutex<Vec<u32>>,
}

/// A slot for one job's attempt; free again when dropped.
pub struct Slot {
    ledger: Arc<Ledger>,
    number: Option<u32>,
    job: JobId,
    attempt: u32,
    alone: AtomicBool,
    begun: AtomicBool,
    /// The one that runs it.
    thread: AtomicU32,
}

/// What a slot says of a job that was being run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Noted {
    pub(crate) row: i64,
    /// Which attempt it was, from 1.
    pub(crate) attempt: u32,
    /// No other job was being run.
    pub(crate) alone: bool,
    /// The thread that ran it, by the kernel's number.
    pub(crate) thread: u32,
}

/// The bit of an attempt's number that says that it ran alone.
const ALONE: u32 = 1 << 31;

impl Ledger {
    /// Opens the file and says which jobs it names.
    pub(crate) fn open(path: &Path) -> io::Result<(File, Vec<Noted>)> {
        let mut file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        let number = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().expect("four bytes"));
        let named = bytes
            .chunks_exact(SLOT_BYTES)
            .map(|slot| Noted {
                row: i64::from_le_bytes(slot[..8].try_into().expect("eight bytes")),
                attempt: number(&slot[8..12]) & !ALONE,
                alone: number(&slot[8..12]) & ALONE != 0,
                thread: number(&slot[12..]),
            })
            .filter(|noted| noted.row != 0)
            .collect();
        Ok((file, named))
    }

    /// Takes the file into use, once what it said has been taken over. All of its bytes are written, so that none is missing when
    /// the disk is full.
    pub(crate) fn begin(file: File) -> io::Result<Arc<Self>> {
        file.write_all_at(&vec![0; SLOTS as usize * SLOT_BYTES], 0)?;
        Ok(Self::go_on(file))
    }

    /// Takes the file into use with what it says: it could not be taken over, and is to be found again.
    pub(crate) fn go_on(file: File) -> Arc<Self> {
        Arc::new(Self { file, free: Mutex::new((0..SLOTS).rev().collect()) })
    }

    /// Says that nothing is being run: the host ends in order, whatever it cuts off.
    pub fn clear(&self) {
        // One that can't be written leaves jobs to be run alone at the next start.
        let _ = self.file.write_all_at(&vec![0; SLOTS as usize * SLOT_BYTES], 0);
    }

    /// A slot for an attempt that may begin soon; `alone` where no other job runs beside it.
    #[must_use]
    pub fn slot(self: &Arc<Self>, job: JobId, attempt: u32, alone: bool) -> Slot {
        let number = self.free.lock().pop();
        Slot {
            ledger: Arc::clone(self),
            number,
            job,
            attempt,
            alone: alone.into(),
            begun: false.into(),
            thread: 0.into(),
        }
    }
}

impl Slot {
    /// Says that the attempt begins, on this thread.
    pub fn begins(&self) {
        self.thread.store(rustix::thread::gettid().as_raw_nonzero().get().cast_unsigned(), Ordering::SeqCst);
        self.begun.store(true, Ordering::SeqCst);
        self.note();
    }

    fn note(&self) {
        let mut slot = [0; SLOT_BYTES];
        slot[..8].copy_from_slice(&self.job.row().to_le_bytes());
        let alone = if self.alone.load(Ordering::SeqCst) { ALONE } else { 0 };
        slot[8..12].copy_from_slice(&(self.attempt & !ALONE | alone).to_le_bytes());
        slot[12..].copy_from_slice(&self.thread.load(Ordering::SeqCst).to_le_bytes());
        self.write(&slot);
    }

    /// Says that the attempt came to nothing, and begins again later.
    pub fn waits(&self) {
        if self.begun.swap(false, Ordering::SeqCst) {
            self.write(&[0; SLOT_BYTES]);
        }
    }

    /// Says that other jobs run beside it from now on.
    pub fn joined(&self) {
        if self.alone.swap(false, Ordering::SeqCst) && self.begun.load(Ordering::SeqCst) {
            self.note();
        }
    }

    fn write(&self, slot: &[u8; SLOT_BYTES]) {
        if let Some(number) = self.number {
            // A job that isn't noted costs no more than an attempt that isn't counted.
            let _ = self.ledger.file.write_all_at(slot, u64::from(number) * SLOT_BYTES as u64);
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        // What it says stays until the next job's turn: an attempt that has ended is known to the journal by its number. Only what
        // a job would be blamed for is taken back at once.
        if self.alone.load(Ordering::SeqCst) {
            self.write(&[0; SLOT_BYTES]);
        }
        if let Some(number) = self.number {
            self.ledger.free.lock().push(number);
        }
    }
}
