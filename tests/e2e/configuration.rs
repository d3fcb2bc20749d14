//! What is read from files and the environment: wrong configurations and what is said of them, precedence, the Python library's
//! files, and that nothing that anybody could write makes it panic.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use modalkit::config::{self, BatchWait, Environment, Faults, Loaded};
use modalkit_tests::{Host, Setup, built, install, library, wait_until, workspace};
use serde_json::{Value, json};
use tempfile::TempDir;

fn variables(pairs: &[(&str, &str)]) -> Environment {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

struct Files(TempDir);

impl Files {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn put(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.path().join(name);
        fs::write(&path, text).unwrap();
        path
    }
}

fn load(files: &[PathBuf], pairs: &[(&str, &str)]) -> Result<Loaded, Faults> {
    config::load(files, &variables(pairs))
}

/// The value and the place of a key.
fn row(loaded: &Loaded, key: &str) -> (String, String) {
    let rows = loaded.rows();
    let row = rows.iter().find(|row| row.key == key).unwrap_or_else(|| panic!("no {key} in {rows:#?}"));
    let place = row.at.to_string();
    (row.value.clone(), place.rsplit('/').next().unwrap().to_owned())
}

/// Cases stand as `=== NAME`, the file, `--- says`, and what is said.
#[test]
fn wrong_configurations_are_told_what_is_wrong_with_them() {
    let path = workspace().join("tests/configurations/wrong.txt");
    let text = fs::read_to_string(&path).unwrap();
    let (preface, cases) = text.split_once("\n=== ").unwrap();
    let folder = Files::new();
    let mut now = preface.to_owned();
    let mut count = 0;
    for case in cases.split("\n=== ") {
        let (name, rest) = case.split_once('\n').unwrap();
        let file = rest.split("\n--- says\n").next().unwrap();
        let path = folder.put(name, file);
        let faults = load(&[path], &[]).err().unwrap_or_else(|| panic!("{name} is not wrong"));
        let said = faults.to_string().replace(&format!("{}/", folder.0.path().display()), "");
        assert!(!said.contains("SECRETKEY"), "{name} shows a secret: {said}");
        now.push_str(&format!("\n=== {name}\n{file}\n--- says\n{said}\n"));
        count += 1;
    }
    assert!(count >= 40, "{count} cases");
    if env::var_os("MODALKIT_UPDATE").is_some() {
        fs::write(&path, now).unwrap();
        return;
    }
    for (line, (was, is)) in text.lines().zip(now.lines()).enumerate() {
        assert_eq!(was, is, "{}:{}", path.display(), line + 1);
    }
    assert_eq!(text.len(), now.len(), "{} has other lines at its end", path.display());
}

#[test]
fn later_layers_win_and_every_value_says_where_it_is_from() {
    let files = Files::new();
    let a = files.put(
        "a.toml",
        "[app_settings.batch_config]\nmax_batch_size = 2\nwait_ms = 1\nqueue_max = 7\n[model_settings.model_entries.Digits]\ntop_k = 1\nbatch_config = { wait_ms = 9 }\n",
    );
    let b = files.put("b.yaml", "app_settings:\n  batch_config: {max_batch_size: 3, wait_ms: 2}\n");
    let environment = [
        ("modalkit_app_settings__batch_config__WAIT_MS", "5"),
        ("MODALKIT_MODEL_SETTINGS__MODEL_ENTRIES__DIGITS__TOP_K", "3"),
        ("MODALKIT_MODEL_SETTINGS__MODEL_ENTRIES__DIGITS__LABELS", r#"["a", "b"]"#),
        ("MODALKIT_CONFIG", "not a key"),
        ("PATH", "nobody's business"),
    ];
    let loaded = load(&[a, b], &environment).unwrap();
    // In the order of what wins: environment, later file, earlier file, default; and a model's own over the application's.
    let table = [
        ("app_settings.batch_config.wait_ms", "5", "$modalkit_app_settings__batch_config__WAIT_MS"),
        ("app_settings.batch_config.max_batch_size", "3", "b.yaml:2:34"),
        ("app_settings.batch_config.queue_max", "7", "a.toml:4:13"),
        ("app_settings.deployment_config.min_replicas", "1", "default"),
        ("model_settings.model_entries.Digits.batch_config.wait_ms", "9", "a.toml:7:28"),
        ("model_settings.model_entries.Digits.batch_config.max_batch_size", "3", "b.yaml:2:34"),
        (
            "model_settings.model_entries.Digits.top_k",
            "3",
            "$MODALKIT_MODEL_SETTINGS__MODEL_ENTRIES__DIGITS__TOP_K",
        ),
    ];
    for (key, value, place) in table {
        assert_eq!(row(&loaded, key), (value.to_owned(), place.to_owned()), "{key}");
    }
    let digits = &loaded.config.models["Digits"];
    assert_eq!(digits.settings.json(), r#"{"labels":["a","b"],"top_k":3}"#);
    assert_eq!(
        (digits.batch.max_batch_size, digits.batch.wait, digits.batch.queue_max),
        (3, BatchWait::Fixed(Duration::from_millis(9)), 7)
    );
}

#[test]
fn a_map_in_the_environment_replaces_the_files_and_a_path_changes_one_key() {
    let files = Files::new();
    let file = files.put("a.toml", "[app_settings.deployment_config.volumes]\n\"/mnt/a\" = \"a\"\n");
    let name = "MODALKIT_APP_SETTINGS__DEPLOYMENT_CONFIG__VOLUMES";
    let mounts = |pairs: &[(&str, &str)]| {
        let loaded = load(std::slice::from_ref(&file), pairs).unwrap();
        loaded.config.volumes.iter().map(|volume| volume.name.clone()).collect::<Vec<_>>()
    };
    assert_eq!(mounts(&[(name, r#"{"/mnt/b": "b"}"#)]), ["b"]);
    assert_eq!(mounts(&[(&format!("{name}__/MNT/A"), "c")]), ["c"]);
    assert_eq!(mounts(&[(name, r#"{"/mnt/b": "b"}"#), (&format!("{name}__/mnt/c"), "c")]), ["b", "c"]);
    let both = load(&[], &[("MODALKIT_SERVER", "{\"log\": \"info\"}"), ("MODALKIT_SERVER__LOG__X", "1")]);
    let said = both.err().unwrap().to_string();
    assert!(said.contains("server.log") && said.contains("either a whole value or single keys"), "{said}");
}

#[test]
fn null_goes_back_to_the_default() {
    let files = Files::new();
    let a =
        files.put("a.yaml", "app_settings: {batch_config: {wait_ms: 5}, deployment_config: {gpu: A100}}\n");
    let b =
        files.put("b.yaml", "app_settings: {batch_config: {wait_ms: null}, deployment_config: {gpu: ~}}\n");
    let loaded = load(&[a, b], &[]).unwrap();
    assert_eq!(row(&loaded, "app_settings.batch_config.wait_ms"), ("0".into(), "b.yaml:1:40".into()));
    assert!(loaded.warnings.is_empty(), "{:?}", loaded.warnings);
}

/// Runs `modalkit` in a folder, without this process's own variables.
fn modalkit(folder: &Path, args: &[&str], pairs: &[(&str, &str)]) -> (i32, String, String) {
    let output = Command::new(built().join("modalkit"))
        .args(args)
        .current_dir(folder)
        .env_clear()
        .envs(pairs.iter().copied())
        .output()
        .unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

#[test]
fn a_dot_env_file_is_read_and_the_environment_beats_it() {
    let files = Files::new();
    files.put("b.toml", "[app_settings.batch_config]\nqueue_max = 9\n");
    files.put(
        ".env",
        "# lines\nMODALKIT_CONFIG=b.toml\nexport MODALKIT_APP_SETTINGS__BATCH_CONFIG__WAIT_MS=5\nMODALKIT_APP_SETTINGS__BATCH_CONFIG__MAX_BATCH_SIZE=6\nMODALKIT_APP_POSTFIX=-test\n",
    );
    let set = [("MODALKIT_APP_SETTINGS__BATCH_CONFIG__MAX_BATCH_SIZE", "8")];
    let (code, json, said) = modalkit(files.0.path(), &["check", "--json"], &set);
    assert_eq!(code, 0, "{json}{said}");
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(
        json["app_settings"]["batch_config"],
        json!({"max_batch_size": 8, "wait_ms": 5, "queue_max": 9})
    );
    let places = &json["$provenance"];
    assert_eq!(
        places["app_settings.batch_config.wait_ms"],
        ".env:3 $MODALKIT_APP_SETTINGS__BATCH_CONFIG__WAIT_MS"
    );
    assert_eq!(
        places["app_settings.batch_config.max_batch_size"],
        "$MODALKIT_APP_SETTINGS__BATCH_CONFIG__MAX_BATCH_SIZE"
    );
    assert_eq!(json["$app_name"], "modalkit-test");
    // Other programs' lines are theirs.
    files.put(".env", "A=1\nSECRET is no line of this kind\nMODALKIT_APP_POSTFIX=-test\n");
    let (code, told, said) = modalkit(files.0.path(), &["check"], &[]);
    let told = told + &said;
    assert!(code == 0 && told.contains(".env:2:1") && told.contains("passed over"), "{code} {told}");
    assert!(!told.contains("SECRET"), "{told}");
    let (_, json, _) = modalkit(files.0.path(), &["check", "--json"], &[]);
    assert_eq!(serde_json::from_str::<Value>(&json).unwrap()["$app_name"], "modalkit-test");
    // One of ours that can't be read stops the start: it may be a key.
    for lines in
        ["\nMODALKIT_X__Y is SECRET\n", "\nA=\"SECRET\nMODALKIT_APP_SETTINGS__AUTH_CONFIG__API_KEY=b\n"]
    {
        files.put(".env", lines);
        let (code, told, said) = modalkit(files.0.path(), &["check"], &[]);
        assert!(code == 1 && told.contains(".env:2:1") && !told.contains("SECRET"), "{code} {told}{said}");
    }
}

#[test]
fn what_was_probably_meant_and_has_no_effect_is_told() {
    let files = Files::new();
    files.put(".env", "MODALKIT_app_settings_X=1\n");
    let (code, said, _) = modalkit(files.0.path(), &["check"], &[("MODALKIT_SERVER_LISTEN", "127.0.0.1:9")]);
    assert_eq!(code, 0, "{said}");
    for part in [
        "$MODALKIT_SERVER_LISTEN",
        "as in MODALKIT_SERVER__LISTEN",
        ".env:1",
        "as in MODALKIT_app_settings__X",
    ] {
        assert!(said.contains(part), "{part:?} is not in {said}");
    }
    files.put(".env", "");
    let (_, said, _) =
        modalkit(files.0.path(), &["check"], &[("MODALKIT_URL", "x"), ("MODALKIT_SERVERS", "x")]);
    assert!(!said.contains("sets nothing"), "{said}");
    // As it is between an editor's two steps.
    files.put("mine.toml", "");
    let (code, said, _) = modalkit(files.0.path(), &["check"], &[("MODALKIT_CONFIG", "mine.toml")]);
    assert!(code == 0 && said.contains("mine.toml:1:1") && said.contains("it holds no setting"), "{said}");
    // The Python library reads it from there.
    files.put("modalkit.yaml", "app_settings: {}\n");
    let (_, said, _) = modalkit(files.0.path(), &["check"], &[]);
    assert!(said.contains("modalkit.yaml") && said.contains("--config"), "{said}");
    let (_, said, _) = modalkit(files.0.path(), &["check", "--config", "modalkit.yaml"], &[]);
    assert!(!said.contains("not named") && !said.contains("unless it is named"), "{said}");
}

#[test]
fn check_tells_what_a_pipeline_refuses_beside_everything_else_and_is_strict_where_it_is_told_so() {
    let files = Files::new();
    let volume = files.0.path().join("volume");
    fs::create_dir(&volume).unwrap();
    install(&library("echo"), &volume.join("echo.so"));
    let volumes = format!(
        "app_settings:\n  deployment_config:\n    volumes: {{{:?}: main}}\n",
        volume.display().to_string()
    );
    let entry = "model_settings:\n  model_entries:\n    echo: {top_k: 1}\n";
    files.put("m.yaml", &format!("{volumes}    concurrency_limit: 0\n{entry}"));
    let check = |more: &[&str]| {
        let args = [&["check", "--config", "m.yaml"], more].concat();
        let (code, said, _) = modalkit(files.0.path(), &args, &[]);
        (code, said)
    };
    let (code, said) = check(&[]);
    assert_eq!(code, 1, "{said}");
    // A limit out of its range, and a key that the pipeline, which has none, doesn't know.
    for part in ["has 2 errors", "m.yaml:4:24", "m.yaml:7:12", "unknown key top_k"] {
        assert!(said.contains(part), "{part:?} is not in {said}");
    }
    // What means nothing here is a warning in YAML, which files of the Python library come in.
    files.put("m.yaml", &format!("{volumes}    concurency_limit: 2\n"));
    let (code, said) = check(&[]);
    assert!(code == 0 && said.contains("did you mean concurrency_limit?"), "{said}");
    assert_eq!(check(&["--strict"]).0, 1);
    assert_eq!(check(&["--strict", "--json"]).0, 1);
    files.put("m.yaml", &volumes);
    assert_eq!(check(&["--strict"]).0, 0);
}

#[test]
fn check_looks_whether_volumes_and_models_files_are_there() {
    let files = Files::new();
    let volume = files.0.path().join("volume");
    fs::create_dir(&volume).unwrap();
    install(&library("similarity"), &volume.join("similarity.so"));
    files.put(
        "m.toml",
        &format!(
            "[app_settings.deployment_config.volumes]\n{:?} = \"main\"\n\"/no/such/folder\" = \"other\"\n\
         [model_settings]\nlocal_model_repository_folder = {:?}\n\
         [model_settings.model_entries.similarity]\nmatrix = \"rows.npy\"\nlabels = \"names.txt\"\n",
            volume.display().to_string(),
            volume.display().to_string()
        ),
    );
    let check = || modalkit(files.0.path(), &["check", "--config", "m.toml"], &[]);
    let (code, said, _) = check();
    assert_eq!(code, 1, "{said}");
    for part in ["/no/such/folder", "m.toml:7", "rows.npy", "m.toml:8", "names.txt"] {
        assert!(said.contains(part), "{part:?} is not in {said}");
    }
    for name in ["rows.npy", "names.txt"] {
        fs::write(volume.join(name), "").unwrap();
    }
    let (code, said, _) = check();
    assert_eq!(code, 0, "{said}");
}

#[test]
fn files_of_the_python_library_load_unchanged() {
    let folder = workspace().join("tests/configurations");
    let loaded = load(&[folder.join("development.yaml")], &[]).unwrap();
    let warned: Vec<&str> = loaded.warnings.iter().map(|warning| warning.key.as_str()).collect();
    assert_eq!(warned, ["app_settings.queue_config.backend"]);
    assert_eq!(loaded.config.app_name, "demo-dev-dev");
    assert_eq!(loaded.config.auth.keys.len(), 1);

    let loaded = load(&[folder.join("production.yaml")], &[]).unwrap();
    let warned: Vec<&str> = loaded.warnings.iter().map(|warning| warning.key.as_str()).collect();
    let deployment = |key: &str| format!("app_settings.deployment_config.{key}");
    for key in ["secrets", "cloud_bucket_mounts[0].secret", "secure"] {
        assert!(warned.contains(&deployment(key).as_str()), "{key}: {warned:?}");
    }
    assert!(!loaded.warnings.iter().any(|warning| warning.why.contains("no effect")), "{warned:?}");
    // The library lets requests name any queue.
    assert!(warned.contains(&"app_settings.queue_config.allowed_queues"), "{warned:?}");
    let digits = &loaded.config.models["digits"];
    let wait = BatchWait::Fixed(Duration::from_millis(20));
    assert_eq!((digits.batch.max_batch_size, digits.batch.wait), (64, wait));
    assert_eq!((digits.replicas.max, digits.replicas.idle_timeout.as_secs()), (4, 300));
    assert_eq!(digits.retries, 3);
    assert_eq!(digits.gpu.as_ref().unwrap().to_string(), "H100 or A100");
    assert_eq!(loaded.config.queues.usual, "taskiq");
    assert_eq!(digits.reload.hook_interval.unwrap().as_secs(), 300);
    assert_eq!(digits.settings.json(), r#"{"path":"digits.onnx","top_k":3}"#);
    assert_eq!(loaded.config.volumes[0].name, "demo-models");

    let files = Files::new();
    let file =
        files.put("broker.toml", "[app_settings.queue_config]\nbroker_url = \"redis://127.0.0.1:6379\"\n");
    let said = load(&[file], &[]).unwrap().warnings[0].to_string();
    assert!(said.contains("broker_url") && said.contains("unless backend says redis or taskiq"), "{said}");
    let file = files.put("other.yaml", "app_settings: {colour: red, batch_config: {max_bach_size: 3}}\n");
    let loaded = load(&[file], &[]).unwrap();
    let said: Vec<String> = loaded.warnings.iter().map(ToString::to_string).collect();
    assert!(said[0].contains("other.yaml:1:16  app_settings.colour: nothing reads this key"), "{said:?}");
    assert!(said[1].contains("did you mean max_batch_size?"), "{said:?}");
}

/// Every key of the Python library's settings, with a value of its type: all of them parse, and are what they say.
#[test]
fn every_setting_of_the_python_library_parses() {
    let table = [
        ("app_settings.app_prefix", json!("demo")),
        ("app_settings.build_config.image", json!("python")),
        ("app_settings.build_config.tag", json!("3.11")),
        ("app_settings.build_config.workdir", json!("/root")),
        ("app_settings.build_config.env", json!({"A": "b"})),
        ("app_settings.build_config.extra_run_commands", json!("apt-get update")),
        ("app_settings.build_config.extra_run_commands", json!(["a", "b"])),
        ("app_settings.deployment_config.region", json!("eu-west-1")),
        ("app_settings.deployment_config.gpu", json!("A100")),
        ("app_settings.deployment_config.gpu", json!(["H100:2", "any"])),
        ("app_settings.deployment_config.volumes", json!({"/mnt/models": "models"})),
        ("app_settings.deployment_config.volume_reload_interval_seconds", json!(-1)),
        ("app_settings.deployment_config.volume_reload_interval_seconds", json!(300)),
        ("app_settings.deployment_config.concurrency_limit", json!(4)),
        ("app_settings.deployment_config.retries", json!(1)),
        ("app_settings.deployment_config.secrets", json!(["a"])),
        (
            "app_settings.deployment_config.mounts",
            json!([{"local_path": "a", "remote_path": "b", "type": "dir"}]),
        ),
        ("app_settings.deployment_config.container_idle_timeout", json!(180)),
        ("app_settings.deployment_config.allow_concurrent_inputs", json!(2)),
        ("app_settings.deployment_config.allow_concurrent_inputs_handler", json!(10)),
        ("app_settings.deployment_config.secure", json!(true)),
        (
            "app_settings.deployment_config.cloud_bucket_mounts",
            json!([{"mount_point": "/m", "bucket_name": "b", "bucket_endpoint_url": "http://127.0.0.1:9000", "key_prefix": "k", "secret": "s", "read_only": true, "requester_pays": true}]),
        ),
        (
            "app_settings.deployment_config.cloud_bucket_mounts",
            json!([{"mount_point": "/m", "bucket_name": "b", "oidc_auth_role_arn": "r"}]),
        ),
        ("app_settings.deployment_config.memory", json!(16384)),
        ("app_settings.deployment_config.cpu", json!(8.5)),
        ("app_settings.batch_config.max_batch_size", json!(64)),
        ("app_settings.batch_config.wait_ms", json!(20)),
        ("app_settings.queue_config.backend", json!("taskiq")),
        ("app_settings.queue_config.broker_url", json!("redis://127.0.0.1:6379")),
        ("app_settings.auth_config.ssm_key", json!("/demo/key")),
        ("model_settings.local_model_repository_folder", json!("./models")),
        ("model_settings.model_entries", json!({"echo": {"any": {"thing": [1, null]}}})),
        ("model_settings.common", json!({"device": "cpu"})),
    ];
    let files = Files::new();
    for (key, value) in table {
        let whole = key.rsplit('.').fold(value.clone(), |inner, step| json!({ step: inner }));
        // JSON is strict about keys, and YAML too where it is JSON.
        for name in ["one.json", "one.yaml"] {
            let file = files.put(name, &whole.to_string());
            let loaded = load(&[file], &[]).unwrap_or_else(|faults| panic!("{key}: {faults}"));
            let found = key.split('.').fold(loaded.json(), |json, step| json[step].clone());
            if key.ends_with("model_entries") || key.ends_with("mounts") {
                continue;
            }
            assert_eq!(
                found.as_f64().map_or(found.clone(), |number| json!(number)),
                value.as_f64().map_or(value.clone(), |number| json!(number)),
                "{key}"
            );
        }
    }
}

#[test]
fn what_check_prints_in_json_is_the_same_configuration_again() {
    let files = Files::new();
    let file = files.put(
        "a.toml",
        "[app_settings.batch_config]\nwait_ms = 3\n[app_settings.deployment_config]\nsecrets = [\"token\"]\nprobation_seconds = 0.5\n\
         [app_settings.deployment_config.volumes]\n\"/mnt/a\" = \"a\"\n[app_settings.auth_config.keys.ci]\nvariable = \"CI_KEY\"\nrequests_per_second = 2.5\n\
         [model_settings.common]\ndevice = \"cpu\"\n[model_settings.model_entries.digits]\nplugin = \"onnx\"\ntop_k = 3\nbatch_config = { wait_ms = 1 }\n",
    );
    let pairs = [("CI_KEY", "a key"), ("TOKEN", "a secret")];
    let (code, json, said) = modalkit(files.0.path(), &["check", "--json", "--config", "a.toml"], &pairs);
    assert_eq!(code, 0, "{json}{said}");
    assert!(!json.contains("a key") && !json.contains("a secret"), "{json}");
    let again = files.put("again.json", &json);
    let (first, second) = (load(&[file], &pairs).unwrap(), load(&[again], &pairs).unwrap());
    assert_eq!(format!("{:?}", first.config.server), format!("{:?}", second.config.server));
    assert_eq!(first.config.models, second.config.models);
    assert_eq!(first.config.defaults, second.config.defaults);
    assert_eq!(first.config.auth, second.config.auth);
    assert_eq!(first.config.volumes, second.config.volumes);
    assert_eq!(first.json(), second.json());
}

#[test]
fn keys_of_a_pipeline_are_told_in_the_same_form() {
    let files = Files::new();
    fs::create_dir(files.0.path().join("volume")).unwrap();
    install(&library("puppet"), &files.0.path().join("volume/puppet.so"));
    files.put(
        "a.toml",
        "[app_settings.deployment_config.volumes]\nvolume = \"v\"\n[model_settings.model_entries.puppet]\nlaod = \"error\"\nneeds = 3\nbatch_confg = {}\n",
    );
    let (code, said, _) = modalkit(files.0.path(), &["check", "--config", "a.toml"], &[]);
    assert_eq!(code, 1, "{said}");
    for part in [
        "a.toml:4:1  model_settings.model_entries.puppet.laod",
        "did you mean load?",
        "a.toml:5:9  model_settings.model_entries.puppet.needs\n  expected  null or string",
        "a.toml:6:1  model_settings.model_entries.puppet.batch_confg",
        "did you mean batch_config?",
    ] {
        assert!(said.contains(part), "{part:?} is not in {said}");
    }
}

#[test]
fn the_schema_takes_the_reference_configuration_and_refuses_wrong_ones() {
    let schema = config::schema();
    let validator = jsonschema::validator_for(&schema).unwrap();
    let text = fs::read_to_string(workspace().join("config/modalkit.toml")).unwrap();
    let reference: Value = serde_json::to_value(toml::from_str::<toml::Table>(&text).unwrap()).unwrap();
    let faults: Vec<String> = validator.iter_errors(&reference).map(|error| error.to_string()).collect();
    assert!(faults.is_empty(), "{faults:?}");
    for wrong in [
        json!({"servr": {}}),
        json!({"app_settings": {"batch_config": {"wait_ms": "5"}}}),
        json!({"app_settings": {"batch_config": {"max_batch_size": 0}}}),
        json!({"server": {"volumes": {"a": {"watch": "notify"}}}}),
    ] {
        assert!(!validator.is_valid(&wrong), "{wrong}");
    }
}

#[test]
fn a_changed_file_is_in_force_without_a_restart_and_a_wrong_one_changes_nothing() {
    let entry = |name: &str, more: &str| {
        format!("[model_settings.model_entries.{name}]\nplugin = \"puppet\"\n{more}\n")
    };
    let mut host = Setup::new().plugin("puppet").config(&entry("a", "")).ready();
    let model = |host: &Host, name: &str, key: &str| host.model(name)[key].clone();
    let last = |host: &Host| host.get("/config").1["last_change"].clone();

    // Batches change at once, in the same generation.
    host.configure(&entry("a", "batch_config = { max_batch_size = 7, wait_ms = 3 }"));
    wait_until("the batches are others", || model(&host, "a", "max_batch_size") == 7);
    assert_eq!(model(&host, "a", "wait_ms"), 3);
    assert_eq!(model(&host, "a", "generation")["number"], 1);
    wait_until("it was told", || last(&host)["outcome"] == "applied");
    assert_eq!(last(&host)["models"]["changed"], json!(["a"]));

    // So do replicas.
    host.configure(&entry("a", "deployment_config = { min_replicas = 3, concurrency_limit = 3 }"));
    wait_until("there are three", || model(&host, "a", "replicas") == 3);
    host.configure(&entry("a", "deployment_config = { concurrency_limit = 1 }"));
    wait_until("there is one", || model(&host, "a", "replicas") == 1);
    assert_eq!(model(&host, "a", "generation")["number"], 1);

    // What the pipeline is loaded with needs a new generation, which comes in as any other does.
    host.configure(&entry("a", "load = \"well\""));
    wait_until("a new generation serves", || model(&host, "a", "generation")["number"] == 2);
    assert_eq!(host.report("a")["last"]["cause"], "configuration");
    host.configure(&entry("a", "load = \"error\""));
    wait_until("one that doesn't load is refused", || host.report("a")["last"]["outcome"] == "refused");
    assert_eq!(host.post("/predict_sync?model_name=a", &json!({})).0, 200, "the one before serves");
    assert_eq!(model(&host, "a", "generation")["number"], 2);

    // A wrong file changes nothing: not what is right in it either. The pipeline's own keys count.
    for (wrong, said) in [
        (entry("a", "laod = 1") + &entry("b", ""), "model_settings.model_entries.a.laod"),
        (entry("a", "batch_config = { wait_ms = -1 }") + &entry("b", ""), "a.batch_config.wait_ms"),
        ("[server]\nlog = \"modalkit=loud\"\n".to_owned() + &entry("b", ""), "server.log"),
    ] {
        host.configure(&wrong);
        wait_until(said, || {
            let last = last(&host);
            last["outcome"] == "refused" && last["errors"][0]["key"].as_str().unwrap().ends_with(said)
        });
        assert_eq!(host.models(), 1);
        assert_eq!(host.post("/predict_sync?model_name=a", &json!({})).0, 200);
    }

    // Models come and go, and what needs a restart says so.
    host.configure(&("[server]\nbody_bytes_max = 1000\n".to_owned() + &entry("b", "") + &entry("c", "")));
    wait_until("two others serve", || {
        ["b", "c"].iter().all(|name| model(&host, name, "state") == "ready") && host.models() == 2
    });
    wait_until("it was told", || last(&host)["outcome"] == "applied");
    assert_eq!(last(&host)["restart"], json!(["server.body_bytes_max"]));
    assert_eq!(
        last(&host)["models"],
        json!({"added": ["b", "c"], "removed": ["a"], "changed": [], "reloading": []})
    );
    assert_eq!(host.post("/config/reload", &json!({})).1["outcome"], "unchanged");
}

#[test]
fn a_file_that_looks_cut_short_is_taken_when_it_has_held_still_or_when_somebody_says_so() {
    let entry = |name: &str| format!("[model_settings.model_entries.{name}]\nplugin = \"puppet\"\n");
    let mut host = Setup::new().plugin("puppet").config(&(entry("a") + &entry("b"))).ready();
    let file = host.folder().join("modalkit.toml");
    let whole = fs::read_to_string(&file).unwrap();
    // At a section's end: as good a configuration as any.
    let cut = whole.split_once("[model_settings.model_entries.b]").unwrap().0;
    let written = Instant::now();
    fs::write(&file, cut).unwrap();
    wait_until("it has held still", || host.models() == 1);
    let waited = written.elapsed();
    assert!(waited > Duration::from_secs(9), "{waited:?} after a cut at the end of a section");
    let _ = host.log_line("modalkit.toml looks cut short: the configuration is read again when");
    // What is no beginning of what is in force is taken as soon as two looks have seen it.
    host.configure(&(entry("a") + &entry("b") + &entry("c")));
    wait_until("all three are there", || host.models() == 3);
    // In the middle of a line, and by somebody's word.
    let whole = fs::read_to_string(&file).unwrap();
    fs::write(&file, whole.split_once("\n[model_settings.model_entries.b]").unwrap().0).unwrap();
    assert_eq!(host.post("/config/reload", &json!({})).1["models"]["removed"], json!(["b", "c"]));
    assert_eq!(host.models(), 1);
}

#[test]
fn an_env_file_that_is_emptied_or_removed_is_refused() {
    let host = Setup::new().plugin("echo").env_file("MODALKIT_SERVER__LOG=debug\n").ready();
    let file = host.folder().join(".env");
    fs::write(&file, "# MODALKIT_SERVER__LOG=debug\n").unwrap();
    let (status, change) = host.post("/config/reload", &json!({}));
    assert!(status == 409 && change.to_string().contains(".env"), "{status} {change}");
    fs::remove_file(&file).unwrap();
    let (status, change) = host.post("/config/reload", &json!({}));
    assert!(status == 409 && change.to_string().contains("no file"), "{status} {change}");
    fs::write(&file, "MODALKIT_SERVER__LOG=info\n").unwrap();
    assert_eq!(host.post("/config/reload", &json!({})).1["outcome"], "applied");
}

#[test]
fn a_model_may_change_its_plugin_and_what_was_gone_back_from_stays_away() {
    let entry =
        |plugin: &str, more: &str| format!("[model_settings.model_entries.a]\nplugin = {plugin:?}\n{more}\n");
    let mut host = Setup::new().plugin("echo").plugin("puppet").config(&entry("echo", "")).ready();
    let names = |host: &Host| {
        let models = host.get("/models").1["models"].as_array().unwrap().clone();
        models.iter().map(|model| model["name"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let apply = |host: &mut Host, config: &str| {
        host.configure(config);
        let _ = host.post("/config/reload", &json!({}));
        host.post("/config/reload", &json!({})).1
    };
    assert_eq!(names(&host), ["a", "puppet"]);
    assert_eq!(apply(&mut host, &entry("puppet", ""))["outcome"], "unchanged", "the second time");
    wait_until("the other plugin serves", || {
        host.model("a")["generation"]["plugin_name"] == "fixture-puppet"
    });
    assert_eq!(names(&host), ["a", "echo"], "each plugin without an entry serves under its own name");

    // One that isn't there is waited for; settings that come meanwhile are for that one.
    let _ = apply(&mut host, &entry("nowhere", ""));
    wait_until("it says so", || {
        host.report("a")["last"]["reason"].as_str().is_some_and(|why| why.contains("nowhere.so"))
    });
    let _ = apply(&mut host, &entry("nowhere", "load = \"for another\""));
    assert_eq!(host.model("a")["generation"]["plugin_name"], "fixture-puppet");
    assert_eq!(host.post("/predict_sync?model_name=a", &json!({})).0, 200, "what served serves on");

    // What somebody went back from doesn't come again with other settings.
    let setup = Setup::new().config("[app_settings.deployment_config]\nprobation_seconds = 0\n");
    modalkit_tests::Version::good(1).install(&setup.volume());
    let mut host = setup.ready();
    modalkit_tests::Version::good(2).install(&host.volume());
    let version = |host: &Host| {
        host.post("/predict_sync?model_name=versioned", &json!({"text": "a"})).1["version"].clone()
    };
    wait_until("version 2 serves", || version(&host) == 2);
    assert_eq!(host.post("/models/versioned/rollback", &json!({})).0, 200);
    assert_eq!(version(&host), 1);
    let common = "[app_settings.deployment_config]\nprobation_seconds = 0\n[model_settings.common]\nx = 1\n";
    let _ = apply(&mut host, common);
    wait_until("a new generation serves", || host.report("versioned")["last"]["cause"] == "configuration");
    assert_eq!(version(&host), 1);
    assert_eq!(host.report("versioned")["as_configured"], true);
    // The generation before brings its settings along.
    assert_eq!(host.post("/models/versioned/rollback", &json!({})).0, 200);
    assert_eq!(host.report("versioned")["as_configured"], false);
}

#[test]
fn the_log_is_as_talkative_as_the_configuration_says_now_plugins_included() {
    let mut host = Setup::new().plugin("puppet").config("[server]\nlog = \"warn,modalkit=info\"").ready();
    let speak = |host: &Host| assert_eq!(host.post("/predict_sync", &json!({"do": "log"})).0, 200);
    let lines = |host: &Host| {
        host.log()
            .iter()
            .filter(|line| line["message"].as_str().is_some_and(|text| text.starts_with("a line through")))
            .count()
    };
    speak(&host);
    wait_until("the plugin's warnings are there", || lines(&host) == 2);
    host.configure("[server]\nlog = \"warn,modalkit=info,puppet=error\"");
    let _ = host.log_line("the changed configuration is in force");
    speak(&host);
    // What it might have said would be there before this.
    assert_eq!(host.post("/predict_sync", &json!({"do": "panic in predict"})).0, 500);
    let _ = host.log_line("a batch failed");
    assert_eq!(lines(&host), 2);
    host.configure("[server]\nlog = \"info,modalkit=debug\"");
    wait_until("the host says more, and its plugin too", || {
        speak(&host);
        host.log().iter().any(|line| line["level"] == "DEBUG") && lines(&host) > 2
    });
}

#[test]
fn files_are_put_in_place_before_pipelines_load() {
    let setup = Setup::new().plugin("puppet");
    let (from, to) = (setup.folder().join("needed"), setup.volume().join("needed"));
    fs::write(&from, "1").unwrap();
    let config = format!(
        "[[app_settings.deployment_config.mounts]]\nlocal_path = {:?}\nremote_path = {:?}\n[model_settings.model_entries.puppet]\nneeds = \"needed\"\n",
        from.display().to_string(),
        to.display().to_string()
    );
    let host = setup.config(&config).ready();
    assert_eq!(fs::read_to_string(&to).unwrap(), "1");
    fs::write(&from, "2").unwrap();
    assert_eq!(host.post("/config/reload", &json!({})).1["outcome"], "unchanged");
    assert_eq!(fs::read_to_string(&to).unwrap(), "2");
}
