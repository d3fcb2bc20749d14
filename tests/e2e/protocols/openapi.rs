//! The document that says what a host answers: it follows the models, and a plugin's fault in it is nobody else's.

use std::{collections::BTreeSet, io::Read};

use flate2::read::GzDecoder;
use modalkit_tests::{Host, KEY, Setup, install, library, wait_until};
use serde_json::{Value, json};

use super::calls::client;

fn document(host: &Host) -> Value {
    let (status, document) = host.get_with("/openapi.json", &[]);
    assert_eq!(status, 200);
    document
}

/// The schema of a model's answer, with the reference to it followed.
fn schema<'d>(document: &'d Value, name: &str) -> &'d Value {
    &document["components"]["schemas"][name]
}

#[test]
fn it_changes_with_a_reload_and_is_not_sent_twice() {
    let host = Setup::new().plugin("echo").ready();
    let first = document(&host);
    let path = &first["paths"]["/models/echo/predict"]["post"];
    assert_eq!(path["operationId"], "run_echo");
    let body = &path["requestBody"]["content"]["application/json"]["schema"];
    assert_eq!(*body, json!({"$ref": "#/components/schemas/echo.Input"}));
    assert_eq!(schema(&first, "echo.Input")["required"], json!(["text"]));
    assert_eq!(schema(&first, "echo.Answer")["properties"]["status"]["const"], "success");
    assert!(first["paths"]["/models/streams/predict"].is_null());

    let client = client().build().unwrap();
    let asked = || client.get(format!("http://{}/openapi.json", host.address));
    let tag = asked().send().unwrap().headers()["etag"].clone();
    let again = || asked().header("if-none-match", &tag).send().unwrap();
    assert_eq!(again().status(), 304);

    install(&library("streams"), &host.volume().join("libstreams.so"));
    wait_until("the model is described", || !document(&host)["paths"]["/models/streams/predict"].is_null());
    let changed = again();
    assert_eq!(changed.status(), 200);
    assert_ne!(changed.headers()["etag"], tag);
}

#[test]
fn a_schema_that_leads_nowhere_hurts_its_own_model_alone() {
    let host = Setup::new().plugin("odd_schema").plugin("echo").ready();
    wait_until("both are described", || {
        let document = document(&host);
        !schema(&document, "odd_schema.Input").is_null() && !schema(&document, "echo.Input").is_null()
    });
    let document = document(&host);
    let odd = schema(&document, "odd_schema.Input");
    assert!(odd["description"].as_str().unwrap().contains("elsewhere.test"), "{odd}");
    assert_eq!(odd.as_object().unwrap().len(), 1);
    assert!(!document.to_string().contains("\"$ref\":\"https:"), "{document}");
    assert_eq!(schema(&document, "odd_schema.Output")["required"], json!(["value"]));
    assert_eq!(schema(&document, "echo.Input")["required"], json!(["text"]));
    assert_eq!(host.post("/predict_sync?model_name=odd_schema", &json!({"value": 7})).1["value"], 7);
}

#[test]
fn odd_names_and_tasks_make_no_two_things_of_one_name() {
    let entry = |name: &str| format!("[model_settings.model_entries.{name:?}]\nplugin = \"echo\"\n");
    let names = ["sync", "batch", "a/b", "a b", "a.b", "A_B", "é", "..", "echo.Input", "{name}"];
    let entries: String = names.iter().map(|name| entry(name)).collect();
    let host = Setup::new().plugin("echo").config(&entries).ready();
    let document = document(&host);
    let mut ids = BTreeSet::new();
    let mut count = 0;
    for operation in
        document["paths"].as_object().unwrap().values().flat_map(|path| path.as_object().unwrap().values())
    {
        count += 1;
        assert!(ids.insert(operation["operationId"].as_str().unwrap().to_lowercase()), "{operation}");
    }
    assert!(count > 50, "{count}");
    for name in names.iter().filter(|name| **name != "..") {
        let path = format!("/models/{}/predict", utf8(name));
        assert!(document["paths"][&path].is_object(), "{path}");
        let answer = client()
            .build()
            .unwrap()
            .post(format!("http://{}{path}", host.address))
            .body(r#"{"text":"a"}"#)
            .send();
        assert_eq!(answer.unwrap().status(), 200, "{path}");
    }
    assert_eq!(
        document["components"]["schemas"]
            .as_object()
            .unwrap()
            .keys()
            .filter(|name| name.ends_with(".Answer"))
            .count(),
        names.len()
    );
}

/// As a path has it.
fn utf8(name: &str) -> String {
    let byte = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'-' | b'.' | b'_' => char::from(byte).to_string(),
        other => format!("%{other:02X}"),
    };
    name.bytes().map(byte).collect()
}

