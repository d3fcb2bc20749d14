//! Reads a request's body within its limits of size and time. What is refused is left where it is: the answer goes out at once, and the
//! connection's end lets the caller finish.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::FutureExt;
use http_body_util::BodyExt;
use hyper::{
    HeaderMap, StatusCode,
    body::{Body, Frame, Incoming},
    header::ACCEPT_ENCODING,
};
use modalkit_engine::TENSOR_ALIGNMENT;
use serde_json::json;
use tokio::time::timeout;

use super::{
    content_coding::{self, ACCEPTED, CodingError},
    exchange::{BYTES_FREE, Exchange},
};
use crate::{
    access::ConcurrencyPermit,
    egress::{HttpResponse, and_close, error, object_response},
    work::JobError,
};

/// The first part of the budget that a larger body takes; then it doubles.
const FIRST_BYTES: usize = 64 << 10;
/// A body that says it has no more than this is given room for all of it once its first part has come: as much for each of a thousand requests as
/// any machine has addresses for.
const WHOLE_BYTES_MAX: usize = 2 << 20;

/// A request's body, as far as it has come.
pub(super) struct RequestBody {
    incoming: Incoming,
    is_read: bool,
}

impl RequestBody {
    pub(super) fn new(incoming: Incoming) -> Self {
        Self { incoming, is_read: false }
    }

    /// Whether its end was read. What follows it on the connection can be read only then.
    pub(super) fn is_read(&self) -> bool {
        self.is_read || self.incoming.is_end_stream()
    }

