//! What operators see: metrics by their table, traces at a receiver, where a request's time went.

use std::{collections::BTreeSet, env, fs, thread};

use mock_collector::{MockServer, Protocol, ServerHandle};
use modalkit::insight::{metrics::Metrics, traces::Traces};
use modalkit_tests::{Host, KEY, SECRET_OF_COLLECTOR, Setup, assert_no_secret, workspace};
use serde_json::{Value, json};

const PREFACE: &str = "# Metrics

`GET /metrics` answers in Prometheus' text format, and so does `modalkit metrics`. Over the network it wants a key with
`management = true`, which Prometheus shows as `authorization: {credentials: KEY}` in its scrape configuration; over the management
socket (`curl --unix-socket`) none. Every name follows one grammar:

- `modalkit_` and lower-case words with underscores between them, the subject first: `modalkit_queue_wait_seconds`.
- A counter ends with `_total`. A histogram ends with its unit, `_seconds` or `_items`. A gauge is what it counts, in the plural, or
  a quantity with its unit, `_bytes`; one that is 0 or 1 names a state, such as `_ready`.
- Units are SI's base units: seconds and bytes, never milliseconds.
- Labels are bounded: `model` is a name in the configuration or in a volume, empty where a request named none that there is; `key`
  is the name of a key in the configuration; `endpoint` is one of this host's paths, `status` an HTTP status; `stage`, `reason` and
  `outcome` are words of this host. Nothing that a caller sends becomes a label.
- Series go with their model, when its last replica has left, and with their key. A model of the same name that comes later begins at 0.
  What is still counted for a model that is gone (an answer that was under way, a job that nobody serves) has the empty `model`.

A test holds this table against the program and against what a host answers; `MODALKIT_UPDATE=1 cargo test -p modalkit-tests --test
e2e metrics` writes it.

| name | kind | labels | what it says |
| --- | --- | --- | --- |
";

fn obeys_the_grammar(name: &str, kind: &str) -> bool {
    let words = name.strip_prefix("modalkit_").unwrap_or_default();
    let spelled = !words.is_empty() && words.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_');
    let end = name.rsplit('_').next().unwrap_or_default();
    spelled
        && match kind {
            "counter" => end == "total",
            "histogram" => ["seconds", "items"].contains(&end),
            "gauge" => end != "total" && !name.contains("millis"),
            _ => false,
        }
}

#[test]
fn the_table_of_metrics_is_true() {
    let metrics = Metrics::new(Traces::default());
    let mut table = PREFACE.to_owned();
    for metric in metrics.catalogue() {
        assert!(obeys_the_grammar(metric.name, metric.kind), "{metric:?}");
        let labels: Vec<String> = metric.labels.iter().map(|label| format!("`{label}`")).collect();
        table.push_str(&format!(
            "| `{}` | {} | {} | {} |\n",
            metric.name,
            metric.kind,
            labels.join(", "),
            metric.help
        ));
    }
    let file = workspace().join("docs/metrics.md");
    if env::var_os("MODALKIT_UPDATE").is_some() {
        fs::write(&file, &table).unwrap();
    }
    assert_eq!(fs::read_to_string(&file).unwrap(), table, "{}", file.display());

    let host = Setup::new().plugin("puppet").plugin("echo").ready();
    for body in [json!({}), json!({"do": "fail the batch"}), json!({"ms": "x"})] {
        let _ = host.post("/predict_sync?model_name=puppet", &body);
    }
    let _ = host.post("/models/echo/reload", &json!({}));
    let _ = host.post("/volumes/test/reload", &json!({}));
    let text = host.text("/metrics");
    let mut seen = 0;
    for line in text.lines().filter_map(|line| line.strip_prefix("# TYPE ")) {
        let (name, kind) = line.split_once(' ').unwrap();
        assert!(table.contains(&format!("| `{name}` | {kind} |")), "{line} is not in the table");
        seen += 1;
    }
    assert!(seen >= 20, "{seen} of {}", metrics.catalogue().len());
    for name in
        ["queue_wait_seconds", "batch_wait_seconds", "stage_seconds", "request_seconds", "batch_size_items"]
    {
        assert!(text.contains(&format!("modalkit_{name}_count")), "{name}");
    }
}

#[test]
fn nothing_that_a_caller_sends_becomes_a_label() {
    let host = Setup::new().plugin("echo").ready();
    let series = |host: &Host| {
        let text = host.text("/metrics");
        let names = text
            .lines()
            .filter(|line| !line.starts_with('#'))
            .map(|line| line.rsplit_once(' ').unwrap().0.to_owned());
        names.collect::<BTreeSet<_>>()
    };
    let strange = |host: &Host, number: usize| {
        let _ = host.post(&format!("/predict_sync?model_name=nobody{number}"), &json!({}));
        let _ = host.get(&format!("/nowhere{number}"));
        let _ = host.get(&format!("/models/nobody{number}"));
        let _ = host.get(&format!("/jobs/nobody{number}"));
        let headers = [("x-api-key", format!("key{number}")), ("x-request-id", format!("id{number}"))];
        let headers: Vec<(&str, &str)> =
            headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
        let _ = host.post_with("/predict_sync", &json!({"text": "a"}), &headers);
    };
    strange(&host, 0);
    // The first look counts itself.
    let _ = series(&host);
    let before = series(&host);
    (1..100).for_each(|number| strange(&host, number));
    let after = series(&host);
    assert_eq!(after.difference(&before).collect::<Vec<_>>(), Vec::<&String>::new());
}

