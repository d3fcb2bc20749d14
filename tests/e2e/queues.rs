//! One suite that every queue passes against its real broker: order, sizes, any text, missing queues, and brokers that are away, killed,
//! hung, or refuse.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use bytes::Bytes;
use modalkit_engine::Engine;
use modalkit_loader::{Libraries, Preflight, Settings, Trust};
use modalkit_queue::{
    AwsCredentials, Backend, BackendContext, MemorySpec, Message, PluginSpec, QueueError, RedisShape,
    RedisSpec, Source, Spec, SqsSpec, TaskIqSpec, open,
};
use modalkit_tests::{
    PATIENCE,
    brokers::{self, Server},
    built, wait_until,
};
use serde_json::{Value, json};

/// A secret that opens nothing.
const WRONG: &str = "wr0ng-s3cret-9f1";

/// A broker, how to reach it, and how to look into its queues.
struct Rig {
    server: Option<Server>,
    spec: Spec,
    /// What the server is started with where it asks who comes, and how to reach that one wrongly.
    refuses: Option<(Server, Spec)>,
    /// The bodies in a queue, the oldest first.
    look: fn(&Self, &dyn Backend, &str) -> Vec<Vec<u8>>,
    queue: &'static str,
    /// `None` where there is no limit.
    bytes_max: Option<usize>,
    keeps_order: bool,
}

impl Rig {
    fn port(&self) -> u16 {
        self.server.as_ref().map_or(0, |server| server.port)
    }

    fn open(&self) -> Arc<dyn Backend> {
        of(&self.spec)
    }
}

fn of(spec: &Spec) -> Arc<dyn Backend> {
    // As the host does; another test may have been first.
    modalkit::app::install_cryptography();
    let settings = Settings {
        trust: Trust { any_owner: true, any_mode: true },
        preflight: Preflight { program: built().join("modalkit"), argument: "preflight", limit: PATIENCE },
        libraries_max: 10,
        log: None,
    };
    let engine = Libraries::new(settings).unwrap();
    let open_plugin = Arc::new(move |file: &Path, pin: Option<&str>| {
        engine.open_queue(file, pin).map_err(|error| error.chain())
    });
    let open_model = Arc::new(|_: &_| unreachable!("no test here asks for a model's own queue"));
    open(spec, &BackendContext { open_plugin, open_model }).unwrap()
}

fn memory() -> Rig {
    Rig {
        server: None,
        spec: Spec::Memory(MemorySpec { messages_max: 100_000, bytes_max: 8 << 20 }),
        refuses: None,
        look: |_, backend, queue| {
            let held = backend.memory().unwrap().look(queue, usize::MAX, Instant::now());
            held.messages.into_iter().map(|message| message.body.to_vec()).collect()
        },
        queue: "results",
        bytes_max: Some(8 << 20),
        keeps_order: true,
    }
}

fn redis_spec(port: u16, shape: RedisShape) -> RedisSpec {
    RedisSpec {
        url: format!("redis://127.0.0.1:{port}"),
        username: None,
        password: None,
        ca: None,
        shape,
        stream_length_max: None,
        message_bytes_max: 8 << 20,
        consumer: "tests".to_owned(),
    }
}

/// What was sent, of what a list holds: there objects have their job's id as their last member.
fn without_job_id(body: Vec<u8>) -> Vec<u8> {
    if !body.starts_with(b"{") {
        return body;
    }
    let text = String::from_utf8(body).unwrap();
    let (before, _) = text.rsplit_once("\"job_id\":\"job-").expect("an object says which job it is of");
    format!("{}}}", before.strip_suffix(',').unwrap_or(before)).into_bytes()
}

fn redis(shape: RedisShape) -> Rig {
    let (server, guarded) = (brokers::redis(&[]), brokers::redis(&["--requirepass", "right"]));
    let wrong = RedisSpec { password: Some(WRONG.to_owned()), ..redis_spec(guarded.port, shape) };
    Rig {
        spec: Spec::Redis(redis_spec(server.port, shape)),
        server: Some(server),
        refuses: Some((guarded, Spec::Redis(wrong))),
        look: match shape {
            RedisShape::List => |rig, _, queue| {
                brokers::redis_list(rig.port(), queue).into_iter().map(without_job_id).collect()
            },
            RedisShape::Stream => |rig, _, queue| {
                brokers::redis_stream(rig.port(), queue).into_iter().map(|(body, _)| body).collect()
            },
        },
        queue: "results",
        bytes_max: Some(8 << 20),
        keeps_order: true,
    }
}

