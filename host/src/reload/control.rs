//! What people ask of reloads, on its way to the loop: a report, a reload, a rollback, a scan, an unload, another configuration. It carries
//! nothing out.

use std::{collections::BTreeMap, sync::Arc};

use modalkit_engine::Plugin;
use serde::Serialize;
use tokio::sync::{mpsc, oneshot};

use super::{
    configure::ModelChanges,
    history::{HookReport, ReloadRecord},
    machine::{Event, Order, What},
    removal::Unloaded,
    report::Report,
};
use crate::config::ModelSpec;

/// Takes what people ask for to the loop.
#[derive(Clone)]
pub struct Control(pub(super) mpsc::Sender<Command>);

/// Why nothing was done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ControlError {
    /// No model or volume has this name; there are these.
    Unknown {
        /// What was asked for.
        name: String,
        /// What there is.
        known: Vec<String>,
    },
    /// The model has an entry in the configuration, which says that it is served.
    Configured(String),
    /// The volume's bucket can't be mirrored now; what was mirrored is as it was.
    Bucket {
        /// The volume.
        volume: String,
        /// Why.
        why: String,
    },
    /// The host, or the model, is going away.
    Stopping,
}

/// What a scan of a volume led to.
#[derive(Debug, Serialize)]
pub struct VolumeReport {
    /// Its name.
    pub volume: String,
    /// What was mirrored for it, where it has a bucket.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mirrored: Option<MirrorReport>,
    /// The models whose plugin lies there, or that use its data.
    pub models: BTreeMap<String, VolumeModel>,
}

/// What was mirrored before a scan.
#[derive(Clone, Debug, Serialize)]
pub struct MirrorReport {
    /// The snapshot that is shown now.
    pub snapshot: u64,
    /// Objects that were fetched for it.
    pub fetched: usize,
    /// Objects that it has no more.
    pub removed: usize,
}

/// What it led to for one model.
#[derive(Debug, Default, Serialize)]
pub struct VolumeModel {
    /// The change of its plugin; `None` where the content is what serves.
    pub reload: Option<ReloadRecord>,
    /// The call of `on_volume_reload`; `None` where the model doesn't use the volume's data.
    pub hook: Option<HookReport>,
}

pub(super) type Reply<T> = oneshot::Sender<Result<T, ControlError>>;

pub(super) enum Command {
    /// Send an event to a model's machine.
    Tell(String, Event, Reply<()>),
    /// Scan a volume, and tell every model that uses it.
    Volume(String, Reply<VolumeReport>),
    /// The bucket of the volume of this requested scan was mirrored, or can't be now.
    Mirrored(u64, Result<MirrorReport, String>),
    /// Unload a model.
    Unload(String, Reply<Unloaded>),
    /// Report the open plugins.
    Plugins(oneshot::Sender<BTreeMap<String, Arc<dyn Plugin>>>),
    /// Have plugins hear that other lines of theirs are wanted.
    LogLevels,
    /// Serve these models; those without an entry like this.
    Configure(BTreeMap<String, ModelSpec>, Box<ModelSpec>, oneshot::Sender<ModelChanges>),
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
    pub async fn reload(&self, model: &str) -> Result<ReloadRecord, ControlError> {
        self.ask(model, |reply| Event::Order(Order { what: What::Reload, reply })).await
    }

    /// Goes back to the generation before; waits for the outcome.
    ///
    /// # Errors
    /// No such model, or it is going away.
    pub async fn roll_back(&self, model: &str) -> Result<ReloadRecord, ControlError> {
        self.ask(model, |reply| Event::Order(Order { what: What::RollBack, reply })).await
    }

    /// Scans a volume, takes what changed, and calls `on_volume_reload` on every model that uses it; waits for all
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
    pub async fn plugins(&self) -> Result<BTreeMap<String, Arc<dyn Plugin>>, ControlError> {
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

    /// Has plugins hear that other lines of theirs are wanted than before.
    pub async fn log_levels_changed(&self) {
        // A host that goes away wants none.
        let _ = self.send(Command::LogLevels).await;
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
