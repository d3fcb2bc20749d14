//! OpenAI's client: what it gets, what it is refused, what it tries again, and what becomes of calls that it leaves.

use modalkit_tests::{Host, KEY, OPERATOR, Setup, client_python, wait_until};

use super::super::calls;

const MODELS: &str = "
[app_settings.batch_config]
max_batch_size = 8
wait_ms = 2
[model_settings.model_entries.embed]
plugin = \"tasks\"
task = \"embedding\"
[model_settings.model_entries.complete]
plugin = \"tasks\"
task = \"completion\"
[model_settings.model_entries.talk]
plugin = \"tasks\"
task = \"chat\"
[model_settings.model_entries.plain]
plugin = \"tasks\"
";

fn host(config: &str) -> Host {
    Setup::new().plugin("tasks").config(MODELS).config(config).ready()
}

fn scenario(host: &Host, name: &str, arguments: &[&str]) {
    calls::scenario(client_python("openapi"), "openai_calls.py", host, name, arguments);
}

#[test]
fn its_client_embeds_completes_and_talks() {
    let host = host("");
    for name in ["models", "embeddings", "completions", "chats"] {
        scenario(&host, name, &[]);
    }
    for (model, endpoint) in
        [("embed", "/v1/embeddings"), ("complete", "/v1/completions"), ("talk", "/v1/chat/completions")]
    {
        let labels = format!("endpoint=\"{endpoint}\",model=\"{model}\",status=\"200\"");
        assert!(host.metric(&format!("modalkit_requests_total{{{labels}}}")) > 2.5, "{endpoint}");
    }
}

#[test]
fn its_client_leaves_and_its_texts_end() {
    let host = host("");
    scenario(&host, "cancels", &[]);
    let left = "modalkit_streams_ended_total{model=\"talk\",reason=\"left\"}";
    wait_until("the stream has ended", || host.metric(left) > 0.5);
    wait_until("nothing runs", || host.metric("modalkit_requests_in_flight") < 0.5);
}

#[test]
fn errors_are_what_its_client_knows() {
    scenario(&host(""), "errors", &[]);
}

#[test]
fn its_client_tries_again_what_may_pass() {
    let keys = format!(
        "[app_settings.auth_config.keys.caller]\napi_key = {KEY:?}\n\
         [app_settings.auth_config.keys.limited]\napi_key = {OPERATOR:?}\nrequests_per_second = 1\n"
    );
    let host = host(&keys);
    scenario(&host, "retries", &[KEY, OPERATOR]);
    // One that may pass was tried twice, and one that can't pass once.
    let failed = "modalkit_requests_total{endpoint=\"/v1/completions\",model=\"complete\",status=\"500\"}";
    assert!((host.metric(failed) - 2.0).abs() < 0.5, "{}", host.metric(failed));
}
