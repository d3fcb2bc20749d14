//! From files in volumes to serving generations: one watch a volume (`watch`), one machine a model (`machine`), and between
//! them this loop, which knows which model uses what. It is never on the path of a request.

pub mod build;
mod configure;
mod journal;
mod machine;
mod removal;
mod report;
mod usage;
mod watch;

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use modalkit_device::Devices;
use modalkit_loader::{LoadError, Plugin, Store};
use serde::Serialize;
use tokio::{
    sync::{mpsc, oneshot},
    task::{self, JoinHandle, JoinSet},
};

use crate::{
    config::{Config, ModelSpec, Volume},
    dispatch::Models,
    pipeline::{Model, Status, VolumeChange},
    telemetry::Metrics,
};
use build::Builder;
use machine::{Event, INBOX_MAX, Machine, Order, PluginFile, What};
use removal::Removal;
use watch::{Bell, Told};

pub use configure::ModelChanges;
pub use journal::{Cause, Entry, HookReport, Outcome, Phase, Phases, Source};
pub use removal::Unloaded;
pub use report::Report;

/// Commands that wait for the loop, which carries each out at once; who sends more waits.
const COMMANDS_MAX: usize = 64;

/// The running loop.
pub struct Reload {
    stop: oneshot::Sender<()>,
    task: JoinHandle<JoinSet<()>>,
    _copies: Copies,
}

/// Removes the private copies, whether or not everybody has left by then: threads that hang in a plugin hold the folder's
/// owner as well.
struct Copies(Arc<Builder>);

impl Drop for Copies {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// Takes what people ask for to the loop.
#[derive(Clone)]
pub struct Control(mpsc::Sender<Command>);

/// Why nothing was done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ControlError {
    /// No such model or volume; there are these.
    Unknown(Vec<String>),
    /// The model has an entry in the configuration, which says that it is served.
    Configured(String),
    /// The host, or the model, is going away.
    Stopping,
}

/// What a look through a volume led to.
#[derive(Debug, Serialize)]
pub struct VolumeReport {
    /// Its name.
    pub volume: String,
    /// The models whose plugin lies there, or that use its data.
    pub models: BTreeMap<String, VolumeModel>,
}

/// What it led to for one model.
#[derive(Debug, Default, Serialize)]
pub struct VolumeModel {
    /// The change of its plugin; `None` where the content is what serves.
    pub reload: Option<Entry>,
    /// The call of `on_volume_reload`; `None` where the model doesn't use the volume's data.
    pub hook: Option<HookReport>,
}

type Reply<T> = oneshot::Sender<Result<T, ControlError>>;

enum Command {
    /// To a model.
    Tell(String, Event, Reply<()>),
    /// Look through a volume, and tell everybody who uses it.
    Volume(String, Reply<VolumeReport>),
    /// Unload a model.
    Unload(String, Reply<Unloaded>),
    /// Tell the plugins that are open.
    Plugins(oneshot::Sender<BTreeMap<String, Plugin>>),
    /// Serve these models; those without an entry like this.
    Configure(BTreeMap<String, ModelSpec>, Box<ModelSpec>, oneshot::Sender<ModelChanges>),
}

struct Loop {
    config: Config,
    models: Arc<Models>,
    metrics: Arc<Metrics>,
    devices: Arc<Devices>,
    builder: Arc<Builder>,
    volumes: Vec<Volume>,
    bells: Arc<[Bell]>,
    /// Volumes that haven't been looked through yet.
    unseen: Vec<bool>,
    machines: HashMap<String, Running>,
    running: JoinSet<()>,
    removal: Removal,
    /// Plugin files that are there, as they were told last, by the plugin's name: the first of each counts.
    files: BTreeMap<String, Vec<PluginFile>>,
    /// Looks that were asked for.
    looks: Vec<Look>,
}

/// A model's machine.
struct Running {
    events: mpsc::Sender<Event>,
    task: task::Id,
}

/// A look at a volume that somebody waits for.
struct Look {
    volume: usize,
    /// What the volume's bell called it.
    number: u64,
    /// The models whose plugin it found changed.
    found: Vec<String>,
    /// The data that it found changed.
    changed: Vec<String>,
    reply: Reply<VolumeReport>,
}

