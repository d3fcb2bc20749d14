//! Tools that know nothing of a host but its document: one that holds it against the specification, one that asks everything that it allows and much that it
//! doesn't, and one that makes a client of it.

use std::{
    fs,
    io::Write,
    path::Path,
    process::{Command, Output, Stdio},
};

use modalkit_tests::{Host, OPERATOR, Setup, client_python, workspace};
use serde_json::Value;

use crate::tensors::digits_and_similarity;

/// Cases of each operation; more where somebody wants more: `MODALKIT_TEST_CASES=130` are some 10,000 together.
const CASES: &str = "6";

fn tool(name: &str) -> Command {
    Command::new(client_python("openapi").with_file_name(name))
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn save(host: &Host, folder: &Path, headers: &[(&str, &str)]) -> String {
    let file = folder.join("openapi.json");
    fs::write(&file, host.get_with("/openapi.json", headers).1.to_string()).unwrap();
    file.display().to_string()
}

#[test]
fn it_is_valid_and_a_client_made_of_it_calls_models() {
    let host = digits_and_similarity(Setup::new().plugin("echo").plugin("odd_schema"));
    let folder = tempfile::tempdir().unwrap();
    let file = save(&host, folder.path(), &[]);
    let valid = tool("openapi-spec-validator").arg(&file).output().unwrap();
    assert!(valid.status.success(), "{}", said(&valid));

    let generated = folder.path().join("generated");
    let made = tool("openapi-python-client")
        .args(["generate", "--meta", "none", "--path", &file, "--output-path"])
        .arg(&generated)
        .output()
        .unwrap();
    assert!(made.status.success() && generated.is_dir(), "{}", said(&made));
    // What it can't read it leaves out, with a warning.
    assert!(!said(&made).contains("Unable to"), "{}", said(&made));
    let cases = fs::read(workspace().join("plugins/onnx/model/digits_test.json")).unwrap();
    let cases: Value = serde_json::from_slice(&cases).unwrap();
    let pixels = &cases["cases"][0]["pixels"];
    let mut client = Command::new(client_python("openapi"))
        .arg(workspace().join("tests/e2e/protocols/openapi_client.py"))
        .arg(host.address.to_string())
        .arg(folder.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    client.stdin.take().unwrap().write_all(pixels.to_string().as_bytes()).unwrap();
    let asked = client.wait_with_output().unwrap();
    assert!(asked.status.success(), "{}", said(&asked));
    let got: Value = serde_json::from_slice(&asked.stdout).unwrap();
    assert_eq!(got["echo"]["translated_text"], "HELLO");
    let digit = host.post("/predict_sync?model_name=digits", &serde_json::json!({ "pixels": pixels })).1;
    assert_eq!(got["digits"]["label"], digit["label"]);
    assert_eq!(got["wrong"]["detail"][0]["loc"], serde_json::json!(["body", "text"]));
    assert_eq!(got["health"]["status"], "ok");
}

#[test]
fn nothing_that_it_allows_or_forbids_is_answered_otherwise() {
    let keys =
        format!("[app_settings.auth_config.keys.operator]\napi_key = {OPERATOR:?}\nmanagement = true\n");
    let tasks = "[model_settings.model_entries.echo]\n\
                 [model_settings.model_entries.embed]\nplugin = \"tasks\"\ntask = \"embedding\"\n\
                 [model_settings.model_entries.talk]\nplugin = \"tasks\"\ntask = \"chat\"\n";
    let setup = Setup::new().plugin("echo").plugin("tasks").config(&keys).config(tasks);
    let host = setup.ready();
    let folder = tempfile::tempdir().unwrap();
    let file = save(&host, folder.path(), &[("x-api-key", OPERATOR)]);
    let cases = std::env::var("MODALKIT_TEST_CASES").unwrap_or_else(|_| CASES.to_owned());
    let configuration = workspace().join("tests/e2e/protocols/schemathesis.toml");
    let asked = tool("schemathesis")
        .arg("--config-file")
        .arg(configuration)
        .args(["run", &file, "--url", &format!("http://{}", host.address)])
        .args(["--continue-on-failure", "--workers", "2", "--max-examples", &cases])
        .env("MODALKIT_KEY", OPERATOR)
        .current_dir(folder.path())
        .output()
        .unwrap();
    let report = said(&asked);
    assert!(asked.status.success(), "{report}");
    assert!(report.contains("generated,"), "{report}");
    assert_eq!(host.get("/health").1["status"], "ok");
    for endpoint in [
        "/predict_sync",
        "/predict_batch",
        "/v2/models/{name}/infer",
        "/v1/embeddings",
        "/v1/chat/completions",
    ] {
        let answered = |model: &str| {
            let labels = format!("endpoint=\"{endpoint}\",model=\"{model}\",status=\"200\"");
            host.metric(&format!("modalkit_requests_total{{{labels}}}"))
        };
        assert!(["echo", "embed", "talk"].into_iter().map(answered).sum::<f64>() > 0.5, "{endpoint}");
    }
}
