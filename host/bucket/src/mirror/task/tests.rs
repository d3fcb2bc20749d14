//! A mirror over a store in memory: what is shown, what goes up, and what is never overwritten.

use std::{fs, path::Path};

use object_store::{ObjectStore, ObjectStoreExt, memory::InMemory};

use super::*;
use crate::spec::Secret;

pub(crate) fn spec(folder: &Path) -> BucketSpec {
    BucketSpec {
        name: "weights".into(),
        provider: None,
        bucket: "demo".into(),
        endpoint: None,
        region: None,
        prefix: "v3".into(),
        role: None,
        read_only: false,
        requester_pays: false,
        mount_point: folder.join("mnt/weights"),
        folder: folder.join("own"),
        poll_interval: Duration::from_secs(60),
        settle: Duration::ZERO,
        settle_timeout: Duration::from_secs(10),
        bytes_max: None,
    }
}

struct Nothing;

impl Counters for Nothing {
    fn listed(&self, _: &'static str) {}
    fn fetched(&self, _: u64) {}
    fn written(&self, _: &'static str) {}
}

struct Fixture {
    folder: tempfile::TempDir,
    store: Arc<dyn ObjectStore>,
    task: Task,
}

impl Fixture {
    fn new(change: impl Fn(&mut BucketSpec)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
        let task = Self::task(folder.path(), &store, change).unwrap();
        Self { folder, store, task }
    }

    fn task(
        folder: &Path,
        store: &Arc<dyn ObjectStore>,
        change: impl Fn(&mut BucketSpec),
    ) -> Result<Task, MirrorError> {
        let mut spec = spec(folder);
        change(&mut spec);
        let snapshots = Snapshots::open(&spec, Arc::default())?;
        let credentials: Credentials = Arc::new(|| Ok(Secret::default()));
        let mut task =
            Task::new(spec, credentials, Arc::new(Nothing), snapshots, watch::channel(Status::default()).0);
        task.store = Some(Store::of(Arc::clone(store)));
        task.tell_found();
        Ok(task)
    }

    async fn put(&self, key: &str, content: &str) {
        self.store.put(&format!("v3/{key}").into(), content.to_owned().into()).await.unwrap();
    }

    async fn delete(&self, key: &str) {
        self.store.delete(&format!("v3/{key}").into()).await.unwrap();
    }

    async fn object(&self, key: &str) -> String {
        let answer = self.store.get(&format!("v3/{key}").into()).await.unwrap();
        String::from_utf8(answer.bytes().await.unwrap().to_vec()).unwrap()
    }

    fn at(&self, path: &str) -> PathBuf {
        self.folder.path().join("mnt/weights").join(path)
    }

    fn shown(&self, path: &str) -> Option<String> {
        fs::read_to_string(self.at(path)).ok()
    }

    fn conflicts(&self) -> Vec<String> {
        let entries = fs::read_dir(self.folder.path().join("own/conflicts")).into_iter().flatten().flatten();
        let mut found: Vec<String> = entries.map(|entry| fs::read_to_string(entry.path()).unwrap()).collect();
        found.sort();
        found
    }
}

#[tokio::test]
async fn what_the_bucket_has_is_shown_and_what_it_has_no_more_is_not() {
    let mut fixture = Fixture::new(|spec| spec.read_only = true);
    fixture.put("a", "one").await;
    fixture.put("deep/er/b", "two").await;
    fixture.store.put(&"v30/c".into(), "of another prefix".into()).await.unwrap();
    let synced = fixture.task.pass().await.unwrap();
    assert_eq!(synced, Synced { snapshot: 1, fetched: 2, removed: 0 });
    assert_eq!([fixture.shown("a"), fixture.shown("deep/er/b")], [Some("one".into()), Some("two".into())]);
    let first = fs::canonicalize(fixture.at("")).unwrap();
    assert_eq!(fs::read_dir(&first).unwrap().count(), 2);
    // Nothing has changed.
    assert_eq!(fixture.task.pass().await.unwrap(), Synced { snapshot: 1, fetched: 0, removed: 0 });
    fixture.put("a", "three").await;
    fixture.delete("deep/er/b").await;
    fixture.put("d", "").await;
    assert_eq!(fixture.task.pass().await.unwrap(), Synced { snapshot: 2, fetched: 2, removed: 1 });
    assert_eq!([fixture.shown("a"), fixture.shown("deep/er/b")], [Some("three".into()), None]);
    assert_eq!(fixture.shown("d").as_deref(), Some(""));
    // Whoever has resolved the folder sees what it was.
    assert_eq!(fs::read_to_string(first.join("a")).unwrap(), "one");
    assert_eq!(fs::read_to_string(first.join("deep/er/b")).unwrap(), "two");
}

#[tokio::test]
async fn what_is_written_below_a_mount_that_is_read_only_is_replaced() {
    let mut fixture = Fixture::new(|spec| spec.read_only = true);
    fixture.put("a", "one").await;
    fixture.put("b", "two").await;
    fixture.task.pass().await.unwrap();
    fs::remove_file(fixture.at("a")).unwrap();
    fs::write(fixture.at("a"), "mine").unwrap();
    fs::remove_file(fixture.at("b")).unwrap();
    assert_eq!(fixture.task.pass().await.unwrap().fetched, 2);
    assert_eq!([fixture.shown("a"), fixture.shown("b")], [Some("one".into()), Some("two".into())]);
    assert_eq!(fixture.object("a").await, "one");
}

#[tokio::test]
async fn files_go_up_and_stay_through_later_snapshots() {
    let mut fixture = Fixture::new(|_| {});
    fixture.put("a", "one").await;
    fixture.task.pass().await.unwrap();
    fs::create_dir(fixture.at("out")).unwrap();
    fs::write(fixture.at("out/new"), "new").unwrap();
    fs::write(fixture.at("a"), "changed").unwrap();
    fs::write(fixture.at("out/half.tmp"), "half").unwrap();
    // It holds still first.
    assert!(!fixture.task.write_back(false, &AtomicBool::new(false)).await);
    assert_eq!(fixture.task.status.borrow().unwritten, 2);
    assert!(fixture.store.head(&"v3/out/new".into()).await.is_err());
    // A snapshot that is made meanwhile takes it along.
    fixture.put("b", "two").await;
    fixture.task.pass().await.unwrap();
    assert_eq!(fixture.shown("out/new").as_deref(), Some("new"));
    assert_eq!(fixture.shown("a").as_deref(), Some("changed"));
    assert!(!fixture.task.write_back(true, &AtomicBool::new(false)).await);
    assert_eq!([fixture.object("out/new").await, fixture.object("a").await], ["new", "changed"]);
    assert_eq!(fixture.task.status.borrow().unwritten, 0);
    // What went up is no news, neither in the listing nor in what was shown before.
    assert_eq!(fixture.task.pass().await.unwrap(), Synced { snapshot: 2, fetched: 0, removed: 0 });
    fixture.put("b", "three").await;
    fixture.task.pass().await.unwrap();
    fs::write(fixture.at("out/new"), "newer").unwrap();
    fixture.task.snapshots.lock().remove_replaced(true).unwrap();
    assert_eq!(fixture.shown("out/new").as_deref(), Some("newer"));
    assert_eq!(fixture.shown("out/half.tmp").as_deref(), Some("half"));
    assert!(fixture.conflicts().is_empty(), "{:?}", fixture.conflicts());
}

#[tokio::test]
async fn nothing_is_overwritten_on_either_side_without_a_word() {
    let mut fixture = Fixture::new(|_| {});
    fixture.put("a", "one").await;
    fixture.put("gone", "one").await;
    fixture.task.pass().await.unwrap();
    fs::write(fixture.at("a"), "mine").unwrap();
    fs::write(fixture.at("gone"), "mine too").unwrap();
    fs::write(fixture.at("new"), "my new").unwrap();
    fixture.put("a", "theirs").await;
    fixture.put("new", "their new").await;
    fixture.delete("gone").await;
    // Found when it goes up.
    assert!(fixture.task.write_back(true, &AtomicBool::new(false)).await);
    assert_eq!([fixture.object("a").await, fixture.object("new").await], ["theirs", "their new"]);
    fixture.task.pass().await.unwrap();
    assert_eq!([fixture.shown("a"), fixture.shown("new")], [Some("theirs".into()), Some("their new".into())]);
    assert_eq!(fixture.shown("gone"), None);
    assert_eq!(fixture.conflicts(), ["mine", "mine too", "my new"]);
    // Found when the next snapshot is made.
    fs::write(fixture.at("a"), "mine again").unwrap();
    fixture.put("a", "theirs again").await;
    fixture.task.pass().await.unwrap();
    assert_eq!(fixture.shown("a").as_deref(), Some("theirs again"));
    assert_eq!(fixture.conflicts().len(), 4);
    let status = fixture.task.status.borrow().clone();
    assert_eq!((status.conflicts, status.last_conflict.as_deref()), (4, Some("a")));
}

#[tokio::test]
async fn the_next_process_goes_on_where_one_ended() {
    let mut fixture = Fixture::new(|_| {});
    fixture.put("a", "one").await;
    fixture.task.pass().await.unwrap();
    fs::write(fixture.at("mine"), "mine").unwrap();
    // As a process leaves it that ends while it makes a snapshot.
    fs::create_dir(fixture.folder.path().join("own/snapshots/000002")).unwrap();
    let Fixture { folder, store, task } = fixture;
    assert!(Fixture::task(folder.path(), &store, |_| {}).is_err(), "one process at a time");
    drop(task);
    let task = Fixture::task(folder.path(), &store, |_| {}).unwrap();
    let mut fixture = Fixture { folder, store, task };
    assert_eq!([fixture.shown("a"), fixture.shown("mine")], [Some("one".into()), Some("mine".into())]);
    assert!(!fixture.folder.path().join("own/snapshots/000002").exists());
    assert_eq!(fixture.task.pass().await.unwrap(), Synced { snapshot: 1, fetched: 0, removed: 0 });
    fixture.task.write_back(true, &AtomicBool::new(false)).await;
    assert_eq!(fixture.object("mine").await, "mine");
    // Another bucket's objects are not shown as this one's.
    let Fixture { folder, store, task } = fixture;
    drop(task);
    let task = Fixture::task(folder.path(), &store, |spec| spec.prefix = "v4".into()).unwrap();
    let fixture = Fixture { folder, store, task };
    assert_eq!(fixture.shown("a"), None);
}

#[tokio::test]
async fn a_mount_point_that_holds_something_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    let mount = folder.path().join("mnt/weights");
    fs::create_dir_all(&mount).unwrap();
    fs::write(mount.join("a"), "somebody's").unwrap();
    let said = Fixture::task(folder.path(), &store, |_| {}).err().unwrap().to_string();
    assert!(
        said.contains("expected nothing at the mount point") && said.contains("can't be removed"),
        "{said}"
    );
    assert_eq!(fs::read_to_string(mount.join("a")).unwrap(), "somebody's");
    fs::remove_file(mount.join("a")).unwrap();
    drop(Fixture::task(folder.path(), &store, |_| {}).unwrap());
    // The link that is there already needs nothing to be writable.
    drop(Fixture::task(folder.path(), &store, |_| {}).unwrap());
    fs::remove_file(&mount).unwrap();
    std::os::unix::fs::symlink("/etc", &mount).unwrap();
    let said = Fixture::task(folder.path(), &store, |_| {}).err().unwrap().to_string();
    assert!(said.contains("found a link to /etc"), "{said}");
}

#[tokio::test]
async fn more_than_may_be_mirrored_leaves_what_is_shown() {
    let mut fixture = Fixture::new(|spec| spec.bytes_max = Some(10));
    fixture.put("a", "0123456789").await;
    fixture.task.pass().await.unwrap();
    fixture.put("b", "1").await;
    let said = fixture.task.pass().await.unwrap_err().to_string();
    assert!(said.contains("bucket_bytes_max") && said.contains("11 bytes"), "{said}");
    assert_eq!([fixture.shown("a").as_deref(), fixture.shown("b").as_deref()], [Some("0123456789"), None]);
    // A key that is a file's and a folder's.
    fixture.delete("b").await;
    fixture.put("a/b", "").await;
    let said = fixture.task.pass().await.unwrap_err().to_string();
    assert!(said.contains("either a file or a folder"), "{said}");
    assert_eq!(fixture.shown("a").as_deref(), Some("0123456789"));
}

#[tokio::test]
async fn half_an_upload_is_not_shown() {
    let mut fixture = Fixture::new(|spec| spec.settle = Duration::from_millis(200));
    fixture.put("a", "old").await;
    fixture.put("b", "old").await;
    fixture.task.pass().await.unwrap();
    fixture.put("a", "new").await;
    let store = Arc::clone(&fixture.store);
    let (synced, ()) = tokio::join!(fixture.task.pass(), async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        store.put(&"v3/b".into(), "new".into()).await.unwrap();
    });
    assert_eq!(synced.unwrap(), Synced { snapshot: 2, fetched: 2, removed: 0 });
    assert_eq!([fixture.shown("a"), fixture.shown("b")], [Some("new".into()), Some("new".into())]);
}

