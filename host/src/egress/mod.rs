//! Turns replies and job errors into HTTP. The one place where a job's error becomes a status; it never knows how it came
//! about.

mod body;
mod grpc;
mod refusal;

use std::{borrow::Cow, time::Duration};

use bytes::Bytes;
use hyper::{
    Response, StatusCode,
    header::{
        CACHE_CONTROL, CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, HeaderName, HeaderValue, RETRY_AFTER,
        WWW_AUTHENTICATE,
    },
};
use modalkit_engine::{Failure, FailureKind, InputFault, Payload};
use modalkit_queue::{Held, Lease};
use serde::Serialize;
use serde_json::{Value, json, value::RawValue};

use crate::{
    access::AccessError,
    protocol::{
        Answer, EVENT_STREAM, describe, failed_item, internal, invalid_item, object, openai, raw_json,
        v2::{InferAnswer, JSON_BYTES_HEADER, problem},
    },
    reconfigure::Change,
    reload::{ControlError, Outcome, ReloadRecord, Unloaded, VolumeModel, VolumeReport},
    work::{Detail, JobError, Reply},
};

pub use body::{Body, BodyStream};
pub use grpc::{denied_status, job_status};
pub use refusal::Refusal;

/// What this host sends: JSON, where it doesn't name another type.
pub type HttpResponse = Response<Body>;
/// Has a proxy pass events on as they come.
const BUFFERING: HeaderName = HeaderName::from_static("x-accel-buffering");

/// Whether OpenAI's clients try again.
const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");

/// How long a caller that finds the host busy, or not ready, should wait before it comes back.
pub const RETRY_AFTER_TIME: Duration = Duration::from_secs(1);

/// The answer to `/predict_sync`.
#[must_use]
pub fn reply(reply: Reply) -> HttpResponse {
    match reply.and_then(|output| output.into_json().map_err(JobError::Failed)) {
        Ok(output) => json_response(StatusCode::OK, Answer::of(output)),
        Err(job_error) => error(&job_error),
    }
}

/// The answer to `/predict_async`.
#[must_use]
pub fn accepted(body: Bytes) -> HttpResponse {
    json_response(StatusCode::OK, body)
}

/// The answer to `/predict_batch`: one entry for each item, in order. What fails in the pipeline stands in its place, and with
/// `partial` what isn't an input of it too, and so does what overran its time while others didn't; any other error is the whole request's.
#[must_use]
pub fn replies(replies: Vec<Reply>, partial: bool) -> HttpResponse {
    let output_bytes = |output: &Payload| Answer::OPENING_BYTES_MAX + output.json().map_or(0, Bytes::len) + 1;
    let outputs: usize = replies.iter().flatten().map(output_bytes).sum();
    let mut body = Vec::with_capacity(outputs + 2);
    let overran = |reply: &Reply| matches!(reply, Err(JobError::BatchTimedOut(_) | JobError::HungAlone(_)));
    let all_overran = replies.iter().all(overran);
    body.push(b'[');
    for reply in replies {
        if body.len() > 1 {
            body.push(b',');
        }
        match reply.and_then(|output| output.into_json().map_err(JobError::Failed)) {
            Ok(output) => Answer::of(output).put_into(&mut body),
            Err(JobError::Failed(failure)) => body.extend_from_slice(&failed_item(&failure)),
            Err(late @ JobError::HungAlone(_)) if !all_overran => {
                let message = describe(&late);
                body.extend_from_slice(&failed_item(&Failure { kind: FailureKind::Transient, message }));
            }
            Err(JobError::Invalid(details)) if partial => body.extend_from_slice(&invalid_item(details)),
            Err(job_error) => return error(&job_error),
        }
    }
    body.push(b']');
    json_response(StatusCode::OK, Bytes::from(body))
}

/// The beginning of an answer to `/predict_stream`.
#[must_use]
pub fn events(stream: Box<dyn BodyStream>) -> HttpResponse {
    let mut response = Response::new(Body::Stream(stream));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(EVENT_STREAM));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(BUFFERING, HeaderValue::from_static("no"));
    response
}

/// The last event of an answer to `/predict_stream`: what `/predict_sync` answers, or an error with the status that it has there.
///
/// # Errors
/// The error's status and its text, where it is one, beside the event.
pub fn last_event(reply: Reply) -> Result<Answer, LastError> {
    let job_error = match reply.and_then(|output| output.into_json().map_err(JobError::Failed)) {
        Ok(output) => return Ok(Answer::of(output)),
        Err(job_error) => job_error,
    };
    let (status, error) = (status_of(&job_error), describe(&job_error));
    let mut event = json!({"status": "error", "status_code": status.as_u16(), "error": error});
    if let Some(faults) = input_faults(&job_error) {
        event["detail"] = faults;
    }
    Err(LastError { status, error, event: object(&event) })
}

