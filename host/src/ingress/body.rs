//! Reads a request's body within its limits of size and time.

use std::{convert::Infallible, time::Duration};

use bytes::Bytes;
use futures_util::FutureExt;
use http_body_util::BodyExt;
use hyper::{
    StatusCode,
    body::{Body, Frame, Incoming},
};
use serde_json::json;
use tokio::time::timeout;

use super::exchange::{BYTES_FREE, Exchange};
use crate::{
    egress::{HttpResponse, and_close, error, object_response},
    job::JobError,
};

/// A body over the limit is read on for this long and this far, so that the caller gets to read the answer: a
/// connection that closes over unread bytes resets it.
const DRAIN_TIME_MAX: Duration = Duration::from_secs(1);
const DRAIN_BYTES_MAX: usize = 64 << 20;
/// The first part of the budget that a larger body takes; then it doubles.
const FIRST_BYTES: usize = 64 << 10;

/// Why there is no body; each ends the connection.
#[derive(Debug)]
pub(super) enum BodyError {
    TooLarge { limit: usize },
    NoRoom(JobError),
    TooSlow { limit: Duration },
    Broken(String),
}

impl BodyError {
    pub(super) fn into_response(self) -> HttpResponse {
        and_close(match self {
            Self::TooLarge { limit } => error(&JobError::TooLarge(format!(
                "expected a body of at most {limit} bytes (server.body_bytes_max)"
            ))),
            Self::NoRoom(busy) => error(&busy),
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
pub(super) async fn read(mut body: Incoming, exchange: &Exchange) -> Result<Bytes, BodyError> {
    let limit = exchange.context.server.body_bytes_max;
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
        if whole.len() > BYTES_FREE {
            exchange.take_bytes(whole.len()).map_err(BodyError::NoRoom)?;
        }
        return Ok(whole.clone());
    }
    Box::pin(read_on(body, first.flatten(), declared, exchange)).await
}

/// The rest of a body that comes in pieces.
async fn read_on(
    mut body: Incoming,
    first: Option<hyper::Result<Frame<Bytes>>>,
    declared: usize,
    exchange: &Exchange,
) -> Result<Bytes, BodyError> {
    let server = &exchange.context.server;
    let limit = server.body_bytes_max;
    if declared > limit {
        return Err(refuse(body, BodyError::TooLarge { limit }).await);
    }
    let slow = |_| BodyError::TooSlow { limit: server.body_timeout };
    let whole = Collected { bytes: Vec::new(), taken: 0, declared, limit, exchange };
    match timeout(server.body_timeout, collect(&mut body, first, whole)).await.map_err(slow)? {
        Err(error @ (BodyError::TooLarge { .. } | BodyError::NoRoom(_))) => Err(refuse(body, error).await),
        collected => collected,
    }
}

async fn collect(
    body: &mut Incoming,
    first: Option<hyper::Result<Frame<Bytes>>>,
    mut whole: Collected<'_>,
) -> Result<Bytes, BodyError> {
    if let Some(first) = first {
        let frame = first.map_err(|error| BodyError::Broken(error.to_string()))?;
        whole.add(frame.data_ref().map_or(&[], |data| data))?;
    }
    while let Some(data) = next(body).await? {
        whole.add(&data)?;
    }
    Ok(whole.bytes.into())
}

/// What has come of a body. It takes memory, and its part of the budget, as bytes come: what a caller declares costs nothing.
struct Collected<'e> {
    bytes: Vec<u8>,
    /// Of the budget.
    taken: usize,
    declared: usize,
    limit: usize,
    exchange: &'e Exchange,
}

impl Collected<'_> {
    fn add(&mut self, data: &[u8]) -> Result<(), BodyError> {
        let needed = self.bytes.len() + data.len();
        if needed > self.limit {
            return Err(BodyError::TooLarge { limit: self.limit });
        }
        let capacity = self.bytes.capacity();
        if needed > capacity {
            let least = if needed <= BYTES_FREE { BYTES_FREE } else { FIRST_BYTES };
            let most = if self.declared >= needed { self.declared } else { self.limit };
            let grown = needed.max(2 * capacity).max(least).min(most);
            if grown > BYTES_FREE {
                self.exchange.take_bytes(grown - self.taken).map_err(BodyError::NoRoom)?;
                self.taken = grown;
            }
            self.bytes.reserve_exact(grown - self.bytes.len());
        }
        self.bytes.extend_from_slice(data);
        Ok(())
    }
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

/// Lets the caller finish for a while, so that it reads why it is refused.
async fn refuse(mut body: Incoming, error: BodyError) -> BodyError {
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
    error
}