    /// The next piece of data; `None` at the end.
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, BodyError> {
        loop {
            match self.incoming.frame().await {
                None => {
                    self.is_read = true;
                    return Ok(None);
                }
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
}

/// The body of a request that runs no pipeline, which is small: on its way, or read before.
pub(super) enum SmallBody<'b> {
    Incoming(&'b Exchange, &'b mut RequestBody),
    Read(Bytes),
}

/// Bytes of such a body.
const SMALL_BYTES_MAX: usize = 64 << 10;

impl SmallBody<'_> {
    /// What takes part in the limits of requests, where it came over the network.
    pub(super) fn exchange(&self) -> Option<&Exchange> {
        match self {
            Self::Incoming(exchange, _) => Some(exchange),
            Self::Read(_) => None,
        }
    }

    /// Holds a permit among a key's calls.
    pub(super) fn keep(&self, permit: Option<&Arc<ConcurrencyPermit>>) {
        if let Some(exchange) = self.exchange() {
            exchange.keep(permit);
        }
    }

    /// All of it.
    pub(super) async fn read(self, headers: &HeaderMap) -> Result<Bytes, BodyError> {
        match self {
            Self::Incoming(exchange, body) => {
                if body.incoming.size_hint().lower() > SMALL_BYTES_MAX as u64 {
                    return Err(BodyError::NotSmall);
                }
                let read = read_within(body, headers, None, SMALL_BYTES_MAX, exchange).await;
                read.map_err(|error| match error {
                    BodyError::TooLarge { .. } | BodyError::Coding(CodingError::TooLarge) => {
                        BodyError::NotSmall
                    }
                    other => other,
                })
            }
            Self::Read(bytes) => match content_coding::of_headers(headers).map_err(BodyError::Coding)? {
                None if bytes.len() <= SMALL_BYTES_MAX => Ok(bytes),
                None => Err(BodyError::NotSmall),
                // Nobody compresses what goes over a socket of this machine.
                Some(coding) => Err(BodyError::Coding(CodingError::Unknown(coding.name().to_owned()))),
            },
        }
    }
}

/// Why there is no body; each ends the connection.
#[derive(Debug)]
pub(super) enum BodyError {
    TooLarge {
        limit: usize,
    },
    /// It is larger than that of a request which runs no pipeline.
    NotSmall,
    NoRoom(JobError),
    TooSlow {
        limit: Duration,
    },
    Broken(String),
    Coding(CodingError),
}

impl BodyError {
    pub(super) fn into_response(self) -> HttpResponse {
        and_close(match self {
            Self::TooLarge { limit } => error(&JobError::TooLarge(format!(
                "expected a body of at most {limit} bytes (server.body_bytes_max)"
            ))),
            Self::NotSmall => error(&JobError::TooLarge(format!(
                "expected a body of at most {SMALL_BYTES_MAX} bytes, since this path runs no pipeline"
            ))),
            Self::NoRoom(busy) => error(&busy),
            Self::TooSlow { limit } => {
                let detail = format!("the body did not arrive within {limit:?} (server.body_timeout_ms)");
                object_response(StatusCode::REQUEST_TIMEOUT, &json!({"detail": detail}))
            }
            Self::Coding(CodingError::TooLarge) => error(&JobError::TooLarge(
                "expected a body that is at most server.body_bytes_max long once it is decompressed".into(),
            )),
            Self::Coding(CodingError::NoRoom(busy)) => error(&busy),
            Self::Coding(CodingError::Broken(reason)) => object_response(
                StatusCode::BAD_REQUEST,
                &json!({"detail": format!("the body isn't compressed as its content-encoding says: {reason}")}),
            ),
            Self::Coding(CodingError::Unknown(found)) => {
                let detail = format!(
                    "expected the content-encoding gzip, deflate or zstd, or none (over the management socket none), found {found:?}"
                );
                let mut response =
                    object_response(StatusCode::UNSUPPORTED_MEDIA_TYPE, &json!({"detail": detail}));
                response.headers_mut().insert(ACCEPT_ENCODING, ACCEPTED);
                response
            }
            Self::Broken(reason) => object_response(
                StatusCode::BAD_REQUEST,
                &json!({"detail": format!("the body broke off: {reason}")}),
            ),
        })
    }
}

/// The whole body, out of its coding. As [`read`].
pub(super) async fn read_decoded(
    body: &mut RequestBody,
    headers: &HeaderMap,
    aligned_at: Option<usize>,
    exchange: &Exchange,
) -> Result<Bytes, BodyError> {
    read_within(body, headers, aligned_at, exchange.context.server.body_bytes_max, exchange).await
}

/// The same, of so many bytes at most, before and after.
async fn read_within(
    body: &mut RequestBody,
    headers: &HeaderMap,
    aligned_at: Option<usize>,
    limit: usize,
    exchange: &Exchange,
) -> Result<Bytes, BodyError> {
    let coding = content_coding::of_headers(headers).map_err(BodyError::Coding)?;
    // Where a coding is taken off, nothing lies where it lay.
    let read = read(body, aligned_at.filter(|_| coding.is_none()), limit, exchange).await?;
    content_coding::decoded(read, coding, limit, exchange).await.map_err(BodyError::Coding)
}

/// The whole body. One that came together with its headers is passed on without a copy and without a timer. Of one that comes in pieces and has said
/// its length, what stands from `aligned_at` on lies where a tensor's bytes should.
async fn read(
    body: &mut RequestBody,
    aligned_at: Option<usize>,
    limit: usize,
    exchange: &Exchange,
) -> Result<Bytes, BodyError> {
    let incoming = &mut body.incoming;
    let declared = usize::try_from(incoming.size_hint().lower()).unwrap_or(usize::MAX);
    if declared > limit {
        // The body isn't polled: hyper would answer `expect: 100-continue` with 100.
        return Err(BodyError::TooLarge { limit });
    }
    if incoming.is_end_stream() {
        return Ok(Bytes::new());
    }
    let first = incoming.frame().now_or_never();
    if let Some(Some(Ok(frame))) = &first
        && let Some(whole) = frame.data_ref()
        && incoming.is_end_stream()
        && whole.len() <= limit
    {
        if whole.len() > BYTES_FREE {
            exchange.take_bytes(whole.len()).map_err(BodyError::NoRoom)?;
        }
        return Ok(whole.clone());
    }
    Box::pin(read_on(body, first.flatten(), declared, aligned_at, limit, exchange)).await
}

/// The rest of a body that comes in pieces.
async fn read_on(
    body: &mut RequestBody,
    first: Option<hyper::Result<Frame<Bytes>>>,
    declared: usize,
    aligned_at: Option<usize>,
    limit: usize,
    exchange: &Exchange,
) -> Result<Bytes, BodyError> {
    let server = &exchange.context.server;
    let slow = |_| BodyError::TooSlow { limit: server.body_timeout };
    let whole = Collected { bytes: Vec::new(), before: 0, taken: 0, declared, aligned_at, limit, exchange };
    timeout(server.body_timeout, collect(body, first, whole)).await.map_err(slow)?
}

async fn collect(
    body: &mut RequestBody,
    first: Option<hyper::Result<Frame<Bytes>>>,
    mut whole: Collected<'_>,
) -> Result<Bytes, BodyError> {
    if let Some(first) = first {
        let frame = first.map_err(|error| BodyError::Broken(error.to_string()))?;
        whole.add(frame.data_ref().map_or(&[], |data| data))?;
    }
    while let Some(data) = body.next().await? {
        whole.add(&data)?;
    }
    let Collected { bytes, before, .. } = whole;
    Ok(Bytes::from(bytes).slice(before..))
}

/// What has come of a body. It takes its part of the budget as bytes come. Room for what a caller declares is taken as bytes come as well, but for
/// bodies up to [`WHOLE_BYTES_MAX`].
struct Collected<'e> {
    bytes: Vec<u8>,
    /// Bytes that stand before those of the body, so that they lie where they should.
    before: usize,
    /// Of the budget.
    taken: usize,
    declared: usize,
    aligned_at: Option<usize>,
    limit: usize,
    exchange: &'e Exchange,
}

