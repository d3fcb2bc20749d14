//! A connection between a host and a worker: a stream socket and, for large payloads, a shared arena that lasts as long. It owns how a frame
//! gets across, and never knows what it says.

use std::{
    fs::File,
    io::{self, IoSlice, Read, Write},
    net::Shutdown,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    time::Duration,
};

use bytes::Bytes;
use rustix::{
    buffer::spare_capacity,
    fs::{MemfdFlags, SealFlags},
    io::{pread, pwritev},
};

use crate::frame::{ALIGNMENT, Garbage, HEADER_BYTES, Header, Kind, ROW_BYTES, Row, aligned};

/// Payloads of a frame that are more bytes in all go through the arena.
pub(crate) const INLINE_BYTES_MAX: u64 = 64 << 10;
/// Bytes of each half of the arena; what doesn't fit goes through the socket. Only what was written to takes memory.
const HALF_BYTES: u64 = 64 << 20;
/// Of the arena, what one system call takes.
const SLICES_MAX: usize = 512;
/// A buffer for reading keeps so many bytes between frames.
const BUFFER_BYTES: usize = 64 << 10;

/// Why nothing comes or goes any more.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Broken {
    /// The other end is gone.
    #[error("the connection ended")]
    Ended,
    /// The other end is gone, and has not read what was sent last.
    #[error("the connection was reset")]
    Reset,
    /// It took too long.
    #[error("the time for it has passed")]
    TimedOut,
    /// What came is none of what can come.
    #[error("{0}")]
    Garbage(#[from] Garbage),
    /// The system said so.
    #[error("{0}")]
    Io(io::Error),
}

impl From<io::Error> for Broken {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::ConnectionReset => Self::Reset,
            io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe | io::ErrorKind::NotConnected => {
                Self::Ended
            }
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Self::TimedOut,
            _ => Self::Io(error),
        }
    }
}

/// Which half of the arena an end writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Host,
    Worker,
}

impl End {
    fn writes_at(self) -> u64 {
        match self {
            Self::Host => 0,
            Self::Worker => HALF_BYTES,
        }
    }

    fn reads_at(self) -> u64 {
        HALF_BYTES - self.writes_at()
    }
}

