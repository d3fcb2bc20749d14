//! `check`: every setting with its value and where that comes from; everything that is wrong, also with what the models' own keys
//! say to their plugins, as far as these lie in the volumes.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use modalkit::{
    app,
    config::{self, Environment, Fault, Faults, Loaded, ModelSpec},
    ingress::Certificate,
    pipeline::check_settings,
    reload::build,
};
use modalkit_engine::{Isolation, LoadError, Plugin};
use serde_json::{Value, json};

use super::{
    DONE, NOT_DONE,
    print::{Colour, coloured, print, table},
};

/// Marks settings that name a file in the data folder, in the schema of a pipeline's settings.
pub(crate) const FILE_MARK: &str = "x-modalkit-file";
/// Values that are longer than this are cut in the table.
const VALUE_CHARS_MAX: usize = 60;

pub(crate) fn run(files: &[PathBuf], environment: &Environment, as_json: bool, strict: bool) -> u8 {
    let (loaded, mut faults) = config::look_through(files, environment);
    let makes_sense = faults.is_empty();
    if let Some(loaded) = &loaded {
        faults.extend(faults_of_plugins(loaded));
        faults.extend(fault_of_certificate(loaded));
    }
    let faults = Faults::from(faults);
    let Some(loaded) = loaded.filter(|_| makes_sense) else {
        tell_faults(&faults, as_json);
        return NOT_DONE;
    };
    let warnings = warnings(&loaded);
    let interpreters = if as_json { Vec::new() } else { interpreters(&loaded) };
    let any = faults.iter().next().is_some();
    if as_json {
        print(&in_json(&loaded, &faults));
    } else {
        print(&for_people(&loaded, &interpreters, &warnings));
        if any {
            tell_faults(&faults, false);
        }
    }
    if any || (strict && !warnings.is_empty()) { NOT_DONE } else { DONE }
}

fn fault_of_certificate(loaded: &Loaded) -> Option<Fault> {
    let files = loaded.config.server.tls.clone()?;
    let error = Certificate::read(files.clone()).err()?;
    let found = format!("{:#}", anyhow::Error::new(error));
    Some(Fault::of_file(&files.certificate, "a certificate and its private key, in PEM", &found))
}

pub(crate) fn tell_faults(faults: &Faults, as_json: bool) {
    let text = if as_json {
        format!("{:#}\n", json!({"$errors": faults.iter().map(of_fault).collect::<Vec<_>>()}))
    } else {
        format!("{}: {faults}\n", coloured("error", Colour::Red))
    };
    print(&text);
}

fn of_fault(fault: &Fault) -> Value {
    json!({
        "at": fault.at.to_string(), "key": fault.key, "expected": fault.expected, "found": fault.found, "help": fault.hint,
    })
}

/// What the plugins that lie in the volumes say of their models' own keys.
fn faults_of_plugins(loaded: &Loaded) -> Vec<Fault> {
    let mut faults = Vec::new();
    for spec in &all_models(loaded) {
        let Some(file) = build::find(&spec.plugin, &loaded.config.volumes) else { continue };
        if !may_be_opened(spec, &file, loaded) {
            let expected = "plugin_sha256 in its entry, or plugins_from_buckets = true for its mount";
            faults.push(Fault::of_file(&file, expected, "a plugin in a bucket, whose content nobody names"));
            continue;
        }
        match inspect(spec, &file, loaded) {
            Ok(plugin) => match check_settings(&*plugin, &spec.settings) {
                Err(found) => faults.extend(found.iter().cloned()),
                Ok(()) => faults.extend(missing_files(spec, &*plugin)),
            },
            Err(error) => faults.push(Fault::of_file(&file, "a plugin that this host takes", &error.chain())),
        }
    }
    faults
}

/// Whether a plugin lies where whoever may write is trusted, or its content is named. Opening it runs its code.
fn may_be_opened(spec: &ModelSpec, file: &Path, loaded: &Loaded) -> bool {
    let mut strict = loaded.config.volumes.iter().filter(|volume| !volume.takes_any_plugin());
    spec.plugin_sha256.is_some() || !strict.any(|volume| volume.holds(file))
}

/// The models of the configuration, and those of folders of Python that no entry names.
fn all_models(loaded: &Loaded) -> Vec<ModelSpec> {
    let mut all: Vec<ModelSpec> = loaded.config.models.values().cloned().collect();
    let others = build::folders(&loaded.config.volumes);
    let others: Vec<ModelSpec> = others
        .iter()
        .filter(|name| !all.iter().any(|spec| spec.plugin == **name))
        .map(|name| loaded.config.defaults.named(name))
        .collect();
    all.extend(others);
    all
}

