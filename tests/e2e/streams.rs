//! Answers in chunks: they come as they are made, end as any other answer would, stop with their callers, and nobody's pace is another's.

use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
    sync::{Condvar, Mutex},
    thread,
    time::Duration,
};

use modalkit_tests::{
    Host, KEY, Setup,
    events::{Event, EventStream},
    http2, install, library, wait_until, workspace,
};
use serde_json::{Value, json};

const STREAMS: &str = "streams";
const MIB: f64 = 1024.0 * 1024.0;

fn setup(config: &str) -> Setup {
    Setup::new().plugin(STREAMS).config(config)
}

fn open(host: &Host, input: &Value) -> EventStream {
    EventStream::open(host.connect(), STREAMS, input, "")
}

fn opened_with(host: &Host, input: &Value, headers: &str) -> EventStream {
    EventStream::open(host.connect(), STREAMS, input, headers)
}

fn names(events: &[Event]) -> Vec<&str> {
    events.iter().map(|event| event.name.as_str()).collect()
}

/// The numbers of an item's chunks, all of which are its own.
fn numbers(events: &[Event], id: u64) -> Vec<u64> {
    let chunks = events.iter().filter(|event| event.name == "chunk").map(Event::json);
    chunks
        .map(|chunk| {
            assert_eq!(chunk["id"], id, "a stream got another's chunk");
            chunk["number"].as_u64().unwrap()
        })
        .collect()
}

/// How streams of the model ended.
fn ended(host: &Host, reason: &str) -> f64 {
    host.metric(&format!("modalkit_streams_ended_total{{model=\"streams\",reason={reason:?}}}"))
}

/// As [`given_up`], of a model whose batches wait to be filled: it is asked three times at once.
fn given_up_soon(host: &Host, id: u64) -> i64 {
    let input = json!({"id": id, "do": "count"});
    let (status, answer) = host.post("/predict_batch?model_name=streams", &json!([input, input, input]));
    assert_eq!(status, 200, "{answer}");
    answer[0]["sent"].as_i64().unwrap()
}

/// After how many chunks an item was given up.
fn given_up(host: &Host, id: u64) -> i64 {
    let (status, answer) = host.post("/predict_sync?model_name=streams", &json!({"id": id, "do": "count"}));
    assert_eq!(status, 200, "{answer}");
    answer["sent"].as_i64().unwrap()
}

#[test]
fn chunks_come_as_they_are_made_and_the_end_is_what_other_callers_get_whole() {
    let host = setup("").plugin("echo").ready();
    let input = json!({"id": 7, "chunks": 5, "pause_ms": 300});
    let mut stream = open(&host, &input);
    assert_eq!(stream.status, 200);
    for header in
        ["content-type: text/event-stream\r\n", "cache-control: no-store\r\n", "x-accel-buffering: no\r\n"]
    {
        assert!(stream.headers.contains(header), "{}", stream.headers);
    }
    assert!(stream.headers.contains("x-request-id: "));
    let first = stream.next_event().unwrap();
    // The pipeline is still at work.
    let of_model = |name: &str| host.metric(&format!("{name}{{model=\"streams\"}}"));
    assert_eq!((of_model("modalkit_streams"), ended(&host, "complete")), (1.0, 0.0));
    let mut events = vec![first];
    events.extend(stream.rest());
    assert_eq!(numbers(&events, 7), [0, 1, 2, 3, 4]);
    let end = events.last().unwrap();
    assert_eq!((end.name.as_str(), events.len()), ("end", 6));
    let (status, whole) = host.post("/predict_sync?model_name=streams", &input);
    assert_eq!((status, &end.json()), (200, &whole));
    assert_eq!(whole, json!({"status": "success", "id": 7, "sent": 5, "dropped": 0}));
    // Lists and jobs, too.
    let (_, list) = host.post("/predict_batch?model_name=streams", &json!([input, input]));
    assert_eq!(list, json!([whole, whole]));
    let job = host.job(STREAMS, &json!({"message": input}));
    assert_eq!(host.ended(&job)["result"], whole);
    assert_eq!((of_model("modalkit_streams"), ended(&host, "complete")), (0.0, 1.0));
    assert_eq!(of_model("modalkit_stream_chunks_total"), 5.0);
    assert_eq!(of_model("modalkit_stream_first_event_seconds_count"), 1.0);
    let counted = "modalkit_requests_total{endpoint=\"/predict_stream\",model=\"streams\",status=\"200\"}";
    assert_eq!(host.metric(counted), 1.0);
    // A pipeline that has no chunks answers as one event.
    let stream = EventStream::open(host.connect(), "echo", &json!({"text": "one"}), "");
    let events = stream.rest();
    assert_eq!(names(&events), ["end"]);
    assert_eq!(events[0].json()["translated_text"], "ONE");
}

