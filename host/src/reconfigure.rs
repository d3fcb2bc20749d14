//! Applies a changed configuration to the running host, as one step: read and resolve all of it, look at it as the loaded plugins
//! would, and only then change anything. What is wrong leaves everything as it is; what needs a restart says so.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use modalkit_engine::LogLevel;
use modalkit_journal::unix_ms;
use serde::Serialize;
use tokio::{
    sync::{mpsc, oneshot},
    time::{MissedTickBehavior, timeout},
};

use crate::{
    access::Keys,
    config::{CUT_STILL_TIME, Config, Fault, Faults, Loaded, Looks, ModelSpec, Snapshot, Sources, Volume},
    insight::log::LogLevels,
    models::Models,
    mounts,
    pipeline::check_settings,
    reload::{Control, ModelChanges},
    transient::Outage,
    work::Gate,
};

/// How often the files are looked at. A change counts when two looks in a row have seen the same; where a file looks cut short, when all
/// looks have for [`CUT_STILL_TIME`].
const LOOK_INTERVAL: Duration = Duration::from_millis(500);
/// Those who wait for a change; more wait to be told so.
const WAITING_MAX: usize = 16;

/// Keys that are applied to the running host, by what they begin with. Any other that changes needs a restart.
const LIVE: [&str; 7] = [
    "model_settings",
    "app_settings.batch_config",
    "app_settings.auth_config",
    "app_settings.deployment_config",
    // It is for `modalkit image`, and nothing of a running host follows from it.
    "app_settings.build_config",
    "server.log",
    "server.secrets_folder",
];
/// The exceptions.
const AT_START: [&str; 2] = [VOLUMES, BUCKETS];
const VOLUMES: &str = "app_settings.deployment_config.volumes";
const BUCKETS: &str = "app_settings.deployment_config.cloud_bucket_mounts";
const TRACES: &str = "server.traces";
/// How long plugins may look at settings.
const PLUGINS_TIME_MAX: Duration = Duration::from_secs(5);

/// What became of a changed configuration.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum Change {
    /// It says what it said before.
    Unchanged,
    /// It is in force, but for the keys in `restart`.
    Applied {
        /// What became of the models.
        models: ModelChanges,
        /// Keys that say something else than at the start of the host, and are read at a start only.
        restart: Vec<String>,
        /// What is written without any effect.
        warnings: Vec<String>,
    },
    /// It is wrong; everything is as it was.
    Refused {
        /// Everything that is wrong.
        errors: Vec<Fault>,
    },
    /// The host is going away.
    Stopping,
}

/// A change and when it ended.
#[derive(Clone, Debug, Serialize)]
pub struct LastChange {
    /// In milliseconds since 1970.
    pub at_unix_ms: u64,
    /// What became of it.
    #[serde(flatten)]
    pub change: Change,
}

/// Takes wishes to the loop, and shows what is in force.
#[derive(Clone)]
pub struct Handle {
    asked: mpsc::Sender<Wish>,
    now: Arc<ArcSwap<Now>>,
}

/// What somebody wants of the loop.
enum Wish {
    /// Read the configuration again.
    Reload(oneshot::Sender<Change>),
    /// Log at this level, until the configuration is applied again.
    LogLevel(LogLevel, oneshot::Sender<()>),
}

/// What is in force.
pub struct Now {
    /// The configuration as it was read last, without faults.
    pub loaded: Arc<Loaded>,
    /// What became of the last change; `None` before the first.
    pub last: Option<LastChange>,
}

/// What a changed configuration changes.
pub struct Running {
    /// The models' reloads.
    pub control: Control,
    /// The models.
    pub models: Arc<Models>,
    /// Requests in flight.
    pub gate: Arc<Gate>,
    /// Who may call.
    pub keys: Keys,
    /// The log's levels.
    pub log: LogLevels,
}

/// The loop's parts: what it changes, and what it compares with.
pub struct Reconfigure {
    sources: Sources,
    running: Running,
    asked: mpsc::Receiver<Wish>,
    now: Arc<ArcSwap<Now>>,
    /// As it was at the start.
    start: Arc<Loaded>,
}

