//! Files into objects: whole, and on the condition that the object is what the file was made from. It never reads a listing.

use std::{fs, io::Read, path::Path, sync::Arc};

use futures_util::TryStreamExt;
use object_store::{
    Error as StoreError, MultipartUpload, ObjectMeta, ObjectStore, ObjectStoreExt, PutMode,
    PutMultipartOptions, PutOptions, PutPayload, UpdateVersion,
};

use crate::{
    error::{MirrorError, local},
    listing::{Object, location},
    manifest::Stamp,
    spec::BucketSpec,
    store::Store,
};

/// Files up to this go up in one request, whose condition the store itself checks. Larger ones go up in parts, and the condition is checked
/// before the first and before the last step.
const WHOLE_BYTES_MAX: u64 = 8 << 20;
/// S3 takes no smaller parts but the last, and 10,000 of them.
const PART_BYTES_MIN: u64 = 5 << 20;
const PARTS_MAX: u64 = 10_000;

/// What became of a file.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Uploaded {
    /// It is this object now.
    Done(Object),
    /// The bucket has something else there than the file was made from: nothing was written.
    Conflict,
    /// It was written while it was read: it goes up when it holds still.
    Moves,
}

/// Sends a file up; `base` is the object that it was made from, `None` where there was none.
pub(crate) async fn upload(
    store: &Store,
    spec: &BucketSpec,
    path: &str,
    (file, stamp): (&Path, Stamp),
    base: Option<&Object>,
) -> Result<Uploaded, MirrorError> {
    let location = location(spec, path)?;
    let of_store = |error: StoreError| store.error(&error);
    let objects = &store.objects;
    // By the store's own words, in which conditions are to be said.
    let there = match objects.head(&location).await {
        Ok(meta) => Some(meta),
        Err(StoreError::NotFound { .. }) => None,
        Err(error) => return Err(of_store(error)),
    };
    let as_expected = match (&there, base) {
        (None, None) => true,
        (Some(meta), Some(base)) => Object::of(meta).is_same(base),
        _ => false,
    };
    if !as_expected {
        // It may be this very content: the answer to its upload was lost, or this process ended before it was noted.
        return match there {
            Some(meta) if has_content(objects, &location, &meta, file).await.map_err(of_store)? => {
                Ok(Uploaded::Done(Object::of(&meta)))
            }
            _ => Ok(Uploaded::Conflict),
        };
    }
    let mut opened = fs::File::open(file).map_err(local("open", file))?;
    let before = Stamp::of(&opened.metadata().map_err(local("look at", file))?);
    // The one that held still, and no other that has taken its place.
    if before != stamp {
        return Ok(Uploaded::Moves);
    }
    let put = if before.bytes <= WHOLE_BYTES_MAX {
        let mut content = Vec::with_capacity(before.bytes as usize);
        (&opened).take(WHOLE_BYTES_MAX + 1).read_to_end(&mut content).map_err(local("read", file))?;
        if moves(&opened, file, before, content.len() as u64)? {
            return Ok(Uploaded::Moves);
        }
        let mode = match there {
            None => PutMode::Create,
            Some(meta) => PutMode::Update(UpdateVersion { e_tag: meta.e_tag, version: meta.version }),
        };
        objects.put_opts(&location, PutPayload::from(content), PutOptions::from(mode)).await
    } else {
        let mut parts =
            objects.put_multipart_opts(&location, PutMultipartOptions::default()).await.map_err(of_store)?;
        let sent = send_parts(&mut *parts, &mut opened, before.bytes).await;
        let moved = moves(&opened, file, before, before.bytes)?;
        let now = objects.head(&location).await;
        let unchanged = match (&now, &there) {
            (Err(StoreError::NotFound { .. }), None) => true,
            (Ok(now), Some(there)) => Object::of(now).is_same(&Object::of(there)),
            _ => false,
        };
        if sent.is_err() || moved || !unchanged {
            // Parts that stay cost their owner money.
            let _ = parts.abort().await;
            sent.map_err(|error| error.into_mirror(file, store))?;
            return Ok(if moved { Uploaded::Moves } else { Uploaded::Conflict });
        }
        parts.complete().await
    };
    match put {
        Ok(put) => {
            let own = Object { bytes: before.bytes, etag: put.e_tag, modified_ms: 0 }.with_bare_etag();
            // As listings will show it, unless somebody has written it since.
            let there = Object::of(&objects.head(&location).await.map_err(of_store)?);
            let is_own = own.etag.is_none() || there.etag == own.etag;
            Ok(Uploaded::Done(if is_own { there } else { own }))
        }
        Err(
            StoreError::Precondition { .. }
            | StoreError::AlreadyExists { .. }
            | StoreError::NotModified { .. },
        ) => {
            let meta = objects.head(&location).await.map_err(of_store)?;
            match has_content(objects, &location, &meta, file).await.map_err(of_store)? {
                true => Ok(Uploaded::Done(Object::of(&meta))),
                false => Ok(Uploaded::Conflict),
            }
        }
        Err(error) => Err(of_store(error)),
    }
}

