//! From files in volumes to serving generations: one watch a volume (`watch`), one machine a model (`machine`), and between
//! them this loop, which knows which model uses what. It is never on the path of a request.

pub mod build;
mod configure;
mod control;
mod history;
mod machine;
mod mirrored;
mod removal;
mod report;
mod requested_scan;
mod unpinned;
mod usage;
mod watch;

use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
    sync::Arc,
};

use modalkit_bucket::{Mirrors, SyncHandle};
use modalkit_device::Devices;
use modalkit_engine::{Engine, LoadError, Staged};
use tokio::{
    sync::{mpsc, oneshot},
    task::{self, JoinHandle, JoinSet},
};

use crate::{
    config::{Config, ModelSpec, Volume},
    fence::Fence,
    insight::metrics::Metrics,
    models::Models,
    pipeline::{Model, VolumeChange},
};
use build::Builder;
use control::{Command, Reply};
use machine::{Event, INBOX_MAX, Machine, PluginFile};
use mirrored::Mirrored;
use removal::Removal;
use requested_scan::RequestedScan;
use watch::{VolumeEvent, WatchHandle};

pub use configure::ModelChanges;
pub use control::{Control, ControlError, VolumeModel, VolumeReport};
pub use history::{Cause, HookReport, Outcome, Phase, Phases, ReloadRecord, Source};
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

struct Loop {
    config: Config,
    models: Arc<Models>,
    metrics: Arc<Metrics>,
    devices: Arc<Devices>,
    builder: Arc<Builder>,
    volumes: Vec<Volume>,
    watches: Arc<[WatchHandle]>,
    /// What asks for a listing of the bucket that a volume is mirrored from.
    syncs: Vec<Option<SyncHandle>>,
    /// Files of models that wait for the first mirror of a volume that they use.
    held: Vec<HeldFile>,
    /// This loop's own commands.
    commands: mpsc::WeakSender<Command>,
    /// Volumes that haven't been scanned yet.
    unscanned: Vec<bool>,
    /// All have been, and the machines were asked whether they have taken what was found.
    completes: bool,
    machines: HashMap<String, Running>,
    running: JoinSet<()>,
    removal: Removal,
    /// Plugin files that are there, as they were told last, by the plugin's name: the first of each counts.
    files: BTreeMap<String, Vec<PluginFile>>,
    /// Scans that were requested, and how many have been.
    scans: Vec<RequestedScan>,
    tickets: u64,
}

/// A model's machine.
struct Running {
    events: mpsc::Sender<Event>,
    task: task::Id,
}

/// A plugin's file, kept from its model until that can be loaded.
struct HeldFile {
    model: String,
    path: PathBuf,
    staged: Result<Staged, Arc<LoadError>>,
}

