//! Everything at once that callers, plugins and a log's reader can do to a host: it answers `/livez` in time throughout, serves a good
//! caller of another model, keeps to its memory, and ends when it is told to.

use std::{
    env, fs,
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use modalkit_tests::{
    Host, Setup, http2,
    load::{ECHO, Load},
};
use serde_json::json;

const SECONDS: u64 = 600;
/// Within this `/livez` must be answered, each time.
const LIVE_TIME_MAX: Duration = Duration::from_millis(100);
const BETWEEN_PROBES: Duration = Duration::from_millis(20);
/// Resident memory: the budget of bytes in flight, what the answers of callers that never read take beside it, and as much again for
/// the copies that are made on the way, for plugins and for all else.
const RESIDENT_MIB_MAX: f64 = 512.0;
const GOOD_CALLERS: usize = 4;
const NON_READERS: usize = 8;
const NON_READERS_OF_HTTP2: usize = 4;
const SLEEPERS: usize = 8;
const UNFINISHED_HEADERS: usize = 100;
const UNFINISHED_BODIES: usize = 30;
const LISTERS: usize = 64;
const FAILING: usize = 4;
/// Jobs that there are to list.
const JOBS: usize = 200;
/// Longer than what the kernel keeps for a caller that doesn't read.
const ANSWER_BYTES: usize = 8 << 20;
const CONFIG: &str = "[server]
write_timeout_ms = 5000
drain_timeout_seconds = 5
bytes_in_flight_max = 134217728
[model_settings.model_entries.large]
plugin = \"puppet\"
[model_settings.model_entries.asleep]
plugin = \"puppet\"
[model_settings.model_entries.failing]
plugin = \"puppet\"
";
/// The drain, the writing of answers, and threads that don't leave: what is documented, and room for a busy machine.
const END_TIME_MAX: Duration = Duration::from_secs(30);

/// How often each of them did what it does.
#[derive(Default)]
struct Done {
    unread: AtomicU64,
    asleep: AtomicU64,
    headers: AtomicU64,
    bodies: AtomicU64,
    listed: AtomicU64,
    failed: AtomicU64,
}

pub(crate) fn mix() {
    let seconds = env::var("MODALKIT_SOAK_SECONDS").ok().and_then(|seconds| seconds.parse().ok());
    let time = Duration::from_secs(seconds.unwrap_or(SECONDS));
    let mut host = Setup::new().plugin("echo").plugin("puppet").config(CONFIG).ready();
    host.stop_reading_log();
    for _ in 0..JOBS {
        let _ = host.job("echo", &json!({"message": {"text": "one of many"}}));
    }
    let (done, over) = (Done::default(), AtomicBool::new(false));
    let begun = Instant::now();
    let good = Load::start(host.address, GOOD_CALLERS, ECHO);
    let (probes, resident) = thread::scope(|scope| {
        let (host, done, over) = (&host, &done, &over);
        let each = |count: usize, act: fn(SocketAddr, &Done)| {
            for _ in 0..count {
                scope.spawn(move || {
                    while !over.load(Ordering::Relaxed) {
                        act(host.address, done);
                    }
                });
            }
        };
        each(NON_READERS, never_read);
        each(NON_READERS_OF_HTTP2, never_read_http2);
        each(SLEEPERS, sleep_in_validate);
        each(UNFINISHED_HEADERS, leave_headers_unfinished);
        each(UNFINISHED_BODIES, leave_body_unfinished);
        each(LISTERS, list_jobs);
        each(FAILING, fail);
        let resident = scope.spawn(move || {
            let mut most = 0.0_f64;
            while !over.load(Ordering::Relaxed) {
                most = most.max(resident_mib(host));
                thread::sleep(Duration::from_millis(100));
            }
            most
        });
        let probes = probe(host.address, begun + time);
        over.store(true, Ordering::Relaxed);
        (probes, resident.join().expect("it only reads a file"))
    });
    let good = good.stop();
    let told = Instant::now();
    host.signal("TERM");
    let _ = host.wait();
    let ended = told.elapsed();

    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    println!(
        "in {:.0} s: {} answers never read, {} validators asleep, {} headers and {} bodies unfinished, {} lists of jobs, {} requests failed, the log unread",
        begun.elapsed().as_secs_f64(),
        count(&done.unread),
        count(&done.asleep),
        count(&done.headers),
        count(&done.bodies),
        count(&done.listed),
        count(&done.failed)
    );
    let (slowest, at) = probes.last().copied().unwrap_or_default();
    let share = |share: f64| probes[((probes.len() as f64 * share) as usize).min(probes.len() - 1)].0;
    println!(
        "/livez: {} times, p50 {:.1} ms, p99.9 {:.1} ms, at most {:.1} ms (after {:.0} s), {} times over {LIVE_TIME_MAX:?}",
        probes.len(),
        share(0.5).as_secs_f64() * 1e3,
        share(0.999).as_secs_f64() * 1e3,
        slowest.as_secs_f64() * 1e3,
        at.as_secs_f64(),
        probes.iter().filter(|(took, _)| *took >= LIVE_TIME_MAX).count()
    );
    println!(
        "the good caller on {GOOD_CALLERS} connections: {} right answers, {} wrong, p50 {:.2} ms, p99 {:.2} ms",
        good.right,
        good.wrong,
        good.percentile(0.5, begun, told),
        good.percentile(0.99, begun, told)
    );
    println!(
        "resident memory: at most {resident:.0} MiB of {RESIDENT_MIB_MAX:.0}; it ended {ended:.1?} after SIGTERM"
    );
    good.assert_faultless();
    assert!(slowest < LIVE_TIME_MAX, "/livez took {slowest:?}");
    assert!(resident < RESIDENT_MIB_MAX, "{resident:.0} MiB");
    assert!(ended < END_TIME_MAX, "it took {ended:?} to end");
}

/// Asks whether the host lives, on a new connection each time; returns how long that took, sorted, with the moment of each.
fn probe(address: SocketAddr, until: Instant) -> Vec<(Duration, Duration)> {
    let mut took = Vec::new();
    let begun = Instant::now();
    let mut next = begun;
    while next < until {
        thread::sleep(next.saturating_duration_since(Instant::now()));
        // From the moment that it was due: one that waits for the one before waited too.
        let answered =
            exchange(address, b"GET /livez HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
        assert!(answered.is_some_and(|answer| answer.starts_with(b"HTTP/1.1 200")), "/livez has no answer");
        took.push((next.elapsed(), begun.elapsed()));
        next = (next + BETWEEN_PROBES).max(Instant::now() - BETWEEN_PROBES);
    }
    took.sort_unstable();
    took
}

fn connect(address: SocketAddr) -> Option<TcpStream> {
    let stream = TcpStream::connect(address).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(10))).ok()?;
    stream.set_write_timeout(Some(Duration::from_secs(10))).ok()?;
    Some(stream)
}

