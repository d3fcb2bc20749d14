//! Frames: what a host and its workers say to each other, as bytes. It owns the layout and its bounds, and never knows sockets, nor what a
//! payload says.
//!
//! A frame is a header, a table with one row for each item, and the items' payloads; all numbers are little-endian.
//!
//! ```text
//! header  u32 bytes after the header, u8 kind, u8 0, u16 items, u64 batch, u64 place
//! table   items x { u32 bytes, u16 status, u16 tensors }
//! ```
//!
//! Where the place is 0 the payloads follow the table, one after the other. Else they lie in the sender's half of the shared arena, from
//! place - 1 on, each at a multiple of [`ALIGNMENT`]. How long anything is stands on the socket alone.

/// What both ends must agree on before anything else: raised with each change that an older end would misread.
pub(crate) const PROTOCOL: u32 = 1;
pub(crate) const HEADER_BYTES: usize = 24;
pub(crate) const ROW_BYTES: usize = 8;
/// Where payloads begin in the arena, and the bytes of tensors within a payload.
pub(crate) const ALIGNMENT: usize = 64;
/// Bytes of one frame on the socket, its header not counted.
pub(crate) const BODY_BYTES_MAX: usize = 1 << 30;

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident = $number:literal;)+) => {
        /// What a frame is for.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum Kind { $($(#[$doc])* $name = $number,)+ }

        impl Kind {
            fn of(number: u8) -> Option<Self> {
                match number { $($number => Some(Self::$name),)+ _ => None }
            }
        }
    };
}

kinds! {
    /// To a worker, first: what it is to do and with what, a document.
    Hello = 1;
    /// From it: it has done that, or serves; a document.
    Ready = 2;
    /// From it: it could not; the item is a failure.
    Failed = 3;
    /// To it: one more connection for batches, whose descriptors come along.
    Lane = 4;
    /// To it: inputs to be run.
    Batch = 5;
    /// From it: how long the stages took, then an end for each input, in order.
    Done = 6;
    /// From it: a part of an item's output; it waits for the result.
    Chunk = 7;
    ChunkResult = 8;
    /// From it: what is wanted of an item now? It waits for the answer.
    AskInterest = 9;
    Interest = 10;
    /// To it: inputs to be parsed and validated, and not run.
    Check = 11;
    Checked = 12;
    /// To it: data has changed, a document.
    Reload = 13;
    /// From it: the hook has ended; a failure, where it has failed, then the signature.
    Reloaded = 14;
    /// To it: what it runs is its last.
    Leave = 15;
    /// To it: a queue's name and messages for it, which its own code is to send.
    Send = 16;
    /// From it: a failure for each message, or nothing where it was sent.
    Sent = 17;
}

/// Why a frame is none.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum Garbage {
    #[error("a frame of the unknown kind {0}")]
    Kind(u8),
    #[error("a frame of {0} bytes, where at most {BODY_BYTES_MAX} are taken")]
    Bytes(usize),
    #[error("a frame whose table says {said} bytes and which has {found}")]
    Table { said: u64, found: u64 },
    #[error("a frame whose payloads lie outside of the shared arena")]
    Place,
    #[error("{found:?} where {expected} was expected")]
    Kinds { expected: &'static str, found: Kind },
    #[error("an item that {0}")]
    Item(&'static str),
    #[error("a document that can't be read: {0}")]
    Document(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    /// Bytes on the socket after this.
    pub(crate) body_bytes: usize,
    pub(crate) kind: Kind,
    pub(crate) items: usize,
    pub(crate) batch: u64,
    /// 0, or 1 more than where the payloads begin in the arena.
    pub(crate) place: u64,
}

impl Header {
    pub(crate) fn write(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..4].copy_from_slice(&(self.body_bytes as u32).to_le_bytes());
        bytes[4] = self.kind as u8;
        bytes[6..8].copy_from_slice(&(self.items as u16).to_le_bytes());
        bytes[8..16].copy_from_slice(&self.batch.to_le_bytes());
        bytes[16..].copy_from_slice(&self.place.to_le_bytes());
        bytes
    }

    pub(crate) fn read(bytes: &[u8; HEADER_BYTES]) -> Result<Self, Garbage> {
        let [b0, b1, b2, b3, kind, _, i0, i1, rest @ ..] = *bytes;
        let (batch, place) = rest.split_at(8);
        let number =
            |bytes: &[u8]| bytes.iter().rev().fold(0_u64, |number, byte| number << 8 | u64::from(*byte));
        let header = Self {
            body_bytes: u32::from_le_bytes([b0, b1, b2, b3]) as usize,
            kind: Kind::of(kind).ok_or(Garbage::Kind(kind))?,
            items: usize::from(u16::from_le_bytes([i0, i1])),
            batch: number(batch),
            place: number(place),
        };
        if header.body_bytes > BODY_BYTES_MAX {
            return Err(Garbage::Bytes(header.body_bytes));
        }
        if header.body_bytes < header.items * ROW_BYTES {
            return Err(Garbage::Table {
                said: (header.items * ROW_BYTES) as u64,
                found: header.body_bytes as u64,
            });
        }
        Ok(header)
    }
}

/// A row of a frame's table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Row {
    pub(crate) bytes: u32,
    /// What the item is; see `items`.
    pub(crate) status: u16,
    /// Tensors of its payload; 0 where that is text.
    pub(crate) tensors: u16,
}

impl Row {
    pub(crate) fn write(&self) -> [u8; ROW_BYTES] {
        let (b, s, t) = (self.bytes.to_le_bytes(), self.status.to_le_bytes(), self.tensors.to_le_bytes());
        [b[0], b[1], b[2], b[3], s[0], s[1], t[0], t[1]]
    }

    pub(crate) fn read(bytes: &[u8; ROW_BYTES]) -> Self {
        let [b0, b1, b2, b3, s0, s1, t0, t1] = *bytes;
        Self {
            bytes: u32::from_le_bytes([b0, b1, b2, b3]),
            status: u16::from_le_bytes([s0, s1]),
            tensors: u16::from_le_bytes([t0, t1]),
        }
    }
}

/// Up to the next place in the arena.
pub(crate) fn aligned(bytes: u64) -> u64 {
    bytes.next_multiple_of(ALIGNMENT as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_and_rows_are_read_as_they_were_written() {
        let header = Header { body_bytes: 70_000, kind: Kind::Done, items: 513, batch: 1 << 40, place: 65 };
        assert_eq!(Header::read(&header.write()), Ok(header));
        let row = Row { bytes: 0x0102_0304, status: 0x0506, tensors: 7 };
        assert_eq!(Row::read(&row.write()), row);
        assert_eq!((aligned(0), aligned(1), aligned(64), aligned(65)), (0, 64, 64, 128));
    }

    #[test]
    fn what_is_no_header_is_told_apart() {
        let header = Header { body_bytes: 8, kind: Kind::Batch, items: 1, batch: 0, place: 0 };
        let with = |change: &dyn Fn(&mut [u8; HEADER_BYTES])| {
            let mut bytes = header.write();
            change(&mut bytes);
            Header::read(&bytes)
        };
        assert_eq!(with(&|bytes| bytes[4] = 99), Err(Garbage::Kind(99)));
        assert_eq!(with(&|bytes| bytes[..4].fill(0xff)), Err(Garbage::Bytes(u32::MAX as usize)));
        assert_eq!(with(&|bytes| bytes[0] = 7), Err(Garbage::Table { said: 8, found: 7 }));
    }
}
