//! Redis: a queue is a list or a stream. Streams can also be taken from, by a consumer group that all hosts share.

use std::{
    borrow::Cow,
    collections::HashMap,
    fs,
    time::{Duration, Instant},
};

use bytes::Bytes;
use parking_lot::Mutex;
use redis::{
    Client, ErrorKind, IntoConnectionInfo, Pipeline, RedisError, ServerErrorKind, TlsCertificates, Value,
    aio::{ConnectionManager, ConnectionManagerConfig},
};
use serde_json::value::RawValue;

use crate::{Answer, Backend, Message, QueueError, Received, RedisShape, RedisSpec, Source, SpecError, fits};

/// The group that all hosts belong to.
const GROUP: &str = "modalkit";
/// Messages in one pipeline.
const BATCH: usize = 256;
const CONNECT_TIME_MAX: Duration = Duration::from_secs(2);
const RESPONSE_TIME_MAX: Duration = Duration::from_secs(5);
/// Between two tries to connect.
const RECONNECT_DELAY_MAX: Duration = Duration::from_secs(1);
/// Fields of an entry.
const BODY: &str = "data";
const JOB: &str = "job_id";
const TRACE: &str = "traceparent";

pub(crate) struct Redis {
    client: Client,
    /// `None` until a runtime is there that it can live on.
    connection: Mutex<Option<ConnectionManager>>,
    spec: RedisSpec,
    consuming: Mutex<HashMap<String, Consuming>>,
}

/// How far taking from a stream has come.
struct Consuming {
    /// A connection that waits for entries, and nobody else.
    connection: ConnectionManager,
    /// What this host had taken before it was started, up to here; `None` when all of it has been seen.
    own: Option<String>,
    /// When it last looked for what others have taken and left.
    looked: Option<Instant>,
}

impl Redis {
    pub(crate) fn open(spec: &RedisSpec) -> Result<Self, SpecError> {
        Ok(Self {
            client: client(spec)?,
            connection: Mutex::default(),
            spec: spec.clone(),
            consuming: Mutex::default(),
        })
    }

    fn new_connection(&self, response_time_max: Duration) -> Result<ConnectionManager, QueueError> {
        let config = ConnectionManagerConfig::new()
            .set_connection_timeout(Some(CONNECT_TIME_MAX))
            .set_response_timeout(Some(response_time_max))
            .set_max_delay(RECONNECT_DELAY_MAX);
        ConnectionManager::new_lazy_with_config(self.client.clone(), config)
            .map_err(|error| self.queue_error(&error))
    }

    fn connection(&self) -> Result<ConnectionManager, QueueError> {
        let mut connection = self.connection.lock();
        match &*connection {
            Some(connection) => Ok(connection.clone()),
            None => Ok(connection.insert(self.new_connection(RESPONSE_TIME_MAX)?).clone()),
        }
    }

    /// Runs commands; one answer each.
    pub(crate) async fn run(
        &self,
        pipeline: &Pipeline,
    ) -> Result<Vec<Result<Value, QueueError>>, QueueError> {
        let mut connection = self.connection()?;
        let answers: Vec<Value> =
            pipeline.query_async(&mut connection).await.map_err(|error| self.reset(&error))?;
        let each = |answer: Value| answer.extract_error().map_err(|error| self.reset(&error));
        Ok(answers.into_iter().map(each).collect())
    }

    /// After an error the connection is made anew, unless it is the command that Redis refuses: a connection that was refused once
    /// stays so, and one that nobody answers on any more is only known to be dead after a long time.
    fn reset(&self, error: &RedisError) -> QueueError {
        let of_the_command = matches!(error.kind(), ErrorKind::Server(kind) if kind != ServerErrorKind::ReadOnly)
            && !matches!(error.code(), Some("NOAUTH" | "WRONGPASS"));
        if !of_the_command {
            *self.connection.lock() = None;
        }
        self.queue_error(error)
    }