/// Who wants the configuration to be read again.
enum Asked {
    /// Its files have changed, or could not be read before.
    Nobody,
    HangUp,
    Caller(oneshot::Sender<Change>),
}

impl Handle {
    /// Reads the configuration now; waits for what becomes of it.
    pub async fn reload(&self) -> Change {
        let (reply, change) = oneshot::channel();
        if self.asked.send(Wish::Reload(reply)).await.is_err() {
            return Change::Stopping;
        }
        change.await.unwrap_or(Change::Stopping)
    }

    /// Logs at this level from now on, until the configuration is applied again; says whether that was done: the host may be going away.
    pub async fn set_log_level(&self, level: LogLevel) -> bool {
        let (reply, done) = oneshot::channel();
        self.asked.send(Wish::LogLevel(level, reply)).await.is_ok() && done.await.is_ok()
    }

    /// What is in force.
    #[must_use]
    pub fn now(&self) -> Arc<Now> {
        self.now.load_full()
    }

    /// Of a host with this configuration that nobody changes.
    #[cfg(test)]
    pub fn of_nobody(loaded: Loaded) -> Self {
        let now = Arc::new(ArcSwap::from_pointee(Now { loaded: Arc::new(loaded), last: None }));
        Self { asked: mpsc::channel(1).0, now }
    }
}

/// The loop and its handle; [`Reconfigure::run`] runs it.
#[must_use]
pub fn prepare(sources: Sources, loaded: Arc<Loaded>, running: Running) -> (Reconfigure, Handle) {
    let (ask, asked) = mpsc::channel(WAITING_MAX);
    let start = Arc::clone(&loaded);
    let now = Arc::new(ArcSwap::from_pointee(Now { loaded, last: None }));
    let handle = Handle { asked: ask, now: Arc::clone(&now) };
    (Reconfigure { sources, running, asked, now, start }, handle)
}

impl Reconfigure {
    /// Runs until it is dropped: reads the configuration again when its files change, at each hang-up, and when it is asked to.
    pub async fn run(mut self, mut hang_ups: mpsc::Receiver<()>) -> std::convert::Infallible {
        let mut looks = tokio::time::interval(LOOK_INTERVAL);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // As they were when they were read, which is a while ago.
        let mut known = Some(self.now.load().loaded.snapshot.clone());
        let mut seen = Looks::new(known.clone().unwrap_or_default());
        let mut outage = Outage::new("the configuration");
        // It was told that a change waits until a file has held still.
        let mut waits = false;
        loop {
            let (snapshot, asked) = tokio::select! {
                _ = looks.tick() => {
                    let found = self.look().await;
                    // What nobody can read now may be as it was.
                    if let Some(reason) = found.unknown() {
                        outage.note(Some(&reason));
                        continue;
                    }
                    let Some(still) = seen.note(found) else { continue };
                    if known.as_ref() == Some(seen.seen()) {
                        outage.note(None);
                        waits = false;
                        continue;
                    }
                    let cut = seen.seen().cut(&self.now.load().loaded.snapshot);
                    if let Some(cut) = cut.filter(|_| still < CUT_STILL_TIME) {
                        if !std::mem::replace(&mut waits, true) {
                            tracing::warn!(
                                "{cut}: the configuration is read again when it has been so for {CUT_STILL_TIME:?}, or at `modalkit config reload`"
                            );
                        }
                        continue;
                    }
                    waits = false;
                    (seen.seen().clone(), Asked::Nobody)
                }
                Some(()) = hang_ups.recv() => (self.look().await, Asked::HangUp),
                Some(wish) = self.asked.recv() => match wish {
                    Wish::Reload(reply) => (self.look().await, Asked::Caller(reply)),
                    Wish::LogLevel(level, reply) => {
                        self.running.log.set_default(level);
                        self.running.control.log_levels_changed().await;
                        // Whoever asked may have left.
                        let _ = reply.send(());
                        continue;
                    }
                },
            };
            // What was seen is what is read: what is written meanwhile is another change.
            let loaded = load(snapshot.clone()).await;
            // Where a file could not be read for a reason that may pass, it is read again.
            let reason = loaded.as_ref().err().and_then(Faults::transient);
            outage.note(reason.as_deref());
            known = reason.is_none().then_some(snapshot);
            let change = self.apply(loaded).await;
            // One that is tried again at every look is told by `outage`.
            if reason.is_none() || !matches!(asked, Asked::Nobody) {
                tell(&change);
            }
            self.remember(&change);
            if let Asked::Caller(reply) = asked {
                // Whoever asked may have left.
                let _ = reply.send(change);
            }
        }
    }