impl Reload {
    /// Starts watching; the models of the configuration appear at once, as waiting for their plugins.
    ///
    /// # Errors
    /// A thread can't be started.
    pub fn start(
        config: Config,
        store: Store,
        models: Arc<Models>,
        metrics: Arc<Metrics>,
        devices: Arc<Devices>,
    ) -> Result<(Self, Control), LoadError> {
        let server = &config.server;
        let builder = Arc::new(Builder::new(
            store,
            server.preflight_timeout,
            server.generations_max,
            metrics.libraries.clone(),
        ));
        let (tell, told) = mpsc::channel(COMMANDS_MAX);
        let mut bells = Vec::new();
        for (index, volume) in config.volumes.iter().enumerate() {
            let (bell, mut found) = watch::start(volume, server, Arc::clone(&builder))?;
            bells.push(bell);
            let tell = tell.clone();
            tokio::spawn(async move {
                while let Some(found) = found.recv().await {
                    if tell.send((index, found)).await.is_err() {
                        return;
                    }
                }
            });
        }
        let (stop, stopped) = oneshot::channel();
        let (commands, commanded) = mpsc::channel(COMMANDS_MAX);
        let copies = Copies(Arc::clone(&builder));
        let mut state = Loop {
            volumes: config.volumes.clone(),
            unseen: vec![true; bells.len()],
            bells: bells.into(),
            config,
            models,
            metrics,
            devices,
            builder,
            machines: HashMap::new(),
            running: JoinSet::new(),
            removal: Removal::default(),
            files: BTreeMap::new(),
            looks: Vec::new(),
        };
        for spec in state.config.models.clone().into_values() {
            state.add(spec);
        }
        let task = tokio::spawn(state.run(told, commanded, stopped));
        Ok((Self { stop, task, _copies: copies }, Control(commands)))
    }

    /// Takes no more changes and lets every replica finish what it runs.
    pub async fn stop(self) {
        let Self { stop, task, _copies } = self;
        // A loop that has ended needs no word.
        let _ = stop.send(());
        match task.await {
            Ok(machines) => drop(machines.join_all().await),
            Err(error) => tracing::error!(%error, "the reload loop ended before it was told to"),
        }
    }
}

impl Control {
    /// Of a host that is going away.
    #[cfg(test)]
    pub fn of_nobody() -> Self {
        Self(mpsc::channel(1).0)
    }

    /// How a model's reloads stand.
    ///
    /// # Errors
    /// No such model, or it is going away.
    pub async fn report(&self, model: &str) -> Result<Report, ControlError> {
        self.ask(model, Event::Report).await
    }

    /// Takes what the volume holds, also where it is what serves; waits for the outcome.
    ///
    /// # Errors
    /// No such model, or it is going away.
    pub async fn reload(&self, model: &str) -> Result<Entry, ControlError> {
        self.ask(model, |reply| Event::Order(Order { what: What::Reload, reply })).await
    }

    /// Goes back to the generation before; waits for the outcome.
    ///
    /// # Errors
    /// No such model, or it is going away.
    pub async fn roll_back(&self, model: &str) -> Result<Entry, ControlError> {
        self.ask(model, |reply| Event::Order(Order { what: What::RollBack, reply })).await
    }

    /// Looks through a volume, takes what changed, and calls `on_volume_reload` on every model that uses it; waits for all
    /// of it.
    ///
    /// # Errors
    /// No such volume, or the host is going away.
    pub async fn reload_volume(&self, volume: &str) -> Result<VolumeReport, ControlError> {
        let (reply, report) = oneshot::channel();
        self.send(Command::Volume(volume.to_owned(), reply)).await?;
        report.await.unwrap_or(Err(ControlError::Stopping))
    }

    /// Unloads a model that has no entry in the configuration; waits until it has left.
    ///
    /// # Errors
    /// No such model, it has an entry, or the host is going away.
    pub async fn unload(&self, model: &str) -> Result<Unloaded, ControlError> {
        let (reply, unloaded) = oneshot::channel();
        self.send(Command::Unload(model.to_owned(), reply)).await?;
        unloaded.await.unwrap_or(Err(ControlError::Stopping))
    }

    /// The plugins in the volumes whose content is open, by name.
    ///
    /// # Errors
    /// The host is going away.
    pub async fn plugins(&self) -> Result<BTreeMap<String, Plugin>, ControlError> {
        let (reply, plugins) = oneshot::channel();
        self.send(Command::Plugins(reply)).await?;
        plugins.await.map_err(|_| ControlError::Stopping)
    }

    /// Serves these models from now on: adds, changes and unloads what differs. New generations come in afterwards, as any do.
    ///
    /// # Errors
    /// The host is going away.
    pub async fn configure(
        &self,
        models: BTreeMap<String, ModelSpec>,
        defaults: ModelSpec,
    ) -> Result<ModelChanges, ControlError> {
        let (reply, changes) = oneshot::channel();
        self.send(Command::Configure(models, Box::new(defaults), reply)).await?;
        changes.await.map_err(|_| ControlError::Stopping)
    }