/// Shared memory of a fixed size, which neither end can take away from the other.
pub(crate) fn arena() -> io::Result<File> {
    let memory = rustix::fs::memfd_create("modalkit", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    rustix::fs::ftruncate(&memory, 2 * HALF_BYTES)?;
    rustix::fs::fcntl_add_seals(&memory, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(memory.into())
}

/// A frame that is to be sent; its payloads stay where they are until then.
pub(crate) struct Outgoing<'a> {
    kind: Kind,
    batch: u64,
    rows: Vec<Row>,
    /// Of each row, how many of these make up its payload.
    pieces_of: Vec<usize>,
    pieces: Vec<&'a [u8]>,
}

static ZEROES: [u8; ALIGNMENT] = [0; ALIGNMENT];

impl<'a> Outgoing<'a> {
    pub(crate) fn new(kind: Kind, batch: u64, items: usize) -> Self {
        Self {
            kind,
            batch,
            rows: Vec::with_capacity(items),
            pieces_of: Vec::with_capacity(items),
            pieces: Vec::with_capacity(items),
        }
    }

    /// One item of text.
    pub(crate) fn of(kind: Kind, status: u16, payload: &'a [u8]) -> Self {
        let mut frame = Self::new(kind, 0, 1);
        frame.push(status, payload);
        frame
    }

    pub(crate) fn push(&mut self, status: u16, payload: &'a [u8]) {
        self.rows.push(Row { bytes: payload.len() as u32, status, tensors: 0 });
        self.pieces_of.push(1);
        self.pieces.push(payload);
    }

    /// An item of several pieces, each of which begins at a multiple of [`ALIGNMENT`].
    pub(crate) fn push_pieces(
        &mut self,
        status: u16,
        tensors: usize,
        pieces: impl Iterator<Item = &'a [u8]>,
    ) {
        let (before, mut bytes) = (self.pieces.len(), 0);
        for piece in pieces {
            let padding = (aligned(bytes) - bytes) as usize;
            if padding > 0 {
                self.pieces.push(&ZEROES[..padding]);
            }
            self.pieces.push(piece);
            bytes = aligned(bytes) + piece.len() as u64;
        }
        self.rows.push(Row { bytes: bytes as u32, status, tensors: tensors as u16 });
        self.pieces_of.push(self.pieces.len() - before);
    }

    fn payload_bytes(&self) -> u64 {
        self.rows.iter().map(|row| u64::from(row.bytes)).sum()
    }

    fn arena_bytes(&self) -> u64 {
        self.rows.iter().map(|row| aligned(row.bytes.into())).sum()
    }
}

/// A frame that came.
#[derive(Debug)]
pub(crate) struct Incoming {
    pub(crate) kind: Kind,
    pub(crate) batch: u64,
    pub(crate) items: Vec<Item>,
}

/// One of its items. Items of a frame share their bytes' allocation.
#[derive(Debug)]
pub(crate) struct Item {
    pub(crate) status: u16,
    pub(crate) tensors: usize,
    pub(crate) payload: Bytes,
}

impl Incoming {
    /// The only item of a frame of this kind.
    pub(crate) fn single(mut self, expected: &'static str) -> Result<Item, Garbage> {
        match (self.items.pop(), self.items.len()) {
            (Some(item), 0) => Ok(item),
            _ => Err(Garbage::Kinds { expected, found: self.kind }),
        }
    }
}

/// One end of a connection.
pub(crate) struct Channel {
    socket: UnixStream,
    arena: Option<File>,
    end: End,
    /// What was read beyond the last frame.
    read: Vec<u8>,
    written: Vec<u8>,
}

impl Channel {
    pub(crate) fn new(socket: UnixStream, arena: Option<File>, end: End) -> Self {
        Self { socket, arena, end, read: Vec::new(), written: Vec::new() }
    }

    /// Of how long each further read may take; `None` for ever.
    pub(crate) fn limit(&self, time: Option<Duration>) -> io::Result<()> {
        // No time at all would be no limit.
        self.socket.set_read_timeout(time.map(|time| time.max(Duration::from_millis(1))))
    }

    /// A handle that breaks the connection from another thread.
    pub(crate) fn breaker(&self) -> io::Result<Breaker> {
        self.socket.try_clone().map(Breaker)
    }

    /// The socket, and the shared memory beside it.
    pub(crate) fn descriptors(&self) -> (BorrowedFd<'_>, Option<BorrowedFd<'_>>) {
        (self.socket.as_fd(), self.arena.as_ref().map(AsFd::as_fd))
    }

    /// Ends the connection, whoever else has handles of it.
    pub(crate) fn break_off(self) {
        // One that is broken already is as good.
        let _ = self.socket.shutdown(Shutdown::Both);
    }

    pub(crate) fn send(&mut self, frame: &Outgoing<'_>) -> Result<(), Broken> {
        let (payload_bytes, arena_bytes) = (frame.payload_bytes(), frame.arena_bytes());
        let arena =
            self.arena.as_ref().filter(|_| payload_bytes > INLINE_BYTES_MAX && arena_bytes <= HALF_BYTES);
        let table_bytes = (frame.rows.len() * ROW_BYTES) as u64;
        let (body_bytes, place) = match arena {
            Some(arena) => {
                write_arena(arena, self.end.writes_at(), frame)?;
                (table_bytes, 1)
            }
            None => (table_bytes + payload_bytes, 0),
        };
        if body_bytes > crate::frame::BODY_BYTES_MAX as u64 {
            return Err(Garbage::Bytes(body_bytes as usize).into());
        }
        let header = Header {
            body_bytes: body_bytes as usize,
            kind: frame.kind,
            items: frame.rows.len(),
            batch: frame.batch,
            place,
        };
        self.written.clear();
        self.written.extend_from_slice(&header.write());
        frame.rows.iter().for_each(|row| self.written.extend_from_slice(&row.write()));
        let follow: &[&[u8]] = if place == 0 { &frame.pieces } else { &[] };
        if payload_bytes <= INLINE_BYTES_MAX {
            follow.iter().for_each(|piece| self.written.extend_from_slice(piece));
            self.socket.write_all(&self.written)?;
        } else {
            self.socket.write_all(&self.written)?;
            for piece in follow {
                self.socket.write_all(piece)?;
            }
        }
        Ok(())
    }

    pub(crate) fn receive(&mut self) -> Result<Incoming, Broken> {
        self.read_up_to(HEADER_BYTES)?;
        let header: [u8; HEADER_BYTES] = self.read[..HEADER_BYTES].try_into().expect("as many were read");
        let header = Header::read(&header)?;
        let table_bytes = header.items * ROW_BYTES;
        self.read_up_to(HEADER_BYTES + table_bytes)?;
        let table = &self.read[HEADER_BYTES..HEADER_BYTES + table_bytes];
        let rows: Vec<Row> = table
            .chunks_exact(ROW_BYTES)
            .map(|row| Row::read(row.try_into().expect("a chunk has as many bytes")))
            .collect();
        let of_payloads = (header.body_bytes - table_bytes) as u64;
        let said: u64 = rows.iter().map(|row| u64::from(row.bytes)).sum();
        let expected = if header.place == 0 { said } else { 0 };
        if of_payloads != expected {
            return Err(Garbage::Table { said: expected, found: of_payloads }.into());
        }
        let (payloads, step): (Bytes, fn(u64) -> u64) = match header.place {
            0 => (self.take(HEADER_BYTES + table_bytes, of_payloads as usize)?, |bytes| bytes),
            place => {
                self.read.drain(..HEADER_BYTES + table_bytes);
                let bytes = rows.iter().map(|row| aligned(row.bytes.into())).sum();
                (self.read_arena(place - 1, bytes)?, aligned)
            }
        };
        let mut start = 0;
        let items = rows
            .into_iter()
            .map(|row| {
                let payload = payloads.slice(start..start + row.bytes as usize);
                start += step(row.bytes.into()) as usize;
                Item { status: row.status, tensors: row.tensors.into(), payload }
            })
            .collect();
        Ok(Incoming { kind: header.kind, batch: header.batch, items })
    }

    /// Reads until at least so many bytes are there.
    fn read_up_to(&mut self, bytes: usize) -> Result<(), Broken> {
        while self.read.len() < bytes {
            self.read.reserve(BUFFER_BYTES);
            // At the end of the stream, none.
            if rustix::io::retry_on_intr(|| rustix::io::read(&self.socket, spare_capacity(&mut self.read)))
                .map_err(io::Error::from)?
                == 0
            {
                return Err(Broken::Ended);
            }
        }
        Ok(())
    }

    /// Takes so many bytes off the stream, behind others that are dropped.
    fn take(&mut self, dropped: usize, bytes: usize) -> Result<Bytes, Broken> {
        if bytes as u64 <= INLINE_BYTES_MAX {
            self.read_up_to(dropped + bytes)?;
            let taken = Bytes::copy_from_slice(&self.read[dropped..dropped + bytes]);
            self.read.drain(..dropped + bytes);
            return Ok(taken);
        }
        let here = (self.read.len() - dropped).min(bytes);
        // Of what is said to come, memory is taken as it comes.
        let mut taken = Vec::with_capacity(bytes.min(BUFFER_BYTES.max(here)));
        taken.extend_from_slice(&self.read[dropped..dropped + here]);
        self.read.drain(..dropped + here);
        let rest = (bytes - here) as u64;
        if (&self.socket).take(rest).read_to_end(&mut taken)? as u64 != rest {
            return Err(Broken::Ended);
        }
        Ok(taken.into())
    }

    fn read_arena(&self, place: u64, bytes: u64) -> Result<Bytes, Broken> {
        let within = place.checked_add(bytes).is_some_and(|end| end <= HALF_BYTES);
        let Some(arena) = self.arena.as_ref().filter(|_| within) else { return Err(Garbage::Place.into()) };
        let mut copy = Vec::with_capacity(bytes as usize);
        while (copy.len() as u64) < bytes {
            let at = self.end.reads_at() + place + copy.len() as u64;
            // The spare capacity may be larger than what was asked for; what is beyond is never looked at.
            if pread(arena, spare_capacity(&mut copy), at).map_err(io::Error::from)? == 0 {
                return Err(Garbage::Place.into());
            }
        }
        copy.truncate(bytes as usize);
        Ok(copy.into())
    }
}

fn write_arena(arena: &File, at: u64, frame: &Outgoing<'_>) -> io::Result<()> {
    let mut pieces = frame.pieces.iter();
    let mut all: Vec<&[u8]> = Vec::with_capacity(2 * frame.pieces.len());
    for (row, count) in frame.rows.iter().zip(&frame.pieces_of) {
        all.extend(pieces.by_ref().take(*count));
        all.push(&ZEROES[..(aligned(row.bytes.into()) - u64::from(row.bytes)) as usize]);
    }
    let mut at = at;
    for some in all.chunks(SLICES_MAX) {
        let mut slices: Vec<IoSlice<'_>> = some.iter().map(|piece| IoSlice::new(piece)).collect();
        let mut slices = &mut slices[..];
        // Without slices of nothing at the front, what is written moves on each time.
        IoSlice::advance_slices(&mut slices, 0);
        while !slices.is_empty() {
            let written = pwritev(arena.as_fd(), slices, at)?;
            at += written as u64;
            IoSlice::advance_slices(&mut slices, written);
        }
    }
    Ok(())
}

/// Breaks a connection.
pub(crate) struct Breaker(UnixStream);

impl Breaker {
    pub(crate) fn of(socket: &UnixStream) -> io::Result<Self> {
        socket.try_clone().map(Self)
    }

    pub(crate) fn break_off(&self) {
        // One that is broken already is as good.
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

/// Sends a frame without items, with descriptors.
pub(crate) fn send_descriptors(socket: &UnixStream, kind: Kind, descriptors: &[OwnedFd]) -> io::Result<()> {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
    let header = Header { body_bytes: 0, kind, items: 0, batch: 0, place: 0 }.write();
    let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !ancillary.push(SendAncillaryMessage::ScmRights(&borrowed)) {
        return Err(io::Error::other("more descriptors than one frame takes"));
    }
    let sent = rustix::net::sendmsg(socket, &[IoSlice::new(&header)], &mut ancillary, SendFlags::NOSIGNAL)?;
    if sent == header.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

/// Descriptors that come with one frame.
const DESCRIPTORS_MAX: usize = 4;

/// Receives what [`send_descriptors`] sent; nothing may have been read ahead of it.
pub(crate) fn receive_descriptors(socket: &UnixStream, kind: Kind) -> Result<Vec<OwnedFd>, Broken> {
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
    let mut header = [0; HEADER_BYTES];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::net::recvmsg(
        socket,
        &mut [io::IoSliceMut::new(&mut header)],
        &mut ancillary,
        RecvFlags::CMSG_CLOEXEC | RecvFlags::WAITALL,
    )
    .map_err(io::Error::from)?;
    if received.bytes != HEADER_BYTES {
        return Err(Broken::Ended);
    }
    let header = Header::read(&header)?;
    if header.kind != kind {
        return Err(Garbage::Kinds { expected: "a connection", found: header.kind }.into());
    }
    let mut descriptors = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    Ok(descriptors)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (Channel, Channel) {
        let (host, worker) = UnixStream::pair().unwrap();
        let memory = arena().unwrap();
        let other = memory.try_clone().unwrap();
        (Channel::new(host, Some(memory), End::Host), Channel::new(worker, Some(other), End::Worker))
    }

    /// What the other end receives of these items.
    fn across(items: &[(u16, Vec<u8>)]) -> Vec<(u16, Vec<u8>)> {
        let (mut host, mut worker) = pair();
        let mut frame = Outgoing::new(Kind::Batch, 7, items.len());
        items.iter().for_each(|(status, payload)| frame.push(*status, payload));
        std::thread::scope(|scope| {
            let sent = scope.spawn(|| host.send(&frame));
            let received = worker.receive().unwrap();
            sent.join().unwrap().unwrap();
            assert_eq!((received.kind, received.batch), (Kind::Batch, 7));
            received.items.into_iter().map(|item| (item.status, item.payload.to_vec())).collect()
        })
    }

    #[test]
    fn items_of_every_size_cross_by_the_socket_and_by_the_arena() {
        let of = |sizes: &[usize]| -> Vec<(u16, Vec<u8>)> {
            let item = |(place, size): (usize, &usize)| (place as u16, vec![place as u8; *size]);
            sizes.iter().enumerate().map(item).collect()
        };
        let large = HALF_BYTES as usize + 1;
        for sizes in
            [&[][..], &[0], &[3, 0, 5], &[65_536], &[65_537], &[40_000, 0, 1, 70_001], &[large], &[1; 2000]]
        {
            let items = of(sizes);
            assert_eq!(across(&items), items, "{sizes:?}");
        }
    }

    #[test]
    fn pieces_are_aligned_within_their_item() {
        let (mut host, mut worker) = pair();
        let (one, other) = (vec![1; 5], vec![2; 70_000]);
        let mut frame = Outgoing::new(Kind::Batch, 0, 1);
        frame.push_pieces(3, 2, [&one[..], &other].into_iter());
        host.send(&frame).unwrap();
        let item = worker.receive().unwrap().single("one").unwrap();
        assert_eq!((item.status, item.tensors, item.payload.len()), (3, 2, 70_064));
        assert!(item.payload[..5] == one && item.payload[5..64] == [0; 59] && item.payload[64..] == other);
    }

    #[test]
    fn garbage_and_an_end_are_told_apart() {
        let says = |bytes: &[u8]| {
            let (mut host, mut worker) = pair();
            host.socket.write_all(bytes).unwrap();
            drop(host);
            worker.receive().unwrap_err()
        };
        assert!(matches!(says(b""), Broken::Ended));
        assert!(matches!(says(&[1; 10]), Broken::Ended));
        assert!(matches!(says(&[0xee; 100]), Broken::Garbage(Garbage::Kind(0xee))));
        let header = |body_bytes, items, place| {
            Header { body_bytes, kind: Kind::Batch, items, batch: 0, place }.write().to_vec()
        };
        let row = Row { bytes: 9, status: 0, tensors: 0 }.write();
        // The table says more than there is; a place beyond the arena; payloads where there should be none.
        assert!(matches!(
            says(&[header(8, 1, 0), row.to_vec()].concat()),
            Broken::Garbage(Garbage::Table { .. })
        ));
        for place in [HALF_BYTES, u64::MAX] {
            let said = says(&[header(8, 1, place), row.to_vec()].concat());
            assert!(matches!(said, Broken::Garbage(Garbage::Place)), "{said:?}");
        }
        let said = says(&[header(17, 1, 1), row.to_vec(), vec![0; 9]].concat());
        assert!(matches!(said, Broken::Garbage(Garbage::Table { .. })));
        // More than is ever sent: nothing of it is waited for, nor made room for.
        assert!(matches!(
            says(&[header(1 << 30, 1, 0), row.to_vec()].concat()),
            Broken::Garbage(Garbage::Table { .. })
        ));
    }

    #[test]
    fn descriptors_cross() {
        let (host, worker) = UnixStream::pair().unwrap();
        send_descriptors(&host, Kind::Lane, &[arena().unwrap().into()]).unwrap();
        assert_eq!(receive_descriptors(&worker, Kind::Lane).unwrap().len(), 1);
        drop(host);
        assert!(matches!(receive_descriptors(&worker, Kind::Lane), Err(Broken::Ended)));
    }
}
