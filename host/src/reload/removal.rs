//! Models that go: their entry has gone from the configuration, their plugin's file from the volume, or somebody unloads them. It
//! decides when, and what is remembered of them afterwards; how a model is taken down is its machine's business.

use std::{collections::HashMap, future::pending, path::PathBuf, time::Duration};

use serde::Serialize;
use tokio::{
    sync::oneshot,
    task,
    time::{Instant, sleep_until},
};

use super::{
    ControlError, Loop, Reply,
    machine::{Event, Order, PluginFile, What},
};
use crate::pipeline::Status;

/// How long a plugin's file must have been gone before anything follows from that: a rename is reported as a removal first, and then as
/// a new file.
const GONE_AFTER: Duration = Duration::from_secs(1);
/// After how long without serving, beside the time that a load may take, a model whose file is gone is unloaded: a replica that hangs may
/// come back, or another may load.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(60);
/// How often a model is looked at that serves without its file.
const LOOK_INTERVAL: Duration = Duration::from_secs(5);

/// What came of unloading a model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Unloaded {
    /// Its name.
    pub model: String,
    /// Its plugin's file, where it is still in a volume. It is taken again when its content changes, or when somebody asks for a reload
    /// of the model.
    pub file: Option<PathBuf>,
}

/// What the loop knows of models that go, or have gone.
#[derive(Default)]
pub(super) struct Removal {
    /// Plugins whose last file is gone; after the first look only those whose model has no entry and is still there.
    gone: HashMap<String, Gone>,
    /// Plugins whose model somebody unloaded: the content that isn't taken again, `None` for what could not be copied.
    unloaded: HashMap<String, Option<String>>,
    /// Machines that were told to go and haven't ended, by their task.
    leaving: HashMap<task::Id, Leaving>,
}

struct Gone {
    since: Instant,
    /// When it is looked at.
    due: Instant,
    /// It was looked at before, and its model served then; this limit was told.
    told: Option<Option<Duration>>,
    /// Since when its model doesn't serve, as far as scans tell.
    idle: Option<Instant>,
}

/// What follows for a model without an entry whose plugin's file is gone.
#[derive(Debug, PartialEq, Eq)]
enum Follows {
    /// Nothing yet.
    Nothing,
    /// It serves on, which is told.
    ServesOn,
    /// It goes, for this reason.
    Goes(&'static str),
}

impl Gone {
    fn new(since: Instant) -> Self {
        Self { since, due: since + GONE_AFTER, told: None, idle: None }
    }

    /// Looks at the model. `limit` is how long it may serve without its file, and `load` how long a load of it may take.
    fn look(&mut self, now: Instant, status: &Status, limit: Option<Duration>, load: Duration) -> Follows {
        if self.told.is_some_and(|told| told != limit) {
            // Another limit counts from now: nobody was told of it before.
            self.since = now;
        }
        let end = limit.map(|limit| self.since + limit);
        let next = now + LOOK_INTERVAL;
        self.due = end.map_or(next, |end| end.max(now).min(next));
        let idle = (*status != Status::Ready).then(|| *self.idle.get_or_insert(now));
        self.idle = idle;
        let told = self.told.replace(limit);
        if told.is_none() && idle.is_some() {
            return Follows::Goes("its plugin's file is gone, and it doesn't serve");
        }
        if end.is_some_and(|end| now >= end) {
            return Follows::Goes("its plugin's file is gone");
        }
        let is_over = idle.is_some_and(|idle| now - idle >= FORGOTTEN_AFTER + load);
        // A first load has its own limit; where it fails, the next look finds that.
        if is_over && *status != Status::Loading {
            return Follows::Goes("its plugin's file is gone, and it doesn't serve any more");
        }
        if told == Some(limit) { Follows::Nothing } else { Follows::ServesOn }
    }
}

struct Leaving {
    model: String,
    waiting: Option<(Unloaded, Reply<Unloaded>)>,
}

impl Removal {
    /// Waits until a plugin whose file is gone is to be looked at; says which.
    pub(super) async fn due(&self) -> String {
        match self.gone.iter().min_by_key(|(_, gone)| gone.due) {
            Some((plugin, gone)) => {
                sleep_until(gone.due).await;
                plugin.clone()
            }
            None => pending().await,
        }
    }

    /// A file has come: whether it is to be taken, or is what somebody unloaded.
    pub(super) fn takes(&mut self, plugin: &str, file: &PluginFile) -> bool {
        self.gone.remove(plugin);
        let unloaded = self.unloaded.get(plugin).is_some_and(|content| *content == content_of(file));
        if !unloaded {
            self.unloaded.remove(plugin);
        }
        !unloaded
    }

    /// Whether somebody unloaded this plugin's model, and its file is as it was then.
    pub(super) fn is_unloaded(&self, plugin: &str) -> bool {
        self.unloaded.contains_key(plugin)
    }

    /// Takes these plugins again.
    pub(super) fn forget_unloaded(&mut self, is_wanted: impl Fn(&str) -> bool) {
        self.unloaded.retain(|plugin, _| !is_wanted(plugin));
    }

