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

#[test]
fn a_file_with_the_name_of_a_model_that_uses_another_plugin_leaves_that_model_alone() {
    let host =
        Setup::new().plugin("echo").config("[model_settings.model_entries.speak]\nplugin = \"echo\"").ready();
    install(&library("puppet"), &host.volume().join("speak.so"));
    assert_eq!(host.log_line("the name of a model that uses another plugin")["uses"], "echo");
    assert_eq!(host.post("/predict_sync?model_name=speak", &json!({"text": "a"})).1["translated_text"], "A");
    assert_eq!(host.get("/readyz").0, 200);
}

#[test]
fn a_file_that_vanishes_before_it_settled_does_not_keep_the_host_from_being_ready() {
    let setup = Setup::new().plugin("echo").config("[server]\nsettle_ms = 1000");
    fs::write(setup.volume().join("passing.so"), "half").unwrap();
    let host = setup.start();
    fs::remove_file(host.volume().join("passing.so")).unwrap();
    wait_until("it is ready", || host.get("/readyz").0 == 200);
}
