//! S3 as moto speaks it, and what stores and networks do when they fail.

use std::{fs, thread, time::Duration};

use super::{
    LOOKS, ROUNDS, bucket, files, is_followed, mirrored, mount_point, mounted, survives_its_store, sync,
};
use modalkit_tests::{
    Host, PATIENCE, Setup, Version,
    stores::{Fault, Proxy, Store},
    wait_at_most, wait_until,
};
use serde_json::json;

#[test]
fn a_large_bucket_is_followed_and_no_look_sees_half_a_change() {
    is_followed(&Store::moto(), LOOKS, ROUNDS);
}

#[test]
fn a_store_that_goes_away_takes_nothing_along() {
    let mut store = Store::moto();
    survives_its_store(&mut store);
}

/// A model whose data is mirrored through a proxy, and answers.
struct Served {
    store: Store,
    proxy: Proxy,
    host: Host,
}

impl Served {
    fn new(keys: &str) -> Self {
        let store = Store::moto();
        let proxy = Proxy::before(&store);
        store.put("versioned.txt", "1");
        let setup = Setup::new().plugin("versioned");
        let folder = mount_point(&setup.folder()).display().to_string();
        let setup = setup.config(&format!("[model_settings]\nlocal_model_repository_folder = {folder:?}"));
        let host = mounted(setup, &proxy.endpoint, &store.secret(), keys).ready();
        Self { store, proxy, host }
    }

    fn data(&self) -> String {
        self.host.post("/predict_sync", &json!({"text": "a"})).1["data"].as_str().unwrap().to_owned()
    }

    fn serves(&self, data: &str) {
        wait_until(&format!("{data:?} is served"), || self.data() == data);
    }
}

#[test]
fn whatever_a_store_does_what_serves_goes_on_and_what_is_wrong_is_said() {
    let served = Served::new("");
    served.serves("1");
    for (number, (fault, reason)) in [
        (Fault::Away, "store"),
        (Fault::Status(500), "store"),
        (Fault::Status(503), "store"),
        (Fault::Status(403), "refused"),
        (Fault::ObjectStatus(403), "refused"),
        (Fault::ObjectStatus(412), "changing"),
        (Fault::Cut(150), "store"),
    ]
    .into_iter()
    .enumerate()
    {
        let (before, after) = (format!("{}", number + 1), format!("{}", number + 2));
        served.proxy.fail(fault.clone());
        served.store.put("versioned.txt", after.as_str());
        wait_until(&format!("{fault:?} is told"), || bucket(&served.host)["reason"] == reason);
        assert_eq!(served.data(), before, "{fault:?}");
        assert_eq!(served.host.get("/readyz").0, 200);
        served.proxy.fail(Fault::None);
        served.serves(&after);
        wait_until("nothing is wrong any more", || bucket(&served.host)["reason"].is_null());
    }
    // Slow is not wrong.
    served.proxy.fail(Fault::Slow(16));
    served.store.put("versioned.txt", "slow");
    served.serves("slow");
    // Nobody waits for one that hangs: neither callers nor the end of the host.
    served.proxy.fail(Fault::Hangs);
    served.store.put("versioned.txt", "never");
    thread::sleep(Duration::from_millis(500));
    assert_eq!(served.data(), "slow");
    wait_at_most(PATIENCE * 2, "it is told that the store hangs", || {
        bucket(&served.host)["reason"] == "store"
    });
    assert_eq!(served.data(), "slow");
    let Served { mut host, .. } = served;
    host.signal("TERM");
    assert!(host.wait().success());
}

#[test]
fn a_change_calls_the_hook_once_and_a_reload_can_be_asked_for() {
    let served = Served::new("poll_interval_ms = 600000");
    served.serves("1");
    served.store.put("versioned.txt", "2");
    let (status, report) = sync(&served.host);
    assert_eq!(status, 200, "{report}");
    assert_eq!(report["mirrored"], json!({"snapshot": 2, "fetched": 1, "removed": 0}));
    assert_eq!(report["models"]["versioned"]["hook"]["errors"], json!([null]), "{report}");
    let answer = served.host.post("/predict_sync", &json!({"text": "a"})).1;
    assert_eq!((answer["data"].as_str(), answer["hooks"].as_u64()), (Some("2"), Some(1)));
    // Nothing has changed: whoever asks has the hook called all the same, as of any volume.
    assert_eq!(sync(&served.host).1["mirrored"]["fetched"], 0);
}

