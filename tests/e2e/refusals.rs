//! Files that are no plugin for this host: each is refused with a reason that says what was found, what was expected and what to
//! do, while everything else serves.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

use modalkit_tests::{
    Host, Setup, built, install, library,
    load::{ECHO, Load},
    put, wait_until, workspace,
};
use serde_json::json;

/// Waits for the refusal, sees that the others serve, and returns the reason.
fn refused(host: &Host, name: &str) -> String {
    wait_until(&format!("{name} was refused"), || host.model(name)["state"] == "failed");
    assert_eq!(host.post("/predict_sync?model_name=echo", &json!({"text": "a"})).0, 200, "echo serves on");
    let (status, _) = host.post(&format!("/predict_sync?model_name={name}"), &json!({}));
    assert_eq!(status, 503);
    host.model(name)["reason"].as_str().unwrap().to_owned()
}

#[track_caller]
fn says(reason: &str, parts: &[&str]) {
    for part in parts {
        assert!(reason.contains(part), "{part:?} is not in {reason:?}");
    }
}

/// Starts somebody who asks a second model all the time; what they saw is looked at in the end.
fn neighbour(host: &Host) -> Load {
    Load::start(host.address, 1, ECHO)
}

/// A library from C, linked as these arguments say.
fn compile(source: &str, folder: &Path, name: &str, args: &[&str]) -> PathBuf {
    let (text, library) = (folder.join(format!("{name}.c")), folder.join(format!("{name}.so")));
    fs::write(&text, source).unwrap();
    let cc = Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(&library).arg(&text).args(args).output();
    let cc = cc.expect("a C compiler, which the README asks for");
    assert!(cc.status.success(), "{}", String::from_utf8_lossy(&cc.stderr));
    library
}

#[test]
fn files_that_are_no_whole_library_of_this_machine() {
    let host = Setup::new().plugin("echo").config("[server]\nsettle_timeout_seconds = 1").ready();
    let neighbour = neighbour(&host);
    let volume = host.volume();
    let whole = fs::read(library("echo")).unwrap();
    put(b"this is no library, whoever looks at it, and however long that takes", &volume.join("text.so"));
    says(
        &refused(&host, "text"),
        &["it is no ELF file, but a file that begins with \"this is no l\"", "cdylib"],
    );
    put(&[b"!<arch>\n".as_slice(), &[b' '; 80]].concat(), &volume.join("archive.so"));
    says(&refused(&host, "archive"), &["a static library (ar)", "cdylib"]);
    for (name, length) in [("beginning", 8192), ("half", whole.len() / 2), ("almost", whole.len() - 1)] {
        put(&whole[..length], &volume.join(format!("{name}.so")));
        let found = format!("and it has {length}");
        says(&refused(&host, name), &["it is truncated: its headers speak of", &found, "copy it again"]);
    }
    let mut other = whole;
    // `e_machine` says AArch64.
    other[18..20].copy_from_slice(&183_u16.to_le_bytes());
    put(&other, &volume.join("arm.so"));
    says(&refused(&host, "arm"), &["it was built for AArch64", "this host runs on x86-64", "--target"]);
    put(&fs::read(built().join("modalkit")).unwrap()[..64].repeat(100), &volume.join("headers.so"));
    says(&refused(&host, "headers"), &["was refused"]);
    neighbour.stop().assert_faultless();
}

/// A configured model, so that it stays while its file is away.
#[test]
fn content_that_was_refused_is_refused_again_where_it_is_put_back() {
    let config = "[model_settings.model_entries.wrong]\nplugin = \"wrong\"\nrequired = false";
    let host = Setup::new().plugin("echo").config(config).ready();
    let file = host.volume().join("wrong.so");
    let expected = ["it exports no modalkit plugin"];
    install(&library("no_symbol"), &file);
    says(&refused(&host, "wrong"), &expected);
    fs::remove_file(&file).unwrap();
    wait_until("it waits for its file", || host.model("wrong")["state"] == "waiting");
    install(&library("no_symbol"), &file);
    says(&refused(&host, "wrong"), &expected);
    // Also where another content has failed in between.
    install(&library("bad_output"), &file);
    wait_until("the other one was refused", || {
        host.model("wrong")["reason"].as_str().is_some_and(|reason| reason.contains("member `meta`"))
    });
}