fn taskiq(shape: RedisShape) -> Rig {
    let rig = redis(shape);
    let wrap = |spec: Spec| match spec {
        Spec::Redis(redis) => {
            Spec::TaskIq(TaskIqSpec { redis, task: "on_result".to_owned(), tasks: Default::default() })
        }
        other => other,
    };
    Rig {
        spec: wrap(rig.spec),
        server: rig.server,
        refuses: rig.refuses.map(|(server, spec)| (server, wrap(spec))),
        look: |rig, _, queue| {
            let tasks: Vec<Vec<u8>> = match &rig.spec {
                Spec::TaskIq(spec) if spec.redis.shape == RedisShape::Stream => {
                    brokers::redis_stream(rig.port(), queue).into_iter().map(|(task, _)| task).collect()
                }
                _ => brokers::redis_list(rig.port(), queue),
            };
            let output = |task: &Vec<u8>| {
                #[derive(serde::Deserialize)]
                struct Task<'a> {
                    #[serde(borrow)]
                    kwargs: Arguments<'a>,
                }
                #[derive(serde::Deserialize)]
                struct Arguments<'a> {
                    #[serde(borrow)]
                    output: &'a serde_json::value::RawValue,
                }
                let task: Task<'_> = serde_json::from_slice(task).unwrap();
                task.kwargs.output.get().as_bytes().to_vec()
            };
            tasks.iter().map(output).collect()
        },
        queue: rig.queue,
        bytes_max: rig.bytes_max,
        keeps_order: rig.keeps_order,
    }
}

fn sqs_spec(port: u16, key_id: &str, secret: &str) -> SqsSpec {
    SqsSpec {
        endpoint: Some(format!("http://127.0.0.1:{port}/")),
        region: "us-east-1".to_owned(),
        credentials: Some(AwsCredentials {
            key_id: key_id.to_owned(),
            secret: secret.to_owned(),
            token: None,
        }),
        ca: None,
        message_bytes_max: 1 << 20,
        create_missing: true,
    }
}

fn sqs(queue: &'static str) -> Rig {
    let (server, signed) = (brokers::moto(false), brokers::moto(true));
    let nobody = Spec::Sqs(sqs_spec(signed.port, "AKIANOBODY", WRONG));
    Rig {
        spec: Spec::Sqs(sqs_spec(server.port, "k", "s")),
        server: Some(server),
        refuses: Some((signed, nobody)),
        look: |rig, _, queue| {
            let messages = brokers::sqs_drain(rig.port(), queue);
            messages.iter().map(|message| message["Body"].as_str().unwrap().as_bytes().to_vec()).collect()
        },
        queue,
        // Less what attributes take.
        bytes_max: Some((1 << 20) - 256),
        keeps_order: queue.ends_with(".fifo"),
    }
}

/// A certificate for this machine that is its own authority, and its private key: files in a folder.
fn certified() -> (tempfile::TempDir, PathBuf, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let (certificate, key) = (folder.path().join("certificate.pem"), folder.path().join("key.pem"));
    let made = rcgen::generate_simple_self_signed(vec!["127.0.0.1".to_owned()]).unwrap();
    std::fs::write(&certificate, made.cert.pem()).unwrap();
    std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
    (folder, certificate, key)
}

/// It speaks TLS with a server whose authority it knows, and tells nothing to one whose authority it doesn't.
fn speaks_tls(mut server: Server, known: &Spec, unknown: &Spec) {
    server.start();
    let runtime = runtime();
    let backend = of(known);
    assert_eq!(runtime.block_on(backend.check()), Ok(()));
    deliver(&runtime, &*backend, "results", &[message(1, "{}")]);
    let stranger = of(unknown);
    let results = runtime.block_on(stranger.send("results", &[message(2, "{}")]));
    let [Err(QueueError::Unavailable(why))] = &results[..] else { panic!("{results:?}") };
    assert!(why.to_lowercase().contains("certificate"), "{why}");
}

