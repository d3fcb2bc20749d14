//! Why a mirror is behind its bucket. It never holds a secret.

use std::{io, path::PathBuf};

use object_store::Error as StoreError;

use crate::spec::Secret;

/// Why a listing, a fetch or an upload came to nothing. What was shown before is shown on.
#[derive(Debug, thiserror::Error)]
pub enum MirrorError {
    /// The credentials can't be read, or the store's address makes no sense.
    #[error("{0}")]
    Setup(String),
    /// The store said no.
    #[error("the store refuses it: {0}; look at the credentials, and at what they may do")]
    Refused(String),
    /// There is no such bucket.
    #[error("the store has no such bucket: {0}")]
    NoBucket(String),
    /// It could not be reached, did not answer in time, or said something else.
    #[error("{0}")]
    Store(String),
    /// A key that can't be a file's name.
    #[error("{0}")]
    Key(String),
    /// There is more than may be mirrored.
    #[error("{0}")]
    TooMuch(String),
    /// There is no room for it.
    #[error("expected {needed} bytes of free space for what has to be fetched, found {free} in {folder}", folder = folder.display())]
    NoSpace {
        /// Bytes that are missing, with what is kept free.
        needed: u64,
        /// Bytes that the disk has.
        free: u64,
        /// On which disk.
        folder: PathBuf,
    },
    /// Objects changed while they were fetched, again and again.
    #[error("objects changed faster than they could be fetched, {0} among them")]
    Changing(String),
    /// The mirror's own folder can't be used.
    #[error("can't {doing} {path}: {source}", path = path.display())]
    Local {
        /// What was tried.
        doing: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// How an error of the system is told.
pub(crate) fn local(doing: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> MirrorError {
    let path = path.into();
    move |source| MirrorError::Local { doing, path, source }
}

impl MirrorError {
    /// A word for metrics.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Setup(_) => "setup",
            Self::Refused(_) => "refused",
            Self::NoBucket(_) => "no_bucket",
            Self::Store(_) => "store",
            Self::Key(_) => "key",
            Self::TooMuch(_) => "too_much",
            Self::NoSpace { .. } => "no_space",
            Self::Changing(_) => "changing",
            Self::Local { .. } => "local",
        }
    }

    /// What a store said, without what is secret in it.
    pub(crate) fn of_store(error: &StoreError, secret: &Secret) -> Self {
        let said = told(error, secret);
        match error {
            StoreError::PermissionDenied { .. } | StoreError::Unauthenticated { .. } => Self::Refused(said),
            StoreError::NotFound { .. } => Self::NoBucket(said),
            StoreError::InvalidPath { source } => Self::Key(format!(
                "a key can't be the path of a file: {}; rename that object, or mirror another prefix",
                secret.hide_in(source.to_string())
            )),
            _ => Self::Store(said),
        }
    }
}

/// Elements of S3's errors that hold what was signed, or a token.
const SECRET_ELEMENTS: [&str; 7] = [
    "Token-0",
    "StringToSign",
    "StringToSignBytes",
    "CanonicalRequest",
    "CanonicalRequestBytes",
    "SignatureProvided",
    "AWSAccessKeyId",
];

/// The whole chain of causes in a line, without secrets; of addresses no queries, which may hold signatures.
fn told(error: &StoreError, secret: &Secret) -> String {
    const CHARS_MAX: usize = 600;
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        let said = error.to_string();
        if !text.contains(&said) {
            text = format!("{text}: {said}");
        }
        cause = error.source();
    }
    // Before anything is cut off: a half of a secret would not be found.
    text = secret.hide_in(text);
    for name in SECRET_ELEMENTS {
        let (begin, end) = (format!("<{name}>"), format!("</{name}>"));
        if let (Some(from), Some(to)) = (text.find(&begin), text.find(&end))
            && from < to
        {
            text.replace_range(from + begin.len()..to, "…");
        }
    }
    let mut line = String::new();
    for (at, word) in text.split_whitespace().enumerate() {
        if at > 0 {
            line.push(' ');
        }
        match word.split_once('?') {
            Some((address, _)) if address.contains("://") => line.push_str(address),
            _ => line.push_str(word),
        }
    }
    if line.chars().count() > CHARS_MAX {
        line = line.chars().take(CHARS_MAX).chain("…".chars()).collect();
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_store_said_has_no_signature() {
        let error = StoreError::Generic {
            store: "Azure",
            source: "Error performing GET http://a/b?sig=abc&x=1 in 1s".into(),
        };
        let said = MirrorError::of_store(&error, &Secret::default()).to_string();
        assert!(said.contains("http://a/b in 1s") && !said.contains("abc"), "{said}");
    }

    #[test]
    fn a_token_that_a_store_repeats_is_not_told_not_even_a_part_of_it() {
        let token = "t0k3n".repeat(200);
        let body = format!("<Error><Code>ExpiredToken</Code><Token-0>{token}</Token-0></Error>");
        let error = StoreError::Generic { store: "S3", source: body.into() };
        let said = MirrorError::of_store(&error, &Secret::default()).to_string();
        assert!(said.contains("ExpiredToken") && !said.contains("t0k3n"), "{said}");
        let secret = Secret([("AWS_SESSION_TOKEN".to_owned(), token.clone())].into());
        let error = StoreError::Generic { store: "S3", source: format!("no {token}").into() };
        let said = MirrorError::of_store(&error, &secret).to_string();
        assert!(!said.contains("t0k3n"), "{said}");
    }
}
