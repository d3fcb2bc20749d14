//! Turns replies and job errors into HTTP. The one place where a job's error becomes a status; it never knows how it came
//! about.

use std::borrow::Cow;

use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    Response, StatusCode,
    header::{CONNECTION, CONTENT_TYPE, HeaderValue, RETRY_AFTER, WWW_AUTHENTICATE},
};
use modalkit_loader::{Failure, FailureKind};
use modalkit_queue::{Held, Lease};
use serde::Serialize;
use serde_json::{
    json,
    value::{RawValue, to_raw_value},
};

use crate::{
    access::AccessError,
    dispatch,
    job::{Detail, JobError, Location, Reply},
    reconfigure::Change,
    reload::{ControlError, Entry, Outcome, Unloaded, VolumeModel, VolumeReport},
};

/// What this host sends.
pub type HttpResponse = Response<Full<Bytes>>;

const JSON: HeaderValue = HeaderValue::from_static("application/json");

/// The answer to `/predict_sync`.
#[must_use]
pub fn reply(reply: Reply) -> HttpResponse {
    match reply {
        Ok(body) => json_bytes(StatusCode::OK, body),
        Err(job_error) => error(&job_error),
    }
}

/// The answer to `/predict_batch`: one entry for each item, in order. What fails in the pipeline stands in its place;
/// any other error is the whole request's.
#[must_use]
pub fn replies(replies: Vec<Reply>) -> HttpResponse {
    let mut body =
        Vec::with_capacity(replies.iter().flatten().map(Bytes::len).sum::<usize>() + replies.len() + 1);
    body.push(b'[');
    for reply in replies {
        if body.len() > 1 {
            body.push(b',');
        }
        match reply {
            Ok(item) => body.extend_from_slice(&item),
            Err(JobError::Failed(failure)) => body.extend_from_slice(&failed_item(&failure)),
            Err(job_error) => return error(&job_error),
        }
    }
    body.push(b']');
    json_bytes(StatusCode::OK, body.into())
}

/// Why an asynchronous job failed, in words.
#[must_use]
pub fn job_failure(job_error: &JobError) -> String {
    match job_error {
        JobError::Failed(failure) => internal(failure),
        other => explain(other),
    }
}

/// What a failed asynchronous job leaves: the reference's message for failures, with what came in. What isn't JSON is told as a text.
#[must_use]
pub fn failed_job(error: String, envelope: &[u8]) -> Bytes {
    object(&FailedJob { status: "error", error, original_message: raw_json(envelope) })
}

/// Bytes as a part of a JSON text, as they stand; those that aren't JSON as a text.
#[must_use]
pub fn raw_json(bytes: &[u8]) -> Cow<'_, RawValue> {
    match serde_json::from_slice::<&RawValue>(bytes) {
        Ok(json) => Cow::Borrowed(json),
        Err(_) => Cow::Owned(to_raw_value(&String::from_utf8_lossy(bytes)).expect("a text is JSON")),
    }
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

/// Written as it stands: turned into a `Value`, the envelope would be parsed again, and what JSON allows and `Value` doesn't
/// hold (`1e999`) would fail here.
#[derive(Serialize)]
struct FailedJob<'a> {
    status: &'static str,
    error: String,
    original_message: Cow<'a, RawValue>,
}

/// An item's error in the place of its answer.
fn failed_item(failure: &Failure) -> Bytes {
    object(&json!({"status": "error", "error": failure.message.as_str()}))
}

/// The answer with the caller's `meta` attached.
#[must_use]
pub fn with_meta(answer: &[u8], meta: &[u8]) -> Bytes {
    let open = answer.strip_suffix(b"}").unwrap_or(answer);
    let mut body = Vec::with_capacity(open.len() + meta.len() + 10);
    body.extend_from_slice(open);
    body.extend_from_slice(b",\"meta\":");
    body.extend_from_slice(meta);
    body.push(b'}');
    body.into()
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
        AccessError::TooMany | AccessError::Unknown => Some(dispatch::RETRY_AFTER.as_secs()),
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

/// Status and body of an error.
#[must_use]
pub fn error(job_error: &JobError) -> HttpResponse {
    let status = match job_error {
        JobError::Invalid(_) => StatusCode::UNPROCESSABLE_ENTITY,
        JobError::UnknownModel { .. } => StatusCode::NOT_FOUND,
        JobError::TooLarge(_) => StatusCode::PAYLOAD_TOO_LARGE,
        JobError::Conflict(_) => StatusCode::CONFLICT,
        JobError::Busy(_) => StatusCode::TOO_MANY_REQUESTS,
        JobError::Unavailable(_) => StatusCode::SERVICE_UNAVAILABLE,
        JobError::DeadlinePassed | JobError::BatchTimedOut(_) => StatusCode::GATEWAY_TIMEOUT,
        JobError::Failed(failure) if failure.kind == FailureKind::InvalidInput => {
            StatusCode::UNPROCESSABLE_ENTITY
        }
        JobError::Failed(failure) if failure.kind == FailureKind::DeviceLost => {
            StatusCode::SERVICE_UNAVAILABLE
        }
        JobError::Failed(_) | JobError::Lost => StatusCode::INTERNAL_SERVER_ERROR,
    };
    let mut response = match job_error {
        JobError::Invalid(details) => object_response(status, &json!({"detail": details})),
        JobError::Failed(failure) if failure.kind == FailureKind::InvalidInput => {
            let detail = Detail::invalid(&[], failure.message.to_string());
            object_response(status, &json!({"detail": [detail]}))
        }
        JobError::Failed(failure) => object_response(status, &json!({"detail": internal(failure)})),
        other => object_response(status, &json!({"detail": explain(other)})),
    };
    if matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
        response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(dispatch::RETRY_AFTER.as_secs()));
    }
    response
}