fn message(number: usize, body: impl Into<Bytes>) -> Message {
    let job_id = format!("job-{number}");
    Message { delivery_id: job_id.clone(), job_id, body: body.into(), traceparent: None }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

/// Sends until every message is taken; a broker that is away is tried again.
fn deliver(runtime: &tokio::runtime::Runtime, backend: &dyn Backend, queue: &str, messages: &[Message]) {
    let mut left = messages.to_vec();
    let begun = Instant::now();
    while !left.is_empty() {
        assert!(begun.elapsed() < PATIENCE, "{} messages are not delivered", left.len());
        let count = left.len().min(backend.batch_max(queue));
        let results = runtime.block_on(backend.send(queue, &left[..count]));
        assert_eq!(results.len(), count);
        let mut rest = left.split_off(count);
        left.retain({
            let mut results = results.iter();
            move |_| results.next().unwrap().is_err()
        });
        if !left.is_empty() {
            thread::sleep(Duration::from_millis(20));
        }
        left.append(&mut rest);
    }
}

/// The suite.
fn conforms(mut rig: Rig) {
    let runtime = runtime();
    let backend = rig.open();
    let queue = rig.queue;
    let look = |rig: &Rig| (rig.look)(rig, &*backend, queue);

    // A broker that is not there yet is told of, and is used once it is.
    if rig.server.is_some() {
        assert!(matches!(runtime.block_on(backend.check()), Err(QueueError::Unavailable(_))));
        let results = runtime.block_on(backend.send(queue, &[message(0, "0")]));
        assert!(matches!(results[..], [Err(QueueError::Unavailable(_))]), "{results:?}");
        rig.server.iter_mut().for_each(Server::start);
        wait_until("it is found", || runtime.block_on(backend.check()).is_ok());
    }

    // Sent to a queue that nobody has made, in order.
    let numbered: Vec<Message> = (0..300).map(|number| message(number, number.to_string())).collect();
    deliver(&runtime, &*backend, queue, &numbered);
    let mut found: Vec<u32> =
        look(&rig).iter().map(|body| String::from_utf8_lossy(body).parse().unwrap()).collect();
    if !rig.keeps_order {
        found.sort_unstable();
    }
    assert_eq!(found, (0..300).collect::<Vec<u32>>());

    // Bodies of every size and every kind of text, to the letter; one that is too large is refused in words.
    let mut texts: Vec<String> = vec!["1".to_owned(), "{}".to_owned()];
    let letters: String = ('\u{0}'..=char::MAX).step_by(97).filter(|letter| !letter.is_control()).collect();
    texts.push(serde_json::to_string(&letters).unwrap());
    texts.push(r#"{"escapes": "\u0000\n\ud83d\ude00 \\ \" ", "number": 1e999, "e": "é😀"}"#.to_owned());
    for size in [1000, 100_000, rig.bytes_max.unwrap_or(8 << 20)] {
        texts.push(format!("\"{}\"", "x".repeat(size - 2)));
    }
    let messages: Vec<Message> =
        texts.iter().enumerate().map(|(number, text)| message(1000 + number, text.clone())).collect();
    let before = look(&rig).len();
    for one in &messages {
        if let Some(memory) = backend.memory() {
            // All of them together are more than this memory holds.
            let now = Instant::now();
            let (_, lease) = memory.take(queue, usize::MAX, Duration::from_secs(60), now);
            let _ = memory.acknowledge(queue, &lease.unwrap().receipt, now);
        }
        deliver(&runtime, &*backend, queue, std::slice::from_ref(one));
        if backend.memory().is_some() {
            assert_eq!(look(&rig), [one.body.to_vec()]);
        }
    }
    if backend.memory().is_none() {
        let mut found = look(&rig);
        let taken_out = matches!(rig.spec, Spec::Sqs(_));
        found.drain(..if taken_out { 0 } else { before });
        let mut expected: Vec<Vec<u8>> = texts.iter().map(|text| text.as_bytes().to_vec()).collect();
        if !rig.keeps_order {
            found.sort();
            expected.sort();
        }
        assert!(found == expected, "a body is not what was sent");
    }
    if let Some(bytes_max) = rig.bytes_max {
        let large = message(2000, format!("\"{}\"", "x".repeat(bytes_max)));
        let refused = runtime.block_on(backend.send(queue, &[message(2001, "1"), large]));
        assert!(refused[0].is_ok() || backend.memory().is_some(), "{refused:?}");
        let Err(QueueError::Rejected(why)) = &refused[1] else { panic!("{refused:?}") };
        assert!(why.contains("GET /jobs/job-2000"), "{why}");
    }

    if let Some(server) = &mut rig.server {
        // Killed and back; hung and back.
        server.kill();
        let results = runtime.block_on(backend.send(queue, &[message(3000, "3")]));
        assert!(matches!(results[..], [Err(QueueError::Unavailable(_))]), "{results:?}");
        server.start();
        deliver(&runtime, &*backend, queue, &[message(3001, "31")]);
        server.hang();
        let results = runtime.block_on(backend.send(queue, &[message(3002, "32")]));
        assert!(matches!(results[..], [Err(QueueError::Unavailable(_))]), "{results:?}");
        server.go_on();
        deliver(&runtime, &*backend, queue, &[message(3003, "33")]);
        let found = (rig.look)(&rig, &*backend, queue);
        let has = |body: &str| found.iter().any(|found| found == body.as_bytes());
        assert!(has("31") && has("33"), "what was said to be sent is there");
    }
    if let Some((mut server, spec)) = rig.refuses.take() {
        server.start();
        if matches!(spec, Spec::Sqs(_)) {
            let _ = brokers::access_key(server.port);
        }
        let refused = of(&spec);
        let Err(QueueError::Denied(why)) = runtime.block_on(refused.check()) else { panic!("it let us in") };
        assert!(!why.contains(WRONG), "{why}");
        let results = runtime.block_on(refused.send(queue, &[message(4000, "4")]));
        assert!(matches!(results[..], [Err(QueueError::Denied(_))]), "{results:?}");
    }
}

/// The queue in a file, whose plugin comes after the first message.
fn file(folder: &Path) -> Rig {
    Rig {
        server: None,
        spec: Spec::Plugin(PluginSpec {
            name: "file".to_owned(),
            plugin: "queue-file".to_owned(),
            sha256: None,
            folders: vec![folder.to_owned()],
            settings: json!({"folder": folder.join("results"), "rotate_bytes": 1 << 30}).to_string(),
            secrets: Default::default(),
            batch_max: 256,
        }),
        refuses: None,
        look: |rig, _, queue| {
            #[derive(serde::Deserialize)]
            struct Line<'a> {
                #[serde(borrow)]
                body: &'a serde_json::value::RawValue,
            }
            let Spec::Plugin(spec) = &rig.spec else { return Vec::new() };
            let file = spec.folders[0].join("results").join(format!("{queue}.jsonl"));
            let text = std::fs::read_to_string(file).unwrap_or_default();
            let body =
                |line: &str| serde_json::from_str::<Line<'_>>(line).unwrap().body.get().as_bytes().to_vec();
            text.lines().map(body).collect()
        },
        queue: "results",
        bytes_max: None,
        keeps_order: true,
    }
}

#[test]
fn a_queue_of_a_plugin_conforms() {
    let folder = tempfile::tempdir().unwrap();
    let rig = file(folder.path());
    let (runtime, backend) = (runtime(), rig.open());
    let Err(QueueError::Unavailable(why)) = runtime.block_on(backend.check()) else {
        panic!("nobody is there")
    };
    assert!(why.contains("waits for its plugin queue-file.so"), "{why}");
    // What is no plugin, and what is one that is told wrong settings, is said and waited out.
    let path = folder.path().join("queue-file.so");
    modalkit_tests::put(b"no library", &path);
    wait_until(
        "it is looked at",
        || matches!(runtime.block_on(backend.check()), Err(QueueError::Unavailable(why)) if why.contains("no ELF file")),
    );
    modalkit_tests::install(&modalkit_tests::library("queue-file"), &path);
    wait_until("it is taken up", || runtime.block_on(backend.check()).is_ok());
    conforms(rig);

    let rig = file(folder.path());
    let Spec::Plugin(spec) = rig.spec else { return };
    let wrong = of(&Spec::Plugin(PluginSpec { settings: json!({"fodler": "x"}).to_string(), ..spec }));
    let Err(QueueError::Denied(why)) = runtime.block_on(wrong.check()) else { panic!("settings are wrong") };
    assert!(why.contains("folder"), "{why}");
}

#[test]
fn memory_conforms() {
    conforms(memory());
}

/// Takes until there is a message.
fn receive(
    runtime: &tokio::runtime::Runtime,
    source: &dyn Source,
    hidden: Duration,
) -> modalkit_queue::Received {
    let begun = Instant::now();
    loop {
        assert!(begun.elapsed() < PATIENCE, "nothing came");
        let received = runtime.block_on(source.receive("requests", 10, Duration::from_secs(1), hidden));
        if let Some(first) = received.unwrap_or_default().into_iter().next() {
            return first;
        }
    }
}

/// What is taken is hidden, comes again unless it is acknowledged, and not before it has been hidden for as long as was said last.
fn gives_messages(server: &mut Server, spec: &Spec, other: &Spec) {
    server.start();
    let runtime = runtime();
    let (backend, second) = (of(spec), of(other));
    let (source, second) = (backend.source().unwrap(), second.source().unwrap());
    let hidden = Duration::from_secs(2);
    let at_once = Duration::from_secs(1);
    deliver(&runtime, &*backend, "requests", &[message(1, "{\"a\":1}")]);
    let first = receive(&runtime, source, hidden);
    assert_eq!(first.body, "{\"a\":1}");
    let nothing = runtime.block_on(second.receive("requests", 10, at_once, hidden)).unwrap();
    assert!(nothing.is_empty(), "it is hidden: {nothing:?}");
    let extended = Instant::now();
    runtime.block_on(source.extend("requests", std::slice::from_ref(&first.receipt), hidden)).unwrap();
    let again = receive(&runtime, second, hidden);
    // Less what clocks and brokers round.
    assert!(extended.elapsed() > hidden - Duration::from_millis(300), "{:?}", extended.elapsed());
    assert_eq!((&again.id, &again.body), (&first.id, &first.body));
    runtime.block_on(second.acknowledge("requests", &[again.receipt])).unwrap();
    thread::sleep(hidden + Duration::from_millis(500));
    let nothing = runtime.block_on(source.receive("requests", 10, at_once, hidden)).unwrap();
    assert!(nothing.is_empty(), "it was acknowledged: {nothing:?}");
}

const READ_WITH_BOTO3: &str = r#"
import sys, boto3
sqs = boto3.client("sqs", endpoint_url=sys.argv[1], region_name="us-east-1", aws_access_key_id="k", aws_secret_access_key="s")
url = sqs.get_queue_url(QueueName=sys.argv[2])["QueueUrl"]
for message in sqs.receive_message(QueueUrl=url, MaxNumberOfMessages=10, MessageAttributeNames=["All"])["Messages"]:
    attributes = message["MessageAttributes"]
    print(message["Body"].encode().hex(), attributes["job_id"]["StringValue"], attributes["traceparent"]["StringValue"])
"#;

/// What a worker of TaskIQ, with this broker, has executed.
const WORKER: &str = r#"
import json, os
from taskiq_redis import ListQueueBroker, RedisStreamBroker
kind = {"list": ListQueueBroker, "stream": RedisStreamBroker}[os.environ["KIND"]]
broker = kind(os.environ["URL"], queue_name="results")

@broker.task(task_name="on_result")
async def on_result(job_id, output):
    with open(os.environ["OUT"], "a") as out:
        out.write(json.dumps([job_id, output]) + "\n")
"#;

fn a_worker_executes(kind: &str, shape: RedisShape) {
    let mut server = brokers::redis(&[]);
    server.start();
    let runtime = runtime();
    let backend = of(&Spec::TaskIq(TaskIqSpec {
        redis: redis_spec(server.port, shape),
        task: "on_result".to_owned(),
        tasks: Default::default(),
    }));
    let messages: Vec<Message> = (0..20)
        .map(|number| message(number, json!({"status": "success", "n": number, "é": "😀"}).to_string()))
        .collect();
    // Before any worker has come.
    deliver(&runtime, &*backend, "results", &messages);
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("worker.py"), WORKER).unwrap();
    let out = folder.path().join("out");
    let mut worker = std::process::Command::new(modalkit_tests::python_tool("taskiq"))
        .args(["worker", "worker:broker", "--workers", "1", "--no-configure-logging"])
        .current_dir(folder.path())
        .env("KIND", kind)
        .env("URL", format!("redis://127.0.0.1:{}", server.port))
        .env("OUT", &out)
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let lines = || std::fs::read_to_string(&out).unwrap_or_default().lines().count();
    wait_until("the worker has executed all of them", || lines() >= 20);
    // Its own processes end with it, or with their broker.
    modalkit_tests::signal(worker.id(), "TERM");
    let begun = Instant::now();
    while worker.try_wait().unwrap().is_none() && begun.elapsed() < Duration::from_secs(3) {
        thread::sleep(Duration::from_millis(20));
    }
    kill_family(worker.id());
    let _ = worker.wait();
    let mut executed: Vec<Value> = std::fs::read_to_string(&out)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    executed.sort_by_key(|line| line[1]["n"].as_u64());
    let expected: Vec<Value> = (0..20)
        .map(|number| json!([format!("job-{number}"), {"status": "success", "n": number, "é": "😀"}]))
        .collect();
    assert_eq!(executed, expected);
}