#[test]
fn failures_are_tried_again_earlier_than_the_next_listing_and_less_and_less_often() {
    let fixture = Fixture::new(|_| {});
    let pauses = [0, 1, 2, 5, 9, u32::MAX].map(|failures| fixture.task.pause(failures).as_secs());
    assert_eq!(pauses, [60, 1, 2, 16, 60, 60]);
}

#[tokio::test]
async fn what_a_snapshot_that_was_never_shown_had_taken_along_still_goes_up() {
    let mut fixture = Fixture::new(|_| {});
    fixture.put("a", "one").await;
    fixture.task.pass().await.unwrap();
    fs::write(fixture.at("mine"), "mine").unwrap();
    // As a process leaves it that ends between taking files along and showing the next snapshot.
    let manifest = fixture.folder.path().join("own/snapshots/000001.json");
    let mut noted = crate::manifest::Manifest::read(&manifest).unwrap();
    let stamp = crate::manifest::Stamp::of(&fs::metadata(fixture.at("mine")).unwrap());
    noted.carried.insert("mine".into(), stamp);
    noted.write(&manifest).unwrap();
    let Fixture { folder, store, task } = fixture;
    drop(task);
    let task = Fixture::task(folder.path(), &store, |_| {}).unwrap();
    let mut fixture = Fixture { folder, store, task };
    fixture.task.write_back(true, &AtomicBool::new(false)).await;
    assert_eq!(fixture.object("mine").await, "mine");
}

