//! Real brokers for tests: Redis, and moto, which speaks SQS. Each is started on a free loopback port in a temporary folder, and ended
//! by its process id.

use std::{
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{free_port, python_tool, signal, wait_until, workspace};

/// How long a broker that doesn't answer is given.
const LOOK_TIME_MAX: Duration = Duration::from_secs(2);

/// A program that listens on one port, and can be killed, stopped, and started again.
pub struct Server {
    /// Where it listens.
    pub port: u16,
    command: Box<dyn Fn() -> Command + Send + Sync>,
    child: Option<Child>,
    answers: fn(u16) -> bool,
    folder: TempDir,
}

impl Server {
    pub(crate) fn new(
        port: u16,
        folder: TempDir,
        answers: fn(u16) -> bool,
        command: impl Fn() -> Command + Send + Sync + 'static,
    ) -> Self {
        Self { port, command: Box::new(command), child: None, answers, folder }
    }

    /// Starts it, and waits until it answers.
    ///
    /// # Panics
    /// Where it doesn't.
    pub fn start(&mut self) {
        let mut command = (self.command)();
        command
            .current_dir(self.folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let program = format!("{command:?}");
        self.child = Some(command.spawn().unwrap_or_else(|error| {
            panic!("{program} can't be started ({error}): run the tests with `cargo xtask test`, which installs it")
        }));
        wait_until("the broker answers", || (self.answers)(self.port));
    }

    /// Ends it as `kill -9` does.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            // It may have ended before.
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Lets it hang.
    ///
    /// # Panics
    /// Where it doesn't run.
    pub fn hang(&self) {
        signal(self.child.as_ref().expect("it runs").id(), "STOP");
    }

    /// Lets it go on.
    ///
    /// # Panics
    /// Where it doesn't run.
    pub fn go_on(&self) {
        signal(self.child.as_ref().expect("it runs").id(), "CONT");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Redis, whose every write is synced.
///
/// # Panics
/// Where there is no place for temporary files.
#[must_use]
pub fn redis(arguments: &[&str]) -> Server {
    let (port, folder) = (free_port(), tempfile::tempdir().expect("a temporary folder"));
    let arguments: Vec<String> = arguments.iter().map(|argument| (*argument).to_owned()).collect();
    Server::new(port, folder, redis_answers, move || {
        let mut command = Command::new(workspace().join("target/brokers/redis-server"));
        command.args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--dir", "."]);
        command.args(["--save", "", "--appendonly", "yes", "--appendfsync", "always"]).args(&arguments);
        command
    })
}

/// Redis over TLS, and only over TLS, with this certificate and private key (files in PEM).
///
/// # Panics
/// Where there is no place for temporary files.
#[must_use]
pub fn redis_with_tls(certificate: &Path, private_key: &Path) -> Server {
    let (port, folder) = (free_port(), tempfile::tempdir().expect("a temporary folder"));
    let (certificate, private_key) = (certificate.to_owned(), private_key.to_owned());
    Server::new(port, folder, listens, move || {
        let mut command = Command::new(workspace().join("target/brokers/redis-server"));
        command.args(["--port", "0", "--tls-port", &port.to_string(), "--bind", "127.0.0.1", "--dir", "."]);
        command.arg("--tls-cert-file").arg(&certificate).arg("--tls-key-file").arg(&private_key);
        command.args(["--tls-auth-clients", "no", "--save", ""]);
        command
    })
}

pub(crate) fn listens(port: u16) -> bool {
    connect(port).is_ok()
}

fn redis_answers(port: u16) -> bool {
    let ask = || -> std::io::Result<bool> {
        let mut stream = connect(port)?;
        stream.write_all(b"PING\r\n")?;
        let mut answer = [0; 16];
        let count = stream.read(&mut answer)?;
        // One that wants a password first answers as well.
        Ok(answer[..count].starts_with(b"+PONG") || answer[..count].starts_with(b"-NOAUTH"))
    };
    ask().unwrap_or(false)
}

fn connect(port: u16) -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&SocketAddr::from(([127, 0, 0, 1], port)), LOOK_TIME_MAX)?;
    stream.set_read_timeout(Some(LOOK_TIME_MAX))?;
    Ok(stream)
}

/// moto: SQS and what is needed to sign for it. With `signed`, it verifies signatures after four calls.
///
/// # Panics
/// Where there is no place for temporary files, or moto isn't installed.
#[must_use]
pub fn moto(signed: bool) -> Server {
    let (port, folder) = (free_port(), tempfile::tempdir().expect("a temporary folder"));
    let program: PathBuf = python_tool("moto_server");
    Server::new(port, folder, moto_answers, move || {
        let mut command = Command::new(&program);
        command.args(["-H", "127.0.0.1", "-p", &port.to_string()]);
        if signed {
            command.env("INITIAL_NO_AUTH_ACTION_COUNT", "4");
        }
        command
    })
}

/// moto over HTTPS, with this certificate and private key (files in PEM).
///
/// # Panics
/// Where there is no place for temporary files, or moto isn't installed.
#[must_use]
pub fn moto_with_tls(certificate: &Path, private_key: &Path) -> Server {
    let (port, folder) = (free_port(), tempfile::tempdir().expect("a temporary folder"));
    let (certificate, private_key) = (certificate.to_owned(), private_key.to_owned());
    let program: PathBuf = python_tool("moto_server");
    Server::new(port, folder, listens, move || {
        let mut command = Command::new(&program);
        command.args(["-H", "127.0.0.1", "-p", &port.to_string()]);
        command.arg("--ssl-cert").arg(&certificate).arg("--ssl-key").arg(&private_key);
        command
    })
}

fn moto_answers(port: u16) -> bool {
    answers_with_200(port, "/moto-api/data.json")
}

/// ministack, which speaks SQS too, and is quick where queues are long: moto looks through a whole queue for each message. It keeps
/// nothing, and verifies no signature.
///
/// # Panics
/// Where there is no place for temporary files, or ministack isn't installed.
#[must_use]
pub fn ministack() -> Server {
    let (port, folder) = (free_port(), tempfile::tempdir().expect("a temporary folder"));
    let program: PathBuf = python_tool("ministack");
    let temporary = folder.path().to_owned();
    Server::new(port, folder, ministack_answers, move || {
        let mut command = Command::new(&program);
        command.env("BIND_HOST", "127.0.0.1").env("GATEWAY_PORT", port.to_string());
        command.env("STATE_DIR", "state").env("S3_DATA_DIR", "s3");
        // Its file with its process id would be left behind.
        command.env("TMPDIR", &temporary);
        command
    })
}

fn ministack_answers(port: u16) -> bool {
    answers_with_200(port, "/_ministack/health")
}

fn answers_with_200(port: u16, path: &str) -> bool {
    let ask = || -> std::io::Result<bool> {
        let mut stream = connect(port)?;
        write!(stream, "GET {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n")?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        Ok(answer.starts_with(b"HTTP/1.1 200"))
    };
    ask().unwrap_or(false)
}

/// Asks moto's SQS, which takes any signature.
///
/// # Panics
/// Where it doesn't answer.
#[must_use]
pub fn sqs(port: u16, action: &str, body: &Value) -> Value {
    let mut response = crate::agent()
        .post(format!("http://127.0.0.1:{port}/"))
        .header("content-type", "application/x-amz-json-1.0")
        .header("x-amz-target", format!("AmazonSQS.{action}"))
        .header("authorization", "AWS4-HMAC-SHA256 Credential=k/20200101/us-east-1/sqs/aws4_request, SignedHeaders=host, Signature=0")
        .send(body.to_string())
        .expect("moto answers");
    let text = response.body_mut().with_config().limit(64 << 20).read_to_string().expect("text");
    serde_json::from_str(&text).unwrap_or(Value::String(text))
}

/// The address of one of moto's queues, made where it isn't there.
///
/// # Panics
/// Where it doesn't answer.
#[must_use]
pub fn sqs_queue(port: u16, name: &str) -> String {
    let mut make = json!({"QueueName": name});
    if name.ends_with(".fifo") {
        make["Attributes"] = json!({"FifoQueue": "true"});
    }
    sqs(port, "CreateQueue", &make)["QueueUrl"].as_str().expect("an address").to_owned()
}

/// Takes everything out of one of moto's queues.
#[must_use]
pub fn sqs_drain(port: u16, name: &str) -> Vec<Value> {
    sqs_take(port, name, usize::MAX)
}

/// Takes messages out until there are so many, or none is left.
///
/// # Panics
/// As by [`sqs`].
#[must_use]
pub fn sqs_take(port: u16, name: &str, enough: usize) -> Vec<Value> {
    let url = sqs_queue(port, name);
    let mut messages = Vec::new();
    loop {
        let ask = json!({"QueueUrl": url, "MaxNumberOfMessages": 10, "MessageAttributeNames": ["All"]});
        let answer = sqs(port, "ReceiveMessage", &ask);
        let Some(received) = answer["Messages"].as_array().filter(|received| !received.is_empty()) else {
            return messages;
        };
        let entries: Vec<Value> = received
            .iter()
            .enumerate()
            .map(|(index, message)| json!({"Id": index.to_string(), "ReceiptHandle": message["ReceiptHandle"]}))
            .collect();
        let _ = sqs(port, "DeleteMessageBatch", &json!({"QueueUrl": url, "Entries": entries}));
        messages.extend_from_slice(received);
        if messages.len() >= enough {
            return messages;
        }
    }
}

/// An access key that moto knows, of one who may do everything: its id and its secret. Only the first calls are taken unsigned.
///
/// # Panics
/// Where moto doesn't answer.
#[must_use]
pub fn access_key(port: u16) -> (String, String) {
    let ask = |form: &str| {
        let mut response = crate::agent()
            .post(format!("http://127.0.0.1:{port}/"))
            .header("content-type", "application/x-www-form-urlencoded")
            .header("authorization", "AWS4-HMAC-SHA256 Credential=k/20200101/us-east-1/iam/aws4_request, SignedHeaders=host, Signature=0")
            .send(format!("{form}&Version=2010-05-08"))
            .expect("moto answers");
        response.body_mut().read_to_string().expect("text")
    };
    let _ = ask("Action=CreateUser&UserName=tests");
    let key = ask("Action=CreateAccessKey&UserName=tests");
    let policy = "%7B%22Version%22%3A%222012-10-17%22%2C%22Statement%22%3A%5B%7B%22Effect%22%3A%22Allow%22%2C%22Action%22%3A%22%2A%22%2C%22Resource%22%3A%22%2A%22%7D%5D%7D";
    let _ = ask(&format!("Action=PutUserPolicy&UserName=tests&PolicyName=all&PolicyDocument={policy}"));
    let _ = ask("Action=ListUsers");
    let inside = |tag: &str| {
        let rest = key.split(&format!("<{tag}>")).nth(1).unwrap_or_default();
        rest.split('<').next().unwrap_or_default().to_owned()
    };
    (inside("AccessKeyId"), inside("SecretAccessKey"))
}

/// A connection of one's own to Redis.
///
/// # Panics
/// Where there is none to be had.
#[must_use]
pub fn redis_connection(port: u16) -> redis::Connection {
    let client = redis::Client::open(format!("redis://127.0.0.1:{port}")).expect("an address");
    client.get_connection().expect("Redis answers")
}

/// What a list of Redis holds, the oldest first.
///
/// # Panics
/// Where Redis doesn't answer.
#[must_use]
pub fn redis_list(port: u16, key: &str) -> Vec<Vec<u8>> {
    let mut list: Vec<Vec<u8>> = redis::cmd("LRANGE")
        .arg(key)
        .arg(0)
        .arg(-1)
        .query(&mut redis_connection(port))
        .expect("Redis answers");
    list.reverse();
    list
}

/// What a stream of Redis holds: for each entry the field `data`, and `job_id` where it has one.
///
/// # Panics
/// Where Redis doesn't answer.
#[must_use]
pub fn redis_stream(port: u16, key: &str) -> Vec<(Vec<u8>, Option<String>)> {
    let reply: redis::streams::StreamRangeReply = redis::cmd("XRANGE")
        .arg(key)
        .arg("-")
        .arg("+")
        .query(&mut redis_connection(port))
        .expect("Redis answers");
    reply.ids.iter().map(|entry| (entry.get("data").unwrap_or_default(), entry.get("job_id"))).collect()
}

/// A Python program of a test, run with the tools that `cargo xtask test` installs. Returns what it printed.
///
/// # Panics
/// Where it fails.
#[must_use]
pub fn python(program: &str, arguments: &[&str]) -> String {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("program.py");
    fs::write(&file, program).expect("it is written");
    let output =
        Command::new(python_tool("python")).arg(&file).args(arguments).output().expect("Python runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Adds an entry with the field `data` to a stream of Redis.
///
/// # Panics
/// Where Redis doesn't answer.
#[must_use]
pub fn xadd(connection: &mut redis::Connection, key: &str, data: &str) -> String {
    redis::cmd("XADD").arg(key).arg("*").arg("data").arg(data).query(connection).expect("Redis answers")
}

/// Empties a key of Redis.
///
/// # Panics
/// Where Redis doesn't answer.
pub fn redis_clear(port: u16, key: &str) {
    redis::cmd("DEL").arg(key).exec(&mut redis_connection(port)).expect("Redis answers");
}

/// Takes what a stream of Redis holds now out of it: for each entry the field `data`.
///
/// # Panics
/// Where Redis doesn't answer.
#[must_use]
pub fn redis_take(port: u16, key: &str) -> Vec<Vec<u8>> {
    let mut connection = redis_connection(port);
    let reply: redis::streams::StreamRangeReply =
        redis::cmd("XRANGE").arg(key).arg("-").arg("+").query(&mut connection).expect("Redis answers");
    let ids: Vec<&String> = reply.ids.iter().map(|entry| &entry.id).collect();
    if !ids.is_empty() {
        redis::cmd("XDEL").arg(key).arg(&ids).exec(&mut connection).expect("Redis answers");
    }
    reply.ids.iter().map(|entry| entry.get("data").unwrap_or_default()).collect()
}

/// Gives Redis another password.
///
/// # Panics
/// Where it doesn't take it.
pub fn redis_set_password(port: u16, old: &str, new: &str) {
    let client = redis::Client::open(format!("redis://:{old}@127.0.0.1:{port}")).expect("an address");
    let mut connection = client.get_connection().expect("Redis answers");
    redis::cmd("CONFIG").arg("SET").arg("requirepass").arg(new).exec(&mut connection).expect("it is set");
}

/// Adds an entry whose one field is named by these bytes.
///
/// # Panics
/// Where Redis doesn't answer.
pub fn redis_add_bytes(port: u16, key: &str, field: &[u8]) {
    let mut connection = redis_connection(port);
    redis::cmd("XADD").arg(key).arg("*").arg(field).arg("x").exec(&mut connection).expect("Redis answers");
}