    async fn apply(&mut self, loaded: Result<Loaded, Faults>) -> Change {
        let loaded = match loaded {
            Ok(loaded) => Arc::new(loaded),
            Err(faults) => return Change::Refused { errors: faults.iter().cloned().collect() },
        };
        let config = &loaded.config;
        let mut errors = self.faults_of_plugins(&config.models).await;
        let now = self.now.load_full();
        errors.extend(loaded.snapshot.emptied(&now.loaded.snapshot));
        if now.loaded.config.auth.asks() && !config.auth.asks() {
            errors.push(Fault::unguarded());
        }
        if !errors.is_empty() {
            return Change::Refused { errors };
        }

        // From here on nothing fails.
        let begun = &self.start.config;
        let before = values(&now.loaded);
        let after = values(&loaded);
        self.running.log.set(&config.server.log);
        self.running.gate.set_requests_max(config.requests_max);
        let other_keys = self.running.keys.set(config.auth.clone());
        mounts::put_in_place(&config.mounts).await;
        let (mut specs, mut defaults) = (config.models.clone(), config.defaults.clone());
        let other_volumes = config.volumes != begun.volumes;
        if other_volumes {
            // They are watched from the start on; data is read from where they were until a restart.
            let folder = &begun.defaults.all_model_data_folder;
            specs
                .values_mut()
                .chain([&mut defaults])
                .for_each(|spec| spec.all_model_data_folder.clone_from(folder));
        }
        let Ok(models) = self.running.control.configure(specs, defaults).await else {
            return Change::Stopping;
        };
        let other_traces = config.server.traces != begun.server.traces;
        let at_start = values(&self.start);
        let of_kind = |config: &Config, mirrored: bool| {
            let kind = |volume: &&Volume| volume.bucket.is_some() == mirrored;
            config.volumes.iter().filter(kind).cloned().collect::<Vec<_>>()
        };
        let is_other = |mirrored| of_kind(config, mirrored) != of_kind(begun, mirrored);
        let restart: Vec<String> = differing(&at_start, &after)
            .filter(|key| !is_live(key) && !AT_START.iter().any(|start| key.starts_with(start)))
            .chain(is_other(false).then_some(VOLUMES))
            .chain(is_other(true).then_some(BUCKETS))
            .map(ToOwned::to_owned)
            .collect();
        // A secret among them doesn't show in what is shown.
        let hidden = other_traces && !restart.iter().any(|key| key.starts_with(TRACES));
        let restart = restart.into_iter().chain(hidden.then(|| TRACES.to_owned())).collect();
        let unchanged = models.is_empty() && !other_keys && differing(&before, &after).next().is_none();
        let warnings = loaded.warnings.iter().map(ToString::to_string).collect();
        self.now.store(Arc::new(Now { loaded, last: self.now.load().last.clone() }));
        if unchanged { Change::Unchanged } else { Change::Applied { models, restart, warnings } }
    }

