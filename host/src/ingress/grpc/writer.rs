//! Writes the messages of inference calls: elements go out from where the plugin left them, behind what describes them.

use std::{io::Write, sync::Arc};

use bytes::Bytes;
use modalkit_engine::Tensor;
use prost::{
    Message,
    encoding::{encode_varint, encoded_len_varint},
};

use crate::{
    ingress::{
        Context,
        content_coding::{Coding, encode},
    },
    protocol::{Answer, v2::InferOutputs},
};

/// The flag of a message, and its length in 32 bits.
const HEADER_BYTES: usize = 5;
/// Elements up to this many bytes are copied behind what describes them: each piece would cost a frame of its own.
const COPIED_BYTES_MAX: usize = 4 << 10;
/// Fields of `ModelInferResponse`, and of its tensors, each with its length.
const MODEL_NAME: u8 = field(1);
const MODEL_VERSION: u8 = field(2);
const ID: u8 = field(3);
const OUTPUTS: u8 = field(5);
const RAW_OUTPUT_CONTENTS: u8 = field(6);
const NAME: u8 = field(1);
const DATATYPE: u8 = field(2);
const SHAPE: u8 = field(3);
/// More than what stands in a message beside names and elements.
const KEYS_BYTES: usize = 64;
/// Messages from this on are compressed where their call is.
const COMPRESSED_BYTES_MIN: usize = 1 << 10;

/// An answer of a model to `ModelInfer`, a `ModelInferResponse`: written here, since as one of prost's it would be copied into a dozen pieces of memory first.
pub(super) fn response(model_name: &str, outputs: &InferOutputs) -> Answer {
    let InferOutputs { model_version, id, tensors } = outputs;
    let copied = |tensor: &Tensor| Some(tensor.data().len()).filter(|bytes| *bytes <= COPIED_BYTES_MAX);
    let bytes = tensors.iter().map(|tensor| KEYS_BYTES + tensor.name().len() + copied(tensor).unwrap_or(0));
    let capacity = KEYS_BYTES + model_name.len() + id.len() + bytes.sum::<usize>();
    let mut pieces = Pieces { done: Vec::new(), open: Vec::with_capacity(capacity) };
    let open = &mut pieces.open;
    open.extend_from_slice(&[0; HEADER_BYTES]);
    put_text(MODEL_NAME, model_name, open);
    put_text(MODEL_VERSION, &model_version.to_string(), open);
    put_text(ID, id, open);
    for tensor in tensors {
        let (name, datatype) = (tensor.name(), tensor.datatype().name());
        let sizes = tensor.shape().iter().map(|size| encoded_len_varint(*size)).sum::<usize>();
        let shape = if sizes == 0 { 0 } else { 1 + encoded_len_varint(sizes as u64) + sizes };
        put_key(OUTPUTS, text_bytes(name) + text_bytes(datatype) + shape, open);
        put_text(NAME, name, open);
        put_text(DATATYPE, datatype, open);
        if sizes > 0 {
            put_key(SHAPE, sizes, open);
            tensor.shape().iter().for_each(|size| encode_varint(*size, open));
        }
    }
    for tensor in tensors {
        put_key(RAW_OUTPUT_CONTENTS, tensor.data().len(), &mut pieces.open);
        pieces.put(tensor.data().clone());
    }
    pieces.framed()
}

/// The key of a field that has a length.
const fn field(number: u8) -> u8 {
    number << 3 | 2
}

fn put_key(key: u8, bytes: usize, to: &mut Vec<u8>) {
    to.push(key);
    encode_varint(bytes as u64, to);
}

/// An empty text is left out.
fn put_text(key: u8, text: &str, to: &mut Vec<u8>) {
    if !text.is_empty() {
        put_key(key, text.len(), to);
        to.extend_from_slice(text.as_bytes());
    }
}

fn text_bytes(text: &str) -> usize {
    if text.is_empty() { 0 } else { 1 + encoded_len_varint(text.len() as u64) + text.len() }
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
    use modalkit_engine::Datatype;
    use modalkit_proto::ModelInferResponse;

    use super::*;

    #[test]
    fn what_is_written_in_pieces_is_the_message() {
        for sizes in [&[][..], &[0], &[10], &[5000], &[10, 5000, 3, 100_000], &[5000, 5000], &[1 << 20, 7, 1]]
        {
            let tensor = |size: &usize| {
                let (name, data) = (format!("t{size}").into(), vec![*size as u8; *size].into());
                let shape = if *size == 1 { vec![] } else { vec![*size as u64, 1] };
                Tensor::new(name, Datatype::Uint8, shape, data).unwrap()
            };
            let id = "7".repeat(sizes.len() * 100);
            let outputs = || InferOutputs {
                model_version: 12,
                id: id.clone(),
                tensors: sizes.iter().map(tensor).collect(),
            };
            let expected = outputs().into_message("m");
            let bytes = response("m", &outputs()).into_bytes();
            let (header, message) = bytes.split_at(HEADER_BYTES);
            assert_eq!(header[0], 0);
            assert_eq!(u32::from_be_bytes(header[1..].try_into().unwrap()) as usize, message.len());
            assert_eq!(ModelInferResponse::decode(message).unwrap(), expected, "{sizes:?}");
        }
    }
}
