//! What is told of a volume, and when it is looked at again.

use std::{fs, os::unix::fs::PermissionsExt, path::Path, time::SystemTime};

use super::{
    files::name_of_library,
    scan::{RETRY, earlier_of},
    *,
};
use crate::config;
use crate::fence::Fence;

struct Watched {
    scanner: Scanner,
    folder: tempfile::TempDir,
    begun: Instant,
}

impl Watched {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let server = config::load(&[], &config::Environment::default()).unwrap().config.server;
        let engine = crate::app::engine(&server, None).unwrap();
        let gauge = crate::insight::metrics::Metrics::new(crate::insight::traces::Traces::default())
            .libraries
            .clone();
        let fence = Fence::open(tempfile::tempdir().unwrap().path()).unwrap();
        let builder = Arc::new(Builder::new(engine, fence, &[], gauge));
        let volume = Volume {
            name: "v".into(),
            mount_point: folder.path().to_owned(),
            watch: Watching::Poll,
            pipeline: None,
            bucket: None,
        };
        Self { scanner: Scanner::new(&volume, &server, builder), folder, begun: Instant::now() }
    }

    /// Written at a moment from which it has not held still at all.
    fn write(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.folder.path().join(name);
        fs::write(&path, content).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        let later = SystemTime::now() + Duration::from_secs(3600);
        fs::File::options().append(true).open(&path).unwrap().set_modified(later).unwrap();
        path
    }

    /// What is told after this many milliseconds.
    fn told(&mut self, after_ms: u64, finished: &[&PathBuf]) -> Vec<String> {
        self.looked(after_ms, finished).0
    }

    /// The same, and when something is to be looked at again.
    fn looked(&mut self, after_ms: u64, finished: &[&PathBuf]) -> (Vec<String>, Option<Duration>) {
        let finished = finished.iter().map(|path| (*path).clone()).collect();
        let hints = Hints { finished: &finished, writing: &BTreeSet::new(), skip_settling: false };
        let now = self.begun + Duration::from_millis(after_ms);
        let files = self.scanner.collect();
        let (mut told, mut next) = self.scanner.plugins(now, &hints, &files);
        let (data, later) = self.scanner.data(now, &hints, files);
        told.extend(data);
        later.into_iter().for_each(|later| earlier_of(&mut next, later));
        let words = |told: VolumeEvent| match told {
            VolumeEvent::Plugin { name, staged: Ok(_), .. } => name,
            VolumeEvent::Plugin { name, staged: Err(error), .. } => format!("{name}: {error}"),
            VolumeEvent::Gone { name, .. } => format!("{name} is gone"),
            VolumeEvent::Data { changed } => changed.join(" "),
            VolumeEvent::ScanDone { .. } => unreachable!("the thread tells that"),
        };
        (told.into_iter().map(words).collect(), next)
    }

    /// How long until the next scan where events come and nothing wakes the thread.
    fn pause(&mut self) -> Duration {
        pause(Watching::Native, true, self.scanner.collect().completeness, POLL_INTERVAL)
    }

    /// A link that can't be followed, for a reason that says nothing about what is behind it.
    fn unreadable(&self, name: &str) -> PathBuf {
        let link = self.folder.path().join(name);
        std::os::unix::fs::symlink("x".repeat(300), &link).unwrap();
        link
    }
}

const POLL_INTERVAL: Duration = Duration::from_secs(2);

#[test]
fn a_look_that_did_not_see_everything_is_soon_followed_by_another() {
    let mut watched = Watched::new();
    watched.write("echo.so", &[b'x'; 100]);
    fs::create_dir(watched.folder.path().join("data")).unwrap();
    watched.write("data/weights.bin", b"one");
    assert_eq!(watched.pause(), NATIVE_SCAN_INTERVAL);
    let link = watched.unreadable("data/labels.txt");
    assert!(watched.scanner.collect().completeness.partial);
    assert_eq!(watched.pause(), POLL_INTERVAL);
    fs::remove_file(link).unwrap();
    assert_eq!(watched.pause(), NATIVE_SCAN_INTERVAL);
    // Without events, and where others may come from elsewhere.
    assert_eq!(pause(Watching::Native, false, Completeness::default(), POLL_INTERVAL), POLL_INTERVAL);
    assert_eq!(pause(Watching::Both, true, Completeness::default(), POLL_INTERVAL), POLL_INTERVAL);
    // A minute is the most.
    let hour = Duration::from_secs(3600);
    assert_eq!(pause(Watching::Native, false, Completeness::default(), hour), NATIVE_SCAN_INTERVAL);
    fs::remove_dir_all(watched.folder.path()).unwrap();
    assert_eq!(watched.pause(), POLL_INTERVAL, "the folder may come again");
}

#[test]
fn what_is_linked_is_polled_as_nothing_tells_of_what_changes_behind_a_link() {
    use std::os::unix::fs::symlink;
    let mut watched = Watched::new();
    let elsewhere = tempfile::tempdir().unwrap();
    fs::write(elsewhere.path().join("weights.bin"), b"one").unwrap();
    for (target, name) in [("weights.bin", "weights.bin"), ("weights.bin", "echo.so"), ("", "folder")] {
        let link = watched.folder.path().join(name);
        symlink(elsewhere.path().join(target), &link).unwrap();
        assert_eq!(watched.pause(), POLL_INTERVAL, "{name}");
        fs::remove_file(link).unwrap();
        assert_eq!(watched.pause(), NATIVE_SCAN_INTERVAL, "{name}");
    }
    let real = watched.scanner.mount_point.clone();
    watched.scanner.mount_point = elsewhere.path().join("volume");
    symlink(real, &watched.scanner.mount_point).unwrap();
    assert_eq!(watched.pause(), POLL_INTERVAL);
}