/// An error that ends a stream.
#[derive(Debug)]
pub struct LastError {
    /// The status that it would have had before the stream began.
    pub status: StatusCode,
    /// What is wrong, in words.
    pub error: String,
    /// The event's JSON.
    pub event: Bytes,
}

/// The answer to an inference request of the Open Inference Protocol.
#[must_use]
pub fn inferred(answer: InferAnswer) -> HttpResponse {
    let mut response = json_response(StatusCode::OK, answer.body);
    if let Some(json_bytes) = answer.json_bytes {
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
        headers.insert(HeaderName::from_static(JSON_BYTES_HEADER), HeaderValue::from(json_bytes));
    }
    response
}

/// An error's answer as the Open Inference Protocol has it; an answer that is none stays.
#[must_use]
pub fn in_v2(response: HttpResponse) -> HttpResponse {
    in_form(response, |body, _| problem(body))
}

/// An error's answer as OpenAI's clients read it; an answer that is none stays. They try again what the server failed at, unless they are told that
/// this doesn't help.
#[must_use]
pub fn in_openai(mut response: HttpResponse) -> HttpResponse {
    if response.extensions().get::<Why>().is_some_and(|why| !why.is_retryable) {
        response.headers_mut().insert(SHOULD_RETRY, HeaderValue::from_static("false"));
    }
    let is_of_model = response.extensions().get::<NoModel>().is_some();
    in_form(response, |body, status| openai::problem(body, status.as_u16(), is_of_model))
}

/// An error's answer as a protocol has it that knows no 422; an answer that is none stays.
fn in_form(response: HttpResponse, write: impl FnOnce(&[u8], StatusCode) -> Bytes) -> HttpResponse {
    if response.status().is_success() {
        return response;
    }
    let (mut head, body) = response.into_parts();
    let Body::Whole(body) = body else { return Response::from_parts(head, body) };
    if head.status == StatusCode::UNPROCESSABLE_ENTITY {
        head.status = StatusCode::BAD_REQUEST;
    }
    let body = write(&body.into_bytes(), head.status);
    Response::from_parts(head, body.into())
}

/// The error that ends a stream as OpenAI's clients read it.
#[must_use]
pub fn last_openai_event(job_error: &JobError) -> LastError {
    let response = in_openai(error(job_error));
    let status = response.status();
    let event = response.into_body().whole().map(Answer::into_bytes).unwrap_or_default();
    LastError { status, error: describe(job_error), event }
}

/// What a queue in memory holds, or gave away under a receipt.
#[must_use]
pub fn messages(held: &Held, lease: Option<&Lease>, acknowledged: Option<usize>) -> HttpResponse {
    let messages = held.messages.iter();
    object_response(
        StatusCode::OK,
        &Messages {
            length: held.length,
            messages: messages
                .map(|message| QueuedMessage { job_id: &message.job_id, body: raw_json(&message.body) })
                .collect(),
            receipt: lease.map(|lease| lease.receipt.as_str()),
            lease_seconds: lease.map(|lease| lease.time.as_secs()),
            acknowledged,
        },
    )
}

#[derive(Serialize)]
struct Messages<'a> {
    length: usize,
    messages: Vec<QueuedMessage<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    receipt: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    lease_seconds: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    acknowledged: Option<usize>,
}

#[derive(Serialize)]
struct QueuedMessage<'a> {
    job_id: &'a str,
    body: Cow<'a, RawValue>,
}

