//! Reads the messages of inference calls, one at a time: each within the limits of a body, in time and in bytes, before and after it is decompressed and as
//! what it becomes in memory. All of that is part of the host's budget until its request is answered. Of a stream, each is let in before it is read. It never
//! knows what is inferred.

use std::{future::poll_fn, sync::Arc};

use bytes::Bytes;
use hyper::header::HeaderValue;
use modalkit_proto::ModelInferRequest;
use prost::Message as _;
use tokio::time::{Instant, timeout_at};
use tonic::Status;

use super::{
    body::Incomings,
    call::{Admitted, GrpcCall, NotAdmitted},
    cost,
};
use crate::{
    egress::job_status,
    ingress::{
        content_coding::{Coding, CodingError, Taken, decoded_message},
        exchange::BYTES_FREE,
        peer::Peer,
        predict::infer::elsewhere_if_large,
    },
};

/// A flag, and the message's length in 32 bits.
const HEADER_BYTES: usize = 5;
/// The first room for a larger message; then it doubles.
const FIRST_BYTES: usize = 64 << 10;
/// A message that says it has no more than this is given room for all of it once its first part has come.
const WHOLE_BYTES_MAX: usize = 2 << 20;

/// Reads messages.
pub(super) struct MessageReader {
    incomings: Incomings,
    /// In what messages may be that say that they are compressed.
    coding: Result<Option<Coding>, Status>,
    /// The call whose messages are let in one by one; `None` where all of it was let in.
    admits: Option<Arc<GrpcCall>>,
    /// What has come of the next message, or of more.
    buffer: Vec<u8>,
}

/// A message that has come.
pub(super) enum Next {
    Message(Message),
    /// It was not let in.
    Refused(String, NotAdmitted),
}

/// A request, what it holds of the host's limits, and how much work it is to look at.
pub(super) struct Message {
    pub(super) request: ModelInferRequest,
    pub(super) taken: Taken,
    pub(super) cost: usize,
    /// Of a stream.
    pub(super) admitted: Option<Admitted>,
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
    pub(super) fn new(
        incomings: Incomings,
        coding: Result<Option<Coding>, Status>,
        admits: Option<Arc<GrpcCall>>,
    ) -> Self {
        Self { incomings, coding, admits, buffer: Vec::new() }
    }

    fn peer(&self) -> &Arc<Peer> {
        self.incomings.peer()
    }

