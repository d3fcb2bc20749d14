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

/// How long a plugin's file must have been gone before anything follows from that: its other name is told after it.
const GONE_AFTER: Duration = Duration::from_secs(1);

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
    /// Plugins whose last file is gone.
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
    /// It was looked at before, and its model is unloaded next time.
    told: bool,
}

struct Leaving {
    model: String,
    waiting: Option<(Unloaded, Reply<Unloaded>)>,
}

impl Removal {
    /// Waits until a file has been gone for long enough; says whose.
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
            let since = Instant::now();
            self.removal.gone.insert(plugin, Gone { since, due: since + GONE_AFTER, told: false });
        }
    }

    /// A plugin's file has been gone for a while. A model without an entry goes with it: at once where it doesn't serve, and where it
    /// does after `removed_plugin_seconds`, if that is set.
    pub(super) async fn on_gone_due(&mut self, plugin: &str) {
        let Some(gone) = self.removal.gone.remove(plugin) else { return };
        // Its file may be dropped in again.
        self.removal.unloaded.remove(plugin);
        let limit = self.config.server.removed_plugin;
        for model in self.users_of(plugin) {
            let (name, serves) = (model.name.as_str(), model.serving().is_ok());
            match limit {
                _ if model.spec().configured => {
                    if serves {
                        tracing::warn!(
                            model = name,
                            plugin,
                            "the plugin's file is gone; what is loaded serves on while the model has an entry in the configuration"
                        );
                    }
                }
                _ if !serves => {
                    self.remove(name, "its plugin's file is gone, and it doesn't serve", None).await;
                }
                Some(_) if gone.told => self.remove(name, "its plugin's file is gone", None).await,
                Some(limit) => {
                    tracing::warn!(
                        model = name,
                        after = ?limit,
                        "the plugin's file is gone; the model is unloaded where it isn't back by then (server.removed_plugin_seconds)"
                    );
                    let due = (gone.since + limit).max(Instant::now());
                    let gone = Gone { since: gone.since, due, told: true };
                    self.removal.gone.insert(plugin.to_owned(), gone);
                }
                None => {
                    tracing::warn!(
                        model = name,
                        "the plugin's file is gone; what is loaded serves on until `modalkit unload {name}`, or until the host ends"
                    );
                }
            }
        }
    }

    /// Unloads a model that has no entry in the configuration, because somebody wants that.
    pub(super) async fn unload(&mut self, name: &str, reply: Reply<Unloaded>) {
        let Some(model) = self.models.all().get(name).cloned() else {
            let known = self.models.all().keys().cloned().collect();
            // Whoever asked may have left.
            let _ = reply.send(Err(ControlError::Unknown(known)));
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
