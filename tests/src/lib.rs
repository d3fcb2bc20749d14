//! Starts real hosts on free loopback ports over temporary volumes, asks them, and ends them by process id.
//!
//! It finds what `cargo xtask test` has built beside the tests' own program, and never knows the host's inside.

pub mod brokers;
pub mod changes;
pub mod chaos;
pub mod embeddings;
pub mod events;
pub mod gpus;
pub mod http2;
pub mod load;
pub mod management;
pub mod poison;
pub mod python;
pub mod stores;
pub mod version;

pub use version::Version;

use std::{
    env, fs,
    io::{BufRead, BufReader},
    net::{SocketAddr, TcpListener, TcpStream},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use serde_json::Value;
use tempfile::TempDir;

/// The longest that anything here is waited for: machines are shared, and a wait that ends early proves nothing.
pub const PATIENCE: Duration = Duration::from_secs(60);
const DOT_ENV: &str = ".env";
const BETWEEN_LOOKS: Duration = Duration::from_millis(5);

/// Keys and secrets that tests give to hosts. Every log line of every host, and everything that a host answers to a test, is
/// searched for them: none may ever be seen.
pub const KEY: &str = "sk-4f9a1c7be2d85036";
/// As [`KEY`], of one who may manage.
pub const OPERATOR: &str = "op-77d0e1b2c3948a5f";
/// As [`KEY`], for a pipeline.
pub const SECRET: &str = "a-secret-of-thirty-one-letters-x";
/// As [`KEY`], for a receiver of traces.
pub const SECRET_OF_COLLECTOR: &str = "collectors-own-secret-5b1d";

/// # Panics
/// Where a secret is seen in a text.
pub fn assert_no_secret(text: &str) {
    for secret in [KEY, OPERATOR, SECRET, SECRET_OF_COLLECTOR, stores::SECRET_KEY, stores::AZURITE_KEY] {
        if let Some(at) = text.find(secret) {
            let near: String =
                text[..at].chars().rev().take(200).collect::<Vec<_>>().into_iter().rev().collect();
            panic!("a secret is seen after: {near}");
        }
    }
}

/// The workspace's folder.
#[must_use]
pub fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests lie in the workspace's folder").to_owned()
}

/// Where cargo put what it built in this profile.
#[must_use]
pub fn built() -> PathBuf {
    let this = env::current_exe().expect("a program knows its path");
    let folder = this.parent().expect("a program lies in a folder");
    // Tests lie in target/PROFILE/deps, programs beside that.
    let profile = if folder.ends_with("deps") { folder.parent() } else { Some(folder) };
    profile.expect("target/PROFILE").to_owned()
}

/// The file of a built library.
///
/// # Panics
/// Where it hasn't been built.
#[must_use]
pub fn library(name: &str) -> PathBuf {
    let file = built().join(format!("lib{}.so", name.replace('-', "_")));
    assert!(
        file.is_file(),
        "{} is missing: run the tests with `cargo xtask test`, which builds it",
        file.display()
    );
    file
}

/// A host to be started.
pub struct Setup {
    folder: TempDir,
    config: String,
    environment: Vec<(String, String)>,
}

impl Default for Setup {
    fn default() -> Self {
        Self::new()
    }
}