#[test]
fn what_callers_must_show_is_said_as_it_is() {
    let secure =
        "[app_settings.deployment_config]\nsecure = true\nsecrets = [\"modal-key\", \"modal-secret\"]\n";
    let host = Setup::new()
        .plugin("echo")
        .config(secure)
        .variable("modal-key", "mk-0a1b2c3d4e5f6071")
        .variable("modal-secret", "ms-0a1b2c3d4e5f6071")
        .ready();
    let shown = [("modal-key", "mk-0a1b2c3d4e5f6071"), ("modal-secret", "ms-0a1b2c3d4e5f6071")];
    let document = host.get_with("/openapi.json", &shown).1;
    let schemes = &document["components"]["securitySchemes"];
    assert_eq!(schemes["modal_key"]["name"], "modal-key");
    assert!(schemes["bearer"].is_null() && schemes["key"].is_null(), "{schemes}");
    let security = &document["paths"]["/predict_sync"]["post"]["security"];
    assert_eq!(*security, json!([{"modal_key": [], "modal_secret": []}]));
    let health = &document["paths"]["/health"]["get"]["security"];
    assert_eq!(*health, json!([{}, {"modal_key": [], "modal_secret": []}]));
}

#[test]
fn where_there_are_keys_it_wants_one_and_says_so() {
    let keys = format!("[app_settings.auth_config]\nauth_header = \"x-our-key\"\napi_key = {KEY:?}\n");
    let host = Setup::new().plugin("echo").config(&keys).ready();
    assert_eq!(host.get_with("/openapi.json", &[]).0, 401);
    let (_, document) = host.get_with("/openapi.json", &[("x-our-key", KEY)]);
    assert_eq!(document["components"]["securitySchemes"]["key"]["name"], "x-our-key");
    assert!(document["paths"]["/predict_sync"]["post"]["security"].is_array());
    assert!(document["paths"]["/livez"]["get"]["security"].is_null());
    // The page itself is everybody's: it asks for a key.
    assert!(host.text("/docs").contains("docs/docs.js"));
}

#[test]
fn the_page_and_its_files_go_out_as_they_are() {
    let host = Setup::new().plugin("echo").ready();
    let client = client().build().unwrap();
    let get = |path: &str| client.get(format!("http://{}{path}", host.address));
    let page = get("/docs").send().unwrap();
    let policy = page.headers()["content-security-policy"].to_str().unwrap().to_owned();
    assert!(policy.starts_with("default-src 'none'; script-src 'self'; style-src 'self'"), "{policy}");
    assert!(!policy.contains("unsafe"), "{policy}");
    let page = page.text().unwrap();
    assert!(!page.contains("http:") && !page.contains("https:"), "it asks nobody else");
    for file in ["docs.js", "docs.css", "icon.svg", "swagger-ui-bundle.js", "swagger-ui.css"] {
        assert!(page.contains(&format!("docs/{file}")), "{file}");
        let path = format!("/docs/{file}");
        let plain = get(&path).send().unwrap();
        assert_eq!(
            (plain.status().as_u16(), plain.headers().contains_key("content-encoding")),
            (200, false),
            "{file}"
        );
        let tag = plain.headers()["etag"].clone();
        let plain = plain.bytes().unwrap();
        let sent = get(&path).header("accept-encoding", "br, gzip;q=0.5").send().unwrap();
        let is_packed = sent.headers().get("content-encoding").is_some_and(|coding| coding == "gzip");
        assert_eq!(is_packed, file.starts_with("swagger-ui"), "{file}");
        if is_packed {
            let mut unpacked = Vec::new();
            GzDecoder::new(&*sent.bytes().unwrap()).read_to_end(&mut unpacked).unwrap();
            assert_eq!(unpacked, plain, "{file}");
        }
        assert_eq!(get(&path).header("if-none-match", tag).send().unwrap().status(), 304, "{file}");
    }
    assert_eq!(get("/docs/other.js").send().unwrap().status(), 404);
}
