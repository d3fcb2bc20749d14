//! `inspect`: what a plugin says of itself, and whether this host would take it.

use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
};

use modalkit::{
    app,
    config::{self, Environment},
};
use modalkit_engine::{Description, Isolation, tree};
use serde_json::{Value, json};

use super::{
    DONE, NOT_DONE, WRONG_USAGE,
    inspect_model::{self, Asked},
    print::{Colour, coloured, complain, print},
};

/// What stands for the boundary that a pipeline in Python was built for.
const PYTHON: &str = "python";

pub(crate) fn run(asked: &Asked<'_>, files: &[PathBuf], environment: &Environment, as_json: bool) -> u8 {
    let file = asked.file;
    // Whose files are taken, and how long they may take to open, stands in the configuration.
    let loaded = match config::load(files, environment) {
        Ok(loaded) => loaded,
        Err(faults) => {
            complain(&anyhow::Error::new(faults));
            return WRONG_USAGE;
        }
    };
    if asked.plugin.is_some() || !is_plugin(file) {
        return inspect_model::run(asked, &loaded, as_json);
    }
    // A bare name is a file of the current folder. A folder that can't be told is a matter of the file.
    let whole = std::path::absolute(file).unwrap_or_else(|_| file.to_owned());
    match app::inspect(&whole, None, &Isolation::default(), &loaded.config.server, None) {
        Ok(plugin) => {
            let about = plugin.description();
            print(&if as_json { in_json(about) } else { for_people(about) });
            DONE
        }
        Err(error) => {
            let reason = error.chain();
            print(&if as_json {
                format!("{:#}\n", json!({"taken": false, "reason": reason, "abi_version": app::abi()}))
            } else {
                format!(
                    "{}: this host would not take {}: {reason}\n",
                    coloured("refused", Colour::Red),
                    file.display()
                )
            });
            NOT_DONE
        }
    }
}

/// What isn't there is one as well, and is refused as such; folders are where there is a pipeline in them.
fn is_plugin(file: &Path) -> bool {
    if file.is_dir() {
        return tree::is_pipeline(file);
    }
    !file.exists() || [None, Some(OsStr::new("so"))].contains(&file.extension())
}

fn in_json(plugin: &Description) -> String {
    // The SDK wrote them.
    let schema = |text: &str| serde_json::from_str::<Value>(text).unwrap_or_default();
    let schemas = json!({
        "input_schema": schema(&plugin.input_schema), "output_schema": schema(&plugin.output_schema),
        "settings_schema": schema(&plugin.settings_schema),
    });
    if plugin.abi == PYTHON {
        let (name, sha256) = (&plugin.name, plugin.sha256());
        let mut whole = json!({"taken": true, "name": name, "sha256": sha256, "python_version": plugin.sdk, "interpreter": plugin.rustc});
        merge(&mut whole, schemas);
        return format!("{whole:#}\n");
    }
    let mut whole = json!({
        "taken": true, "name": plugin.name, "version": plugin.version, "sha256": plugin.sha256(),
        "abi_version": plugin.abi, "sdk_version": plugin.sdk, "rustc_version": plugin.rustc,
    });
    merge(&mut whole, schemas);
    format!("{whole:#}\n")
}

fn merge(whole: &mut Value, members: Value) {
    if let (Some(whole), Value::Object(members)) = (whole.as_object_mut(), members) {
        whole.extend(members);
    }
}

fn for_people(plugin: &Description) -> String {
    let taken = coloured("this host would take it", Colour::Green);
    let is_python = plugin.abi == PYTHON;
    let mut text = match is_python {
        true => format!(
            "{}, {taken}\n\nsha256  {}\npython  {}\nat      {}\n",
            plugin.name,
            plugin.sha256(),
            plugin.sdk,
            plugin.rustc
        ),
        false => format!(
            "{} {}, {taken}\n\nsha256  {}\nabi     {}\nsdk     {}\nrustc   {}\n",
            plugin.name,
            plugin.version,
            plugin.sha256(),
            plugin.abi,
            plugin.sdk,
            plugin.rustc,
        ),
    };
    let schemas = [
        ("input", &plugin.input_schema),
        ("output", &plugin.output_schema),
        ("settings: the model's own keys", &plugin.settings_schema),
    ];
    for (name, schema) in schemas {
        text.push_str(&format!("\n{}\n{}", coloured(name, Colour::Grey), members(schema)));
    }
    text
}

/// A schema's members, a line each: whether they must be there, of which type, what they are.
fn members(schema: &str) -> String {
    let schema: Value = serde_json::from_str(schema).unwrap_or_default();
    let Some(properties) = schema["properties"].as_object().filter(|properties| !properties.is_empty())
    else {
        return "  none; --json prints the schema\n".to_owned();
    };
    let required: Vec<&str> =
        schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let rows: Vec<[String; 4]> = properties
        .iter()
        .map(|(name, property)| {
            let kind = match &property["type"] {
                Value::String(kind) => kind.clone(),
                Value::Array(kinds) => {
                    kinds.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(" or ")
                }
                _ => "see --json".to_owned(),
            };
            let must = if required.contains(&name.as_str()) { "required" } else { "optional" };
            let about = property["description"].as_str().unwrap_or_default().replace('\n', " ");
            [format!("  {name}"), kind, must.to_owned(), about]
        })
        .collect();
    super::print::table(&rows)
}