impl Setup {
    /// An empty volume and the defaults.
    ///
    /// # Panics
    /// Where there is no place for temporary files.
    #[must_use]
    pub fn new() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        fs::create_dir(folder.path().join("volume")).expect("a folder in it");
        fs::create_dir(folder.path().join("tmp")).expect("a folder in it");
        fs::set_permissions(folder.path().join("volume"), fs::Permissions::from_mode(0o755))
            .expect("it is ours");
        // Hosts of tests speak to this machine alone, and no proxy is asked for that. Here is none.
        let proxies = ["http_proxy", "https_proxy", "all_proxy"];
        let environment = proxies.map(|name| (name.to_owned(), "http://127.0.0.1:9".to_owned())).into();
        Self { folder, config: String::new(), environment }
    }

    /// Puts a built library into the volume under its own name.
    #[must_use]
    pub fn plugin(self, name: &str) -> Self {
        install(&library(name), &self.volume().join(format!("{name}.so")));
        self
    }

    /// Adds lines of configuration, in TOML.
    #[must_use]
    pub fn config(mut self, toml: &str) -> Self {
        self.config.push_str(toml);
        self.config.push('\n');
        self
    }

    /// Starts the host in its own folder, with this `.env` file there.
    ///
    /// # Panics
    /// Where it can't be written.
    #[must_use]
    pub fn env_file(self, text: &str) -> Self {
        fs::write(self.folder.path().join(DOT_ENV), text).expect("the file is written");
        self
    }

    /// Sets a variable of the host's environment.
    #[must_use]
    pub fn variable(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// The watched folder.
    #[must_use]
    pub fn volume(&self) -> PathBuf {
        self.folder.path().join("volume")
    }

    /// A folder of this host's own; it vanishes with it.
    #[must_use]
    pub fn folder(&self) -> PathBuf {
        self.folder.path().to_owned()
    }

    fn write_config(&self) -> PathBuf {
        let file = self.folder.path().join("modalkit.toml");
        let text = format!(
            "{}\n[app_settings.deployment_config.volumes]\n{:?} = \"test\"\n",
            self.config,
            self.volume().display().to_string()
        );
        fs::write(&file, text).expect("the configuration is written");
        file
    }

    fn command(&self) -> Command {
        let file = self.write_config();
        let mut command = Command::new(built().join("modalkit"));
        command
            .args(["--config".as_ref(), file.as_os_str()])
            .env("MODALKIT_SERVER__LISTEN", "127.0.0.1:0")
            .env("MODALKIT_SERVER__STATE_FOLDER", self.folder.path().join("state"))
            .env_remove("MODALKIT_SOCKET")
            .env("TMPDIR", self.folder.path().join("tmp"))
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        if self.folder.path().join(DOT_ENV).exists() {
            command.current_dir(self.folder.path());
        }
        command
    }

    /// Starts the host and waits until it listens.
    ///
    /// # Panics
    /// Where it doesn't.
    #[must_use]
    pub fn start(self) -> Host {
        let (log, gate) = (Arc::default(), Arc::default());
        let (child, reader) = self.spawn(&log, &gate);
        let address = ([127, 0, 0, 1], 0).into();
        let mut host = Host { address, socket: None, child, log, gate, reader: Some(reader), setup: self };
        host.wait_for_address();
        host
    }

    /// Starts the host, and a thread that reads its log.
    fn spawn(&self, log: &Arc<Mutex<Vec<String>>>, gate: &Arc<Gate>) -> (Child, JoinHandle<()>) {
        let mut child =
            self.command().spawn().expect("the host is built: run the tests with `cargo xtask test`");
        let stderr = child.stderr.take().expect("standard error is piped");
        let (log, gate) = (Arc::clone(log), Arc::clone(gate));
        let reader = thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                gate.pass();
                log.lock().unwrap_or_else(PoisonError::into_inner).push(line);
            }
        });
        (child, reader)
    }

    /// Starts the host and waits until every model serves.
    ///
    /// # Panics
    /// Where one doesn't.
    #[must_use]
    pub fn ready(self) -> Host {
        let host = self.start();
        wait_until("the host is ready", || host.get("/readyz").0 == 200);
        host
    }

    /// Starts a host that is expected to end by itself; returns its status and what it said.
    ///
    /// # Panics
    /// Where it can't be started.
    #[must_use]
    pub fn refuses_to_start(self) -> (ExitStatus, String) {
        let output = self.command().output().expect("the host is built");
        (output.status, String::from_utf8_lossy(&output.stderr).into_owned())
    }
}

/// A port that nobody listens on.
///
/// # Panics
/// Where there is none.
#[must_use]
pub fn free_port() -> u16 {
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
    listener.local_addr().expect("it has an address").port()
}

/// A program of the Python tools that `cargo xtask test` installs.
///
/// # Panics
/// Where it isn't there.
#[must_use]
pub fn python_tool(name: &str) -> PathBuf {
    let program = workspace().join("target/python/bin").join(name);
    assert!(
        program.is_file(),
        "{} is missing: run the tests with `cargo xtask test`, which installs it",
        program.display()
    );
    program
}

/// The interpreter of another environment of Python, which has a client of ours in it.
///
/// # Panics
/// Where it isn't there.
#[must_use]
pub fn client_python(name: &str) -> PathBuf {
    let program = workspace().join("target/clients").join(name).join("bin/python3");
    assert!(
        program.is_file(),
        "{} is missing: run the tests with `cargo xtask test`, which installs it",
        program.display()
    );
    program
}

/// Sends a signal to a process, as `kill -NAME` does.
///
/// # Panics
/// Where it can't.
pub fn signal(process: u32, name: &str) {
    // The shell's own `kill`: a program of that name is not everywhere.
    let kill = Command::new("sh").args(["-c", &format!("kill -{name} {process}")]).status();
    assert!(kill.expect("there is a shell").success());
}