#[test]
fn an_error_before_the_first_event_has_its_status_and_one_after_it_ends_the_stream() {
    let host = setup("").ready();
    for (input, status, expected) in [
        (json!({"chunks": 1}), 422, "field required: `id`"),
        (json!({"id": 1, "do": "fail"}), 500, "told to fail"),
        (json!({"id": 1, "do": "panic"}), 500, "told to panic"),
    ] {
        let stream = open(&host, &input);
        assert_eq!(stream.status, status, "{input}");
        let answer = stream.whole().to_string();
        assert!(answer.contains(expected), "{answer}");
    }
    let stream = EventStream::open(host.connect(), "nobody", &json!({"id": 1}), "");
    assert_eq!((stream.status, stream.whole()["detail"].is_string()), (404, true));
    let late = opened_with(&host, &json!({"id": 1, "silence_ms": 2000}), "x-request-timeout-ms: 100\r\n");
    assert_eq!(late.status, 504);
    for (what, expected) in [
        ("fail", "told to fail"),
        ("panic", "told to panic"),
        ("nan", "a chunk can't be written as JSON: expected a finite number, found NaN"),
    ] {
        let stream = open(&host, &json!({"id": 2, "chunks": 2, "pause_ms": 50, "do": what}));
        assert_eq!(stream.status, 200);
        let events = stream.rest();
        assert_eq!(names(&events), ["chunk", "chunk", "end"], "{what}");
        let end = events[2].json();
        assert_eq!(
            (end["status"].as_str(), end["status_code"].as_u64()),
            (Some("error"), Some(500)),
            "{end}"
        );
        assert!(end["error"].as_str().unwrap().contains(expected), "{end}");
    }
    let input = json!({"id": 3, "chunks": 1000, "pause_ms": 50});
    let events = opened_with(&host, &input, "x-request-timeout-ms: 2000\r\n").rest();
    assert_eq!(events.last().unwrap().json()["status_code"], 504);
    assert!((1..100).contains(&numbers(&events, 3).len()));
    let counted = |status: u16| {
        host.metric(&format!(
            "modalkit_requests_total{{endpoint=\"/predict_stream\",model=\"streams\",status=\"{status}\"}}"
        ))
    };
    assert_eq!([422, 500, 504].map(counted), [1.0, 5.0, 2.0]);
    assert_eq!(ended(&host, "failed"), 4.0);
    // A chunk of several lines begins no event of its own.
    let events = open(&host, &json!({"id": 4, "do": "lines"})).rest();
    assert_eq!(names(&events), ["chunk", "end"]);
    assert_eq!(events[0].json(), json!([1, "event: end"]));
}

#[test]
fn a_stream_without_news_says_so_and_may_still_fail() {
    let host = setup("[server]\nstream_heartbeat_ms = 100\n").ready();
    for (what, code) in [("", None), ("fail", Some(500))] {
        let mut stream = open(&host, &json!({"id": 1, "chunks": 1, "silence_ms": 700, "do": what}));
        assert_eq!(stream.status, 200);
        let events: Vec<Event> = std::iter::from_fn(|| stream.next_event()).collect();
        let comments = events.iter().filter(|event| event.name.is_empty()).count();
        assert!(comments >= 2, "{comments} comments");
        assert_eq!(events.last().unwrap().json()["status_code"].as_u64(), code);
    }
}

