//! What `cloud_bucket_mounts` mean: volumes that are mirrored, and where their credentials are read from. It asks no store.

use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use modalkit_bucket::{BucketSpec, Credentials, Provider, Secret};

use super::{
    Environment, Fault, Place, Volume, Warning, Watching,
    keys::{BucketMount, DeploymentConfig, Server},
    layer::child,
    secrets,
    types::BucketProvider,
};

const KEY: &str = "app_settings.deployment_config.cloud_bucket_mounts";
/// The mirrors' folders lie in a folder of this name in the state folder.
pub(super) const FOLDER: &str = "buckets";
/// Objects that have changed must have been listed twice alike, this long apart, as model data must hold still.
const SETTLE: Duration = Duration::from_secs(2);
/// Variables that clients of clouds look at begin like this.
const OF_CLOUDS: [&str; 3] = ["AWS_", "AZURE_", "GOOGLE_"];
/// By this a document is known as a service account's key file, which is one value.
const SERVICE_ACCOUNT: (&str, &str) = ("type", "service_account");
const SERVICE_ACCOUNT_NAME: &str = "SERVICE_ACCOUNT_JSON";

/// A volume's bucket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bucket {
    /// What is mirrored, and how.
    pub spec: BucketSpec,
    /// Whether plugins are taken from it whose content nobody names.
    pub takes_plugins: bool,
    source: CredentialSource,
}

/// Where credentials are read from, each time that a bucket is listed.
#[derive(Clone)]
struct CredentialSource {
    /// The secret; without one, what the environment has.
    secret: Option<String>,
    folder: PathBuf,
    /// What of the environment may be credentials.
    environment: Environment,
}

/// A value that is another one is read again anyway.
impl PartialEq for CredentialSource {
    fn eq(&self, other: &Self) -> bool {
        (&self.secret, &self.folder) == (&other.secret, &other.folder)
    }
}

impl Eq for CredentialSource {}

impl fmt::Debug for CredentialSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.secret)
    }
}

impl Bucket {
    /// The secret with the credentials.
    #[must_use]
    pub fn secret(&self) -> Option<&str> {
        self.source.secret.as_deref()
    }

    /// What reads the credentials as they are now.
    #[must_use]
    pub fn credentials(&self) -> Credentials {
        let source = self.source.clone();
        Arc::new(move || source.read())
    }
}

impl CredentialSource {
    fn read(&self) -> Result<Secret, String> {
        let Some(name) = &self.secret else {
            return Ok(Secret(
                self.environment.iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect(),
            ));
        };
        let found = secrets::look_for(name, &self.environment, &self.folder)
            .map_err(|error| format!("the secret {name:?} can't be read: {error}"))?;
        if found.is_empty() {
            return Err(format!(
                "expected the secret {name:?}: a variable of the environment, or a file or folder in {}; found none",
                self.folder.display()
            ));
        }
        let mut values = BTreeMap::new();
        for (found, value) in found {
            match found.strip_prefix(name).and_then(|rest| rest.strip_prefix('/')) {
                // A file for each name.
                Some(inside) => drop(values.insert(inside.to_owned(), value)),
                None => values.extend(several(name, &value)?),
            }
        }
        Ok(Secret(values))
    }
}

/// Several values in one text: a JSON object, or lines of `NAME=value`. Errors never show any of it.
fn several(secret: &str, text: &str) -> Result<BTreeMap<String, String>, String> {
    let expected = || {
        format!(
            "expected names and values in the secret {secret:?}, such as AWS_ACCESS_KEY_ID=… on a line each or a JSON object of texts, or a folder with a file for each; found something else"
        )
    };
    if text.trim_start().starts_with('{') {
        let document: serde_json::Map<String, serde_json::Value> =
            serde_json::from_str(text).map_err(|_| expected())?;
        if document.get(SERVICE_ACCOUNT.0).and_then(|kind| kind.as_str()) == Some(SERVICE_ACCOUNT.1) {
            return Ok(BTreeMap::from([(SERVICE_ACCOUNT_NAME.to_owned(), text.to_owned())]));
        }
        let texts = document.into_iter().map(|(name, value)| Some((name, value.as_str()?.to_owned())));
        return texts.collect::<Option<_>>().ok_or_else(expected);
    }
    let lines =
        dotenvy::Iter::new(text.as_bytes()).collect::<Result<BTreeMap<_, _>, _>>().map_err(|_| expected())?;
    if lines.is_empty() { Err(expected()) } else { Ok(lines) }
}

/// What the mounts of a deployment are told with.
pub(super) struct Context<'a> {
    pub(super) deployment: &'a DeploymentConfig,
    pub(super) server: &'a Server,
    pub(super) state_folder: &'a Path,
    pub(super) environment: &'a Environment,
    pub(super) faults: &'a mut Vec<Fault>,
    pub(super) warnings: &'a mut Vec<Warning>,
}

