//! A pipeline that is loaded in a worker process. It owns the worker's connections, one for each batch at once, and never knows which batches
//! there are.

use std::{
    any::Any,
    os::fd::OwnedFd,
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use modalkit_engine::{
    self as engine, Batch, Death, Decoded, EndedBy, EventSink, Failure, FailureKind, Foreign, Input,
    Instance, Kept, LogLevel, Measure, Measured, Payload, PluginLog, Process, Rejection, Signature,
};
use parking_lot::{Condvar, Mutex, RwLock, RwLockWriteGuard};

use crate::{
    channel::{Broken, Channel, Incoming, Outgoing},
    documents::{Change, SignatureDocument},
    engine::Levels,
    frame::{Garbage, Kind},
    items::{self, Encoded, Ended},
    life::Life,
    lines,
    plugin::undecoded,
    start::{self, END_TIME, Started, broke},
};

/// Inputs that are checked with one frame.
const CHECKED_MAX: usize = 1000;
/// How long inputs may be looked at before they are taken; a worker that takes longer hangs in its `validate`, and is ended.
const CHECK_TIME_MAX: Duration = Duration::from_secs(30);
/// How long a worker that was told to leave may take: its pipeline's destructors run.
const LEAVE_TIME_MAX: Duration = Duration::from_secs(10);

pub(crate) struct WorkerInstance {
    worker: Arc<Connections>,
    signature: RwLock<Option<Arc<Signature>>>,
}

struct Connections {
    life: Arc<Life>,
    control: Mutex<Channel>,
    checks: Mutex<Channel>,
    /// Those on which no batch runs.
    free: Mutex<Vec<Channel>>,
    freed: Condvar,
    lanes: usize,
    batches_ended: AtomicU64,
    batches_begun: AtomicU64,
    /// It does one thing at a time: inputs are checked when the batch under way has ended.
    is_serial: bool,
    log: OwnedFd,
    /// Read by checks and hooks.
    beside: RwLock<()>,
}

struct KeptToBatches<'c>(#[expect(dead_code, reason = "what it holds is a lock")] RwLockWriteGuard<'c, ()>);

impl Kept for KeptToBatches<'_> {}

/// An input as it came: any worker can run it.
pub(crate) struct WorkerInput(pub(crate) Payload);

impl Input for WorkerInput {}

struct WorkerBatch<'i> {
    worker: &'i Connections,
    inputs: Vec<Payload>,
    /// What its end is known by: an answer to another one is nobody's.
    number: u64,
    /// `None` once it has broken.
    channel: Option<Channel>,
    measured: Option<Measured>,
    /// It was sent, and its end has come.
    was_sent: bool,
    has_ended: bool,
}

/// Told when another level of the log is wanted.
pub(crate) trait Listener: Send + Sync {
    fn hear(&self, level: LogLevel);
}

impl Listener for Connections {
    fn hear(&self, level: LogLevel) {
        // A worker that has died, or has not read the levels before, hears it with the next or not at all.
        let flags = rustix::net::SendFlags::NOSIGNAL | rustix::net::SendFlags::DONTWAIT;
        let _ = rustix::net::send(&self.log, &[lines::level_number(level)], flags);
    }
}

impl WorkerInstance {
    pub(crate) fn new(
        started: Started,
        signature: Option<Arc<Signature>>,
        is_serial: bool,
        log: Option<PluginLog>,
    ) -> Self {
        let Started { life, control, checks, lanes, log: log_socket, warnings } = started;
        if let Some(log) = &log {
            for warning in warnings {
                (log.sink)(LogLevel::Warn, &life.model, module_path!(), &warning, "");
            }
        }
        let worker = Arc::new(Connections {
            life,
            control: Mutex::new(control),
            checks: Mutex::new(checks),
            lanes: lanes.len(),
            batches_ended: AtomicU64::new(0),
            batches_begun: AtomicU64::new(0),
            free: Mutex::new(lanes),
            freed: Condvar::new(),
            is_serial,
            log: log_socket,
            beside: RwLock::new(()),
        });
        let weak: Weak<Connections> = Arc::downgrade(&worker);
        Levels::add(weak);
        Self { worker, signature: RwLock::new(signature) }
    }
}

impl Connections {
    /// The failure of a call whose connection broke.
    fn broken(&self, broken: &Broken) -> Failure {
        let has_ended = matches!(broken, Broken::Ended | Broken::Reset);
        let patience = if has_ended { END_TIME } else { Duration::ZERO };
        let death = self.life.wait_for_death(patience, &broke(broken));
        Failure { kind: FailureKind::Died, message: death.how }
    }