/// As the host would take it: a folder of Python with the interpreter that the entry says.
fn inspect(spec: &ModelSpec, file: &Path, loaded: &Loaded) -> Result<Arc<dyn Plugin>, LoadError> {
    let isolation = if file.is_dir() { spec.isolation.clone() } else { Isolation::default() };
    app::inspect(file, spec.plugin_sha256.as_deref(), &isolation, &loaded.config.server, None)
}

/// What runs the models that are written in Python.
fn interpreters(loaded: &Loaded) -> Vec<String> {
    let folder =
        |spec: &ModelSpec| build::find(&spec.plugin, &loaded.config.volumes).filter(|file| file.is_dir());
    let models = all_models(loaded);
    let models = models.iter().filter_map(|spec| Some((spec, folder(spec)?)));
    let models = models.filter(|(spec, folder)| may_be_opened(spec, folder, loaded));
    let found = models.filter_map(|(spec, folder)| Some((spec, inspect(spec, &folder, loaded).ok()?)));
    found
        .map(|(spec, plugin)| {
            let about = plugin.description();
            format!("{}: Python {}, by {}", spec.name, about.sdk, about.rustc)
        })
        .collect()
}

/// Files that a model's own keys name, as its pipeline's settings say of themselves, and that aren't there.
fn missing_files(spec: &ModelSpec, plugin: &dyn Plugin) -> Vec<Fault> {
    let schema: Value = serde_json::from_str(&plugin.description().settings_schema).unwrap_or_default();
    let settings: Value = serde_json::from_str(&spec.settings.json()).unwrap_or_default();
    let keys = schema["properties"].as_object().into_iter().flatten();
    keys.filter(|(_, property)| property[FILE_MARK] == true)
        .filter_map(|(key, _)| {
            let file = spec.all_model_data_folder.join(settings[key].as_str()?);
            let found = format!("no file {}", file.display());
            (!file.exists())
                .then(|| spec.settings.fault(&[key], &format!("expected a file, found {found}"), false, &[]))
        })
        .collect()
}

fn for_people(loaded: &Loaded, interpreters: &[String], warnings: &[String]) -> String {
    let mut rows = vec![["KEY", "VALUE", "FROM"].map(str::to_owned)];
    for row in loaded.rows() {
        let mut value: String = row.value.chars().take(VALUE_CHARS_MAX).collect();
        if value.len() < row.value.len() {
            value.push('…');
        }
        rows.push([row.key, value, row.at.to_string()]);
    }
    let mut text = table(&rows);
    for (index, line) in interpreters.iter().enumerate() {
        text.push_str(&format!("{}{line}\n", if index == 0 { "\n" } else { "" }));
    }
    for (index, line) in warnings.iter().enumerate() {
        let gap = if index == 0 { "\n" } else { "" };
        text.push_str(&format!("{gap}{}: {line}\n", coloured("warning", Colour::Yellow)));
    }
    text
}

/// What has no effect, and what isn't there yet.
fn warnings(loaded: &Loaded) -> Vec<String> {
    let waiting = loaded
        .config
        .models
        .values()
        .filter(|spec| build::find(&spec.plugin, &loaded.config.volumes).is_none());
    let notes = waiting
        .map(|spec| format!("{:?} waits for its plugin {:?}: no volume has it", spec.name, spec.plugin));
    let warnings = loaded.warnings.iter().map(ToString::to_string);
    let golden =
        loaded.config.models.values().filter_map(|spec| spec.golden.as_ref().map(|golden| (spec, golden)));
    let missing = golden.filter(|(_, golden)| !golden.file.is_file()).map(|(spec, golden)| {
        format!("{}: there is no file of golden requests {}", spec.name, golden.file.display())
    });
    let volumes = loaded.config.volumes.iter().filter(|volume| !volume.mount_point.is_dir());
    let unmounted = volumes.map(|volume| {
        format!("the volume {:?}: there is no folder {}", volume.name, volume.mount_point.display())
    });
    let mounts = loaded.config.mounts.iter().filter(|mount| !mount.from.exists());
    let unmounted = unmounted.chain(mounts.map(|mount| {
        format!("mounts: there is no {} to be put at {}", mount.from.display(), mount.to.display())
    }));
    warnings.chain(notes).chain(missing).chain(unmounted).collect()
}

fn in_json(loaded: &Loaded, faults: &Faults) -> String {
    let mut whole = loaded.json();
    let provenance: serde_json::Map<String, Value> =
        loaded.rows().into_iter().map(|row| (row.key, json!(row.at.to_string()))).collect();
    let warning = |warning: &config::Warning| json!({"at": warning.at.to_string(), "key": warning.key, "why": warning.why});
    if let Some(members) = whole.as_object_mut() {
        members.insert("$app_name".into(), json!(loaded.config.app_name));
        members.insert("$provenance".into(), provenance.into());
        members.insert("$warnings".into(), loaded.warnings.iter().map(warning).collect());
        members.insert("$errors".into(), faults.iter().map(of_fault).collect());
    }
    format!("{whole:#}\n")
}
