//! Buckets as volumes, against real stores: what is mirrored, what of it is ever seen, and what happens where a store fails.

mod with_azurite;
mod with_gcs;
mod with_moto;
mod with_s3s;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use modalkit_tests::{Host, PATIENCE, Setup, stores::Store, wait_at_most, wait_until};
use serde_json::{Value, json};

/// Objects that are mirrored: more than two pages of a listing.
const OBJECTS: usize = 2_100;
/// Files that belong together: each has the number of its group's last change.
const GROUP: usize = 3;
/// Looks of a reader, and changes meanwhile.
const LOOKS: usize = 1_000;
const ROUNDS: usize = 8;
/// What objects must hold still for before they are shown.
const SETTLE: Duration = Duration::from_secs(2);

/// A host with a bucket mount at `weights` in its own folder.
pub(super) fn mounted(setup: Setup, endpoint: &str, secret: &str, keys: &str) -> Setup {
    let mount_point = mount_point(&setup.folder()).display().to_string();
    let poll = if keys.contains("poll_interval_ms") { "" } else { "poll_interval_ms = 200" };
    setup.variable("BUCKET_KEYS", secret).config(&format!(
        "[[app_settings.deployment_config.cloud_bucket_mounts]]\nmount_point = {mount_point:?}\nbucket_name = \"demo\"\n\
         bucket_endpoint_url = {endpoint:?}\nsecret = \"bucket-keys\"\n{poll}\n{keys}"
    ))
}

pub(super) fn mount_point(folder: &Path) -> PathBuf {
    folder.join("mnt/weights")
}

/// How the mirror is, as `/health` says.
pub(super) fn bucket(host: &Host) -> Value {
    host.get("/health").1["buckets"]["weights"].clone()
}

pub(super) fn mirrored(host: &Host, objects: usize) {
    wait_at_most(PATIENCE * 4, "the bucket is mirrored", || bucket(host)["objects"] == objects);
}

/// Has the bucket listed now; status and answer.
pub(super) fn sync(host: &Host) -> (u16, Value) {
    host.post("/volumes/weights/reload", &Value::Null)
}

/// Every file below a folder, with its content, by its path there.
pub(super) fn files(folder: &Path) -> BTreeMap<String, String> {
    // One snapshot, whichever takes its place meanwhile.
    let folder = &fs::canonicalize(folder).unwrap();
    let mut found = BTreeMap::new();
    let mut folders = vec![folder.clone()];
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(&next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let name = path.strip_prefix(folder).unwrap().display().to_string();
                found.insert(name, fs::read_to_string(path).unwrap());
            }
        }
    }
    found
}

/// The files of one group; with other names after each renaming.
fn group(number: usize, version: usize, renamed: usize) -> Vec<(String, String)> {
    let name = |file| format!("models/{number:04}/{renamed}-{file}.bin");
    (0..GROUP).map(|file| (name(file), format!("group {number} version {version}"))).collect()
}

/// What is wrong with a snapshot: a group that isn't whole, or whose files are of different versions.
fn mixed(files: &BTreeMap<String, String>) -> Option<String> {
    let mut groups: BTreeMap<&str, Vec<(&String, &String)>> = BTreeMap::new();
    for (path, content) in files {
        groups.entry(path.rsplit_once('/').unwrap().0).or_default().push((path, content));
    }
    let is_whole = |group: &Vec<(&String, &String)>| {
        group.len() == GROUP && group.iter().all(|(_, content)| *content == group[0].1)
    };
    groups.into_values().find(|group| !is_whole(group)).map(|group| format!("{group:?}"))
}