/// Ends a process and its children.
fn kill_family(process: u32) {
    let children =
        std::fs::read_to_string(format!("/proc/{process}/task/{process}/children")).unwrap_or_default();
    for child in children.split_whitespace() {
        kill_family(child.parse().unwrap());
    }
    // It may have ended by itself.
    let _ =
        std::process::Command::new("sh").args(["-c", &format!("kill -KILL {process} 2>/dev/null")]).status();
}

/// What needs Redis.
mod with_redis {
    use super::*;

    #[test]
    fn lists_of_redis_conform() {
        conforms(redis(RedisShape::List));
    }

    #[test]
    fn streams_of_redis_conform() {
        conforms(redis(RedisShape::Stream));
    }

    #[test]
    fn lists_of_taskiq_conform() {
        conforms(taskiq(RedisShape::List));
    }

    #[test]
    fn streams_of_taskiq_conform() {
        conforms(taskiq(RedisShape::Stream));
    }

    #[test]
    fn redis_is_spoken_to_over_tls() {
        let (_folder, certificate, key) = certified();
        let server = brokers::redis_with_tls(&certificate, &key);
        let of_tls = |ca: Option<PathBuf>| {
            let url = format!("rediss://127.0.0.1:{}", server.port);
            Spec::Redis(RedisSpec { url, ca, ..redis_spec(server.port, RedisShape::List) })
        };
        let (known, unknown) = (of_tls(Some(certificate.clone())), of_tls(None));
        speaks_tls(server, &known, &unknown);
    }

