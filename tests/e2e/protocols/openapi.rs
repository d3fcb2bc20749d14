//! The document that says what a host answers: it follows the models, and a plugin's fault in it is nobody else's.

use std::io::Read;

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
    assert_eq!(path["operationId"], "predict_echo");
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
        if let Some(coding) = sent.headers().get("content-encoding") {
            assert_eq!(coding, "gzip", "{file}");
            let mut unpacked = Vec::new();
            GzDecoder::new(&*sent.bytes().unwrap()).read_to_end(&mut unpacked).unwrap();
            assert_eq!(unpacked, plain, "{file}");
        }
        assert_eq!(get(&path).header("if-none-match", tag).send().unwrap().status(), 304, "{file}");
    }
    assert_eq!(get("/docs/other.js").send().unwrap().status(), 404);
}
