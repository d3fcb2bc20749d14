//! Scans that somebody asked for and waits for: of a mirrored volume when its bucket was listed, and until the models that a change concerns have
//! taken it. It never looks into a folder.

use std::collections::BTreeMap;

use modalkit_bucket::Synced;
use tokio::sync::oneshot;

use super::{
    Loop,
    control::{Command, ControlError, MirrorReport, Reply, VolumeModel, VolumeReport},
    machine::Event,
};

/// A scan of a volume that somebody waits for.
pub(super) struct RequestedScan {
    pub(super) volume: usize,
    /// Tells it from others.
    pub(super) ticket: u64,
    /// Its number, from the watch; `None` while the volume's bucket is being mirrored for it. What is found meanwhile is told
    /// with it, and not twice.
    pub(super) number: Option<u64>,
    /// The models whose plugin it found changed.
    pub(super) found: Vec<String>,
    /// The data that it found changed.
    pub(super) changed: Vec<String>,
    /// What was mirrored before.
    pub(super) mirrored: Option<MirrorReport>,
    pub(super) reply: Reply<VolumeReport>,
}

impl Loop {
    /// Scans a volume; where it has a bucket, when that was listed and what it holds is shown.
    pub(super) fn reload_volume(&mut self, volume: usize, reply: Reply<VolumeReport>) {
        self.tickets += 1;
        let ticket = self.tickets;
        let (found, changed) = (Vec::new(), Vec::new());
        let mut scan = RequestedScan { volume, ticket, number: None, found, changed, mirrored: None, reply };
        match (self.syncs[volume].clone(), self.commands.upgrade()) {
            (Some(sync), Some(commands)) => {
                tokio::spawn(async move {
                    let synced = sync.sync().await;
                    let report = synced.map(|Synced { snapshot, fetched, removed }| MirrorReport {
                        snapshot,
                        fetched,
                        removed,
                    });
                    // A loop that has ended has dropped the reply: whoever waits for it gets `Stopping`.
                    let _ = commands.send(Command::Mirrored(ticket, report)).await;
                });
            }
            _ => scan.number = Some(self.watches[volume].request_scan()),
        }
        self.scans.push(scan);
    }

    /// The bucket of a volume that somebody wants scanned was mirrored, or can't be.
    pub(super) async fn on_mirrored(&mut self, ticket: u64, report: Result<MirrorReport, String>) {
        let Some(at) = self.scans.iter().position(|scan| scan.ticket == ticket) else { return };
        match report {
            Ok(report) => {
                let scan = &mut self.scans[at];
                scan.mirrored = Some(report);
                scan.number = Some(self.watches[scan.volume].request_scan());
            }
            Err(why) => {
                let RequestedScan { volume, changed, reply, .. } = self.scans.remove(at);
                let name = self.volumes[volume].name.clone();
                // Whoever asked may have left.
                let _ = reply.send(Err(ControlError::Bucket { volume: name, why }));
                // What was found for it meanwhile.
                if !changed.is_empty() && !self.scans.iter().any(|scan| scan.volume == volume) {
                    self.tell_changed(volume, changed).await;
                }
            }
        }
    }

    /// A scan is over: whoever requested it waits now for the models that it concerns.
    pub(super) async fn conclude_scans(&mut self, volume: usize, requested: u64) {
        let is_over = |scan: &mut RequestedScan| {
            scan.volume == volume && scan.number.is_some_and(|number| number <= requested)
        };
        for RequestedScan { found, changed, mirrored, reply, .. } in
            self.scans.extract_if(.., is_over).collect::<Vec<_>>()
        {
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
                let _ = reply.send(Ok(VolumeReport { volume: name, mirrored, models }));
            });
        }
    }
}