    fn check(&self, inputs: &[&Decoded]) -> Result<Vec<Result<Measure, Rejection>>, Unchecked> {
        let payloads: Vec<&Payload> = inputs.iter().map(|decoded| payload_of(decoded)).collect();
        let encoded: Vec<Encoded<'_>> = payloads.into_iter().map(Encoded::payload).collect();
        let mut frame = Outgoing::new(Kind::Check, 0, encoded.len());
        encoded.iter().for_each(|item| item.push_to(&mut frame));
        let checked = self.ask_beside_batches(&frame, Kind::Checked, inputs.len())?;
        let measured = checked.items.into_iter().map(items::measured).collect::<Result<_, _>>();
        measured.map_err(|garbage| Unchecked { was_sent: true, broken: garbage.into() })
    }

    /// Asks something that isn't a batch, and has so many answers.
    fn ask_beside_batches(
        &self,
        frame: &Outgoing<'_>,
        kind: Kind,
        answers: usize,
    ) -> Result<Incoming, Unchecked> {
        let mut checks = self.checks.lock();
        let sent = checks.limit(Some(CHECK_TIME_MAX)).map_err(Broken::from).and_then(|()| checks.send(frame));
        sent.map_err(|broken| Unchecked { was_sent: false, broken })?;
        let mut ended = self.batches_ended.load(Ordering::SeqCst);
        let received = loop {
            let received = checks.receive();
            let before = std::mem::replace(&mut ended, self.batches_ended.load(Ordering::SeqCst));
            let waited_for_batch = before != ended || self.free.lock().len() < self.lanes;
            match received {
                // A batch that takes too long ends the worker.
                Err(Broken::TimedOut) if self.is_serial && waited_for_batch => {}
                received => break received,
            }
        };
        let received = received.and_then(|received| {
            if received.kind != kind || received.items.len() != answers {
                return Err(Garbage::Item("is not there").into());
            }
            Ok(received)
        });
        received.map_err(|broken| Unchecked { was_sent: !matches!(broken, Broken::Reset), broken })
    }
}

/// Inputs that could not be checked.
struct Unchecked {
    /// The worker may have looked at them.
    was_sent: bool,
    broken: Broken,
}

fn payload_of(decoded: &Decoded) -> &Payload {
    let input: &dyn Any = &*decoded.input;
    &input.downcast_ref::<WorkerInput>().expect("an input is validated by an engine that decoded it").0
}

impl Instance for WorkerInstance {
    fn signature(&self) -> Option<Arc<Signature>> {
        self.signature.read().clone()
    }

    fn volume_reload(&self, volume: &str, mount_point: &str, changed: &[String]) -> Result<(), Failure> {
        let change = items::document(&Change {
            volume: volume.into(),
            mount_point: mount_point.into(),
            changed: changed.into(),
        });
        let frame = Outgoing::of(Kind::Reload, items::PAYLOAD, &change);
        let _beside = self.worker.beside.read();
        let reloaded = start::ask(&self.worker.control, &frame, Kind::Reloaded)
            .map_err(|broken| self.worker.broken(&broken))?;
        let [result, signature] = &reloaded.items[..] else {
            return Err(self.worker.broken(&Garbage::Item("is not there").into()));
        };
        if signature.status == items::PAYLOAD {
            let read = items::read::<Option<SignatureDocument>>(&signature.payload)
                .map_err(|garbage| self.worker.broken(&garbage.into()))?;
            *self.signature.write() = read.and_then(SignatureDocument::signature);
        }
        items::failure(result).map_or(Ok(()), Err)
    }

    fn decode(&self, payload: &Payload) -> Result<Decoded, Rejection> {
        Ok(undecoded(payload))
    }

    fn owns(&self, decoded: &Decoded) -> bool {
        let input: &dyn Any = &*decoded.input;
        input.is::<WorkerInput>()
    }

    fn validate(&self, inputs: &[&Decoded]) -> Vec<Result<Measure, Rejection>> {
        let mut results = Vec::with_capacity(inputs.len());
        let busy = |some: &[&Decoded]| some.iter().map(|_| Err(Rejection::Busy)).collect::<Vec<_>>();
        for some in inputs.chunks(CHECKED_MAX) {
            // A batch that is under suspicion has the process to itself, or it has died before these were its concern.
            let beside = self.worker.beside.try_read().filter(|_| !self.worker.life.has_died());
            // One that does one thing at a time would look at them when its hook has ended.
            let beside =
                beside.filter(|_| !self.worker.is_serial || self.worker.control.try_lock().is_some());
            let Some(_beside) = beside else {
                results.extend(busy(some));
                continue;
            };
            match self.worker.check(some) {
                Ok(checked) => results.extend(checked),
                Err(Unchecked { was_sent: false, broken }) => {
                    self.worker.broken(&broken);
                    results.extend(busy(some));
                }
                Err(Unchecked { broken, .. }) => {
                    let failure = self.worker.broken(&broken);
                    results.extend(some.iter().map(|_| Err(Rejection::Failed(failure.clone()))));
                }
            }
        }
        results
    }

