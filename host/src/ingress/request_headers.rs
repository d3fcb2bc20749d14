//! What a request's headers say of it: id, deadline, idempotency key, trace.

use std::{
    num::IntErrorKind,
    ops::Deref,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use bytes::Bytes;
use hyper::{
    HeaderMap, StatusCode,
    header::{CONTENT_TYPE, HeaderName, HeaderValue},
    http::request::Parts,
};

use crate::{
    access::Shown,
    config::Server,
    egress::HttpResponse,
    protocol::v2::JSON_BYTES_HEADER,
    work::{Deadline, Detail, JobError, RequestId},
};

const JSON: HeaderValue = HeaderValue::from_static("application/json");
/// Names a request in logs and answers.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// The name under which a request counts once, however often it is sent.
const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
/// The longest idempotency key.
const IDEMPOTENCY_KEY_BYTES_MAX: usize = 255;
/// The length of a `traceparent` of version 00.
const TRACEPARENT_BYTES: usize = 55;
/// A request's map of more headers is not kept: connections hold on to what they answered with last.
const HEADERS_KEPT_MAX: usize = 32;
/// The longest id that is taken over from a caller.
const REQUEST_ID_BYTES_MAX: usize = 128;

/// A request without its body.
pub(super) struct Head<'a> {
    parts: &'a Parts,
    pub(super) known: Known<'a>,
}

impl<'a> Head<'a> {
    pub(super) fn of(parts: &'a Parts) -> Self {
        Self { parts, known: Known::of(&parts.headers) }
    }
}

impl Deref for Head<'_> {
    type Target = Parts;

    fn deref(&self) -> &Parts {
        self.parts
    }
}

/// The headers that are looked at in every request, found in one walk through them: each look by name hashes it. Of several of one
/// name it is the first.
#[derive(Clone, Copy, Default)]
pub(super) struct Known<'a> {
    pub(super) host: Option<&'a HeaderValue>,
    pub(super) origin: Option<&'a HeaderValue>,
    pub(super) sec_fetch_site: Option<&'a HeaderValue>,
    pub(super) request_id: Option<&'a HeaderValue>,
    /// Milliseconds after which the caller doesn't want the answer any more.
    pub(super) request_timeout: Option<&'a HeaderValue>,
    /// Asks where the time went.
    pub(super) explain: Option<&'a HeaderValue>,
    /// In what the answer may be compressed.
    pub(super) accept_encoding: Option<&'a HeaderValue>,
}

impl<'a> Known<'a> {
    pub(super) fn of(headers: &'a HeaderMap) -> Self {
        let mut known = Self::default();
        for (name, value) in headers {
            let place = match name.as_str() {
                "host" => &mut known.host,
                "origin" => &mut known.origin,
                "sec-fetch-site" => &mut known.sec_fetch_site,
                "x-request-id" => &mut known.request_id,
                "x-request-timeout-ms" => &mut known.request_timeout,
                "x-modalkit-explain" => &mut known.explain,
                "accept-encoding" => &mut known.accept_encoding,
                _ => continue,
            };
            place.get_or_insert(value);
        }
        known
    }
}

