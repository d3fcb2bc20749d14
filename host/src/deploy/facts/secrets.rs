//! Which secrets a configuration needs, and where each comes from. It knows names, and no value.

use std::collections::BTreeSet;

use serde::Serialize;
use serde_json::Value as Json;

use super::names::{is_variable, letters, name_of, secret_name};
use crate::{
    config::{KeySource, Loaded},
    deploy::DeployError,
};

/// What the host's two keys are, where the configuration says nothing of keys: variable, and member of the application's secret.
const KEYS: [(&str, &str); 2] = [
    ("MODALKIT_APP_SETTINGS__AUTH_CONFIG__API_KEY", "api-key"),
    ("MODALKIT_APP_SETTINGS__AUTH_CONFIG__KEYS__OPERATOR__API_KEY", "operator-key"),
];
const MODAL_KEYS: [&str; 2] = ["modal-key", "modal-secret"];

/// A variable of the environment that holds a secret: a member of the application's one.
#[derive(Clone, Debug, Serialize)]
pub(in crate::deploy) struct SecretVariable {
    pub(in crate::deploy) variable: String,
    pub(in crate::deploy) key: String,
}

/// A secret with several values, which is a folder of files.
#[derive(Clone, Debug, Serialize)]
pub(in crate::deploy) struct SecretFolder {
    /// As the configuration names it.
    pub(in crate::deploy) name: String,
    /// As a cluster does.
    pub(in crate::deploy) secret: String,
    /// Its volume in a pod.
    pub(in crate::deploy) volume: String,
}

impl SecretVariable {
    fn new(variable: &str, key: &str) -> Self {
        Self { variable: variable.to_owned(), key: key.to_owned() }
    }
}

/// Those that stand in place of what the configuration hides, and those that it names. With `with_keys`, a host without any gets two.
pub(super) fn variables(
    loaded: &Loaded,
    written: &mut Json,
    hidden: Vec<(String, String)>,
    with_keys: bool,
) -> Result<Vec<SecretVariable>, DeployError> {
    let mut all: Vec<SecretVariable> = Vec::new();
    for (variable, key) in hidden {
        if !is_variable(&variable) {
            return Err(DeployError::Unfit(format!(
                "expected a value that is no secret in {key}, or a name that can be a variable's: {variable} can't; found a secret. Put it into a file of server.secrets_folder (`secret`), or name that table with letters, digits and underscores"
            )));
        }
        all.push(SecretVariable::new(&variable, &letters(&key)));
    }
    let keys = written["app_settings"]["auth_config"]["keys"].as_object();
    let named = keys.into_iter().flatten().filter_map(|(_, key)| key["variable"].as_str());
    all.extend(named.map(|variable| SecretVariable::new(variable, &letters(variable))));
    if loaded.config.container.secure {
        all.extend(
            MODAL_KEYS.map(|name| SecretVariable::new(&letters(name).replace('-', "_").to_uppercase(), name)),
        );
    }
    let config = &loaded.config;
    let asks_who_calls = config.server.insecure || !config.auth.keys.is_empty() || config.container.secure;
    if with_keys && !asks_who_calls {
        // A host that others than its own machine reach has to ask who calls.
        all.extend(KEYS.map(|(variable, key)| SecretVariable::new(variable, key)));
        written["app_settings"]["auth_config"]["keys"]["operator"]["management"] = true.into();
    }
    Ok(all)
}

/// Keys that lie in files.
pub(super) fn files(loaded: &Loaded) -> Vec<String> {
    let keys = loaded.config.auth.keys.iter();
    let files = keys.filter_map(|key| match &key.source {
        KeySource::Secret(name) => Some(name.clone()),
        KeySource::Value(_) | KeySource::Ssm(_) => None,
    });
    files.collect()
}

/// Those that the application, its models, its queues and its mounts name.
pub(super) fn folders(loaded: &Loaded, written: &Json) -> Vec<SecretFolder> {
    let config = &loaded.config;
    let mut names: BTreeSet<String> = config.container.secrets.iter().cloned().collect();
    names.extend(
        config.volumes.iter().filter_map(|volume| Some(volume.bucket.as_ref()?.secret()?.to_owned())),
    );
    let models = members(&written["model_settings"]["model_entries"]);
    let backends = members(&written["app_settings"]["queue_config"]["backends"]);
    let of_models = models.map(|entry| &entry["deployment_config"]["secrets"]);
    for list in of_models.chain(backends.map(|backend| &backend["secrets"])) {
        names
            .extend(list.as_array().into_iter().flatten().filter_map(|name| Some(name.as_str()?.to_owned())));
    }
    let folder = |name: String| SecretFolder {
        secret: secret_name(&name),
        volume: format!("secret-{}", name_of(&name)),
        name,
    };
    names.into_iter().map(folder).collect()
}

fn members(table: &Json) -> impl Iterator<Item = &Json> {
    table.as_object().into_iter().flatten().map(|(_, member)| member)
}
