//! What the items of frames say: inputs, outputs, failures and rejections, in the engine's types and as statuses and payloads. Whatever comes
//! may have been written by anybody: each reading can fail.

use std::sync::Arc;

use bytes::Bytes;
use modalkit_engine::{
    ChunkResult, Datatype, Failure, FailureKind, InputFault, Interest, Measure, Outcome, PathSegment,
    Payload, Rejection, Tensor,
};
use serde::{Deserialize, Serialize};

use crate::{
    channel::{Item, Outgoing},
    frame::{Garbage, aligned},
};

/// A payload: an input, or an output.
pub(crate) const PAYLOAD: u16 = 0;
/// Of failures, to which the number of their kind is added.
const FAILED: u16 = 16;
/// Of rejections because of a failure, likewise.
const REJECTED: u16 = 32;
const MALFORMED: u16 = 48;
const INVALID: u16 = 49;
const BUSY: u16 = 50;
/// A measure: the payload is two numbers.
const MEASURE: u16 = 51;

/// Kinds of failures by their numbers, which are this protocol's.
const KINDS: [FailureKind; 9] = [
    FailureKind::InvalidInput,
    FailureKind::Permanent,
    FailureKind::Transient,
    FailureKind::DeviceLost,
    FailureKind::DeviceSuspected,
    FailureKind::Panicked,
    FailureKind::Unwanted,
    FailureKind::Died,
    FailureKind::NeverBegan,
];

/// Bytes of a message, and of a document, that are read.
const TEXT_BYTES_MAX: usize = 64 << 10;
const DOCUMENT_BYTES_MAX: usize = 16 << 20;
/// Faults of one input that are kept.
const FAULTS_MAX: usize = 1000;
/// Sizes of a tensor's shape that are read.
const RANK_MAX: usize = u8::MAX as usize;