impl Collected<'_> {
    fn add(&mut self, data: &[u8]) -> Result<(), BodyError> {
        let needed = self.bytes.len() - self.before + data.len();
        if needed > self.limit {
            return Err(BodyError::TooLarge { limit: self.limit });
        }
        let known = self.declared >= needed;
        let most = if known { self.declared } else { self.limit };
        if needed > BYTES_FREE && needed > self.taken {
            let grown = needed.max(2 * self.taken).max(FIRST_BYTES).min(most);
            self.exchange.take_bytes(grown - self.taken).map_err(BodyError::NoRoom)?;
            self.taken = grown;
        }
        let capacity = self.bytes.capacity() - self.before;
        if needed > capacity {
            let room = if needed <= BYTES_FREE {
                BYTES_FREE.min(most)
            } else if needed <= FIRST_BYTES {
                FIRST_BYTES.min(most)
            } else if known && self.declared <= WHOLE_BYTES_MAX {
                // What is there needn't be moved again and again.
                self.declared
            } else {
                needed.max(2 * capacity).min(most)
            };
            match self.aligned_at {
                // It won't move any more.
                Some(place) if room == self.declared => {
                    (self.bytes, self.before) = moved(&self.bytes[self.before..], room, place);
                }
                _ => self.bytes.reserve_exact(room - (self.bytes.len() - self.before)),
            }
        }
        self.bytes.extend_from_slice(data);
        Ok(())
    }
}

/// The same bytes with room for so many, of which the one at this place is aligned; and how many stand before them.
fn moved(bytes: &[u8], room: usize, place: usize) -> (Vec<u8>, usize) {
    let mut moved = Vec::with_capacity(room + TENSOR_ALIGNMENT);
    // A caller may have named a place that no body has.
    let (begin, place) = (moved.as_ptr() as usize, place % TENSOR_ALIGNMENT);
    let before = (begin + place).next_multiple_of(TENSOR_ALIGNMENT) - place - begin;
    moved.resize(before, 0);
    moved.extend_from_slice(bytes);
    (moved, before)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_is_moved_to_where_a_place_of_it_is_aligned() {
        for place in [0, 1, 63, 64, 65, 160, usize::MAX] {
            let whole: Vec<u8> = (0..200).collect();
            let mut pieces = whole.chunks(70);
            let mut bytes = pieces.next().unwrap().to_vec();
            let mut before = 0;
            for piece in pieces {
                (bytes, before) = moved(&bytes[before..], 200, place);
                bytes.extend_from_slice(piece);
            }
            assert_eq!(bytes[before..], whole);
            let address = (bytes[before..].as_ptr() as usize).wrapping_add(place);
            assert_eq!(address % TENSOR_ALIGNMENT, 0, "{place}");
            assert!(before < TENSOR_ALIGNMENT);
        }
    }
}