    /// The same for messages of which some are too large.
    pub(crate) async fn send_each(
        &self,
        messages: &[Message],
        add: impl Fn(&mut Pipeline, &Message) + Send,
    ) -> Vec<Result<(), QueueError>> {
        let mut results: Vec<Result<(), QueueError>> =
            messages.iter().map(|message| fits(message, self.spec.message_bytes_max)).collect();
        let mut pipeline = Pipeline::new();
        // All or none: one that fails must not be overtaken by those behind it.
        pipeline.atomic().ignore_errors();
        for (message, result) in messages.iter().zip(&results) {
            if result.is_ok() {
                add(&mut pipeline, message);
            }
        }
        if pipeline.is_empty() {
            return results;
        }
        let answered = self.run(&pipeline).await;
        let mut answers = answered.as_ref().ok().into_iter().flatten();
        for result in results.iter_mut().filter(|result| result.is_ok()) {
            *result = match (&answered, answers.next()) {
                (Err(error), _) => Err(error.clone()),
                (Ok(_), Some(Ok(_))) => Ok(()),
                (Ok(_), Some(Err(error))) => Err(error.clone()),
                (Ok(_), None) => {
                    Err(QueueError::Unavailable("Redis did not answer every command".to_owned()))
                }
            };
        }
        results
    }

    pub(crate) fn queue_error(&self, error: &RedisError) -> QueueError {
        let at = self.client.get_connection_info().addr();
        let text = match error.kind() {
            // It would show what was read.
            ErrorKind::Parse | ErrorKind::UnexpectedReturnType => {
                format!("Redis at {at} answered with something else than was asked for")
            }
            _ => format!("Redis at {at}: {error}"),
        };
        let denied = matches!(
            error.kind(),
            ErrorKind::AuthenticationFailed | ErrorKind::Server(ServerErrorKind::NoPerm)
        ) || matches!(error.code(), Some("NOAUTH" | "WRONGPASS"));
        match error.kind() {
            _ if denied => QueueError::Denied(text),
            // Another kind of value lies under the queue's name.
            _ if error.code() == Some("WRONGTYPE") => QueueError::Rejected(format!(
                "{text}: the queue's name belongs to something else than a {}",
                if self.spec.shape == RedisShape::List { "list" } else { "stream" }
            )),
            _ => QueueError::Unavailable(text),
        }
    }

    /// Takes entries that were given to this host before, that others have left, or that are new, in this order.
    async fn take(
        &self,
        queue: &str,
        max: usize,
        wait: Duration,
        hidden: Duration,
    ) -> Result<Vec<Received>, QueueError> {
        let (mut connection, own, looks) = self.consuming(queue, wait, hidden).await?;
        let consumer = &self.spec.consumer;
        let failed = |error: &RedisError| self.forget(queue, error);
        if let Some(own) = own {
            let mut read = redis::cmd("XREADGROUP");
            read.arg("GROUP")
                .arg(GROUP)
                .arg(consumer)
                .arg("COUNT")
                .arg(max)
                .arg("STREAMS")
                .arg(queue)
                .arg(own);
            let reply: StreamRead =
                read.query_async(&mut connection).await.map_err(|error| failed(&error))?;
            let entries = entries_of(reply);
            let seen = entries.last().map(|(id, _)| id.clone());
            if let Some(consuming) = self.consuming.lock().get_mut(queue) {
                consuming.own.clone_from(&seen);
            }
            if seen.is_some() {
                return self.received(queue, entries).await;
            }
        }
        if looks {
            // Those that have been idle, wherever they stand among those that are worked on.
            let idle = hidden.as_millis() as u64;
            let mut look = redis::cmd("XPENDING");
            look.arg(queue).arg(GROUP).arg("IDLE").arg(idle).arg("-").arg("+").arg(max);
            let left: Vec<(String, String, u64, u64)> =
                look.query_async(&mut connection).await.map_err(|error| failed(&error))?;
            if !left.is_empty() {
                let ids: Vec<&String> = left.iter().map(|(id, ..)| id).collect();
                let mut claim = redis::cmd("XCLAIM");
                claim.arg(queue).arg(GROUP).arg(consumer).arg(idle).arg(&ids);
                let claimed: Vec<Option<StreamEntry>> =
                    claim.query_async(&mut connection).await.map_err(|error| failed(&error))?;
                let entries: Vec<StreamEntry> = claimed.into_iter().flatten().collect();
                if !entries.is_empty() {
                    return self.received(queue, entries).await;
                }
            }
            if let Some(consuming) = self.consuming.lock().get_mut(queue) {
                consuming.looked = Some(Instant::now());
            }
        }
        let mut read = redis::cmd("XREADGROUP");
        read.arg("GROUP").arg(GROUP).arg(consumer).arg("COUNT").arg(max);
        read.arg("BLOCK").arg((wait.as_millis() as u64).max(1)).arg("STREAMS").arg(queue).arg(">");
        let reply: StreamRead = read.query_async(&mut connection).await.map_err(|error| failed(&error))?;
        self.received(queue, entries_of(reply)).await
    }