#[test]
fn a_pipeline_stops_within_one_chunk_of_its_callers_leaving_however_it_was_asked() {
    let host = setup("[app_settings.deployment_config]\nallow_concurrent_inputs = 3\n").ready();
    let long = |id: u64| json!({"id": id, "chunks": 1000, "pause_ms": 400});
    // One who streams.
    let mut stream = open(&host, &long(1));
    for _ in 0..2 {
        stream.next_event().unwrap();
    }
    drop(stream);
    // One who waits for the whole; it is sent nothing, so its chunks count when it leaves.
    let mut whole = host.connect();
    let request = long(2).to_string();
    let head = format!(
        "POST /predict_sync?model_name=streams HTTP/1.1\r\nhost: localhost\r\ncontent-length: {}\r\n\r\n{request}",
        request.len()
    );
    whole.write_all(head.as_bytes()).unwrap();
    let job = host.job(STREAMS, &json!({"message": long(3)}));
    let running = || host.metric("modalkit_queue_wait_seconds_count{model=\"streams\"}");
    wait_until("all three run", || running() == 3.0);
    // Some of their chunks are made.
    thread::sleep(Duration::from_millis(1000));
    drop(whole);
    assert_eq!(host.delete(&format!("/jobs/{job}")).0, 202);
    wait_until("each is given up", || (1..=3).all(|id| given_up(&host, id) >= 0));
    // It was made while its caller left; another may have been where the host was slow to hear.
    assert!((2..=3).contains(&given_up(&host, 1)), "{}", given_up(&host, 1));
    for id in [2, 3] {
        assert!(given_up(&host, id) < 10, "{}", given_up(&host, id));
    }
    assert_eq!(ended(&host, "left"), 1.0);
    let counted = "modalkit_requests_total{endpoint=\"/predict_stream\",model=\"streams\",status=\"499\"}";
    assert_eq!(host.metric(counted), 1.0);
    assert_eq!(host.ended(&job)["state"], "cancelled");
    assert_eq!(host.model(STREAMS)["state"], "ready");
}

#[test]
fn a_caller_who_reads_nothing_is_waited_for_and_then_cut_off_and_its_neighbours_go_on() {
    // A batch may run for less time than its callers are waited for: its own time stands still meanwhile.
    let config = "[app_settings.batch_config]\nmax_batch_size = 3\nwait_ms = 60000\n\
                  [app_settings.deployment_config]\nstream_wait_seconds = 600\nbatch_timeout_seconds = 6\n";
    let mut host = setup(config).ready();
    // What the kernel holds for one who doesn't read is less than this.
    let large =
        |id: u64, lossy: bool| json!({"id": id, "chunks": 400, "padding_bytes": 64 << 10, "lossy": lossy});
    let idle = [1, 2].map(|id| {
        let mut stream = host.connect();
        EventStream::send(&mut stream, STREAMS, &large(id, id == 2), "");
        stream
    });
    let neighbour = open(&host, &json!({"id": 3, "chunks": 400}));
    thread::sleep(Duration::from_secs(8));
    assert_eq!((ended(&host, "complete"), ended(&host, "slow")), (0.0, 0.0), "the batch waits");
    let shorter = config.replace("stream_wait_seconds = 600", "stream_wait_seconds = 0.5");
    host.configure(&shorter);
    let (status, reloaded) = host.post("/config/reload", &json!({}));
    assert_eq!(status, 200, "{reloaded}");
    // A wait that has begun goes on as it was, until this caller reads. The next one is shorter, once the fleet has looked at its configuration.
    thread::sleep(Duration::from_millis(500));
    let [slow, lossy] = idle;
    let mut slow = EventStream::answer(slow);
    let first: Vec<Event> = (0..100).filter_map(|_| slow.next_event()).collect();
    let events = neighbour.rest();
    assert_eq!(numbers(&events, 3), (0..400).collect::<Vec<_>>());
    assert_eq!(events.last().unwrap().json()["sent"], 400);
    wait_until("the one who is waited for is cut off", || given_up_soon(&host, 1) >= 0);
    let slow = [first, slow.rest()].concat();
    let end = slow.last().unwrap().json();
    assert_eq!((end["status"].as_str(), end["status_code"].as_u64()), (Some("error"), Some(408)), "{end}");
    assert!(end["error"].as_str().unwrap().contains("none of its chunks for 500ms"), "{end}");
    let kept = numbers(&slow, 1);
    assert_eq!(kept, (0..kept.len() as u64).collect::<Vec<_>>(), "what was taken has come, in order");
    // One that isn't waited for loses what there was no room for, as its pipeline wants it.
    let lossy = EventStream::answer(lossy).rest();
    let end = lossy.last().unwrap().json();
    assert_eq!(end["status"], "success");
    assert!(end["dropped"].as_u64().unwrap() > 0);
    assert_eq!(numbers(&lossy, 2).len() as u64, end["sent"].as_u64().unwrap());
    assert_eq!((ended(&host, "slow"), ended(&host, "complete")), (1.0, 2.0));
    let text = host.text("/metrics");
    let failed =
        text.lines().find(|line| line.starts_with("modalkit_batches_failed_total{") && !line.ends_with(" 0"));
    assert_eq!(failed, None);
    assert_eq!(host.metric("modalkit_replicas_given_up_total{model=\"streams\"}"), 0.0);
}

