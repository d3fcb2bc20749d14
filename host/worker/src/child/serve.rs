//! The worker itself: opens the plugin, loads the pipeline, and runs the batches that come on each of its connections on a thread of its own. It
//! never knows who waits for them.

use std::{
    os::fd::{AsFd, OwnedFd},
    process,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU8, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use modalkit_engine::{
    Batch, Checked, ChunkResult, Decoded, Device, EventSink, Failure, FailureKind, Instance, Interest, Load,
    LogLevel, Measure, Outcome, Payload, Plugin, PluginLog, Rejection,
};

use super::{Connections, Loader, confine, interpreter};
use crate::{
    channel::{Broken, Channel, Incoming, Outgoing},
    documents::{Change, Described, DeviceDocument, Hello, Serves, SignatureDocument, Task},
    frame::{Garbage, Kind, PROTOCOL},
    items::{self, Encoded, Ended},
    lines,
};

/// The end of a connection, or of a task.
const DONE: u8 = 0;
/// The host said what no host says.
const CONFUSED: u8 = 71;

/// Where lines of the log go.
static LOG: OnceLock<OwnedFd> = OnceLock::new();
static LEVEL: AtomicU8 = AtomicU8::new(0);

pub(super) fn run(mut connections: Connections, loader: Loader) -> std::io::Result<u8> {
    // The host may end before it has said anything.
    let Ok(incoming) = connections.control.receive() else { return Ok(CONFUSED) };
    let hello = incoming.single("the first document").map_err(std::io::Error::other)?;
    let hello: Hello = items::read(&hello.payload).map_err(std::io::Error::other)?;
    if hello.protocol != PROTOCOL {
        let message = format!("expected a worker of protocol {}, found one of {PROTOCOL}", hello.protocol);
        return refuse(&mut connections.control, &Failure { kind: FailureKind::Permanent, message });
    }
    (loader.note_endings)(connections.note)?;
    let log = LOG.get_or_init(|| connections.log);
    follow_level(log, None);
    let guard = connections.guard.take();
    let confined = confine::confine(&hello, guard.as_ref(), log);
    drop(guard);
    let warnings = match confined {
        Ok(warnings) => warnings,
        Err(message) => {
            return refuse(&mut connections.control, &Failure { kind: FailureKind::Permanent, message });
        }
    };
    if let Some(python) = &hello.python {
        let hello = Hello { warnings, ..hello.clone() };
        let mut connections = Connections { log: log.try_clone()?, ..connections };
        let error = interpreter::become_one(python, &hello, &connections, log, LEVEL.load(Ordering::Relaxed));
        let message = format!("can't run the interpreter {}: {error}", python.interpreter.display());
        return refuse(&mut connections.control, &Failure { kind: FailureKind::Permanent, message });
    }
    let plugin_log = PluginLog { level: || lines::level(LEVEL.load(Ordering::Relaxed)), sink: send_line };
    let (plugin, attach) = match (loader.open)(&hello.file, &hello.origin, plugin_log) {
        Ok(opened) => opened,
        Err(message) => {
            return refuse(&mut connections.control, &Failure { kind: FailureKind::Permanent, message });
        }
    };
    match hello.task {
        Task::Describe => {
            answer(&mut connections.control, &items::document(&Described::of(plugin.description())))
        }
        Task::CheckSettings => match plugin.check_settings(&hello.settings) {
            Ok(()) => answer(&mut connections.control, b"{}"),
            Err(failure) => refuse(&mut connections.control, &failure),
        },
        Task::Serve => {
            let Connections { mut control, checks, lanes, .. } =
                Connections { log: log.try_clone()?, ..connections };
            let instance = match load(&hello, &*plugin, lanes.len()) {
                Ok(instance) => instance,
                Err(failure) => return refuse(&mut control, &failure),
            };
            let serves = Serves {
                pid: process::id(),
                signature: instance.signature().map(|signature| SignatureDocument::of(&signature)),
                warnings,
            };
            thread::Builder::new().name("log level".into()).spawn(move || follow_level(log, Some(attach)))?;
            serve(control, checks, lanes, plugin, instance, &serves)
        }
    }
}

fn answer(control: &mut Channel, document: &[u8]) -> std::io::Result<u8> {
    control.send(&Outgoing::of(Kind::Ready, items::PAYLOAD, document)).map_err(std::io::Error::other)?;
    Ok(DONE)
}

fn refuse(control: &mut Channel, failure: &Failure) -> std::io::Result<u8> {
    let mut frame = Outgoing::new(Kind::Failed, 0, 1);
    let encoded = Encoded::failure(failure);
    encoded.push_to(&mut frame);
    control.send(&frame).map_err(std::io::Error::other)?;
    Ok(DONE)
}

fn load(hello: &Hello, plugin: &dyn Plugin, lanes: usize) -> Result<Arc<dyn Instance>, Failure> {
    fn device((ordinal, device): (usize, &DeviceDocument)) -> Device<'_> {
        let DeviceDocument { name, uuid, memory_bytes, memory_budget_bytes } = device;
        Device {
            ordinal: ordinal as u32,
            name,
            uuid,
            memory_bytes: *memory_bytes,
            memory_budget_bytes: *memory_budget_bytes,
        }
    }
    let devices: Vec<Device<'_>> = hello.devices.iter().enumerate().map(device).collect();
    let loaded = plugin.load(&Load {
        model_name: &hello.model_name,
        all_model_data_folder: &hello.all_model_data_folder,
        common_settings: &hello.common_settings,
        application: &hello.application,
        settings: &hello.settings,
        secrets: &hello.secrets,
        devices: &devices,
        crash_note: None,
        batches_in_flight: lanes,
        // The host's patience is what counts.
        limit: Duration::MAX,
    })?;
    Ok(loaded.into())
}

