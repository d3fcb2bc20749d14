//! Which jobs are being run at this moment, in a small file of slots that is written in place and never synced: it has to outlive
//! the process, not the machine. A host that died finds in it whom it died with.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read},
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
    sync::Arc,
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
}

impl Ledger {
    /// Opens the file, says which jobs it names (their rows, and the attempt that was under way), and empties it.
    pub(crate) fn open(path: &Path) -> io::Result<(File, Vec<(i64, u32)>)> {
        let mut file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        let named = bytes
            .chunks_exact(SLOT_BYTES)
            .map(|slot| {
                let row = i64::from_le_bytes(slot[..8].try_into().expect("eight bytes"));
                let attempt = u32::from_le_bytes(slot[8..12].try_into().expect("four bytes"));
                (row, attempt)
            })
            .filter(|(row, _)| *row != 0)
            .collect();
        Ok((file, named))
    }

    /// Takes the file into use, once what it said has been taken over. All of its bytes are written, so that none is missing when
    /// the disk is full.
    pub(crate) fn begin(file: File) -> io::Result<Arc<Self>> {
        file.write_all_at(&vec![0; SLOTS as usize * SLOT_BYTES], 0)?;
        Ok(Arc::new(Self { file, free: Mutex::new((0..SLOTS).rev().collect()) }))
    }

    /// A slot for an attempt that may begin soon.
    #[must_use]
    pub fn slot(self: &Arc<Self>, job: JobId, attempt: u32) -> Slot {
        let number = self.free.lock().pop();
        Slot { ledger: Arc::clone(self), number, job, attempt }
    }
}

impl Slot {
    /// Says that the attempt begins.
    pub fn begins(&self) {
        let mut slot = [0; SLOT_BYTES];
        slot[..8].copy_from_slice(&self.job.row().to_le_bytes());
        slot[8..12].copy_from_slice(&self.attempt.to_le_bytes());
        self.write(&slot);
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
        // What it says stays until the next job's turn: an attempt that has ended is known to the journal by its number.
        if let Some(number) = self.number {
            self.ledger.free.lock().push(number);
        }
    }
}
