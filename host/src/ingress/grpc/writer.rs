//! Writes the messages of inference calls: elements go out from where the plugin left them, behind what describes them.

use std::{io::Write, sync::Arc};

use bytes::Bytes;
use modalkit_proto::ModelInferResponse;
use prost::{Message, encoding::encode_varint};

use crate::{
    ingress::{
        Context,
        content_coding::{Coding, encode},
    },
    protocol::Answer,
};

/// The flag of a message, and its length in 32 bits.
const HEADER_BYTES: usize = 5;
/// Elements up to this many bytes are copied behind what describes them: each piece would cost a frame of its own.
const COPIED_BYTES_MAX: usize = 4 << 10;
/// Before each `raw_output_contents`: field 6, with its length.
const RAW_KEY: u8 = 6 << 3 | 2;
/// Messages from this on are compressed where their call is.
const COMPRESSED_BYTES_MIN: usize = 1 << 10;

/// An answer to `ModelInfer`.
pub(super) fn response(mut response: ModelInferResponse) -> Answer {
    let raw = std::mem::take(&mut response.raw_output_contents);
    let mut pieces = Pieces { done: Vec::new(), open: vec![0; HEADER_BYTES] };
    // What a vector takes always goes in.
    response.encode(&mut pieces.open).expect("a vector grows");
    for elements in raw {
        pieces.open.push(RAW_KEY);
        encode_varint(elements.len() as u64, &mut pieces.open);
        pieces.put(elements);
    }
    pieces.framed()
}

/// Any other message.
pub(super) fn message(message: &impl Message) -> Answer {
    let mut open = vec![0; HEADER_BYTES];
    message.encode(&mut open).expect("a vector grows");
    Pieces { done: Vec::new(), open }.framed()
}

/// A message in pieces: the first begins with room for the header.
struct Pieces {
    done: Vec<Bytes>,
    open: Vec<u8>,
}

impl Pieces {
    fn put(&mut self, bytes: Bytes) {
        if bytes.len() <= COPIED_BYTES_MAX {
            self.open.extend_from_slice(&bytes);
        } else {
            self.done.push(std::mem::take(&mut self.open).into());
            self.done.push(bytes);
        }
    }

    fn framed(self) -> Answer {
        let Self { mut done, open } = self;
        let length = done.iter().map(Bytes::len).sum::<usize>() + open.len() - HEADER_BYTES;
        let mut first = if done.is_empty() {
            open
        } else {
            let first = done.remove(0).into();
            done.push(open.into());
            first
        };
        put_header(&mut first, 0, length);
        Answer::in_pieces(first.into(), done)
    }
}

fn put_header(first: &mut [u8], flag: u8, length: usize) {
    first[0] = flag;
    // A message of 4 GiB is none that anybody could read.
    first[1..HEADER_BYTES].copy_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes());
}

/// The same message compressed, where its call is and it pays; not where all cores compress already.
pub(super) async fn compressed(context: &Context, coding: Option<Coding>, answer: Answer) -> Answer {
    use bytes::Buf;
    let Some(coding) = coding.filter(|_| answer.remaining() >= COMPRESSED_BYTES_MIN) else { return answer };
    let Ok(thread) = Arc::clone(&context.coding).try_acquire_owned() else { return answer };
    let plain = answer.clone();
    let work = move || {
        let _thread = thread;
        let bytes = answer.into_bytes();
        let encoded = encode(&bytes[HEADER_BYTES..], coding)?;
        let mut framed = Vec::with_capacity(HEADER_BYTES + encoded.len());
        framed.write_all(&[0; HEADER_BYTES])?;
        put_header(&mut framed, 1, encoded.len());
        framed.write_all(&encoded)?;
        Ok::<_, std::io::Error>(framed)
    };
    match context.blocking.spawn_blocking(work).await {
        Ok(Ok(framed)) if framed.len() < plain.remaining() => Bytes::from(framed).into(),
        _ => plain,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_in_pieces_is_the_message() {
        for sizes in [&[][..], &[0], &[10], &[5000], &[10, 5000, 3, 100_000], &[5000, 5000], &[1 << 20, 7]] {
            let expected = ModelInferResponse {
                model_name: "m".into(),
                id: "7".into(),
                raw_output_contents: sizes.iter().map(|size| vec![*size as u8; *size].into()).collect(),
                ..ModelInferResponse::default()
            };
            let bytes = response(expected.clone()).into_bytes();
            let (header, message) = bytes.split_at(HEADER_BYTES);
            assert_eq!(header[0], 0);
            assert_eq!(u32::from_be_bytes(header[1..].try_into().unwrap()) as usize, message.len());
            assert_eq!(ModelInferResponse::decode(message).unwrap(), expected, "{sizes:?}");
        }
    }
}