fn internal(failure: &Failure) -> String {
    format!("Internal Server Error. Error log: {}", failure.message)
}

fn explain(job_error: &JobError) -> String {
    match job_error {
        JobError::Invalid(details) => details.first().map(placed).unwrap_or_default(),
        JobError::UnknownModel { name: Some(name), known } => {
            format!("no model named {name:?}; expected one of {known:?}")
        }
        JobError::UnknownModel { name: None, known } if known.is_empty() => {
            "no model is served yet: put a plugin into the volume".to_owned()
        }
        JobError::UnknownModel { name: None, known } => {
            format!("several models are served: say ?model_name=, one of {known:?}")
        }
        JobError::TooLarge(reason) | JobError::Conflict(reason) | JobError::Unavailable(reason) => {
            reason.clone()
        }
        JobError::Busy(reason) => (*reason).to_owned(),
        JobError::DeadlinePassed => "the deadline passed before there was an answer".to_owned(),
        JobError::BatchTimedOut(limit) => {
            format!("the batch ran longer than batch_timeout_seconds ({limit:?})")
        }
        JobError::Failed(failure) => failure.message.to_string(),
        JobError::Lost => "Internal Server Error. Error log: the job was lost inside the host".to_owned(),
    }
}

/// What is wrong with an input, with its place.
fn placed(detail: &Detail) -> String {
    let step = |step: &Location| match step {
        Location::Key(key) => key.clone(),
        Location::Index(index) => index.to_string(),
    };
    // The first step says that it is the body.
    let place: Vec<String> = detail.loc.iter().skip(1).map(step).collect();
    if place.is_empty() { detail.msg.clone() } else { format!("{}: {}", place.join("."), detail.msg) }
}

/// What became of a reload or rollback: 409 where what serves stayed.
#[must_use]
pub fn reloaded(entry: &Entry) -> HttpResponse {
    let status = match entry.outcome {
        Outcome::Swapped | Outcome::RolledBack { .. } => StatusCode::OK,
        Outcome::Refused { .. } | Outcome::Superseded => StatusCode::CONFLICT,
        Outcome::Stopped => StatusCode::SERVICE_UNAVAILABLE,
    };
    object_response(status, entry)
}

/// What became of a look through a volume: 409 where a plugin in it was refused or a hook failed.
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

/// Why nothing was done.
#[must_use]
pub fn control_error(error: &ControlError) -> HttpResponse {
    match error {
        ControlError::Unknown(known) => {
            let detail = format!("no such name; expected one of {known:?}");
            object_response(StatusCode::NOT_FOUND, &json!({"detail": detail}))
        }
        ControlError::Configured(name) => {
            let detail = format!(
                "expected a model without an entry in the configuration; take {name} out of model_settings.model_entries instead"
            );
            object_response(StatusCode::CONFLICT, &json!({"detail": detail}))
        }
        ControlError::Stopping => unavailable("it is shutting down"),
    }
}

fn unavailable(detail: &str) -> HttpResponse {
    let mut response = object_response(StatusCode::SERVICE_UNAVAILABLE, &json!({"detail": detail}));
    response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(dispatch::RETRY_AFTER.as_secs()));
    response
}

/// A response with a JSON object made of this.
#[must_use]
pub fn object_response(status: StatusCode, value: &impl Serialize) -> HttpResponse {
    json_bytes(status, object(value))
}

/// A response of plain text.
#[must_use]
pub fn text_response(content_type: &'static str, text: String) -> HttpResponse {
    let mut response = Response::new(Full::new(text.into()));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

/// The same, after which the connection ends: what follows on it can't be understood or isn't wanted.
#[must_use]
pub fn and_close(mut response: HttpResponse) -> HttpResponse {
    response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    response
}

fn json_bytes(status: StatusCode, body: Bytes) -> HttpResponse {
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, JSON);
    response
}

fn object(value: &impl Serialize) -> Bytes {
    serde_json::to_vec(value).expect("what this host writes are JSON values").into()
}

#[cfg(test)]
mod tests {
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
            (JobError::TooLarge(String::new()), 413),
            (JobError::Conflict(String::new()), 409),
            (JobError::Busy(""), 429),
            (JobError::Unavailable(String::new()), 503),
            (JobError::DeadlinePassed, 504),
            (JobError::BatchTimedOut(std::time::Duration::from_secs(1)), 504),
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
    fn a_failed_job_carries_its_envelope_to_the_letter() {
        let message =
            failed_job(job_failure(&JobError::Lost), br#"{"message": 1e999, "meta": {"s": "\ud800"}}"#);
        let text = String::from_utf8_lossy(&message);
        assert!(
            text.ends_with(r#""original_message":{"message": 1e999, "meta": {"s": "\ud800"}}}"#),
            "{text}"
        );
    }

    #[test]
    fn meta_is_attached_to_an_answer_of_any_size() {
        let answer = with_meta(br#"{"status":"success"}"#, br#"{"k":1}"#);
        assert_eq!(answer, br#"{"status":"success","meta":{"k":1}}"#.as_slice());
    }
}