/// Puts a file in place in one step, as `cargo xtask plugin` does.
///
/// # Panics
/// Where it can't.
pub fn install(from: &Path, to: &Path) {
    put(&fs::read(from).expect("the file is read"), to);
}

/// Puts bytes in place in one step, writable by nobody else whatever the umask. Returns the moment of the rename.
///
/// # Panics
/// Where it can't.
pub fn put(bytes: &[u8], to: &Path) -> Instant {
    let mut part = to.as_os_str().to_owned();
    part.push(".part");
    fs::write(&part, bytes).expect("the file is written");
    fs::set_permissions(&part, fs::Permissions::from_mode(0o644)).expect("it is ours");
    let now = Instant::now();
    fs::rename(&part, to).expect("the file is renamed");
    now
}

/// Looks again and again until something holds.
///
/// # Panics
/// Where it doesn't in [`PATIENCE`].
pub fn wait_until(what: &str, holds: impl FnMut() -> bool) {
    wait_at_most(PATIENCE, what, holds);
}

/// As [`wait_until`], for what takes longer than anything a host does: a build.
///
/// # Panics
/// Where it doesn't hold within the limit.
pub fn wait_at_most(limit: Duration, what: &str, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < limit, "waited {limit:?} in vain until {what}");
        thread::sleep(BETWEEN_LOOKS);
    }
}

/// Lets the log's reader on, or keeps it.
#[derive(Default)]
struct Gate {
    closed: Mutex<bool>,
    opened: Condvar,
}

impl Gate {
    fn pass(&self) {
        let closed = self.closed.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.opened.wait_while(closed, |closed| *closed).unwrap_or_else(PoisonError::into_inner));
    }

    fn set(&self, closed: bool) {
        *self.closed.lock().unwrap_or_else(PoisonError::into_inner) = closed;
        self.opened.notify_all();
    }
}

/// A running host. Dropped, it is killed, and its folder vanishes.
pub struct Host {
    /// Where it listens.
    pub address: SocketAddr,
    /// Its management socket.
    pub socket: Option<PathBuf>,
    child: Child,
    log: Arc<Mutex<Vec<String>>>,
    gate: Arc<Gate>,
    reader: Option<JoinHandle<()>>,
    setup: Setup,
}

/// Status and body.
pub type Answer = (u16, Value);

impl Host {
    /// The watched folder.
    #[must_use]
    pub fn volume(&self) -> PathBuf {
        self.setup.volume()
    }

    /// Replaces the lines of configuration; the host reads them when it is told to.
    pub fn configure(&mut self, toml: &str) {
        toml.clone_into(&mut self.setup.config);
        self.setup.write_config();
    }

    /// A folder of this host's own.
    #[must_use]
    pub fn folder(&self) -> PathBuf {
        self.setup.folder()
    }

    /// The host's private folder for temporary files.
    #[must_use]
    pub fn temporary_folder(&self) -> PathBuf {
        self.setup.folder.path().join("tmp")
    }

    /// Its process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Ends it as `kill -9` does.
    pub fn kill(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.read_log_on();
        if let Some(reader) = self.reader.take() {
            reader.join().expect("the log's reader doesn't panic");
        }
    }

