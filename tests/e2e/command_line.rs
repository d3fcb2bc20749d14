//! The command line beside `serve`: what looks at files, and what asks a running host, for people and for scripts.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use modalkit_tests::{Host, KEY, Setup, built, install, library, wait_until};
use serde_json::{Value, json};

/// Exit code, standard output, standard error.
fn modalkit(args: &[&str], variables: &[(&str, &str)]) -> (i32, String, String) {
    let output = Command::new(built().join("modalkit"))
        .args(args)
        .env_remove("MODALKIT_SOCKET")
        .envs(variables.iter().copied())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

fn json_of(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

fn path_of(file: &Path) -> &str {
    file.to_str().unwrap()
}

#[test]
fn a_plugin_is_inspected_without_being_served() {
    let folder = tempfile::tempdir().unwrap();
    let echo = folder.path().join("echo.so");
    install(&library("echo"), &echo);
    let (code, said, _) = modalkit(&["inspect", path_of(&echo)], &[]);
    assert_eq!(code, 0, "{said}");
    for part in
        ["echo 0.1.0, this host would take it", "abi     5.0", "text  string  required", "translated_text"]
    {
        assert!(said.contains(part), "{part:?} is not in {said}");
    }
    assert!(!said.contains('\u{1b}'), "colour is for terminals");
    let (code, said, _) = modalkit(&["inspect", path_of(&echo), "--json"], &[]);
    let about = json_of(&said);
    assert_eq!((code, &about["taken"], &about["name"]), (0, &json!(true), &json!("echo")));
    assert_eq!(about["input_schema"]["properties"]["text"]["type"], "string");
    assert_eq!(about["settings_schema"]["additionalProperties"], false);

    let text = folder.path().join("text.so");
    fs::write(&text, "this is no library, however long one looks at it; and a line more for the header")
        .unwrap();
    let (code, said, _) = modalkit(&["inspect", path_of(&text)], &[]);
    assert!(code == 1 && said.contains("it is no ELF file"), "{code} {said}");
    let (code, said, _) = modalkit(&["inspect", path_of(&text), "--json"], &[]);
    assert_eq!((code, &json_of(&said)["taken"]), (1, &json!(false)));
}

#[test]
fn what_needs_no_configuration_is_not_stopped_by_a_wrong_one() {
    let (code, schema, _) = modalkit(&["config", "schema", "--config", "/nowhere.toml"], &[]);
    assert!(code == 0 && jsonschema::validator_for(&json_of(&schema)).is_ok());
    for shell in ["bash", "zsh", "fish"] {
        let (code, script, _) = modalkit(&["completions", shell], &[]);
        assert!(code == 0 && script.contains("rollback"), "{shell}");
    }
    let (code, _, said) = modalkit(&["serve", "--config", "/nowhere.toml"], &[]);
    assert!(code == 2 && said.contains("/nowhere.toml"), "{code} {said}");
    let (code, said, _) = modalkit(&["check", "--config", "/nowhere.toml", "--json"], &[]);
    assert_eq!((code, &json_of(&said)["$errors"][0]["at"]), (1, &json!("/nowhere.toml")));
    assert_eq!(modalkit(&["chekc"], &[]).0, 2);
    let (_, help, _) = modalkit(&["--help"], &[]);
    assert!(help.contains("Exit codes:") && help.contains("130"), "{help}");
}

fn ask(host: &Host, args: &[&str], more: &[(&str, &str)]) -> (i32, String, String) {
    let url = format!("http://{}", host.address);
    let socket = host.socket.as_deref().map(path_of).unwrap();
    let mut variables = vec![("MODALKIT_URL", url.as_str()), ("MODALKIT_SOCKET", socket)];
    variables.extend_from_slice(more);
    modalkit(args, &variables)
}

/// Where a host's own user asks it from: with its configuration file, and no word of where it is.
struct Home {
    files: PathBuf,
    state: PathBuf,
    address: String,
}

impl Home {
    fn of(host: &Host) -> Self {
        let folder = host.folder();
        let (files, state) = (folder.join("modalkit.toml"), folder.join("state"));
        Self { files, state, address: host.address.to_string() }
    }

    fn ask(&self, args: &[&str], more: &[(&str, &str)]) -> (i32, String, String) {
        let mut variables = vec![
            ("MODALKIT_SERVER__STATE_FOLDER", path_of(&self.state)),
            ("MODALKIT_SERVER__LISTEN", self.address.as_str()),
        ];
        variables.extend_from_slice(more);
        modalkit(&[args, &["--config", path_of(&self.files)]].concat(), &variables)
    }
}

/// As anybody could, over the network.
fn ask_over_network(host: &Host, args: &[&str], more: &[(&str, &str)]) -> (i32, String, String) {
    let url = format!("http://{}", host.address);
    modalkit(args, &[&[("MODALKIT_URL", url.as_str())], more].concat())
}

#[test]
fn a_running_host_is_asked_from_the_command_line() {
    let config = "[model_settings.model_entries.echo]\n";
    let mut host = Setup::new().plugin("echo").config(config).ready();
    let (code, said, _) = ask(&host, &["predict", "echo", "--input", r#"{"text": "a"}"#, "--json"], &[]);
    assert_eq!((code, &json_of(&said)["translated_text"]), (0, &json!("A")));
    let (code, said, _) =
        ask(&host, &["predict", "--batch", "--input", r#"[{"text": "a"}, {"text": "b"}]"#], &[]);
    assert_eq!((code, &json_of(&said)[1]["translated_text"]), (0, &json!("B")));
    let (code, said, _) = ask(&host, &["predict", "--input", r#"{"text": 3}"#], &[]);
    assert!(code == 1 && said.starts_with("text: expected string, found number 3"), "{code} {said}");
    let (code, said, _) = ask(&host, &["predict", "--async", "--input", r#"{"text": "a"}"#], &[]);
    assert_eq!(code, 0, "{said}");
    let id = json_of(&said)["job_id"].as_str().unwrap().to_owned();
    wait_until("the job has ended", || {
        let (code, said, _) = ask(&host, &["jobs", &id, "--json"], &[]);
        assert_eq!(code, 0, "{said}");
        json_of(&said)["state"] == "succeeded"
    });
    assert_eq!(ask(&host, &["jobs", "none"], &[]).0, 1);
    let (code, said, _) = ask(&host, &["jobs", "--state", "succeeded"], &[]);
    assert!(code == 0 && said.contains(&id) && said.contains("echo"), "{said}");
    let (code, said, _) = ask(&host, &["jobs", &id, "--wait", "10", "--json"], &[]);
    assert_eq!((code, &json_of(&said)["attempts"]), (0, &json!(1)));
    // It has ended, and had no queue.
    assert_eq!(ask(&host, &["jobs", &id, "--cancel"], &[]).0, 1);
    assert_eq!(ask(&host, &["jobs", &id, "--redeliver"], &[]).0, 1);

    let (code, said, _) = ask(&host, &["config", "show"], &[]);
    assert!(code == 0 && said.contains("app_settings.batch_config.wait_ms"), "{said}");
    host.configure(&format!("{config}batch_config = {{ wait_ms = 1 }}\n"));
    let (code, said, _) = ask(&host, &["config", "reload"], &[]);
    // The host may have seen it before.
    assert!(code == 0 && (said.contains("changed: echo") || said.contains("unchanged")), "{said}");
    host.configure(&format!("{config}batch_config = {{ wiat_ms = 1 }}\n"));
    let (code, said, _) = ask(&host, &["config", "reload"], &[]);
    assert!(code == 1 && said.contains("did you mean wait_ms?"), "{code} {said}");
    let (_, said, _) = ask(&host, &["config", "show"], &[]);
    assert!(said.contains("ago: refused"), "{said}");
}

#[test]
fn a_running_host_is_asked_whatever_became_of_its_files_and_whatever_proxy_is_set() {
    let key = "[app_settings.auth_config.keys.caller]\nvariable = \"THE_KEY\"\n";
    let mut host = Setup::new().plugin("echo").config(key).variable("THE_KEY", KEY).ready();
    let home = Home::of(&host);
    let at_home = |args: &[&str], more: &[(&str, &str)]| home.ask(args, more);
    for wrong in ["", "[server]\nno_such_key = 1\n", "[app_settings.batch_config]\nwait_ms = 5 ms\n"] {
        host.configure(&format!("{key}{wrong}"));
        let (code, said, error) = at_home(&["models"], &[]);
        assert!(code == 0 && said.contains("echo   ready"), "{wrong}: {code} {said}{error}");
        // A proxy would look for 127.0.0.1 on its own machine; here is none.
        let predict = ["predict", "--input", r#"{"text": "a"}"#];
        let proxy = "http://127.0.0.1:9";
        let proxies =
            [("http_proxy", proxy), ("HTTP_PROXY", proxy), ("ALL_PROXY", proxy), ("MODALKIT_KEY", KEY)];
        let (code, said, error) = at_home(&predict, &proxies);
        assert!(code == 0 && said.contains("\"A\""), "{code} {said}{error}");
    }
}

#[test]
fn a_file_in_the_current_folder_is_inspected_by_its_bare_name() {
    let folder = tempfile::tempdir().unwrap();
    install(&library("echo"), &folder.path().join("echo.so"));
    let mut command = Command::new(built().join("modalkit"));
    let output = command.args(["inspect", "echo.so"]).current_dir(folder.path()).output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && said.contains("this host would take it"), "{said}");
}

#[test]
fn the_command_line_finds_the_hosts_socket_and_needs_no_key_there() {
    for auth in ["", &format!("[app_settings.auth_config]\napi_key = {KEY:?}\n")] {
        let mut host = Setup::new().plugin("echo").config(auth).ready();
        let address = host.address.to_string();
        let home = Home::of(&host);
        let at_home = |args: &[&str], more: &[(&str, &str)]| home.ask(args, more);
        let (code, said, _) = at_home(&["models"], &[]);
        assert!(code == 0 && said.contains("echo   ready"), "{code} {said}");
        let (code, said, _) = at_home(&["reload", "echo"], &[]);
        assert!(code == 0 && said.contains("swapped"), "{code} {said}");
        let (code, said, _) = at_home(&["metrics"], &[]);
        assert!(code == 0 && said.contains("# TYPE modalkit_requests_total counter"), "{code} {said}");
        // Predictions go over the network, with a key where one is asked for, and the socket shows everybody's jobs.
        let predict = ["predict", "--async", "--input", r#"{"text": "a"}"#];
        let key = if auth.is_empty() { vec![] } else { vec![("MODALKIT_KEY", KEY)] };
        let (code, said, said_of_it) = at_home(&predict, &key);
        assert_eq!(code, 0, "{said}{said_of_it}");
        let id = json_of(&said)["job_id"].as_str().unwrap().to_owned();
        let (code, said, _) = at_home(&["jobs"], &[]);
        assert!(code == 0 && said.contains(&id), "{code} {said}");
        // An address or a key goes over the network, where this key doesn't manage.
        let url = format!("http://{address}");
        for by_network in [("MODALKIT_URL", url.as_str()), ("MODALKIT_KEY", KEY)] {
            let (code, said, _) = at_home(&["models"], &[by_network]);
            assert!(code == 1 && !said.contains("ready"), "{code} {said}");
        }
        let socket = host.socket.clone().unwrap();
        assert_eq!(modalkit(&["models", "--socket", path_of(&socket)], &[]).0, 0);
        let elsewhere = ["models", "--url", "http://127.0.0.1:1"];
        let (code, _, said) = modalkit(&elsewhere, &[("MODALKIT_SOCKET", path_of(&socket))]);
        assert!(code == 1 && said.contains("can't reach the host at http://127.0.0.1:1"), "{code} {said}");
        host.kill();
        for _ in 0..2 {
            // Its file is there still, and then it isn't.
            let (code, _, said) = at_home(&["models"], &[]);
            assert!(
                code == 1 && said.contains("no host answers") && said.contains("--socket"),
                "{code} {said}"
            );
            let _ = fs::remove_file(&socket);
        }
    }
}

#[test]
fn a_key_is_shown_from_the_environment_and_asked_for_where_it_is_missing() {
    let config = format!("[app_settings.auth_config.keys.operator]\napi_key = {KEY:?}\nmanagement = true\n");
    let host = Setup::new().plugin("echo").config(&config).start();
    wait_until("the host is ready", || host.get("/readyz").0 == 200);
    let (code, said, _) = ask_over_network(&host, &["models"], &[]);
    assert!(code == 1 && said.contains("MODALKIT_KEY"), "{code} {said}");
    let (code, said, _) = ask_over_network(&host, &["models"], &[("MODALKIT_KEY", KEY)]);
    assert!(code == 0 && said.contains("echo   ready"), "{code} {said}");
    let (_, help, _) = ask_over_network(&host, &["models", "--help"], &[("MODALKIT_KEY", KEY)]);
    assert!(!help.contains(KEY), "{help}");
}
