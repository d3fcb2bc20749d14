//! Keeps as many replicas of a generation as are wanted: starts, replaces, gives up and retires them. One loop over one
//! enum of events; it never runs a batch itself.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{
    sync::{mpsc, oneshot},
    task::JoinHandle,
    time::MissedTickBehavior,
};

use super::{
    Generation, Model, Status,
    replica::{Event, Replica, Surroundings},
    scale::{self, Seen, Step},
};
use modalkit_loader::Failure;

/// How often the fleet looks at queue and replicas: the grain of `batch_timeout_seconds` and of scaling.
const TICK: Duration = Duration::from_millis(50);
/// After a failed load, the wait until the next try; it doubles with each failure up to the maximum.
const RETRY_MIN: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(60);
/// Threads write here when they start or fail; a full channel makes them wait.
const EVENTS_MAX: usize = 64;

/// The running loop of one generation.
pub struct Fleet {
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

struct Loop {
    model: Arc<Model>,
    around: Arc<Surroundings>,
    replicas: Vec<Arc<Replica>>,
    leaving: Vec<Arc<Replica>>,
    /// Replicas with a batch that overran; their other lanes may still run one.
    given_up: Vec<Arc<Replica>>,
    starting: usize,
    stuck: usize,
    started_ever: u64,
    retry: Retry,
    short_since: Option<Instant>,
    spare_since: Option<Instant>,
}

struct Retry {
    not_before: Option<Instant>,
    pause: Duration,
}

impl Fleet {
    /// Starts the generation's first replica; the model serves when it is loaded.
    #[must_use]
    pub fn start(model: Arc<Model>, generation: Arc<Generation>) -> Self {
        let (events, received) = mpsc::channel(EVENTS_MAX);
        let around = Arc::new(Surroundings {
            generation,
            queue: Arc::clone(&model.queue),
            metrics: Arc::clone(&model.metrics),
            events,
        });
        let (stop, stopped) = oneshot::channel();
        let fleet = Loop {
            model,
            around,
            replicas: Vec::new(),
            leaving: Vec::new(),
            given_up: Vec::new(),
            starting: 0,
            stuck: 0,
            started_ever: 0,
            retry: Retry { not_before: None, pause: RETRY_MIN },
            short_since: None,
            spare_since: None,
        };
        Self { stop, task: tokio::spawn(fleet.run(received, stopped)) }
    }

    /// Lets every replica finish what it runs, and waits until they have left, but for those that hang.
    pub async fn stop(self) {
        // A loop that has ended needs no word.
        let _ = self.stop.send(());
        if let Err(error) = self.task.await {
            tracing::error!(%error, "a fleet's loop ended before it was told to");
        }
    }
}

impl Loop {
    async fn run(mut self, mut events: mpsc::Receiver<Event>, mut stop: oneshot::Receiver<()>) {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // The first load is tried even where no replica is kept without work: a model that can't load should say so.
        self.start_replica();
        loop {
            tokio::select! {
                Some(event) = events.recv() => self.on_event(event),
                _ = tick.tick() => self.on_tick(),
                _ = &mut stop => break,
            }
        }
        self.model.queue.drain();
        self.retire_all();
        while self.leaving.iter().any(|replica| !replica.has_left())
            || self.given_up.iter().any(|replica| replica.is_running())
        {
            tokio::select! {
                Some(event) = events.recv() => {
                    self.on_event(event);
                    self.retire_all();
                }
                _ = tick.tick() => {
                    self.give_up_overrun();
                    self.leaving.retain(|replica| !replica.has_left());
                }
            }
        }
    }

    fn on_event(&mut self, event: Event) {
        match event {
            Event::Started(replica) => {
                self.starting -= 1;
                self.retry.pause = RETRY_MIN;
                tracing::info!(
                    model = self.model.spec.name,
                    generation = self.around.generation.number,
                    replica = replica.number,
                    "replica started"
                );
                self.replicas.push(replica);
                self.on_replicas_changed();
                self.model.set_status(Status::Ready, Some(&self.around.generation));
            }
            Event::Failed(failure) => {
                self.starting -= 1;
                self.on_load_failed(&failure);
            }
            Event::CameBack => {
                self.stuck = self.stuck.saturating_sub(1);
                self.model.metrics.replicas_stuck.set(self.stuck as i64);
                tracing::warn!(
                    model = self.model.spec.name,
                    "a replica that was given up came back and left"
                );
            }
        }
    }