    /// The connection for a stream, made with its group where there is none; from where on to look at what this host had taken, and
    /// whether to look for what others have left.
    async fn consuming(
        &self,
        queue: &str,
        wait: Duration,
        hidden: Duration,
    ) -> Result<(ConnectionManager, Option<String>, bool), QueueError> {
        if let Some(consuming) = self.consuming.lock().get(queue) {
            let looks = consuming.looked.is_none_or(|looked| looked.elapsed() > hidden / 2);
            return Ok((consuming.connection.clone(), consuming.own.clone(), looks));
        }
        let mut connection = self.new_connection(wait + RESPONSE_TIME_MAX)?;
        let mut make = redis::cmd("XGROUP");
        // From the first entry on: what was sent before the first host came is run as well.
        make.arg("CREATE").arg(queue).arg(GROUP).arg("0").arg("MKSTREAM");
        match make.query_async::<()>(&mut connection).await {
            Err(error) if error.code() != Some("BUSYGROUP") => return Err(self.queue_error(&error)),
            _ => {}
        }
        let own = Some("0".to_owned());
        let consuming = Consuming { connection: connection.clone(), own: own.clone(), looked: None };
        self.consuming.lock().insert(queue.to_owned(), consuming);
        Ok((connection, own, true))
    }

    /// After an error everything is looked at anew: the group may be gone, and an answer with entries may have been lost.
    fn forget(&self, queue: &str, error: &RedisError) -> QueueError {
        self.consuming.lock().remove(queue);
        self.queue_error(error)
    }

    async fn received(&self, queue: &str, entries: Vec<StreamEntry>) -> Result<Vec<Received>, QueueError> {
        let mut received = Vec::with_capacity(entries.len());
        let mut gone = Vec::new();
        for (id, fields) in entries {
            let Some(fields) = fields else {
                // It was deleted while somebody had it.
                gone.push(id);
                continue;
            };
            let field = |name: &str| {
                fields.chunks_exact(2).find(|pair| pair[0] == name.as_bytes()).map(|pair| pair[1].clone())
            };
            // One without the field is handed on as it is, to be refused in words.
            let body = field(BODY).map_or_else(Bytes::new, Bytes::from);
            let traceparent = field(TRACE).and_then(|trace| String::from_utf8(trace).ok());
            received.push(Received { receipt: id.clone(), id, body, traceparent });
        }
        if !gone.is_empty() {
            self.acknowledge(queue, &gone).await?;
        }
        Ok(received)
    }
}

/// An entry: its id, and its fields and their values in turns; none where it was deleted. Others may have written anything there.
type StreamEntry = (String, Option<Vec<Vec<u8>>>);

/// What is read from streams: for each its name and entries.
type StreamRead = Option<Vec<(Vec<u8>, Vec<StreamEntry>)>>;

fn entries_of(read: StreamRead) -> Vec<StreamEntry> {
    read.into_iter().flatten().flat_map(|(_, entries)| entries).collect()
}

fn client(spec: &RedisSpec) -> Result<Client, SpecError> {
    let refuse = |what: &str, error: &dyn std::fmt::Display| SpecError(format!("{what}: {error}"));
    let mut info = spec
        .url
        .as_str()
        .into_connection_info()
        .map_err(|error| refuse("not an address of Redis", &error))?;
    let mut settings = info.redis_settings().clone();
    if let (None, Some(name)) = (settings.username(), &spec.username) {
        settings = settings.set_username(name);
    }
    if let (None, Some(password)) = (settings.password(), &spec.password) {
        settings = settings.set_password(password);
    }
    info = info.set_redis_settings(settings);
    let root_cert = match &spec.ca {
        None => None,
        Some(file) => {
            Some(fs::read(file).map_err(|error| refuse(&format!("can't read {}", file.display()), &error))?)
        }
    };
    let client = if spec.url.starts_with("rediss:") {
        Client::build_with_tls(info, TlsCertificates { client_tls: None, root_cert })
    } else {
        Client::open(info)
    };
    client.map_err(|error| refuse("can't be used", &error))
}