/// A response's header, as JSON.
fn explained(host: &Host, path: &str, body: &Value, headers: &[(&str, &str)]) -> Value {
    let mut request = ureq::post(format!("http://{}{path}", host.address)).header("x-modalkit-explain", "1");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let response = request.send(body.to_string()).unwrap();
    let text = response.headers()["x-modalkit-explain"].to_str().unwrap().to_owned();
    serde_json::from_str(&text).unwrap()
}

#[test]
fn a_request_says_where_its_time_went() {
    let host = Setup::new()
        .plugin("puppet")
        .config("[app_settings.batch_config]\nmax_batch_size = 4\nwait_ms = 30\n")
        .config(&format!("[app_settings.auth_config.keys.one]\napi_key = {KEY:?}\nexplain = true\n"))
        .config("[app_settings.auth_config.keys.other]\napi_key = \"another\"\n")
        .ready();
    let key = [("x-api-key", KEY)];
    let told = explained(&host, "/predict_sync", &json!({"do": "sleep", "ms": 20}), &key);
    let batch = &told["batches"][0];
    assert_eq!(
        (&batch["closed"], &batch["size"], &batch["items"]),
        (&json!("waited"), &json!(1), &json!(1)),
        "{told}"
    );
    assert_eq!((&batch["replica"], &batch["generation"]), (&json!(1), &json!(1)), "{told}");
    let time = |value: &Value| value.as_f64().unwrap_or_else(|| panic!("{told}"));
    assert!(time(&batch["queue_ms"]) >= 29.0 && time(&batch["batch_wait_ms"]) >= 29.0, "{told}");
    assert!(time(&batch["predict_ms"]) >= 20.0, "{told}");
    let parts = ["preprocess_ms", "predict_ms", "postprocess_ms", "queue_ms"]
        .iter()
        .map(|part| time(&batch[*part]))
        .sum::<f64>();
    let whole = parts + time(&told["admission_ms"]) + time(&told["answer_ms"]);
    // What is left over lies between taking a batch and its first stage.
    assert!(whole <= time(&told["total_ms"]) + 0.01 && whole >= 49.0, "{whole} of {told}");

    let items: Vec<Value> = (0..6).map(|value| json!({"value": value})).collect();
    let told = explained(&host, "/predict_batch", &json!(items), &key);
    let sizes: Vec<&Value> = told["batches"].as_array().unwrap().iter().map(|batch| &batch["size"]).collect();
    assert_eq!(sizes, [4, 2], "{told}");
    assert_eq!(told["batches"][0]["closed"], "full");

    // Others may not ask; they are answered all the same.
    let told = explained(&host, "/predict_sync", &json!({}), &[("x-api-key", "another")]);
    assert!(told["denied"].as_str().unwrap().contains("explain = true"), "{told}");
}

/// A receiver of the OTLP protocol, with a runtime of its own.
struct Receiver {
    runtime: tokio::runtime::Runtime,
    server: Option<ServerHandle>,
}

/// One span as it came.
#[derive(Clone, Debug)]
struct Span {
    name: String,
    trace: Vec<u8>,
    id: Vec<u8>,
    parent: Vec<u8>,
    links: Vec<(Vec<u8>, Vec<u8>)>,
    text: String,
}

impl Receiver {
    fn start() -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let server = MockServer::builder().protocol(Protocol::HttpBinary).host([127, 0, 0, 1].into()).port(0);
        let server = runtime.block_on(server.start()).unwrap();
        Self { runtime, server: Some(server) }
    }

    fn config(&self, ratio: f64) -> String {
        let address = self.server.as_ref().unwrap().addr();
        format!(
            "[server.traces]\nendpoint = \"http://{address}\"\nsample_ratio = {ratio}\nheaders = {{ x-collector-key = {SECRET_OF_COLLECTOR:?} }}\n"
        )
    }

    fn spans(&self) -> Vec<Span> {
        let collector = self.server.as_ref().unwrap().collector();
        let collector = self.runtime.block_on(collector.read_owned());
        let spans = collector.spans().iter().map(|received| {
            let span = received.span();
            Span {
                name: span.name.clone(),
                trace: span.trace_id.clone(),
                id: span.span_id.clone(),
                parent: span.parent_span_id.clone(),
                links: span.links.iter().map(|link| (link.trace_id.clone(), link.span_id.clone())).collect(),
                text: format!("{span:?} {:?}", received.resource_attrs()),
            }
        });
        spans.collect()
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        if let Some(server) = self.server.take() {
            // It ends with its runtime in any case.
            let _ = self.runtime.block_on(server.shutdown());
        }
    }
}