impl Reload {
    /// Starts watching; the models of the configuration appear at once, as waiting for their plugins.
    ///
    /// # Errors
    /// A thread can't be started.
    pub fn start(
        config: Config,
        engine: Arc<dyn Engine>,
        models: Arc<Models>,
        metrics: Arc<Metrics>,
        devices: Arc<Devices>,
        mirrors: &Mirrors,
    ) -> Result<(Self, Control), LoadError> {
        let server = &config.server;
        let folder = &server.state_folder;
        let fence = Fence::open(folder).map_err(|source| LoadError::Io {
            doing: "keep notes of loads in",
            path: folder.clone(),
            source,
        })?;
        let builder = Arc::new(Builder::new(engine, fence, &config.volumes, metrics.libraries.clone()));
        let (volume_event, volume_events) = mpsc::channel(COMMANDS_MAX);
        let mirrored: Vec<Option<Mirrored>> =
            config.volumes.iter().map(|volume| Mirrored::of(volume, mirrors)).collect();
        let mut watches = Vec::new();
        for (index, volume) in config.volumes.iter().enumerate() {
            let snapshots = mirrored[index].as_ref().map(|mirrored| mirrored.snapshots.clone());
            let (watch, mut found) = watch::start(volume, server, Arc::clone(&builder), snapshots)?;
            watches.push(watch);
            let volume_event = volume_event.clone();
            tokio::spawn(async move {
                while let Some(found) = found.recv().await {
                    if volume_event.send((index, found)).await.is_err() {
                        return;
                    }
                }
            });
        }
        let watches: Arc<[WatchHandle]> = watches.into();
        let syncs = mirrored.iter().map(|mirrored| Some(mirrored.as_ref()?.sync.clone())).collect();
        for (index, mirrored) in mirrored.into_iter().enumerate() {
            if let Some(mirrored) = mirrored {
                let name = config.volumes[index].name.clone();
                tokio::spawn(mirrored.follow(name, server.bucket_wait, Arc::clone(&watches), index));
            }
        }
        let (stop, stopped) = oneshot::channel();
        let (commands, commanded) = mpsc::channel(COMMANDS_MAX);
        let copies = Copies(Arc::clone(&builder));
        let mut state = Loop {
            volumes: config.volumes.clone(),
            unscanned: vec![true; watches.len()],
            completes: false,
            watches,
            syncs,
            held: Vec::new(),
            commands: commands.downgrade(),
            config,
            models,
            metrics,
            devices,
            builder,
            machines: HashMap::new(),
            running: JoinSet::new(),
            removal: Removal::default(),
            files: BTreeMap::new(),
            scans: Vec::new(),
            tickets: 0,
        };
        for spec in state.config.models.clone().into_values() {
            state.add(spec);
        }
        let task = tokio::spawn(state.run(volume_events, commanded, stopped));
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

impl Loop {
    async fn run(
        mut self,
        mut volume_events: mpsc::Receiver<(usize, VolumeEvent)>,
        mut commands: mpsc::Receiver<Command>,
        mut stop: oneshot::Receiver<()>,
    ) -> JoinSet<()> {
        loop {
            tokio::select! {
                Some((volume, event)) = volume_events.recv() => self.on_volume_event(volume, event).await,
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

    async fn on_volume_event(&mut self, volume: usize, event: VolumeEvent) {
        match event {
            VolumeEvent::Plugin { name, path, staged } => {
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
                    for scan in self.scans.iter_mut().filter(|scan| scan.volume == volume) {
                        scan.found.push(model.name.clone());
                    }
                    if self.waits_for_mirror(&model) {
                        let (model, path, staged) = (model.name.clone(), path.clone(), staged.clone());
                        self.held.push(HeldFile { model, path, staged });
                    } else {
                        self.tell(&model.name, Event::File(path.clone(), staged.clone())).await;
                    }
                }
            }
            VolumeEvent::Gone { name, path } => self.on_gone(name, path).await,
            VolumeEvent::Data { changed } if self.scans.iter().any(|scan| scan.volume == volume) => {
                // Whoever requested the scan gets it with everybody else, in one call.
                for scan in self.scans.iter_mut().filter(|scan| scan.volume == volume) {
                    scan.changed.extend(changed.iter().cloned());
                }
            }
            VolumeEvent::Data { changed } => self.tell_changed(volume, changed).await,
            VolumeEvent::ScanDone { quiet, requested } => {
                self.unscanned[volume] &= !quiet;
                if quiet && !self.held.is_empty() {
                    self.release_held().await;
                }
                if !self.unscanned.contains(&true) {
                    self.complete_when_taken();
                }
                self.conclude_scans(volume, requested).await;
            }
        }
    }

    /// Whether a model uses a volume whose bucket has not been mirrored yet.
    fn waits_for_mirror(&self, model: &Model) -> bool {
        let spec = model.spec();
        let unmirrored = self.volumes.iter().zip(&self.unscanned);
        unmirrored
            .filter(|(volume, unscanned)| volume.bucket.is_some() && **unscanned)
            .any(|(volume, _)| usage::uses(&spec, volume))
    }

    /// Passes on the files of models that don't wait any more, in the order in which they were found.
    async fn release_held(&mut self) {
        for held in std::mem::take(&mut self.held) {
            let model = self.models.all().get(&held.model).cloned();
            match model {
                Some(model) if self.waits_for_mirror(&model) => self.held.push(held),
                Some(model) => self.tell(&model.name, Event::File(held.path, held.staged)).await,
                // It was unloaded.
                None => {}
            }
        }
    }

    /// Marks the models as complete when each machine has taken the files that it was told of: nobody takes the host for ready before.
    fn complete_when_taken(&mut self) {
        if std::mem::replace(&mut self.completes, true) {
            return;
        }
        let machines: Vec<_> = self.machines.values().map(|machine| machine.events.clone()).collect();
        let models = Arc::clone(&self.models);
        tokio::spawn(async move {
            for machine in machines {
                let (reply, taken) = oneshot::channel();
                // One that has ended takes nothing any more.
                let _ = machine.send(Event::Taken(reply)).await;
                let _ = taken.await;
            }
            models.set_complete();
        });
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
                    Some(volume) => self.reload_volume(volume, reply),
                    None => {
                        let known = self.volumes.iter().map(|volume| volume.name.clone()).collect();
                        let _ = reply.send(Err(ControlError::Unknown { name, known }));
                    }
                }
            }
            Command::Mirrored(ticket, report) => self.on_mirrored(ticket, report).await,
            Command::Unload(name, reply) => self.unload(&name, reply).await,
            Command::Plugins(reply) => {
                let opened = |(name, files): (&String, &Vec<PluginFile>)| {
                    let (_, staged) = files.first()?;
                    Some((name.clone(), self.builder.engine.opened(staged.as_ref().ok()?.sha256())?))
                };
                // Whoever asked may have left.
                let _ = reply.send(self.files.iter().filter_map(opened).collect());
            }
            Command::LogLevels => self.tell_log_levels(),
            Command::Configure(models, defaults, reply) => {
                let changes = self.configure(models, *defaults).await;
                // Whoever asked may have left.
                let _ = reply.send(changes);
            }
        }
    }

    async fn tell_changed(&self, volume: usize, changed: Vec<String>) {
        let change = self.change(volume, changed);
        for model in self.readers_of(volume) {
            if let Some(change) = self.change_for(&change, &model) {
                self.tell(&model.name, Event::Data(change)).await;
            }
        }
    }

    async fn on_tell(&mut self, model: &str, event: Event) -> Result<(), ControlError> {
        let Some(event) = self.take_again(model, event).await else { return Ok(()) };
        match self.machines.get(model) {
            None => {
                let known = self.models.all().keys().cloned().collect();
                Err(ControlError::Unknown { name: model.to_owned(), known })
            }
            Some(machine) => machine.events.send(event).await.map_err(|_| ControlError::Stopping),
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

    /// What of a change concerns a model: what lies in the folder of another pipeline is that one's alone. `None` where nothing is left.
    fn change_for(&self, change: &VolumeChange, model: &Model) -> Option<VolumeChange> {
        let plugin = model.spec().plugin.clone();
        let mount = Path::new(&change.mount_point);
        let of_another = |path: &String| {
            let Some(first) = Path::new(path).components().next() else { return false };
            let folder = mount.join(first);
            let is_of = |files: &[PluginFile]| files.iter().any(|(path, _)| *path == folder);
            let owner = self.files.iter().find(|(_, files)| is_of(files));
            owner.is_some_and(|(name, _)| *name != plugin) && folder.is_dir()
        };
        let changed: Vec<String> = change.changed.iter().filter(|path| !of_another(path)).cloned().collect();
        if changed.is_empty() && !change.changed.is_empty() {
            return None;
        }
        Some(VolumeChange { changed, ..change.clone() })
    }

    /// The model of this name; where there is none, a new one with a machine of its own.
    fn add(&mut self, spec: ModelSpec) -> Arc<Model> {
        if let Some(model) = self.models.all().get(&spec.name) {
            return Arc::clone(model);
        }
        let name = spec.name.clone();
        if self.removal.is_leaving(&name) {
            // The series of the one that leaves are not continued: what it still counts would be counted as this one's.
            self.metrics.forget(&name);
        }
        let used = self.volumes.iter().filter(|volume| usage::uses(&spec, volume)).cloned().collect();
        let (model, status) = Model::new(spec, &self.metrics, Arc::clone(&self.devices));
        self.models.add(Arc::clone(&model));
        let (events, inbox) = mpsc::channel(INBOX_MAX);
        let machine = Machine::new(
            (Arc::clone(&model), status),
            Arc::clone(&self.builder),
            self.metrics.reloads(&name),
            Arc::clone(&self.watches),
            used,
            (events.downgrade(), inbox),
        );
        let task = self.running.spawn(machine.run()).id();
        self.machines.insert(name, Running { events, task });
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
