//! Who may call: keys, their permissions and limits. It owns the keys' digests, which callers are compared with, and the values that
//! were fetched from elsewhere, which nobody is shown. It never knows what a request asks for.

mod error;
mod keys;
mod origin;
mod refresh;
mod ssm;

use std::{collections::HashMap, sync::Arc};

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use prometheus::IntCounterVec;
use tokio::sync::watch;

use crate::config::{AuthSpec, KeySource, KeySpec, SecretText};
use keys::{Key, KeySet, Limits};

pub use error::AccessError;
pub use keys::{ConcurrencyPermit, Digest, Digester};
pub use origin::Origin;
pub use refresh::run as refresh;
pub use ssm::SsmError;

/// What a request shows of itself: looked up by whoever knows its headers.
pub trait Shown {
    /// The value of this header, as it was sent.
    fn header(&self, name: &str) -> Option<&[u8]>;
}

/// Who may call, as the configuration says now.
pub struct Access {
    now: ArcSwap<Rules>,
    digester: Digester,
    /// Rules are replaced one after the other.
    setting: Mutex<()>,
    /// Limits by key, so that a new configuration doesn't forget who has called how often.
    limits: Mutex<Vec<(KeySpec, Arc<Limits>)>>,
    /// Values that were fetched, by where they lie.
    values: Mutex<HashMap<KeySource, Fetched>>,
    /// Calls by key and what became of them.
    calls: IntCounterVec,
}

/// What became of a value that lies elsewhere.
#[derive(Clone, Debug)]
enum Fetched {
    /// It is this.
    Value(SecretText),
    /// It was there and is gone: whoever took it away meant that.
    Gone,
    /// It never came, for this reason.
    Never(String),
}

/// Replaces the rules while the host runs.
pub struct Keys {
    access: Arc<Access>,
    specs: watch::Sender<AuthSpec>,
}

impl Keys {
    /// For these rules; [`refresh()`] follows what the second value says.
    #[must_use]
    pub fn new(access: Arc<Access>, spec: AuthSpec) -> (Self, watch::Receiver<AuthSpec>) {
        let (specs, followed) = watch::channel(spec);
        (Self { access, specs }, followed)
    }

    /// Puts other rules in force, at once, with the values that are known; says whether they differ.
    #[must_use]
    pub fn set(&self, spec: AuthSpec) -> bool {
        if *self.specs.borrow() == spec {
            return false;
        }
        self.access.set(spec.clone());
        self.specs.send_replace(spec);
        true
    }
}

/// The rules at one moment.
struct Rules {
    spec: AuthSpec,
    keys: KeySet,
    /// `Modal-Key` and `Modal-Secret`, where they must be sent; `None` inside where nobody knows them.
    modal: Option<Option<(Digest, Digest)>>,
    /// Keys that were named and whose value isn't known, and why.
    missing: Vec<String>,
}

/// A caller who may call.
#[derive(Clone, Debug, Default)]
pub struct Caller {
    /// Whether it may ask for changes and look at the host's inside.
    pub manages: bool,
    /// Whether its answers may say where their time went.
    pub explains: bool,
    /// The name of its key; `None` where nobody asks for one.
    pub key: Option<Arc<str>>,
    /// The queues that it may name, in place of those that everybody may.
    pub allowed_queues: Option<Arc<[String]>>,
    /// Its place among its key's calls: whoever works for it longer than it stays holds a clone.
    pub permit: Option<Arc<ConcurrencyPermit>>,
}

/// What callers must show; nothing where nobody is asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AskedFor {
    /// The header that a key may stand in, beside `Authorization: Bearer`.
    pub key_header: Option<String>,
    /// The two headers that must be sent.
    pub modal_headers: Option<[&'static str; 2]>,
}

/// What a caller is told of the host's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Visibility {
    /// Whether it serves.
    Status,
    /// The names and states of its models as well.
    Names,
    /// Reasons as well, which hold paths and the like.
    Reasons,
}

/// The scheme of keys in `Authorization`.
const BEARER: &[u8] = b"Bearer ";
/// The headers of `secure`.
const MODAL_HEADERS: [&str; 2] = ["modal-key", "modal-secret"];

impl Access {
    /// The rules of a configuration, with the values that it has itself; others come with [`refresh()`].
    #[must_use]
    pub fn new(spec: AuthSpec, calls: IntCounterVec) -> Arc<Self> {
        let access = Self {
            now: ArcSwap::from_pointee(Rules::of_nobody()),
            digester: Digester::new(),
            setting: Mutex::default(),
            limits: Mutex::default(),
            values: Mutex::default(),
            calls,
        };
        access.set(spec);
        Arc::new(access)
    }

    /// Replaces the rules, with the values that are known now.
    fn set(&self, spec: AuthSpec) {
        let _alone = self.setting.lock();
        self.put_in_force(spec);
    }

    /// The rules as they are, with the values that are known now. Never brings back rules that were replaced meanwhile.
    fn set_again(&self) {
        let _alone = self.setting.lock();
        self.put_in_force(self.now.load().spec.clone());
    }

