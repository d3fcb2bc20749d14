//! Configuration: what was written (`keys`) and what it means (`resolved`) are different types. It owns files, environment and
//! limits, and never knows who uses them.
//!
//! Each file and the environment become located values (`node`), each of these a typed layer (`layer`, `keys`, `types`); layers
//! are merged, later ones over earlier ones, and the whole is resolved. What is wrong in any of them is told at once (`fault`).

mod auth;
mod buckets;
mod declare;
mod environment;
mod fault;
mod files;
mod keys;
mod layer;
mod node;
mod place;
mod queues;
mod resolve;
mod resolve_server;
mod resolved;
mod secrets;
mod sources;
mod types;

use std::{
    path::{Path, PathBuf},
    sync::OnceLock,
};

use serde_json::{Value as Json, json};

pub use buckets::Bucket;
pub use environment::Environment;
pub use fault::{Fault, Faults, Place, Warning};
pub use layer::Row;
pub use place::{HostPlace, host_place};
pub use resolved::{
    AuthSpec, BatchPolicy, BatchWait, Config, ConsumeSpec, ContainerSpec, GoldenSpec, JobSpec, KeyLimits,
    KeySource, KeySpec, ModelSpec, Mount, Probation, QueueSpec, Recycle, ReloadDevices, ReloadPolicy,
    Replicas, SecretText, Server, Settings, SsmSpec, Task, TlsFiles, TraceSpec, Volume, Watching,
};

pub use secrets::{Secrets, read_file as read_secret};
pub use sources::{CUT_STILL_TIME, Looks, Snapshot, Sources, looks_cut};

use keys::Root;
use layer::{Reader, Setting};
use node::{Node, Value};

/// Names of files that people expect to be read.
const UNREAD: [&str; 3] = ["modalkit.yaml", "modalkit.yml", "modalkit.toml"];

/// What was read: the configuration, and how it came about.
pub struct Loaded {
    /// What it means.
    pub config: Config,
    /// What was written without any effect.
    pub warnings: Vec<Warning>,
    /// What the files held; nothing where they were read one by one.
    pub snapshot: Snapshot,
    written: Root,
}

/// Reads the files, lays the environment over them and resolves the whole.
///
/// `files`: later ones win.
///
/// # Errors
/// Everything that is wrong: files that can't be read or parsed, unknown keys, wrong types, values out of their range, and values
/// that contradict each other.
pub fn load(files: &[PathBuf], environment: &Environment) -> Result<Loaded, Faults> {
    let mut loaded = assemble(files.iter().map(|path| files::read(path)), environment)?;
    loaded.warnings.extend(unread(files));
    Ok(loaded)
}

/// The same, for whoever has more to say of it: what was read also where something is wrong with it, but not where a file is missing
/// from the whole.
#[must_use]
pub fn look_through(files: &[PathBuf], environment: &Environment) -> (Option<Loaded>, Vec<Fault>) {
    let (mut loaded, faults, is_whole) =
        put_together(files.iter().map(|path| files::read(path)), environment);
    loaded.warnings.extend(unread(files));
    (is_whole.then_some(loaded), faults)
}

/// A file in the current folder that looks as if it were to be read, where none was named: the Python library reads its own from there.
fn unread(files: &[PathBuf]) -> Option<Warning> {
    let found = UNREAD.iter().map(Path::new).find(|path| files.is_empty() && path.is_file())?;
    let why = "no file is read unless it is named, with --config or in MODALKIT_CONFIG".to_owned();
    Some(Warning { at: Place::Whole(found.into()), key: "the file in this folder".to_owned(), why })
}

fn assemble(
    files: impl Iterator<Item = Result<files::File, Vec<Fault>>>,
    environment: &Environment,
) -> Result<Loaded, Faults> {
    let (loaded, faults, _) = put_together(files, environment);
    Faults::or(faults, loaded)
}

/// What the files and the environment mean together, what is wrong with them, and whether all of them could be read.
fn put_together(
    files: impl Iterator<Item = Result<files::File, Vec<Fault>>>,
    environment: &Environment,
) -> (Loaded, Vec<Fault>, bool) {
    let (mut faults, mut warnings) = (Vec::new(), environment.passed_over().to_vec());
    let mut read = Vec::new();
    for file in files {
        match file {
            Ok(file) => read.push(file),
            Err(broken) => faults.extend(broken),
        }
    }
    // Whoever writes a file may have cut it off first and not have written yet: what is printed then are the defaults.
    let empty = read.iter().filter(|file| file.root.entries().is_empty());
    warnings.extend(empty.map(|file| Warning {
        at: file.root.at.clone(),
        key: "the file".to_owned(),
        why: "it holds no setting".to_owned(),
    }));
    let is_whole = faults.is_empty();
    let written = layers(&read, environment, &mut faults, &mut warnings);
    written.warn("", &mut warnings);
    warnings.extend(environment.near_misses(Root::KEYS));
    queues::warn_of_the_default(&written, read.iter().any(|file| file.lenient), &mut warnings);
    // Where a file is missing from the whole, what doesn't fit together proves nothing.
    let mut contradictions = faults.clone();
    let config = resolve::resolve(&written, environment, &mut contradictions, &mut warnings);
    if is_whole {
        faults = contradictions;
    }
    warnings.sort_by(|a, b| (&a.at, &a.key).cmp(&(&b.at, &b.key)));
    (Loaded { config, warnings, snapshot: Snapshot::default(), written }, faults, is_whole)
}