fn serve(
    mut control: Channel,
    checks: Channel,
    lanes: Vec<Channel>,
    plugin: Arc<dyn Plugin>,
    instance: Arc<dyn Instance>,
    serves: &Serves,
) -> std::io::Result<u8> {
    let mut threads = Vec::new();
    for (number, lane) in lanes.into_iter().enumerate() {
        let (plugin, instance) = (Arc::clone(&plugin), Arc::clone(&instance));
        let run = move || run_lane(lane, &*plugin, &*instance);
        threads.push(thread::Builder::new().name(format!("lane {number}")).spawn(run)?);
    }
    let end_checks = checks.breaker()?;
    let of_checks = Arc::clone(&instance);
    threads.push(thread::Builder::new().name("checks".into()).spawn(move || run_checks(checks, &of_checks))?);
    answer(&mut control, &items::document(serves))?;
    loop {
        let Ok(incoming) = control.receive() else { return Ok(CONFUSED) };
        match incoming.kind {
            Kind::Reload => reload(&mut control, incoming, &*instance)?,
            Kind::Leave => break,
            _ => return Ok(CONFUSED),
        }
    }
    // Those of lanes end with the host's ends of their connections.
    end_checks.break_off();
    for thread in threads {
        // It has said why, if it panicked.
        let _ = thread.join();
    }
    drop(plugin);
    drop(instance);
    Ok(DONE)
}

fn reload(control: &mut Channel, incoming: Incoming, instance: &dyn Instance) -> std::io::Result<()> {
    let change = incoming.single("a change").map_err(std::io::Error::other)?;
    let Change { volume, mount_point, changed } =
        items::read(&change.payload).map_err(std::io::Error::other)?;
    let result = instance.volume_reload(&volume, &mount_point, &changed);
    let signature = instance.signature().map(|signature| SignatureDocument::of(&signature));
    let signature = items::document(&signature);
    let mut frame = Outgoing::new(Kind::Reloaded, 0, 2);
    let said = result.as_ref().err().map(Encoded::failure);
    match &said {
        Some(failure) => failure.push_to(&mut frame),
        None => frame.push(items::PAYLOAD, b"{}"),
    }
    frame.push(items::PAYLOAD, &signature);
    control.send(&frame).map_err(std::io::Error::other)
}