    #[test]
    fn a_password_that_is_mended_is_taken_without_a_restart() {
        let mut server = brokers::redis(&["--requirepass", "right"]);
        server.start();
        let runtime = runtime();
        let spec =
            RedisSpec { password: Some("later".to_owned()), ..redis_spec(server.port, RedisShape::List) };
        let backend = of(&Spec::Redis(spec));
        assert!(matches!(runtime.block_on(backend.check()), Err(QueueError::Denied(_))));
        brokers::redis_set_password(server.port, "right", "later");
        wait_until("it is let in", || runtime.block_on(backend.check()).is_ok());
        assert_eq!(runtime.block_on(backend.send("results", &[message(1, "1")])), [Ok(())]);
    }

    #[test]
    fn an_entry_that_is_no_text_stops_nobody() {
        let mut server = brokers::redis(&[]);
        server.start();
        let runtime = runtime();
        let backend = of(&Spec::Redis(redis_spec(server.port, RedisShape::Stream)));
        brokers::redis_add_bytes(server.port, "requests", b"\xff\xfe");
        deliver(&runtime, &*backend, "requests", &[message(1, "{}")]);
        let (source, mut bodies) = (backend.source().unwrap(), Vec::new());
        wait_until("both came", || {
            let hidden = Duration::from_secs(30);
            let received = runtime.block_on(source.receive("requests", 10, Duration::from_secs(1), hidden));
            bodies.extend(received.unwrap().into_iter().map(|received| received.body));
            bodies.len() == 2
        });
        assert_eq!(bodies, ["", "{}"]);
    }

