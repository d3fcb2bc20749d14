//! What a request says of itself beside its body: id, deadline, model.

use std::{
    borrow::Cow,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use bytes::Bytes;
use hyper::{
    HeaderMap,
    header::{HeaderName, HeaderValue},
};

use crate::{
    access::Shown,
    config::Server,
    job::{Deadline, Detail, JobError, RequestId},
};

/// Names a request in logs and answers.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Milliseconds after which the caller doesn't want the answer any more.
pub(super) const REQUEST_TIMEOUT: HeaderName = HeaderName::from_static("x-request-timeout-ms");
/// The name under which a request counts once, however often it is sent.
const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
/// Bytes of a `traceparent` of the version that there is.
const TRACEPARENT_BYTES: usize = 55;
/// The longest such name.
const IDEMPOTENCY_KEY_BYTES_MAX: usize = 255;
/// The longest id that is taken over from a caller.
const REQUEST_ID_BYTES_MAX: usize = 128;

/// Makes ids: a word that is this process's own, and a number.
pub(super) struct RequestIds {
    process: u32,
    next: AtomicU64,
}

impl RequestIds {
    pub(super) fn new() -> Self {
        let random = uuid::Uuid::now_v7().as_u128();
        Self { process: random as u32, next: AtomicU64::new(1) }
    }

    /// The caller's id where it has a fit one, else a new one.
    pub(super) fn of(&self, headers: &HeaderMap) -> RequestId {
        let fit = |id: &&HeaderValue| (1..=REQUEST_ID_BYTES_MAX).contains(&id.len()) && id.to_str().is_ok();
        headers.get(REQUEST_ID).filter(fit).map_or_else(
            || RequestId::Made { process: self.process, number: self.next.fetch_add(1, Ordering::Relaxed) },
            |id| RequestId::Given(Bytes::copy_from_slice(id.as_bytes())),
        )
    }
}

/// What access looks at.
pub(super) struct Headers<'a>(pub(super) &'a HeaderMap);

impl Shown for Headers<'_> {
    fn header(&self, name: &str) -> Option<&[u8]> {
        self.0.get(name).map(HeaderValue::as_bytes)
    }
}

/// Adds the id to an answer.
pub(super) fn put_id(id: &RequestId, headers: &mut HeaderMap) {
    let bytes = match id {
        RequestId::Given(bytes) => bytes.clone(),
        RequestId::Made { .. } => id.to_string().into(),
    };
    // One that isn't fit for a header was never taken over.
    if let Ok(value) = HeaderValue::from_maybe_shared(bytes) {
        headers.insert(REQUEST_ID, value);
    }
}

/// The moment after which nobody wants the answer.
pub(super) fn deadline(headers: &HeaderMap, server: &Server, now: Instant) -> Result<Deadline, JobError> {
    let Some(value) = headers.get(REQUEST_TIMEOUT) else { return Ok(Deadline(now + server.request_timeout)) };
    let milliseconds: u64 =
        value.to_str().ok().and_then(|text| text.trim().parse().ok()).filter(|ms| *ms > 0).ok_or_else(
            || {
                JobError::Invalid(vec![Detail {
                    loc: vec!["header".into(), "x-request-timeout-ms".into()],
                    msg: format!("expected milliseconds, a whole number above 0, found {value:?}"),
                    kind: "int_parsing",
                }])
            },
        )?;
    Ok(Deadline(now + Duration::from_millis(milliseconds).min(server.request_timeout_max)))
}

/// The same as milliseconds since 1970, where the request itself says so.
pub(super) fn own_deadline(headers: &HeaderMap, deadline: Deadline) -> Option<u64> {
    headers.get(REQUEST_TIMEOUT)?;
    let left = deadline.0.saturating_duration_since(Instant::now());
    Some(modalkit_journal::unix_ms() + left.as_millis() as u64)
}

/// The name under which a request counts once.
pub(super) fn idempotency_key(headers: &HeaderMap) -> Result<Option<&str>, JobError> {
    let Some(value) = headers.get(IDEMPOTENCY_KEY) else { return Ok(None) };
    match value.to_str() {
        Ok(key) if (1..=IDEMPOTENCY_KEY_BYTES_MAX).contains(&key.len()) => Ok(Some(key)),
        _ => Err(JobError::Invalid(vec![Detail {
            loc: vec!["header".into(), "idempotency-key".into()],
            msg: format!(
                "expected 1 to {IDEMPOTENCY_KEY_BYTES_MAX} visible ASCII characters, found {value:?}"
            ),
            kind: "value_error",
        }])),
    }
}

/// The caller's own trace, where it has one.
pub(super) fn traceparent(headers: &HeaderMap) -> Option<String> {
    let trace = headers.get("traceparent")?.to_str().ok()?;
    (trace.len() == TRACEPARENT_BYTES).then(|| trace.to_owned())
}

/// `model_name` from the query.
pub(super) fn model_name(query: Option<&str>) -> Option<Cow<'_, str>> {
    parameter(query, "model_name")
}

/// A parameter of the query.
pub(super) fn parameter<'q>(query: Option<&'q str>, name: &str) -> Option<Cow<'q, str>> {
    let value = |pair: &'q str| pair.strip_prefix(name)?.strip_prefix('=');
    query?.split('&').find_map(value).map(percent_decoded)
}

/// `%20` and `+` are blanks, as in a query.
pub(super) fn percent_decoded(text: &str) -> Cow<'_, str> {
    if !text.contains(['%', '+']) {
        return Cow::Borrowed(text);
    }
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let escaped = tail
            .get(..2)
            .filter(|_| first == b'%')
            .and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok());
        match escaped {
            Some(byte) => {
                bytes.push(byte);
                rest = &tail[2..];
            }
            None => {
                bytes.push(if first == b'+' { b' ' } else { first });
                rest = tail;
            }
        }
    }
    Cow::Owned(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_model_is_read_from_the_query() {
        assert_eq!(model_name(Some("a=b&model_name=digits")).as_deref(), Some("digits"));
        assert_eq!(model_name(Some("model_name=a%20b+c%2")).as_deref(), Some("a b c%2"));
        assert_eq!(model_name(Some("model=x")), None);
        assert_eq!(model_name(None), None);
    }

    #[test]
    fn a_callers_id_is_kept_and_others_differ() {
        let ids = RequestIds::new();
        let mut headers = HeaderMap::new();
        assert_ne!(ids.of(&headers).to_string(), ids.of(&headers).to_string());
        headers.insert(REQUEST_ID, HeaderValue::from_static("mine"));
        assert_eq!(ids.of(&headers).to_string(), "mine");
        headers.insert(REQUEST_ID, HeaderValue::try_from("x".repeat(129)).unwrap());
        assert!(ids.of(&headers).to_string().len() < 129);
    }
}
