//! What a snapshot's files are: which object each was made of, and by what it is known to be unchanged since. A file in JSON beside the snapshot.

use std::{collections::BTreeMap, fs, io, os::unix::fs::MetadataExt, path::Path};

use serde::{Deserialize, Serialize};

use crate::{listing::Object, spec::BucketSpec};

/// The objects of a snapshot, by their paths in it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Manifest {
    /// Of which prefix, bucket and store.
    pub(crate) source: String,
    pub(crate) files: BTreeMap<String, Entry>,
    /// Files that were written into this snapshot and have been taken along into the next one, as they were then.
    #[serde(default)]
    pub(crate) carried: BTreeMap<String, Stamp>,
}

/// One object, as it lies in the snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Entry {
    pub(crate) object: Object,
    /// `None` for a folder without files, which is an empty object whose key ends with `/`.
    pub(crate) stamp: Option<Stamp>,
}

/// By what a file is known to be the one that was mirrored: whoever writes it changes one of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Stamp {
    pub(crate) bytes: u64,
    pub(crate) inode: u64,
    pub(crate) modified: (i64, i64),
}

impl Stamp {
    pub(crate) fn of(metadata: &fs::Metadata) -> Self {
        Self {
            bytes: metadata.len(),
            inode: metadata.ino(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
        }
    }
}

impl Manifest {
    /// # Errors
    /// The file can't be read, or is not the JSON of a manifest.
    pub(crate) fn read(path: &Path) -> io::Result<Self> {
        serde_json::from_slice(&fs::read(path)?).map_err(io::Error::other)
    }

    /// Puts it in place, whole.
    pub(crate) fn write(&self, path: &Path) -> io::Result<()> {
        let half = path.with_extension("tmp");
        fs::write(&half, serde_json::to_vec(self).map_err(io::Error::other)?)?;
        fs::File::open(&half)?.sync_data()?;
        fs::rename(half, path)
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.files.values().map(|entry| entry.object.bytes).sum()
    }
}

/// What is mirrored, in words: where that is another, nothing of a snapshot can be kept.
pub(crate) fn source(spec: &BucketSpec) -> String {
    let endpoint = spec.endpoint.as_deref().unwrap_or("the cloud's own address");
    format!("{}/{} at {endpoint}", spec.bucket, spec.prefix)
}
