//! Replicas on their way down: those without work, those whose batch overran its time, and those whose device is lost.

use std::{sync::Arc, time::Instant};

use super::{Loop, examine};
use crate::pipeline::Status;

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
        let leaving = std::mem::take(&mut self.replicas);
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
                0 => true,
                lanes => {
                    overrun += lanes;
                    given_up.push(Arc::clone(replica));
                    false
                }
            });
        }
        overrun += self.given_up.iter().map(|replica| replica.give_up_overrun(now, limit)).sum::<usize>();
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