    async fn ask<T>(
        &self,
        model: &str,
        event: impl FnOnce(oneshot::Sender<T>) -> Event,
    ) -> Result<T, ControlError> {
        let (reply, answer) = oneshot::channel();
        let (told, known) = oneshot::channel();
        self.send(Command::Tell(model.to_owned(), event(reply), told)).await?;
        known.await.unwrap_or(Err(ControlError::Stopping))?;
        answer.await.map_err(|_| ControlError::Stopping)
    }

    async fn send(&self, command: Command) -> Result<(), ControlError> {
        self.0.send(command).await.map_err(|_| ControlError::Stopping)
    }
}

impl Loop {
    async fn run(
        mut self,
        mut told: mpsc::Receiver<(usize, Told)>,
        mut commands: mpsc::Receiver<Command>,
        mut stop: oneshot::Receiver<()>,
    ) -> JoinSet<()> {
        loop {
            tokio::select! {
                Some((volume, told)) = told.recv() => self.on_told(volume, told).await,
                Some(command) = commands.recv() => self.on_command(command).await,
                // Models that were unloaded.
                Some(ended) = self.running.join_next_with_id() => {
                    self.on_ended(ended.map_or_else(|error| error.id(), |(task, ())| task));
                }
                plugin = self.removal.due() => self.on_gone_due(&plugin).await,
                _ = &mut stop => break,
            }
        }
        for machine in self.machines.values() {
            // One that has ended needs no word.
            let _ = machine.events.send(Event::Stop).await;
        }
        self.running
    }

    async fn on_told(&mut self, volume: usize, told: Told) {
        match told {
            Told::Plugin { name, path, staged } => {
                let files = self.files.entry(name.clone()).or_default();
                let file = (path.clone(), staged.clone());
                let takes = self.removal.takes(&name, &file);
                match files.iter_mut().find(|(known, _)| *known == path) {
                    Some(known) => *known = file,
                    None => files.push(file),
                }
                if !takes {
                    tracing::info!(
                        plugin = name,
                        "the file has the content that somebody unloaded; it isn't taken"
                    );
                    return;
                }
                for model in self.models_of(&name) {
                    // So that nobody takes the host for ready before this file has been taken or refused.
                    if matches!(*model.status(), Status::Waiting { .. }) {
                        model.set_status(Status::Loading, None);
                    }
                    for look in self.looks.iter_mut().filter(|look| look.volume == volume) {
                        look.found.push(model.name.clone());
                    }
                    self.tell(&model.name, Event::File(path.clone(), staged.clone())).await;
                }
            }
            Told::Gone { name, path } => self.on_gone(name, path).await,
            Told::Data { changed } if self.looks.iter().any(|look| look.volume == volume) => {
                // Whoever waits for the look is told with everybody else, in one call.
                for look in self.looks.iter_mut().filter(|look| look.volume == volume) {
                    look.changed.extend(changed.iter().cloned());
                }
            }
            Told::Data { changed } => {
                let change = self.change(volume, changed);
                for model in self.readers_of(volume) {
                    self.tell(&model.name, Event::Data(change.clone())).await;
                }
            }
            Told::Looked { quiet, asked } => {
                self.unseen[volume] &= !quiet;
                if !self.unseen.contains(&true) {
                    self.models.set_complete();
                }
                self.conclude_looks(volume, asked).await;
            }
        }
    }

    async fn on_command(&mut self, command: Command) {
        match command {
            Command::Tell(model, event, reply) => {
                let told = self.on_tell(&model, event).await;
                // Whoever asked may have left.
                let _ = reply.send(told);
            }
            Command::Volume(name, reply) => {
                match self.volumes.iter().position(|volume| volume.name == name) {
                    Some(volume) => {
                        let number = self.bells[volume].ask();
                        self.looks.push(Look {
                            volume,
                            number,
                            found: Vec::new(),
                            changed: Vec::new(),
                            reply,
                        });
                    }
                    None => {
                        let known = self.volumes.iter().map(|volume| volume.name.clone()).collect();
                        let _ = reply.send(Err(ControlError::Unknown(known)));
                    }
                }
            }
            Command::Unload(name, reply) => self.unload(&name, reply).await,
            Command::Plugins(reply) => {
                let opened = |(name, files): (&String, &Vec<PluginFile>)| {
                    let (_, staged) = files.first()?;
                    Some((name.clone(), self.builder.opened(staged.as_ref().ok()?.sha256())?))
                };
                // Whoever asked may have left.
                let _ = reply.send(self.files.iter().filter_map(opened).collect());
            }
            Command::Configure(models, defaults, reply) => {
                let changes = self.configure(models, *defaults).await;
                // Whoever asked may have left.
                let _ = reply.send(changes);
            }
        }
    }

