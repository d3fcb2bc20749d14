//! Replicas on their way down: those without work, those whose batch overran its time, and those whose device is lost.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Instant,
};

use modalkit_engine::{Death, EndedBy};

use super::{Loop, examine};
use crate::pipeline::{
    Status,
    replica::{Overrun, Replica},
};

/// Deaths without a good batch between them that make a model failed.
const DEATHS_MAX: u32 = 3;
/// The same of processes that somebody else ended: more than one input is given for that.
const KILLS_MAX: u32 = 16;

impl Loop {
    pub(super) fn retire_one(&mut self) {
        // The newest: the first one validates inputs.
        if let Some(replica) = self.replicas.pop() {
            tracing::info!(
                model = self.model.name,
                replica = replica.number,
                "replica retired: there was no work"
            );
            self.validate_with_first();
            replica.stop();
            self.leaving.push(replica);
            self.on_replicas_changed();
        }
    }

    pub(super) fn retire_all(&mut self) {
        let mut leaving = std::mem::take(&mut self.replicas);
        leaving.append(&mut self.spares);
        self.validate_with_first();
        leaving.iter().for_each(|replica| replica.stop());
        self.leaving.extend(leaving);
        self.on_replicas_changed();
    }

    pub(super) fn give_up_overrun(&mut self) {
        let now = Instant::now();
        let spec = self.model.spec();
        let limit = spec.replicas.batch_timeout;
        self.context.set_stream_wait(spec.replicas.stream_wait);
        let mut overrun = 0;
        let mut given_up = Vec::new();
        for replicas in [&mut self.replicas, &mut self.leaving] {
            replicas.retain(|replica| match replica.give_up_overrun(now, limit) {
                Overrun::Hang(0) => true,
                Overrun::Hang(lanes) => {
                    overrun += lanes;
                    given_up.push(Arc::clone(replica));
                    false
                }
                Overrun::Killed => {
                    tracing::error!(
                        model = self.model.name,
                        replica = replica.number,
                        ?limit,
                        "a batch overran batch_timeout_seconds; its worker process was ended"
                    );
                    self.model.metrics.timed_out.inc();
                    true
                }
            });
        }
        let still = self.given_up.iter().map(|replica| match replica.give_up_overrun(now, limit) {
            Overrun::Hang(lanes) => lanes,
            Overrun::Killed => 0,
        });
        overrun += still.sum::<usize>();
        self.given_up.retain(|replica| replica.is_running());
        if overrun == 0 {
            return;
        }
        self.validate_with_first();
        for replica in given_up {
            tracing::error!(
                model = self.model.name,
                replica = replica.number,
                ?limit,
                "a batch overran batch_timeout_seconds; its replica is given up and replaced"
            );
            self.model.metrics.replicas_given_up.inc();
            replica.stop();
            examine(replica.lease().map(Arc::clone));
            self.given_up.push(replica);
        }
        self.stuck += overrun;
        self.model.metrics.replicas_stuck.add(overrun as i64);
        self.model.metrics.timed_out.inc_by(overrun as u64);
        (0..overrun).for_each(|_| self.context.count(limit, false));
        self.on_replicas_changed();
        self.say_if_stuck();
    }

    /// Replicas whose process has died make room for others. Deaths with no good batch between them are answered ever later, and make the
    /// model failed.
    pub(super) fn replace_dead(&mut self) {
        let (dead, well): (Vec<_>, Vec<_>) =
            self.replicas.drain(..).partition(|replica| replica.death().is_some());
        self.replicas = well;
        let (dead_spares, well): (Vec<_>, Vec<_>) =
            self.spares.drain(..).partition(|replica| replica.death().is_some());
        self.spares = well;
        let wanted = dead.len();
        let dead: Vec<Arc<Replica>> = dead.into_iter().chain(dead_spares).collect();
        if dead.is_empty() {
            return;
        }
        let good = self.context.good_batches();
        if good != std::mem::replace(&mut self.good_before, good) {
            (self.deaths, self.kills) = (0, 0);
        }
        let deaths: Vec<Death> = dead.iter().filter_map(|replica| replica.death()).collect();
        // What the host ended, for a batch that overran, says nothing of the model's health; what somebody else ended, little.
        self.deaths += u32::from(deaths.iter().any(|death| death.by == EndedBy::Itself));
        self.kills += u32::from(deaths.iter().any(|death| death.by == EndedBy::Others));
        // A death that an input was found to bring about says nothing of the model.
        let convictions = self.context.convictions.swap(0, Ordering::Relaxed);
        self.deaths = self.deaths.saturating_sub(convictions);
        if convictions > 0 {
            self.kills = 0;
        }
        let how = deaths.into_iter().next().map_or_else(String::new, |death| death.how);
        self.model.metrics.worker_deaths.inc_by(dead.len() as u64);
        self.validate_with_first();
        dead.iter().for_each(|replica| replica.stop());
        self.leaving.extend(dead);
        let pause = self.pause_after_death((self.deaths + self.kills).max(1));
        let (model, generation) = (&self.model.name, self.context.generation.number);
        tracing::error!(model, generation, how, deaths = self.deaths, retry_in = ?pause, "a worker process has died");
        self.on_replicas_changed();
        // Loaded already: nothing is waited for.
        for _ in 0..wanted {
            self.take_spare();
        }
        if (self.deaths >= DEATHS_MAX || self.kills >= KILLS_MAX) && self.replicas.is_empty() {
            let reason = format!(
                "its worker processes died {} times with no good batch between them, at last so: {how}; another one is tried now and then",
                self.deaths + self.kills
            );
            self.set_condition(Status::Failed { reason });
        }
    }

