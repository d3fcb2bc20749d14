//! The brokers that tests and benchmarks use: installed where that may be done, started for a developer, ended with this program.

use std::{
    env, fs,
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context, bail};

use crate::{build::run, python};

const FOLDER: &str = "target/brokers";
/// Where tests look for Redis.
pub(crate) const REDIS: &str = "target/brokers/redis-server";
const LOOKS: u32 = 200;
const BETWEEN_LOOKS: Duration = Duration::from_millis(50);

/// Installs Redis where it isn't there. Debian's package of its tools holds the server's program too, and no service that would start.
pub(crate) fn ensure_redis() -> anyhow::Result<()> {
    if Path::new(REDIS).is_file() {
        return Ok(());
    }
    let program = match find() {
        Some(program) => program,
        None => {
            println!("installing Redis for the tests: Debian's redis-tools");
            let hint = "the tests need Redis: `apt-get install redis-tools`, as root, or leave it out with `--without redis`";
            run(Command::new("apt-get").arg("update")).context(hint)?;
            run(Command::new("apt-get").args(["install", "--yes", "redis-tools"])).context(hint)?;
            find().context(hint)?
        }
    };
    fs::create_dir_all(FOLDER)?;
    // One program that is the server by its name.
    let _ = fs::remove_file(REDIS);
    symlink(program, REDIS).context("can't make target/brokers/redis-server")
}

fn find() -> Option<PathBuf> {
    let folders = env::var_os("PATH")?;
    let in_folders =
        |name: &str| env::split_paths(&folders).map(|folder| folder.join(name)).find(|file| file.is_file());
    in_folders("redis-server").or_else(|| in_folders("redis-check-rdb"))
}

/// A broker of this program's own.
pub(crate) struct Broker {
    pub(crate) port: u16,
    child: Child,
}

impl Drop for Broker {
    fn drop(&mut self) {
        // It may have ended with this program's terminal.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Broker {
    fn start(mut command: Command, port: u16, question: &str, answer: &str) -> anyhow::Result<Self> {
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().with_context(|| format!("can't start {command:?}"))?;
        let broker = Self { port, child };
        for _ in 0..LOOKS {
            if ask(port, question).is_ok_and(|said| said.starts_with(answer)) {
                return Ok(broker);
            }
            thread::sleep(BETWEEN_LOOKS);
        }
        bail!("{command:?} does not answer on port {port}")
    }

    /// Redis, whose every write is synced, with its files in this folder.
    pub(crate) fn redis(folder: &Path) -> anyhow::Result<Self> {
        Self::redis_on(free_port()?, folder)
    }

    fn redis_on(port: u16, folder: &Path) -> anyhow::Result<Self> {
        let mut command = with_this_program(fs::canonicalize(".")?.join(REDIS));
        command.args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--dir"]).arg(folder);
        command.args(["--save", "", "--appendonly", "yes", "--appendfsync", "always"]);
        Self::start(command, port, "PING\r\n", "+PONG")
    }

    /// moto, which speaks SQS.
    fn moto_on(port: u16) -> anyhow::Result<Self> {
        let mut command = with_this_program(python::tool("moto_server"));
        command.args(["-H", "127.0.0.1", "-p", &port.to_string()]);
        Self::start(
            command,
            port,
            "GET /moto-api/data.json HTTP/1.0\r\nhost: 127.0.0.1\r\n\r\n",
            "HTTP/1.1 200",
        )
    }
}

/// A program that ends when this one does, however that ends: Debian's `setpriv` asks the kernel for it.
fn with_this_program(program: PathBuf) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(program);
    command
}

/// The port that was taken the last time, where it is free: what was configured then is right again.
fn kept_port(name: &str) -> anyhow::Result<u16> {
    let file = Path::new(FOLDER).join(format!("{name}.port"));
    let before = fs::read_to_string(&file).ok().and_then(|port| port.trim().parse::<u16>().ok());
    let port = match before.filter(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok()) {
        Some(port) => port,
        None => free_port()?,
    };
    fs::write(&file, port.to_string()).with_context(|| format!("can't write {}", file.display()))?;
    Ok(port)
}

/// Says something to a port, and returns the beginning of what comes back.
pub(crate) fn ask(port: u16, question: &str) -> anyhow::Result<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(Duration::from_secs(2)))?;
    stream.write_all(question.as_bytes())?;
    let mut answer = [0; 64];
    let count = stream.read(&mut answer)?;
    Ok(String::from_utf8_lossy(&answer[..count]).into_owned())
}

pub(crate) fn free_port() -> anyhow::Result<u16> {
    Ok(TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}

/// Starts the brokers for a developer, and says how a host reaches them. Ends with Ctrl-C, and the brokers with it.
pub(crate) fn serve() -> anyhow::Result<()> {
    println!(
        "needed, and installed where it isn't there: Redis (Debian's redis-tools, by apt-get, into {REDIS}) and moto (Python tools, by pip, into target/python)"
    );
    ensure_redis()?;
    python::ensure()?;
    let folder = fs::canonicalize(".")?.join("target/brokers/redis-data");
    fs::create_dir_all(&folder)?;
    let mut redis = Broker::redis_on(kept_port("redis")?, &folder)?;
    let moto = Broker::moto_on(kept_port("moto")?)?;
    println!(
        "
Redis and SQS (moto, which keeps nothing) run until Ctrl-C, on the ports of the last time where these are free. Into a configuration file:

[app_settings.queue_config]
allowed_queues = [\"*\"]

[app_settings.queue_config.backends.redis]
broker_url = \"redis://127.0.0.1:{redis}\"
redis_type = \"stream\"

[app_settings.queue_config.backends.taskiq]
broker_url = \"redis://127.0.0.1:{redis}\"
task = \"on_result\"

[app_settings.queue_config.backends.sqs]
broker_url = \"http://127.0.0.1:{moto}/\"
region = \"us-east-1\"
access_key_id = \"test\"
secret_access_key = \"test\"

A request names one of them: {{\"message\": {{…}}, \"success_queue\": \"redis://results\"}}, and this shows what came:

redis-cli -p {redis} XRANGE results - +
",
        redis = redis.port,
        moto = moto.port,
    );
    // Both hear Ctrl-C as well; Redis ends with it.
    redis.child.wait()?;
    Ok(())
}
