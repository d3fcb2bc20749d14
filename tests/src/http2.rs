//! HTTP/2 as spoken by a caller that decides itself when it reads: a connection, requests, and frames at its own pace.

use std::{
    io::{Read, Write},
    net::TcpStream,
    thread,
    time::Duration,
};

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const WINDOW_UPDATE: u8 = 8;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
const ACKNOWLEDGES: u8 = 1;
/// An error code: nobody wants the stream any more.
const CANCEL: u32 = 8;
/// The largest frame that each side may send without being told.
const FRAME_BYTES_MAX: usize = 16 << 10;

/// Which host is asked.
const HOST: &[u8] = b"localhost";

/// A connection.
pub struct Connection {
    stream: TcpStream,
    next: u32,
}

impl Connection {
    /// Says that it speaks HTTP/2.
    ///
    /// # Panics
    /// Where the host doesn't read.
    #[must_use]
    pub fn open(mut stream: TcpStream) -> Self {
        stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").expect("the host reads");
        let mut connection = Self { stream, next: 1 };
        connection.send(SETTINGS, 0, 0, &[]);
        connection
    }

    /// Asks, and reads nothing; returns the stream's number. Its answer takes the first 64 KiB without being asked for more.
    ///
    /// # Panics
    /// Where the body takes more than one frame.
    pub fn post(&mut self, path: &str, body: &str) -> u32 {
        assert!(path.len() < 127 && body.len() <= FRAME_BYTES_MAX, "one frame holds it");
        // HPACK's static table: POST, http; the authority and the path as they are.
        let mut head = vec![0x83, 0x86, 0x01, HOST.len() as u8];
        head.extend_from_slice(HOST);
        head.extend_from_slice(&[0x04, path.len() as u8]);
        head.extend_from_slice(path.as_bytes());
        let stream = self.next;
        self.next += 2;
        self.send(HEADERS, END_HEADERS, stream, &head);
        self.send(DATA, END_STREAM, stream, body.as_bytes());
        stream
    }

    /// Says that nobody wants a stream's answer any more.
    pub fn cancel(&mut self, stream: u32) {
        self.send(RST_STREAM, 0, stream, &CANCEL.to_be_bytes());
    }

    /// Reads one answer's body with this pause between frames; returns how long it was when it or the connection ended.
    pub fn read_body(&mut self, pause: Duration) -> usize {
        let mut read = 0;
        while let Some((_, data, ended)) = self.next_data() {
            read += data.len();
            if ended {
                break;
            }
            thread::sleep(pause);
        }
        read
    }

    /// The next piece of any answer's body: its stream, its bytes, and whether it is the last; `None` where the connection has ended.
    pub fn next_data(&mut self) -> Option<(u32, Vec<u8>, bool)> {
        loop {
            let (kind, flags, stream, payload) = self.frame()?;
            match kind {
                DATA => {
                    let ended = flags & END_STREAM != 0;
                    if !payload.is_empty() && !ended {
                        let more = (payload.len() as u32).to_be_bytes();
                        self.send(WINDOW_UPDATE, 0, 0, &more);
                        self.send(WINDOW_UPDATE, 0, stream, &more);
                    }
                    return Some((stream, payload, ended));
                }
                SETTINGS | PING if flags & ACKNOWLEDGES == 0 => {
                    self.send(kind, ACKNOWLEDGES, 0, if kind == PING { &payload } else { &[] });
                }
                _ => {}
            }
        }
    }

    fn frame(&mut self) -> Option<(u8, u8, u32, Vec<u8>)> {
        let mut head = [0; 9];
        self.stream.read_exact(&mut head).ok()?;
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
        let mut payload = vec![0; length];
        self.stream.read_exact(&mut payload).ok()?;
        Some((head[3], head[4], stream, payload))
    }

    fn send(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
        let length = (payload.len() as u32).to_be_bytes();
        let mut frame = vec![length[1], length[2], length[3], kind, flags];
        frame.extend_from_slice(&stream.to_be_bytes());
        frame.extend_from_slice(payload);
        // The host may have hung up.
        let _ = self.stream.write_all(&frame);
    }
}