#[test]
fn traces_reach_a_receiver_with_a_batch_that_links_its_jobs() {
    let receiver = Receiver::start();
    let mut host = Setup::new()
        .plugin("puppet")
        .config(&receiver.config(1.0))
        .config("[app_settings]\napp_prefix = \"traced\"\n[app_settings.batch_config]\nmax_batch_size = 2\nwait_ms = 10000\n")
        .ready();
    let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
    let parent = format!("00-{trace}-00f067aa0ba902b7-01");
    // Two callers, one of whom brings a trace: they fill one batch.
    thread::scope(|scope| {
        let other = scope.spawn(|| host.post("/predict_sync", &json!({})).0);
        let url = format!("http://{}/predict_sync", host.address);
        let response = ureq::post(url).header("traceparent", &parent).send("{}").unwrap();
        let out = response.headers()["traceparent"].to_str().unwrap();
        assert!(out.starts_with(&format!("00-{trace}-")) && !out.contains("00f067aa0ba902b7"), "{out}");
        assert_eq!(other.join().unwrap(), 200);
    });
    // The last spans are sent before the host ends.
    host.signal("TERM");
    assert_eq!(host.wait().code(), Some(0));
    let spans = receiver.spans();
    let named = |name: &str| spans.iter().filter(|span| span.name == name).cloned().collect::<Vec<_>>();
    let requests = named("/predict_sync");
    assert_eq!(requests.len(), 2, "{spans:#?}");
    let [batch] = &named("batch")[..] else { panic!("{spans:#?}") };
    for request in &requests {
        assert!(batch.links.contains(&(request.trace.clone(), request.id.clone())), "{spans:#?}");
        assert_eq!(request.links, [(batch.trace.clone(), batch.id.clone())]);
    }
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let brought: Vec<&Span> = requests.iter().filter(|span| hex(&span.trace) == trace).collect();
    assert!(brought.len() == 1 && hex(&brought[0].parent) == "00f067aa0ba902b7", "{requests:#?}");
    for stage in ["preprocess", "predict", "postprocess"] {
        let [span] = &named(stage)[..] else { panic!("{spans:#?}") };
        assert_eq!((&span.trace, &span.parent), (&batch.trace, &batch.id));
    }
    assert_eq!(named("queue").len(), 2);
    assert!(batch.text.contains("traced-dev"), "{}", batch.text);
    assert_no_secret(&format!("{spans:?}"));
}

#[test]
fn what_is_not_sampled_costs_and_shows_nothing_and_a_caller_may_decide() {
    let receiver = Receiver::start();
    let mut host = Setup::new().plugin("echo").config(&receiver.config(0.0)).ready();
    let ask = |host: &Host, flags: &str| {
        let parent = format!("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-{flags}");
        host.post_with("/predict_sync", &json!({"text": "a"}), &[("traceparent", &parent)]).0
    };
    for _ in 0..50 {
        assert_eq!(host.post("/predict_sync", &json!({"text": "a"})).0, 200);
        assert_eq!(ask(&host, "00"), 200);
    }
    assert_eq!(ask(&host, "01"), 200);
    // What is no traceparent is no reason to fail.
    for strange in ["", "00-zz", "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"] {
        assert_eq!(
            host.post_with("/predict_sync", &json!({"text": "a"}), &[("traceparent", strange)]).0,
            200
        );
    }
    host.signal("TERM");
    assert_eq!(host.wait().code(), Some(0));
    let requests = receiver.spans().into_iter().filter(|span| span.name == "/predict_sync").count();
    assert_eq!(requests, 1);
}

#[test]
fn a_collector_that_is_away_harms_nobody() {
    let config = "[server.traces]\nendpoint = \"http://127.0.0.1:1\"\nsample_ratio = 1.0\n";
    let mut host = Setup::new().plugin("echo").config(config).ready();
    for _ in 0..200 {
        assert_eq!(host.post("/predict_sync", &json!({"text": "a"})).0, 200);
    }
    let line = host.log_line("traces can't be exported");
    assert_eq!(line["endpoint"], "http://127.0.0.1:1/v1/traces");
    let error = line["error"].as_str().unwrap();
    assert!(error.contains("Connection refused"), "{error}");
    host.signal("TERM");
    assert_eq!(host.wait().code(), Some(0));
    let log = host.log();
    let told = |text: &str| log.iter().filter(|line| line.to_string().contains(text)).count();
    // The last ones have a line of their own.
    assert_eq!((told("traces can't be exported"), told("last spans"), told("export")), (1, 1, 2));
}