/// Lays files and the environment over each other, later ones over earlier ones.
fn layers(
    read: &[files::File],
    environment: &Environment,
    faults: &mut Vec<Fault>,
    warnings: &mut Vec<Warning>,
) -> Root {
    let roots: Vec<_> = read.iter().map(|file| &file.root).collect();
    let variables = environment.layer(&roots, Root::KEYS, faults);
    let layers = read.iter().map(|file| (&file.root, file.lenient)).chain([(&variables, false)]);
    let mut written = Root::default();
    for (node, lenient) in layers {
        let mut reader = Reader { faults, warnings, lenient, home };
        if let Some(layer) = Root::read(&without_comments(node), "", &mut reader) {
            written.merge(layer);
        }
    }
    written
}

impl Loaded {
    /// Every setting with its value and where that comes from, defaults included; a model's batches and deployment as they are for
    /// it, wherever that was said.
    #[must_use]
    pub fn rows(&self) -> Vec<Row> {
        let mut rows = Vec::new();
        self.written.rows("", &Place::Default, true, &mut rows);
        let models = self.written.model_settings();
        let app = self.written.app_settings();
        for (name, entry) in models.model_entries.value().into_iter().flat_map(|entries| entries.iter()) {
            let key = layer::child("model_settings.model_entries", name);
            let own = |table: &str| format!("{key}.{table}.");
            rows.retain(|row| {
                !row.key.starts_with(&own("batch_config")) && !row.key.starts_with(&own("deployment_config"))
            });
            let after = rows
                .iter()
                .rposition(|row| row.key.starts_with(&format!("{key}.")))
                .map_or(rows.len(), |at| at + 1);
            let mut effective = Vec::new();
            let batch = entry.batch_config.value().cloned().unwrap_or_default().0.over(&app.batch_config());
            batch.rows(&format!("{key}.batch_config"), &Place::Default, true, &mut effective);
            let deployment =
                entry.deployment_config.value().cloned().unwrap_or_default().0.over(&app.deployment_config());
            deployment.rows(&format!("{key}.deployment_config"), &Place::Default, true, &mut effective);
            let of_the_host = |row: &Row| {
                let name = row.key.strip_prefix(&own("deployment_config")).unwrap_or_default();
                resolve::OF_THE_HOST.contains(&name.split(['.', '[']).next().unwrap_or_default())
            };
            rows.splice(after..after, effective.into_iter().filter(|row| !of_the_host(row)));
        }
        rows
    }

    /// The settings that were written somewhere, as one configuration file in JSON, without what is secret: the variables of the environment that
    /// would set that, each with its key. In a list nothing can be set alone: such a one has no variable.
    #[must_use]
    pub fn written(&self) -> (Json, Vec<(String, String)>) {
        let mut written = self.written.json(false);
        let mut secrets = Vec::new();
        take_secrets(&mut written, &mut Vec::new(), &mut secrets);
        (written, secrets)
    }

    /// The settings as a configuration file in JSON would hold them, defaults included. Secrets are hidden.
    #[must_use]
    pub fn json(&self) -> Json {
        self.written.json(true)
    }
}

/// Takes hidden values out of a document, and notes where they were. Members without a value go too.
fn take_secrets(document: &mut Json, path: &mut Vec<String>, secrets: &mut Vec<(String, String)>) {
    if let Some(items) = document.as_array() {
        let is_secret = |item: &Json| item.to_string().contains(types::HIDDEN);
        if items.iter().any(is_secret) {
            secrets.push((String::new(), path.join(".")));
        }
        return;
    }
    let Some(members) = document.as_object_mut() else { return };
    members.retain(|name, value| {
        path.push(name.clone());
        let is_secret = value.as_str().is_some_and(|text| text.contains(types::HIDDEN));
        if is_secret {
            let variable =
                format!("{}{}", environment::PREFIX, path.join(environment::SEPARATOR).to_uppercase());
            secrets.push((variable, path.join(".")));
        }
        take_secrets(value, path, secrets);
        path.pop();
        !is_secret && !value.is_null()
    });
}

