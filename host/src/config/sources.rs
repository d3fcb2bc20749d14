//! What a configuration is read from: the files as they were at one moment, whether they look as if somebody were still writing them,
//! and whether they have lost what they said. It never knows what keys mean.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio::time::Instant;

use super::{Environment, Fault, Faults, Loaded, assemble, environment::DOT_ENV, files};
use crate::transient::is_transient;

/// How long a file that looks cut short must hold still until it is taken for whole. Any other counts once two looks in a row have seen
/// the same.
pub const CUT_STILL_TIME: Duration = Duration::from_secs(10);

/// Where a configuration is read from, to be read again.
#[derive(Clone, Debug)]
pub struct Sources {
    files: Vec<PathBuf>,
}

/// What the files held at one moment.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Snapshot {
    files: Vec<(PathBuf, Content)>,
    dot_env: Content,
}

/// What a file held.
#[derive(Clone, Default, PartialEq, Eq)]
enum Content {
    /// There was none.
    #[default]
    None,
    Bytes(Vec<u8>),
    /// There may be one, and this keeps it from being read; with the number of the system's error, where it has one.
    Unreadable(String, Option<i32>),
}

impl Sources {
    /// These files, the process's environment and `.env`.
    #[must_use]
    pub fn new(files: Vec<PathBuf>) -> Self {
        Self { files }
    }

    /// Reads them.
    ///
    /// # Errors
    /// As [`super::load`].
    pub fn load(&self) -> Result<Loaded, Faults> {
        self.look().load()
    }

    /// What they hold now.
    #[must_use]
    pub fn look(&self) -> Snapshot {
        let files = self.files.iter().map(|path| (path.clone(), Content::read(path))).collect();
        Snapshot { files, dot_env: Content::read(Path::new(DOT_ENV)) }
    }
}

impl Snapshot {
    /// Makes a configuration of them.
    ///
    /// # Errors
    /// As [`super::load`].
    pub fn load(&self) -> Result<Loaded, Faults> {
        let environment = Environment::of_process_over(self.dot_env.text(), Path::new(DOT_ENV))?;
        let parsed = self
            .files
            .iter()
            .map(|(path, content)| files::parse_read(content.text(), &path.as_path().into()));
        let mut loaded = assemble(parsed, &environment)?;
        let files: Vec<PathBuf> = self.files.iter().map(|(path, _)| path.clone()).collect();
        loaded.warnings.extend(super::unread(&files));
        Ok(Loaded { snapshot: self.clone(), ..loaded })
    }

    /// The files that were there, as they were named.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        let dot_env = (!matches!(self.dot_env, Content::None)).then(|| DOT_ENV.to_owned());
        self.files.iter().map(|(path, _)| path.display().to_string()).chain(dot_env).collect()
    }

    /// One that could not be read for a reason that may pass, and that reason: what they hold can't be told now.
    #[must_use]
    pub fn unknown(&self) -> Option<String> {
        let files = self.files.iter().map(|(path, content)| (path.as_path(), content));
        files
            .chain([(Path::new(DOT_ENV), &self.dot_env)])
            .find_map(|(path, content)| Some(format!("{}: {}", path.display(), content.unknown()?)))
    }

    /// A file that looks as if it were not all there, in words: it is gone, begins like what is in force and ends before that does, or its
    /// last line has no end.
    #[must_use]
    pub fn cut(&self, in_force: &Self) -> Option<String> {
        self.beside(in_force).find_map(|(path, now, before)| {
            let what = match (now, before) {
                (Content::Bytes(now), Content::Bytes(before)) if looks_cut(now, before) => "looks cut short",
                (Content::Bytes(now), Content::None | Content::Unreadable(..)) if looks_cut(now, &[]) => {
                    "looks cut short"
                }
                (Content::None, Content::Bytes(_)) => "is gone",
                _ => return None,
            };
            Some(format!("{} {what}", path.display()))
        })
    }

    /// The files that held settings and hold none any more.
    pub(crate) fn emptied(&self, in_force: &Self) -> Vec<Fault> {
        let fault = |(path, now, before): (&Path, &Content, &Content)| {
            let found = match now {
                Content::None => "no file",
                Content::Bytes(_) => "a file without any setting",
                // Its own fault.
                Content::Unreadable(..) => return None,
            };
            (before.has_settings(path) && !now.has_settings(path)).then(|| {
                let fault = Fault::of_file(path, "settings, as it held when it was read last", found);
                fault.hint("write it again; or, where that is meant, restart the host to go on without them")
            })
        };
        self.beside(in_force).filter_map(fault).collect()
    }

    /// Each file that differs, now and before.
    fn beside<'a>(&'a self, before: &'a Self) -> impl Iterator<Item = (&'a Path, &'a Content, &'a Content)> {
        let files = self
            .files
            .iter()
            .zip(&before.files)
            .map(|((path, now), (_, before))| (path.as_path(), now, before));
        files
            .chain([(Path::new(DOT_ENV), &self.dot_env, &before.dot_env)])
            .filter(|(_, now, before)| now != before)
    }
}

impl Content {
    fn read(path: &Path) -> Self {
        match fs::read(path) {
            Ok(bytes) => Self::Bytes(bytes),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Self::None,
            Err(error) => Self::Unreadable(error.to_string(), error.raw_os_error()),
        }
    }