/// Makes ids: a random number of this process, and a counter.
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
    pub(super) fn of(&self, known: &Known<'_>) -> RequestId {
        let fit = |id: &&HeaderValue| (1..=REQUEST_ID_BYTES_MAX).contains(&id.len()) && id.to_str().is_ok();
        known.request_id.filter(fit).map_or_else(
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

/// Where the JSON part of a request of the Open Inference Protocol ends, in its body out of its coding; `None` where it is all JSON.
///
/// # Errors
/// [`JobError::Invalid`] where that is no number.
pub(super) fn json_bytes(headers: &HeaderMap) -> Result<Option<usize>, JobError> {
    let invalid = |msg: String| {
        let loc = vec!["header".into(), JSON_BYTES_HEADER.into()];
        JobError::Invalid(vec![Detail { loc, msg, kind: "value_error".into() }])
    };
    let Some(value) = headers.get(JSON_BYTES_HEADER) else { return Ok(None) };
    let number = value.to_str().ok().and_then(|text| text.trim().parse().ok());
    number
        .map(Some)
        .ok_or_else(|| invalid(format!("expected the number of bytes of the JSON part, found {value:?}")))
}

/// Gives an answer the headers that every answer has: its id and its type. They are put into the request's own map, which is there
/// already and is no longer needed.
pub(super) fn put_headers(response: &mut HttpResponse, id: &RequestId, mut of_request: HeaderMap) {
    if of_request.capacity() > HEADERS_KEPT_MAX {
        of_request = HeaderMap::new();
    }
    of_request.clear();
    let is_empty = matches!(response.status(), StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
    let own = std::mem::replace(response.headers_mut(), of_request);
    let headers = response.headers_mut();
    if !is_empty {
        headers.insert(CONTENT_TYPE, JSON);
    }
    for (name, value) in own {
        // One without a name would be a second value of the name before: no answer has any.
        if let Some(name) = name {
            headers.insert(name, value);
        }
    }
    put_id(id, headers);
}

pub(super) fn put_id(id: &RequestId, headers: &mut HeaderMap) {
    let value = match id {
        RequestId::Given(bytes) => HeaderValue::from_maybe_shared(bytes.clone()),
        RequestId::Made { process, number } => {
            let mut buffer = [0; RequestId::MADE_BYTES_MAX];
            HeaderValue::from_bytes(RequestId::write(*process, *number, &mut buffer))
        }
    };
    // One that isn't fit for a header was never taken over.
    if let Ok(mut value) = value {
        // HTTP/2 would keep each in its table of headers, and look through all of them at the next: none comes again.
        value.set_sensitive(true);
        headers.insert(REQUEST_ID, value);
    }
}

/// The moment after which nobody wants the answer.
pub(super) fn deadline(known: &Known<'_>, server: &Server, now: Instant) -> Result<Deadline, JobError> {
    let Some(value) = known.request_timeout else { return Ok(Deadline(now + server.request_timeout)) };
    let text = value.to_str().unwrap_or_default().trim();
    let milliseconds = match text.parse::<u64>() {
        Ok(milliseconds) if milliseconds > 0 => milliseconds,
        // Longer than any request may take is as long as one may.
        Err(error) if *error.kind() == IntErrorKind::PosOverflow => u64::MAX,
        _ => {
            return Err(JobError::Invalid(vec![Detail {
                loc: vec!["header".into(), "x-request-timeout-ms".into()],
                msg: format!("expected milliseconds, a whole number above 0, found {value:?}"),
                kind: "int_parsing".into(),
            }]));
        }
    };
    Ok(Deadline(now + Duration::from_millis(milliseconds).min(server.request_timeout_max)))
}

/// The deadline in milliseconds since 1970, where the caller has set one.
pub(super) fn own_deadline(known: &Known<'_>, deadline: Deadline) -> Option<u64> {
    known.request_timeout?;
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
            kind: "value_error".into(),
        }])),
    }
}

/// The caller's own trace, where it has one.
pub(super) fn traceparent(headers: &HeaderMap) -> Option<String> {
    let trace = headers.get("traceparent")?.to_str().ok()?;
    (trace.len() == TRACEPARENT_BYTES).then(|| trace.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_callers_id_is_kept_and_others_differ() {
        let ids = RequestIds::new();
        let mut headers = HeaderMap::new();
        let id = |headers: &HeaderMap| ids.of(&Known::of(headers)).to_string();
        assert_ne!(id(&headers), id(&headers));
        headers.insert(REQUEST_ID, HeaderValue::from_static("mine"));
        assert_eq!(id(&headers), "mine");
        headers.insert(REQUEST_ID, HeaderValue::try_from("x".repeat(129)).unwrap());
        assert!(id(&headers).len() < 129);
    }

    #[test]
    fn an_id_that_was_made_is_written_as_it_is_shown() {
        for (process, number) in [(0, 0), (0x1f, 16), (u32::MAX, u64::MAX)] {
            let mut headers = HeaderMap::new();
            put_id(&RequestId::Made { process, number }, &mut headers);
            assert_eq!(headers[REQUEST_ID], format!("{process:08x}-{number:x}"));
        }
    }

    #[test]
    fn of_several_headers_of_one_name_the_first_counts() {
        let mut headers = HeaderMap::new();
        for value in ["first", "second"] {
            headers.append(REQUEST_ID, HeaderValue::from_static(value));
        }
        headers.insert("x-other", HeaderValue::from_static("x"));
        let known = Known::of(&headers);
        assert_eq!(known.request_id.unwrap(), "first");
        assert!(known.host.is_none() && known.explain.is_none());
    }
}