fn run_checks(mut channel: Channel, instance: &Arc<dyn Instance>) {
    while let Ok(incoming) = channel.receive() {
        if incoming.kind != Kind::Check {
            return;
        }
        let check = |item| match items::payload(item) {
            Ok(payload) => {
                let decoded = instance.decode(&payload)?;
                match decoded.checked {
                    Checked::Validated => Ok(decoded.measure),
                    Checked::Nothing | Checked::Suspect | Checked::Parsed => {
                        first(instance.validate(&[&decoded]))
                    }
                }
            }
            Err(garbage) => Err(unreadable(&garbage)),
        };
        let checked: Vec<Result<Measure, Rejection>> = incoming.items.into_iter().map(check).collect();
        let encoded: Vec<Encoded<'_>> = checked.iter().map(Encoded::measured).collect();
        let mut frame = Outgoing::new(Kind::Checked, incoming.batch, encoded.len());
        encoded.iter().for_each(|item| item.push_to(&mut frame));
        if channel.send(&frame).is_err() {
            return;
        }
    }
}

fn first(results: Vec<Result<Measure, Rejection>>) -> Result<Measure, Rejection> {
    results.into_iter().next().unwrap_or(Err(Rejection::Busy))
}

fn unreadable(garbage: &Garbage) -> Rejection {
    let message = format!("the host sent {garbage}");
    Rejection::Failed(Failure { kind: FailureKind::Permanent, message })
}

fn run_lane(mut channel: Channel, plugin: &dyn Plugin, instance: &dyn Instance) {
    // The host has left, or dropped the connection: nobody waits any more.
    while let Ok(incoming) = channel.receive() {
        if incoming.kind != Kind::Batch || run_batch(incoming, &mut channel, plugin, instance).is_err() {
            return;
        }
    }
}

/// An input, as this instance runs it.
fn decode(
    item: crate::channel::Item,
    plugin: &dyn Plugin,
    instance: &dyn Instance,
) -> Result<Decoded, Rejection> {
    let payload: Payload = items::payload(item).map_err(|garbage| unreadable(&garbage))?;
    let mut decoded = match instance.decode(&payload) {
        // It changes: it is waited for below.
        Err(Rejection::Busy) => plugin.decode(&payload)?,
        decoded => decoded?,
    };
    if decoded.checked != Checked::Validated {
        decoded.measure = first(instance.validate(&[&decoded]))?;
        decoded.checked = Checked::Validated;
    }
    Ok(decoded)
}

fn run_batch(
    incoming: Incoming,
    channel: &mut Channel,
    plugin: &dyn Plugin,
    instance: &dyn Instance,
) -> Result<(), Broken> {
    let mut ends: Vec<(usize, Ended)> = Vec::with_capacity(incoming.items.len());
    let (mut places, mut inputs, mut cost) = (Vec::new(), Vec::new(), 0_u64);
    for (place, item) in incoming.items.into_iter().enumerate() {
        match decode(item, plugin, instance) {
            Ok(decoded) => {
                cost = cost.saturating_add(decoded.measure.cost);
                places.push(place);
                inputs.push(decoded);
            }
            Err(rejection) => ends.push((place, Ended::Rejected(rejection))),
        }
    }
    let mut times = [Duration::ZERO; 3];
    let mut sink = LaneSink { channel, places: &places, ends: &mut ends, broken: None };
    let result = if inputs.is_empty() { Ok(()) } else { stages(instance, inputs, &mut times, &mut sink) };
    if let Some(broken) = sink.broken {
        return Err(broken);
    }
    let numbers = times.iter().map(|time| time.as_nanos() as u64).chain([cost]);
    let of_ends = ends.iter().map(|(place, _)| *place as u64);
    let numbers: Vec<u8> = numbers.chain(of_ends).flat_map(u64::to_le_bytes).collect();
    let failed = result.as_ref().err().map(Encoded::failure);
    let encoded: Vec<Encoded<'_>> = ends
        .iter()
        .map(|(_, ended)| match ended {
            Ended::Outcome(outcome) => Encoded::outcome(outcome),
            Ended::Rejected(rejection) => Encoded::rejection(rejection),
        })
        .collect();
    let mut frame = Outgoing::new(Kind::Done, incoming.batch, 2 + encoded.len());
    match &failed {
        Some(failure) => failure.push_to(&mut frame),
        None => frame.push(items::PAYLOAD, b""),
    }
    frame.push(items::PAYLOAD, &numbers);
    encoded.iter().for_each(|item| item.push_to(&mut frame));
    channel.send(&frame)
}

