//! Generations of the fixture `versioned`, made by writing over its library: as many as a test likes, with no compiler.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use crate::{library, put};

/// One generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Version {
    /// What it answers as `version`.
    pub number: u64,
    /// How it behaves; see the fixture. At most 11 letters.
    pub behaviour: &'static str,
}

const NUMBER: &[u8] = b"modalkit-test-version:";
const BEHAVIOUR: &[u8] = b"modalkit-test-behave:";

impl Version {
    /// One that serves.
    #[must_use]
    pub fn good(number: u64) -> Self {
        Self { number, behaviour: "serves" }
    }

    /// One that misbehaves.
    #[must_use]
    pub fn bad(number: u64, behaviour: &'static str) -> Self {
        Self { number, behaviour }
    }

    /// The library's bytes.
    ///
    /// # Panics
    /// Where the fixture hasn't been built.
    #[must_use]
    pub fn bytes(self) -> Vec<u8> {
        let mut bytes = fs::read(library("versioned")).expect("the fixture is read");
        write_behind(&mut bytes, NUMBER, format!("{:010}", self.number).as_bytes());
        write_behind(&mut bytes, BEHAVIOUR, format!("{:.<11}", self.behaviour).as_bytes());
        bytes
    }

    /// Installs it in one step: written under another name, then renamed. Returns the moment of the rename.
    ///
    /// # Panics
    /// Where it can't.
    pub fn install(self, volume: &Path) -> Instant {
        put(&self.bytes(), &path(volume))
    }

    /// Copies it in place, in pieces with pauses, as a slow network would.
    ///
    /// # Panics
    /// Where it can't.
    pub fn copy_slowly(self, volume: &Path, pauses: &[Duration]) {
        self.write_slowly(File::create(path(volume)), pauses);
    }

    /// Writes it in pieces over what is there, without cutting that off first.
    ///
    /// # Panics
    /// Where it can't.
    pub fn write_slowly_over(self, volume: &Path, pauses: &[Duration]) {
        self.write_slowly(File::options().write(true).open(path(volume)), pauses);
    }

    fn write_slowly(self, file: io::Result<File>, pauses: &[Duration]) {
        let mut file = file.expect("the file is opened");
        file.set_permissions(fs::Permissions::from_mode(0o644)).expect("it is ours");
        let bytes = self.bytes();
        let pauses = pauses.iter().copied().chain(std::iter::once(Duration::ZERO));
        for (piece, pause) in bytes.chunks(bytes.len() / pauses.clone().count() + 1).zip(pauses) {
            file.write_all(piece).expect("a piece is written");
            thread::sleep(pause);
        }
    }
}

/// Where it is installed.
#[must_use]
pub fn path(volume: &Path) -> PathBuf {
    volume.join("versioned.so")
}

fn write_behind(bytes: &mut [u8], marker: &[u8], text: &[u8]) {
    let places: Vec<usize> = bytes
        .windows(marker.len())
        .enumerate()
        .filter(|(_, window)| *window == marker)
        .map(|(at, _)| at)
        .collect();
    assert!(!places.is_empty(), "the fixture holds its marker");
    for at in places {
        let start = at + marker.len();
        bytes[start..start + text.len()].copy_from_slice(text);
    }
}
