//! `POST /v2/models/{name}/infer`: tensors, one answer of tensors.

use std::sync::Arc;

use bytes::Bytes;
use modalkit_engine::Payload;

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

/// Bytes of tensors that are as much work as one that is parsed: they are looked at, or copied, at most.
const BYTES_FOR_ONE_PARSED: usize = 128;

/// Where the JSON part of a request ends, and its tensors' bytes begin; `None` where it is all JSON, and of other predictions.
///
/// # Errors
/// As [`request_headers::json_bytes`].
pub(super) fn json_bytes(prediction: Prediction, head: &Head<'_>) -> Result<Option<usize>, JobError> {
    match prediction {
        Prediction::Infer => request_headers::json_bytes(&head.headers),
        Prediction::Sync | Prediction::Batch | Prediction::Async => Ok(None),
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
    let read = move |generation: &Generation, body: &Bytes| {
        let request = v2::read_infer(body, json_bytes, &signature, queue_max)?;
        let decode = |(row, tensors)| {
            let input = Payload::Tensors(tensors);
            let decoded = generation.decode(&input);
            let decoded = decoded.map_err(|error| error.inside(&[Location::Index(row as u64)]))?;
            Ok(Ok((input, decoded)))
        };
        let items =
            request.inputs.into_iter().enumerate().map(decode).collect::<Result<Vec<ListItem>, _>>()?;
        Ok((items, request.wanted))
    };
    let parsed = json_bytes.unwrap_or(body.len()).min(body.len());
    let work = parsed + (body.len() - parsed) / BYTES_FOR_ONE_PARSED;
    let (items, wanted) = decode_body(peer, generation, &body, work, read).await?;
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
        context.blocking.spawn_blocking(write).await.map_err(|_| JobError::Lost)?
    };
    answer.map(egress::inferred).map_err(JobError::Failed)
}
