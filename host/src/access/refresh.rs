//! Fetches keys that lie elsewhere, again and again: files of secrets and parameters in SSM. A key that can't be fetched, or whose file
//! looks as if somebody were writing it, keeps the value that it had; one whose file is gone is a key no more.

use std::{
    collections::HashMap,
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use tokio::{
    sync::watch,
    task::{JoinError, JoinHandle},
    time::timeout,
};

use super::{Access, Fetched, ssm};
use crate::backoff::backoff;
use crate::config::{AuthSpec, KeySource, KeySpec, SecretText, read_secret};

/// How often keys are fetched while one of them is missing: that of those that lie in files, and at first of those in SSM, which is asked
/// half as often after each failure, down to the second.
const RETRY: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(30);
/// After this a reason that comes back is told again.
const REPORT_AGAIN: Duration = Duration::from_secs(60);
/// How long one key may take.
const FETCH_TIMEOUT: Duration = Duration::from_secs(10);

/// Between the two looks at a file that has another value: both must find the same.
const BETWEEN_LOOKS: Duration = Duration::from_millis(100);

/// Why no value comes from where a key lies, or the one there isn't taken yet.
#[derive(Debug, thiserror::Error)]
enum FetchError {
    /// SSM didn't give it.
    #[error(transparent)]
    Ssm(#[from] ssm::SsmError),
    /// SSM took too long.
    #[error("it did not come within {FETCH_TIMEOUT:?}")]
    SsmTimeout,
    /// Its file can't be read.
    #[error("its file can't be read")]
    Unreadable(#[from] io::Error),
    /// The thread that read its file ended before that was done.
    #[error("its file can't be read")]
    Interrupted(#[from] JoinError),
    /// Its file is still being read.
    #[error("its file was not read within {FETCH_TIMEOUT:?}")]
    ReadTimeout,
    /// Its file holds nothing: whoever writes it has just begun.
    #[error("its file is empty")]
    Empty,
    /// Two looks found different values.
    #[error("its file is being written")]
    BeingWritten,
    /// Somebody may be writing the same value again.
    #[error("its file holds the beginning of that value")]
    Shortened,
}

/// A file of a secret that is being read.
type Read = JoinHandle<io::Result<Option<String>>>;

/// What is known of the files from one round to the next.
#[derive(Default)]
struct Files {
    /// Those that are being read.
    reads: HashMap<String, Read>,
    /// Values that are the beginning of the one that is known: taken where the next round finds them again.
    shortened: HashMap<String, String>,
}

/// Runs until it is dropped. Which rules are in force is not decided here: only which values keys have.
pub async fn run(access: Arc<Access>, mut specs: watch::Receiver<AuthSpec>) -> std::convert::Infallible {
    let mut files = Files::default();
    let (mut told, mut failures) = (ReportedErrors::default(), 0);
    loop {
        let spec = specs.borrow_and_update().clone();
        tokio::select! {
            faults = fetch_all(&access, &spec, &mut files) => {
                access.set_again();
                let mut missing = access.missing();
                missing.extend(faults);
                // Of values that are known an old one serves.
                failures = if access.missing().is_empty() { 0_u32 } else { failures + 1 };
                for reason in told.news(&missing, Instant::now()) {
                    tracing::error!("not all keys are known: {reason}");
                }
            }
            // Its sender lives as long as the host.
            Ok(()) = specs.changed() => {
                failures = 0;
                continue;
            }
        }
        let pause = match access.missing().is_empty() {
            true => spec.refresh,
            false if access.waits_for_a_file(&spec) => RETRY,
            false => backoff(failures.max(1), RETRY, RETRY_MAX),
        };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            Ok(()) = specs.changed() => failures = 0,
        }
    }
}

/// Why keys aren't known, and what was told of it.
#[derive(Default)]
struct ReportedErrors(HashMap<String, KeyErrors>);

#[derive(Default)]
struct KeyErrors {
    last: String,
    told: HashMap<String, Instant>,
}

impl ReportedErrors {
    /// Those reasons that are news: others than in the round before, and not told a while ago. Those of a network take turns.
    fn news<'m>(&mut self, missing: &'m [String], now: Instant) -> Vec<&'m String> {
        let key = |reason: &str| reason.split(": ").next().unwrap_or_default().to_owned();
        let still: Vec<String> = missing.iter().map(|reason| key(reason)).collect();
        self.0.retain(|key, _| still.contains(key));
        let is_news = |reason: &&String| {
            let of_key = self.0.entry(key(reason)).or_default();
            let changed = of_key.last != **reason;
            of_key.last.clone_from(reason);
            of_key.told.retain(|_, at| now.duration_since(*at) < REPORT_AGAIN);
            let is_news = changed && !of_key.told.contains_key(*reason);
            if is_news {
                of_key.told.insert((*reason).clone(), now);
            }
            is_news
        };
        missing.iter().filter(is_news).collect()
    }
}

/// Fetches every value that lies elsewhere. What comes back are reasons why known values are old ones.
async fn fetch_all(access: &Access, spec: &AuthSpec, files: &mut Files) -> Vec<String> {
    let elsewhere: Vec<&KeySpec> = spec
        .keys
        .iter()
        .chain(spec.modal.iter().flatten())
        .filter(|key| key.source.value().is_none())
        .collect();
    let mut faults = Vec::new();
    let from_ssm = elsewhere.iter().filter_map(|key| match &key.source {
        KeySource::Ssm(name) => {
            Some(async move { (*key, timeout(FETCH_TIMEOUT, ssm::parameter(&spec.ssm, name)).await) })
        }
        _ => None,
    });
    for (key, fetched) in join_all(from_ssm).await {
        let fetched = match fetched {
            Ok(Ok(value)) => Ok(Some(value)),
            Ok(Err(error)) => Err(error.into()),
            Err(_) => Err(FetchError::SsmTimeout),
        };
        faults.extend(note(access, key, fetched));
    }
    for key in elsewhere {
        if let KeySource::Secret(name) = &key.source {
            let known = match access.values.lock().get(&key.source) {
                Some(Fetched::Value(known)) => Some(known.clone()),
                _ => None,
            };
            let fetched = files.fetch(name, spec, known.as_ref().map(|known| known.as_str())).await;
            faults.extend(note(access, key, fetched));
        }
    }
    // What nobody names any more is forgotten.
    let named = |source: &KeySource| {
        spec.keys.iter().chain(spec.modal.iter().flatten()).any(|key| key.source == *source)
    };
    access.values.lock().retain(|source, _| named(source));
    faults
}

impl Files {
    /// The value in a file; whoever writes it has had the time to end.
    async fn fetch(
        &mut self,
        name: &str,
        spec: &AuthSpec,
        known: Option<&str>,
    ) -> Result<Option<String>, FetchError> {
        let found = self.read(name, spec).await?;
        let before = self.shortened.remove(name);
        let Some(value) = found else { return Ok(None) };
        if Some(value.as_str()) == known {
            return Ok(Some(value));
        }
        if value.is_empty() {
            return Err(FetchError::Empty);
        }
        let Some(known) = known else { return Ok(Some(value)) };
        tokio::time::sleep(BETWEEN_LOOKS).await;
        if self.read(name, spec).await?.as_ref() != Some(&value) {
            return Err(FetchError::BeingWritten);
        }
        if known.starts_with(&value) && before.as_ref() != Some(&value) {
            self.shortened.insert(name.to_owned(), value);
            return Err(FetchError::Shortened);
        }
        Ok(Some(value))
    }

    /// A file of some bytes, read on another thread. On a mount that hangs, the one read that hangs is waited for by no second one.
    async fn read(&mut self, name: &str, spec: &AuthSpec) -> Result<Option<String>, FetchError> {
        let (wanted, folder) = (name.to_owned(), spec.secrets_folder.clone());
        let read = self
            .reads
            .entry(name.to_owned())
            .or_insert_with(|| tokio::task::spawn_blocking(move || read_secret(&wanted, &folder)));
        match timeout(FETCH_TIMEOUT, read).await {
            Ok(done) => {
                self.reads.remove(name);
                Ok(done??)
            }
            Err(_) => Err(FetchError::ReadTimeout),
        }
    }
}

/// Notes what was fetched; says why a known value stays.
fn note(access: &Access, key: &KeySpec, fetched: Result<Option<String>, FetchError>) -> Option<String> {
    let fetched = fetched.map_err(|error| format!("{:#}", anyhow::Error::new(error)));
    let mut values = access.values.lock();
    let known = values.get(&key.source);
    let noted = match (fetched, known) {
        (Ok(Some(value)), _) => Fetched::Value(SecretText::new(value)),
        (Ok(None), Some(Fetched::Value(_))) => {
            tracing::warn!(key = key.name, "the file of the key is gone, and it is a key no more");
            Fetched::Gone
        }
        (Ok(None), Some(Fetched::Gone)) => Fetched::Gone,
        (Ok(None), _) => Fetched::Never("there is no such file of a secret".to_owned()),
        (Err(reason), Some(Fetched::Value(_))) => {
            return Some(format!("the key {} is as it was fetched before: {reason}", key.name));
        }
        (Err(reason), _) => Fetched::Never(reason),
    };
    values.insert(key.source.clone(), noted);
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_is_told_once_and_again_only_where_it_comes_back_after_a_while() {
        let (mut told, begun) = (ReportedErrors::default(), Instant::now());
        let at = |seconds| begun + Duration::from_secs(seconds);
        let reasons = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>();
        let first = reasons(&["the key a: refused", "the key b: timed out"]);
        assert_eq!(told.news(&first, at(0)).len(), 2);
        assert!(told.news(&first, at(100)).is_empty(), "it is as it was");
        let other = reasons(&["the key a: reset", "the key b: timed out"]);
        assert_eq!(told.news(&other, at(101)), [&other[0]]);
        assert_eq!(told.news(&first, at(102)), [&first[0]], "it was told long ago");
        for second in 103..160 {
            let both = if second % 2 == 0 { &first } else { &other };
            assert!(told.news(both, at(second)).is_empty(), "they take turns");
        }
        assert!(told.news(&[], at(160)).is_empty());
        assert_eq!(told.news(&first, at(161)).len(), 2, "it was fine in between");
    }
}