    fn put_in_force(&self, spec: AuthSpec) {
        let (mut keys, mut missing) = (Vec::new(), Vec::new());
        let values = self.values.lock();
        let value = |key: &KeySpec, missing: &mut Vec<String>| {
            let fetched = match &key.source {
                KeySource::Value(text) => Some(Fetched::Value(text.clone())),
                elsewhere => values.get(elsewhere).cloned(),
            };
            match fetched {
                Some(Fetched::Value(text)) if !text.is_empty() => Some(self.digester.digest(text.as_bytes())),
                Some(Fetched::Gone) => None,
                Some(Fetched::Value(_)) => {
                    missing.push(format!("the key {}: its value is empty", key.name));
                    None
                }
                Some(Fetched::Never(reason)) => {
                    missing.push(format!("the key {}: {reason}", key.name));
                    None
                }
                None => {
                    missing.push(format!("the key {}: it has not been fetched yet", key.name));
                    None
                }
            }
        };
        for key in &spec.keys {
            let Some(digest) = value(key, &mut missing) else { continue };
            keys.push(Key {
                name: key.name.as_str().into(),
                digest,
                manages: key.manages,
                explains: key.explains || key.manages,
                allowed_queues: key.allowed_queues.clone().map(Into::into),
                limits: self.limits_of(key),
                calls: self.calls.with_label_values(&[key.name.as_str(), "ok"]),
                refused: self.calls.with_label_values(&[key.name.as_str(), "limited"]),
            });
        }
        let modal = spec.modal.as_ref().map(|[key, secret]| {
            // Both are looked at, so that both are told.
            let pair = (value(key, &mut missing), value(secret, &mut missing));
            pair.0.zip(pair.1)
        });
        drop(values);
        let before = self.now.swap(Arc::new(Rules { spec, keys: KeySet::new(keys), modal, missing }));
        let now = self.now.load();
        let is_gone = |key: &&KeySpec| !now.spec.keys.iter().any(|known| known.name == key.name);
        for gone in before.spec.keys.iter().filter(is_gone) {
            for outcome in ["ok", "limited"] {
                // One whose value was never known has no series.
                let _ = self.calls.remove_label_values(&[gone.name.as_str(), outcome]);
            }
        }
    }

    fn limits_of(&self, key: &KeySpec) -> Arc<Limits> {
        let mut known = self.limits.lock();
        if let Some((_, limits)) =
            known.iter().find(|(spec, _)| spec.name == key.name && spec.limits == key.limits)
        {
            return Arc::clone(limits);
        }
        let limits = Arc::new(Limits::new(&key.limits));
        known.retain(|(spec, _)| spec.name != key.name);
        known.push((key.clone(), Arc::clone(&limits)));
        limits
    }

    /// What keeps callers out who should come in: keys whose values nobody knows.
    #[must_use]
    pub fn missing(&self) -> Vec<String> {
        self.now.load().missing.clone()
    }

    /// Whether nobody is asked who they are.
    #[must_use]
    pub fn is_keyless(&self) -> bool {
        self.now.load().is_keyless()
    }

    /// Where callers show who they are.
    #[must_use]
    pub fn asked_for(&self) -> AskedFor {
        let rules = self.now.load();
        let key_header = (!rules.spec.keys.is_empty()).then(|| rules.spec.header.clone());
        AskedFor { key_header, modal_headers: rules.modal.as_ref().map(|_| MODAL_HEADERS) }
    }

    /// Lets a caller in, or says why not. Takes a place among the key's calls until the caller is dropped.
    ///
    /// # Errors
    /// [`AccessError`].
    pub fn admit(&self, from: &Origin, request: &impl Shown) -> Result<Caller, AccessError> {
        if let Origin::Socket { .. } = from {
            return Ok(Caller::manager(None));
        }
        let rules = self.now.load();
        if rules.is_keyless() {
            return Ok(Caller::default());
        }
        rules.check_modal(&self.digester, request).inspect_err(|_| self.refused())?;
        if rules.spec.keys.is_empty() {
            return Ok(Caller::default());
        }
        let key = rules.key_of(&self.digester, request).inspect_err(|_| self.refused())?;
        let permit = key.limits.enter().inspect_err(|_| key.refused.inc())?;
        key.calls.inc();
        Ok(Caller {
            manages: key.manages,
            explains: key.explains,
            key: Some(Arc::clone(&key.name)),
            allowed_queues: key.allowed_queues.clone(),
            permit: permit.map(Arc::new),
        })
    }

    /// Lets in a caller who wants to look at the host's inside or change it: over the management socket, or with a key that manages.
    /// No address does, loopback included: proxies, pages in browsers and other users stand behind it. Takes no place: who looks
    /// after a host isn't kept out by its load.
    ///
    /// # Errors
    /// [`AccessError`].
    pub fn manage(&self, from: &Origin, request: &impl Shown) -> Result<Caller, AccessError> {
        if let Origin::Socket { .. } = from {
            return Ok(Caller::manager(None));
        }
        let rules = self.now.load();
        let found = match rules.key_to_manage(&self.digester, request) {
            Ok(key) if key.manages => Ok(Caller::manager(Some(key))),
            Ok(key) => Err(AccessError::NoManagement { key: Some(Arc::clone(&key.name)) }),
            Err(AccessError::Missing { header, .. }) => Err(AccessError::Missing { header, to_manage: true }),
            Err(error) => Err(error),
        };
        found.inspect_err(|_| self.refused())
    }