    /// What the plugins in the volumes say of their models' settings, as far as they are open. Runs their code, so on another
    /// thread; one that doesn't come back is no reason to refuse.
    async fn faults_of_plugins(&self, specs: &BTreeMap<String, ModelSpec>) -> Vec<Fault> {
        let plugins = self.running.control.plugins().await.unwrap_or_default();
        let with_plugin =
            |spec: &ModelSpec| Some((plugins.get(&spec.plugin)?.clone(), spec.settings.clone()));
        let models: Vec<_> = specs.values().filter_map(with_plugin).collect();
        let check = move || -> Vec<Fault> {
            let faults =
                models.iter().filter_map(|(plugin, settings)| check_settings(&**plugin, settings).err());
            faults.flat_map(|faults| faults.iter().cloned().collect::<Vec<_>>()).collect()
        };
        match timeout(PLUGINS_TIME_MAX, tokio::task::spawn_blocking(check)).await {
            Ok(checked) => checked.unwrap_or_default(),
            Err(_) => {
                tracing::warn!(
                    "a plugin didn't say within {PLUGINS_TIME_MAX:?} whether its settings are right"
                );
                Vec::new()
            }
        }
    }

    /// On another thread: files may lie where they take long.
    async fn look(&self) -> Snapshot {
        let sources = self.sources.clone();
        tokio::task::spawn_blocking(move || sources.look()).await.unwrap_or_default()
    }

    fn remember(&self, change: &Change) {
        let now = self.now.load();
        let at_unix_ms = unix_ms();
        let last = Some(LastChange { at_unix_ms, change: change.clone() });
        self.now.store(Arc::new(Now { loaded: Arc::clone(&now.loaded), last }));
    }
}

/// On another thread: secrets may lie where they take long.
async fn load(snapshot: Snapshot) -> Result<Loaded, Faults> {
    tokio::task::spawn_blocking(move || snapshot.load()).await.unwrap_or_else(|_| Err(Vec::new().into()))
}

fn tell(change: &Change) {
    match change {
        Change::Unchanged => tracing::info!("the configuration was read again and says what it said before"),
        Change::Applied { models, restart, warnings } => {
            tracing::info!(models = models.in_words(), "the changed configuration is in force");
            warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
            if !restart.is_empty() {
                tracing::warn!(keys = restart.join(", "), "restart the host to apply these keys");
            }
        }
        Change::Refused { errors } => {
            for fault in errors {
                let text = fault.to_string().replace('\n', ";");
                tracing::error!("the configuration stays as it was: {text}");
            }
        }
        Change::Stopping => {}
    }
}

/// What each key says.
fn values(loaded: &Loaded) -> BTreeMap<String, String> {
    loaded.rows().into_iter().map(|row| (row.key, row.value)).collect()
}

/// The keys that don't say the same in both.
fn differing<'a>(
    before: &'a BTreeMap<String, String>,
    after: &'a BTreeMap<String, String>,
) -> impl Iterator<Item = &'a str> {
    let changed = after.iter().filter(|(key, value)| before.get(*key) != Some(value));
    let gone = before.iter().filter(|(key, _)| !after.contains_key(*key));
    changed.chain(gone).map(|(key, _)| key.as_str())
}

fn is_live(key: &str) -> bool {
    let begins_with = |known: &&str| {
        key.strip_prefix(*known).is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
    };
    LIVE.iter().any(begins_with) && !AT_START.iter().any(begins_with)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_applied_at_once_is_told_from_what_needs_a_restart() {
        for live in
            ["server.log", "app_settings.batch_config.wait_ms", "model_settings.model_entries.a.top_k"]
        {
            assert!(is_live(live), "{live}");
        }
        for at_start in [
            "server.listen",
            "app_settings.deployment_config.volumes.a",
            "app_settings.app_prefix",
            "server.logs",
        ] {
            assert!(!is_live(at_start), "{at_start}");
        }
        let map =
            |pairs: &[(&str, &str)]| pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let (before, after): (BTreeMap<_, _>, BTreeMap<_, _>) = (
            map(&[("same", "1"), ("gone", "1"), ("changed", "1")]),
            map(&[("same", "1"), ("changed", "2"), ("new", "1")]),
        );
        assert_eq!(differing(&before, &after).collect::<Vec<_>>(), ["changed", "new", "gone"]);
    }
}
