//! Serves other models than before, or the same ones differently: what a changed configuration leads to for the models. What is
//! wrong with it was found before; here nothing is refused any more.

use std::{collections::BTreeMap, sync::Arc};

use serde::Serialize;

use super::{
    Loop,
    machine::{Event, needs_a_generation},
    usage,
};
use crate::{config::ModelSpec, pipeline::Status};

/// What became of the models, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ModelChanges {
    /// Served now, and not before.
    pub added: Vec<String>,
    /// Served no more; what was queued is run first.
    pub removed: Vec<String>,
    /// Served differently, at once.
    pub changed: Vec<String>,
    /// Served differently as soon as a new generation is loaded; `GET /models/{name}` says what became of it.
    pub reloading: Vec<String>,
}

impl ModelChanges {
    fn sort(&mut self) {
        for names in [&mut self.added, &mut self.removed, &mut self.changed, &mut self.reloading] {
            names.sort_unstable();
        }
    }

    /// What became of them, with their names; nothing where nothing has changed.
    #[must_use]
    pub fn in_words(&self) -> Option<String> {
        let lists = [
            ("added", &self.added),
            ("removed", &self.removed),
            ("changed", &self.changed),
            ("reloading", &self.reloading),
        ];
        let words = lists.iter().filter(|(_, names)| !names.is_empty());
        let words: Vec<String> = words.map(|(word, names)| format!("{word} {}", names.join(", "))).collect();
        (!words.is_empty()).then(|| words.join("; "))
    }

    /// Whether nothing has changed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.added.is_empty()
            && self.removed.is_empty()
            && self.changed.is_empty()
            && self.reloading.is_empty()
    }
}

impl Loop {
    /// Has plugins hear that other lines of theirs are wanted. That is their code, so not on this thread; nobody waits for it.
    pub(super) fn tell_log_levels(&self) {
        let builder = Arc::clone(&self.builder);
        drop(tokio::task::spawn_blocking(move || builder.engine.log_level_changed()));
    }

    pub(super) async fn configure(
        &mut self,
        models: BTreeMap<String, ModelSpec>,
        defaults: ModelSpec,
    ) -> ModelChanges {
        let mut changes = ModelChanges::default();
        // What plugins log is a part of the configuration too.
        self.tell_log_levels();
        let entries_before = std::mem::replace(&mut self.config.models, models);
        self.config.defaults = defaults;
        for name in self.machines.keys().cloned().collect::<Vec<_>>() {
            match self.wanted(&name, entries_before.contains_key(&name)) {
                Some(spec) => self.change_model(&name, spec, &mut changes).await,
                None => {
                    self.remove(&name, "the model is no longer configured", None).await;
                    changes.removed.push(name);
                }
            }
        }
        for spec in self.config.models.clone().into_values() {
            if !self.machines.contains_key(&spec.name) {
                tracing::info!(model = spec.name, "a new model is configured");
                changes.added.push(spec.name.clone());
                let plugin = spec.plugin.clone();
                self.add(spec);
                self.tell_file(&plugin).await;
            }
        }
        // A plugin that no entry names any more serves under its own name, as after a restart.
        let entries = &self.config.models;
        self.removal.forget_unloaded(|plugin| entries.values().any(|spec| spec.plugin == plugin));
        for plugin in self.files.keys().cloned().collect::<Vec<_>>() {
            if self.users_of(&plugin).is_empty() && !self.removal.is_unloaded(&plugin) {
                let added = self.models_of(&plugin);
                changes.added.extend(added.iter().map(|model| model.name.clone()));
                self.tell_file(&plugin).await;
            }
        }
        changes.sort();
        changes
    }

    /// How a model that is served now should be served: by its entry; else, as a plugin under its own name, with the defaults.
    fn wanted(&self, name: &str, had_an_entry: bool) -> Option<ModelSpec> {
        if let Some(spec) = self.config.models.get(name) {
            return Some(spec.clone());
        }
        // One whose file is gone serves on, unless it was here for its entry alone.
        let is_plugin = self.files.contains_key(name) || !had_an_entry;
        let has_entries = self.config.models.values().any(|spec| spec.plugin == name);
        (is_plugin && !has_entries).then(|| self.config.defaults.named(name))
    }

    async fn change_model(&mut self, name: &str, spec: ModelSpec, changes: &mut ModelChanges) {
        let Some(model) = self.models.all().get(name).cloned() else { return };
        let before = model.spec();
        if *before != spec {
            // A folder of Python has a process of its own whatever is said.
            let files = self.files.get(&spec.plugin).and_then(|files| files.first());
            let is_folder = files.is_some_and(|(path, _)| path.is_dir());
            let kind = if needs_a_generation(&before, &spec, is_folder) {
                &mut changes.reloading
            } else {
                &mut changes.changed
            };
            kind.push(name.to_owned());
        }
        // Also where nothing else differs: its volumes may be others.
        let volumes = self.volumes.iter().filter(|volume| usage::uses(&spec, volume)).cloned().collect();
        let file = self.files.get(&spec.plugin).and_then(|files| files.first()).cloned();
        // Now, so that the next lookup of a plugin's models sees the new spec.
        model.respec(spec);
        self.tell(name, Event::Configure(before, volumes, file)).await;
    }

    /// Tells the models that wait for a plugin of its file.
    pub(super) async fn tell_file(&mut self, plugin: &str) {
        let Some((path, staged)) = self.files.get(plugin).and_then(|files| files.first()).cloned() else {
            return;
        };
        for model in self.users_of(plugin) {
            if matches!(*model.status(), Status::Waiting { .. }) {
                self.tell(&model.name, Event::File(path.clone(), staged.clone())).await;
            }
        }
    }
}