/// Why a caller was not let in.
#[must_use]
pub fn denied(access: &AccessError) -> HttpResponse {
    let status = match access {
        AccessError::Missing { .. } | AccessError::Wrong { .. } => StatusCode::UNAUTHORIZED,
        AccessError::NoManagement { .. } => StatusCode::FORBIDDEN,
        AccessError::TooOften(_) | AccessError::TooMany => StatusCode::TOO_MANY_REQUESTS,
        AccessError::Unknown => StatusCode::SERVICE_UNAVAILABLE,
    };
    let mut response = object_response(status, &json!({"detail": access.to_string()}));
    let headers = response.headers_mut();
    if status == StatusCode::UNAUTHORIZED {
        headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    let wait = match access {
        AccessError::TooOften(wait) => Some(wait.as_secs() + 1),
        AccessError::TooMany | AccessError::Unknown => Some(RETRY_AFTER_TIME.as_secs()),
        _ => None,
    };
    if let Some(seconds) = wait {
        headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
    }
    response
}

/// What became of a changed configuration: 409 where everything stayed as it was.
#[must_use]
pub fn reconfigured(change: &Change) -> HttpResponse {
    let status = match change {
        Change::Unchanged | Change::Applied { .. } => StatusCode::OK,
        Change::Refused { .. } => StatusCode::CONFLICT,
        Change::Stopping => return unavailable("it is shutting down"),
    };
    object_response(status, change)
}

/// Why a request failed, beside the answer that says so: for the log, and for callers who try again.
#[derive(Clone)]
pub struct Why {
    /// What went wrong, in words.
    pub text: String,
    /// Whether the same request may go well another time.
    pub is_retryable: bool,
}

/// That there is no such model, beside the answer that says so.
#[derive(Clone, Copy)]
struct NoModel;

/// Status and body of an error; one of the server's (5xx) has a [`Why`] among its extensions.
#[must_use]
pub fn error(job_error: &JobError) -> HttpResponse {
    let status = status_of(job_error);
    let detail = input_faults(job_error).unwrap_or_else(|| match job_error {
        JobError::Failed(failure) => internal(failure).into(),
        other => describe(other).into(),
    });
    let mut response = object_response(status, &json!({"detail": detail}));
    if matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
        response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(RETRY_AFTER_TIME.as_secs()));
    }
    if matches!(job_error, JobError::UnknownModel { .. }) {
        response.extensions_mut().insert(NoModel);
    }
    if status.is_server_error() {
        response
            .extensions_mut()
            .insert(Why { text: describe(job_error), is_retryable: job_error.is_retryable() });
    }
    response
}

/// What is wrong with an input, as a list of [`Detail`]s; `None` of an error that isn't about one.
fn input_faults(job_error: &JobError) -> Option<Value> {
    match job_error {
        JobError::Invalid(details) => Some(json!(details)),
        JobError::Failed(failure) if failure.kind == FailureKind::InvalidInput => {
            Some(json!([Detail::invalid(InputFault {
                path: Vec::new(),
                message: failure.message.clone(),
                kind: None
            })]))
        }
        _ => None,
    }
}

