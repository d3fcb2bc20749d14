//! From files in volumes to serving generations. It owns the watch, the build and the typed outcome of each file, and is
//! never on the path of a request.

pub mod build;
mod watch;

use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
    sync::Arc,
};

use modalkit_loader::{LoadError, Plugin, Store};
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinHandle,
};

use crate::{
    config::Config,
    dispatch::Models,
    pipeline::{Fleet, Generation, Model, Status},
    telemetry::Metrics,
};
use build::Builder;
use watch::Found;

/// What became of a plugin file.
enum Outcome {
    /// It is open, and these models use it.
    Opened { plugin: Plugin, models: Vec<Arc<Model>> },
    /// Its content is what is served already.
    Unchanged,
    /// Its content differs from what is served. The served one stays: replacing it needs a restart.
    Superseded { serving: String, found: String },
    /// No model uses it.
    Unused,
    /// It can't be served.
    Refused { models: Vec<Arc<Model>>, error: LoadError },
}

/// The running loop.
pub struct Reload {
    stop: oneshot::Sender<()>,
    task: JoinHandle<Vec<Fleet>>,
}

struct Loop {
    config: Config,
    models: Arc<Models>,
    metrics: Arc<Metrics>,
    builder: Arc<Builder>,
    /// What is served of each plugin, by the plugin's name.
    served: HashMap<String, String>,
    fleets: Vec<Fleet>,
}

impl Reload {
    /// Starts watching; the models of the configuration appear at once, as waiting for their plugins.
    ///
    /// # Errors
    /// The private folder for copies can't be made.
    pub fn start(config: Config, models: Arc<Models>, metrics: Arc<Metrics>) -> Result<Self, LoadError> {
        for spec in config.models.values() {
            models.add(spec.clone(), |spec| Model::new(spec, &metrics));
        }
        let builder = Arc::new(Builder::new(Store::new()?, config.server.preflight_timeout));
        let watch = watch::start(&config.volumes, config.server.settle)?;
        let (stop, stopped) = oneshot::channel();
        let state = Loop { config, models, metrics, builder, served: HashMap::new(), fleets: Vec::new() };
        Ok(Self { stop, task: tokio::spawn(state.run(watch, stopped)) })
    }

    /// Takes no more files and lets every replica finish what it runs.
    pub async fn stop(self, models: &Models) {
        // A loop that has ended needs no word.
        let _ = self.stop.send(());
        match self.task.await {
            Ok(fleets) => {
                let mut stopping = tokio::task::JoinSet::new();
                fleets.into_iter().for_each(|fleet| drop(stopping.spawn(fleet.stop())));
                stopping.join_all().await;
            }
            Err(error) => tracing::error!(%error, "the reload loop ended before it was told to"),
        }
        for model in models.all().values() {
            model.set_status(Status::Stopping, None);
        }
    }
}

impl Loop {
    async fn run(mut self, mut watch: mpsc::Receiver<Found>, mut stop: oneshot::Receiver<()>) -> Vec<Fleet> {
        loop {
            let found = tokio::select! {
                Some(found) = watch.recv() => found,
                _ = &mut stop => return self.fleets,
            };
            for (plugin, file) in found.files {
                let outcome = tokio::select! {
                    outcome = self.take(&plugin, &file) => outcome,
                    // What is being built is dropped with its thread.
                    _ = &mut stop => return self.fleets,
                };
                self.conclude(&plugin, &file, outcome);
            }
            if found.quiet {
                self.models.set_complete();
            }
        }
    }

    async fn take(&self, name: &str, file: &Path) -> Outcome {
        let models = self.models_of(name);
        if models.is_empty() {
            return Outcome::Unused;
        }
        for model in models.iter().filter(|_| !self.served.contains_key(name)) {
            if matches!(*model.status(), Status::Waiting { .. } | Status::Failed { .. }) {
                model.set_status(Status::Loading, None);
            }
        }
        let (builder, path) = (Arc::clone(&self.builder), file.to_owned());
        let served = self.served.get(name).cloned();
        let built = tokio::task::spawn_blocking(move || builder.build(&path, served.as_deref())).await;
        let built = built
            .unwrap_or_else(|error| Err(LoadError::Refused(format!("the host failed over it: {error}"))));
        match built {
            Ok(build::Built::Plugin(plugin)) => Outcome::Opened { plugin, models },
            Ok(build::Built::Same) => Outcome::Unchanged,
            Ok(build::Built::Other { found }) => {
                Outcome::Superseded { serving: self.served.get(name).cloned().unwrap_or_default(), found }
            }
            Err(error) => Outcome::Refused { models, error },
        }
    }

    fn conclude(&mut self, name: &str, file: &Path, outcome: Outcome) {
        match outcome {
            Outcome::Opened { plugin, models } => {
                tracing::info!(plugin = name, file = %file.display(), sha256 = plugin.sha256(), version = plugin.version(), "plugin opened");
                self.served.insert(name.to_owned(), plugin.sha256().to_owned());
                for model in models {
                    let generation = Generation::new(FIRST_GENERATION, plugin.clone(), model.spec.clone());
                    self.fleets.push(Fleet::start(model, generation));
                }
            }
            Outcome::Unused => {}
            Outcome::Unchanged => tracing::debug!(plugin = name, "the file's content hasn't changed"),
            Outcome::Superseded { serving, found } => {
                tracing::warn!(plugin = name, file = %file.display(), serving, found, "the file has other content than the plugin that serves; restart the host to take it");
            }
            Outcome::Refused { models, error } => {
                let mut reason = format!("{} was refused: {error}", file.display());
                let mut cause = std::error::Error::source(&error);
                while let Some(error) = cause {
                    reason = format!("{reason}: {error}");
                    cause = error.source();
                }
                tracing::error!(plugin = name, reason, "plugin refused");
                for model in models.iter().filter(|model| model.serving().is_err()) {
                    model.set_status(Status::Failed { reason: reason.clone() }, None);
                }
            }
        }
    }

    /// The models that are configured to use a plugin; else one of its own name, with the defaults.
    fn models_of(&self, plugin: &str) -> Vec<Arc<Model>> {
        let configured: Vec<Arc<Model>> =
            self.models.all().values().filter(|model| model.spec.plugin == plugin).cloned().collect();
        if !configured.is_empty() {
            return configured;
        }
        let model =
            self.models.add(self.config.defaults.named(plugin), |spec| Model::new(spec, &self.metrics));
        if model.spec.plugin != plugin {
            tracing::warn!(
                plugin,
                uses = model.spec.plugin,
                "a file in the volume has the name of a model that uses another plugin; it is not loaded"
            );
            return Vec::new();
        }
        vec![model]
    }
}

const FIRST_GENERATION: u64 = 1;

/// Plugin files by the name under which they are known: `NAME.so` and `libNAME.so` are both `NAME`.
type PluginFiles = BTreeMap<String, PathBuf>;