#[tokio::test]
async fn an_upload_that_was_not_noted_is_no_conflict() {
    let mut fixture = Fixture::new(|_| {});
    fixture.put("a", "one").await;
    fixture.task.pass().await.unwrap();
    fs::write(fixture.at("mine"), "mine").unwrap();
    fixture.put("mine", "mine").await;
    assert!(!fixture.task.write_back(true, &AtomicBool::new(false)).await);
    fixture.task.pass().await.unwrap();
    assert!(fixture.conflicts().is_empty());
    // And what is written after it is newer than it.
    fs::remove_file(fixture.at("mine")).unwrap();
    fs::write(fixture.at("mine"), "mine, newer").unwrap();
    fixture.put("b", "two").await;
    fixture.task.pass().await.unwrap();
    assert_eq!(fixture.shown("mine").as_deref(), Some("mine, newer"));
    assert!(fixture.conflicts().is_empty());
}

#[tokio::test]
async fn what_never_holds_still_is_listed_twice_all_the_same() {
    let mut fixture = Fixture::new(|spec| {
        spec.settle = Duration::from_millis(200);
        spec.settle_timeout = Duration::ZERO;
    });
    fixture.put("a", "new").await;
    let store = Arc::clone(&fixture.store);
    let (synced, ()) = tokio::join!(fixture.task.pass(), async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        store.put(&"v3/b".into(), "new".into()).await.unwrap();
    });
    assert_eq!(synced.unwrap().fetched, 2);
}

