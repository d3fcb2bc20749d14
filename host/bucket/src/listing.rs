//! What a prefix holds at one moment, as files: which keys can be that, and which objects are the same as before. It fetches nothing.

use std::collections::BTreeMap;

use futures_util::TryStreamExt;
use object_store::{ObjectMeta, path::Path};
use serde::{Deserialize, Serialize};

use crate::{error::MirrorError, spec::BucketSpec, store::Store};

/// Objects that a mirror may have: as many files as a volume's watch follows.
const OBJECTS_MAX: usize = 100_000;
/// Bytes of a file's name.
const NAME_BYTES_MAX: usize = 255;

/// An object, as a listing shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Object {
    pub(crate) bytes: u64,
    /// Without quotes and marks; some stores list none.
    pub(crate) etag: Option<String>,
    /// Milliseconds since 1970, by the store's clock. It counts only where there is no ETag: the same content that is written again is no change.
    pub(crate) modified_ms: i64,
}

impl Object {
    pub(crate) fn of(meta: &ObjectMeta) -> Self {
        Self {
            bytes: meta.size,
            etag: meta.e_tag.as_deref().map(bare).filter(|etag| !etag.is_empty()).map(str::to_owned),
            modified_ms: meta.last_modified.timestamp_millis(),
        }
    }

    /// Whether both are the same content, as far as a store tells.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        let by_time = || self.modified_ms == other.modified_ms;
        self.bytes == other.bytes
            && match (&self.etag, &other.etag) {
                (Some(one), Some(another)) => one == another,
                // An answer to a GET may name an ETag where the listing has none, and says the time in whole seconds.
                (None, None) => by_time(),
                _ => self.modified_ms / 1_000 == other.modified_ms / 1_000,
            }
    }

    /// The same, where its ETag came as a store wrote it.
    pub(crate) fn with_bare_etag(self) -> Self {
        Self { etag: self.etag.as_deref().map(bare).map(str::to_owned), ..self }
    }

    /// The ETag as a condition of a request.
    pub(crate) fn condition(&self) -> Option<String> {
        self.etag.as_ref().map(|etag| format!("\"{etag}\""))
    }
}

/// Listings have ETags with or without quotes, by store; answers have them with quotes.
fn bare(etag: &str) -> &str {
    etag.trim().trim_start_matches("W/").trim_matches('"')
}

/// The objects of a prefix, by their paths below it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Listing(pub(crate) BTreeMap<String, Object>);

impl Listing {
    pub(crate) fn bytes(&self) -> u64 {
        self.0.values().map(|object| object.bytes).sum()
    }

    /// Whether both have the same objects with the same content.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        self.0.len() == other.0.len()
            && self
                .0
                .iter()
                .zip(&other.0)
                .all(|((key, object), (other_key, other))| key == other_key && object.is_same(other))
    }
}

/// The location of a path below the prefix.
pub(crate) fn location(spec: &BucketSpec, path: &str) -> Result<Path, MirrorError> {
    let key = match spec.prefix.as_str() {
        "" => path.to_owned(),
        prefix => format!("{prefix}/{path}"),
    };
    // Never `Path::from`, which writes special characters in another way.
    Path::parse(&key).map_err(|error| MirrorError::Key(format!("{key:?} can't be a key: {error}")))
}

/// Lists the prefix, in pages.
pub(crate) async fn list(store: &Store, spec: &BucketSpec) -> Result<Listing, MirrorError> {
    let prefix = match spec.prefix.as_str() {
        "" => None,
        prefix => Some(Path::parse(prefix).map_err(|error| {
            MirrorError::Setup(format!("key_prefix {prefix:?} can't be the beginning of keys: {error}"))
        })?),
    };
    let mut found = BTreeMap::new();
    let mut pages = store.objects.list(prefix.as_ref());
    while let Some(meta) = pages.try_next().await.map_err(|error| store.listing_error(&error))? {
        let key = meta.location.as_ref();
        let path = match &prefix {
            None => key,
            Some(prefix) => match key.strip_prefix(prefix.as_ref()).and_then(|rest| rest.strip_prefix('/')) {
                Some(path) => path,
                // The marker of the folder itself.
                None => continue,
            },
        };
        if found.len() >= OBJECTS_MAX {
            return Err(MirrorError::TooMuch(format!(
                "expected at most {OBJECTS_MAX} objects, found more; mirror a prefix of the bucket (key_prefix)"
            )));
        }
        check(path)?;
        found.insert(path.to_owned(), Object::of(&meta));
    }
    let listing = as_files(found)?;
    let bytes = listing.bytes();
    match spec.bytes_max {
        Some(max) if bytes > max => Err(MirrorError::TooMuch(format!(
            "expected at most {max} bytes (bucket_bytes_max), found objects of {bytes} bytes; raise the limit, or mirror a prefix of the bucket (key_prefix)"
        ))),
        _ => Ok(listing),
    }
}