fn stages(
    instance: &dyn Instance,
    inputs: Vec<Decoded>,
    times: &mut [Duration; 3],
    sink: &mut LaneSink<'_>,
) -> Result<(), Failure> {
    let mut batch: Box<dyn Batch + '_> = instance.begin(inputs).map_err(|_| Failure {
        kind: FailureKind::Permanent,
        message: "the worker decoded with another plugin than it runs".into(),
    })?;
    let mut begun = Instant::now();
    let mut lap = || std::mem::replace(&mut begun, Instant::now()).elapsed();
    batch.preprocess()?;
    times[0] = lap();
    batch.predict()?;
    times[1] = lap();
    let result = batch.postprocess(sink);
    times[2] = lap();
    result
}

/// Tells the host what comes of a batch: chunks at once, ends all together.
struct LaneSink<'l> {
    channel: &'l mut Channel,
    /// Of the inputs that run, their places among those that came.
    places: &'l [usize],
    ends: &'l mut Vec<(usize, Ended)>,
    broken: Option<Broken>,
}

impl LaneSink<'_> {
    /// As the host counts; of what is no item, a place that none has.
    fn place(&self, item: usize) -> usize {
        self.places.get(item).copied().unwrap_or(usize::MAX)
    }

    /// Asks the host about an item. `None` where it is gone.
    fn ask(
        &mut self,
        kind: Kind,
        item: usize,
        status: u16,
        payload: Option<&[u8]>,
        answer: Kind,
    ) -> Option<u16> {
        let mut frame = Outgoing::new(kind, self.place(item) as u64, 1);
        if let Some(payload) = payload {
            frame.push(status, payload);
        }
        let asked = self.channel.send(&frame).and_then(|()| self.channel.receive()).and_then(|incoming| {
            if incoming.kind != answer {
                return Err(Garbage::Kinds { expected: "the host's answer", found: incoming.kind }.into());
            }
            Ok(incoming.single("the host's answer")?.status)
        });
        match asked {
            Ok(status) => Some(status),
            Err(broken) => {
                self.broken = Some(broken);
                None
            }
        }
    }
}

impl EventSink for LaneSink<'_> {
    fn interest(&mut self, item: usize) -> Interest {
        if self.broken.is_some() {
            return Interest::Nothing;
        }
        let number = self.ask(Kind::AskInterest, item, 0, None, Kind::Interest);
        number.map_or(Interest::Nothing, items::interest)
    }

    fn chunk(&mut self, item: usize, json: &[u8], waits: bool) -> ChunkResult {
        if self.broken.is_some() {
            return ChunkResult::Unwanted;
        }
        let number = self.ask(Kind::Chunk, item, waits.into(), Some(json), Kind::ChunkResult);
        number.map_or(ChunkResult::Unwanted, items::chunk_result)
    }

    fn end(&mut self, item: usize, outcome: Outcome) {
        let outcome = outcome.and_then(|payload| {
            if items::fits(&payload) {
                return Ok(payload);
            }
            let message = "the output is too large for a worker process".into();
            Err(Failure { kind: FailureKind::Permanent, message })
        });
        self.ends.push((self.place(item), Ended::Outcome(outcome)));
    }

    fn reject(&mut self, item: usize, rejection: Rejection) {
        self.ends.push((self.place(item), Ended::Rejected(rejection)));
    }
}

/// Takes the levels that the host sends: the first, or all that follow.
fn follow_level(log: &OwnedFd, attach: Option<Box<dyn Fn() + Send>>) {
    loop {
        let mut number = [0];
        match rustix::net::recv(log.as_fd(), &mut number[..], rustix::net::RecvFlags::empty()) {
            Ok((1, _)) => LEVEL.store(number[0], Ordering::Relaxed),
            Err(rustix::io::Errno::INTR) => continue,
            Ok(_) | Err(_) => return,
        }
        match &attach {
            Some(attach) => attach(),
            None => return,
        }
    }
}

fn send_line(level: LogLevel, _model: &str, target: &str, message: &str, fields: &str) {
    let Some(log) = LOG.get() else { return };
    let packet = lines::write(level, target, message, fields);
    // The host has left: nobody reads any more.
    let _ = rustix::net::send(log, &packet, rustix::net::SendFlags::NOSIGNAL);
}