    async fn on_tell(&mut self, model: &str, event: Event) -> Result<(), ControlError> {
        let Some(event) = self.take_again(model, event).await else { return Ok(()) };
        match self.machines.get(model) {
            None => Err(ControlError::Unknown(self.models.all().keys().cloned().collect())),
            Some(machine) => machine.events.send(event).await.map_err(|_| ControlError::Stopping),
        }
    }

    /// A look is over: whoever asked for it waits now for the models that it concerns.
    async fn conclude_looks(&mut self, volume: usize, asked: u64) {
        let is_over = |look: &mut Look| look.volume == volume && look.number <= asked;
        for Look { found, changed, reply, .. } in self.looks.extract_if(.., is_over).collect::<Vec<_>>() {
            let change = self.change(volume, changed);
            let mut reloads = Vec::new();
            for model in found {
                let (settled, entry) = oneshot::channel();
                self.tell(&model, Event::Settled(settled)).await;
                reloads.push((model, entry));
            }
            let mut hooks = Vec::new();
            for model in self.readers_of(volume) {
                let (hooked, report) = oneshot::channel();
                self.tell(&model.name, Event::Hook(change.clone(), hooked)).await;
                hooks.push((model.name.clone(), report));
            }
            let name = change.volume.clone();
            tokio::spawn(async move {
                let mut models: BTreeMap<String, VolumeModel> = BTreeMap::new();
                for (model, entry) in reloads {
                    models.entry(model).or_default().reload = entry.await.ok().flatten();
                }
                for (model, report) in hooks {
                    models.entry(model).or_default().hook = report.await.ok();
                }
                // Whoever asked may have left.
                let _ = reply.send(Ok(VolumeReport { volume: name, models }));
            });
        }
    }

    async fn tell(&self, model: &str, event: Event) {
        if let Some(machine) = self.machines.get(model) {
            // One that has ended needs no word.
            let _ = machine.events.send(event).await;
        }
    }

    fn change(&self, volume: usize, changed: Vec<String>) -> VolumeChange {
        let volume = &self.volumes[volume];
        VolumeChange {
            volume: volume.name.clone(),
            mount_point: volume.mount_point.display().to_string(),
            changed,
        }
    }

    fn add(&mut self, spec: ModelSpec) -> Arc<Model> {
        if self.removal.is_leaving(&spec.name) && !self.machines.contains_key(&spec.name) {
            // The series of the one that leaves are not continued: what it still counts would be counted as this one's.
            self.metrics.forget(&spec.name);
        }
        let (metrics, devices) = (&self.metrics, &self.devices);
        let model = self.models.add(spec, |spec| Model::new(spec, metrics, Arc::clone(devices)));
        let name = &model.name;
        if !self.machines.contains_key(name) {
            let (events, inbox) = mpsc::channel(INBOX_MAX);
            let used = self.volumes.iter().filter(|volume| usage::uses(&model.spec(), volume));
            let machine = Machine::new(
                Arc::clone(&model),
                Arc::clone(&self.builder),
                self.metrics.reloads(name),
                Arc::clone(&self.bells),
                used.cloned().collect(),
                (events.downgrade(), inbox),
            );
            let task = self.running.spawn(machine.run()).id();
            self.machines.insert(name.clone(), Running { events, task });
        }
        model
    }

    /// The models that read their data from a volume.
    fn readers_of(&self, volume: usize) -> Vec<Arc<Model>> {
        let volume = &self.volumes[volume];
        self.models.all().values().filter(|model| usage::uses(&model.spec(), volume)).cloned().collect()
    }

    /// The models that use a plugin.
    fn users_of(&self, plugin: &str) -> Vec<Arc<Model>> {
        self.models.all().values().filter(|model| model.spec().plugin == plugin).cloned().collect()
    }

    /// The models that are configured to use a plugin; else one of its own name, with the defaults.
    fn models_of(&mut self, plugin: &str) -> Vec<Arc<Model>> {
        let configured = self.users_of(plugin);
        if !configured.is_empty() {
            return configured;
        }
        let model = self.add(self.config.defaults.named(plugin));
        if model.spec().plugin != plugin {
            tracing::warn!(
                plugin,
                uses = model.spec().plugin,
                "a file in the volume has the name of a model that uses another plugin; it is not loaded"
            );
            return Vec::new();
        }
        vec![model]
    }
}