/// Whether a path is one below a folder.
fn check(path: &str) -> Result<(), MirrorError> {
    let refuse = |why: String| {
        Err(MirrorError::Key(format!(
            "the key {path:?} can't be the path of a file: {why}; rename that object, or mirror another prefix"
        )))
    };
    for name in path.split('/') {
        match name {
            "" => return refuse("a part of it is empty".to_owned()),
            "." | ".." => return refuse(format!("it leads out of its folder by {name:?}")),
            name if name.contains('\0') => return refuse("it has a zero byte".to_owned()),
            name if name.len() > NAME_BYTES_MAX => {
                return refuse(format!("a part of it has more than {NAME_BYTES_MAX} bytes"));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Where an object and a folder have one name, the object is that folder's marker if it is empty.
fn as_files(mut found: BTreeMap<String, Object>) -> Result<Listing, MirrorError> {
    let mut folders: Vec<String> = found
        .keys()
        .flat_map(|path| path.match_indices('/').map(|(at, _)| path[..at].to_owned()).collect::<Vec<_>>())
        .collect();
    folders.sort();
    folders.dedup();
    for folder in folders {
        match found.get(&folder) {
            Some(object) if object.bytes == 0 => drop(found.remove(&folder)),
            Some(_) => {
                return Err(MirrorError::Key(format!(
                    "the key {folder:?} is an object, and other keys begin with {:?}: expected either a file or a folder; rename one of them",
                    format!("{folder}/")
                )));
            }
            None => {}
        }
    }
    Ok(Listing(found))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(bytes: u64, etag: Option<&str>, modified_ms: i64) -> Object {
        Object { bytes, etag: etag.map(str::to_owned), modified_ms }
    }

    #[test]
    fn etags_are_the_same_with_and_without_quotes() {
        for (listed, answered) in [("\"a\"", "a"), ("a", "W/\"a\""), ("0x8D", "\"0x8D\"")] {
            assert_eq!(bare(listed), bare(answered));
        }
        assert_eq!(object(1, Some("a"), 0).condition().as_deref(), Some("\"a\""));
    }

    #[test]
    fn without_an_etag_size_and_time_tell() {
        assert!(object(1, Some("a"), 1).is_same(&object(1, Some("a"), 2)));
        assert!(!object(1, Some("a"), 1).is_same(&object(1, Some("b"), 1)));
        assert!(!object(1, None, 1).is_same(&object(1, None, 2)));
        assert!(!object(1, None, 1).is_same(&object(2, None, 1)));
        assert!(object(1, None, 1_999).is_same(&object(1, Some("a"), 1_000)));
    }

    #[test]
    fn keys_that_are_no_paths_are_named() {
        for key in ["a//b", "/a", "../a", "a/./b", "a/\0"] {
            let said = check(key).unwrap_err().to_string();
            assert!(said.contains(&format!("{key:?}")), "{said}");
        }
        assert!(check(&format!("a/{}", "x".repeat(256))).is_err());
        for key in ["a", "a/b c#%25/ä", ".hidden", "a/..b"] {
            check(key).unwrap();
        }
    }

    #[test]
    fn an_empty_object_where_a_folder_is_marks_it_and_a_full_one_is_refused() {
        let listed = |keys: &[(&str, u64)]| {
            as_files(keys.iter().map(|(key, bytes)| ((*key).to_owned(), object(*bytes, None, 0))).collect())
        };
        let listing = listed(&[("a", 0), ("a/b", 1), ("c", 0), ("d/e", 0), ("d/e/f", 2)]).unwrap();
        assert_eq!(listing.0.keys().collect::<Vec<_>>(), ["a/b", "c", "d/e/f"]);
        let said = listed(&[("a", 3), ("a/b", 1)]).unwrap_err().to_string();
        assert!(said.contains("\"a\"") && said.contains("\"a/\""), "{said}");
        // Names between a name and its folder in the alphabet.
        assert!(listed(&[("a", 3), ("a-b", 1), ("a/b", 1)]).is_err());
    }
}