    fn begin(&self, inputs: Vec<Decoded>) -> Result<Box<dyn Batch + '_>, Foreign> {
        if !inputs.iter().all(|decoded| self.owns(decoded)) {
            return Err(Foreign);
        }
        let payload = |decoded: Decoded| {
            let input = (decoded.input as Box<dyn Any>).downcast::<WorkerInput>();
            input.expect("all of them are this engine's").0
        };
        let inputs = inputs.into_iter().map(payload).collect();
        let mut free = self.worker.free.lock();
        let channel = loop {
            match free.pop() {
                // A worker that has died frees no connection any more.
                None if !self.worker.life.has_died() => {
                    self.worker.freed.wait_for(&mut free, END_TIME);
                }
                channel => break channel,
            }
        };
        Ok(Box::new(WorkerBatch {
            worker: &self.worker,
            inputs,
            number: self.worker.batches_begun.fetch_add(1, Ordering::Relaxed),
            channel,
            measured: None,
            was_sent: false,
            has_ended: false,
        }))
    }

    fn send(&self, queue: &str, messages: &[engine::Outgoing<'_>]) -> Vec<Result<(), Failure>> {
        let mut frame = Outgoing::new(Kind::Send, 0, 1 + messages.len());
        frame.push(items::PAYLOAD, queue.as_bytes());
        messages.iter().for_each(|message| frame.push(items::PAYLOAD, message.body));
        let all = |failure: Failure| messages.iter().map(|_| Err(failure.clone())).collect();
        if !self.worker.is_serial {
            let message = "queue backends of a pipeline's own are code of Python".into();
            return all(Failure { kind: FailureKind::Transient, message });
        }
        // As inputs are looked at: not while a hook runs, nor beside a batch that is to be alone.
        let beside = self.worker.beside.try_read().filter(|_| !self.worker.life.has_died());
        let Some(_beside) = beside.filter(|_| self.worker.control.try_lock().is_some()) else {
            let message =
                "the model's pipeline is busy with a change of its data, or with one input alone".into();
            return all(Failure { kind: FailureKind::Transient, message });
        };
        match self.worker.ask_beside_batches(&frame, Kind::Sent, messages.len()) {
            Ok(sent) => sent.items.iter().map(|item| items::failure(item).map_or(Ok(()), Err)).collect(),
            Err(Unchecked { broken, .. }) => all(self.worker.broken(&broken)),
        }
    }

    fn process(&self) -> Option<&dyn Process> {
        Some(&*self.worker)
    }
}

impl Process for Connections {
    fn death(&self) -> Option<Death> {
        self.life.death()
    }

    fn kill(&self, why: &str, by: EndedBy) {
        self.life.end(why, by);
    }

    fn wait(&self, time: Duration) -> Option<Death> {
        self.life.wait(time)
    }

    fn keep_to_batches(&self) -> Box<dyn Kept + '_> {
        Box::new(KeptToBatches(self.beside.write()))
    }

    fn resident_bytes(&self) -> Option<u64> {
        self.life.resident_bytes()
    }
}

impl Drop for WorkerInstance {
    fn drop(&mut self) {
        let worker = &self.worker;
        if worker.life.has_died() {
            return;
        }
        worker.life.set_leaves();
        let told = worker.control.lock().send(&Outgoing::new(Kind::Leave, 0, 0));
        // Their ends are its lanes' ends.
        worker.free.lock().drain(..).for_each(|lane| lane.break_off());
        let patience = if told.is_ok() { LEAVE_TIME_MAX } else { Duration::ZERO };
        if worker.life.wait(patience).is_none() {
            worker.kill(&format!("it did not leave within {LEAVE_TIME_MAX:?}"), EndedBy::Host);
            worker.life.wait(END_TIME);
        }
    }
}

impl WorkerBatch<'_> {
    fn with_channel<T>(
        &mut self,
        call: impl FnOnce(&mut Channel, &[Payload]) -> Result<T, Broken>,
    ) -> Result<T, Failure> {
        let Some(channel) = &mut self.channel else {
            let failure = self.worker.broken(&Broken::Ended);
            return Err(Failure { kind: FailureKind::NeverBegan, ..failure });
        };
        let called = call(channel, &self.inputs);
        called.map_err(|broken| {
            // Nothing is said on it any more.
            self.channel = None;
            let failure = self.worker.broken(&broken);
            // Not all of it was sent, or read.
            let never_began = !self.was_sent || matches!(broken, Broken::Reset);
            Failure { kind: if never_began { FailureKind::NeverBegan } else { failure.kind }, ..failure }
        })
    }
}