/// Whether an object has a file's content.
async fn has_content(
    store: &Arc<dyn ObjectStore>,
    location: &object_store::path::Path,
    meta: &ObjectMeta,
    file: &Path,
) -> Result<bool, StoreError> {
    let Ok(mut opened) = fs::File::open(file) else { return Ok(false) };
    if opened.metadata().map_or(0, |found| found.len()) != meta.size {
        return Ok(false);
    }
    let mut chunks = store.get(location).await?.into_stream();
    let mut own = Vec::new();
    while let Some(chunk) = chunks.try_next().await? {
        own.resize(chunk.len(), 0);
        if opened.read_exact(&mut own).is_err() || own != chunk {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether a file was written while it was read.
fn moves(opened: &fs::File, file: &Path, before: Stamp, read: u64) -> Result<bool, MirrorError> {
    let after = Stamp::of(&opened.metadata().map_err(local("look at", file))?);
    Ok(after != before || read != before.bytes)
}

enum Send {
    Local(std::io::Error),
    Store(StoreError),
}

impl Send {
    fn into_mirror(self, file: &Path, store: &Store) -> MirrorError {
        match self {
            Self::Local(error) => local("read", file)(error),
            Self::Store(error) => store.error(&error),
        }
    }
}

async fn send_parts(parts: &mut dyn MultipartUpload, file: &mut fs::File, bytes: u64) -> Result<(), Send> {
    let part_bytes = PART_BYTES_MIN.max(bytes.div_ceil(PARTS_MAX));
    let mut left = bytes;
    while left > 0 {
        let length = part_bytes.min(left);
        let mut content = vec![0; length as usize];
        file.read_exact(&mut content).map_err(Send::Local)?;
        parts.put_part(PutPayload::from(content)).await.map_err(Send::Store)?;
        left -= length;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use object_store::memory::InMemory;

    use super::*;
    use crate::mirror::tests::spec;

    #[tokio::test]
    async fn nothing_is_written_over_that_the_file_was_not_made_from() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a");
        let objects: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
        let store = Store::of(Arc::clone(&objects));
        let spec = spec(folder.path());
        let put = async |content: &str, base: Option<Object>| {
            fs::write(&file, content).unwrap();
            let stamp = Stamp::of(&fs::metadata(&file).unwrap());
            upload(&store, &spec, "a", (&file, stamp), base.as_ref()).await.unwrap()
        };
        let Uploaded::Done(first) = put("one", None).await else { panic!("it was free") };
        assert_eq!(put("two", None).await, Uploaded::Conflict);
        let Uploaded::Done(second) = put("two", Some(first.clone())).await else { panic!("it was its base") };
        assert_eq!(put("three", Some(first)).await, Uploaded::Conflict);
        let stored = objects.get(&"v3/a".into()).await.unwrap().bytes().await.unwrap();
        assert_eq!(&stored[..], b"two");
        // Content that is there already, as after an answer that was lost.
        assert!(matches!(put("two", None).await, Uploaded::Done(_)));
        // Of several parts.
        let large = "x".repeat(WHOLE_BYTES_MAX as usize + 1);
        assert_eq!(put(&large, None).await, Uploaded::Conflict);
        assert!(matches!(put(&large, Some(second)).await, Uploaded::Done(_)));
        assert_eq!(objects.head(&"v3/a".into()).await.unwrap().size, large.len() as u64);
    }
}
