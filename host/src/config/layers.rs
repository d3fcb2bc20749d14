//! Lays files and environment over each other. It knows the shape of keys, and nothing of what they mean.

use std::{fs, path::PathBuf};

use toml::{Table, Value};

use super::{ConfigError, raw::Raw};

/// Variables start with this; the keys of a path are joined by two underscores.
const PREFIX: &str = "MODALKIT_";
const SEPARATOR: &str = "__";

pub(super) fn merge(
    files: &[PathBuf],
    environment: impl IntoIterator<Item = (String, String)>,
) -> Result<Raw, ConfigError> {
    let mut whole = Table::new();
    for path in files {
        let text = fs::read_to_string(path)
            .map_err(|source| ConfigError::Unreadable { path: path.clone(), source })?;
        // Parsed as `Raw` first: errors then have a line and a column, which a merged table has lost.
        toml::from_str::<Raw>(&text).map_err(|error| ConfigError::Malformed { path: path.clone(), error })?;
        let table =
            toml::from_str(&text).map_err(|error| ConfigError::Malformed { path: path.clone(), error })?;
        overlay(&mut whole, table);
    }
    from_environment(environment, &mut whole)?;
    // The files were fine by themselves, so what is wrong now came with the environment.
    whole.try_into().map_err(ConfigError::Environment)
}

fn overlay(base: &mut Table, over: Table) {
    for (key, value) in over {
        match (base.get_mut(&key), value) {
            (Some(Value::Table(base)), Value::Table(over)) => overlay(base, over),
            (_, value) => drop(base.insert(key, value)),
        }
    }
}

/// Puts each variable's value in its place. A map replaces what the files say there; a longer path changes one key of it.
/// Names are matched without regard to case: against the keys that are there, else in lower case.
fn from_environment(
    environment: impl IntoIterator<Item = (String, String)>,
    whole: &mut Table,
) -> Result<(), ConfigError> {
    let mut variables: Vec<_> = environment.into_iter().filter(|(name, _)| names_a_key(name)).collect();
    // Shorter paths first: a whole map, then single keys of it.
    variables.sort_by_key(|(name, _)| (name.matches(SEPARATOR).count(), name.clone()));
    for (name, value) in variables {
        let path: Vec<&str> = name[PREFIX.len()..].split(SEPARATOR).collect();
        let Some((last, parents)) = path.split_last() else { continue };
        let mut table = &mut *whole;
        for parent in parents {
            let key = spelled_as_in(table, parent);
            table =
                table.entry(key).or_insert_with(|| Table::new().into()).as_table_mut().ok_or_else(|| {
                    ConfigError::Nested { name: name.clone(), parent: (*parent).to_owned() }
                })?;
        }
        table.insert(spelled_as_in(table, last), parse(&value));
    }
    Ok(())
}

fn names_a_key(name: &str) -> bool {
    let prefixed = name.get(..PREFIX.len()).is_some_and(|start| start.eq_ignore_ascii_case(PREFIX));
    prefixed && name.contains(SEPARATOR)
}

fn spelled_as_in(table: &Table, key: &str) -> String {
    table
        .keys()
        .find(|known| known.eq_ignore_ascii_case(key))
        .cloned()
        .unwrap_or_else(|| key.to_ascii_lowercase())
}

/// Numbers, booleans, lists and maps are written as JSON; anything else is a string, and so is JSON in quotes.
fn parse(value: &str) -> Value {
    serde_json::from_str(value).unwrap_or_else(|_| Value::String(value.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn variables(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn later_files_win_and_the_environment_beats_them() {
        let folder = tempfile::tempdir().unwrap();
        let (a, b) = (folder.path().join("a.toml"), folder.path().join("b.toml"));
        fs::write(&a, "[app_settings.batch_config]\nmax_batch_size = 2\nwait_ms = 1\nqueue_max = 7\n")
            .unwrap();
        fs::write(&b, "[app_settings.batch_config]\nmax_batch_size = 3\nwait_ms = 2\n").unwrap();
        let raw = merge(
            &[a, b],
            variables(&[
                ("MODALKIT_APP_SETTINGS__BATCH_CONFIG__WAIT_MS", "5"),
                ("MODALKIT_CONFIG", "x"),
                ("PATH", "y"),
            ]),
        );
        let batch = raw.unwrap().app_settings.unwrap().batch_config.unwrap();
        assert_eq!((batch.max_batch_size, batch.wait_ms, batch.queue_max), (Some(3), Some(5), Some(7)));
    }

    #[test]
    fn maps_come_as_json_and_names_are_matched_without_case() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a.toml");
        fs::write(&file, "[model_settings.model_entries.Digits]\ntop_k = 1\n").unwrap();
        let raw = merge(
            &[file],
            variables(&[
                ("MODALKIT_MODEL_SETTINGS__MODEL_ENTRIES__DIGITS__TOP_K", "3"),
                ("MODALKIT_APP_SETTINGS__DEPLOYMENT_CONFIG__VOLUMES", r#"{"/mnt/a": "a"}"#),
            ]),
        )
        .unwrap();
        let entries = raw.model_settings.unwrap().model_entries.unwrap();
        assert_eq!(entries["Digits"].settings["top_k"].as_integer(), Some(3));
        let volumes = raw.app_settings.unwrap().deployment_config.unwrap().volumes.unwrap();
        assert_eq!(volumes["/mnt/a"], "a");
    }

    #[test]
    fn a_map_in_the_environment_replaces_the_files() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a.toml");
        fs::write(&file, "[app_settings.deployment_config.volumes]\n\"/mnt/a\" = \"a\"\n").unwrap();
        let name = "modalkit_app_settings__deployment_config__volumes";
        let raw = merge(&[file], variables(&[(name, r#"{"/mnt/b": "b"}"#)])).unwrap();
        let volumes = raw.app_settings.unwrap().deployment_config.unwrap().volumes.unwrap();
        assert_eq!(volumes.keys().collect::<Vec<_>>(), ["/mnt/b"]);
    }

    #[test]
    fn an_unknown_key_is_named_with_its_file_and_line() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("typo.toml");
        fs::write(&file, "[server]\n\nlisten_on = \"127.0.0.1:1\"\n").unwrap();
        let text = merge(&[file], []).unwrap_err().to_string();
        assert!(
            text.contains("typo.toml") && text.contains("line 3") && text.contains("listen_on"),
            "{text}"
        );
        let text = merge(&[], variables(&[("MODALKIT_SERVER__LISTEN_ON", "x")])).unwrap_err().to_string();
        assert!(text.contains("environment") && text.contains("listen_on"), "{text}");
    }
}