    #[test]
    fn streams_of_redis_give_messages_until_they_are_acknowledged() {
        let mut server = brokers::redis(&[]);
        let spec = redis_spec(server.port, RedisShape::Stream);
        let other = RedisSpec { consumer: "another".to_owned(), ..spec.clone() };
        gives_messages(&mut server, &Spec::Redis(spec), &Spec::Redis(other));
        assert!(brokers::redis_stream(server.port, "requests").is_empty(), "nothing is left in the stream");
    }

    /// What needs workers of TaskIQ too.
    mod with_taskiq {
        use super::super::*;

        #[test]
        fn a_worker_of_taskiq_executes_what_a_list_holds() {
            a_worker_executes("list", RedisShape::List);
        }

        #[test]
        fn a_worker_of_taskiq_executes_what_a_stream_holds() {
            a_worker_executes("stream", RedisShape::Stream);
        }
    }
}

/// What needs moto, which speaks SQS.
mod with_moto {
    use super::*;

    #[test]
    fn queues_of_sqs_conform() {
        conforms(sqs("results"));
    }

    #[test]
    fn ordered_queues_of_sqs_conform() {
        conforms(sqs("results.fifo"));
    }

    #[test]
    fn queues_of_sqs_give_messages_until_they_are_acknowledged() {
        let mut server = brokers::moto(false);
        let spec = Spec::Sqs(sqs_spec(server.port, "k", "s"));
        gives_messages(&mut server, &spec, &spec);
    }