#[tokio::test]
async fn no_file_takes_a_place_that_would_stop_the_mirror() {
    let mut fixture = Fixture::new(|_| {});
    fixture.put("model", "theirs").await;
    fixture.put("folder/x", "theirs").await;
    fixture.task.pass().await.unwrap();
    fs::remove_file(fixture.at("model")).unwrap();
    fs::create_dir(fixture.at("model")).unwrap();
    fs::write(fixture.at("model/x"), "mine").unwrap();
    fs::remove_dir_all(fixture.at("folder")).unwrap();
    fs::write(fixture.at("folder"), "mine too").unwrap();
    fixture.task.write_back(true, &AtomicBool::new(false)).await;
    assert!(fixture.store.head(&"v3/model/x".into()).await.is_err());
    assert!(fixture.store.head(&"v3/folder".into()).await.is_err());
    fixture.task.pass().await.unwrap();
    assert_eq!(
        [fixture.shown("model"), fixture.shown("folder/x")],
        [Some("theirs".into()), Some("theirs".into())]
    );
    assert_eq!(fixture.task.status.borrow().conflicts, 2);
}

#[tokio::test]
async fn folders_that_a_pipeline_makes_stay_and_so_does_a_snapshot_that_somebody_works_in() {
    let mut fixture = Fixture::new(|_| {});
    fixture.put("a", "one").await;
    fixture.task.pass().await.unwrap();
    fs::create_dir_all(fixture.at("out/deep")).unwrap();
    let first = fs::canonicalize(fixture.at("")).unwrap();
    let mut worker = std::process::Command::new("sleep").arg("60").current_dir(&first).spawn().unwrap();
    fixture.put("a", "two").await;
    fixture.task.pass().await.unwrap();
    assert!(fixture.at("out/deep").is_dir());
    fixture.task.snapshots.lock().remove_replaced(true).unwrap();
    assert_eq!(fs::read_to_string(first.join("a")).unwrap(), "one");
    worker.kill().unwrap();
    worker.wait().unwrap();
    fixture.task.snapshots.lock().remove_replaced(true).unwrap();
    assert!(!first.exists());
}