#[test]
fn callers_who_read_slowly_get_everything_however_long_their_batch_waits_in_all() {
    let config = "[app_settings.batch_config]\nmax_batch_size = 2\nwait_ms = 60000\n\
                  [app_settings.deployment_config]\nstream_wait_seconds = 3\n";
    let host = setup(config).ready();
    let large = |id: u64| json!({"id": id, "chunks": 200, "padding_bytes": 64 << 10});
    let sent = [1, 2].map(|id| {
        let mut stream = host.connect();
        EventStream::send(&mut stream, STREAMS, &large(id), "");
        stream
    });
    let read = sent.map(|stream| {
        thread::spawn(move || EventStream::answer(stream).rest_slowly(Duration::from_millis(25)))
    });
    for (id, read) in (1..).zip(read) {
        let events = read.join().unwrap();
        assert_eq!(numbers(&events, id), (0..200).collect::<Vec<_>>());
        assert_eq!(events.last().unwrap().json()["sent"], 200);
    }
}

#[test]
fn a_stream_that_is_always_busy_ends_at_its_deadline_as_any_other() {
    let host = setup("").ready();
    // Without a pause the pipeline hears of the deadline before the timer does, and a caller who doesn't read has it waiting then.
    let busy = json!({"id": 1, "chunks": 1_000_000_000_u64, "padding_bytes": 1 << 10});
    let end = |events: Vec<Event>| events.last().unwrap().json()["status_code"].clone();
    assert_eq!(end(opened_with(&host, &busy, "x-request-timeout-ms: 3000\r\n").rest()), 504);
    let mut idle = host.connect();
    EventStream::send(&mut idle, STREAMS, &busy, "x-request-timeout-ms: 3000\r\n");
    thread::sleep(Duration::from_millis(4000));
    assert_eq!(end(EventStream::answer(idle).rest()), 504);
}

#[test]
fn a_stream_that_waits_in_the_queue_ends_at_its_deadline_and_leaves_its_place() {
    let host = setup("[server]\nstream_heartbeat_ms = 50\n").ready();
    let mut busy = open(&host, &json!({"id": 1, "chunks": 1000, "pause_ms": 100}));
    busy.next_event().unwrap();
    let queued = || host.metric("modalkit_queued_jobs{model=\"streams\"}");
    let late = opened_with(&host, &json!({"id": 2, "chunks": 1}), "x-request-timeout-ms: 2000\r\n");
    assert_eq!((late.status, queued()), (200, 1.0));
    assert_eq!(late.rest()[0].json()["status_code"], 504);
    assert_eq!(queued(), 0.0);
    let mut leaves = open(&host, &json!({"id": 3, "chunks": 1}));
    assert!(leaves.next_event().unwrap().name.is_empty());
    assert_eq!(queued(), 1.0);
    drop(leaves);
    wait_until("it leaves the queue", || queued() == 0.0);
}

#[test]
fn a_connection_goes_on_after_a_stream_and_one_of_http_1_0_ends_with_it() {
    let host = setup("").ready();
    let mut connection = host.connect();
    for id in 1..=2 {
        EventStream::send(&mut connection, STREAMS, &json!({"id": id, "chunks": 2}), "");
        let events = EventStream::answer(connection.try_clone().unwrap()).rest();
        assert_eq!((numbers(&events, id), events.len()), (vec![0, 1], 3));
    }
    let body = json!({"id": 3, "chunks": 2}).to_string();
    let mut old = host.connect();
    let head =
        format!("POST /predict_stream HTTP/1.0\r\nhost: localhost\r\ncontent-length: {}\r\n\r\n", body.len());
    old.write_all(format!("{head}{body}").as_bytes()).unwrap();
    let mut answer = String::new();
    old.read_to_string(&mut answer).unwrap();
    assert!(!answer.to_ascii_lowercase().contains("transfer-encoding"), "{answer}");
    assert_eq!((answer.matches("event: chunk\n").count(), answer.matches("event: end\n").count()), (2, 1));
}

