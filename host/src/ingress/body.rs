//! Reads a request's body within its limits of size and time.

use std::{convert::Infallible, time::Duration};

use bytes::{Bytes, BytesMut};
use futures_util::FutureExt;
use http_body_util::BodyExt;
use hyper::{
    StatusCode,
    body::{Body, Frame, Incoming},
};
use serde_json::json;
use tokio::time::timeout;

use crate::{
    config::Server,
    egress::{HttpResponse, and_close, error, object_response},
    job::JobError,
};

/// A body over the limit is read on for this long and this far, so that the caller gets to read the answer: a
/// connection that closes over unread bytes resets it.
const DRAIN_TIME_MAX: Duration = Duration::from_secs(1);
const DRAIN_BYTES_MAX: usize = 64 << 20;

/// Why there is no body; each ends the connection.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum BodyError {
    TooLarge { limit: usize },
    TooSlow { limit: Duration },
    Broken(String),
}

impl BodyError {
    pub(super) fn into_response(self) -> HttpResponse {
        and_close(match self {
            Self::TooLarge { limit } => error(&JobError::TooLarge(format!(
                "expected a body of at most {limit} bytes (server.body_bytes_max)"
            ))),
            Self::TooSlow { limit } => {
                let detail = format!("the body did not arrive within {limit:?} (server.body_timeout_ms)");
                object_response(StatusCode::REQUEST_TIMEOUT, &json!({"detail": detail}))
            }
            Self::Broken(reason) => object_response(
                StatusCode::BAD_REQUEST,
                &json!({"detail": format!("the body broke off: {reason}")}),
            ),
        })
    }
}

/// The whole body. One that came together with its headers is passed on without a copy and without a timer.
pub(super) async fn read(mut body: Incoming, server: &Server) -> Result<Bytes, BodyError> {
    let limit = server.body_bytes_max;
    let declared = usize::try_from(body.size_hint().lower()).unwrap_or(usize::MAX);
    if declared <= limit && body.is_end_stream() {
        return Ok(Bytes::new());
    }
    let first = if declared <= limit { body.frame().now_or_never() } else { None };
    if let Some(Some(Ok(frame))) = &first
        && let Some(whole) = frame.data_ref()
        && body.is_end_stream()
        && whole.len() <= limit
    {
        return Ok(whole.clone());
    }
    Box::pin(read_on(body, first.flatten(), declared, server)).await
}

/// The rest of a body that comes in pieces.
async fn read_on(
    mut body: Incoming,
    first: Option<hyper::Result<Frame<Bytes>>>,
    declared: usize,
    server: &Server,
) -> Result<Bytes, BodyError> {
    let limit = server.body_bytes_max;
    if declared > limit {
        return Err(refuse(body, limit).await);
    }
    let slow = |_| BodyError::TooSlow { limit: server.body_timeout };
    let collected = collect(&mut body, first, declared, limit);
    match timeout(server.body_timeout, collected).await.map_err(slow)?? {
        Some(whole) => Ok(whole),
        None => Err(refuse(body, limit).await),
    }
}

/// `None` where there is more than the limit.
async fn collect(
    body: &mut Incoming,
    first: Option<hyper::Result<Frame<Bytes>>>,
    declared: usize,
    limit: usize,
) -> Result<Option<Bytes>, BodyError> {
    let mut whole = BytesMut::with_capacity(declared);
    if let Some(first) = first {
        let frame = first.map_err(|error| BodyError::Broken(error.to_string()))?;
        whole.extend_from_slice(frame.data_ref().map_or(&[], |data| data));
    }
    while whole.len() <= limit {
        match next(body).await? {
            Some(data) => whole.extend_from_slice(&data),
            None => return Ok(Some(whole.freeze())),
        }
    }
    Ok(None)
}

/// The next piece of data; `None` at the end.
async fn next(body: &mut Incoming) -> Result<Option<Bytes>, BodyError> {
    loop {
        match body.frame().await {
            None => return Ok(None),
            Some(Err(error)) => return Err(BodyError::Broken(error.to_string())),
            // Trailers are passed over.
            Some(Ok(frame)) => {
                if let Ok(data) = frame.into_data() {
                    return Ok(Some(data));
                }
            }
        }
    }
}

async fn refuse(mut body: Incoming, limit: usize) -> BodyError {
    let drain = async {
        let mut drained = 0;
        while let Ok(Some(data)) = next(&mut body).await {
            drained += data.len();
            if drained > DRAIN_BYTES_MAX {
                break;
            }
        }
        Ok::<(), Infallible>(())
    };
    // Whether it was drained to its end or not, the answer is the same.
    let _ = timeout(DRAIN_TIME_MAX, drain).await;
    BodyError::TooLarge { limit }
}