    /// Starts it again on the same folders, with an empty log, and waits until it listens.
    ///
    /// # Panics
    /// Where it doesn't.
    pub fn start_again(&mut self) {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).clear();
        let (child, reader) = self.setup.spawn(&self.log, &self.gate);
        (self.child, self.reader) = (child, Some(reader));
        self.wait_for_address();
    }

    fn wait_for_address(&mut self) {
        let line = self.log_line("listening");
        let address = line["address"].as_str().expect("the line says where").parse();
        self.address = address.expect("an address");
        self.socket = line["management_socket"].as_str().map(PathBuf::from);
    }

    /// Asks over the management socket, where the host has one and the path is for those who manage; status and body.
    fn manage(&self, method: &str, path: &str, body: &str) -> Option<(u16, String)> {
        let socket = self.socket.as_ref().filter(|_| management::is_management(path))?;
        Some(management::request(socket, method, path, body).expect("the host answers"))
    }

    /// Takes something away.
    ///
    /// # Panics
    /// Where no answer comes.
    #[must_use]
    pub fn delete(&self, path: &str) -> Answer {
        match self.manage("DELETE", path, "") {
            Some((status, text)) => answer(status, text),
            None => self.delete_with(path, &[]),
        }
    }

    /// Takes something away, over the network, with headers of one's own.
    ///
    /// # Panics
    /// Where no answer comes.
    #[must_use]
    pub fn delete_with(&self, path: &str, headers: &[(&str, &str)]) -> Answer {
        let mut request = agent().delete(self.url(path));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        read(&mut request.call().expect("the host answers"))
    }

    /// Sends an envelope, and returns the job's id.
    ///
    /// # Panics
    /// Where it isn't accepted.
    #[must_use]
    pub fn job(&self, model: &str, envelope: &Value) -> String {
        let (status, answer) = self.post(&format!("/predict_async?model_name={model}"), envelope);
        assert_eq!(status, 200, "{answer}");
        answer["job_id"].as_str().expect("an id").to_owned()
    }

    /// What there is to say of a job once it has ended.
    ///
    /// # Panics
    /// Where it doesn't end.
    #[must_use]
    pub fn ended(&self, job: &str) -> Value {
        let mut report = Value::Null;
        wait_until("the job has ended", || {
            report = self.get(&format!("/jobs/{job}?wait_ms=1000")).1;
            !["queued", "running"].contains(&report["state"].as_str().unwrap_or_default())
        });
        report
    }

    /// Sends a JSON body.
    ///
    /// # Panics
    /// Where no answer comes.
    #[must_use]
    pub fn post(&self, path: &str, body: &Value) -> Answer {
        match self.manage("POST", path, &body.to_string()) {
            Some((status, text)) => answer(status, text),
            None => self.post_with(path, body, &[]),
        }
    }

    /// Sends a JSON body, over the network, with headers of one's own.
    ///
    /// # Panics
    /// Where no answer comes.
    #[must_use]
    pub fn post_with(&self, path: &str, body: &Value, headers: &[(&str, &str)]) -> Answer {
        let mut request = agent().post(self.url(path));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let mut response = request.send(body.to_string()).expect("the host answers");
        read(&mut response)
    }

    /// Asks for something.
    ///
    /// # Panics
    /// Where no answer comes.
    #[must_use]
    pub fn get(&self, path: &str) -> Answer {
        match self.manage("GET", path, "") {
            Some((status, text)) => answer(status, text),
            None => self.get_with(path, &[]),
        }
    }

    /// Asks for something, over the network, with headers of one's own.
    ///
    /// # Panics
    /// Where no answer comes.
    #[must_use]
    pub fn get_with(&self, path: &str, headers: &[(&str, &str)]) -> Answer {
        let mut request = agent().get(self.url(path));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        read(&mut request.call().expect("the host answers"))
    }

    /// Sends a body as it stands, over the network.
    ///
    /// # Panics
    /// Where no answer comes.
    #[must_use]
    pub fn post_text(&self, path: &str, body: &str) -> Answer {
        read(&mut agent().post(self.url(path)).send(body).expect("the host answers"))
    }

    /// As [`Host::post_with`], of a host that may be gone, or go before it has answered.
    #[must_use]
    pub fn try_post(&self, path: &str, body: &Value, headers: &[(&str, &str)]) -> Option<Answer> {
        let mut request = agent().post(self.url(path));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let mut response = request.send(body.to_string()).ok()?;
        let text = response.body_mut().read_to_string().ok()?;
        Some(answer(response.status().as_u16(), text))
    }

    /// As [`Host::get`], of a host that may be gone.
    #[must_use]
    pub fn try_get(&self, path: &str) -> Option<Answer> {
        let mut response = agent().get(self.url(path)).call().ok()?;
        Some(read(&mut response))
    }

    /// Whether it has ended; [`Host::wait`] says how.
    ///
    /// # Panics
    /// Where nobody knows.
    #[must_use]
    pub fn has_exited(&mut self) -> bool {
        self.child.try_wait().expect("its status can be read").is_some()
    }

    /// Takes a queue's messages and acknowledges them.
    #[must_use]
    pub fn take(&self, queue: &str) -> Vec<Value> {
        let (_, answer) = self.delete(&format!("/queues/{queue}?limit=1000"));
        if let Some(receipt) = answer["receipt"].as_str() {
            let _ = self.delete(&format!("/queues/{queue}?receipt={receipt}"));
        }
        answer["messages"].as_array().cloned().unwrap_or_default()
    }

    /// The text behind a path.
    ///
    /// # Panics
    /// Where no answer comes.
    #[must_use]
    pub fn text(&self, path: &str) -> String {
        if let Some((_, text)) = self.manage("GET", path, "") {
            return text;
        }
        let mut response = agent().get(self.url(path)).call().expect("the host answers");
        response.body_mut().read_to_string().expect("text")
    }

    /// One sample of `/metrics`, by its name with labels as Prometheus writes them; 0 where it isn't there.
    #[must_use]
    pub fn metric(&self, sample: &str) -> f64 {
        let value = |line: &str| line.strip_prefix(sample)?.strip_prefix(' ')?.parse().ok();
        self.text("/metrics").lines().find_map(value).unwrap_or_default()
    }

    /// How many models are known.
    #[must_use]
    pub fn models(&self) -> usize {
        self.get("/models").1["models"].as_array().map_or(0, Vec::len)
    }

    /// What `GET /models` says of one.
    #[must_use]
    pub fn model(&self, name: &str) -> Value {
        let (_, report) = self.get("/models");
        let models = report["models"].as_array().cloned().unwrap_or_default();
        models.into_iter().find(|model| model["name"] == name).unwrap_or_default()
    }

    /// What `GET /models/{name}` says.
    #[must_use]
    pub fn report(&self, name: &str) -> Value {
        self.get(&format!("/models/{name}")).1
    }

    /// A connection of one's own.
    ///
    /// # Panics
    /// Where it can't be had.
    #[must_use]
    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).expect("the host accepts connections");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        stream
    }

    /// Waits for a line of the log with this message.
    ///
    /// # Panics
    /// Where none comes.
    #[must_use]
    pub fn log_line(&self, message: &str) -> Value {
        self.logged(&format!("{message:?}"), |line| {
            line["message"].as_str().is_some_and(|text| text.contains(message))
        })
    }

    /// Waits for a line of the log that is as wanted; lines are written after the answers they belong to.
    ///
    /// # Panics
    /// Where none comes.
    #[must_use]
    pub fn logged(&self, what: &str, mut is_wanted: impl FnMut(&Value) -> bool) -> Value {
        let mut found = None;
        wait_until(&format!("the log says {what}"), || {
            found = self.log().into_iter().find(&mut is_wanted);
            found.is_some()
        });
        found.expect("it was waited for")
    }

    /// The whole log, for what must not stand in it: the host is told to end, and ends.
    ///
    /// # Panics
    /// Where it doesn't end.
    #[must_use]
    pub fn whole_log(mut self) -> Vec<Value> {
        self.signal("TERM");
        let _ = self.wait();
        self.log()
    }

    /// The log so far, which other lines may be on their way to; a line that isn't JSON is a string.
    #[must_use]
    pub fn log(&self) -> Vec<Value> {
        let lines = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        lines.iter().map(|line| serde_json::from_str(line).unwrap_or_else(|_| line.clone().into())).collect()
    }

    /// Reads nothing more of its log; [`Host::wait`] goes on with it once the host has ended.
    pub fn stop_reading_log(&self) {
        self.gate.set(true);
    }

    /// Goes on reading its log.
    pub fn read_log_on(&self) {
        self.gate.set(false);
    }

    /// Sends a signal, as `kill -NAME` does.
    ///
    /// # Panics
    /// Where it can't.
    pub fn signal(&self, name: &str) {
        signal(self.id(), name);
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// Where that doesn't come.
    pub fn wait(&mut self) -> ExitStatus {
        let mut status = None;
        wait_until("the host has ended", || {
            status = self.child.try_wait().expect("its status can be read");
            status.is_some()
        });
        self.read_log_on();
        if let Some(reader) = self.reader.take() {
            reader.join().expect("the log's reader doesn't panic");
        }
        status.expect("it was waited for")
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // It may have ended before.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            eprint_log(&self.log());
        } else {
            self.log().iter().for_each(|line| assert_no_secret(&line.to_string()));
        }
    }
}

#[expect(clippy::print_stderr, reason = "a failed test shows what the host said")]
fn eprint_log(log: &[Value]) {
    for line in log {
        eprintln!("host: {line}");
    }
}

pub(crate) fn agent() -> ureq::Agent {
    let config =
        ureq::Agent::config_builder().http_status_as_error(false).timeout_global(Some(PATIENCE)).build();
    config.into()
}

fn read(response: &mut ureq::http::Response<ureq::Body>) -> Answer {
    let status = response.status().as_u16();
    answer(status, response.body_mut().read_to_string().expect("the body is text"))
}

fn answer(status: u16, text: String) -> Answer {
    assert_no_secret(&text);
    (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
}