#[tokio::test]
async fn a_manifest_that_can_not_be_read_costs_nobody_a_file() {
    let mut fixture = Fixture::new(|_| {});
    fixture.put("a", "one").await;
    fixture.task.pass().await.unwrap();
    fs::write(fixture.at("mine"), "mine").unwrap();
    fs::write(fixture.folder.path().join("own/snapshots/000001.json"), "{}").unwrap();
    let Fixture { folder, store, task } = fixture;
    drop(task);
    let said = Fixture::task(folder.path(), &store, |_| {}).err().unwrap().to_string();
    assert!(said.contains("can't be read") && said.contains("move that folder away"), "{said}");
    assert_eq!(fs::read_to_string(folder.path().join("mnt/weights/mine")).unwrap(), "mine");
}

#[tokio::test]
async fn a_mirror_that_can_not_start_says_why() {
    let folder = tempfile::tempdir().unwrap();
    let spec = spec(folder.path());
    fs::create_dir_all(&spec.mount_point).unwrap();
    fs::write(spec.mount_point.join("a"), "somebody's").unwrap();
    let credentials: Credentials = Arc::new(|| Ok(Secret::default()));
    let started = crate::mirror::Mirrors::start(vec![(spec, credentials, Arc::new(Nothing))], || {});
    assert!(started.err().unwrap().to_string().contains("expected nothing at the mount point"));
}