    fn on_tick(&mut self) {
        self.give_up_overrun();
        self.leaving.retain(|replica| !replica.has_left());
        let now = Instant::now();
        let load = self.model.queue.load();
        let lanes = self.around.generation.spec.replicas.batches_in_flight;
        let batch = self.model.spec.batch.max_batch_size;
        keep(&mut self.short_since, now, load.queued >= batch && load.free_lanes == 0);
        keep(&mut self.spare_since, now, load.spare_lanes >= lanes);
        let since = |moment: Option<Instant>| moment.map_or(Duration::ZERO, |moment| now - moment);
        // A model that takes no jobs can't be woken by one: it is brought back as if one waited.
        let refuses = self.model.serving().is_err();
        let seen = Seen {
            live: self.replicas.len(),
            starting: self.starting,
            stuck: self.stuck,
            queued: load.queued.max(usize::from(refuses)),
            short_for: since(self.short_since),
            spare_for: since(self.spare_since),
        };
        match scale::next(&self.around.generation.spec.replicas, &seen) {
            Step::Start if self.retry.not_before.is_none_or(|moment| moment <= now) => self.start_replica(),
            Step::Retire => {
                self.spare_since = Some(now);
                self.retire_one();
            }
            Step::Start | Step::Stay => {}
        }
    }

    fn start_replica(&mut self) {
        self.started_ever += 1;
        self.short_since = None;
        match Replica::start(self.started_ever, Arc::clone(&self.around)) {
            Ok(()) => self.starting += 1,
            Err(error) => {
                self.pause_retries();
                tracing::error!(model = self.model.spec.name, %error, "can't start a replica's thread");
            }
        }
    }

    fn on_load_failed(&mut self, failure: &Failure) {
        let pause = self.pause_retries();
        let reason = failure.message.to_string();
        tracing::error!(
            model = self.model.spec.name,
            generation = self.around.generation.number,
            error = reason,
            retry_in = ?pause,
            "the pipeline didn't load"
        );
        if self.replicas.is_empty() {
            self.model
                .set_status(Status::Failed { reason: format!("the pipeline didn't load: {reason}") }, None);
        }
    }

    fn pause_retries(&mut self) -> Duration {
        let pause = self.retry.pause;
        self.retry = Retry { not_before: Some(Instant::now() + pause), pause: (pause * 2).min(RETRY_MAX) };
        pause
    }

    fn retire_one(&mut self) {
        // The youngest: the oldest validates.
        if let Some(replica) = self.replicas.pop() {
            tracing::info!(
                model = self.model.spec.name,
                replica = replica.number,
                "replica retired: there was no work"
            );
            self.validate_with_first();
            replica.leave();
            self.leaving.push(replica);
            self.on_replicas_changed();
        }
    }

    fn retire_all(&mut self) {
        let leaving = std::mem::take(&mut self.replicas);
        self.validate_with_first();
        leaving.iter().for_each(|replica| replica.leave());
        self.leaving.extend(leaving);
        self.on_replicas_changed();
    }

    fn give_up_overrun(&mut self) {
        let now = Instant::now();
        let limit = self.around.generation.spec.replicas.batch_timeout;
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
                model = self.model.spec.name,
                replica = replica.number,
                ?limit,
                "a batch overran batch_timeout_seconds; its replica is given up and replaced"
            );
            self.model.metrics.replicas_given_up.inc();
            replica.leave();
            self.given_up.push(replica);
        }
        self.stuck += overrun;
        self.model.metrics.timed_out.inc_by(overrun as u64);
        self.model.metrics.replicas_stuck.set(self.stuck as i64);
        self.on_replicas_changed();
        let bound = self.around.generation.spec.replicas.stuck_max;
        if self.stuck > bound && self.replicas.is_empty() && self.starting == 0 {
            let reason = format!(
                "{} threads hang in batches that overran batch_timeout_seconds, more than stuck_replicas_max ({bound}); no replica is started until some come back: find out why the pipeline hangs, or restart the host",
                self.stuck
            );
            tracing::error!(model = self.model.spec.name, reason, "the model is stuck");
            self.model.set_status(Status::Stuck { reason }, None);
        }
    }

    fn on_replicas_changed(&self) {
        self.model.metrics.replicas.set(self.replicas.len() as i64);
        self.validate_with_first();
        self.model.queue.wake_all();
    }

    /// Inputs are validated by a replica that stays. Called before one is told to leave, so that nobody looks at it then.
    fn validate_with_first(&self) {
        let validating = self.replicas.first().and_then(|replica| replica.instance());
        self.around.generation.validate_with(validating);
    }
}

/// Remembers since when something holds.
fn keep(since: &mut Option<Instant>, now: Instant, holds: bool) {
    *since = if holds { since.or(Some(now)) } else { None };
}