#[test]
fn what_a_caller_does_not_take_of_a_stream_counts_in_the_budget_and_ends_with_its_connection() {
    let host = setup("[server]\nwrite_timeout_ms = 1500\nstream_heartbeat_ms = 300\n").ready();
    let in_flight = || (host.metric("modalkit_requests_in_flight"), host.metric("modalkit_bytes_in_flight"));
    let mut idle = host.connect();
    let large = json!({"id": 1, "chunks": 400, "padding_bytes": 64 << 10, "lossy": true});
    EventStream::send(&mut idle, STREAMS, &large, "");
    wait_until("bytes wait", || in_flight().1 >= (64 << 10) as f64);
    wait_until("the connection is ended", || in_flight() == (0.0, 0.0));
    // One that has nothing to say for longer than that is none of these, over either protocol.
    let quiet = json!({"id": 2, "chunks": 1, "silence_ms": 4000});
    let events = open(&host, &quiet).rest();
    assert_eq!(events.last().unwrap().json()["status"], "success");
    let mut connection = http2::Connection::open(host.connect());
    connection.post("/predict_stream", &quiet.to_string());
    let mut text = Vec::new();
    let mut ended = false;
    while !ended {
        let (_, data, is_last) = connection.next_data().unwrap();
        (text, ended) = ([text, data].concat(), is_last);
    }
    assert!(String::from_utf8_lossy(&text).contains("event: end\ndata: {\"status\":\"success\""));
}

#[test]
fn streams_share_a_connection_of_http_2_and_their_callers_leave_one_by_one() {
    let host = setup("[app_settings.deployment_config]\nallow_concurrent_inputs = 2\n").ready();
    let mut connection = http2::Connection::open(host.connect());
    let path = "/predict_stream?model_name=streams";
    let leaves = connection.post(path, &json!({"id": 1, "chunks": 1000, "pause_ms": 200}).to_string());
    let (stream, first, _) = connection.next_data().unwrap();
    assert!(stream == leaves && first.starts_with(b"event: chunk\n"));
    let stays = connection.post(path, &json!({"id": 2, "chunks": 5, "pause_ms": 50}).to_string());
    connection.cancel(leaves);
    let mut text = Vec::new();
    loop {
        let (stream, data, ended) = connection.next_data().unwrap();
        if stream == stays {
            text.extend(data);
            if ended {
                break;
            }
        }
    }
    let text = String::from_utf8(text).unwrap();
    assert_eq!(text.matches("event: chunk\n").count(), 5);
    assert!(text.contains("event: end\ndata: {\"status\":\"success\",\"id\":2"), "{text}");
    wait_until("the one that left is given up", || given_up(&host, 1) >= 0);
    assert!(given_up(&host, 1) < 20);
}

#[test]
fn a_stream_outlives_a_reload_and_a_shutdown_waits_for_it() {
    let mut host = setup("").ready();
    let input = |id: u64| json!({"id": id, "chunks": 60, "pause_ms": 100});
    let mut over_reload = open(&host, &input(1));
    over_reload.next_event().unwrap();
    // The same plugin with other bytes behind its end is another generation.
    let mut bytes = fs::read(library(STREAMS)).unwrap();
    bytes.push(0);
    modalkit_tests::put(&bytes, &host.volume().join("streams.so"));
    wait_until("the next generation serves", || host.model(STREAMS)["generation"]["number"] == 2);
    assert_eq!(ended(&host, "complete"), 0.0, "the stream goes on over it");
    let events = over_reload.rest();
    assert_eq!(numbers(&events, 1), (1..60).collect::<Vec<_>>());
    let mut over_shutdown = open(&host, &input(2));
    over_shutdown.next_event().unwrap();
    host.signal("TERM");
    let events = over_shutdown.rest();
    assert_eq!(numbers(&events, 2), (1..60).collect::<Vec<_>>());
    assert_eq!(events.last().unwrap().json()["status"], "success");
    assert!(host.wait().success());
}

