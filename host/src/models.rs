//! The served models by name. It never knows how a batch is run or where a job came from.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use arc_swap::ArcSwap;

use crate::{
    pipeline::{Model, Status},
    work::JobError,
};

/// The served models by name. Readers never wait: a change puts a new map in place.
#[derive(Default)]
pub struct Models {
    by_name: ArcSwap<BTreeMap<String, Arc<Model>>>,
    complete: AtomicBool,
    /// Each has served or failed since the start.
    settled: AtomicBool,
    draining: AtomicBool,
}

impl Models {
    /// The model of this name, or the only one where none is named.
    ///
    /// # Errors
    /// [`JobError::UnknownModel`].
    pub fn find(&self, name: Option<&str>) -> Result<Arc<Model>, JobError> {
        let models = self.by_name.load();
        let found = match name {
            Some(name) => models.get(name),
            None if models.len() == 1 => models.values().next(),
            None => None,
        };
        found.cloned().ok_or_else(|| JobError::UnknownModel {
            name: name.map(ToOwned::to_owned),
            known: models.keys().cloned().collect(),
        })
    }

    /// All of them.
    #[must_use]
    pub fn all(&self) -> Arc<BTreeMap<String, Arc<Model>>> {
        self.by_name.load_full()
    }

    /// Whether every file that lay in the volumes at the start has become a model or been refused.
    #[must_use]
    pub fn are_complete(&self) -> bool {
        self.complete.load(Ordering::Acquire)
    }

    /// Marks the first scans of all volumes as done.
    pub fn set_complete(&self) {
        self.complete.store(true, Ordering::Release);
    }

    /// Whether all of them have served or failed at the same time since the start; what is dropped in later changes nothing about that.
    #[must_use]
    pub fn have_settled(&self) -> bool {
        if self.settled.load(Ordering::Acquire) {
            return true;
        }
        let settled =
            self.are_complete() && self.all().values().all(|model| *model.status() != Status::Loading);
        if settled {
            self.settled.store(true, Ordering::Release);
        }
        settled
    }

    /// Takes a model out: no request finds it any more.
    pub fn remove(&self, name: &str) {
        self.by_name.rcu(|models| {
            let mut models = BTreeMap::clone(models);
            models.remove(name);
            models
        });
    }

    /// Adds a model; no other has its name.
    pub fn add(&self, model: Arc<Model>) {
        self.by_name.rcu(|models| {
            let mut models = BTreeMap::clone(models);
            models.insert(model.name.clone(), Arc::clone(&model));
            models
        });
        // After it was added: a drain that begins meanwhile sees the model, or this sees the drain.
        if self.draining.load(Ordering::SeqCst) {
            model.queue.drain();
        }
    }

    /// The host is shutting down: from now on no batch of any model waits to be filled, of models that come later neither.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::SeqCst);
        self.all().values().for_each(|model| model.queue.drain());
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use modalkit_batch::Closed;
    use modalkit_device::Devices;
    use modalkit_engine::Payload;

    use super::*;
    use crate::{
        config,
        insight::{metrics::Metrics, traces::Traces},
        pipeline::LaneState,
        work::{Deaths, Job, Mailbox, Replies, RequestId, reply},
    };

    #[test]
    fn a_host_that_shuts_down_waits_for_no_batch_of_a_model_that_comes_meanwhile() {
        let mut spec = config::load(&[], &config::Environment::default()).unwrap().config.defaults;
        spec.batch.max_batch_size = 8;
        spec.batch.wait = config::BatchWait::Fixed(Duration::from_secs(60));
        let metrics = Metrics::new(Traces::default());
        let make = |name| Model::new(spec.named(name), &metrics, Devices::none()).0;
        let mailbox = Arc::new(Mailbox::default());
        let models = Models::default();
        let (before, after) = (make("before"), make("after"));
        models.add(Arc::clone(&before));
        models.drain();
        models.add(Arc::clone(&after));
        for model in [before, after] {
            let queue = &model.queue;
            queue.open();
            let (reply, _pending) = reply(&mailbox);
            let request_id = RequestId::Given("a".into());
            let job = Job {
                request_id,
                input: Payload::Json("{}".into()),
                decoded: None,
                reply,
                timings: None,
                deaths: Deaths::default(),
            };
            queue.push([job], None).unwrap();
            let taken = queue
                .next_batch(queue.lane(), || LaneState::Active, &mut Replies::default(), None)
                .expect("the lane is active");
            assert_eq!((taken.batch.jobs.len(), taken.batch.closed), (1, Closed::Drained), "{}", model.name);
        }
    }
}
