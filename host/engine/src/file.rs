//! A plugin's file on its way in: its private copy, and why it was not taken.

use std::{
    any::Any,
    fmt, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

/// A private copy of a plugin's file, or of the code of its folder, which nobody changes any more. It lasts until the last clone is dropped.
#[derive(Clone)]
pub struct Staged {
    origin: PathBuf,
    path: PathBuf,
    sha256: Arc<str>,
    environment: Option<Arc<str>>,
    /// Removes the copy when it is dropped.
    _guard: Arc<dyn Any + Send + Sync>,
}

impl Staged {
    /// A copy at `path` of the file `origin`, with the SHA-256 of its content in hexadecimal. The guard, dropped, removes the copy.
    #[must_use]
    pub fn new(origin: &Path, path: &Path, sha256: &str, guard: Arc<dyn Any + Send + Sync>) -> Self {
        Self {
            origin: origin.to_owned(),
            path: path.to_owned(),
            sha256: sha256.into(),
            environment: None,
            _guard: guard,
        }
    }

    /// To be run in this environment.
    #[must_use]
    pub fn with_environment(self, environment: Option<String>) -> Self {
        Self { environment: environment.map(Arc::from), ..self }
    }

    /// What is known of the environment that the code of a folder is run in; the copy has nothing of it.
    #[must_use]
    pub fn environment(&self) -> Option<&str> {
        self.environment.as_deref()
    }

    /// The file that was copied.
    #[must_use]
    pub fn origin(&self) -> &Path {
        &self.origin
    }

    /// The copy.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// SHA-256 of the content, in hexadecimal.
    #[must_use]
    pub fn sha256(&self) -> &str {
        &self.sha256
    }

    /// Whether this is the content that an entry pins, where it pins any; `entry` says whose.
    ///
    /// # Errors
    /// [`LoadError::Pinned`].
    pub fn check_pin(&self, pin: Option<&str>, entry: &'static str) -> Result<(), LoadError> {
        match pin.filter(|expected| *expected != self.sha256()) {
            Some(expected) => Err(LoadError::Pinned {
                entry,
                expected: expected.to_owned(),
                found: self.sha256().to_owned(),
            }),
            None => Ok(()),
        }
    }
}

impl fmt::Debug for Staged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Staged({})", self.sha256())
    }
}

/// Why a file was not taken: what was found, what was expected and what to do.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The file can't be read, or its private copy can't be written.
    #[error("can't {doing} {path}", path = path.display())]
    Io {
        /// What was tried.
        doing: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It ended the host when it was loaded.
    #[error("{0}")]
    Fenced(String),
    /// The child process that opened it first was killed.
    #[error(
        "it crashes when it is opened ({how}, in the preflight process, so nothing else was harmed); look for constructors and static initialisers in it"
    )]
    Crashed {
        /// Signal or exit status.
        how: String,
    },
    /// The child process that opened it first did not come back.
    #[error(
        "it did not open within {limit:?} (in the preflight process); look for constructors that wait in it"
    )]
    Hung {
        /// The limit.
        limit: Duration,
    },
    /// The child process could not be started.
    #[error("can't start the preflight process {path}", path = path.display())]
    Preflight {
        /// The program.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It was found unfit, for this reason.
    #[error("{0}")]
    Refused(String),
    /// Somebody else could change it, or could have written it.
    #[error("{what} {path} {found}, and a plugin is code that this host runs; {hint}", path = path.display())]
    Untrusted {
        /// The file, or the folder it lies in.
        what: &'static str,
        /// Which.
        path: PathBuf,
        /// Whom it belongs to, or who may write it.
        found: String,
        /// What to do.
        hint: String,
    },
    /// Its entry names another content.
    #[error(
        "it has the SHA-256 {found}, and {entry} pins {expected} (plugin_sha256); install that file, or change the entry"
    )]
    Pinned {
        /// Whose.
        entry: &'static str,
        /// What the entry says.
        expected: String,
        /// What the file has.
        found: String,
    },
    /// It lies where anybody may write who writes a bucket, and nobody names its content.
    #[error(
        "it lies in a bucket (volume {volume:?}), whoever may write that would run code here, and nobody names its content; expected plugin_sha256 = {found:?} in the model's entry, or plugins_from_buckets = true for the mount"
    )]
    Unpinned {
        /// The bucket's volume.
        volume: String,
        /// What the file has.
        found: String,
    },
    /// The process has opened as many libraries as it may.
    #[error(
        "this process has opened {found} plugin libraries (server.generations_max is {limit}), and none can be closed again; restart the host, which starts over with what is in the volumes, or run the model in a process of its own (isolation = \"process\")"
    )]
    TooManyLibraries {
        /// Libraries there are.
        found: usize,
        /// The limit.
        limit: usize,
    },
}

impl LoadError {
    /// Whether the same content may be taken on another try, since it isn't the content that was found unfit.
    #[must_use]
    pub fn may_pass(&self) -> bool {
        match self {
            Self::Io { .. } | Self::Hung { .. } | Self::Preflight { .. } | Self::Untrusted { .. } => true,
            Self::Pinned { .. }
            | Self::Unpinned { .. }
            | Self::TooManyLibraries { .. }
            | Self::Crashed { .. }
            | Self::Fenced(_)
            | Self::Refused(_) => false,
        }
    }

    /// Whether its entry is to blame, and not the content: with another entry it may be taken.
    #[must_use]
    pub fn is_of_entry(&self) -> bool {
        matches!(self, Self::Pinned { .. } | Self::Unpinned { .. })
    }

    /// The error and its causes, one line.
    #[must_use]
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            text = format!("{text}: {error}");
            cause = error.source();
        }
        text
    }
}
