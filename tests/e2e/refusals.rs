//! Files that are no plugin for this host: each is refused with a reason, while everything else serves.

use std::fs;

use modalkit_tests::{Host, Setup, install, library, wait_until};
use serde_json::json;

/// Enough for the ELF headers, and for nothing that they promise.
const HEADERS_ONLY: usize = 8192;

fn refused(host: &Host, name: &str) -> String {
    wait_until("it was refused", || host.model(name)["state"] == "failed");
    assert_eq!(host.post("/predict_sync?model_name=echo", &json!({"text": "a"})).0, 200, "echo serves on");
    let (status, _) = host.post(&format!("/predict_sync?model_name={name}"), &json!({}));
    assert_eq!(status, 503);
    host.model(name)["reason"].as_str().unwrap().to_owned()
}

#[test]
fn each_unfit_file_says_what_was_found_and_what_to_do() {
    let host = Setup::new().plugin("echo").ready();
    let volume = host.volume();
    fs::write(volume.join("text.so"), "this is no library").unwrap();
    let whole = fs::read(library("echo")).unwrap();
    fs::write(volume.join("half.so"), &whole[..HEADERS_ONLY]).unwrap();
    for name in ["no_symbol", "crashes", "bad_output"] {
        install(&library(name), &volume.join(format!("{name}.so")));
    }
    let reason = refused(&host, "text");
    assert!(reason.contains("the dynamic linker refuses the file") && reason.contains("cdylib"), "{reason}");
    let reason = refused(&host, "half");
    assert!(
        reason.contains("the dynamic linker refuses the file") || reason.contains("it crashes when"),
        "{reason}"
    );
    let reason = refused(&host, "no_symbol");
    assert!(reason.contains("exports no modalkit plugin") && reason.contains("export_pipeline!"), "{reason}");
    let reason = refused(&host, "crashes");
    assert!(reason.contains("it crashes when it is opened (signal 6"), "{reason}");
    let reason = refused(&host, "bad_output");
    assert!(reason.contains("`Output` has a member `meta`"), "{reason}");
}

#[test]
fn a_refused_file_that_is_replaced_by_a_fit_one_serves() {
    let host = Setup::new().plugin("echo").ready();
    fs::write(host.volume().join("puppet.so"), "not yet").unwrap();
    refused(&host, "puppet");
    install(&library("puppet"), &host.volume().join("puppet.so"));
    wait_until("it serves", || host.post("/predict_sync?model_name=puppet", &json!({})).0 == 200);
}