#[test]
fn a_plugin_is_gone_where_its_folder_could_be_read_and_only_there() {
    let mut watched = Watched::new();
    let path = watched.write("echo.so", &[b'x'; 100]);
    assert_eq!(watched.told(0, &[&path]), ["echo"]);
    let folder = watched.folder.path().join("data");
    fs::create_dir(&folder).unwrap();
    let beside = watched.unreadable("other");
    fs::remove_file(&path).unwrap();
    assert!(watched.told(100, &[]).is_empty(), "nobody knows what could not be looked at");
    fs::remove_file(beside).unwrap();
    watched.unreadable("data/labels.txt");
    assert_eq!(watched.told(200, &[]), ["echo is gone"]);
}

#[test]
fn data_that_can_not_be_read_now_is_read_again_and_is_no_change_before() {
    let mut watched = Watched::new();
    let path = watched.write("weights.bin", b"one");
    assert!(watched.told(0, &[]).is_empty());
    // It can be opened, and reading fails with EIO.
    fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink("/proc/self/mem", &path).unwrap();
    assert!(watched.told(100, &[&path]).is_empty());
    let (told, next) = watched.looked(400, &[]);
    assert!(told.is_empty() && next.is_some_and(|next| next <= RETRY), "{told:?} {next:?}");
    fs::remove_file(&path).unwrap();
    watched.write("weights.bin", b"one");
    assert!(watched.told(500, &[&path]).is_empty() && watched.told(5_000, &[]).is_empty(), "as it was");
    watched.write("weights.bin", b"two");
    assert_eq!(
        (watched.told(6_000, &[]), watched.told(9_000, &[])),
        (vec![], vec!["weights.bin".to_owned()])
    );
}

#[test]
fn names_are_read_from_files() {
    let name = |path: &str| name_of_library(Path::new(path));
    assert_eq!(name("/v/echo.so").as_deref(), Some("echo"));
    assert_eq!(name("/v/libecho.so").as_deref(), Some("echo"));
    assert_eq!((name("/v/lib.so"), name("/v/echo.so.part")), (None, None));
}

#[test]
fn a_plugin_is_told_once_when_it_has_held_still_or_its_writer_has_ended() {
    let mut watched = Watched::new();
    let text = [b'x'; 100];
    watched.write("echo.so", &text);
    watched.write(".hidden.so", &text);
    assert!(watched.told(0, &[]).is_empty() && watched.told(199, &[]).is_empty());
    assert_eq!(watched.told(200, &[]), ["echo"]);
    assert!(watched.told(900, &[]).is_empty());
    let path = watched.write("echo.so", &[b'y'; 101]);
    assert_eq!(watched.told(1000, &[&path]), ["echo"]);
    // What was told of isn't gone before it is; another name for it comes after.
    fs::rename(&path, watched.folder.path().join("libecho.so")).unwrap();
    let new = watched.folder.path().join("libecho.so");
    assert_eq!(watched.told(1100, &[&new]), ["echo is gone", "echo"]);
}

#[test]
fn half_a_library_waits_for_the_rest_up_to_the_timeout() {
    let mut watched = Watched::new();
    let whole = fs::read(std::env::current_exe().unwrap()).unwrap();
    watched.write("half.so", &whole[..5000]);
    assert!(watched.told(0, &[]).is_empty() && watched.told(9_999, &[]).is_empty());
    assert_eq!(watched.told(10_000, &[]), ["half"]);
}

#[test]
fn a_refusal_for_its_folder_is_looked_at_again() {
    let mut watched = Watched::new();
    let path = watched.write("echo.so", &[b'x'; 100]);
    let mode = |mode| {
        fs::set_permissions(path.parent().unwrap(), fs::Permissions::from_mode(mode)).unwrap();
    };
    mode(0o777);
    assert!(watched.told(0, &[&path])[0].contains("may be written by everybody"));
    assert!(watched.told(1500, &[]).is_empty(), "the same is told once");
    mode(0o755);
    assert_eq!(watched.told(3000, &[]), ["echo"]);
}

#[test]
fn data_is_told_together_and_by_content() {
    let mut watched = Watched::new();
    watched.write("weights.bin", b"one");
    assert!(watched.told(0, &[]).is_empty(), "what was there before is no change");
    let weights = watched.write("weights.bin", b"two");
    watched.write("labels.txt", b"new");
    assert!(watched.told(100, &[&weights]).is_empty(), "the labels are on their way");
    assert_eq!(watched.told(2_100, &[]), ["labels.txt weights.bin"]);
    watched.write("weights.bin", b"two");
    fs::remove_file(watched.folder.path().join("labels.txt")).unwrap();
    assert!(watched.told(3_000, &[]).is_empty() && watched.told(9_000, &[]).is_empty());
    // A file that never holds still holds up the others for so long only.
    watched.write("weights.bin", b"three");
    for moment in 0..10 {
        watched.write("log.bin", &vec![0; moment + 1]);
        assert!(watched.told(10_000 + 1_000 * moment as u64, &[]).is_empty());
    }
    watched.write("log.bin", &[1; 99]);
    assert_eq!(watched.told(20_500, &[]), ["weights.bin"]);
}