#[test]
fn libraries_that_are_no_plugin_for_this_host() {
    let host = Setup::new().plugin("echo").ready();
    let neighbour = neighbour(&host);
    let volume = host.volume();
    for name in ["no_symbol", "crashes", "bad_output", "other_layout"] {
        install(&library(name), &volume.join(format!("{name}.so")));
    }
    says(&refused(&host, "no_symbol"), &["it exports no modalkit plugin", "export_pipeline!"]);
    says(&refused(&host, "crashes"), &["it crashes when it is opened (signal 6", "nothing else was harmed"]);
    says(&refused(&host, "bad_output"), &["`Output` has a member `meta`"]);
    let reason = refused(&host, "other_layout");
    says(&reason, &["its layout differs from this host's although both say ABI 5", "rebuild it", "expected"]);
    assert!(reason.len() < 900, "the first difference only, and not the whole report: {reason}");
    neighbour.stop().assert_faultless();
}

#[test]
fn another_abi_number_or_a_feature_that_is_missing_is_named_with_who_built_it() {
    let host = Setup::new().plugin("echo").ready();
    let neighbour = neighbour(&host);
    // What stays readable for ever: plain C data behind one symbol.
    let source = |abi: u32, needs: &str| {
        format!(
            r#"
            #include <stdint.h>
            struct text {{ const char *start; uint64_t length; }};
            const struct {{
                char magic[16]; uint32_t abi, aborts; struct text sdk, rustc; const void *header;
            }} modalkit_plugin_handshake = {{
                "modalkit plugin", {abi}, 0, {{"9.9.9", 5}}, {{"rustc 9.0.0", 11}}, 0
            }};
            {needs}
            "#
        )
    };
    // Longer than this host knows them: what follows is passed over.
    let needs = |minor: u32, features: &str| {
        format!(
            "const struct {{ uint32_t bytes, minor; uint64_t features, later; }} modalkit_plugin_needs = {{ 24, {minor}, {features}, 7 }};"
        )
    };
    let host_takes = "(SDK 9.9.9, rustc 9.0.0), and this host takes ABI 5.";
    let folder = tempfile::tempdir().unwrap();
    for (name, source, expected) in [
        ("newer", source(999, ""), ["built for plugin ABI 999 ", host_takes, "update this host"]),
        (
            "older",
            source(4, ""),
            ["built for plugin ABI 4 ", host_takes, "rebuild it with the SDK of this host"],
        ),
        (
            "before",
            source(5, ""),
            [
                "built for plugin ABI 5 as it was before 5.0 ",
                host_takes,
                "rebuild it with the SDK of this host",
            ],
        ),
        (
            "later",
            source(5, &needs(777, "0")),
            ["built for plugin ABI 5.777 ", host_takes, "update this host"],
        ),
        (
            "needy",
            source(5, &needs(0, "1ull << 63 | 1ull << 62")),
            [
                "it needs what this host doesn't have: feature 62, feature 63;",
                "run a host that has it",
                "build the plugin without it",
            ],
        ),
    ] {
        install(&compile(&source, folder.path(), name, &[]), &host.volume().join(format!("{name}.so")));
        says(&refused(&host, name), &expected);
    }
    neighbour.stop().assert_faultless();
}

#[test]
fn a_missing_library_is_named_and_one_beside_the_plugin_too() {
    let host = Setup::new().plugin("echo").ready();
    let neighbour = neighbour(&host);
    let folder = tempfile::tempdir().unwrap();
    let beside = compile("int beside(void) { return 1; }", folder.path(), "libbeside-modalkit", &[]);
    let source = "int beside(void); int needs(void) { return beside(); }";
    let link = ["-Wl,-rpath,$ORIGIN", &format!("-L{}", folder.path().display()), "-lbeside-modalkit"];
    let needs = compile(source, folder.path(), "needs", &link);
    install(&needs, &host.volume().join("lonely.so"));
    let reason = refused(&host, "lonely");
    says(&reason, &["it needs the shared library libbeside-modalkit.so", "install it on this machine"]);
    // With the library beside it in the volume. That is no plugin either, and is told so.
    install(&beside, &host.volume().join("libbeside-modalkit.so"));
    says(&refused(&host, "beside-modalkit"), &["it exports no modalkit plugin"]);
    install(&needs, &host.volume().join("needs.so"));
    says(
        &refused(&host, "needs"),
        &["libbeside-modalkit.so", "lies beside the plugin", "$ORIGIN", "link it statically"],
    );
    neighbour.stop().assert_faultless();
}