#[test]
fn models_wait_for_the_first_mirror_of_what_they_use() {
    let store = Store::moto();
    let proxy = Proxy::before(&store);
    store.put("versioned.txt", "1");
    proxy.fail(Fault::Hangs);
    let setup = Setup::new();
    Version::bad(1, "load-data").install(&setup.volume());
    let folder = mount_point(&setup.folder()).display().to_string();
    let data = setup.folder().join("data");
    let setup = setup.plugin("echo").config(&format!(
        "[model_settings]\nlocal_model_repository_folder = {:?}\n[model_settings.model_entries.versioned]\nweights = {folder:?}\n",
        data.display().to_string()
    ));
    let host = mounted(setup, &proxy.endpoint, &store.secret(), "").start();
    wait_until("what doesn't use the bucket serves", || {
        host.post("/predict_sync?model_name=echo", &json!({"text": "a"})).0 == 200
    });
    thread::sleep(Duration::from_millis(500));
    assert_eq!(host.get("/readyz").0, 503);
    assert!(host.log().iter().all(|line| !line.to_string().contains("versioned.txt is missing")));
    drop(host);
}

#[test]
fn a_start_waits_for_a_bucket_that_is_away_for_so_long_only() {
    let store = Store::moto();
    let proxy = Proxy::before(&store);
    store.put("versioned.txt", "1");
    proxy.fail(Fault::Away);
    let setup = Setup::new().plugin("versioned").config("[server]\nbucket_wait_seconds = 1\n");
    let folder = mount_point(&setup.folder()).display().to_string();
    let setup = setup.config(&format!("[model_settings]\nlocal_model_repository_folder = {folder:?}"));
    let host = mounted(setup, &proxy.endpoint, &store.secret(), "").start();
    let _ = host.log_line("the bucket was not mirrored within server.bucket_wait_seconds; models that use it are loaded with what is there");
    wait_until("the model serves without its data", || host.get("/readyz").0 == 200);
    let ask = || host.post("/predict_sync", &json!({"text": "a"})).1["data"].clone();
    assert_eq!(ask(), "");
    proxy.fail(Fault::None);
    wait_until("what comes later is taken", || ask() == "1");
}

#[test]
fn a_plugin_from_a_bucket_wants_a_pin_or_the_mounts_word() {
    let store = Store::moto();
    let first = Version::good(1);
    store.put("versioned.so", first.bytes());
    let mut host = mounted(Setup::new(), &store.endpoint, &store.secret(), "").start();
    let refused = host.logged("the plugin is refused", |line| {
        let text = line.to_string();
        text.contains("it lies in a bucket")
            && text.contains("plugin_sha256 = ")
            && text.contains("plugins_from_buckets")
    });
    let text = refused.to_string();
    let pin_of = |text: &str| -> String {
        let (_, rest) = text.split_once("plugin_sha256 = ").unwrap();
        rest.chars().filter(char::is_ascii_hexdigit).take(64).collect()
    };
    assert_eq!(host.post("/predict_sync", &json!({"text": "a"})).0, 503);
    // Nor does a look at the configuration run its code.
    let check = std::process::Command::new(modalkit_tests::built().join("modalkit"))
        .args(["check", "--config", "modalkit.toml"])
        .env("BUCKET_KEYS", store.secret())
        .env("MODALKIT_MODEL_SETTINGS__MODEL_ENTRIES__VERSIONED", "{}")
        .current_dir(host.folder())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&check.stdout);
    assert!(said.contains("a plugin in a bucket, whose content nobody names"), "{said}");
    let base = {
        let mount = mount_point(&host.folder()).display().to_string();
        format!(
            "[[app_settings.deployment_config.cloud_bucket_mounts]]\nmount_point = {mount:?}\nbucket_name = \"demo\"\n\
             bucket_endpoint_url = {:?}\nsecret = \"bucket-keys\"\npoll_interval_ms = 200\n",
            store.endpoint
        )
    };
    let pinned =
        |pin: &str| format!("{base}[model_settings.model_entries.versioned]\nplugin_sha256 = {pin:?}\n");
    host.configure(&pinned(&pin_of(&text)));
    let version = |host: &Host| host.post("/predict_sync", &json!({"text": "a"})).1["version"].clone();
    wait_until("the pinned content serves", || version(&host) == 1);
    // A new one is served with its own pin, and not before.
    store.put("versioned.so", Version::good(2).bytes());
    let refused = host.logged("the new content is refused", |line| line.to_string().contains("pins"));
    assert_eq!(version(&host), 1);
    let (_, rest) = refused
        .to_string()
        .split_once("it has the SHA-256 ")
        .map(|(a, b)| (a.to_owned(), b.to_owned()))
        .unwrap();
    host.configure(&pinned(&rest[..64]));
    wait_until("the new content serves", || version(&host) == 2);
    // Or the mount takes all.
    let host = mounted(Setup::new(), &store.endpoint, &store.secret(), "plugins_from_buckets = true").start();
    wait_until("it serves without a pin", || version(&host) == 2);
}