#[test]
fn a_caller_who_asks_where_the_time_went_is_told_before_the_end() {
    let keys = format!("[app_settings.auth_config.keys.one]\napi_key = {KEY:?}\nexplain = true\n");
    let host = setup(&keys).ready();
    let headers = format!("x-api-key: {KEY}\r\nx-modalkit-explain: 1\r\n");
    let events = opened_with(&host, &json!({"id": 1, "chunks": 1}), &headers).rest();
    assert_eq!(names(&events), ["chunk", "explain", "end"]);
    assert!(events[1].json()["batches"].is_array(), "{}", events[1].data);
}

#[test]
fn words_of_a_text_come_one_by_one() {
    let setup = Setup::new().plugin("bigram");
    let corpus = "harbour.corpus";
    install(&workspace().join("plugins/bigram/model").join(corpus), &setup.volume().join(corpus));
    let folder = setup.volume().display().to_string();
    let config = format!(
        "[model_settings]\nlocal_model_repository_folder = {folder:?}\n[model_settings.model_entries.babble]\nplugin = \"bigram\"\ncorpus = {corpus:?}\n"
    );
    let host = setup.config(&config).ready();
    let input = json!({"prompt": "The keeper", "seed": 7});
    let events = EventStream::open(host.connect(), "babble", &input, "").rest();
    let texts: Vec<String> = events[..events.len() - 1]
        .iter()
        .map(|chunk| chunk.json()["text"].as_str().unwrap().to_owned())
        .collect();
    let end = events.last().unwrap().json();
    assert!(texts.len() > 1);
    assert_eq!(end["text"].as_str().unwrap(), texts.concat());
    assert_eq!(host.post("/predict_sync?model_name=babble", &input).1, end);
    // As the README prints it.
    let written = events.iter().map(|event| format!("event: {}\ndata: {}\n", event.name, event.data));
    let written = written.collect::<Vec<_>>().join("\n");
    let readme = fs::read_to_string(workspace().join("README.md")).unwrap();
    let command = format!("curl -N -d '{}'", r#"{"prompt": "The keeper", "seed": 7}"#);
    let (_, printed) = readme.split_once(&command).expect("the README has such a request");
    assert_eq!(printed.split_once('\n').unwrap().1.split("```").next().unwrap(), written);
}

/// The most memory that the host has had.
fn peak_bytes(host: &Host) -> f64 {
    let status = fs::read_to_string(format!("/proc/{}/status", host.id())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().strip_suffix("kB").unwrap().trim().parse::<f64>().unwrap() * 1024.0
}

/// How a caller of a thousand reads.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Leaves after a few.
    Leaves,
    /// Reads nothing until all others are done, of more than the kernel holds for it.
    Stalls,
    Reads,
}

impl Kind {
    fn of(id: u64) -> Self {
        match id % 20 {
            0..4 => Self::Leaves,
            4 => Self::Stalls,
            _ => Self::Reads,
        }
    }
}

#[test]
fn a_thousand_streams_at_once_mix_nothing_and_take_bounded_memory() {
    const CALLERS: u64 = 1000;
    const CHUNKS: u64 = 100;
    /// Of those who stall: all of it is many times what the host may hold.
    const LARGE_BYTES: usize = 96 << 10;
    const GROWTH_MAX: f64 = 160.0 * MIB;
    let files_max = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    assert!(
        files_max.is_none_or(|max| max > 3000),
        "expected 3000 open files (ulimit -n), found {files_max:?}"
    );
    let config = "[app_settings.batch_config]\nmax_batch_size = 250\nwait_ms = 60000\n\
                  [app_settings.deployment_config]\nallow_concurrent_inputs = 1000\nallow_concurrent_inputs_handler = 2000\n\
                  [server]\nconnections_max = 2000\nconnections_per_address_max = 2000\nwrite_timeout_ms = 60000\n";
    let host = setup(config).ready();
    let before = peak_bytes(&host);
    let sent: Vec<(u64, TcpStream)> = (0..CALLERS)
        .map(|id| {
            let stalls = Kind::of(id) == Kind::Stalls;
            let padding_bytes = if stalls { LARGE_BYTES } else { 100 };
            let input = json!({"id": id, "chunks": CHUNKS, "padding_bytes": padding_bytes, "pause_ms": 100, "lossy": stalls});
            let mut stream = host.connect();
            EventStream::send(&mut stream, STREAMS, &input, "");
            (id, stream)
        })
        .collect();
    // Those who stall read last; the others once all have begun, or the test has failed.
    let (all_have_begun, others_are_done) = (Signal::default(), Signal::default());
    let read = |id: u64, stream: TcpStream| {
        if Kind::of(id) == Kind::Stalls {
            others_are_done.wait();
            return EventStream::answer(stream).rest();
        }
        let mut events = EventStream::answer(stream);
        let mut read: Vec<Event> = events.next_event().into_iter().collect();
        all_have_begun.wait();
        if Kind::of(id) == Kind::Leaves {
            read.extend((0..3).filter_map(|_| events.next_event()));
        } else {
            read.extend(events.rest());
        }
        read
    };
    let read: Vec<(u64, Vec<Event>)> = thread::scope(|scope| {
        // However this ends, nobody waits any more.
        let _signals = [all_have_begun.on_drop(), others_are_done.on_drop()];
        let (stalled, others): (Vec<_>, Vec<_>) =
            sent.into_iter().partition(|(id, _)| Kind::of(*id) == Kind::Stalls);
        let spawn = |(id, stream): (u64, TcpStream)| {
            let builder = thread::Builder::new().stack_size(256 << 10);
            builder.spawn_scoped(scope, move || (id, read(id, stream))).unwrap()
        };
        let others: Vec<_> = others.into_iter().map(spawn).collect();
        wait_until("all of them stream at once", || {
            host.metric("modalkit_streams{model=\"streams\"}") as u64 == CALLERS
        });
        all_have_begun.set();
        let mut read: Vec<_> = others.into_iter().map(|caller| caller.join().unwrap()).collect();
        others_are_done.set();
        let stalled: Vec<_> = stalled.into_iter().map(spawn).collect();
        read.extend(stalled.into_iter().map(|caller| caller.join().unwrap()));
        read
    });
    assert_eq!(read.len() as u64, CALLERS);
    let mut dropped = 0;
    for (id, events) in &read {
        let numbers = numbers(events, *id);
        assert!(numbers.is_sorted(), "{id}");
        if Kind::of(*id) == Kind::Leaves {
            continue;
        }
        let end = events.last().unwrap().json();
        assert_eq!((end["status"].as_str(), &end["sent"]), (Some("success"), &json!(numbers.len())), "{id}");
        if Kind::of(*id) == Kind::Stalls {
            dropped += end["dropped"].as_u64().unwrap();
        } else {
            assert_eq!(numbers, (0..CHUNKS).collect::<Vec<_>>(), "{id}");
        }
    }
    assert!(dropped > 0, "somebody had no room");
    wait_until("all have ended", || host.metric("modalkit_streams{model=\"streams\"}") == 0.0);
    assert_eq!((ended(&host, "complete"), ended(&host, "left")), (800.0, 200.0));
    let grown = peak_bytes(&host) - before;
    assert!(grown < GROWTH_MAX, "{} MiB", grown / MIB);
    assert_eq!(
        (host.metric("modalkit_requests_in_flight"), host.metric("modalkit_bytes_in_flight")),
        (0.0, 0.0)
    );
    // Whoever left was given up before its stream was at its end.
    let left: Vec<Value> = (0..CALLERS)
        .filter(|id| Kind::of(*id) == Kind::Leaves)
        .map(|id| json!({"id": id, "do": "count"}))
        .collect();
    let filled: Vec<&Value> = left.iter().chain(left.iter().take(50)).collect();
    let (status, answers) = host.post("/predict_batch?model_name=streams", &json!(filled));
    assert_eq!(status, 200, "{answers}");
    for answer in answers.as_array().unwrap() {
        assert!((1..CHUNKS as i64).contains(&answer["sent"].as_i64().unwrap()), "{answer}");
    }
}

/// Something that many wait for.
#[derive(Default)]
struct Signal {
    is_set: Mutex<bool>,
    changed: Condvar,
}

/// Sets a signal when it is dropped.
struct OnDrop<'s>(&'s Signal);

impl Signal {
    fn set(&self) {
        *self.is_set.lock().unwrap() = true;
        self.changed.notify_all();
    }

    fn wait(&self) {
        drop(self.changed.wait_while(self.is_set.lock().unwrap(), |is_set| !*is_set).unwrap());
    }

    fn on_drop(&self) -> OnDrop<'_> {
        OnDrop(self)
    }
}

impl Drop for OnDrop<'_> {
    fn drop(&mut self) {
        self.0.set();
    }
}
