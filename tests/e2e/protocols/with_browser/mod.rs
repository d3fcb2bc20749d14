//! The page at `/docs`, as a browser shows it: it loads, asks nobody but its host, sends a digit and shows the answer.

use std::{
    fs,
    io::Write,
    process::{Command, Stdio},
};

use modalkit_tests::{KEY, Setup, python_tool, workspace};
use serde_json::{Value, json};

use crate::tensors::digits_and_similarity;

/// Where the documentation has what the page looks like; `MODALKIT_UPDATE=1` writes it anew.
const SCREENSHOT: &str = "docs/images/docs-page.png";

#[test]
fn the_page_of_the_api_sends_a_digit_and_shows_its_label() {
    let keys = format!("[app_settings.auth_config]\napi_key = {KEY:?}\n");
    let host = digits_and_similarity(Setup::new().plugin("echo").config(&keys));
    let cases = fs::read(workspace().join("plugins/onnx/model/digits_test.json")).unwrap();
    let cases: Value = serde_json::from_slice(&cases).unwrap();
    let pixels = &cases["cases"][0]["pixels"];
    let folder = tempfile::tempdir().unwrap();
    let screenshot = match std::env::var_os("MODALKIT_UPDATE") {
        Some(_) => workspace().join(SCREENSHOT),
        None => folder.path().join("page.png"),
    };
    let mut browser = Command::new(python_tool("node"))
        .arg(workspace().join("tests/e2e/protocols/docs_page.mjs"))
        .arg("/usr/bin/chromium")
        .arg(workspace().join("target/node"))
        .args([&*host.address.to_string(), KEY])
        .arg(&screenshot)
        // Its profile and its cache go with the folder.
        .env("HOME", folder.path())
        .env("TMPDIR", folder.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    browser.stdin.take().unwrap().write_all(pixels.to_string().as_bytes()).unwrap();
    let output = browser.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let saw: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(saw["elsewhere"], json!([]), "it asks its host alone");
    assert_eq!(saw["errors"], json!([]));
    assert_eq!(saw["sent"], 200);
    let asked = json!({ "pixels": pixels });
    let digit = host.post_with("/predict_sync?model_name=digits", &asked, &[("x-api-key", KEY)]).1;
    let label = format!("\"label\": {}", digit["label"]);
    assert!(saw["shown"].as_str().unwrap().contains(&label), "{saw}");
    assert!(fs::metadata(&screenshot).unwrap().len() > 10_000);
}

#[test]
fn what_it_is_made_of_is_the_package_of_swagger_ui() {
    let folder = workspace().join("host/src/ui/swagger_ui");
    for file in ["swagger-ui-bundle.js", "swagger-ui.css"] {
        let packed = fs::read(folder.join(format!("{file}.gz"))).unwrap();
        let mut plain = Vec::new();
        std::io::Read::read_to_end(&mut flate2::read::GzDecoder::new(&*packed), &mut plain).unwrap();
        let package = workspace().join("target/node/node_modules/swagger-ui-dist").join(file);
        assert!(plain == fs::read(package).unwrap(), "{file} isn't that of the package");
    }
}