/// The volumes that buckets are mirrored into.
pub(super) fn resolve(context: &mut Context<'_>) -> Vec<(Volume, Place)> {
    let at = context.deployment.cloud_bucket_mounts.at();
    let mounts = context.deployment.cloud_bucket_mounts();
    let mounts = mounts.iter().enumerate();
    mounts
        .filter_map(|(index, mount)| {
            Some((context.volume(mount, &format!("{KEY}[{index}]"), &at)?, at.clone()))
        })
        .collect()
}

impl Context<'_> {
    fn volume(&mut self, mount: &BucketMount, key: &str, at: &Place) -> Option<Volume> {
        let mut refuse = |key: &str, expected: &str, found: String| {
            self.faults.push(Fault::new(at, key, expected, found));
        };
        let (Some(mount_point), Some(bucket)) = (mount.mount_point.value(), mount.bucket_name.value()) else {
            refuse(key, "mount_point and bucket_name", "one of them at most".to_owned());
            return None;
        };
        let mount_point = std::path::absolute(mount_point).unwrap_or_else(|_| mount_point.into());
        let last = mount_point.file_name().and_then(|name| name.to_str());
        let Some(name) = mount.name.value().map(String::as_str).or(last) else {
            refuse(&child(key, "mount_point"), "the path of a folder", format!("{}", mount_point.display()));
            return None;
        };
        let prefix = mount.key_prefix.value().map(String::as_str).unwrap_or_default().trim_matches('/');
        if prefix.split('/').any(|part| matches!(part, "." | "..") || part.is_empty() && !prefix.is_empty()) {
            refuse(
                &child(key, "key_prefix"),
                "the folder of keys that is mirrored, such as \"v3/\"",
                format!("{:?}", mount.key_prefix.value()),
            );
        }
        if mount.secret.value().is_some() && mount.oidc_auth_role_arn.value().is_some() {
            refuse(key, "either secret or oidc_auth_role_arn", "both".to_owned());
        }
        if let Some(url) = mount.bucket_endpoint_url.value().filter(|url| !url.0.contains("://")) {
            let expected = "an address that begins with https:// or http://";
            refuse(&child(key, "bucket_endpoint_url"), expected, format!("{url:?}"));
        }
        let folder = self.server.buckets_folder.value().map(|folder| folder.0.clone());
        let folder = folder.unwrap_or_else(|| self.state_folder.join(FOLDER)).join(name);
        let source = CredentialSource {
            secret: mount.secret.value().cloned(),
            folder: self.server.secrets_folder().into(),
            environment: self.environment_of(mount),
        };
        if let Err(why) = source.read() {
            self.warnings.push(Warning { at: at.clone(), key: child(key, "secret"), why });
        }
        let spec = BucketSpec {
            name: name.to_owned(),
            provider: mount.provider.value().map(|provider| match provider {
                BucketProvider::S3 => Provider::S3,
                BucketProvider::Gcs => Provider::Gcs,
                BucketProvider::Azure => Provider::Azure,
            }),
            bucket: bucket.clone(),
            endpoint: mount.bucket_endpoint_url.value().map(|url| url.0.clone()),
            region: self.deployment.region.value().cloned(),
            prefix: prefix.to_owned(),
            role: mount.oidc_auth_role_arn.value().cloned(),
            read_only: mount.read_only(),
            requester_pays: mount.requester_pays(),
            mount_point: mount_point.clone(),
            folder,
            poll_interval: Duration::from_millis(mount.poll_interval_ms().0),
            settle: SETTLE,
            settle_timeout: Duration::from_secs(self.server.settle_timeout_seconds().0),
            bytes_max: mount.bucket_bytes_max.value().map(|bytes| bytes.0),
        };
        Some(Volume {
            name: name.to_owned(),
            mount_point,
            watch: Watching::Fitting,
            pipeline: None,
            bucket: Some(Box::new(Bucket { spec, takes_plugins: mount.plugins_from_buckets(), source })),
        })
    }

    /// What of the environment concerns a mount: the variable of its secret, or else all that clients of clouds look at.
    fn environment_of(&self, mount: &BucketMount) -> Environment {
        let owned = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        match mount.secret.value() {
            Some(secret) => secrets::variable(secret, self.environment)
                .map(|value| owned(secret, &value))
                .into_iter()
                .collect(),
            None => {
                let of_cloud = |name: &str| OF_CLOUDS.iter().any(|begin| name.starts_with(begin));
                let all = self.environment.iter().filter(|(name, _)| of_cloud(name));
                all.map(|(name, value)| owned(name, value)).collect()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config;

    fn loaded(text: &str, environment: &[(&str, &str)]) -> Result<config::Loaded, config::Faults> {
        let file = tempfile::Builder::new().suffix(".toml").tempfile().unwrap();
        std::fs::write(&file, text).unwrap();
        let set = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        config::load(&[file.path().to_owned()], &environment.iter().map(set).collect())
    }

    fn mount(keys: &str) -> String {
        format!(
            "[server]\nstate_folder = \"/state\"\n[[app_settings.deployment_config.cloud_bucket_mounts]]\nmount_point = \"/mnt/weights\"\nbucket_name = \"demo\"\n{keys}\n"
        )
    }

    #[test]
    fn a_mount_is_a_volume_named_after_its_folder() {
        let loaded =
            loaded(&mount("key_prefix = \"v3/\"\nread_only = true"), &[("AWS_REGION", "eu"), ("OTHER", "x")])
                .unwrap();
        let config = &loaded.config;
        assert_eq!(config.volumes.len(), 1, "no other volume where none is written");
        let volume = &config.volumes[0];
        let bucket = volume.bucket.as_ref().unwrap();
        assert_eq!((volume.name.as_str(), bucket.spec.prefix.as_str()), ("weights", "v3"));
        assert_eq!(bucket.spec.folder, Path::new("/state/buckets/weights"));
        assert_eq!(config.defaults.all_model_data_folder, Path::new("/mnt/weights"));
        let secret = bucket.credentials()().unwrap();
        assert_eq!(secret.0, BTreeMap::from([("AWS_REGION".to_owned(), "eu".to_owned())]));
    }

    #[test]
    fn what_does_not_fit_together_is_told() {
        for (keys, expected) in [
            ("secret = \"a\"\noidc_auth_role_arn = \"b\"", "either secret or oidc_auth_role_arn"),
            ("key_prefix = \"a/../b\"", "key_prefix"),
            ("key_prefix = \"a//b\"", "key_prefix"),
            ("bucket_endpoint_url = \"127.0.0.1:9000\"", "bucket_endpoint_url"),
            ("provider = \"s4\"", "one of \"s3\", \"gcs\", \"azure\""),
        ] {
            let said = loaded(&mount(keys), &[]).err().unwrap().to_string();
            assert!(said.contains(expected), "{keys}: {said}");
        }
        let twice = mount("name = \"volume\"")
            + "[app_settings.deployment_config.volumes]\n\"/mnt/weights\" = \"volume\"\n";
        let said = loaded(&twice, &[]).err().unwrap().to_string();
        assert!(
            said.contains("a name of its own for each volume") && said.contains("/mnt/weights"),
            "{said}"
        );
    }

    #[test]
    fn a_secret_is_a_folder_of_files_or_one_text_with_several_values() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("demo-aws")).unwrap();
        std::fs::write(folder.path().join("demo-aws/AWS_ACCESS_KEY_ID"), "one\n").unwrap();
        let source = |environment: &[(&str, &str)]| CredentialSource {
            secret: Some("demo-aws".into()),
            folder: folder.path().to_owned(),
            environment: environment
                .iter()
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
                .collect(),
        };
        let id =
            |source: &CredentialSource| source.read().map(|secret| secret.0["AWS_ACCESS_KEY_ID"].clone());
        assert_eq!(id(&source(&[])).as_deref(), Ok("one"));
        // It is replaced while a host runs.
        std::fs::write(folder.path().join("demo-aws/AWS_ACCESS_KEY_ID"), "two").unwrap();
        assert_eq!(id(&source(&[])).as_deref(), Ok("two"));
        for text in [
            "{\"AWS_ACCESS_KEY_ID\": \"three\"}",
            "# mine\nAWS_ACCESS_KEY_ID=three\nAWS_SECRET_ACCESS_KEY='x y'\n",
        ] {
            assert_eq!(id(&source(&[("demo-aws", text)])).as_deref(), Ok("three"), "{text}");
        }
        let said = source(&[("demo-aws", "hunter2")]).read().unwrap_err();
        assert!(said.contains("AWS_ACCESS_KEY_ID=") && !said.contains("hunter2"), "{said}");
        let account = "{\"type\": \"service_account\", \"private_key\": \"k\"}";
        assert_eq!(source(&[("demo-aws", account)]).read().unwrap().0[SERVICE_ACCOUNT_NAME], account);
        let missing = CredentialSource { secret: Some("none".into()), ..source(&[]) };
        assert!(missing.read().unwrap_err().contains("expected the secret \"none\""));
        assert!(!format!("{:?}", source(&[("demo-aws", "hunter2")])).contains("hunter2"));
    }
}
