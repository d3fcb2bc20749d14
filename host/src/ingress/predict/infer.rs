//! `POST /v2/models/{name}/infer`: tensors, one answer of tensors.

use std::sync::Arc;

use bytes::Bytes;
use modalkit_engine::{Decoded, Payload};

use super::{Call, decode_body, run_all};
use crate::{
    egress::{self, HttpResponse},
    ingress::{
        endpoints::Prediction,
        envelope::ListItem,
        peer::Peer,
        request_headers::{self, Head},
    },
    pipeline::Generation,
    protocol::v2,
    work::{JobError, Location, Reply},
};

/// Bytes of numbers that are as much work as one of JSON: they are looked at, or copied, at most.
const BYTES_OF_NUMBERS: usize = 128;
/// As many bytes of JSON are as much work as an input of a batch, which is taken apart and decoded by itself.
const BYTES_FOR_AN_INPUT: usize = 64;

/// Where the JSON part of a request ends, and its tensors' bytes begin; `None` where it is all JSON, and of other predictions.
///
/// # Errors
/// As [`request_headers::json_bytes`].
pub(super) fn json_bytes(prediction: Prediction, head: &Head<'_>) -> Result<Option<usize>, JobError> {
    match prediction {
        Prediction::Infer => request_headers::json_bytes(&head.headers),
        Prediction::Sync | Prediction::Batch | Prediction::Async | Prediction::Stream => Ok(None),
    }
}

pub(super) async fn answer(
    peer: &Peer,
    call: &Call,
    generation: &Arc<Generation>,
    body: Bytes,
    json_bytes: Option<usize>,
) -> Result<HttpResponse, JobError> {
    let signature = generation.signature()?;
    let queue_max = call.model.spec().batch.queue_max;
    let parsed = json_bytes.unwrap_or(body.len()).min(body.len());
    let bytes = parsed + (body.len() - parsed) / BYTES_OF_NUMBERS;
    let read = move |_: &Generation, body: &Bytes| v2::read_infer(body, json_bytes, &signature, queue_max);
    let v2::InferRequest { tensors, wanted } = decode_body(peer, generation, &body, bytes, read).await?;
    let inputs = usize::try_from(tensors.inputs()).unwrap_or(usize::MAX);
    let decode = |generation: &Generation, tensors: &v2::BatchTensors| {
        let inputs: Vec<Payload> = tensors.clone().into_inputs().into_iter().map(Payload::Tensors).collect();
        let row = |(row, (decoded, input)): (usize, (Result<Decoded, JobError>, &Payload))| {
            let decoded = decoded.map_err(|error| error.inside(&[Location::Index(row as u64)]))?;
            Ok(Ok((input.clone(), decoded)))
        };
        let decoded = generation.decode_each(&inputs).zip(&inputs).enumerate();
        decoded.map(row).collect::<Result<Vec<ListItem>, _>>()
    };
    let bytes =
        (bytes + tensors.bytes_of_strings()).saturating_add(inputs.saturating_mul(BYTES_FOR_AN_INPUT));
    let items = decode_body(peer, generation, &tensors, generation.bytes_to_decode(bytes), decode).await?;
    let outputs = run_all(peer, call, items).await?;
    let tensors = |reply: Reply| reply.and_then(|output| output.into_tensors().map_err(JobError::Failed));
    let outputs = outputs.into_iter().map(tensors).collect::<Result<Vec<_>, _>>()?;
    let (name, version, bytes) =
        (call.model.name.clone(), generation.number, wanted.bytes_to_write(&outputs));
    let write = move || v2::write_infer(&name, version, wanted, &outputs);
    let context = &*peer.context;
    let answer = if bytes <= context.server.decode_inline_bytes_max {
        write()
    } else {
        let thread = Arc::clone(&context.decoding).acquire_owned().await.map_err(|_| JobError::Lost)?;
        let write = move || {
            let _thread = thread;
            write()
        };
        context.blocking.spawn_blocking(write).await.map_err(|_| JobError::Lost)?
    };
    answer.map(egress::inferred).map_err(JobError::Failed)
}
