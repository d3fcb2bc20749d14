//! Fetches keys that lie elsewhere, again and again: files of secrets and parameters in SSM. A key that can't be fetched keeps the
//! value that it had; one whose file is gone is a key no more.

use std::{collections::HashMap, sync::Arc, time::Duration};

use tokio::{sync::watch, time::timeout};

use super::{Access, ssm};
use crate::config::{AuthSpec, KeySource, KeySpec, read_secret};

/// How often keys are fetched while one of them is missing.
const RETRY: Duration = Duration::from_secs(1);
/// How long one key may take.
const FETCH_TIMEOUT: Duration = Duration::from_secs(10);

/// Runs until it is dropped; each new specification is in force at once.
pub async fn run(access: Arc<Access>, mut specs: watch::Receiver<AuthSpec>) -> std::convert::Infallible {
    let mut values: HashMap<String, (KeySource, String)> = HashMap::new();
    let mut told: Vec<String> = Vec::new();
    loop {
        let spec = specs.borrow_and_update().clone();
        let mut faults = HashMap::new();
        for key in spec.keys.iter().filter(|key| key.source.value().is_none()) {
            match timeout(FETCH_TIMEOUT, fetch(key, &spec)).await {
                Ok(Ok(Some(value))) => drop(values.insert(key.name.clone(), (key.source.clone(), value))),
                Ok(Ok(None)) => drop(values.remove(&key.name)),
                Ok(Err(reason)) => drop(faults.insert(key.name.clone(), reason)),
                Err(_) => {
                    drop(faults.insert(key.name.clone(), format!("it did not come within {FETCH_TIMEOUT:?}")))
                }
            }
        }
        // A value is its source's: a key of the same name that lies elsewhere now has another.
        values.retain(|name, (source, _)| {
            spec.keys.iter().any(|key| key.name == *name && key.source == *source)
        });
        let refresh = spec.refresh;
        access.set(spec, |key| match (values.get(&key.name), faults.get(&key.name)) {
            (Some((_, value)), _) => Ok(value.clone()),
            (None, Some(reason)) => Err(reason.clone()),
            (None, None) => Err("there is no such file of a secret".to_owned()),
        });
        let mut missing = access.missing();
        missing.extend(
            faults
                .iter()
                .filter(|(name, _)| values.contains_key(*name))
                .map(|(name, reason)| format!("the key {name} is as it was fetched before: {reason}")),
        );
        if missing != told {
            missing.iter().for_each(|reason| tracing::error!("not all keys are known: {reason}"));
            told = missing;
        }
        let pause = if access.missing().is_empty() { refresh } else { RETRY };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            // Its sender lives as long as the host.
            Ok(()) = specs.changed() => {}
        }
    }
}

/// `None` where there is no such key any more.
async fn fetch(key: &KeySpec, spec: &AuthSpec) -> Result<Option<String>, String> {
    match &key.source {
        KeySource::Value(_) => Ok(None),
        KeySource::Secret(name) => {
            let (name, folder) = (name.clone(), spec.secrets_folder.clone());
            // A file of some bytes; on a mount that hangs it must not hold up the host.
            let read = tokio::task::spawn_blocking(move || read_secret(&name, &folder));
            read.await.map_err(|error| error.to_string())
        }
        KeySource::Ssm(name) => {
            let fetched = ssm::parameter(&spec.ssm, name).await;
            fetched.map(Some).map_err(|error| format!("{:#}", anyhow::Error::new(error)))
        }
    }
}
