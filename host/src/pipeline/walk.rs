//! A walk through replicas with a change of their data, one after the other: the hook of each, on a thread of its own and within its
//! time. It never knows why the data changed, nor how many replicas there should be.

use std::{sync::Arc, thread, time::Duration};

use modalkit_engine::{EndedBy, Failure};
use tokio::sync::{mpsc, oneshot};

use super::{
    Model, VolumeChange,
    command::{FleetCommand, failure},
    lost_device::judge,
    replica::Replica,
};

/// A walk through a generation's replicas with a change of their data: each is paused while its hook
/// runs, and the others go on taking batches.
pub(super) struct Walk {
    pub(super) model: Arc<Model>,
    pub(super) commands: mpsc::WeakSender<FleetCommand>,
    /// For each hook.
    pub(super) limit: Duration,
}

impl Walk {
    pub(super) async fn through(
        self,
        replicas: Vec<Arc<Replica>>,
        change: VolumeChange,
        reply: oneshot::Sender<Vec<Result<(), Failure>>>,
    ) {
        let change = Arc::new(change);
        let mut results = Vec::with_capacity(replicas.len());
        for replica in replicas {
            self.model.queue.update_lane_states(|| replica.set_paused(true));
            results.push(self.hook(&replica, &change).await);
            self.model.queue.update_lane_states(|| replica.set_paused(false));
        }
        // Whoever asked may have left.
        let _ = reply.send(results);
    }

    async fn hook(&self, replica: &Arc<Replica>, change: &Arc<VolumeChange>) -> Result<(), Failure> {
        // One that has left meanwhile has nothing to change.
        let Some(instance) = replica.instance() else { return Ok(()) };
        let (done, mut result) = oneshot::channel();
        let (change, commands, lease) =
            (Arc::clone(change), self.commands.clone(), replica.lease().map(Arc::clone));
        let stuck = self.model.metrics.replicas_stuck.clone();
        let lease = lease.filter(|_| instance.process().is_none());
        let run = move || {
            let mut result = instance.volume_reload(&change.volume, &change.mount_point, &change.changed);
            drop(instance);
            if let Err(failure) = &mut result {
                judge(lease.as_deref(), failure);
            }
            // The receiver is gone when the limit has passed, and the fleet perhaps too.
            if done.send(result).is_err() {
                stuck.dec();
                if let Some(commands) = commands.upgrade() {
                    let _ = commands.blocking_send(FleetCommand::ThreadReturned);
                }
            }
        };
        if let Err(error) = thread::Builder::new().name("volume hook".into()).spawn(run) {
            return Err(failure(format!("can't start a thread for on_volume_reload: {error}")));
        }
        let ended = match tokio::time::timeout(self.limit, &mut result).await {
            Ok(ended) => ended.ok(),
            Err(_) => {
                // The hook sees from here on that nobody waits. What it said until now counts.
                result.close();
                match result.try_recv() {
                    Ok(result) => Some(result),
                    Err(_) => return self.give_up(replica).await,
                }
            }
        };
        ended.unwrap_or_else(|| Err(failure("on_volume_reload ended without a result".into())))
    }

    /// At once, so that none of its lanes takes a batch which would wait for the hook. A fleet that has ended has given it up already.
    async fn give_up(&self, replica: &Arc<Replica>) -> Result<(), Failure> {
        self.model.metrics.replicas_stuck.inc();
        replica.stop();
        // The hook comes back with that, where it runs in a process of its own.
        replica.kill(
            &format!("on_volume_reload did not return within {:?} (load_timeout_seconds)", self.limit),
            EndedBy::Host,
        );
        if let Some(commands) = self.commands.upgrade() {
            let _ = commands.send(FleetCommand::GiveUp(Arc::clone(replica))).await;
        }
        Err(failure(format!(
            "on_volume_reload did not return within {:?} (load_timeout_seconds); its replica is replaced",
            self.limit
        )))
    }
}