#[test]
fn a_constructor_that_never_returns_is_given_up_and_leaves_no_process() {
    let mut host = Setup::new().plugin("echo").config("[server]\npreflight_timeout_seconds = 60").ready();
    let source =
        "#include <unistd.h>\n__attribute__((constructor)) static void wait(void) { for (;;) sleep(1); }";
    let folder = tempfile::tempdir().unwrap();
    install(&compile(source, folder.path(), "waits", &[]), &host.volume().join("waits.so"));
    // Told by its arguments: a child that was forked and not yet executed still has the host's.
    let preflights = || {
        let processes = fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path().join("cmdline"));
        let marker = host.temporary_folder().display().to_string();
        processes.filter(|line| fs::read_to_string(line).unwrap_or_default().contains(&marker)).count()
    };
    wait_until("it is tried", || preflights() == 1);
    assert_eq!(host.post("/predict_sync?model_name=echo", &json!({"text": "a"})).0, 200);
    // However the host ends, its child does too.
    host.signal("KILL");
    wait_until("the child has ended", || preflights() == 0);
    assert!(host.wait().code().is_none());

    let host = Setup::new().plugin("echo").config("[server]\npreflight_timeout_seconds = 1").ready();
    let neighbour = neighbour(&host);
    install(&folder.path().join("waits.so"), &host.volume().join("waits.so"));
    says(&refused(&host, "waits"), &["it did not open within 1s", "constructors that wait"]);
    neighbour.stop().assert_faultless();
}

#[test]
fn a_plugin_whose_panics_would_end_the_host() {
    let manifest = workspace().join("tests/abort/Cargo.toml");
    let target = built().join("abort");
    let build = Command::new("cargo")
        .args(["build", "--manifest-path"])
        .arg(&manifest)
        .arg("--target-dir")
        .arg(&target)
        .env_remove("CARGO_TARGET_DIR")
        .status();
    assert!(build.expect("cargo starts").success());
    let host = Setup::new().plugin("echo").ready();
    let neighbour = neighbour(&host);
    install(&target.join("debug/libabort.so"), &host.volume().join("abort.so"));
    let reason = refused(&host, "abort");
    says(
        &reason,
        &["compiled with panic = \"abort\"", "expected \"unwind\"", "remove `panic` from the Cargo profile"],
    );
    neighbour.stop().assert_faultless();
}

#[test]
fn what_others_may_write_is_no_code_of_ours_unless_said_so() {
    let host = Setup::new().plugin("echo").ready();
    let neighbour = neighbour(&host);
    let file = host.volume().join("puppet.so");
    fs::copy(library("puppet"), &file).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o664)).unwrap();
    let reason = refused(&host, "puppet");
    says(
        &reason,
        &["may be written by its group (mode 0664)", "chmod go-w", "server.plugins_of_any_mode = true"],
    );
    // The mode alone changes, and that is enough.
    fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
    wait_until("it serves", || host.post("/predict_sync?model_name=puppet", &json!({})).0 == 200);
    neighbour.stop().assert_faultless();

    let setup = Setup::new().plugin("puppet");
    fs::set_permissions(setup.volume(), fs::Permissions::from_mode(0o777)).unwrap();
    let host = setup.start();
    wait_until("it was refused", || host.model("puppet")["state"] == "failed");
    let reason = host.model("puppet")["reason"].as_str().unwrap().to_owned();
    says(&reason, &["the folder ", "may be written by everybody (mode 0777)"]);
    // The folder's mode is all that changes.
    fs::set_permissions(host.volume(), fs::Permissions::from_mode(0o755)).unwrap();
    wait_until("it serves", || host.post("/predict_sync?model_name=puppet", &json!({})).0 == 200);

    let setup = Setup::new().plugin("puppet").config("[server]\nplugins_of_any_mode = true");
    fs::set_permissions(setup.volume(), fs::Permissions::from_mode(0o777)).unwrap();
    let host = setup.ready();
    assert_eq!(host.post("/predict_sync", &json!({})).0, 200);
}

#[test]
fn a_folder_further_up_that_others_may_write_is_as_good_as_the_plugins_own() {
    let setup = Setup::new().plugin("puppet");
    fs::set_permissions(setup.folder(), fs::Permissions::from_mode(0o777)).unwrap();
    let host = setup.start();
    wait_until("it was refused", || host.model("puppet")["state"] == "failed");
    let reason = host.model("puppet")["reason"].as_str().unwrap().to_owned();
    let folder = format!("the folder {} may be written by everybody (mode 0777)", host.folder().display());
    says(&reason, &[&folder, "chmod go-w"]);
    // As /tmp is.
    fs::set_permissions(host.folder(), fs::Permissions::from_mode(0o1777)).unwrap();
    wait_until("it serves", || host.model("puppet")["state"] == "ready");
}