/// Asks on a connection of its own, and reads to its end or to the first pause.
fn exchange(address: SocketAddr, request: &[u8]) -> Option<Vec<u8>> {
    let mut stream = connect(address)?;
    stream.write_all(request).ok()?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).ok()?;
    Some(answer)
}

fn request(path: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    format!("POST {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}")
        .into_bytes()
}

fn large() -> String {
    json!({"padding_bytes": ANSWER_BYTES}).to_string()
}

/// Holds a connection without a look at it, until the host has hung up or for longer than it should take.
fn hold(stream: &mut TcpStream, time: Duration) {
    thread::sleep(time);
    let _ = stream.shutdown(std::net::Shutdown::Both);
}

fn never_read(address: SocketAddr, done: &Done) {
    let Some(mut stream) = connect(address) else { return };
    if stream.write_all(&request("/predict_sync?model_name=large", &large())).is_ok() {
        done.unread.fetch_add(1, Ordering::Relaxed);
        hold(&mut stream, Duration::from_secs(7));
    }
}

fn never_read_http2(address: SocketAddr, done: &Done) {
    let Some(stream) = connect(address) else { return };
    let Ok(mut held) = stream.try_clone() else { return };
    let mut connection = http2::Connection::open(stream);
    connection.post("/predict_sync?model_name=large", &large());
    done.unread.fetch_add(1, Ordering::Relaxed);
    hold(&mut held, Duration::from_secs(7));
}

fn sleep_in_validate(address: SocketAddr, done: &Done) {
    let body = json!({"do": "sleep in validate", "ms": 2000}).to_string();
    // Whether it is answered, or comes too late, is all the same.
    let _ = exchange(address, &request("/predict_sync?model_name=asleep", &body));
    done.asleep.fetch_add(1, Ordering::Relaxed);
}

fn leave_headers_unfinished(address: SocketAddr, done: &Done) {
    let Some(mut stream) = connect(address) else { return };
    let _ = stream.write_all(b"POST /predict_sync HTTP/1.1\r\nx-long: ");
    let _ = stream.write_all(&[b'y'; 60 << 10]);
    done.headers.fetch_add(1, Ordering::Relaxed);
    hold(&mut stream, Duration::from_secs(3));
}

fn leave_body_unfinished(address: SocketAddr, done: &Done) {
    let Some(mut stream) = connect(address) else { return };
    let head =
        "POST /predict_sync?model_name=echo HTTP/1.1\r\nhost: localhost\r\ncontent-length: 8000000\r\n\r\n";
    let _ = stream.write_all(head.as_bytes());
    let _ = stream.write_all(&vec![b' '; 7 << 20]);
    done.bodies.fetch_add(1, Ordering::Relaxed);
    hold(&mut stream, Duration::from_secs(3));
}

fn list_jobs(address: SocketAddr, done: &Done) {
    let _ = exchange(address, b"GET /jobs HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
    done.listed.fetch_add(1, Ordering::Relaxed);
}

fn fail(address: SocketAddr, done: &Done) {
    let body = json!({"do": "fail the batch"}).to_string();
    let _ = exchange(address, &request("/predict_sync?model_name=failing", &body));
    done.failed.fetch_add(1, Ordering::Relaxed);
}

fn resident_mib(host: &Host) -> f64 {
    let status = fs::read_to_string(format!("/proc/{}/status", host.id())).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or("0 kB");
    line.trim().trim_end_matches(" kB").trim().parse::<f64>().unwrap_or_default() / 1024.0
}