    /// What a caller may see of how the host is.
    ///
    /// # Errors
    /// It shows a key that is none of this host's. It is told the status all the same, and the attempt is counted.
    pub fn visibility(&self, from: &Origin, request: &impl Shown) -> Result<Visibility, AccessError> {
        if let Origin::Socket { .. } = from {
            return Ok(Visibility::Reasons);
        }
        let rules = self.now.load();
        if rules.is_keyless() {
            return Ok(Visibility::Names);
        }
        match rules.visibility(&self.digester, request) {
            Ok(visibility) => Ok(visibility),
            Err(wrong @ AccessError::Wrong { .. }) => {
                self.refused();
                Err(wrong)
            }
            Err(_) => Ok(Visibility::Status),
        }
    }

    /// Whether the value of a key that lies in a file isn't known: it may be there at any moment.
    fn waits_for_a_file(&self, spec: &AuthSpec) -> bool {
        let values = self.values.lock();
        let mut keys = spec.keys.iter().chain(spec.modal.iter().flatten());
        keys.any(|key| {
            matches!(key.source, KeySource::Secret(_))
                && !matches!(values.get(&key.source), Some(Fetched::Value(_)))
        })
    }

    /// What a caller is told that shows no key and must.
    #[must_use]
    pub fn missing_key(&self) -> AccessError {
        AccessError::Missing { header: self.now.load().spec.header.clone(), to_manage: false }
    }

    /// The queues that callers with this key may name, where it has a list of its own.
    #[must_use]
    pub fn allowed_queues(&self, key: &str) -> Option<Arc<[String]>> {
        self.now.load().keys.named(key)?.allowed_queues.clone()
    }

    fn refused(&self) {
        self.calls.with_label_values(&["", "refused"]).inc();
    }
}

impl Caller {
    /// One who manages: with this key, or over the management socket.
    fn manager(key: Option<&Key>) -> Self {
        Self {
            manages: true,
            explains: true,
            key: key.map(|key| Arc::clone(&key.name)),
            allowed_queues: key.and_then(|key| key.allowed_queues.clone()),
            permit: None,
        }
    }
}

impl Rules {
    fn of_nobody() -> Self {
        let spec = AuthSpec::default();
        Self { spec, keys: KeySet::new(Vec::new()), modal: None, missing: Vec::new() }
    }

    fn is_keyless(&self) -> bool {
        self.modal.is_none() && self.spec.keys.is_empty()
    }

    fn key_to_manage(&self, digester: &Digester, request: &impl Shown) -> Result<&Key, AccessError> {
        if self.spec.keys.is_empty() {
            return Err(AccessError::NoManagement { key: None });
        }
        self.key_of(digester, request)
    }

    fn visibility(&self, digester: &Digester, request: &impl Shown) -> Result<Visibility, AccessError> {
        if self.spec.keys.is_empty() {
            return self.check_modal(digester, request).map(|()| Visibility::Names);
        }
        // A key that manages does so without those two headers.
        let manages = self.key_of(digester, request)?.manages;
        if manages {
            return Ok(Visibility::Reasons);
        }
        self.check_modal(digester, request).map(|()| Visibility::Names)
    }

    fn key_of(&self, digester: &Digester, request: &impl Shown) -> Result<&Key, AccessError> {
        let header = &self.spec.header;
        let bearer = || {
            let (scheme, key) = request.header("authorization")?.split_at_checked(BEARER.len())?;
            scheme.eq_ignore_ascii_case(BEARER).then_some(key)
        };
        let shown = if header == "authorization" { None } else { request.header(header) };
        let Some(shown) = shown.or_else(bearer) else {
            return Err(AccessError::Missing { header: header.clone(), to_manage: false });
        };
        match self.keys.find(&digester.digest(shown)) {
            Some(key) => Ok(key),
            // It may be one of those.
            None if !self.missing.is_empty() && self.keys.is_empty() => Err(AccessError::Unknown),
            None => Err(AccessError::Wrong { header: header.clone() }),
        }
    }

    fn check_modal(&self, digester: &Digester, request: &impl Shown) -> Result<(), AccessError> {
        let Some(expected) = &self.modal else { return Ok(()) };
        let (key, secret) = expected.as_ref().ok_or(AccessError::Unknown)?;
        let [key_header, secret_header] = MODAL_HEADERS;
        let header = || format!("{key_header} and {secret_header}");
        let (Some(shown_key), Some(shown_secret)) =
            (request.header(key_header), request.header(secret_header))
        else {
            return Err(AccessError::Missing { header: header(), to_manage: false });
        };
        // Both are looked at, whatever the first says.
        let right = digester.digest(shown_key).matches(key) & digester.digest(shown_secret).matches(secret);
        if right { Ok(()) } else { Err(AccessError::Wrong { header: header() }) }
    }
}