#[test]
fn a_file_of_somebody_else_is_refused_unless_said_so() {
    let setup = Setup::new().plugin("puppet");
    if std::os::unix::fs::chown(setup.volume().join("puppet.so"), Some(12_345), None).is_err() {
        // Only root can give files away. Whoever else runs this has seen the rule in the loader's own tests.
        return;
    }
    let host = setup.start();
    wait_until("it was refused", || host.model("puppet")["state"] == "failed");
    let reason = host.model("puppet")["reason"].as_str().unwrap().to_owned();
    says(&reason, &["belongs to user 12345", "or root", "server.plugins_of_any_owner = true"]);
    let setup = Setup::new().plugin("puppet").config("[server]\nplugins_of_any_owner = true");
    std::os::unix::fs::chown(setup.volume().join("puppet.so"), Some(12_345), None).unwrap();
    assert_eq!(setup.ready().post("/predict_sync", &json!({})).0, 200);
}

#[test]
fn a_pinned_plugin_is_that_one_and_no_other() {
    let pin = "0".repeat(64);
    let entry = format!("[model_settings.model_entries.puppet]\nplugin_sha256 = \"{pin}\"");
    let host = Setup::new().plugin("echo").plugin("puppet").config(&entry).start();
    wait_until("echo serves", || host.model("echo")["state"] == "ready");
    let neighbour = neighbour(&host);
    let reason = refused(&host, "puppet");
    neighbour.stop().assert_faultless();
    says(&reason, &["it has the SHA-256 ", &format!("the model's entry pins {pin}"), "plugin_sha256"]);
    let found = reason.split("the SHA-256 ").nth(1).unwrap().split(',').next().unwrap();
    let entry = format!("[model_settings.model_entries.puppet]\nplugin_sha256 = \"{found}\"");
    let host = Setup::new().plugin("puppet").config(&entry).ready();
    assert_eq!(host.post("/predict_sync", &json!({})).0, 200);
    assert_eq!(host.report("puppet")["plugin_pinned"], true);
}

#[test]
fn a_pinned_queue_plugin_is_that_one_and_no_other() {
    let with_pin = |pin: &str| {
        let setup = Setup::new().plugin("queue-file");
        let results = setup.folder().join("results").display().to_string();
        setup.config(&format!(
            "[app_settings.queue_config.backends.file]\nkind = \"plugin\"\nplugin = \"queue-file\"\nplugin_sha256 = \"{pin}\"\nsettings = {{ folder = {results:?} }}"
        ))
    };
    let pin = "0".repeat(64);
    let host = with_pin(&pin).start();
    let line = host.log_line("the queue backend can't be used");
    let error = line["error"].as_str().unwrap();
    says(error, &[&format!("the queue backend's entry pins {pin}"), "plugin_sha256", "install that file"]);
    // Not even tried in another process, which would have run it.
    assert!(!host.log().iter().any(|line| line["message"] == "queue plugin opened"));
    let found = error.split("the SHA-256 ").nth(1).unwrap().split(',').next().unwrap();
    let host = with_pin(found).start();
    assert_eq!(host.log_line("queue plugin opened")["sha256"], found);
}

#[test]
fn a_refused_file_that_is_replaced_by_a_fit_one_serves() {
    let host = Setup::new().plugin("echo").ready();
    let neighbour = neighbour(&host);
    put(
        b"not yet a library, but it will be one as soon as somebody has built it",
        &host.volume().join("puppet.so"),
    );
    refused(&host, "puppet");
    install(&library("puppet"), &host.volume().join("puppet.so"));
    wait_until("it serves", || host.post("/predict_sync?model_name=puppet", &json!({})).0 == 200);
    neighbour.stop().assert_faultless();
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
    let setup = Setup::new().plugin("echo").config("[server]\nsettle_ms = 5000");
    fs::write(setup.volume().join("passing.so"), "half").unwrap();
    let host = setup.start();
    fs::remove_file(host.volume().join("passing.so")).unwrap();
    wait_until("it is ready", || host.get("/readyz").0 == 200);
}