/// The status of an error.
#[must_use]
pub fn status_of(job_error: &JobError) -> StatusCode {
    match job_error {
        JobError::Invalid(_) => StatusCode::UNPROCESSABLE_ENTITY,
        JobError::UnknownModel { .. } | JobError::UnknownVersion { .. } => StatusCode::NOT_FOUND,
        JobError::TooLarge(_) => StatusCode::PAYLOAD_TOO_LARGE,
        JobError::Conflict(_) => StatusCode::CONFLICT,
        JobError::Busy(_) => StatusCode::TOO_MANY_REQUESTS,
        JobError::Unavailable(_) => StatusCode::SERVICE_UNAVAILABLE,
        JobError::StoppedReading(_) => StatusCode::REQUEST_TIMEOUT,
        JobError::DeadlinePassed | JobError::BatchTimedOut(_) | JobError::HungAlone(_) => {
            StatusCode::GATEWAY_TIMEOUT
        }
        JobError::Failed(failure) if failure.kind == FailureKind::InvalidInput => {
            StatusCode::UNPROCESSABLE_ENTITY
        }
        JobError::Failed(failure) if failure.kind == FailureKind::DeviceLost => {
            StatusCode::SERVICE_UNAVAILABLE
        }
        JobError::Failed(_) | JobError::Lost => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// What became of a reload or rollback: 409 where what serves stayed.
#[must_use]
pub fn reloaded(entry: &ReloadRecord) -> HttpResponse {
    let status = match entry.outcome {
        Outcome::Swapped | Outcome::RolledBack { .. } => StatusCode::OK,
        Outcome::Refused { .. } | Outcome::Superseded => StatusCode::CONFLICT,
        Outcome::Stopped => StatusCode::SERVICE_UNAVAILABLE,
    };
    object_response(status, entry)
}

/// What became of a scan of a volume: 409 where a plugin in it was refused or a hook failed.
#[must_use]
pub fn volume_reloaded(report: &VolumeReport) -> HttpResponse {
    let good = |model: &VolumeModel| {
        let taken =
            model.reload.as_ref().is_none_or(|entry| !matches!(entry.outcome, Outcome::Refused { .. }));
        taken && model.hook.as_ref().is_none_or(|hook| hook.errors.iter().all(Option::is_none))
    };
    let status = if report.models.values().all(good) { StatusCode::OK } else { StatusCode::CONFLICT };
    object_response(status, report)
}

/// A model was unloaded.
#[must_use]
pub fn unloaded(unloaded: &Unloaded) -> HttpResponse {
    object_response(StatusCode::OK, unloaded)
}

/// What is told of a change that nobody makes any more.
pub const GOING: &str = "the model is being unloaded, or the server is shutting down";

/// Why nothing was done.
#[must_use]
pub fn control_error(error: &ControlError) -> HttpResponse {
    match error {
        ControlError::Unknown { name, known } => {
            let detail = format!("{name:?}: no such name; expected one of {known:?}");
            object_response(StatusCode::NOT_FOUND, &json!({"detail": detail}))
        }
        ControlError::Configured(name) => {
            let detail = format!(
                "expected a model without an entry in the configuration; take {name} out of model_settings.model_entries instead"
            );
            object_response(StatusCode::CONFLICT, &json!({"detail": detail}))
        }
        ControlError::Bucket { volume, why } => {
            let detail = format!(
                "the bucket of {volume:?} can't be mirrored now, and what was mirrored is served on: {why}"
            );
            object_response(StatusCode::BAD_GATEWAY, &json!({"detail": detail}))
        }
        ControlError::Stopping => unavailable(GOING),
    }
}

fn unavailable(detail: &str) -> HttpResponse {
    let mut response = object_response(StatusCode::SERVICE_UNAVAILABLE, &json!({"detail": detail}));
    response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(RETRY_AFTER_TIME.as_secs()));
    response
}

/// A response with a JSON object made of this.
#[must_use]
pub fn object_response(status: StatusCode, value: &impl Serialize) -> HttpResponse {
    json_response(status, object(value))
}

/// A response of plain text.
#[must_use]
pub fn text_response(content_type: &'static str, text: String) -> HttpResponse {
    let mut response = Response::new(Bytes::from(text).into());
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

/// The same, after which the connection ends: what follows on it can't be understood or isn't wanted.
#[must_use]
pub fn and_close(mut response: HttpResponse) -> HttpResponse {
    response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    response
}

/// The same without its body, whose length its headers say: what HEAD asks for.
#[must_use]
pub fn without_body(response: HttpResponse) -> HttpResponse {
    let (mut head, body) = response.into_parts();
    if let Some(bytes) = body.whole_bytes() {
        head.headers.insert(CONTENT_LENGTH, HeaderValue::from(bytes));
    }
    Response::from_parts(head, Body::default())
}

fn json_response(status: StatusCode, body: impl Into<Body>) -> HttpResponse {
    let mut response = Response::new(body.into());
    *response.status_mut() = status;
    response
}

#[cfg(test)]
mod tests {
    use modalkit_engine::Failure;

    use super::*;

    fn failure(kind: FailureKind) -> JobError {
        JobError::Failed(Failure { kind, message: "no luck".into() })
    }

    #[test]
    fn each_error_has_the_status_of_the_table() {
        let known = vec!["echo".to_owned()];
        let table = [
            (JobError::Invalid(Vec::new()), 422),
            (JobError::UnknownModel { name: Some("x".into()), known }, 404),
            (JobError::UnknownVersion { model: "x".into(), version: "7".into(), serving: 1 }, 404),
            (JobError::TooLarge(String::new()), 413),
            (JobError::Conflict(String::new()), 409),
            (JobError::Busy(""), 429),
            (JobError::Unavailable(String::new()), 503),
            (JobError::DeadlinePassed, 504),
            (JobError::BatchTimedOut(Duration::from_secs(1)), 504),
            (JobError::StoppedReading(Duration::from_secs(1)), 408),
            (failure(FailureKind::Permanent), 500),
            (failure(FailureKind::Panicked), 500),
            (failure(FailureKind::Transient), 500),
            (failure(FailureKind::DeviceLost), 503),
            (failure(FailureKind::InvalidInput), 422),
            (JobError::Lost, 500),
        ];
        for (job_error, status) in table {
            let response = error(&job_error);
            assert_eq!(response.status().as_u16(), status, "{job_error:?}");
            assert_eq!(response.headers().contains_key(RETRY_AFTER), status == 429 || status == 503);
        }
    }

    #[test]
    fn a_stream_ends_with_the_status_and_the_faults_that_its_error_would_have_had_alone() {
        let detail = json!([{"loc": ["body"], "msg": "no luck", "type": "value_error"}]);
        for (job_error, status, faults) in
            [(failure(FailureKind::InvalidInput), 422, detail), (JobError::DeadlinePassed, 504, Value::Null)]
        {
            let alone: Value =
                serde_json::from_slice(&error(&job_error).into_body().whole().unwrap().into_bytes()).unwrap();
            let last = last_event(Err(job_error)).unwrap_err();
            let event: Value = serde_json::from_slice(&last.event).unwrap();
            assert_eq!((event["status_code"].as_u64(), last.status.as_u16()), (Some(status.into()), status));
            assert_eq!(event["detail"], faults);
            assert!(faults.is_null() || alone["detail"] == faults, "{alone}");
        }
    }
}
