//! What callers get: any bytes, or a pipeline's output with the member before it that says that it succeeded. It never knows how it is
//! sent.

use std::io::IoSlice;

use bytes::{Buf, Bytes};
use modalkit_engine::Payload;

const OPENING: &[u8] = br#"{"status":"success","#;
const EMPTY: &[u8] = br#"{"status":"success"}"#;

/// The bytes of an answer, in two pieces, so that a large output needn't be copied behind what stands before it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answer {
    opening: &'static [u8],
    rest: Bytes,
}

impl Answer {
    /// The most that stands before an output's own bytes, and its end.
    pub const OPENING_BYTES_MAX: usize = EMPTY.len();

    /// The answer with this output.
    #[must_use]
    pub fn of(output: Payload) -> Self {
        let Payload::Json(mut json) = output;
        // An output is an object without white space around its braces: what follows the first are members, or the end.
        if *json == *b"{}" {
            return Self { opening: EMPTY, rest: Bytes::new() };
        }
        json.advance(1);
        Self { opening: OPENING, rest: json }
    }

    /// Both pieces in one; copied where there are two.
    #[must_use]
    pub fn into_bytes(self) -> Bytes {
        if self.opening.is_empty() {
            return self.rest;
        }
        let mut whole = Vec::with_capacity(self.remaining());
        self.put_into(&mut whole);
        whole.into()
    }

    /// Appends it to a text.
    pub fn put_into(&self, text: &mut Vec<u8>) {
        text.extend_from_slice(self.opening);
        text.extend_from_slice(&self.rest);
    }
}

impl Buf for Answer {
    fn remaining(&self) -> usize {
        self.opening.len() + self.rest.len()
    }

    fn chunk(&self) -> &[u8] {
        if self.opening.is_empty() { &self.rest } else { self.opening }
    }

    /// Both pieces, for a call of the system that writes them at once.
    fn chunks_vectored<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        let pieces = [self.opening, &self.rest].into_iter().filter(|piece| !piece.is_empty());
        slices.iter_mut().zip(pieces).map(|(slice, piece)| *slice = IoSlice::new(piece)).count()
    }

    fn advance(&mut self, count: usize) {
        let of_opening = count.min(self.opening.len());
        self.opening = &self.opening[of_opening..];
        self.rest.advance(count - of_opening);
    }
}

/// What is no pipeline's output, as it stands.
impl From<Bytes> for Answer {
    fn from(whole: Bytes) -> Self {
        Self { opening: b"", rest: whole }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_stands_first() {
        for (output, expected) in [
            ("{}", r#"{"status":"success"}"#),
            (r#"{"a":1}"#, r#"{"status":"success","a":1}"#),
            (r#"{"a":{"b":[]},"c":"}"}"#, r#"{"status":"success","a":{"b":[]},"c":"}"}"#),
        ] {
            let answer = Answer::of(Payload::Json(output.into()));
            let mut text = b"[".to_vec();
            answer.put_into(&mut text);
            assert_eq!(text, format!("[{expected}").as_bytes());
            assert_eq!(answer.remaining(), expected.len());
        }
    }

    #[test]
    fn it_is_written_from_wherever_the_last_write_ended() {
        let answer = Answer::of(Payload::Json(r#"{"a":1}"#.into()));
        let whole = answer.clone().into_bytes();
        for written in 0..=whole.len() {
            let mut rest = answer.clone();
            rest.advance(written);
            let mut slices = [IoSlice::new(b""); 3];
            let count = rest.chunks_vectored(&mut slices);
            let gathered: Vec<u8> = slices[..count].iter().flat_map(|slice| slice.to_vec()).collect();
            assert_eq!((gathered.as_slice(), rest.remaining()), (&whole[written..], whole.len() - written));
            assert_eq!(rest.chunks_vectored(&mut slices[..1]), count.min(1));
            assert!(whole[written..].starts_with(rest.chunk()));
        }
    }
}
