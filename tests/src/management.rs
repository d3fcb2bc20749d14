//! Asks a host over its management socket, as its own user does: a small client of HTTP/1.1 for one request a connection.

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::Path,
};

use modalkit::unix_path::ShortPath;

use crate::PATIENCE;

/// Whether a path is answered to those only who manage, or tells them more.
#[must_use]
pub fn is_management(path: &str) -> bool {
    let first = path.trim_start_matches('/').split(['/', '?']).next().unwrap_or_default();
    ["health", "readyz", "metrics", "models", "devices", "config", "volumes", "queues"].contains(&first)
}

/// Sends one request; status and body.
///
/// # Errors
/// Nobody answers, or not with HTTP.
pub fn request(socket: &Path, method: &str, path: &str, body: &str) -> std::io::Result<(u16, String)> {
    let mut stream = UnixStream::connect(ShortPath::of(socket)?)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let length = body.len();
    let whole = format!(
        "{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}"
    );
    stream.write_all(whole.as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let parts = answer.split_once("\r\n\r\n");
    let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok());
    parts
        .zip(status)
        .map(|((_, body), status)| (status, body.to_owned()))
        .ok_or_else(|| std::io::Error::other(format!("expected an answer in HTTP, found {answer:?}")))
}
