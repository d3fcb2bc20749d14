//! Replicas on their way up: their devices, their threads, and what follows where a load fails or takes too long.

use std::{
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use modalkit_device::{Holder, Lease, NoLease};
use modalkit_engine::{Failure, FailureKind};

use super::{Loading, Loop, Progress};
use crate::{
    backoff::backoff,
    pipeline::{
        Status,
        command::{VolumeChange, failure},
        replica::Replica,
    },
};

/// The wait after a failed load, and the longest after several; see [`backoff`].
const RETRY_FIRST: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(60);
/// The same after a worker process has died.
const RESTART_FIRST: Duration = Duration::from_millis(100);
const RESTART_MAX: Duration = Duration::from_secs(30);
/// What ending a process may take.
const END_TIME_MAX: Duration = Duration::from_secs(10);

/// When a failed load is tried again.
#[derive(Default)]
pub(super) struct Retry {
    not_before: Option<Instant>,
    /// Loads that failed in a row.
    failures: u32,
    /// The pipeline has said that another try would end alike.
    is_final: bool,
}

impl Retry {
    /// A load went well: the next one that fails is tried again soon.
    pub(super) fn succeeded(&mut self) {
        self.failures = 0;
        self.is_final = false;
    }

    /// Its data have changed: the next try may end otherwise.
    pub(super) fn lift(&mut self) {
        if std::mem::take(&mut self.is_final) {
            (self.failures, self.not_before) = (0, None);
        }
    }
}

impl Loop {
    pub(super) fn may_retry(&self, now: Instant) -> bool {
        // Each thread that hangs keeps its memory: beyond this many, another try only spreads the damage.
        self.stuck <= self.model.spec().replicas.stuck_max
            && !self.retry.is_final
            && self.starved_at.is_none_or(|freed| freed != self.model.devices.freed())
            && self.retry.not_before.is_none_or(|moment| moment <= now)
    }

    /// One more replica: a spare one at once, where there is one, else one that is loaded.
    pub(super) fn add_replica(&mut self, now: Instant) {
        if !self.take_spare() && self.may_retry(now) {
            self.start_replica();
        }
    }

    /// Has a spare replica serve; `false` where there is none.
    pub(super) fn take_spare(&mut self) -> bool {
        let Some(replica) = self.spares.pop() else { return false };
        self.short_since = None;
        replica.take_over();
        let (model, generation) = (&self.model.name, self.context.generation.number);
        tracing::info!(model, generation, replica = replica.number, "a spare replica serves");
        self.replicas.push(replica);
        self.on_replicas_changed();
        self.set_condition(Status::Ready);
        true
    }

    /// Keeps as many spare replicas as are wanted, of a plugin whose instances have processes of their own.
    pub(super) fn keep_spares(&mut self, now: Instant) {
        let spec = self.model.spec();
        let wanted = if self.context.generation.plugin.is_isolated() { spec.replicas.spare } else { 0 };
        while self.spares.len() > wanted {
            let spare = self.spares.pop();
            spare.iter().for_each(|spare| spare.stop());
            self.leaving.extend(spare);
            self.model.queue.update_lane_states(|| {});
        }
        // What serves comes first.
        let is_complete = self.loading.is_empty() && self.replicas.len() >= spec.replicas.min;
        if self.spares.len() < wanted && is_complete && self.may_retry(now) {
            self.start(true);
        }
    }

    pub(super) fn start_replica(&mut self) {
        self.short_since = None;
        self.start(false);
    }

    fn start(&mut self, is_spare: bool) {
        let freed = self.model.devices.freed();
        let lease = match self.lease(self.started_ever + 1) {
            Ok(lease) => lease,
            // Waiting would change nothing.
            Err(refusal @ (NoLease::NotHere { .. } | NoLease::NotBeside { .. })) => {
                self.on_load_failed(&failure(refusal.to_string()));
                return;
            }
            Err(refusal) => {
                self.on_starved(&refusal, freed);
                return;
            }
        };
        if self.starved_at.take().is_some() {
            self.progress.send_if_modified(|progress| {
                let waited = matches!(progress, Progress::Waits(_));
                if waited {
                    *progress = Progress::Loading;
                }
                waited
            });
        }
        self.started_ever += 1;
        match Replica::start(self.started_ever, Arc::clone(&self.context), lease, is_spare) {
            Ok(()) => self.loading.push(Loading {
                replica: self.started_ever,
                is_spare,
                since: Instant::now(),
                missed: Vec::new(),
            }),
            Err(error) => {
                self.pause_retries();
                tracing::error!(model = self.model.name, %error, "can't start a replica's thread");
            }
        }
    }

    /// The devices of one more replica: free ones, or else those of a replica of the generation before. `None` where the model asks for
    /// none.
    fn lease(&mut self, replica: u64) -> Result<Option<Arc<Lease>>, NoLease> {
        let generation = &self.context.generation;
        let Some(wanted) = &generation.spec.gpu else { return Ok(None) };
        let holder = Holder { model: self.model.name.clone(), generation: generation.number, replica };
        let refusal = match self.model.devices.lease(wanted, holder.clone()) {
            Ok(lease) => return Ok(Some(Arc::new(lease))),
            Err(refusal) => refusal,
        };
        let shared = |lease: &Weak<Lease>| lease.upgrade()?.share(wanted, holder.clone());
        let found = self.inherited.iter().enumerate().find_map(|(at, lease)| Some((at, shared(lease)?)));
        let Some((at, lease)) = found else {
            let beside = !self.inherited.is_empty()
                && self.model.devices.has_room_without(&self.inherited, wanted, &self.model.name);
            return Err(if beside { NoLease::NotBeside { wanted: wanted.to_string() } } else { refusal });
        };
        // Two of its replicas don't share what one of the generation before had.
        self.inherited.remove(at);
        tracing::info!(
            model = self.model.name,
            generation = generation.number,
            replica,
            "no device is free: the replica shares one with the generation before"
        );
        Ok(Some(Arc::new(lease)))
    }

    fn on_starved(&mut self, refusal: &NoLease, freed: u64) {
        let reason = refusal.to_string();
        // Said once, and tried again whenever a lease has ended.
        if self.starved_at.replace(freed).is_none() {
            let (model, generation) = (&self.model.name, self.context.generation.number);
            tracing::warn!(model, generation, reason, "a replica waits for a device");
        }
        self.progress.send_if_modified(|progress| {
            let waits = Progress::Waits(reason.clone());
            let changes = *progress != Progress::Loaded && *progress != waits;
            if changes {
                *progress = waits;
            }
            changes
        });
        self.say_if_starved(reason);
    }

    /// The model has failed where it has no replica, nor any that leaves and may be what it waits for.
    pub(super) fn say_if_starved(&self, reason: String) {
        if self.replicas.is_empty() && self.leaving.is_empty() {
            self.set_condition(Status::Failed { reason });
        }
    }

    /// The pipeline said why it doesn't load. In a process of its own that is believed, where it says that the same would happen again, and
    /// this version has never loaded.
    pub(super) fn on_load_refused(&mut self, failure: &Failure) {
        let is_isolated = self.context.generation.plugin.is_isolated();
        if !is_isolated || failure.kind != FailureKind::Permanent || self.context.generation.has_loaded() {
            return self.on_load_failed(failure);
        }
        self.retry.is_final = true;
        let (model, generation) = (&self.model.name, self.context.generation.number);
        tracing::error!(
            model,
            generation,
            error = failure.message,
            "the pipeline didn't load, and isn't tried again as it is"
        );
        let reason = format!(
            "the pipeline didn't load: {}; it is tried again when its data or its plugin change, or by `modalkit reload {model}`",
            failure.message
        );
        self.say_not_loaded(reason);
    }

    pub(super) fn on_load_failed(&mut self, failure: &Failure) {
        let pause = self.pause_retries();
        let reason = &failure.message;
        tracing::error!(
            model = self.model.name,
            generation = self.context.generation.number,
            error = reason,
            retry_in = ?pause,
            "the pipeline didn't load"
        );
        self.say_not_loaded(format!("the pipeline didn't load: {reason}"));
    }

    fn say_not_loaded(&self, reason: String) {
        self.progress.send_if_modified(|progress| {
            let loading = *progress != Progress::Loaded;
            if loading {
                *progress = Progress::Failed(reason.clone());
            }
            loading
        });
        if self.replicas.is_empty() {
            self.set_condition(Status::Failed { reason });
        }
    }

    pub(super) fn give_up_loading(&mut self) {
        let mut limit = self.model.spec().replicas.load_timeout;
        if self.context.generation.plugin.is_isolated() {
            // Its engine ends the process at the limit, and says so.
            limit += END_TIME_MAX;
        }
        let overdue = self.loading.iter().filter(|loading| loading.since.elapsed() >= limit).count();
        self.loading.retain(|loading| loading.since.elapsed() < limit);
        for _ in 0..overdue {
            self.stuck += 1;
            self.model.metrics.replicas_stuck.inc();
            self.on_load_failed(&failure(format!(
                "`load` and `warmup` did not return within {limit:?} (load_timeout_seconds); their thread is left behind"
            )));
        }
        if overdue > 0 {
            self.on_replicas_changed();
        }
    }

    pub(super) fn pause_after_death(&mut self, deaths: u32) -> Duration {
        let pause = backoff(deaths, RESTART_FIRST, RESTART_MAX);
        let moment = Instant::now() + pause;
        self.retry.not_before = Some(self.retry.not_before.map_or(moment, |known| known.max(moment)));
        pause
    }

    fn pause_retries(&mut self) -> Duration {
        let failures = self.retry.failures.saturating_add(1);
        let pause = backoff(failures, RETRY_FIRST, RETRY_MAX);
        (self.retry.not_before, self.retry.failures) = (Some(Instant::now() + pause), failures);
        pause
    }

    /// What a replica missed while it loaded; `None` where it was no longer waited for.
    pub(super) fn has_loaded(&mut self, replica: u64) -> Option<Vec<VolumeChange>> {
        let at = self.loading.iter().position(|loading| loading.replica == replica)?;
        Some(self.loading.remove(at).missed)
    }

    /// A load that was given up has ended.
    pub(super) fn load_came_back(&mut self) {
        self.stuck = self.stuck.saturating_sub(1);
        self.model.metrics.replicas_stuck.dec();
    }
}