#[test]
fn keys_that_can_be_no_files_are_named_and_the_mirror_stays() {
    let store = Store::moto();
    store.put("a b/c#%25?ä.txt", "one");
    store.put("empty/__init__.py", "");
    let host = mounted(Setup::new(), &store.endpoint, &store.secret(), "read_only = true").start();
    mirrored(&host, 2);
    let mount = mount_point(&host.folder());
    let shown = || files(&mount).into_keys().collect::<Vec<_>>();
    assert_eq!(shown(), ["a b/c#%25?ä.txt", "empty/__init__.py"]);
    for (key, named) in [("x//y", "x//y"), ("a%20b", "a b")] {
        store.put_raw(key, "content");
        wait_until(&format!("{key} is named"), || {
            let now = bucket(&host);
            now["reason"] == "key" && now["error"].as_str().is_some_and(|said| said.contains(named))
        });
        assert_eq!(shown().len(), 2);
        let (status, _) = modalkit_tests::stores::delete_raw(&store, key);
        assert!(status < 300);
        wait_until("the mirror goes on", || bucket(&host)["reason"].is_null());
    }
    // Markers of folders, as consoles of clouds make them.
    store.put_raw("marked/", "");
    store.put_raw("alone/", "");
    store.put("marked/file.txt", "one");
    mirrored(&host, 4);
    assert!(mount.join("alone").is_dir());
    assert_eq!(shown(), ["a b/c#%25?ä.txt", "empty/__init__.py", "marked/file.txt"]);
}

#[test]
fn files_go_up_conflicts_are_kept_and_the_rest_goes_up_after_an_outage() {
    let store = Store::moto();
    let proxy = Proxy::before(&store);
    store.put("labels.json", "[]");
    let mut host = mounted(Setup::new(), &proxy.endpoint, &store.secret(), "").start();
    mirrored(&host, 1);
    let mount = mount_point(&host.folder());
    fs::create_dir_all(mount.join("out/deep")).unwrap();
    fs::write(mount.join("out/deep/a.json"), "1").unwrap();
    wait_until("it has gone up", || store.object("out/deep/a.json").as_deref() == Some(b"1"));
    proxy.fail(Fault::ObjectStatus(403));
    fs::write(mount.join("out/b.json"), "2").unwrap();
    let _ =
        host.log_line("files that were written below the mount can't go up; they are kept, and tried again");
    assert_eq!(bucket(&host)["unwritten_files"], 1);
    // It is kept by the next process as well.
    host.kill();
    proxy.fail(Fault::None);
    host.start_again();
    wait_until("it has gone up", || store.object("out/b.json").as_deref() == Some(b"2"));
    mirrored(&host, 3);
    // Large ones go up in parts.
    let large = vec![7_u8; 20 << 20];
    fs::write(mount.join("out/large.bin"), &large).unwrap();
    wait_until("it has gone up", || store.object("out/large.bin").is_some_and(|content| content == large));
    // The last one goes up while the host ends; where that takes too long, the log says so, and the next host does it.
    fs::write(mount.join("out/last.json"), "3").unwrap();
    host.signal("TERM");
    assert!(host.wait().success());
    if store.object("out/last.json").is_none() {
        let is_told = |line: &serde_json::Value| {
            line.to_string().contains("have not gone up; they do when a host starts again")
        };
        assert!(host.log().iter().any(is_told));
        host.start_again();
        wait_until("it has gone up", || store.object("out/last.json").is_some());
    }
    assert_eq!(store.object("out/last.json").as_deref(), Some(&b"3"[..]));
}