    /// Replaces one replica whose process has run for long enough or grown too large: the fresh one is loaded first, where there is a device
    /// for it.
    pub(super) fn recycle(&mut self) {
        let spec = self.model.spec();
        if let Some((_, fresh)) = self.recycling
            && !self.loading.iter().any(|loading| loading.replica == fresh)
        {
            // It did not load. The old one goes on, and its turn comes again.
            self.recycling = None;
        }
        let is_isolated = self.context.generation.plugin.is_isolated();
        if !is_isolated || self.recycling.is_some() || !self.loading.is_empty() {
            return;
        }
        let has_had_enough = |replica: &&Arc<Replica>| {
            let (batches, grown) = (replica.batches(), spec.recycle.after_bytes);
            spec.recycle.after_batches.is_some_and(|most| batches >= most)
                // What is too large from the start is so again.
                || batches > 0 && grown.is_some_and(|most| replica.resident_bytes().unwrap_or(0) > most)
        };
        let Some(old) = self.replicas.iter().find(has_had_enough).map(Arc::clone) else { return };
        if self.spares.is_empty() && self.starved_at.is_none() && !self.may_retry(Instant::now()) {
            return;
        }
        tracing::info!(
            model = self.model.name,
            replica = old.number,
            batches = old.batches(),
            resident_bytes = old.resident_bytes(),
            "a worker process is replaced by a fresh one (recycle_after_batches, recycle_after_mb)"
        );
        if self.take_spare() {
            return self.retire_recycled(&old);
        }
        self.start_replica();
        match self.loading.last() {
            Some(fresh) => self.recycling = Some((old, fresh.replica)),
            // No device is free beside it.
            None if self.starved_at.is_some() => self.retire_recycled(&old),
            None => {}
        }
    }

    /// The old one leaves, once it has ended what it runs.
    pub(super) fn retire_recycled(&mut self, old: &Arc<Replica>) {
        self.model.metrics.workers_recycled.inc();
        self.replicas.retain(|replica| !Arc::ptr_eq(replica, old));
        self.validate_with_first();
        old.stop();
        self.leaving.push(Arc::clone(old));
        self.on_replicas_changed();
    }

    /// Replicas whose device is lost run nothing any more.
    pub(super) fn give_up_lost(&mut self) {
        if !self.replicas.iter().any(|replica| replica.is_lost()) {
            return;
        }
        let (lost, well): (Vec<_>, Vec<_>) = self.replicas.drain(..).partition(|replica| replica.is_lost());
        self.replicas = well;
        self.validate_with_first();
        self.leaving.extend(lost);
        self.on_replicas_changed();
        if self.replicas.is_empty() {
            self.set_condition(Status::lost_device());
        }
    }

    /// Sets the condition to stuck where too many threads hang to start a replica. Checked at each tick: a generation that takes over may be stuck
    /// already.
    pub(super) fn say_if_stuck(&self) {
        let bound = self.model.spec().replicas.stuck_max;
        let hangs = self.stuck > bound && self.replicas.is_empty() && self.loading.is_empty();
        if !hangs || *self.condition.borrow() != Status::Ready {
            return;
        }
        let reason = format!(
            "{} threads hang in batches, loads or hooks that overran their time, more than stuck_replicas_max ({bound}); no replica is started until some come back: find out why the pipeline hangs, or restart the host",
            self.stuck
        );
        tracing::error!(model = self.model.name, reason, "the model is stuck");
        self.set_condition(Status::Stuck { reason });
    }

    pub(super) fn thread_returned(&mut self) {
        self.stuck = self.stuck.saturating_sub(1);
        self.on_replicas_changed();
        tracing::warn!(model = self.model.name, "a thread that had overrun its time has returned");
    }
}