/// The table that a key of this name belongs to, where there is just one.
fn home(name: &str) -> Option<String> {
    fn look(schema: &Json, path: &str, name: &str, found: &mut Vec<String>) {
        for (key, inner) in schema["properties"].as_object().into_iter().flatten() {
            if key == name && !path.is_empty() {
                found.push(path.to_owned());
            }
            look(inner, &layer::child(path, key), name, found);
            look(&inner["additionalProperties"], &format!("{}.NAME", layer::child(path, key)), name, found);
        }
    }
    static SCHEMA: OnceLock<Json> = OnceLock::new();
    let mut found = Vec::new();
    look(SCHEMA.get_or_init(Root::schema), "", name, &mut found);
    // What a model may say for itself is the same as what the application says.
    found.retain(|path| !path.contains(".NAME") || !path.contains("_config"));
    found.pop().filter(|_| found.is_empty())
}

/// Keys at the top that begin with `$` are about the file: `$schema` for editors, and what `check --json` adds.
fn without_comments(root: &Node) -> Node {
    let mut root = root.clone();
    if let Value::Map(entries) = &mut root.value {
        let is_comment = |entry: &node::Entry| match entry.name.as_str() {
            "$schema" | "$app_name" | "$provenance" | "$warnings" => true,
            // With errors in it, it is what `check` says where there is no configuration.
            "$errors" => matches!(&entry.node.value, Value::List(errors) if errors.is_empty()),
            _ => false,
        };
        entries.retain(|entry| !is_comment(entry));
    }
    root
}

/// The JSON Schema of configuration files.
#[must_use]
pub fn schema() -> Json {
    let mut schema = Root::schema();
    if let Some(members) = schema.as_object_mut() {
        members.insert("$schema".into(), json!("https://json-schema.org/draft/2020-12/schema"));
        members.insert("title".into(), json!("modalkit"));
    }
    schema
}

#[cfg(test)]
mod tests {
    use std::{path::Path, sync::Arc};

    use proptest::prelude::*;

    use super::*;

    /// Texts that are nearly configurations: keys and values of this host, broken and put together at random.
    fn nearly() -> impl Strategy<Value = String> {
        let words = prop::sample::select(vec![
            "server",
            "app_settings",
            "batch_config",
            "deployment_config",
            "volumes",
            "model_settings",
            "model_entries",
            "common",
            "auth_config",
            "keys",
            "api_key",
            "listen",
            "wait_ms",
            "max_batch_size",
            "secrets",
            "mounts",
            "gpu",
            "concurrency_limit",
            "min_replicas",
            "tls",
            "golden",
            "plugin_sha256",
            "[",
            "]",
            "[[",
            "]]",
            "{",
            "}",
            "=",
            ":",
            "\n",
            "\n  ",
            "- ",
            ",",
            "\"",
            "'",
            "'''",
            "#",
            "*a",
            "&a",
            "<<",
            ".",
            "~",
            "null",
            "true",
            "-1",
            "0",
            "1e999",
            ".nan",
            "99999999999999999999",
            "\u{feff}",
            "\t",
            "\u{0}",
            "é",
            "!!int",
            "|",
            ">",
            "%",
            "---",
            "...",
            "x",
        ]);
        prop_oneof![
            4 => prop::collection::vec((words, prop::sample::select(vec!["", " "])), 0..40)
                .prop_map(|words| words.into_iter().map(|(word, gap)| format!("{word}{gap}")).collect::<String>()),
            1 => any::<String>(),
        ]
    }

    /// More where somebody wants more: `MODALKIT_TEST_CASES=1000000`.
    fn cases() -> u32 {
        std::env::var("MODALKIT_TEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(1_000)
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: cases(), failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn nothing_that_is_written_makes_it_panic(a in nearly(), b in nearly(), variable in nearly(), path in "[A-Z_]{0,40}") {
            let name = format!("MODALKIT_{path}__{path}");
            let environment = Environment::from_iter([(name, variable)]);
            let layers = [("a.toml", &a), ("b.yaml", &b), ("c.json", &a)];
            let file = |(name, text): &(&str, &String)| files::parse(text, &Arc::from(Path::new(name)));
            // Each by itself, and all over each other; whatever they are taken for, they are taken for something.
            for layer in &layers {
                let _ = assemble([file(layer)].into_iter(), &environment).map(|loaded| (loaded.rows(), loaded.json()));
            }
            let _ = assemble(layers.iter().map(file), &environment).map(|loaded| (loaded.rows(), loaded.json()));
        }
    }
}