    /// Whether a model of this name is on its way out.
    pub(super) fn is_leaving(&self, model: &str) -> bool {
        self.leaving.values().any(|leaving| leaving.model == model)
    }
}

impl Loop {
    /// A plugin's file is gone. It may have another name, so that nothing follows from that yet.
    pub(super) async fn on_gone(&mut self, plugin: String, path: PathBuf) {
        if let Some(files) = self.files.get_mut(&plugin) {
            files.retain(|(known, _)| *known != path);
            if files.is_empty() {
                self.files.remove(&plugin);
            }
        }
        for model in self.users_of(&plugin) {
            self.tell(&model.name, Event::Gone(path.clone())).await;
        }
        if !self.files.contains_key(&plugin) {
            self.removal.gone.insert(plugin, Gone::new(Instant::now()));
        }
    }

    /// A plugin's file has been gone for a while. A model without an entry goes with it: at once where it doesn't serve; where it does,
    /// after `removed_plugin_seconds`, if that is set, or when it hasn't served for [`FORGOTTEN_AFTER`] and
    /// the time of a load.
    pub(super) async fn on_gone_due(&mut self, plugin: &str) {
        let Some(mut gone) = self.removal.gone.remove(plugin) else { return };
        // Its file may be dropped in again.
        self.removal.unloaded.remove(plugin);
        let (now, limit) = (Instant::now(), self.config.server.removed_plugin);
        let mut stays = false;
        for model in self.users_of(plugin) {
            let name = model.name.as_str();
            if model.spec().configured {
                if model.serving().is_ok() {
                    tracing::warn!(
                        model = name,
                        plugin,
                        "the plugin's file is gone; what is loaded serves on while the model has an entry in the configuration"
                    );
                }
                continue;
            }
            let status = model.status();
            let load = model.spec().replicas.load_timeout;
            match (gone.look(now, &status, limit, load), limit) {
                (Follows::Goes(why), _) => {
                    self.remove(name, why, None).await;
                    continue;
                }
                (Follows::Nothing, _) => {}
                (Follows::ServesOn, Some(limit)) => tracing::warn!(
                    model = name,
                    after = ?limit,
                    "the plugin's file is gone; the model is unloaded where it isn't back by then (server.removed_plugin_seconds)"
                ),
                (Follows::ServesOn, None) => tracing::warn!(
                    model = name,
                    "the plugin's file is gone; what is loaded serves on until `modalkit unload {name}`, or until the host ends, or until it hasn't served for {:?}",
                    FORGOTTEN_AFTER + load
                ),
            }
            stays = true;
        }
        if stays {
            self.removal.gone.insert(plugin.to_owned(), gone);
        }
    }

    /// Unloads a model that has no entry in the configuration, because somebody wants that.
    pub(super) async fn unload(&mut self, name: &str, reply: Reply<Unloaded>) {
        let Some(model) = self.models.all().get(name).cloned() else {
            let known = self.models.all().keys().cloned().collect();
            // Whoever asked may have left.
            let _ = reply.send(Err(ControlError::Unknown { name: name.to_owned(), known }));
            return;
        };
        if model.spec().configured {
            let _ = reply.send(Err(ControlError::Configured(name.to_owned())));
            return;
        }
        let file = self.files.get(name).and_then(|files| files.first());
        let unloaded = Unloaded { model: name.to_owned(), file: file.map(|(path, _)| path.clone()) };
        if let Some(content) = file.map(content_of) {
            self.removal.unloaded.insert(name.to_owned(), content);
        }
        self.remove(name, "somebody unloads it", Some((unloaded, reply))).await;
    }

    /// Carries out an order for a model that was unloaded and whose file is there: to reload is to take it again. Gives back what it
    /// can't carry out.
    pub(super) async fn take_again(&mut self, name: &str, event: Event) -> Option<Event> {
        let is_out = self.removal.is_unloaded(name)
            && self.files.contains_key(name)
            && !self.machines.contains_key(name);
        let reply = match event {
            Event::Order(Order { what: What::Reload, reply }) if is_out => reply,
            other => return Some(other),
        };
        self.removal.unloaded.remove(name);
        self.models_of(name);
        self.tell_file(name).await;
        let (settled, entry) = oneshot::channel();
        self.tell(name, Event::Settled(settled)).await;
        tokio::spawn(async move {
            if let Ok(Some(entry)) = entry.await {
                // Whoever asked may have left.
                let _ = reply.send(entry);
            }
        });
        None
    }

    /// Takes a model down: what is queued is run first, up to `drain_timeout_seconds`.
    pub(super) async fn remove(
        &mut self,
        name: &str,
        why: &str,
        waiting: Option<(Unloaded, Reply<Unloaded>)>,
    ) {
        let model = self.models.all().get(name).cloned();
        // First, so that no request finds a model that is leaving.
        self.models.remove(name);
        if let Some(model) = model {
            // Nobody comes any more who would fill a batch, whatever the machine is busy with.
            model.queue.drain();
            model.metrics.ready.set(0);
        }
        if let Some(machine) = self.machines.remove(name) {
            tracing::info!(model = name, "{why}: it is unloaded");
            // One that has ended needs no word.
            let _ = machine.events.send(Event::Unload(self.config.server.drain_timeout)).await;
            self.removal.leaving.insert(machine.task, Leaving { model: name.to_owned(), waiting });
        }
    }

