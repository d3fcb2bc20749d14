//! Who gets which GPU, and what happens when one fails: real hosts and a real pipeline over a library that stands in for the CUDA
//! driver, as no machine needs to have one.

use std::{
    fs,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use modalkit_tests::{
    Host, built,
    gpus::Gpus,
    load::{Load, Requests},
    wait_until,
};
use serde_json::{Value, json};

const A100: (&str, u64) = ("NVIDIA A100-SXM4-80GB", 81_920);
const H100: (&str, u64) = ("NVIDIA H100 80GB HBM3", 81_559);
const L4: (&str, u64) = ("NVIDIA L4", 23_034);

/// How a host ends that lost a device.
const DEVICE_LOST: i32 = 75;

/// A model of the fixture pipeline `gpu`: its name, and its keys.
fn entry(name: &str, deployment: &str, keys: &str) -> String {
    format!(
        "[model_settings.model_entries.{name}]\nplugin = \"gpu\"\n{keys}\n[model_settings.model_entries.{name}.deployment_config]\n{deployment}\n"
    )
}

fn ask(host: &Host, model: &str) -> (u16, Value) {
    host.post(&format!("/predict_sync?model_name={model}"), &json!({"text": "a"}))
}

fn devices_of(host: &Host, model: &str) -> Value {
    let (status, answer) = ask(host, model);
    assert_eq!((status, &answer["text"]), (200, &json!("a")), "{answer}");
    answer["devices"].clone()
}

fn reason(host: &Host, model: &str) -> String {
    let told = || host.model(model)["reason"].as_str().map(str::to_owned);
    wait_until("the model says why it doesn't serve", || told().is_some());
    told().unwrap()
}

fn holders(host: &Host, device: usize) -> Vec<String> {
    let standing = host.get("/devices").1;
    let holders = standing["devices"][device]["holders"].as_array().unwrap().clone();
    holders
        .iter()
        .map(|holder| format!("{}.{}", holder["model"].as_str().unwrap(), holder["generation"]))
        .collect()
}

#[test]
fn two_models_have_a_device_each_and_everybody_can_see_it() {
    let gpus = Gpus::new(&[A100, H100]);
    let config = entry("left", "gpu = \"H100\"", "keeps_mb = 1559") + &entry("right", "gpu = \"any\"", "");
    let host = gpus.setup().plugin("gpu").config(&config).ready();
    assert_eq!(devices_of(&host, "left"), json!([1]));
    assert_eq!(devices_of(&host, "right"), json!([0]));
    let devices = host.get("/devices").1;
    let h100 = &devices["devices"][1];
    assert_eq!(h100["name"], "NVIDIA H100 80GB HBM3");
    assert_eq!(h100["uuid"], "GPU-00000000-0000-0000-0000-000000000001");
    assert_eq!((&h100["compute_capability"], &h100["pci_address"]), (&json!("9.0"), &json!("0000:02:00.0")));
    assert_eq!(h100["memory_bytes"], 81_559u64 << 20);
    assert_eq!(
        (holders(&host, 0), holders(&host, 1)),
        (vec!["right.1".to_owned()], vec!["left.1".to_owned()])
    );
    // Looked at now and then.
    wait_until("what the pipeline took is seen", || {
        host.get("/devices").1["devices"][1]["memory_free_bytes"] == 80_000u64 << 20
    });
    let of = |metric: &str| host.metric(&format!("{metric}{{device=\"1\",name=\"NVIDIA H100 80GB HBM3\"}}"));
    assert_eq!(of("modalkit_device_memory_bytes") as u64, 81_559 << 20);
    assert_eq!(of("modalkit_device_memory_free_bytes") as u64, 80_000 << 20);
    assert_eq!(of("modalkit_device_memory_leased_bytes") as u64, 81_559 << 20);
    assert_eq!((of("modalkit_device_utilization_percent"), of("modalkit_device_holders")), (37.0, 1.0));
    assert_eq!(of("modalkit_device_lost"), 0.0);
    let shown = Command::new(built().join("modalkit"))
        .args(["devices", "--socket"])
        .arg(host.socket.as_ref().unwrap())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let shown = String::from_utf8(shown.stdout).unwrap();
    for part in ["NVIDIA A100-SXM4-80GB", "81559 MiB", "80000 MiB", "37 %", "left.1", "right.1"] {
        assert!(shown.contains(part), "{part:?} is not in {shown}");
    }
}

#[test]
fn replicas_share_a_device_while_their_budgets_fit() {
    let gpus = Gpus::new(&[L4]);
    let third = |memory: u64| format!("gpu = \"L4\"\ngpu_memory_mb = {memory}\nmin_replicas = 2");
    let config = entry("pair", &third(8000), "")
        + &entry("single", "gpu = [\"A100\", \"L4\"]\ngpu_memory_mb = 7034", "");
    let mut host = gpus.setup().plugin("gpu").config(&config).ready();
    wait_until("all three are there", || holders(&host, 0).len() == 3);
    let (status, answer) = ask(&host, "pair");
    assert_eq!((status, &answer["budget_bytes"]), (200, &json!(8000u64 << 20)), "{answer}");
    assert_eq!(host.get("/devices").1["devices"][0]["leased_mb"], 23_034);
    // One more has no room, until another leaves it.
    host.configure(&(config.clone() + &entry("fourth", "gpu = \"any\"\ngpu_memory_mb = 7000", "")));
    assert_eq!(host.post("/config/reload", &json!(null)).0, 200);
    let why = reason(&host, "fourth");
    assert!(why.contains("any with 7000 MiB") && why.contains("replica 1 of single"), "{why}");
    assert_eq!(host.get("/readyz").0, 503);
    let config =
        entry("pair", &third(8000), "") + &entry("fourth", "gpu = \"any\"\ngpu_memory_mb = 7000", "");
    host.configure(&config);
    assert_eq!(host.post("/config/reload", &json!(null)).0, 200);
    wait_until("the fourth has its place", || ask(&host, "fourth").0 == 200);
    wait_until("the host is ready", || host.get("/readyz").0 == 200);
}

#[test]
fn preferences_are_taken_in_their_order_and_two_devices_may_be_asked_for() {
    let gpus = Gpus::new(&[L4, A100, A100]);
    let config =
        entry("both", "gpu = [\"H100:2\", \"A100:2\"]", "") + &entry("other", "gpu = [\"H100\", \"L4\"]", "");
    let host = gpus.setup().plugin("gpu").config(&config).ready();
    assert_eq!(devices_of(&host, "both"), json!([1, 2]));
    assert_eq!(devices_of(&host, "other"), json!([0]));
}

#[test]
fn a_device_that_is_not_here_is_said_and_other_models_serve() {
    let gpus = Gpus::new(&[L4]);
    let config = entry("big", "gpu = [\"H100:2\", \"A100\"]", "") + "[model_settings.model_entries.echo]\n";
    let host = gpus.setup().plugin("gpu").plugin("echo").config(&config).start();
    let why = reason(&host, "big");
    for part in ["H100:2 or A100", "deployment_config.gpu", "0 (NVIDIA L4, 23034 MiB)"] {
        assert!(why.contains(part), "{part:?} is not in {why}");
    }
    wait_until("echo serves", || host.post("/predict_sync?model_name=echo", &json!({"text": "a"})).0 == 200);
    let (status, ready) = host.get("/readyz");
    assert_eq!(status, 503);
    assert!(ready["not_ready"]["big"]["reason"].as_str().unwrap().contains("H100:2"), "{ready}");
    assert!(ready["not_ready"]["echo"].is_null(), "{ready}");
    assert_eq!(ask(&host, "big").0, 503);
    wait_until("the log names it", || {
        host.log().iter().any(|line| line["error"].as_str().is_some_and(|error| error.contains("H100:2")))
    });
}

#[test]
fn without_a_driver_a_model_that_wants_one_is_told_so() {
    let gpus = Gpus::no_driver();
    let host = gpus.setup().plugin("gpu").config(&entry("wants", "gpu = \"any\"", "")).start();
    let why = reason(&host, "wants");
    assert!(why.contains("no CUDA driver") && why.contains("gpu = []"), "{why}");
    assert_eq!(host.get("/devices").1["devices"], json!([]));
}

#[test]
fn out_of_memory_at_load_leaves_the_device_to_others() {
    let gpus = Gpus::new(&[L4]);
    let host =
        gpus.setup().plugin("gpu").config(&entry("greedy", "gpu = \"L4\"", "keeps_mb = 23035")).start();
    let why = reason(&host, "greedy");
    assert!(why.contains("CUDA_ERROR_OUT_OF_MEMORY"), "{why}");
    wait_until("the lease is back", || holders(&host, 0).is_empty());
    assert!(host.get("/devices").1["devices"][0]["lost"].is_null());
    assert_eq!(ask(&host, "greedy").0, 503);
}

#[test]
fn out_of_memory_fails_its_batch_only() {
    let gpus = Gpus::new(&[L4]);
    let host = gpus.setup().plugin("gpu").config(&entry("one", "gpu = \"L4\"", "keeps_mb = 1000")).ready();
    let allocate = |mb: u64| host.post("/predict_sync", &json!({"text": "a", "do": "allocate", "mb": mb}));
    assert_eq!(allocate(20_000).0, 200);
    let (status, answer) = allocate(23_000);
    assert_eq!(status, 500, "{answer}");
    assert!(answer["detail"].as_str().unwrap().contains("CUDA_ERROR_OUT_OF_MEMORY"), "{answer}");
    assert_eq!(allocate(20_000).0, 200, "what failed gave back what it had");
    gpus.script(&json!({"allocations_fail": [0]}));
    assert_eq!(ask(&host, "one").0, 500);
    gpus.script(&json!({}));
    assert_eq!(ask(&host, "one").0, 200);
    assert_eq!(host.get("/readyz").0, 200);
}

const ASK: Requests = Requests {
    path: "/predict_sync",
    body: r#"{"text": "under way"}"#,
    statuses: &[200],
    check: |answer| if answer["text"] == "under way" { Ok(0) } else { Err(answer.to_string()) },
};

/// One model on the machine's only device, with what a reload does where none is free.
fn alone(gpus: &Gpus, policy: &str, keys: &str) -> Host {
    let deployment = format!("gpu = \"any\"\nreload_gpu = {policy:?}\nprobation_seconds = 0");
    gpus.setup().plugin("gpu").config(&entry("one", &deployment, keys)).ready()
}

#[test]
fn a_new_generation_shares_the_device_where_none_is_free_and_no_request_fails() {
    let gpus = Gpus::new(&[L4]);
    let host = alone(&gpus, "share", "keeps_mb = 10000");
    let load = Load::start(host.address, 4, ASK);
    for _ in 0..3 {
        let (status, outcome) = host.post("/models/one/reload", &json!(null));
        assert_eq!((status, &outcome["outcome"]), (200, &json!("swapped")), "{outcome}");
    }
    load.stop().assert_faultless();
    wait_until("the old ones have left", || holders(&host, 0) == ["one.4"]);
}

#[test]
fn a_model_with_fewer_devices_than_replicas_serves_and_reloads() {
    let gpus = Gpus::new(&[L4]);
    let deployment = "gpu = \"any\"\nmin_replicas = 2\nprobation_seconds = 0";
    let host = gpus.setup().plugin("gpu").config(&entry("one", deployment, "")).ready();
    let line = host.log_line("a replica waits for a device");
    assert!(line["reason"].as_str().unwrap().contains("replica 1 of one"), "{line}");
    let (status, outcome) = host.post("/models/one/reload", &json!(null));
    assert_eq!((status, &outcome["outcome"]), (200, &json!("swapped")), "{outcome}");
    wait_until("the old one has left", || holders(&host, 0) == ["one.2"]);
    let said = host.log().iter().filter(|line| line["message"] == "a replica waits for a device").count();
    assert!(said <= 4, "it is said once by each generation and not all the time: {said}");
    assert_eq!(ask(&host, "one").0, 200);
}

#[test]
fn a_new_generation_that_has_no_room_beside_the_old_one_is_refused_and_the_old_one_serves() {
    let gpus = Gpus::new(&[L4]);
    let host = alone(&gpus, "share", "keeps_mb = 20000");
    let (status, outcome) = host.post("/models/one/reload", &json!(null));
    assert_eq!((status, &outcome["outcome"]), (409, &json!("refused")), "{outcome}");
    assert!(outcome["reason"].as_str().unwrap().contains("CUDA_ERROR_OUT_OF_MEMORY"), "{outcome}");
    assert_eq!(ask(&host, "one").0, 200);
    wait_until("one holds it", || holders(&host, 0) == ["one.1"]);
}

#[test]
fn a_free_device_is_taken_before_one_is_shared() {
    let gpus = Gpus::new(&[L4, L4]);
    let host = alone(&gpus, "share", "keeps_mb = 20000");
    let (status, outcome) = host.post("/models/one/reload", &json!(null));
    assert_eq!((status, &outcome["outcome"]), (200, &json!("swapped")), "{outcome}");
    assert_eq!(devices_of(&host, "one"), json!([1]));
    wait_until("the first is free", || holders(&host, 0).is_empty());
}

#[test]
fn a_new_generation_waits_for_a_device_while_the_old_one_serves() {
    let gpus = Gpus::new(&[L4, L4]);
    let deployment = "gpu = \"any\"\nreload_gpu = \"wait\"\nprobation_seconds = 0";
    let one = entry("one", deployment, "");
    let mut host =
        gpus.setup().plugin("gpu").config(&(one.clone() + &entry("two", "gpu = \"any\"", ""))).ready();
    let at_first = devices_of(&host, "one");
    thread::scope(|scope| {
        let asked = scope.spawn(|| host.post("/models/one/reload", &json!(null)));
        wait_until("it waits", || host.report("one")["reload"] == "waits_for_device");
        assert_eq!(devices_of(&host, "one"), at_first);
        assert!(!asked.is_finished());
        // Another model goes, and its device is taken.
        let file = host.folder().join("modalkit.toml");
        let text = fs::read_to_string(&file).unwrap();
        let without = text.replace(&entry("two", "gpu = \"any\"", ""), "");
        assert_ne!(text, without);
        fs::write(file, without).unwrap();
        assert_eq!(host.post("/config/reload", &json!(null)).0, 200);
        let (status, outcome) = asked.join().unwrap();
        assert_eq!((status, &outcome["outcome"]), (200, &json!("swapped")), "{outcome}");
    });
    assert_ne!(devices_of(&host, "one"), at_first);
    host.configure(&one);
}

#[test]
fn the_old_generation_may_stop_first_and_requests_wait() {
    let gpus = Gpus::new(&[L4]);
    let host = alone(&gpus, "stop_first", "keeps_mb = 20000");
    let load = Load::start(host.address, 4, ASK);
    for _ in 0..3 {
        let (status, outcome) = host.post("/models/one/reload", &json!(null));
        assert_eq!((status, &outcome["outcome"]), (200, &json!("swapped")), "{outcome}");
    }
    load.stop().assert_faultless();
    assert_eq!(holders(&host, 0), ["one.4"]);
}

#[test]
fn what_stopped_for_a_generation_that_fails_is_loaded_again() {
    let gpus = Gpus::new(&[L4]);
    let mut host = alone(&gpus, "stop_first", "keeps_mb = 20000");
    let load = Load::start(host.address, 4, ASK);
    let deployment = "gpu = \"any\"\nreload_gpu = \"stop_first\"\nprobation_seconds = 0";
    host.configure(&entry("one", deployment, "keeps_mb = 30000"));
    assert_eq!(host.post("/config/reload", &json!(null)).0, 200);
    wait_until("the old one is back", || {
        let history = host.report("one")["history"].clone();
        history[0]["outcome"] == "rolled_back" && history[0]["cause"] == "recovery"
    });
    load.stop().assert_faultless();
    let history = host.report("one")["history"].clone();
    assert_eq!(
        (&history[1]["outcome"], &history[0]["generation"]),
        (&json!("refused"), &json!(1)),
        "{history:#}"
    );
    assert!(history[1]["reason"].as_str().unwrap().contains("CUDA_ERROR_OUT_OF_MEMORY"), "{history:#}");
}

/// A model on a device, and one that needs none.
fn two_kinds(gpus: &Gpus) -> Host {
    let config = entry("one", "gpu = \"any\"", "") + "[model_settings.model_entries.puppet]\n";
    gpus.setup().plugin("gpu").plugin("puppet").config(&config).ready()
}

fn ends_with(mut host: Host, code: i32) -> Host {
    let status = host.wait();
    assert_eq!(status.code(), Some(code), "{status:?}");
    host
}

#[test]
fn a_device_that_is_lost_drains_the_host_and_nothing_that_was_accepted_is_lost() {
    let gpus = Gpus::new(&[L4, L4]);
    let config = "[app_settings.deployment_config]\nretries = 2\n".to_owned()
        + &entry("one", "gpu = \"any\"\nbatches_in_flight = 2", "")
        + "[model_settings.model_entries.echo]\n";
    let mut host = gpus.setup().plugin("gpu").plugin("echo").config(&config).ready();
    let (goes_on, breaks) = (host.folder().join("goes_on"), host.folder().join("breaks"));
    let envelope = |message: Value| json!({"message": message, "success_queue": "", "failure_queue": ""});
    // One lane has a job that goes on, the other one what will break the device, and jobs wait behind both.
    let in_flight = host.job("one", &envelope(json!({"text": "in flight", "after": goes_on})));
    wait_until("it runs", || host.get(&format!("/jobs/{in_flight}")).1["state"] == "running");
    let faults = json!({"text": "a", "do": "illegal address", "after": breaks});
    let waiting = thread::scope(|scope| {
        let faulting = scope.spawn(|| host.post("/predict_sync?model_name=one", &faults));
        let queued = || host.metric("modalkit_queued_jobs{model=\"one\"}");
        let batched = || host.metric("modalkit_batch_size_items_sum{model=\"one\"}");
        wait_until("both lanes are taken", || batched() == 2.0);
        let waiting: Vec<String> =
            (0..3).map(|_| host.job("one", &envelope(json!({"text": "waits"})))).collect();
        wait_until("they wait", || queued() == 3.0);
        fs::write(&breaks, "now").unwrap();
        let (status, answer) = faulting.join().unwrap();
        assert_eq!(status, 503, "{answer}");
        waiting
    });
    // What is in flight holds the host up, and meanwhile nobody is sent here.
    wait_until("it isn't ready", || host.get("/readyz").0 == 503);
    let ready = host.get("/readyz").1;
    assert_eq!(ready["device_lost"]["ordinal"], 0, "{ready}");
    let why = ready["device_lost"]["why"].as_str().unwrap();
    assert!(why.contains("CUDA_ERROR_ILLEGAL_ADDRESS (700)"), "{ready}");
    assert_eq!(host.post("/predict_sync?model_name=echo", &json!({"text": "a"})).0, 503);
    fs::write(&goes_on, "now").unwrap();
    let status = host.wait();
    assert_eq!(status.code(), Some(DEVICE_LOST), "{status:?}");
    host.start_again();
    let of = |job: &str| {
        let job = host.ended(job);
        (job["state"].clone(), job["result"]["text"].clone(), job["attempts"].clone())
    };
    assert_eq!(of(&in_flight), (json!("succeeded"), json!("in flight"), json!(2)));
    for job in &waiting {
        assert_eq!(of(job), (json!("succeeded"), json!("waits"), json!(1)), "it had not begun");
    }
}

#[test]
fn what_a_pipeline_makes_of_a_lost_device_doesnt_matter() {
    for how in ["illegal address in words", "illegal address swallowed", "illegal address unwrapped"] {
        let gpus = Gpus::new(&[L4]);
        let host = two_kinds(&gpus);
        let (status, answer) = host.post("/predict_sync?model_name=one", &json!({"text": "a", "do": how}));
        assert_eq!(status, 503, "{how}: {answer}");
        let host = ends_with(host, DEVICE_LOST);
        let line = host.logged("why", |line| line["why"].is_string() && line["device"] == 0);
        assert!(line["why"].as_str().unwrap().contains("ILLEGAL_ADDRESS"), "{how}: {line}");
    }
}

#[test]
fn a_context_that_breaks_between_batches_is_found_by_the_next() {
    let gpus = Gpus::new(&[L4]);
    let host = two_kinds(&gpus);
    assert_eq!(ask(&host, "one").0, 200);
    gpus.script(&json!({"broken": {"0": 719}}));
    assert_eq!(ask(&host, "one").0, 503);
    ends_with(host, DEVICE_LOST);
}

#[test]
fn words_that_a_caller_may_have_sent_bring_nothing_down() {
    let gpus = Gpus::new(&[L4]);
    // It has a device, and never touches it: the driver can't tell how it is.
    let deployment = "[app_settings.deployment_config]\ngpu = \"any\"\n";
    let host = gpus.setup().plugin("puppet").config(deployment).ready();
    let words = json!({"value": 1, "do": "panic in words of CUDA"});
    for _ in 0..3 {
        assert_eq!(host.post("/predict_sync", &words).0, 500);
    }
    assert_eq!(host.post("/predict_sync", &json!({"value": 1})).0, 200);
    assert_eq!(host.get("/readyz").0, 200);
}

#[test]
fn nothing_stops_for_a_device_that_it_doesnt_hold() {
    let gpus = Gpus::new(&[L4, A100]);
    let deployment = |gpu: &str| format!("gpu = {gpu:?}\nreload_gpu = \"stop_first\"\nprobation_seconds = 0");
    let other = entry("other", "gpu = \"A100\"", "");
    let config = entry("one", &deployment("L4"), "") + &other;
    let mut host = gpus.setup().plugin("gpu").config(&config).ready();
    host.configure(&(entry("one", &deployment("A100"), "") + &other));
    assert_eq!(host.post("/config/reload", &json!(null)).0, 200);
    wait_until("it waits", || host.report("one")["reload"] == "waits_for_device");
    assert_eq!(devices_of(&host, "one"), json!([0]), "it serves on");
    // Somebody who thinks again is heard.
    host.configure(&config);
    assert_eq!(host.post("/config/reload", &json!(null)).0, 200);
    wait_until("nothing is under way", || host.report("one")["reload"] == "idle");
    assert_eq!(devices_of(&host, "one"), json!([0]));
}

#[test]
fn a_share_that_cannot_be_is_refused_and_says_what_helps() {
    let gpus = Gpus::new(&[L4]);
    let config = |memory: &str| entry("one", &format!("gpu = \"any\"\n{memory}\nprobation_seconds = 0"), "");
    let mut host = gpus.setup().plugin("gpu").config(&config("")).ready();
    host.configure(&config("gpu_memory_mb = 1000"));
    assert_eq!(host.post("/config/reload", &json!(null)).0, 200);
    wait_until("it is refused", || host.report("one")["history"][0]["outcome"] == "refused");
    let reason = host.report("one")["history"][0]["reason"].clone();
    assert!(reason.as_str().unwrap().contains("stop_first"), "{reason}");
    assert_eq!(ask(&host, "one").0, 200);
}

#[test]
fn a_pipeline_that_only_says_so_brings_nothing_down() {
    let gpus = Gpus::new(&[L4]);
    let host = two_kinds(&gpus);
    let claims = json!({"text": "a", "do": "only claims"});
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_millis(300) {
        assert_eq!(host.post("/predict_sync?model_name=one", &claims).0, 500);
    }
    assert_eq!(ask(&host, "one").0, 200);
    assert_eq!(host.get("/readyz").0, 200);
    wait_until("the log says so", || {
        let says = |line: &Value| {
            line["message"].as_str().is_some_and(|text| text.contains("the driver says that it works"))
        };
        host.log().iter().any(says)
    });
}
