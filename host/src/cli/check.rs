//! `check`: every setting with its value and where that comes from; everything that is wrong, also with what the models' own keys
//! say to their plugins, as far as these lie in the volumes.

use std::path::PathBuf;

use modalkit::{
    config::{self, Environment, Fault, Faults, Loaded},
    ingress::Certificate,
    pipeline::check_settings,
    reload::build,
};
use serde_json::{Value, json};

use super::{
    DONE, NOT_DONE,
    print::{Colour, coloured, print, table},
};

/// Values that are longer than this are cut in the table.
const VALUE_CHARS_MAX: usize = 60;

pub(crate) fn run(files: &[PathBuf], environment: &Environment, as_json: bool) -> u8 {
    let loaded = match config::load(files, environment) {
        Ok(loaded) => loaded,
        Err(faults) => {
            tell_faults(&faults, as_json);
            return NOT_DONE;
        }
    };
    let mut faults = faults_of_plugins(&loaded);
    if let Some(files) = loaded.config.server.tls.clone()
        && let Err(error) = Certificate::read(files.clone())
    {
        let found = format!("{:#}", anyhow::Error::new(error));
        faults.push(Fault::of_file(&files.certificate, "a certificate and its private key, in PEM", &found));
    }
    print(&if as_json { in_json(&loaded, &faults) } else { for_people(&loaded) });
    if faults.is_empty() {
        return DONE;
    }
    if !as_json {
        tell_faults(&Faults::from(faults), false);
    }
    NOT_DONE
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
    for spec in loaded.config.models.values() {
        let Some(file) = build::find(&spec.plugin, &loaded.config.volumes) else { continue };
        match build::inspect(&file, &loaded.config.server) {
            Ok(plugin) => {
                if let Err(found) = check_settings(&plugin, &spec.settings) {
                    faults.extend(found.iter().cloned());
                }
            }
            Err(error) => faults.push(Fault::of_file(&file, "a plugin that this host takes", &error.chain())),
        }
    }
    faults
}

fn for_people(loaded: &Loaded) -> String {
    let mut rows = vec![["KEY", "VALUE", "FROM"].map(str::to_owned)];
    for row in loaded.rows() {
        let mut value: String = row.value.chars().take(VALUE_CHARS_MAX).collect();
        if value.len() < row.value.len() {
            value.push('…');
        }
        rows.push([row.key, value, row.at.to_string()]);
    }
    let mut text = table(&rows);
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
    for (index, line) in warnings.chain(notes).chain(missing).enumerate() {
        let gap = if index == 0 { "\n" } else { "" };
        text.push_str(&format!("{gap}{}: {line}\n", coloured("warning", Colour::Yellow)));
    }
    text
}

fn in_json(loaded: &Loaded, faults: &[Fault]) -> String {
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
