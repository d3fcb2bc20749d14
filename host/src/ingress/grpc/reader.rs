//! Reads the messages of inference calls, one at a time: each within the limits of a body, in time and in bytes, before and after it is decompressed and as
//! what it becomes in memory. All of that is part of the host's budget until its request is answered. It never knows what is inferred.

use std::{future::poll_fn, sync::Arc};

use bytes::{Buf, Bytes, BytesMut};
use hyper::header::HeaderValue;
use modalkit_proto::ModelInferRequest;
use prost::Message as _;
use tokio::time::{Instant, timeout_at};
use tonic::Status;

use super::{body::Incomings, cost};
use crate::{
    egress::job_status,
    ingress::{
        content_coding::{Coding, CodingError, Taken, decoded_message},
        peer::Peer,
        predict::infer::elsewhere_if_large,
    },
};

/// A flag, and the message's length in 32 bits.
const HEADER_BYTES: usize = 5;
/// A message that says it has no more than this is given room for all of it at once.
const WHOLE_BYTES_MAX: usize = 2 << 20;

/// Reads messages.
pub(super) struct MessageReader {
    incomings: Incomings,
    /// In what messages may be that say that they are compressed.
    coding: Result<Option<Coding>, Status>,
    /// What has come of the next message, or of more.
    buffer: BytesMut,
}

/// A request, what it holds of the budget, and how much work it is to look at.
pub(super) struct Message {
    pub(super) request: ModelInferRequest,
    pub(super) taken: Taken,
    pub(super) cost: usize,
}

/// That of a call's messages.
pub(super) fn coding_of(encoding: Option<&HeaderValue>) -> Result<Option<Coding>, Status> {
    match encoding.map(HeaderValue::as_bytes) {
        None | Some(b"identity") => Ok(None),
        Some(b"gzip") => Ok(Some(Coding::Gzip)),
        Some(b"deflate") => Ok(Some(Coding::Deflate)),
        Some(other) => {
            let found = String::from_utf8_lossy(other);
            let mut status = Status::unimplemented(format!(
                "expected the grpc-encoding identity, gzip or deflate, found {found:?}"
            ));
            status.metadata_mut().insert("grpc-accept-encoding", super::accepted());
            Err(status)
        }
    }
}

impl MessageReader {
    pub(super) fn new(incomings: Incomings, coding: Result<Option<Coding>, Status>) -> Self {
        Self { incomings, coding, buffer: BytesMut::new() }
    }

    fn peer(&self) -> &Arc<Peer> {
        self.incomings.peer()
    }

    /// The next message; `None` where its sender has sent all.
    pub(super) async fn next(&mut self) -> Result<Option<Message>, Status> {
        let coding = self.coding.clone()?;
        let peer = Arc::clone(self.peer());
        let limit = peer.context.server.body_bytes_max;
        let mut taken = Taken::of(&peer.context.budget);
        let Some((flag, mut bytes)) = self.whole(limit, &mut taken).await? else { return Ok(None) };
        match (flag, coding) {
            (0, _) => {}
            (1, Some(coding)) => {
                let decoded = decoded_message(&peer.context, bytes, coding, limit).await;
                (bytes, taken) = decoded.map_err(|error| match error {
                    CodingError::TooLarge => Status::resource_exhausted(format!(
                        "expected a message of at most {limit} bytes once it is decompressed (server.body_bytes_max)"
                    )),
                    CodingError::NoRoom(busy) => job_status(&busy),
                    CodingError::Broken(reason) => {
                        Status::internal(format!("the message isn't compressed as grpc-encoding says: {reason}"))
                    }
                    CodingError::Unknown(found) => Status::unimplemented(found),
                })?;
            }
            (1, None) => {
                return Err(Status::internal("the message is compressed, and grpc-encoding doesn't say how"));
            }
            (other, _) => {
                return Err(Status::internal(format!(
                    "expected the flag 0 or 1 before a message, found {other}"
                )));
            }
        }
        let cost = cost::of_request(&bytes)?;
        taken.grow_to(cost).map_err(|busy| job_status(&busy))?;
        let decoded = elsewhere_if_large(&peer, cost.saturating_sub(bytes.len()), move || {
            ModelInferRequest::decode(bytes)
        });
        let decoded = decoded.await.map_err(|error| job_status(&error))?;
        let request =
            decoded.map_err(|error| Status::internal(format!("expected a ModelInferRequest: {error}")))?;
        Ok(Some(Message { request, taken, cost }))
    }

    /// The flag and the bytes of the next message.
    async fn whole(&mut self, limit: usize, taken: &mut Taken) -> Result<Option<(u8, Bytes)>, Status> {
        let body_timeout = self.peer().context.server.body_timeout;
        // From when its first bytes have come.
        let mut ends_at = None;
        loop {
            let length = header(&self.buffer).map(|(_, length)| length);
            if let Some(length) = length {
                if length > limit {
                    return Err(too_large(length, limit));
                }
                let total = HEADER_BYTES + length;
                if self.buffer.len() >= total {
                    let mut message = self.buffer.split_to(total).freeze();
                    if self.buffer.is_empty() {
                        // Its room is the message's.
                        self.buffer = BytesMut::new();
                    }
                    let flag = message.get_u8();
                    message.advance(HEADER_BYTES - 1);
                    return Ok(Some((flag, message)));
                }
                let known = self.buffer.capacity();
                if total > known {
                    let room = if total <= WHOLE_BYTES_MAX { total } else { total.min(2 * known) };
                    taken.grow_to(room).map_err(|busy| job_status(&busy))?;
                    self.buffer.reserve(room - self.buffer.len());
                }
            }
            if !self.buffer.is_empty() && ends_at.is_none() {
                ends_at = Some(Instant::now() + body_timeout);
            }
            let next = poll_fn(|task| self.incomings.poll(task));
            let frame = match ends_at {
                Some(at) => timeout_at(at, next).await.map_err(|_| {
                    Status::deadline_exceeded(format!(
                        "the message did not arrive within {body_timeout:?} (server.body_timeout_ms)"
                    ))
                })?,
                None => next.await,
            };
            let data = match frame {
                None if self.buffer.is_empty() => return Ok(None),
                None => return Err(Status::internal("the body ended within a message")),
                Some(Err(error)) => return Err(Status::cancelled(format!("the body broke off: {error}"))),
                Some(Ok(frame)) => frame.into_data().unwrap_or_default(),
            };
            if self.buffer.is_empty()
                && let Some((flag, length)) = header(&data)
                && data.len() == HEADER_BYTES + length
                && length <= limit
            {
                // It came alone and in one piece.
                taken.grow_to(data.len()).map_err(|busy| job_status(&busy))?;
                return Ok(Some((flag, data.slice(HEADER_BYTES..))));
            }
            self.buffer.extend_from_slice(&data);
        }
    }
}

fn header(bytes: &[u8]) -> Option<(u8, usize)> {
    let (header, _) = bytes.split_first_chunk::<HEADER_BYTES>()?;
    let [flag, length @ ..] = *header;
    Some((flag, u32::from_be_bytes(length) as usize))
}

fn too_large(found: usize, limit: usize) -> Status {
    Status::out_of_range(format!(
        "expected a message of at most {limit} bytes (server.body_bytes_max), found {found}"
    ))
}
