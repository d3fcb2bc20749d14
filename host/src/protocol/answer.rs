//! What callers get: any bytes, or a pipeline's output with the member before it that says that it succeeded. It never knows how it is
//! sent.

use std::{io::IoSlice, vec};

use bytes::{Buf, Bytes};

const OPENING: &[u8] = br#"{"status":"success","#;
const EMPTY: &[u8] = br#"{"status":"success"}"#;

/// The bytes of an answer, in pieces, so that large outputs needn't be copied behind what stands before them.
#[derive(Clone, Debug, Default)]
pub struct Answer {
    opening: &'static [u8],
    rest: Bytes,
    /// What follows, where anything does; no piece of it is empty. Boxed, since every response is moved a few times.
    more: Option<Box<vec::IntoIter<Bytes>>>,
}

impl Answer {
    /// The most that stands before an output's own bytes, and its end.
    pub const OPENING_BYTES_MAX: usize = EMPTY.len();

    /// The answer with this output.
    #[must_use]
    pub fn of(mut json: Bytes) -> Self {
        // An output is an object without white space around its braces: what follows the first are members, or the end.
        if *json == *b"{}" {
            return Self { opening: EMPTY, ..Self::default() };
        }
        json.advance(1);
        Self { opening: OPENING, rest: json, more: None }
    }

    /// An answer of these pieces.
    #[must_use]
    pub fn in_pieces(first: Bytes, mut more: Vec<Bytes>) -> Self {
        more.retain(|piece| !piece.is_empty());
        let more = (!more.is_empty()).then(|| Box::new(more.into_iter()));
        Self { opening: b"", rest: first, more }
    }

    /// All pieces in one; copied where there are several.
    #[must_use]
    pub fn into_bytes(self) -> Bytes {
        if self.opening.is_empty() && self.more().is_empty() {
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
        self.more().iter().for_each(|piece| text.extend_from_slice(piece));
    }

    fn more(&self) -> &[Bytes] {
        self.more.as_ref().map_or(&[], |more| more.as_slice())
    }
}

impl Buf for Answer {
    fn remaining(&self) -> usize {
        let more: usize = self.more().iter().map(Bytes::len).sum();
        self.opening.len() + self.rest.len() + more
    }

    fn chunk(&self) -> &[u8] {
        if !self.opening.is_empty() {
            self.opening
        } else if !self.rest.is_empty() {
            &self.rest
        } else {
            self.more().first().map_or(&[], |piece| piece)
        }
    }

    /// All pieces, for a call of the system that writes them at once.
    fn chunks_vectored<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        let more = self.more().iter().map(|piece| &**piece);
        let pieces = [self.opening, &self.rest].into_iter().chain(more).filter(|piece| !piece.is_empty());
        slices.iter_mut().zip(pieces).map(|(slice, piece)| *slice = IoSlice::new(piece)).count()
    }

    fn advance(&mut self, count: usize) {
        let of_opening = count.min(self.opening.len());
        self.opening = &self.opening[of_opening..];
        let mut count = count - of_opening;
        while count > self.rest.len() {
            count -= self.rest.len();
            let next = self.more.as_mut().and_then(|more| more.next());
            self.rest = next.expect("advances no further than to the end");
        }
        self.rest.advance(count);
    }
}

/// What is no pipeline's output, as it stands.
impl From<Bytes> for Answer {
    fn from(whole: Bytes) -> Self {
        Self { rest: whole, ..Self::default() }
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
            let answer = Answer::of(output.into());
            let mut text = b"[".to_vec();
            answer.put_into(&mut text);
            assert_eq!(text, format!("[{expected}").as_bytes());
            assert_eq!(answer.remaining(), expected.len());
        }
    }

    #[test]
    fn it_is_written_from_wherever_the_last_write_ended() {
        let pieces = ["c", "", "de"].map(|piece| Bytes::from_static(piece.as_bytes())).to_vec();
        for answer in [Answer::of(r#"{"a":1}"#.into()), Answer::in_pieces("ab".into(), pieces)] {
            let whole = answer.clone().into_bytes();
            for written in 0..=whole.len() {
                let mut rest = answer.clone();
                rest.advance(written);
                let mut slices = [IoSlice::new(b""); 4];
                let count = rest.chunks_vectored(&mut slices);
                let gathered: Vec<u8> = slices[..count].iter().flat_map(|slice| slice.to_vec()).collect();
                let expected = (&whole[written..], whole.len() - written);
                assert_eq!((gathered.as_slice(), rest.remaining()), expected);
                assert_eq!(rest.chunks_vectored(&mut slices[..1]), count.min(1));
                assert!(whole[written..].starts_with(rest.chunk()));
                assert_eq!(rest.chunk().is_empty(), written == whole.len());
            }
        }
    }
}
