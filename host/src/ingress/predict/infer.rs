//! `POST /v2/models/{name}/infer`: tensors, one answer of tensors.

use std::{sync::Arc, time::Instant};

use bytes::Bytes;
use modalkit_engine::{Decoded, Payload, Tensor};
use tokio::time::timeout_at;

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
    protocol::v2::{self, Form, InferRequest, Wanted},
    work::{JobError, Location, Reply},
};

/// Bytes of numbers that are as much work as one of JSON: they are looked at, or copied, at most.
pub(in crate::ingress) const BYTES_OF_NUMBERS: usize = 128;
/// As many bytes of JSON are as much work as an input of a batch, which is taken apart and decoded by itself.
const BYTES_FOR_AN_INPUT: usize = 64;

/// Where the JSON part of a request ends, and its tensors' bytes begin; `None` where it is all JSON, and of other predictions.
///
/// # Errors
/// As [`request_headers::json_bytes`].
pub(super) fn json_bytes(prediction: Prediction, head: &Head<'_>) -> Result<Option<usize>, JobError> {
    match prediction {
        Prediction::Infer => request_headers::json_bytes(&head.headers),
        Prediction::Sync
        | Prediction::Batch
        | Prediction::Async
        | Prediction::Stream
        | Prediction::Task(_) => Ok(None),
    }
}

pub(super) async fn answer(
    peer: &Peer,
    call: &Call,
    generation: &Arc<Generation>,
    body: Bytes,
    json_bytes: Option<usize>,
) -> Result<HttpResponse, JobError> {
    let form = Form::of(generation.signature()?);
    let queue_max = call.model.spec().batch.queue_max;
    let parsed = json_bytes.unwrap_or(body.len()).min(body.len());
    let bytes = parsed + (body.len() - parsed) / BYTES_OF_NUMBERS;
    let signature = Arc::clone(form.signature());
    let read = move |_: &Generation, body: &Bytes| v2::read_infer(body, json_bytes, &signature, queue_max);
    let request = decode_body(peer, generation, &body, bytes, read).await?;
    let (wanted, outputs) = run(peer, call, generation, &form, request, bytes).await?;
    let (name, version, bytes) =
        (call.model.name.clone(), generation.number, wanted.bytes_to_write(&outputs));
    let write = move || v2::write_infer(&name, version, wanted, &outputs);
    elsewhere_if_large(peer, bytes, write).await?.map(egress::inferred).map_err(JobError::Failed)
}

/// Runs a request that fits its model, of which so many bytes were to be parsed: what is wanted of it, and each input's output.
pub(in crate::ingress) async fn run(
    peer: &Peer,
    call: &Call,
    generation: &Arc<Generation>,
    form: &Form,
    request: InferRequest,
    bytes: usize,
) -> Result<(Wanted, Vec<Arc<[Tensor]>>), JobError> {
    let InferRequest { tensors, wanted, timeout } = request;
    let inputs = usize::try_from(tensors.inputs()).unwrap_or(usize::MAX);
    let bytes =
        (bytes + tensors.bytes_of_strings()).saturating_add(inputs.saturating_mul(BYTES_FOR_AN_INPUT));
    let decode = {
        let form = form.clone();
        move |generation: &Generation, tensors: &v2::BatchTensors| {
            let inputs = form.inputs(tensors.clone());
            let row = |(row, (decoded, input)): (usize, (Result<Decoded, JobError>, &Payload))| {
                let decoded = decoded.map_err(|error| error.inside(&[Location::Index(row as u64)]))?;
                Ok(Ok((input.clone(), decoded)))
            };
            let decoded = generation.decode_each(&inputs).zip(&inputs).enumerate();
            decoded.map(row).collect::<Result<Vec<ListItem>, _>>()
        }
    };
    let items = decode_body(peer, generation, &tensors, generation.bytes_to_decode(bytes), decode).await?;
    let outputs = match timeout {
        None => run_all(peer, call, items).await?,
        Some(timeout) => {
            // From its beginning, as a header would have it.
            let at = call.begun + timeout.min(peer.context.server.request_timeout_max);
            // A timer's grain is longer than some requests take.
            if Instant::now() >= at {
                return Err(JobError::DeadlinePassed);
            }
            Box::pin(timeout_at(at.into(), run_all(peer, call, items)))
                .await
                .unwrap_or(Err(JobError::DeadlinePassed))?
        }
    };
    let tensors = |reply: Reply| reply.and_then(|output| form.output(output).map_err(JobError::Failed));
    let outputs = outputs.into_iter().map(tensors).collect::<Result<Vec<_>, _>>()?;
    Ok((wanted, outputs))
}

/// Does what takes as long as to parse so many bytes of JSON: few on this thread, many on another.
pub(in crate::ingress) async fn elsewhere_if_large<T: Send + 'static>(
    peer: &Peer,
    bytes: usize,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, JobError> {
    let context = &*peer.context;
    if bytes <= context.server.decode_inline_bytes_max {
        return Ok(work());
    }
    let thread = Arc::clone(&context.decoding).acquire_owned().await.map_err(|_| JobError::Lost)?;
    let work = move || {
        let _thread = thread;
        work()
    };
    context.blocking.spawn_blocking(work).await.map_err(|_| JobError::Lost)
}
