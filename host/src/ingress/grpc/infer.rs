//! `ModelInfer`: a message of tensors in, one out.

use std::{
    pin::pin,
    sync::{Arc, atomic::Ordering},
};

use hyper::StatusCode;
use modalkit_proto::{ModelInferRequest, ModelInferResponse};
use tonic::{Response, Status};

use super::call::{GrpcCall, explained};
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
        describe,
        v2::{self, Form},
    },
    work::JobError,
};

const COUNTED: Counted = Counted { endpoint: GRPC_INFER, ok: |metrics| metrics.ok_grpc_infer.inc() };

/// Answers a request.
///
/// # Errors
/// Why there is no answer.
pub(super) async fn answer(
    call: &GrpcCall,
    message: ModelInferRequest,
) -> Result<Response<ModelInferResponse>, Status> {
    let _charge = call.meter.message();
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
        let mut limit = pin!(call.exchange.timer.limit(request.deadline.0));
        let mut work = pin!(infer_message(call, &request, message));
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
        Ok(answer) => {
            count(context, Some(&model), COUNTED, &call.id, Ended { status, error: None });
            Ok(explained(answer, explanation))
        }
        Err(error) => {
            say_if_lost(&error, &model, &call.id);
            count(context, Some(&model), COUNTED, &call.id, ended(&error, &describe(&error)));
            Err(job_status(&error))
        }
    }
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

/// Runs a request by itself.
pub(super) async fn infer_message(
    call: &GrpcCall,
    request: &Call,
    message: ModelInferRequest,
) -> Result<ModelInferResponse, JobError> {
    let peer = call.exchange.peer();
    let generation = serving(&request.model, &message)?;
    let form = Form::of(generation.signature()?);
    let queue_max = request.model.spec().batch.queue_max;
    let bytes = bytes_to_read(&message);
    let signature = Arc::clone(form.signature());
    let read = move || v2::read_message(message, &signature, queue_max);
    let read = elsewhere_if_large(peer, bytes, read).await??;
    let (wanted, outputs) = run(peer, request, &generation, &form, read, bytes).await?;
    let (name, version, bytes) =
        (request.model.name.clone(), generation.number, wanted.bytes_to_write(&outputs));
    let write = move || v2::infer_message(&name, version, wanted, &outputs);
    elsewhere_if_large(peer, bytes, write).await?.map_err(JobError::Failed)
}

/// How much work a message is to read, as many bytes of JSON.
pub(super) fn bytes_to_read(message: &ModelInferRequest) -> usize {
    let raw: usize = message.raw_input_contents.iter().map(bytes::Bytes::len).sum();
    let listed: usize =
        message.inputs.iter().filter_map(|input| input.contents.as_ref()).map(v2::elements_in).sum();
    raw / infer::BYTES_OF_NUMBERS + listed
}