impl Backend for Redis {
    fn check(&self) -> Answer<'_, Result<(), QueueError>> {
        Box::pin(async {
            let mut pipeline = Pipeline::new();
            pipeline.ignore_errors().cmd("PING");
            self.run(&pipeline).await?.into_iter().try_for_each(|answer| answer.map(drop))
        })
    }

    fn batch_max(&self, _: &str) -> usize {
        BATCH
    }

    fn send<'a>(
        &'a self,
        queue: &'a str,
        messages: &'a [Message],
    ) -> Answer<'a, Vec<Result<(), QueueError>>> {
        Box::pin(self.send_each(messages, move |pipeline, message| match self.spec.shape {
            RedisShape::List => {
                // A list has nothing but bodies.
                pipeline.cmd("LPUSH").arg(queue).arg(&*with_job_id(message));
            }
            RedisShape::Stream => {
                pipeline.cmd("XADD").arg(queue);
                if let Some(max) = self.spec.stream_length_max {
                    pipeline.arg("MAXLEN").arg("~").arg(max);
                }
                pipeline.arg("*").arg(BODY).arg(&*message.body).arg(JOB).arg(&message.job_id);
                if let Some(trace) = &message.traceparent {
                    pipeline.arg(TRACE).arg(trace);
                }
            }
        }))
    }

    fn source(&self) -> Option<&dyn Source> {
        (self.spec.shape == RedisShape::Stream).then_some(self)
    }
}

/// A message's body with the job's id as its last member, where it is an object without such a member of its own: by it, those who read
/// a list tell a message that came twice.
fn with_job_id(message: &Message) -> Cow<'_, [u8]> {
    let body = &*message.body;
    let Some(open) = body.trim_ascii_end().strip_suffix(b"}") else { return Cow::Borrowed(body) };
    let members: Result<HashMap<Cow<'_, str>, &RawValue>, _> = serde_json::from_slice(body);
    match members {
        Ok(members) if !members.contains_key(JOB) => {
            let comma = if members.is_empty() { "" } else { "," };
            let end = format!("{comma}\"{JOB}\":\"{}\"}}", message.job_id);
            Cow::Owned([open, end.as_bytes()].concat())
        }
        _ => Cow::Borrowed(body),
    }
}

impl Source for Redis {
    fn receive<'a>(
        &'a self,
        queue: &'a str,
        max: usize,
        wait: Duration,
        hidden: Duration,
    ) -> Answer<'a, Result<Vec<Received>, QueueError>> {
        Box::pin(self.take(queue, max, wait, hidden))
    }

    fn acknowledge<'a>(
        &'a self,
        queue: &'a str,
        receipts: &'a [String],
    ) -> Answer<'a, Result<(), QueueError>> {
        Box::pin(async move {
            let mut pipeline = Pipeline::new();
            // Acknowledged alone, it would stay in the stream for ever.
            pipeline.atomic();
            pipeline.cmd("XACK").arg(queue).arg(GROUP).arg(receipts).ignore();
            pipeline.cmd("XDEL").arg(queue).arg(receipts).ignore();
            let mut connection = self.connection()?;
            pipeline.query_async::<()>(&mut connection).await.map_err(|error| self.reset(&error))
        })
    }

    fn extend<'a>(
        &'a self,
        queue: &'a str,
        receipts: &'a [String],
        _: Duration,
    ) -> Answer<'a, Result<(), QueueError>> {
        Box::pin(async move {
            let mut claim = redis::cmd("XCLAIM");
            // Claimed by whoever has it, it counts as just taken.
            claim.arg(queue).arg(GROUP).arg(&self.spec.consumer).arg(0).arg(receipts).arg("JUSTID");
            let mut connection = self.connection()?;
            claim.query_async::<Value>(&mut connection).await.map(drop).map_err(|error| self.reset(&error))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lists_messages_say_which_job_they_are_of() {
        let of = |body: &'static str| {
            let message = Message {
                job_id: "j1".to_owned(),
                delivery_id: "j1-1".to_owned(),
                body: body.into(),
                traceparent: None,
            };
            String::from_utf8(with_job_id(&message).into_owned()).unwrap()
        };
        assert_eq!(of(r#"{"a": 1e999, "b": "\ud800"}"#), r#"{"a": 1e999, "b": "\ud800","job_id":"j1"}"#);
        assert_eq!(of("{} "), r#"{"job_id":"j1"}"#);
        for kept in [r#"{"job_id": 7}"#, "[1]", "", "}", r#"{"a": [{"job_id": 1}}"#] {
            assert_eq!(of(kept), kept);
        }
        assert!(of(r#"{"a": {"job_id": 1}}"#).ends_with(r#","job_id":"j1"}"#));
    }
}