#[test]
fn what_was_fetched_is_not_fetched_again() {
    let store = Store::moto();
    let proxy = Proxy::before(&store);
    // Four parts; of each answer a quarter comes.
    let large: Vec<u8> = (0..32_u32 << 20).map(|at| (at % 251) as u8).collect();
    store.put("large.bin", large.clone());
    store.put_all((0..8).map(|number| (format!("small/{number}"), vec![number; 1000])));
    proxy.fail(Fault::Slow(64 << 10));
    let mut host = mounted(Setup::new(), &proxy.endpoint, &store.secret(), "read_only = true").start();
    let fetching = |host: &Host| bucket(host)["fetching"]["bytes"].as_u64().unwrap_or_default();
    wait_until("some parts are there", || {
        let incoming = host.folder().join("state/buckets/weights/incoming");
        let parts = fs::read_dir(incoming).into_iter().flatten().flatten();
        let done = |path: std::path::PathBuf| {
            path.extension().is_some_and(|kind| kind == "parts")
                && fs::read_to_string(path).is_ok_and(|text| text.lines().count() > 2)
        };
        parts.map(|entry| entry.path()).any(done)
    });
    host.kill();
    proxy.fail(Fault::Slow(16 << 10));
    host.start_again();
    wait_until("the fetch goes on", || fetching(&host) >= 16 << 20);
    proxy.fail(Fault::None);
    mirrored(&host, 9);
    assert_eq!(fs::read(mount_point(&host.folder()).join("large.bin")).unwrap(), large);
}

#[test]
fn more_than_the_limit_is_not_mirrored() {
    let store = Store::moto();
    store.put("a", "0123456789");
    let host = mounted(Setup::new(), &store.endpoint, &store.secret(), "bucket_bytes_max = 10").start();
    mirrored(&host, 1);
    store.put("b", "1");
    wait_until("the limit is told", || bucket(&host)["reason"] == "too_much");
    let said = bucket(&host)["error"].to_string();
    assert!(said.contains("bucket_bytes_max") && said.contains("11 bytes"), "{said}");
    assert!(!mount_point(&host.folder()).join("b").exists());
}

#[test]
fn the_caller_pays_where_the_mount_says_so() {
    let store = Store::moto();
    let proxy = Proxy::before(&store);
    store.put("a", "one");
    let host = mounted(Setup::new(), &proxy.endpoint, &store.secret(), "requester_pays = true").start();
    mirrored(&host, 1);
    let seen = proxy.seen();
    assert!(seen.len() >= 2);
    for head in seen {
        assert!(head.to_ascii_lowercase().contains("x-amz-request-payer: requester"), "{head}");
    }
}

#[test]
fn a_roles_credentials_are_asked_for_with_the_workloads_token() {
    let store = Store::moto();
    let proxy = Proxy::before(&store);
    store.put("a", "one");
    let setup = Setup::new();
    let token = setup.folder().join("token");
    fs::write(&token, "the-workloads-own-token").unwrap();
    let mount = mount_point(&setup.folder()).display().to_string();
    let host = setup
        .variable("AWS_WEB_IDENTITY_TOKEN_FILE", &token.display().to_string())
        .variable("AWS_ENDPOINT_URL_STS", &proxy.endpoint)
        .variable("AWS_REGION", "us-east-1")
        .config(&format!(
            "[[app_settings.deployment_config.cloud_bucket_mounts]]\nmount_point = {mount:?}\nbucket_name = \"demo\"\n\
             bucket_endpoint_url = {:?}\noidc_auth_role_arn = \"arn:aws:iam::123456789012:role/demo\"\npoll_interval_ms = 200",
            proxy.endpoint
        ))
        .start();
    mirrored(&host, 1);
    let seen = proxy.seen();
    let asked = seen.iter().find(|head| head.contains("AssumeRoleWithWebIdentity")).unwrap();
    assert!(asked.contains("role%2Fdemo") || asked.contains("role/demo"), "{asked}");
    // Those that moto gave, and not any from elsewhere.
    assert!(
        seen.iter().any(|head| head.contains("list-type=2") && head.contains("x-amz-security-token")),
        "{seen:?}"
    );
}

#[test]
fn a_confined_process_reads_each_snapshot() {
    let store = Store::moto();
    store.put("versioned.txt", "1");
    let setup = Setup::new().plugin("versioned");
    let folder = mount_point(&setup.folder()).display().to_string();
    let setup = setup.config(&format!(
        "[app_settings.deployment_config]\nisolation = \"process\"\nsandbox = true\n[model_settings]\nlocal_model_repository_folder = {folder:?}"
    ));
    let host = mounted(setup, &store.endpoint, &store.secret(), "").ready();
    let data = || host.post("/predict_sync", &json!({"text": "a"})).1["data"].clone();
    assert_eq!(data(), "1");
    for next in ["2", "3"] {
        store.put("versioned.txt", next);
        wait_until("what comes later is read as well", || data() == next);
    }
}