    #[test]
    fn sqs_is_spoken_to_over_tls() {
        let (_folder, certificate, key) = certified();
        let server = brokers::moto_with_tls(&certificate, &key);
        let of_tls = |ca: Option<PathBuf>| {
            let endpoint = Some(format!("https://127.0.0.1:{}/", server.port));
            Spec::Sqs(SqsSpec { endpoint, ca, ..sqs_spec(server.port, "k", "s") })
        };
        let (known, unknown) = (of_tls(Some(certificate.clone())), of_tls(None));
        speaks_tls(server, &known, &unknown);
    }

    #[test]
    fn a_right_signature_is_taken_and_a_wrong_one_refused() {
        let mut server = brokers::moto(true);
        server.start();
        let (key_id, secret) = brokers::access_key(server.port);
        let runtime = runtime();
        let right = of(&Spec::Sqs(sqs_spec(server.port, &key_id, &secret)));
        assert_eq!(runtime.block_on(right.check()), Ok(()));
        assert_eq!(runtime.block_on(right.send("signed", &[message(1, "{}")])), [Ok(())]);
        let wrong = of(&Spec::Sqs(sqs_spec(server.port, &key_id, "no-secret-at-all")));
        let results = runtime.block_on(wrong.send("signed", &[message(1, "{}")]));
        let [Err(QueueError::Denied(why))] = &results[..] else { panic!("{results:?}") };
        assert!(why.contains("SignatureDoesNotMatch") && !why.contains("no-secret"), "{why}");
    }

    #[test]
    fn boto3_reads_what_was_sent_byte_for_byte() {
        let mut server = brokers::moto(false);
        server.start();
        let runtime = runtime();
        let backend = of(&Spec::Sqs(sqs_spec(server.port, "k", "s")));
        let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let body = "{\"status\": \"success\", \"text\": \"é😀 \\u0000\", \"n\": 0.10}";
        let sent = Message { traceparent: Some(trace.to_owned()), ..message(7, body) };
        assert_eq!(runtime.block_on(backend.send("for-boto3", &[sent])), [Ok(())]);
        let printed =
            brokers::python(READ_WITH_BOTO3, &[&format!("http://127.0.0.1:{}", server.port), "for-boto3"]);
        let words: Vec<&str> = printed.split_whitespace().collect();
        let hex: String = body.bytes().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(words, [hex.as_str(), "job-7", trace]);
    }
}
