//! Server-sent events as read by a caller that decides itself when it reads.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    time::Duration,
};

use serde_json::Value;

/// What reads at a time: little, so that a caller who stops takes no more than that.
const READ_BYTES: usize = 1 << 10;

/// One event, or a comment, whose name is empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Its name.
    pub name: String,
    /// Its lines of data.
    pub data: String,
}

impl Event {
    /// Its data as JSON.
    ///
    /// # Panics
    /// Where it is none.
    #[must_use]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.data).expect("the data are JSON")
    }
}

/// An answer by `/predict_stream` on a connection of its own. Dropped, it hangs up.
pub struct EventStream {
    reader: BufReader<TcpStream>,
    /// Of the answer.
    pub status: u16,
    /// In small letters, without the status.
    pub headers: String,
    /// Bytes of the body that are read and belong to no event yet.
    unread: Vec<u8>,
    ended: bool,
}

impl EventStream {
    /// Sends a request, and reads nothing.
    ///
    /// # Panics
    /// Where the host doesn't read.
    pub fn send(stream: &mut TcpStream, model: &str, input: &Value, headers: &str) {
        let body = input.to_string();
        let request = format!(
            "POST /predict_stream?model_name={model} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {}\r\n{headers}\r\n{body}",
            body.len()
        );
        stream.write_all(request.as_bytes()).expect("the host reads");
    }

    /// Sends a request and reads the answer's headers.
    ///
    /// # Panics
    /// Where no answer comes.
    #[must_use]
    pub fn open(mut stream: TcpStream, model: &str, input: &Value, headers: &str) -> Self {
        Self::send(&mut stream, model, input, headers);
        Self::answer(stream)
    }

    /// Reads the headers of the answer to a request that was sent.
    ///
    /// # Panics
    /// Where no answer comes.
    #[must_use]
    pub fn answer(stream: TcpStream) -> Self {
        let mut reader = BufReader::with_capacity(READ_BYTES, stream);
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            assert!(reader.read_line(&mut head).expect("the host answers") > 0, "the answer has headers");
        }
        let (line, headers) = head.split_once("\r\n").expect("a line with the status");
        let status = line.split(' ').nth(1).and_then(|word| word.parse().ok()).expect("a status");
        Self { reader, status, headers: headers.to_ascii_lowercase(), unread: Vec::new(), ended: false }
    }

    /// The body of an answer that is no stream.
    ///
    /// # Panics
    /// Where it doesn't come, or is no JSON.
    #[must_use]
    pub fn whole(mut self) -> Value {
        let length = self.headers.lines().find_map(|line| line.strip_prefix("content-length: "));
        let mut body = vec![0; length.and_then(|length| length.parse().ok()).expect("a length")];
        self.reader.read_exact(&mut body).expect("the body comes");
        serde_json::from_slice(&body).expect("the body is JSON")
    }

    /// The next event; `None` behind the last one, or where the connection has ended.
    pub fn next_event(&mut self) -> Option<Event> {
        loop {
            if let Some(end) = self.unread.windows(2).position(|pair| pair == b"\n\n") {
                let text: Vec<u8> = self.unread.drain(..end + 2).collect();
                return Some(parse(&String::from_utf8_lossy(&text)));
            }
            if self.ended || !self.read_frame() {
                self.ended = true;
                return None;
            }
        }
    }

    /// All that are left, without comments.
    #[must_use]
    pub fn rest(mut self) -> Vec<Event> {
        let events = std::iter::from_fn(|| self.next_event());
        events.filter(|event| !event.name.is_empty()).collect()
    }

    /// As [`EventStream::rest`], with a pause before each.
    #[must_use]
    pub fn rest_slowly(mut self, pause: Duration) -> Vec<Event> {
        let mut events = Vec::new();
        while let Some(event) = self.next_event() {
            events.push(event);
            std::thread::sleep(pause);
        }
        events
    }

    /// Reads one piece of a body that is sent in pieces.
    fn read_frame(&mut self) -> bool {
        let mut line = String::new();
        if self.reader.read_line(&mut line).unwrap_or_default() == 0 {
            return false;
        }
        let Ok(length) = usize::from_str_radix(line.trim(), 16) else { return false };
        let mut piece = vec![0; length + 2];
        if length == 0 || self.reader.read_exact(&mut piece).is_err() {
            return false;
        }
        self.unread.extend_from_slice(&piece[..length]);
        true
    }
}

fn parse(text: &str) -> Event {
    let lines = |field: &str| -> Vec<String> {
        text.lines().filter_map(|line| line.strip_prefix(field)).map(ToOwned::to_owned).collect()
    };
    Event { name: lines("event: ").concat(), data: lines("data: ").join("\n") }
}