    fn text(&self) -> io::Result<String> {
        match self {
            Self::Bytes(bytes) => String::from_utf8(bytes.clone())
                .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "it is not UTF-8")),
            Self::None => Err(io::ErrorKind::NotFound.into()),
            Self::Unreadable(_, Some(number)) => Err(io::Error::from_raw_os_error(*number)),
            Self::Unreadable(error, None) => Err(io::Error::other(error.clone())),
        }
    }

    /// Why it could not be read, where that may pass: the file may be as it was.
    fn unknown(&self) -> Option<&str> {
        match self {
            Self::Unreadable(error, Some(number)) => {
                is_transient(&io::Error::from_raw_os_error(*number)).then_some(error)
            }
            _ => None,
        }
    }

    /// Not where there are blanks and comments only. What can't be parsed is no empty file.
    fn has_settings(&self, path: &Path) -> bool {
        let Self::Bytes(_) = self else { return false };
        if path == Path::new(DOT_ENV) {
            return Environment::of_dot_env(self.text(), path)
                .map_or(true, |variables| !variables.is_empty());
        }
        let shared: Arc<Path> = path.into();
        files::parse_read(self.text(), &shared).map_or(true, |file| !file.root.entries().is_empty())
    }
}

/// Whether new content of a file looks as if it were not all there, beside what was in force.
#[must_use]
pub fn looks_cut(now: &[u8], in_force: &[u8]) -> bool {
    now != in_force && (in_force.starts_with(now) || !now.ends_with(b"\n"))
}

/// What was seen at the last look, and since when.
pub struct Looks<T> {
    seen: T,
    since: Instant,
}

impl<T: PartialEq> Looks<T> {
    /// Of what was seen first.
    pub fn new(seen: T) -> Self {
        Self { seen, since: Instant::now() }
    }

    /// Notes a look; says for how long what it found has been the same, and `None` where it is new.
    pub fn note(&mut self, found: T) -> Option<Duration> {
        if found != self.seen {
            (self.seen, self.since) = (found, Instant::now());
            return None;
        }
        Some(self.since.elapsed())
    }

    /// What was seen last.
    pub fn seen(&self) -> &T {
        &self.seen
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_cut_where_it_is_a_beginning_or_its_last_line_has_no_end() {
        let whole = b"[a]\nb = 1\n[c]\nd = 1\n";
        for cut in [b"".as_slice(), b"[a]\nb = 1\n", b"[a]\nb = 1", b"[a]\nb = 2"] {
            assert!(looks_cut(cut, whole), "{:?}", String::from_utf8_lossy(cut));
        }
        for other in [b"[a]\nb = 2\n".as_slice(), b"[a]\nb = 1\n[c]\nd = 1\n[e]\n", whole] {
            assert!(!looks_cut(other, whole), "{:?}", String::from_utf8_lossy(other));
        }
    }

    #[test]
    fn a_file_that_holds_no_setting_any_more_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let (toml, yaml) = (folder.path().join("a.toml"), folder.path().join("b.yaml"));
        fs::write(&toml, "[server]\nlog = \"info\"\n").unwrap();
        fs::write(&yaml, "app_settings: {app_prefix: a}\n").unwrap();
        let sources = Sources::new(vec![toml.clone(), yaml.clone()]);
        let before = sources.look();
        assert_eq!(before.emptied(&before), []);
        for empty in ["", " \n\t\n", "# [server]\n# log = \"info\"\n"] {
            fs::write(&toml, empty).unwrap();
            let faults = sources.look().emptied(&before);
            assert_eq!(faults.len(), 1, "{empty:?}");
            let text = faults[0].to_string();
            assert!(text.contains("a.toml") && text.contains("without any setting"), "{text}");
            assert!(text.contains("restart the host"), "{text}");
        }
        fs::write(&toml, "[server]\nlog = \"warn\"\n").unwrap();
        fs::write(&yaml, "---\n# nothing\n").unwrap();
        assert_eq!(sources.look().emptied(&before).len(), 1);
        // What was empty before has nothing to lose.
        assert_eq!(sources.look().emptied(&sources.look()), []);
        fs::remove_file(&yaml).unwrap();
        let gone = sources.look();
        assert!(
            gone.cut(&before).unwrap().ends_with(" is gone") && gone.emptied(&before)[0].found == "no file"
        );
    }

    #[test]
    fn a_file_that_can_not_be_read_now_says_nothing_and_one_that_is_not_there_does() {
        let folder = tempfile::tempdir().unwrap();
        let (unreadable, missing) =
            (folder.path().join("unreadable.toml"), folder.path().join("missing.toml"));
        // It can be opened, and reading fails with EIO.
        std::os::unix::fs::symlink("/proc/self/mem", &unreadable).unwrap();
        let look = |file: &PathBuf| {
            let snapshot = Sources::new(vec![file.clone()]).look();
            let faults = snapshot.load().err().expect("it can't be read");
            (snapshot.unknown().is_some(), faults.transient().is_some())
        };
        assert_eq!((look(&unreadable), look(&missing)), ((true, true), (false, false)));
        // It is named, and in one line.
        let snapshot = Sources::new(vec![missing, unreadable]).look();
        let faults = snapshot.load().err().expect("it can't be read");
        for reason in [snapshot.unknown(), faults.transient()].map(Option::unwrap) {
            assert!(reason.contains("unreadable.toml") && !reason.contains('\n'), "{reason}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_look_says_for_how_long_the_same_was_seen() {
        let mut looks = Looks::new(1);
        assert_eq!(looks.note(1), Some(Duration::ZERO));
        tokio::time::advance(Duration::from_secs(3)).await;
        assert_eq!((looks.note(1), looks.note(2)), (Some(Duration::from_secs(3)), None));
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!((looks.note(2), *looks.seen()), (Some(Duration::from_secs(1)), 2));
    }
}