/// A bucket of many objects is mirrored, and followed: no look into the folder ever sees a part of a change.
pub(super) fn is_followed(store: &Store, looks_min: usize, rounds: usize) {
    let groups = OBJECTS / GROUP;
    let mut versions: BTreeMap<usize, (usize, usize)> = (0..groups).map(|number| (number, (0, 0))).collect();
    let objects = |number: usize, (version, renamed): (usize, usize)| {
        group(number, version, renamed)
            .into_iter()
            .map(|(path, content)| (format!("v3/{path}"), content.into_bytes()))
    };
    store.put_all(versions.iter().flat_map(|(number, state)| objects(*number, *state)));
    // Beside the prefix, and not of it.
    store.put("v30/other.bin", "another prefix's");
    let host =
        mounted(Setup::new(), &store.endpoint, &store.secret(), "key_prefix = \"v3/\"\nread_only = true")
            .start();
    mirrored(&host, OBJECTS);
    let mount = mount_point(&host.folder());
    assert_eq!(files(&mount).len(), OBJECTS);
    let (looks, stop) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
    let (counted, stopped, looked_at) = (Arc::clone(&looks), Arc::clone(&stop), mount.clone());
    let reader = thread::spawn(move || {
        let mut seen = Vec::new();
        while !stopped.load(Ordering::SeqCst) || counted.load(Ordering::SeqCst) < looks_min {
            // One look: the folder is resolved once, and then read.
            let snapshot = fs::canonicalize(&looked_at).unwrap();
            let found = files(&snapshot);
            if let Some(mixed) = mixed(&found) {
                return Err(mixed);
            }
            seen.push(snapshot);
            counted.fetch_add(1, Ordering::SeqCst);
        }
        seen.dedup();
        Ok(seen.len())
    });
    // Each round changes some groups, adds, removes and renames others, within less than what must hold still.
    for round in 1..=rounds {
        let begun = Instant::now();
        for number in (round..groups).step_by(120) {
            let state = versions.get_mut(&number);
            match (round + number) % 4 {
                0 => drop(versions.insert(groups + number * 10 + round, (round, 0))),
                1 => {
                    let Some(state) = versions.remove(&number) else { continue };
                    objects(number, state).for_each(|(key, _)| store.delete(&key));
                }
                2 => {
                    let Some(state) = state else { continue };
                    let before = *state;
                    state.1 = round;
                    store.put_all(objects(number, *state));
                    objects(number, before).for_each(|(key, _)| store.delete(&key));
                }
                _ => {
                    let Some(state) = state else { continue };
                    state.0 = round;
                    store.put_all(objects(number, *state));
                }
            }
        }
        let added = versions.iter().filter(|(number, state)| **number >= groups && state.0 == round);
        store.put_all(added.flat_map(|(number, state)| objects(*number, *state)));
        assert!(
            begun.elapsed() < SETTLE,
            "the store is too slow for this test: a change took {:?}",
            begun.elapsed()
        );
        let expected = versions.len() * GROUP;
        mirrored(&host, expected);
        wait_until("the change is shown", || {
            let shown = files(&mount);
            let wanted: BTreeMap<String, String> =
                versions.iter().flat_map(|(number, state)| group(*number, state.0, state.1)).collect();
            shown == wanted
        });
    }
    stop.store(true, Ordering::SeqCst);
    let snapshots =
        reader.join().unwrap().unwrap_or_else(|mixed| panic!("a look saw a mixed snapshot: {mixed}"));
    assert!(snapshots >= rounds && looks.load(Ordering::SeqCst) >= looks_min, "{snapshots} snapshots");
    let text = host.text("/metrics");
    assert!(text.contains("modalkit_bucket_listings_total{outcome=\"ok\",volume=\"weights\"}"), "{text}");
}

/// The store goes away: what is mirrored goes on being served, also by a host that starts without the store.
pub(super) fn survives_its_store(store: &mut Store) {
    store.put("v3/versioned.txt", "mirrored");
    let data = format!("[model_settings]\nlocal_model_repository_folder = {:?}\n", "WEIGHTS");
    let setup = Setup::new().plugin("versioned");
    let data = data.replace("WEIGHTS", &mount_point(&setup.folder()).display().to_string());
    let setup = setup.config(&data);
    let mut host = mounted(setup, &store.endpoint, &store.secret(), "key_prefix = \"v3\"").ready();
    let ask = |host: &Host| host.post("/predict_sync", &json!({"text": "a"})).1["data"].clone();
    assert_eq!(ask(&host), "mirrored");
    store.server.kill();
    wait_until("it is said that the bucket is away", || bucket(&host)["reason"] == "store");
    assert_eq!(host.get("/health").1["status"], "degraded");
    assert_eq!(host.get("/readyz").0, 200, "what is mirrored serves");
    assert_eq!(ask(&host), "mirrored");
    let told = host.log_line("the bucket can't be mirrored; what was mirrored before goes on being served");
    assert_eq!((told["volume"].as_str(), told["level"].as_str()), (Some("weights"), Some("WARN")));
    let (status, said) = sync(&host);
    assert_eq!(status, 502, "{said}");
    assert!(said["detail"].as_str().unwrap().contains("what was mirrored is served on"), "{said}");
    wait_until("its age shows", || host.metric("modalkit_bucket_age_seconds{volume=\"weights\"}") >= 2.0);
    host.signal("TERM");
    host.wait();
    host.start_again();
    wait_until("it serves without its store", || host.get("/readyz").0 == 200);
    assert_eq!(ask(&host), "mirrored");
}
