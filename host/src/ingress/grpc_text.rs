//! The text of a status of gRPC, which is a header: no longer than clients take.

use hyper::{
    HeaderMap,
    header::{HeaderName, HeaderValue},
};

const MESSAGE: HeaderName = HeaderName::from_static("grpc-message");
/// Bytes of a text that says what is wrong, as it is sent: clients take no more than a few KiB of headers.
const TEXT_BYTES_MAX: usize = 3 << 10;
const CUT: &[u8] = b"...";

/// Cuts a text that no client would read, between two of its characters.
pub(super) fn cut_text(headers: &mut HeaderMap) {
    let Some(text) = headers.get(MESSAGE).filter(|text| text.len() > TEXT_BYTES_MAX) else { return };
    let text = text.as_bytes();
    let (mut place, mut end) = (0, 0);
    while place <= TEXT_BYTES_MAX && place < text.len() {
        // Bytes that aren't ASCII stand there as a percent sign and two digits; of a character, all but the first are from 80 to BF.
        let is_percent = text[place] == b'%';
        let continues =
            is_percent && matches!(text.get(place + 1), Some(b'8' | b'9' | b'A' | b'B' | b'a' | b'b'));
        if !continues {
            end = place;
        }
        place += if is_percent { 3 } else { 1 };
    }
    if let Ok(cut) = HeaderValue::from_bytes(&[&text[..end], CUT].concat()) {
        headers.insert(MESSAGE, cut);
    }
}

#[cfg(test)]
mod tests {
    use tonic::Status;

    use super::*;

    #[test]
    fn a_long_text_is_cut_between_two_characters() {
        for text in ["x".repeat(10_000), "ä".repeat(3000), "🙂".repeat(1000), "short".to_owned()] {
            let mut headers = HeaderMap::new();
            Status::internal(&text).add_header(&mut headers).unwrap();
            headers.insert("grpc-status", HeaderValue::from_static("13"));
            cut_text(&mut headers);
            assert!(headers[MESSAGE].len() <= TEXT_BYTES_MAX + CUT.len());
            let status = Status::from_header_map(&headers).unwrap();
            let kept = status.message().trim_end_matches("...");
            assert!(text.starts_with(kept) && !kept.is_empty(), "{kept}");
        }
    }
}
