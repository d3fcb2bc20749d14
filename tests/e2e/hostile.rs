//! Callers that break every rule, and callers that leave: the host answers or hangs up in bounded time, serves others
//! throughout, and keeps nothing.

use std::{
    env,
    io::{ErrorKind, Read, Write},
    net::Shutdown,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use modalkit_tests::{Host, Setup, wait_until};
use serde_json::json;

const REQUESTS: u64 = 10_000;
const CALLERS: u64 = 16;
/// Twice the host's header timeout in this test, with room for a busy machine.
const BOUND: Duration = Duration::from_secs(30);

/// The same numbers for the same seed (SplitMix64).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % limit
    }

    fn pick<'a, T: ?Sized>(&mut self, from: &[&'a T]) -> &'a T {
        from[self.below(from.len() as u64) as usize]
    }
}

const PATHS: [&str; 3] = ["/predict_sync", "/predict_batch", "/predict_async"];

/// A request that no server should take, and whether the caller then waits in silence.
fn malformed(random: &mut Random) -> (Vec<u8>, bool) {
    let path = random.pick(&PATHS);
    let good = br#"{"value": 12, "do": "nothing special", "ms": 3}"#;
    let with = |path: &str, headers: &str, body: &[u8]| {
        let mut bytes = format!("POST {path} HTTP/1.1\r\nhost: localhost\r\n{headers}\r\n").into_bytes();
        bytes.extend_from_slice(body);
        bytes
    };
    let sized = |path: &str, body: &[u8]| with(path, &format!("content-length: {}\r\n", body.len()), body);
    match random.below(1000) {
        // Bytes that JSON allows nowhere.
        0..400 => {
            let mut body = good.to_vec();
            for _ in 0..=random.below(4) {
                let at = random.below(body.len() as u64 + 1) as usize;
                let byte = *random.pick(&[&0x00, &0x01, &0x1f, &0x80, &0xc0, &0xff]);
                body.insert(at, byte);
            }
            (sized(path, &body), false)
        }
        // JSON of another shape.
        400..600 => {
            let body = random.pick(&[
                "null",
                "true",
                "0",
                "1e999",
                "\"text\"",
                "[null]",
                "{\"value\": \"1\"}",
                "{\"value\": 1.5}",
                "{\"value\": []}",
                "{\"do\": {}}",
                "{\"ms\": -1}",
                "{\"ms\": 1e30}",
                "[{\"value\": {}}]",
                "{\"message\": {\"value\": []}, \"value\": []}",
                "{\"message\": {}, \"meta\": 1, \"value\": []}",
                "{\"value\": 99999999999999999999}",
                "{\"message\": {}, \"more\": 1, \"value\": []}",
                "[1, 2, 3]",
                "{\"value\": 1",
                "",
                "{",
                "]",
            ]);
            (sized(path, body.as_bytes()), false)
        }
        // A body that ends before its length.
        600..700 => {
            let cut = random.below(good.len() as u64) as usize;
            (with(path, &format!("content-length: {}\r\n", good.len()), &good[..cut]), false)
        }
        // Lengths that are none, and two that differ.
        700..800 => {
            let lengths = random.pick(&[
                "content-length: -1\r\n",
                "content-length: many\r\n",
                "content-length: 18446744073709551616\r\n",
                "content-length: 3\r\ncontent-length: 30\r\n",
                "transfer-encoding: chunked\r\n",
                "content-length: 5\r\n",
            ]);
            (with(path, lengths, b"zz\r\nnot a chunk\r\n"), false)
        }
        // No HTTP at all.
        800..900 => {
            let mut bytes = vec![0; 1 + random.below(300) as usize];
            bytes.iter_mut().for_each(|byte| *byte = random.below(256) as u8);
            bytes[0] |= 0x80;
            bytes.extend_from_slice(b"\r\n\r\n");
            (bytes, false)
        }
        900..970 => {
            let bytes = random.pick(&[
                "GET /predict_sync HTTP/1.1\r\nhost: localhost\r\n\r\n",
                "PUT /predict_sync HTTP/1.1\r\nhost: localhost\r\n\r\n",
                "POST /predict_sync?model_name=%FF%00 HTTP/1.1\r\nhost: localhost\r\ncontent-length: 2\r\n\r\n{}",
                "POST /predict_sync HTTP/1.1\r\nhost: localhost\r\nx-request-timeout-ms: -5\r\ncontent-length: 2\r\n\r\n{}",
                "POST /../../etc/passwd HTTP/1.1\r\nhost: localhost\r\n\r\n",
                "POST /predict_sync HTTP/9.9\r\n\r\n",
                "GET /jobs/%00 HTTP/1.1\r\nhost: localhost\r\n\r\n",
                "POST /predict_sync HTTP/1.1\r\nbad header\r\n\r\n",
                "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\nnot a frame, not a frame, not a frame",
            ]);
            (bytes.as_bytes().to_vec(), false)
        }
        // Headers without end.
        970..975 => (with(path, &format!("x-long: {}\r\n", "y".repeat(1 << 20)), b""), false),
        // 10 MiB.
        975..978 => (sized(path, &vec![b' '; 10 << 20]), false),
        // Silence before, in the middle of, and after the headers.
        978..985 => (Vec::new(), true),
        985..992 => (b"POST /predict_sync HTTP/1.1\r\nhost:".to_vec(), true),
        992..996 => (b"PRI".to_vec(), true),
        _ => (with(path, "content-length: 100\r\n", b"{\"value\""), true),
    }
}

