//! Load: closed-loop callers on connections of their own, who look at every answer. They are part of the test's process, so
//! their figures are for comparisons within one run.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::PATIENCE;

/// What callers send, and what they expect.
#[derive(Clone, Copy)]
pub struct Requests {
    /// The path with its query.
    pub path: &'static str,
    /// The body.
    pub body: &'static str,
    /// Statuses that are answers; any other is a fault.
    pub statuses: &'static [u16],
    /// Looks at an answer; what it says is a fault. Returns the version that answered.
    pub check: fn(&Value) -> Result<u64, String>,
}

/// Callers at work.
pub struct Load {
    stop: Arc<AtomicBool>,
    newest: Arc<AtomicU64>,
    callers: Vec<JoinHandle<Served>>,
}

/// What callers saw.
#[derive(Debug, Default)]
pub struct Served {
    /// Right answers.
    pub right: u64,
    /// What went wrong, each with the moment since the start; at most [`FAULTS_MAX`] a caller.
    pub faults: Vec<String>,
    /// Answers that were wrong or missing.
    pub wrong: u64,
    /// Right answers of an older version than the same caller had seen before.
    pub backwards: u64,
    /// How long each right answer took, in microseconds, and when it came.
    pub latencies: Vec<(Instant, u32)>,
}

/// Faults of one caller that are remembered.
pub const FAULTS_MAX: usize = 5;

impl Load {
    /// Starts this many callers.
    #[must_use]
    pub fn start(address: SocketAddr, connections: usize, requests: Requests) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let newest = Arc::new(AtomicU64::new(0));
        let callers = (0..connections)
            .map(|_| {
                let (stop, newest) = (Arc::clone(&stop), Arc::clone(&newest));
                thread::spawn(move || call(address, requests, &stop, &newest))
            })
            .collect();
        Self { stop, newest, callers }
    }

    /// The newest version that answered any caller.
    #[must_use]
    pub fn newest(&self) -> u64 {
        self.newest.load(Ordering::SeqCst)
    }

    /// Lets them finish.
    ///
    /// # Panics
    /// Where one of them did.
    #[must_use]
    pub fn stop(self) -> Served {
        self.stop.store(true, Ordering::SeqCst);
        let mut all = Served::default();
        for caller in self.callers {
            let served = caller.join().expect("a caller reports what goes wrong");
            all.right += served.right;
            all.wrong += served.wrong;
            all.backwards += served.backwards;
            all.faults.extend(served.faults);
            all.latencies.extend(served.latencies);
        }
        all
    }
}

impl Served {
    /// A percentile of the latencies between two moments, in milliseconds.
    #[must_use]
    pub fn percentile(&self, share: f64, from: Instant, until: Instant) -> f64 {
        let mut times: Vec<u32> = self
            .latencies
            .iter()
            .filter(|(at, _)| (from..until).contains(at))
            .map(|(_, micros)| *micros)
            .collect();
        times.sort_unstable();
        let at = ((times.len() as f64 * share) as usize).min(times.len().saturating_sub(1));
        times.get(at).map_or(0.0, |micros| f64::from(*micros) / 1e3)
    }

    /// # Panics
    /// Where an answer was wrong or missing.
    pub fn assert_faultless(&self) {
        assert_eq!(self.wrong, 0, "of {} answers: {:#?}", self.right + self.wrong, self.faults);
        assert_eq!(self.backwards, 0, "answers of a version that had been replaced");
        assert!(self.right > 0, "nobody was answered");
    }
}

fn call(address: SocketAddr, requests: Requests, stop: &AtomicBool, newest: &AtomicU64) -> Served {
    let Requests { path, body, statuses, check } = requests;
    let request = format!(
        "POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    let mut served = Served::default();
    let mut seen = 0;
    let begun = Instant::now();
    let mut connection = None;
    while !stop.load(Ordering::SeqCst) {
        let asked = Instant::now();
        let answer = ask(&mut connection, address, request.as_bytes(), statuses);
        let took = asked.elapsed();
        match answer.and_then(|answer| check(&answer)) {
            Ok(version) => {
                served.backwards += u64::from(version < seen);
                seen = version;
                newest.fetch_max(version, Ordering::SeqCst);
                served.right += 1;
                served.latencies.push((Instant::now(), u32::try_from(took.as_micros()).unwrap_or(u32::MAX)));
            }
            Err(fault) => {
                served.wrong += 1;
                if served.faults.len() < FAULTS_MAX {
                    served.faults.push(format!("{:?}: {fault}", begun.elapsed()));
                }
                connection = None;
                // What is wrong for good need not fill the log.
                thread::sleep(Duration::from_millis(1));
            }
        }
    }
    served
}

fn ask(
    connection: &mut Option<BufReader<TcpStream>>,
    address: SocketAddr,
    request: &[u8],
    statuses: &[u16],
) -> Result<Value, String> {
    let failed = |error: std::io::Error| format!("the connection failed: {error}");
    let reader = match connection {
        Some(reader) => reader,
        None => {
            let stream = TcpStream::connect(address).map_err(failed)?;
            stream.set_nodelay(true).map_err(failed)?;
            stream.set_read_timeout(Some(PATIENCE)).map_err(failed)?;
            connection.insert(BufReader::new(stream))
        }
    };
    reader.get_mut().write_all(request).map_err(failed)?;
    let (mut line, mut status, mut length, mut closes) = (String::new(), String::new(), 0, false);
    loop {
        line.clear();
        if reader.read_line(&mut line).map_err(failed)? == 0 {
            return Err("the connection was closed".into());
        }
        let text = line.trim_end();
        if status.is_empty() {
            text.clone_into(&mut status);
        } else if text.is_empty() {
            break;
        } else if let Some((name, value)) = text.split_once(':')
            && name.eq_ignore_ascii_case("content-length")
        {
            length = value.trim().parse().map_err(|_| format!("a header is {text:?}"))?;
        } else if text.eq_ignore_ascii_case("connection: close") {
            closes = true;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).map_err(failed)?;
    if closes {
        *connection = None;
    }
    if !statuses.iter().any(|known| status.contains(&format!(" {known} "))) {
        return Err(format!("{status}: {}", String::from_utf8_lossy(&body)));
    }
    serde_json::from_slice(&body).map_err(|error| format!("the body is no JSON: {error}"))
}

/// What `versioned` is asked, and must answer.
pub const VERSIONED: Requests = Requests {
    path: "/predict_sync?model_name=versioned",
    body: r#"{"text": "hello"}"#,
    statuses: &[200],
    check: |answer| {
        if answer["text"] != "HELLO" || answer["status"] != "success" {
            return Err(format!("wrong answer: {answer}"));
        }
        answer["version"].as_u64().ok_or_else(|| format!("no version: {answer}"))
    },
};

/// What `echo` is asked, and must answer.
pub const ECHO: Requests = Requests {
    path: "/predict_sync?model_name=echo",
    body: r#"{"text": "hello"}"#,
    statuses: &[200],
    check: |answer| match answer["translated_text"] == "HELLO" {
        true => Ok(0),
        false => Err(format!("wrong answer: {answer}")),
    },
};
