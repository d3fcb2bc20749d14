//! `ModelInfer`: a message of tensors in, one out.

use std::{
    pin::pin,
    sync::{Arc, atomic::Ordering},
};

use hyper::StatusCode;
use modalkit_proto::ModelInferRequest;
use tonic::Status;

use super::{
    call::GrpcCall,
    reader::{Message, MessageReader, Next},
    writer,
};
use crate::{
    egress::{self, job_status},
    ingress::predict::{
        Call, Counted, Ended, count, infer,
        infer::{elsewhere_if_large, run},
        say_if_lost,
    },
    insight::metrics::GRPC_INFER,
    pipeline::{Generation, Model},
    protocol::{
        Answer, describe,
        v2::{self, Form, InferOutputs, InferRequest},
    },
    work::JobError,
};

const COUNTED: Counted = Counted { endpoint: GRPC_INFER, ok: |metrics| metrics.ok_grpc_infer.inc() };

/// Answers a request.
///
/// # Errors
/// Why there is no answer.
pub(super) async fn answer(call: &GrpcCall, mut reader: MessageReader) -> Result<Inferred, Status> {
    // Until its deadline, which counts from its headers on.
    let mut limit = pin!(call.exchange.timer.limit(call.deadline.0));
    let read = async {
        let next = reader.next().await?;
        let Some(Next::Message(message)) = next else {
            return Err(Status::internal("expected a message, found none"));
        };
        reader.end().await?;
        Ok(message)
    };
    let message = tokio::select! {
        biased;
        message = read => message?,
        () = &mut limit => return Err(job_status(&JobError::DeadlinePassed)),
    };
    let Message { request: message, taken: _taken, cost, .. } = message;
    call.is_counted.store(true, Ordering::Relaxed);
    let context = call.context();
    let model = match find(call, &message) {
        Ok(model) => model,
        Err(error) => {
            count(context, None, COUNTED, &call.id, ended(&error, &describe(&error)));
            return Err(job_status(&error));
        }
    };
    let request = Call {
        caller: call.caller.clone(),
        model,
        deadline: call.deadline,
        partial: false,
        timings: call.timings.lock().take(),
        id: call.id.clone(),
        begun: call.begun,
    };
    let answered = {
        let mut work = pin!(infer_message(call, &request, message, cost));
        tokio::select! {
            biased;
            done = &mut work => done,
            () = &mut limit => Err(JobError::DeadlinePassed),
        }
    };
    let Call { model, timings, begun, .. } = request;
    model.metrics.request.observe(begun.elapsed().as_secs_f64());
    let status = answered.as_ref().map_or_else(egress::status_of, |_| StatusCode::OK);
    let explanation = timings.and_then(|timings| timings.end(context, begun, &model.name, &call.id, status));
    match answered {
        Ok(outputs) => {
            count(context, Some(&model), COUNTED, &call.id, Ended { status, error: None });
            Ok(Inferred { message: writer::response(&model.name, &outputs), explanation })
        }
        Err(error) => {
            say_if_lost(&error, &model, &call.id);
            count(context, Some(&model), COUNTED, &call.id, ended(&error, &describe(&error)));
            Err(job_status(&error))
        }
    }
}

/// An answer, and where its time went, where its caller may know.
pub(super) struct Inferred {
    pub(super) message: Answer,
    pub(super) explanation: Option<serde_json::Value>,
}

/// The model that a request names; the only one where it names none.
pub(super) fn find(call: &GrpcCall, message: &ModelInferRequest) -> Result<Arc<Model>, JobError> {
    let name = Some(message.model_name.as_str()).filter(|name| !name.is_empty());
    call.context().models.find(name)
}

/// The generation that serves, where it is the version that a request names.
pub(super) fn serving(model: &Model, message: &ModelInferRequest) -> Result<Arc<Generation>, JobError> {
    let generation = model.serving()?;
    let version = Some(message.model_version.as_str()).filter(|version| !version.is_empty());
    generation.check_version(version)?;
    Ok(generation)
}

fn ended<'a>(error: &JobError, text: &'a str) -> Ended<'a> {
    let status = egress::status_of(error);
    Ended { status, error: Some(text).filter(|_| status.is_server_error()) }
}

/// Runs a request by itself, which is as much work to read as so many bytes of JSON.
pub(super) async fn infer_message(
    call: &GrpcCall,
    request: &Call,
    message: ModelInferRequest,
    cost: usize,
) -> Result<InferOutputs, JobError> {
    let peer = call.exchange.peer();
    let generation = serving(&request.model, &message)?;
    let form = Form::of(generation.signature()?);
    let queue_max = request.model.spec().batch.queue_max;
    let bytes = bytes_to_read(&message, cost);
    let signature = Arc::clone(form.signature());
    let read = move || v2::read_message(message, &signature, queue_max);
    let read = elsewhere_if_large(peer, bytes, read).await??;
    finish(call, request, &generation, &form, read, bytes).await
}

/// Runs a request that fits its model.
pub(super) async fn finish(
    call: &GrpcCall,
    request: &Call,
    generation: &Arc<Generation>,
    form: &Form,
    read: InferRequest,
    bytes: usize,
) -> Result<InferOutputs, JobError> {
    let peer = call.exchange.peer();
    let (wanted, outputs) = run(peer, request, generation, form, read, bytes).await?;
    let version = generation.number;
    // What is put together of several inputs is copied; what was one is not.
    let bytes = if outputs.len() == 1 { 0 } else { wanted.bytes_to_write(&outputs) };
    let write = move || InferOutputs::of(version, wanted, &outputs);
    elsewhere_if_large(peer, bytes, write).await?.map_err(JobError::Failed)
}

/// How much work a message is to look at, as many bytes of JSON: its raw elements are little, all else of it is as it is.
pub(super) fn bytes_to_read(message: &ModelInferRequest, cost: usize) -> usize {
    let raw: usize = message.raw_input_contents.iter().map(bytes::Bytes::len).sum();
    raw / infer::BYTES_OF_NUMBERS + cost.saturating_sub(raw)
}