/// Something on its way, in pieces that a frame can borrow.
pub(crate) enum Encoded<'a> {
    Borrowed(u16, &'a [u8]),
    Owned(u16, Vec<u8>),
    /// What comes before the bytes of these tensors.
    Tensors(Vec<u8>, &'a [Tensor]),
}

impl<'a> Encoded<'a> {
    pub(crate) fn payload(payload: &'a Payload) -> Self {
        match payload {
            Payload::Json(json) => Self::Borrowed(PAYLOAD, json),
            Payload::Tensors(tensors) => Self::Tensors(heads(tensors), tensors),
        }
    }

    pub(crate) fn failure(failure: &'a Failure) -> Self {
        Self::Borrowed(FAILED + number(failure.kind), failure.message.as_bytes())
    }

    pub(crate) fn outcome(outcome: &'a Outcome) -> Self {
        match outcome {
            Ok(payload) => Self::payload(payload),
            Err(failure) => Self::failure(failure),
        }
    }

    pub(crate) fn rejection(rejection: &'a Rejection) -> Self {
        match rejection {
            Rejection::Malformed { message } => Self::Borrowed(MALFORMED, message.as_bytes()),
            Rejection::Invalid { faults } => {
                let faults: Vec<FaultDocument> = faults.iter().map(FaultDocument::of).collect();
                Self::Owned(INVALID, document(&faults))
            }
            Rejection::Failed(failure) => {
                Self::Borrowed(REJECTED + number(failure.kind), failure.message.as_bytes())
            }
            Rejection::Busy => Self::Borrowed(BUSY, b""),
        }
    }

    pub(crate) fn measured(measured: &'a Result<Measure, Rejection>) -> Self {
        match measured {
            Ok(Measure { cost, shape }) => {
                Self::Owned(MEASURE, [cost.to_le_bytes(), shape.to_le_bytes()].concat())
            }
            Err(rejection) => Self::rejection(rejection),
        }
    }

    pub(crate) fn push_to(&'a self, frame: &mut Outgoing<'a>) {
        match self {
            Self::Borrowed(status, payload) => frame.push(*status, payload),
            Self::Owned(status, payload) => frame.push(*status, payload),
            Self::Tensors(head, tensors) => {
                let data = tensors.iter().map(|tensor| &**tensor.data());
                frame.push_pieces(PAYLOAD, tensors.len(), std::iter::once(&head[..]).chain(data));
            }
        }
    }
}

/// What became of an input.
#[derive(Debug)]
pub(crate) enum Ended {
    Outcome(Outcome),
    Rejected(Rejection),
}

pub(crate) fn payload(item: Item) -> Result<Payload, Garbage> {
    match (item.status, item.tensors) {
        (PAYLOAD, 0) => Ok(Payload::Json(item.payload)),
        (PAYLOAD, count) => tensors(&item.payload, count).map(|tensors| Payload::Tensors(tensors.into())),
        _ => Err(Garbage::Item("is no payload")),
    }
}

pub(crate) fn ended(item: Item) -> Result<Ended, Garbage> {
    if item.status == PAYLOAD {
        let payload = payload(item)?;
        return Ok(Ended::Outcome(match payload {
            Payload::Json(json) if !is_object(&json) => Err(Failure {
                kind: FailureKind::Permanent,
                message: "the worker's output is no JSON object".into(),
            }),
            payload => Ok(payload),
        }));
    }
    if let Some(kind) = kind(item.status, FAILED) {
        return Ok(Ended::Outcome(Err(Failure { kind, message: text(&item.payload) })));
    }
    rejection(item).map(Ended::Rejected)
}

/// A failure where it is one.
pub(crate) fn failure(item: &Item) -> Option<Failure> {
    kind(item.status, FAILED).map(|kind| Failure { kind, message: text(&item.payload) })
}

pub(crate) fn measured(item: Item) -> Result<Result<Measure, Rejection>, Garbage> {
    if item.status != MEASURE {
        return rejection(item).map(Err);
    }
    let (cost, shape) = item.payload.split_at_checked(8).ok_or(Garbage::Item("is no measure"))?;
    match (cost.try_into(), shape.try_into()) {
        (Ok(cost), Ok(shape)) => {
            Ok(Ok(Measure { cost: u64::from_le_bytes(cost), shape: u64::from_le_bytes(shape) }))
        }
        _ => Err(Garbage::Item("is no measure")),
    }
}

fn rejection(item: Item) -> Result<Rejection, Garbage> {
    Ok(match item.status {
        MALFORMED => Rejection::Malformed { message: text(&item.payload) },
        INVALID => {
            let faults: Vec<FaultDocument> = read(&item.payload)?;
            if faults.is_empty() {
                return Err(Garbage::Item("is invalid for no reason"));
            }
            Rejection::Invalid {
                faults: faults.into_iter().take(FAULTS_MAX).map(FaultDocument::fault).collect(),
            }
        }
        BUSY => Rejection::Busy,
        status => {
            let kind = kind(status, REJECTED).ok_or(Garbage::Item("has an unknown status"))?;
            Rejection::Failed(Failure { kind, message: text(&item.payload) })
        }
    })
}

pub(crate) fn interest_number(interest: Interest) -> u16 {
    match interest {
        Interest::Nothing => 0,
        Interest::Outcome => 1,
        Interest::Chunks => 2,
    }
}

pub(crate) fn interest(number: u16) -> Interest {
    match number {
        1 => Interest::Outcome,
        2 => Interest::Chunks,
        _ => Interest::Nothing,
    }
}

pub(crate) fn chunk_result_number(result: ChunkResult) -> u16 {
    match result {
        ChunkResult::Unwanted => 0,
        ChunkResult::Taken => 1,
        ChunkResult::Full => 2,
    }
}

pub(crate) fn chunk_result(number: u16) -> ChunkResult {
    match number {
        1 => ChunkResult::Taken,
        2 => ChunkResult::Full,
        _ => ChunkResult::Unwanted,
    }
}

/// As JSON.
pub(crate) fn document(document: &impl Serialize) -> Vec<u8> {
    // A path that is no text: whoever reads nothing says so.
    serde_json::to_vec(document).unwrap_or_default()
}

/// Reads JSON.
pub(crate) fn read<'a, T: Deserialize<'a>>(document: &'a [u8]) -> Result<T, Garbage> {
    if document.len() > DOCUMENT_BYTES_MAX {
        return Err(Garbage::Document(format!("it has {} bytes", document.len())));
    }
    let brief = |error: serde_json::Error| error.to_string().chars().take(TEXT_BYTES_MAX).collect();
    serde_json::from_slice(document).map_err(|error| Garbage::Document(brief(error)))
}

/// As the host puts members into it: it looks at both ends.
fn is_object(json: &[u8]) -> bool {
    json == b"{}" || json.starts_with(b"{\"") && json.ends_with(b"}")
}

fn number(kind: FailureKind) -> u16 {
    KINDS.iter().position(|known| *known == kind).expect("every kind has a number") as u16
}

fn kind(status: u16, base: u16) -> Option<FailureKind> {
    KINDS.get(usize::from(status.checked_sub(base)?)).copied()
}

/// What a worker says, as far as it is kept.
fn text(bytes: &Bytes) -> String {
    String::from_utf8_lossy(&bytes[..bytes.len().min(TEXT_BYTES_MAX)]).into_owned()
}

/// One after the other: name, datatype, shape and number of bytes of each tensor.
fn heads(tensors: &[Tensor]) -> Vec<u8> {
    let mut heads = Vec::new();
    for tensor in tensors {
        let name = tensor.name().as_bytes();
        heads.extend_from_slice(&(name.len() as u32).to_le_bytes());
        heads.push(
            Datatype::ALL.iter().position(|known| *known == tensor.datatype()).unwrap_or_default() as u8
        );
        heads.push(tensor.shape().len() as u8);
        tensor.shape().iter().for_each(|size| heads.extend_from_slice(&size.to_le_bytes()));
        heads.extend_from_slice(&(tensor.data().len() as u64).to_le_bytes());
        heads.extend_from_slice(name);
    }
    heads
}

fn tensors(payload: &Bytes, count: usize) -> Result<Vec<Tensor>, Garbage> {
    const SHORT: Garbage = Garbage::Item("has tensors that are cut off");
    let mut at = 0;
    let take = |at: &mut usize, bytes: usize| -> Option<&[u8]> {
        let taken = payload.get(*at..at.checked_add(bytes)?)?;
        *at += bytes;
        Some(taken)
    };
    let number = |bytes: &[u8]| bytes.iter().rev().fold(0_u64, |number, byte| number << 8 | u64::from(*byte));
    let mut heads = Vec::new();
    for _ in 0..count {
        let name_bytes = take(&mut at, 4).map(number).ok_or(SHORT)? as usize;
        let &[datatype, rank] = take(&mut at, 2).ok_or(SHORT)? else { return Err(SHORT) };
        let shape = take(&mut at, 8 * usize::from(rank)).ok_or(SHORT)?.chunks_exact(8).map(number).collect();
        let bytes = take(&mut at, 8).map(number).ok_or(SHORT)?;
        let name = take(&mut at, name_bytes).ok_or(SHORT)?;
        let name =
            std::str::from_utf8(name).map_err(|_| Garbage::Item("has a tensor whose name is no text"))?;
        let datatype =
            *Datatype::ALL.get(usize::from(datatype)).ok_or(Garbage::Item("has an unknown datatype"))?;
        heads.push((Arc::<str>::from(name), datatype, shape, bytes));
    }
    let mut at = at as u64;
    let tensor = |(name, datatype, shape, bytes): (Arc<str>, Datatype, Vec<u64>, u64)| {
        let start = aligned(at);
        let end = start.checked_add(bytes).filter(|end| *end <= payload.len() as u64).ok_or(SHORT)?;
        at = end;
        let data = payload.slice(start as usize..end as usize);
        let tensor = Tensor::new(name, datatype, shape, data);
        // Of the host's own there is none; a worker's plugin was held to the same.
        tensor.map(Tensor::aligned).map_err(|_| Garbage::Item("has a tensor that is none"))
    };
    heads.into_iter().map(tensor).collect()
}

/// Bytes of a batch's payloads together, and of each.
pub(crate) const BYTES_MAX: u64 = 512 << 20;

/// Bytes of a payload.
pub(crate) fn bytes(payload: &Payload) -> u64 {
    match payload {
        Payload::Json(json) => json.len() as u64,
        Payload::Tensors(tensors) => tensors.iter().map(|tensor| aligned(tensor.data().len() as u64)).sum(),
    }
}

/// Whether a payload can cross: of tensors, whether each number fits its field.
pub(crate) fn fits(payload: &Payload) -> bool {
    let all_fit = |tensors: &[Tensor]| {
        tensors.len() <= usize::from(u16::MAX)
            && tensors.iter().all(|tensor| tensor.shape().len() <= RANK_MAX && tensor.name().len() < 1 << 20)
    };
    bytes(payload) <= BYTES_MAX
        && match payload {
            Payload::Json(_) => true,
            Payload::Tensors(tensors) => all_fit(tensors),
        }
}

#[derive(Deserialize, Serialize)]
struct FaultDocument {
    path: Vec<Step>,
    message: String,
    #[serde(default)]
    kind: Option<String>,
}

#[derive(Deserialize, Serialize)]
#[serde(untagged)]
enum Step {
    Index(u64),
    Key(String),
}

impl FaultDocument {
    fn of(fault: &InputFault) -> Self {
        let step = |segment: &PathSegment| match segment {
            PathSegment::Key(key) => Step::Key(key.clone()),
            PathSegment::Index(index) => Step::Index(*index),
        };
        Self {
            path: fault.path.iter().map(step).collect(),
            message: fault.message.clone(),
            kind: fault.kind.clone(),
        }
    }

    fn fault(self) -> InputFault {
        let segment = |step| match step {
            Step::Key(key) => PathSegment::Key(key),
            Step::Index(index) => PathSegment::Index(index),
        };
        InputFault {
            path: self.path.into_iter().map(segment).collect(),
            message: self.message,
            kind: self.kind,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::{
        channel::{Channel, End, Incoming},
        frame::Kind,
    };

    fn across(encoded: &Encoded<'_>) -> Item {
        let (host, worker) = UnixStream::pair().unwrap();
        let mut frame = Outgoing::new(Kind::Done, 0, 1);
        encoded.push_to(&mut frame);
        Channel::new(worker, None, End::Worker).send(&frame).unwrap();
        let incoming: Incoming = Channel::new(host, None, End::Host).receive().unwrap();
        incoming.single("one item").unwrap()
    }

    #[test]
    fn inputs_and_outputs_cross_as_they_are() {
        let tensor = |name: &str, datatype, shape: &[u64], data: &'static [u8]| {
            Tensor::new(name.into(), datatype, shape.to_vec(), Bytes::from_static(data)).unwrap()
        };
        let tensors = [
            tensor("x", Datatype::Uint8, &[2, 3], &[1, 2, 3, 4, 5, 6]),
            tensor("none", Datatype::Fp32, &[0, 7], &[]),
            tensor("scalar", Datatype::Int16, &[], &[7, 8]),
            tensor("words", Datatype::Bytes, &[1], b"\x02\0\0\0ab"),
        ];
        for there in [Payload::Json("{\"a\":1}".into()), Payload::Tensors(tensors.into())] {
            let here = payload(across(&Encoded::payload(&there))).unwrap();
            assert_eq!(here, there);
            assert!(fits(&there));
        }
    }

    #[test]
    fn failures_and_rejections_cross_with_all_that_they_say() {
        for kind in KINDS {
            let failure = Failure { kind, message: "no luck".into() };
            let ended = ended(across(&Encoded::failure(&failure))).unwrap();
            assert!(
                matches!(ended, Ended::Outcome(Err(found)) if found.kind == kind && found.message == "no luck")
            );
        }
        let path = vec![PathSegment::Key("a".into()), PathSegment::Index(3)];
        let failure = Failure { kind: FailureKind::Panicked, message: "no luck".into() };
        for there in [
            Rejection::Malformed { message: "no luck".into() },
            Rejection::Invalid { faults: vec![InputFault { path, message: "no luck".into(), kind: None }] },
            Rejection::Failed(failure),
            Rejection::Busy,
        ] {
            let Ended::Rejected(here) = ended(across(&Encoded::rejection(&there))).unwrap() else { panic!() };
            assert_eq!(format!("{here:?}"), format!("{there:?}"));
        }
        let measure = Measure { cost: 1 << 40, shape: 3 };
        assert_eq!(measured(across(&Encoded::measured(&Ok(measure)))).unwrap().unwrap(), measure);
    }

    #[test]
    fn what_is_none_of_these_is_garbage() {
        let item =
            |status, tensors, payload: &'static [u8]| Item { status, tensors, payload: payload.into() };
        for item in
            [item(99, 0, b""), item(INVALID, 0, b"[]"), item(INVALID, 0, b"x"), item(PAYLOAD, 1, b"abc")]
        {
            assert!(ended(item).is_err());
        }
        // A name, and bytes, of more than there is.
        assert!(payload(item(PAYLOAD, 1, &[0xff; 40])).is_err());
        assert!(
            payload(item(PAYLOAD, 1, &[0, 0, 0, 0, 1, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]))
                .is_err()
        );
        assert!(measured(item(MEASURE, 0, &[0; 15])).is_err());
        let Ended::Outcome(Err(failure)) = ended(item(PAYLOAD, 0, b"[]")).unwrap() else { panic!() };
        assert!(failure.message.contains("no JSON object"));
    }
}