    /// A machine has ended.
    pub(super) fn on_ended(&mut self, task: task::Id) {
        let Some(Leaving { model, waiting }) = self.removal.leaving.remove(&task) else { return };
        // Where a model of its name has come meanwhile, the series are that one's.
        if !self.machines.contains_key(&model) {
            self.metrics.forget(&model);
        }
        if let Some((unloaded, reply)) = waiting {
            // Whoever asked may have left.
            let _ = reply.send(Ok(unloaded));
        }
    }
}

/// What tells a file's content from another's.
fn content_of((_, staged): &PluginFile) -> Option<String> {
    staged.as_ref().ok().map(|staged| staged.sha256().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const LOAD: Duration = Duration::from_secs(300);
    const FORGOTTEN: Duration = FORGOTTEN_AFTER.saturating_add(LOAD);

    fn failed() -> Status {
        Status::Failed { reason: String::new() }
    }

    /// One whose model served at the first look, and that look's time.
    fn served(limit: Option<Duration>) -> (Gone, Instant) {
        let mut gone = Gone::new(Instant::now());
        let looked = gone.due;
        assert_eq!(gone.look(looked, &Status::Ready, limit, LOAD), Follows::ServesOn);
        (gone, looked)
    }

    #[test]
    fn a_model_without_its_file_that_does_not_serve_goes_at_the_first_look() {
        for status in [failed(), Status::Loading, Status::Waiting { expected: String::new() }] {
            let mut gone = Gone::new(Instant::now());
            let follows = gone.look(gone.due, &status, None, LOAD);
            assert!(matches!(follows, Follows::Goes(_)), "{status:?}: {follows:?}");
        }
    }

    #[test]
    fn a_model_that_served_without_its_file_is_forgotten_when_it_has_failed_for_long() {
        for status in [failed(), Status::Stuck { reason: String::new() }] {
            let (mut gone, start) = served(None);
            // However long it serves.
            let fails = start + 1000 * FORGOTTEN;
            assert_eq!(gone.look(fails - SECOND, &Status::Ready, None, LOAD), Follows::Nothing);
            assert_eq!(gone.look(fails, &status, None, LOAD), Follows::Nothing);
            assert_eq!(gone.due, fails + LOOK_INTERVAL, "it is looked at again");
            assert_eq!(gone.look(fails + FORGOTTEN - SECOND, &status, None, LOAD), Follows::Nothing);
            let follows = gone.look(fails + FORGOTTEN, &status, None, LOAD);
            assert!(matches!(follows, Follows::Goes(_)), "{status:?}: {follows:?}");
        }
    }

    #[test]
    fn a_model_that_recovers_in_time_or_is_being_loaded_is_not_forgotten() {
        let (mut gone, start) = served(None);
        let late = FORGOTTEN - SECOND;
        assert_eq!(gone.look(start + SECOND, &failed(), None, LOAD), Follows::Nothing);
        assert_eq!(gone.look(start + late, &Status::Ready, None, LOAD), Follows::Nothing);
        assert_eq!(gone.look(start + 2 * late, &failed(), None, LOAD), Follows::Nothing);
        assert_eq!(gone.look(start + 4 * late, &Status::Loading, None, LOAD), Follows::Nothing);
        assert!(matches!(gone.look(start + 5 * late, &failed(), None, LOAD), Follows::Goes(_)));
    }

    #[test]
    fn the_time_that_is_set_ends_what_serves_and_what_fails_alike() {
        let limit = 8 * SECOND;
        for status in [Status::Ready, failed()] {
            let (mut gone, start) = served(Some(limit));
            let end = start - GONE_AFTER + limit;
            assert_eq!(gone.due, start + LOOK_INTERVAL);
            assert_eq!(gone.look(gone.due, &status, Some(limit), LOAD), Follows::Nothing);
            assert_eq!(gone.due, end);
            assert_eq!(
                gone.look(end, &status, Some(limit), LOAD),
                Follows::Goes("its plugin's file is gone")
            );
        }
    }

    #[test]
    fn a_limit_that_is_set_later_is_told_and_counts_from_then() {
        let (mut gone, start) = served(None);
        let (limit, set) = (8 * SECOND, start + 1000 * SECOND);
        assert_eq!(gone.look(set, &Status::Ready, Some(limit), LOAD), Follows::ServesOn);
        assert_eq!(gone.look(set + limit - SECOND, &Status::Ready, Some(limit), LOAD), Follows::Nothing);
        let follows = gone.look(set + limit, &Status::Ready, Some(limit), LOAD);
        assert_eq!(follows, Follows::Goes("its plugin's file is gone"));
    }
}
