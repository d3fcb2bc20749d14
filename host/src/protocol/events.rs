//! Server-sent events: what a stream's caller reads. It never knows when one is sent.

/// The content type of a stream of events.
pub const EVENT_STREAM: &str = "text/event-stream";
/// A line that readers pass over.
pub const HEARTBEAT: &[u8] = b": nothing new\n\n";

/// Appends an event. A text of several lines is one of several lines of data, which readers put together again.
pub fn put_event(text: &mut Vec<u8>, name: &str, json: &[u8]) {
    text.extend_from_slice(b"event: ");
    text.extend_from_slice(name.as_bytes());
    text.push(b'\n');
    put_data(text, json);
}

/// Appends an event without a name.
pub fn put_data(text: &mut Vec<u8>, json: &[u8]) {
    const DATA: &[u8] = b"data: ";
    let lines = |text: &mut Vec<u8>, line: &[u8]| {
        text.extend_from_slice(DATA);
        text.extend_from_slice(line);
        text.push(b'\n');
    };
    if json.contains(&b'\n') || json.contains(&b'\r') {
        for line in json.split(|byte| matches!(byte, b'\n' | b'\r')) {
            lines(text, line);
        }
    } else {
        lines(text, json);
    }
    text.push(b'\n');
}

/// Appends a line that readers pass over. What it says is of one line.
pub fn put_comment(text: &mut Vec<u8>, said: &str) {
    text.extend_from_slice(b": ");
    text.extend_from_slice(said.as_bytes());
    text.extend_from_slice(b"\n\n");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_text_ends_its_event_or_begins_another() {
        for (json, expected) in [
            (r#"{"a":1}"#, "event: chunk\ndata: {\"a\":1}\n\n"),
            ("[1,\r\n2]", "event: chunk\ndata: [1,\ndata: \ndata: 2]\n\n"),
            (
                "1\n\nevent: end\ndata: 2",
                "event: chunk\ndata: 1\ndata: \ndata: event: end\ndata: data: 2\n\n",
            ),
        ] {
            let mut text = Vec::new();
            put_event(&mut text, "chunk", json.as_bytes());
            assert_eq!(String::from_utf8_lossy(&text), expected);
        }
    }
}
