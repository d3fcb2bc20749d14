//! gRPC as its clients speak it: what they get, what they are refused, and what becomes of those that leave.

use modalkit_tests::{Host, KEY, OPERATOR, Setup, python_tool, wait_until};

use super::super::calls::{self, Calls, three_models, triton};

/// Streams whose callers vanish.
const STREAMS: usize = 1000;

fn scenario(host: &Host, name: &str, arguments: &[&str]) {
    calls::scenario(python_tool("python3"), "grpc_calls.py", host, name, arguments);
}

#[test]
fn each_of_tritons_clients_gets_what_predict_sync_gives() {
    let host = three_models();
    let calls = Calls::of(&host);
    for client in ["http", "http.aio", "grpc", "grpc.aio", "stream"] {
        calls.assert_same(&triton(&host, client, &calls.calls));
    }
    let counted = |endpoint: &str| {
        let labels = format!("endpoint=\"{endpoint}\",model=\"digits\",status=\"200\"");
        host.metric(&format!("modalkit_requests_total{{{labels}}}"))
    };
    for endpoint in [
        "/v2/models/{name}/infer",
        "/inference.GRPCInferenceService/ModelInfer",
        "/inference.GRPCInferenceService/ModelStreamInfer",
    ] {
        assert!(counted(endpoint) > 12.5, "{endpoint}");
    }
}

#[test]
fn reflection_tells_of_the_messages_that_tritons_clients_are_made_of() {
    let host = Setup::new().plugin("echo").ready();
    scenario(&host, "descriptors", &[]);
    scenario(&host, "healthy", &[]);
}

#[test]
fn errors_have_their_codes_and_tensors_come_back_as_they_were() {
    let host = Setup::new()
        .plugin("echo")
        .plugin("tensors")
        .config("[server]\nbody_bytes_max = 20_000_000\nbytes_in_flight_max = 100_000_000\n")
        .ready();
    scenario(&host, "errors", &[]);
    wait_until("nothing is held", || host.metric("modalkit_bytes_in_flight").abs() < 0.5);
    let small = Setup::new().plugin("tensors").config("[server]\nbody_bytes_max = 1_000_000\n").ready();
    scenario(&small, "too_large", &[]);
}

#[test]
fn keys_are_metadata_and_management_is_for_those_who_manage() {
    let keys = format!(
        "[app_settings.auth_config.keys.caller]\napi_key = {KEY:?}\n\
         [app_settings.auth_config.keys.operator]\napi_key = {OPERATOR:?}\nmanagement = true\n"
    );
    let host = Setup::new().plugin("echo").config(&keys).ready();
    scenario(&host, "keys", &[KEY, OPERATOR]);
}

#[test]
fn the_requests_of_a_stream_are_calls_of_its_key() {
    let keys = format!("[app_settings.auth_config.keys.caller]\napi_key = {KEY:?}\nconcurrency_max = 1\n");
    let host = Setup::new().plugin("streams").config(&keys).ready();
    scenario(&host, "limited", &[KEY]);
}

#[test]
fn chunks_are_answers_of_their_own_and_a_stream_that_is_left_takes_them_along() {
    let host = Setup::new().plugin("streams").ready();
    scenario(&host, "decoupled", &[]);
    scenario(&host, "cancelled", &[]);
}

#[test]
fn a_deadline_takes_a_request_out_of_the_queue() {
    let host = Setup::new().plugin("puppet").ready();
    scenario(&host, "deadline", &[]);
    let skipped = |reason: &str| {
        host.metric(&format!("modalkit_jobs_skipped_total{{model=\"puppet\",reason=\"{reason}\"}}"))
    };
    // Neither has run: both left while the slow one did.
    assert!(skipped("cancelled") + skipped("expired") > 1.5);
    let batches = host.metric("modalkit_batch_size_items_count{model=\"puppet\"}");
    assert!((batches - 1.0).abs() < 0.5, "{batches} batches");
}

#[test]
fn streams_of_callers_that_vanish_end() {
    let config = "[app_settings.batch_config]\nmax_batch_size = 64\n[app_settings.deployment_config]\nallow_concurrent_inputs_handler = 2000\n";
    let host = Setup::new().plugin("streams").config(config).ready();
    scenario(&host, "vanish", &[&STREAMS.to_string()]);
    wait_until("no stream is left", || host.metric("modalkit_streams{model=\"streams\"}").abs() < 0.5);
    wait_until("no request is in flight", || host.metric("modalkit_requests_in_flight").abs() < 0.5);
    let ended = host.metric("modalkit_streams_ended_total{model=\"streams\",reason=\"left\"}");
    assert!(ended > 0.5, "{ended} streams were left");
    // And it serves.
    let body = serde_json::json!({"id": 1, "chunks": 1});
    wait_until("it answers", || host.post("/predict_sync?model_name=streams", &body).0 == 200);
}