impl Batch for WorkerBatch<'_> {
    fn preprocess(&mut self) -> Result<(), Failure> {
        let bytes: u64 = self.inputs.iter().map(items::bytes).sum();
        if bytes > items::BYTES_MAX && self.inputs.len() > 1 {
            let message =
                format!("the batch's inputs have {bytes} bytes, more than a worker process is sent at once");
            return Err(Failure { kind: FailureKind::Transient, message });
        }
        if let Some(place) = self.inputs.iter().position(|input| !items::fits(input)) {
            let message = format!("the input at {place} is too large for a worker process");
            return Err(Failure { kind: FailureKind::InvalidInput, message });
        }
        let number = self.number;
        self.with_channel(|channel, inputs| {
            let encoded: Vec<Encoded<'_>> = inputs.iter().map(Encoded::payload).collect();
            let mut frame = Outgoing::new(Kind::Batch, number, encoded.len());
            encoded.iter().for_each(|item| item.push_to(&mut frame));
            channel.send(&frame)
        })?;
        self.was_sent = true;
        Ok(())
    }

    fn predict(&mut self) -> Result<(), Failure> {
        Ok(())
    }

    fn postprocess(&mut self, events: &mut dyn EventSink) -> Result<(), Failure> {
        let number = self.number;
        let (measured, failure) = self.with_channel(|channel, _| {
            let mut has_spoken = false;
            loop {
                // What it hasn't read is an answer then, and not the batch.
                let of_answer = |broken| match broken {
                    Broken::Reset if has_spoken => Broken::Ended,
                    broken => broken,
                };
                let incoming = channel.receive().map_err(of_answer)?;
                has_spoken = true;
                match incoming.kind {
                    Kind::Done if incoming.batch != number => {
                        return Err(Garbage::Item("is of another batch").into());
                    }
                    Kind::Done => return Ok(done(incoming, events)?),
                    Kind::Chunk => {
                        let item = incoming.batch as usize;
                        let chunk = incoming.single("a chunk")?;
                        let result = events.chunk(item, &chunk.payload, chunk.status != 0);
                        let number = items::chunk_result_number(result);
                        channel.send(&Outgoing::of(Kind::ChunkResult, number, b""))?;
                    }
                    Kind::AskInterest => {
                        let number = items::interest_number(events.interest(incoming.batch as usize));
                        channel.send(&Outgoing::of(Kind::Interest, number, b""))?;
                    }
                    found => return Err(Garbage::Kinds { expected: "the end of a batch", found }.into()),
                }
            }
        })?;
        self.measured = Some(measured);
        self.has_ended = true;
        failure.map_or(Ok(()), Err)
    }

    fn measured(&self) -> Option<Measured> {
        self.measured
    }
}

impl Drop for WorkerBatch<'_> {
    fn drop(&mut self) {
        let Some(channel) = self.channel.take() else { return };
        if self.was_sent && !self.has_ended {
            // What comes on it would be taken for the next batch's.
            self.worker.kill("a batch was given up in the middle", EndedBy::Host);
            return;
        }
        self.worker.batches_ended.fetch_add(1, Ordering::SeqCst);
        self.worker.free.lock().push(channel);
        self.worker.freed.notify_one();
    }
}

/// Hands out what came of a batch: how long it took and how much work it was, and why all of it failed, if it did.
fn done(incoming: Incoming, events: &mut dyn EventSink) -> Result<(Measured, Option<Failure>), Garbage> {
    let mut items = incoming.items.into_iter();
    let (Some(head), Some(places)) = (items.next(), items.next()) else {
        return Err(Garbage::Item("is not there"));
    };
    let numbers = |bytes: &[u8]| -> Vec<u64> {
        let number = |bytes: &[u8]| bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte));
        bytes.chunks_exact(8).map(number).collect()
    };
    let [preprocess, predict, postprocess, cost] =
        numbers(&places.payload)[..4.min(places.payload.len() / 8)]
    else {
        return Err(Garbage::Item("has no times"));
    };
    let measured = Measured { stages: [preprocess, predict, postprocess].map(Duration::from_nanos), cost };
    let places = &numbers(&places.payload)[4..];
    if places.len() != items.len() {
        return Err(Garbage::Item("has another number of ends than there are"));
    }
    for (place, item) in places.iter().zip(items) {
        let place = usize::try_from(*place).unwrap_or(usize::MAX);
        match items::ended(item)? {
            Ended::Outcome(outcome) => events.end(place, outcome),
            Ended::Rejected(rejection) => events.reject(place, rejection),
        }
    }
    Ok((measured, items::failure(&head)))
}
