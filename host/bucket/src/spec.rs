//! What a mirror is told: which objects, by whose leave, into which folder, within which limits.

use std::{collections::BTreeMap, fmt, path::PathBuf, sync::Arc, time::Duration};

/// A prefix of a bucket, and the folder that it becomes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BucketSpec {
    /// The volume's name, in the log and in metrics.
    pub name: String,
    /// What the store speaks; `None` for what its address and the secret's keys say, else S3.
    pub provider: Option<Provider>,
    /// The bucket; of Azure, the container.
    pub bucket: String,
    /// Where the store answers, where that isn't the cloud's own address.
    pub endpoint: Option<String>,
    /// The region, where neither the secret nor the environment has one.
    pub region: Option<String>,
    /// The folder of keys that is mirrored; empty for the whole bucket.
    pub prefix: String,
    /// The role whose credentials are asked for, with a token of this workload's identity.
    pub role: Option<String>,
    /// Whether nothing is written back.
    pub read_only: bool,
    /// Whether the caller pays.
    pub requester_pays: bool,
    /// The mount point: a link to the current snapshot.
    pub mount_point: PathBuf,
    /// The mirror's own folder, for nobody else.
    pub folder: PathBuf,
    /// Between two listings.
    pub poll_interval: Duration,
    /// How long objects that change must hold still before they are shown, and how long that is waited for.
    pub settle: Duration,
    /// After this, objects that still change are shown as they are.
    pub settle_timeout: Duration,
    /// The most bytes that its objects may have together; `None` for what the disk has room for.
    pub bytes_max: Option<u64>,
}

/// What a store speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Provider {
    /// S3: of AWS, R2, Ceph, MinIO and many others.
    S3,
    /// Google Cloud Storage.
    Gcs,
    /// Azure Blob Storage.
    Azure,
}

impl fmt::Display for Provider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::S3 => "S3",
            Self::Gcs => "Google Cloud Storage",
            Self::Azure => "Azure Blob Storage",
        })
    }
}

/// Names and values that clients of clouds know, such as `AWS_ACCESS_KEY_ID`. Printed, it shows the names.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Secret(pub BTreeMap<String, String>);

impl Secret {
    /// The first of these names that has a value.
    pub(crate) fn any_of(&self, names: &[&str]) -> Option<&str> {
        names.iter().find_map(|name| self.0.get(*name)).map(String::as_str)
    }

    /// A text without any of the values.
    pub(crate) fn hide_in(&self, text: String) -> String {
        // Shorter ones are words that a text may have anyway, such as a region.
        const SECRET_CHARS_MIN: usize = 8;
        let hidden = self.0.iter().filter(|(name, value)| {
            value.len() >= SECRET_CHARS_MIN
                && ["KEY", "SECRET", "TOKEN", "SIG", "JSON", "PASSWORD"]
                    .iter()
                    .any(|word| name.contains(word))
        });
        hidden.fold(text, |text, (name, value)| text.replace(value.as_str(), &format!("({name})")))
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.keys()).finish()
    }
}

/// Reads the credentials anew, as they are now: secrets are replaced while a host runs. An error says what is missing, and never a value.
pub type Credentials = Arc<dyn Fn() -> Result<Secret, String> + Send + Sync>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_value_of_a_secret_is_shown() {
        let secret = Secret(BTreeMap::from([
            ("AWS_SECRET_ACCESS_KEY".to_owned(), "abcdefgh12345".to_owned()),
            ("AWS_REGION".to_owned(), "eu-central-1".to_owned()),
        ]));
        let said = secret.hide_in("GET http://a/?k=abcdefgh12345 in eu-central-1".to_owned());
        assert_eq!(said, "GET http://a/?k=(AWS_SECRET_ACCESS_KEY) in eu-central-1");
        assert_eq!(format!("{secret:?}"), "[\"AWS_REGION\", \"AWS_SECRET_ACCESS_KEY\"]");
    }
}