/// Sends it and reads on until there is an answer or an end. `None` where the connection was closed without one.
fn send(host: &Host, request: &[u8], then_silence: bool) -> Option<u16> {
    let mut stream = host.connect();
    stream.set_read_timeout(Some(BOUND)).expect("a timeout");
    stream.set_write_timeout(Some(BOUND)).expect("a timeout");
    // The host may have closed before all was sent.
    let _ = stream.write_all(request);
    if !then_silence {
        let _ = stream.shutdown(Shutdown::Write);
    }
    let mut answer = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(length) => answer.extend_from_slice(&buffer[..length]),
            Err(error) if matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe) => break,
            Err(error) => panic!("neither an answer nor an end in {BOUND:?}: {error}"),
        }
        if answer.len() > 12 && answer.starts_with(b"HTTP/1") {
            break;
        }
    }
    let status = answer.strip_prefix(b"HTTP/1.1 ").or_else(|| answer.strip_prefix(b"HTTP/1.0 "))?;
    std::str::from_utf8(&status[..3]).expect("three digits").parse().ok()
}

fn left_behind(host: &Host) {
    wait_until("every connection but this one is gone", || host.metric("modalkit_connections") <= 1.0);
    assert_eq!(host.metric("modalkit_requests_in_flight"), 0.0);
    assert_eq!(host.metric(r#"modalkit_queued_jobs{model="puppet"}"#), 0.0);
}

fn no_panic_in_the_log(host: Host) {
    let panics: Vec<_> =
        host.whole_log().into_iter().filter(|line| line.to_string().contains("panic")).collect();
    assert!(panics.is_empty(), "{panics:#?}");
}

#[test]
fn ten_thousand_malformed_requests_are_answered_or_cut_off_while_others_are_served() {
    let config = "[server]\nheader_timeout_ms = 700\nbody_timeout_ms = 700\nlog = \"info\"";
    let host = Setup::new().plugin("puppet").config(config).ready();
    let (sent, done) = (AtomicU64::new(0), AtomicBool::new(false));
    thread::scope(|scope| {
        let good = scope.spawn(|| {
            let mut served = 0;
            while !done.load(Ordering::Relaxed) {
                let (status, answer) = host.post("/predict_sync", &json!({"value": served}));
                assert_eq!((status, answer["value"].as_u64()), (200, Some(served)));
                served += 1;
            }
            served
        });
        let callers: Vec<_> = (0..CALLERS)
            .map(|caller| {
                let (host, sent) = (&host, &sent);
                scope.spawn(move || {
                    let mut random = Random(caller);
                    while sent.fetch_add(1, Ordering::Relaxed) < REQUESTS {
                        let (request, then_silence) = malformed(&mut random);
                        if let Some(status) = send(host, &request, then_silence) {
                            let head =
                                String::from_utf8_lossy(&request[..request.len().min(200)]).into_owned();
                            assert!((400..500).contains(&status), "{status} for {head}");
                        }
                    }
                })
            })
            .collect();
        let results: Vec<_> = callers.into_iter().map(thread::ScopedJoinHandle::join).collect();
        done.store(true, Ordering::Relaxed);
        assert!(results.iter().all(Result::is_ok), "a caller met what it should not");
        assert!(good.join().expect("the good caller is always served") > 0);
    });
    left_behind(&host);
    no_panic_in_the_log(host);
}

/// How long callers hang up at random; `MODALKIT_TEST_HANG_UP_SECONDS` makes it longer than CI has time for.
fn hang_up_time() -> Duration {
    let seconds = env::var("MODALKIT_TEST_HANG_UP_SECONDS").ok().and_then(|seconds| seconds.parse().ok());
    Duration::from_secs(seconds.unwrap_or(10))
}

const LEAVERS: u64 = 64;
/// Rounds until memory must have stopped to grow.
const ROUNDS_MAX: usize = 6;
/// Memory may differ by this much between two rests without anything being kept.
const REST_DIFFERENCE_BYTES: f64 = 8.0 * 1024.0 * 1024.0;

fn leavers(host: &Host, time: Duration) {
    let begun = Instant::now();
    thread::scope(|scope| {
        for caller in 0..LEAVERS {
            scope.spawn(move || {
                let mut random = Random(caller);
                while begun.elapsed() < time {
                    let body = json!({"do": "sleep", "ms": random.below(20), "value": caller}).to_string();
                    let request = format!(
                        "POST /predict_sync HTTP/1.1\r\nhost: localhost\r\ncontent-length: {}\r\n\r\n{body}",
                        body.len()
                    );
                    let mut stream = host.connect();
                    let part = random.below(request.len() as u64 + 40) as usize;
                    stream.write_all(&request.as_bytes()[..part.min(request.len())]).expect("the host reads");
                    thread::sleep(Duration::from_millis(random.below(30)));
                }
            });
        }
        for caller in 0..4 {
            scope.spawn(move || {
                while begun.elapsed() < time {
                    let (status, answer) = host.post("/predict_sync", &json!({"value": caller}));
                    assert_eq!((status, &answer["value"]), (200, &json!(caller)));
                }
            });
        }
    });
    left_behind(host);
}

#[test]
fn callers_that_hang_up_at_random_leave_nothing_behind() {
    // No timeout may come to the help of a hang-up that went unnoticed, and no limit may refuse what a busy machine gets to late.
    let config = "[server]\nheader_timeout_ms = 600000\nbody_timeout_ms = 600000\nconnections_max = 65536\n\
                  [app_settings.batch_config]\nmax_batch_size = 4\nwait_ms = 2";
    let host = Setup::new().plugin("puppet").config(config).ready();
    leavers(&host, hang_up_time() / 4);
    let growth = || {
        let before = host.metric("modalkit_resident_bytes");
        leavers(&host, hang_up_time());
        host.metric("modalkit_resident_bytes") - before
    };
    // Threads that a busy machine starts late have memory of their own, once. What is kept grows each time.
    let mut grown = Vec::new();
    while grown.len() < ROUNDS_MAX && grown.last().is_none_or(|bytes| *bytes >= REST_DIFFERENCE_BYTES) {
        grown.push(growth());
    }
    assert!(grown.iter().any(|bytes| *bytes < REST_DIFFERENCE_BYTES), "memory grew each time: {grown:?}");
    assert!(host.metric(r#"modalkit_jobs_skipped_total{model="puppet",reason="cancelled"}"#) > 0.0);
    no_panic_in_the_log(host);
}

#[test]
fn an_http2_connection_that_asks_for_nothing_any_more_is_ended() {
    let host = Setup::new().config("[server]\nkeep_alive_timeout_ms = 200").start();
    let mut stream = host.connect();
    // The preface with empty settings, then a whole request: GET / in HPACK's static table.
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").unwrap();
    stream.write_all(b"\0\0\x03\x01\x05\0\0\0\x01\x82\x86\x84").unwrap();
    let mut answered = Vec::new();
    // It ends by itself; a ping that nobody answers would take forty seconds.
    let begun = Instant::now();
    stream.read_to_end(&mut answered).unwrap();
    assert!(answered.len() > 30, "the request was answered: {answered:?}");
    assert!(begun.elapsed() < BOUND, "{:?}", begun.elapsed());
    assert_eq!(host.get("/livez").0, 200);
}