    /// The next message; `None` where its sender has sent all.
    pub(super) async fn next(&mut self) -> Result<Option<Next>, Status> {
        let coding = self.coding.clone()?;
        let peer = Arc::clone(self.peer());
        let limit = peer.context.server.body_bytes_max;
        // Before its first byte a message may be waited for as long as its call lasts.
        if self.buffer.is_empty() {
            let Some(data) = self.more(None).await? else { return Ok(None) };
            self.buffer = data.to_vec();
        }
        let ends_at = Instant::now() + peer.context.server.body_timeout;
        let (flag, length) = self.header(ends_at).await?;
        if length > limit {
            return Err(Status::out_of_range(format!(
                "expected a message of at most {limit} bytes (server.body_bytes_max), found {length}"
            )));
        }
        let mut taken = Taken::of(&peer.context.budget);
        let admitted = match self.admits.as_ref().map(|call| call.admit_message()).transpose() {
            Ok(admitted) => admitted,
            Err(refused) => {
                let is_small = flag == 0 && length <= BYTES_FREE;
                let id = if is_small {
                    cost::id_of(&self.body(length, ends_at, &mut taken).await?)
                } else {
                    self.skip(length, ends_at).await?;
                    String::new()
                };
                return Ok(Some(Next::Refused(id, refused)));
            }
        };
        let mut bytes = self.body(length, ends_at, &mut taken).await?;
        match (flag, coding) {
            (0, _) => {}
            (1, Some(coding)) => {
                let decoded = decoded_message(&peer.context, bytes, coding, limit).await;
                (bytes, taken) = decoded.map_err(|error| undecoded(error, limit))?;
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
        let inline_max = peer.context.server.decode_inline_bytes_max;
        let work = if cost::is_quick(&bytes, inline_max) { 0 } else { usize::MAX };
        let decode = move || decode(bytes, taken);
        let (request, taken, cost) =
            elsewhere_if_large(&peer, work, decode).await.map_err(|error| job_status(&error))??;
        Ok(Some(Next::Message(Message { request, taken, cost, admitted })))
    }

    /// Waits until the call's sender has sent all.
    ///
    /// # Errors
    /// Something follows its only message.
    pub(super) async fn end(&mut self) -> Result<(), Status> {
        let ends_at = Instant::now() + self.peer().context.server.body_timeout;
        if self.buffer.is_empty() && self.more(Some(ends_at)).await?.is_none() {
            return Ok(());
        }
        Err(Status::internal("expected one message, found more"))
    }

    /// The flag and the length of the next message.
    async fn header(&mut self, ends_at: Instant) -> Result<(u8, usize), Status> {
        loop {
            if let Some((header, _)) = self.buffer.split_first_chunk::<HEADER_BYTES>() {
                let [flag, length @ ..] = *header;
                return Ok((flag, u32::from_be_bytes(length) as usize));
            }
            let data = self.more_of_message(ends_at).await?;
            self.buffer.extend_from_slice(&data);
        }
    }

    /// The next message's bytes, behind its header.
    async fn body(&mut self, length: usize, ends_at: Instant, taken: &mut Taken) -> Result<Bytes, Status> {
        let total = HEADER_BYTES + length;
        taken.grow_to(self.buffer.capacity()).map_err(|busy| job_status(&busy))?;
        loop {
            if self.buffer.len() >= total {
                // What is left is at most a frame, and doesn't keep the message's room.
                let rest = self.buffer[total..].to_vec();
                self.buffer.truncate(total);
                let message = Bytes::from(std::mem::replace(&mut self.buffer, rest));
                return Ok(message.slice(HEADER_BYTES..));
            }
            let data = self.more_of_message(ends_at).await?;
            self.make_room(data.len(), total, taken)?;
            self.buffer.extend_from_slice(&data);
        }
    }

    /// Takes room for so many bytes that have come of a message, and for more of it, and has that counted.
    fn make_room(&mut self, bytes: usize, total: usize, taken: &mut Taken) -> Result<(), Status> {
        let (come, capacity) = (self.buffer.len(), self.buffer.capacity());
        let needed = come + bytes;
        if needed <= capacity {
            return Ok(());
        }
        let room = if needed >= FIRST_BYTES && total <= WHOLE_BYTES_MAX {
            total.max(needed)
        } else {
            (2 * capacity).max(FIRST_BYTES).min(total).max(needed)
        };
        taken.grow_to(room).map_err(|busy| job_status(&busy))?;
        self.buffer.reserve_exact(room - come);
        Ok(())
    }

    /// Reads over the next message.
    async fn skip(&mut self, length: usize, ends_at: Instant) -> Result<(), Status> {
        let mut left = HEADER_BYTES + length;
        loop {
            let passed = left.min(self.buffer.len());
            self.buffer = self.buffer.split_off(passed);
            left -= passed;
            if left == 0 {
                return Ok(());
            }
            self.buffer = self.more_of_message(ends_at).await?.to_vec();
        }
    }

    async fn more_of_message(&mut self, ends_at: Instant) -> Result<Bytes, Status> {
        let more = self.more(Some(ends_at)).await?;
        more.ok_or_else(|| Status::internal("the body ended within a message"))
    }

    /// What comes next, some bytes at least; `None` at the end.
    async fn more(&mut self, ends_at: Option<Instant>) -> Result<Option<Bytes>, Status> {
        loop {
            let next = poll_fn(|task| self.incomings.poll(task));
            let frame = match ends_at {
                Some(at) => timeout_at(at, next).await.map_err(|_| {
                    let limit = self.peer().context.server.body_timeout;
                    Status::deadline_exceeded(format!(
                        "the message did not arrive within {limit:?} (server.body_timeout_ms)"
                    ))
                })?,
                None => next.await,
            };
            let frame = match frame {
                None => return Ok(None),
                Some(Err(error)) => return Err(Status::cancelled(format!("the body broke off: {error}"))),
                Some(Ok(frame)) => frame,
            };
            let data = frame.into_data().unwrap_or_default();
            if !data.is_empty() {
                return Ok(Some(data));
            }
        }
    }
}

fn decode(bytes: Bytes, mut taken: Taken) -> Result<(ModelInferRequest, Taken, usize), Status> {
    let cost = cost::of_request(&bytes)?;
    taken.grow_to(cost).map_err(|busy| job_status(&busy))?;
    let request = ModelInferRequest::decode(bytes)
        .map_err(|error| Status::internal(format!("expected a ModelInferRequest: {error}")))?;
    Ok((request, taken, cost))
}

fn undecoded(error: CodingError, limit: usize) -> Status {
    match error {
        CodingError::TooLarge => Status::resource_exhausted(format!(
            "expected a message of at most {limit} bytes once it is decompressed (server.body_bytes_max)"
        )),
        CodingError::NoRoom(busy) => job_status(&busy),
        CodingError::Broken(reason) => {
            Status::internal(format!("the message isn't compressed as grpc-encoding says: {reason}"))
        }
        CodingError::Unknown(found) => Status::unimplemented(found),
    }
}
