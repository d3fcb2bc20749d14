//! What callers do with jobs that were accepted: wait for them, look at them, take them back, have results delivered again. It never
//! decides when a job runs.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use modalkit_journal::{Delivery as Delivered, Filter, JobId, State};
use modalkit_queue::Message;
use tokio::{sync::oneshot, time::timeout};

use super::{
    Jobs, closed,
    delivery::PendingDelivery,
    inbox::Event,
    live_job::JobPhase,
    report::{Listed, Report},
};
use crate::work::JobError;

/// Pages of the journal that one list looks at: beyond them the caller asks again.
const PAGES_MAX: usize = 16;
/// How long whoever takes a job back, or acknowledges its result, waits for the journal.
const WRITE_TIME_MAX: Duration = Duration::from_secs(5);

/// What became of a request to take a job back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cancelled {
    /// It won't run.
    Done,
    /// Its batch runs: it ends without a result.
    Soon,
    /// It was requested, and isn't written to the journal yet.
    Unwritten,
    /// It had ended before, in this state.
    Ended(State),
    /// There is no such job.
    Unknown,
}

/// What became of a request to have a result delivered again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Redelivery {
    /// It is on its way from now on.
    Begun,
    /// It was on its way already.
    UnderWay {
        /// To this queue.
        queue: String,
    },
    /// The job has no result yet.
    NotEnded,
    /// No queue was to get it.
    NoQueue,
    /// There is no such job.
    Unknown,
}

impl Jobs {
    /// Waits until a job has ended, or for this long.
    pub async fn wait(&self, id: JobId, time: Duration) {
        let live_job = self.shared.find(id);
        if let Some(ended) =
            live_job.as_ref().filter(|_| !time.is_zero()).and_then(|live_job| live_job.wait())
        {
            // Whether it ended or not, whoever waits asks next.
            let _ = timeout(time, ended).await;
        }
    }

    /// Bytes of a job's result; 0 where there is none.
    ///
    /// # Errors
    /// [`JobError::Unavailable`] where the journal can't be read.
    pub async fn result_bytes(self: &Arc<Self>, id: JobId) -> Result<usize, JobError> {
        self.read(move |journal| journal.result_bytes(id)).await
    }

    /// What is known of a job; where it says whose, only of one that came with that key, or with none.
    ///
    /// # Errors
    /// [`JobError::Unavailable`] where the journal can't be read.
    pub async fn report(
        self: &Arc<Self>,
        id: JobId,
        whose: Option<Option<Arc<str>>>,
    ) -> Result<Option<Report>, JobError> {
        let stored = self.read(move |journal| journal.job(id)).await?;
        let of_caller =
            |key: &Option<String>| whose.as_ref().is_none_or(|whose| whose.as_deref() == key.as_deref());
        Ok(stored.filter(|stored| of_caller(&stored.key)).map(|stored| {
            let live_job = self.shared.find(id);
            Report::of(stored, live_job.as_deref())
        }))
    }

    /// The queue in memory has given these messages away: they are delivered, on disk.
    ///
    /// # Errors
    /// [`JobError::Unavailable`] where that could not be written in time: a restart would put them into the queue again.
    pub async fn taken(&self, backend: &str, messages: &[Message]) -> Result<(), JobError> {
        let mut written = None;
        {
            let journal = self.journal.read();
            let Some(journal) = &*journal else { return Err(closed()) };
            for message in messages {
                let Ok(id) = message.job_id.parse::<JobId>() else { continue };
                self.shared.metrics.jobs.delivered(backend, "delivered").inc();
                let (tell, told) = oneshot::channel();
                // Whoever asked may have left.
                journal.delivered(id, move || tell.send(()).unwrap_or_default());
                // They are written in order: the last one speaks for all.
                written = Some(told);
                if let Some(live_job) = self.shared.find(id) {
                    self.shared.done_with(&live_job);
                }
            }
        }
        let Some(written) = written else { return Ok(()) };
        timeout(WRITE_TIME_MAX, written).await.map(drop).map_err(|_| {
            let why = "the journal can't be written at the moment: after a restart these messages would be in their queue again";
            JobError::Unavailable(why.into())
        })
    }

    /// Jobs, the youngest first; of those that haven't ended, only those that run or those that don't, where that is said.
    ///
    /// # Errors
    /// [`JobError::Busy`] where too many wait for their turn, [`JobError::Unavailable`] where the journal can't be read.
    pub async fn list(self: &Arc<Self>, filter: Filter, running: Option<bool>) -> Result<Listed, JobError> {
        let _waits = self
            .listers
            .try_acquire()
            .map_err(|_| JobError::Busy("too many callers list jobs at the moment"))?;
        // One after the other: those who list take turns with each other, and keep nobody else waiting.
        let _turn = self.lists.acquire().await.map_err(|_| JobError::Lost)?;
        let (mut jobs, mut next, limit) = (Vec::new(), filter.after, filter.limit);
        for _ in 0..PAGES_MAX {
            let page_filter = Filter { after: next, limit: limit - jobs.len(), ..filter.clone() };
            let page = self.read(move |journal| journal.list(&page_filter)).await?;
            next = page.next;
            for stored in page.jobs {
                let live_job = self.shared.find(stored.id);
                let report = Report::of(stored, live_job.as_deref());
                if running.is_none_or(|running| report.runs() == running) {
                    jobs.push(report);
                }
            }
            if next.is_none() || jobs.len() >= limit {
                break;
            }
        }
        Ok(Listed { jobs, next: next.map(|next| next.to_string()) })
    }

    /// Takes a job back that hasn't ended.
    ///
    /// # Errors
    /// [`JobError::Unavailable`] where the journal can't be read.
    pub async fn cancel(
        self: &Arc<Self>,
        id: JobId,
        whose: Option<Option<Arc<str>>>,
    ) -> Result<Cancelled, JobError> {
        let Some(stored) = self.read(move |journal| journal.job(id)).await? else {
            return Ok(Cancelled::Unknown);
        };
        if whose.is_some_and(|whose| whose.as_deref() != stored.key.as_deref()) {
            return Ok(Cancelled::Unknown);
        }
        let Some(live_job) = self.shared.find(id) else { return self.how_it_ended(id).await };
        let Some(ended) = live_job.wait() else { return self.how_it_ended(id).await };
        if !matches!(live_job.progress.lock().phase(), JobPhase::Ending) {
            // Where it runs, it is the journal that keeps it from being run again by the next host.
            let (tell, told) = oneshot::channel();
            {
                let journal = self.journal.read();
                let Some(journal) = &*journal else { return Err(closed()) };
                // Whoever asked may have left.
                journal.cancel(id, move || tell.send(()).unwrap_or_default());
            }
            live_job.cancelled.store(true, Ordering::SeqCst);
            if timeout(WRITE_TIME_MAX, told).await.is_err() {
                return Ok(Cancelled::Unwritten);
            }
            if live_job.progress.lock().is_running() {
                return Ok(Cancelled::Soon);
            }
            self.inbox.put(Event::Cancel(Arc::clone(&live_job)));
        }
        if timeout(WRITE_TIME_MAX, ended).await.is_err() {
            let runs = live_job.progress.lock().runs();
            return Ok(if runs { Cancelled::Soon } else { Cancelled::Unwritten });
        }
        self.how_it_ended(id).await
    }

    async fn how_it_ended(self: &Arc<Self>, id: JobId) -> Result<Cancelled, JobError> {
        let stored = self.read(move |journal| journal.job(id)).await?;
        Ok(match stored.map(|stored| stored.state) {
            Some(State::Cancelled) => Cancelled::Done,
            Some(state) => Cancelled::Ended(state),
            None => Cancelled::Unknown,
        })
    }

    /// Has a job's message delivered again that was delivered or given up.
    /// `may_name` says whether jobs of this key may name this queue now.
    ///
    /// # Errors
    /// [`JobError::Unavailable`] where the journal can't be written, or what `may_name` says.
    pub async fn redeliver(
        self: &Arc<Self>,
        id: JobId,
        whose: Option<Option<Arc<str>>>,
        may_name: impl FnOnce(Option<&str>, &str) -> Result<(), JobError>,
    ) -> Result<Redelivery, JobError> {
        let Some(stored) = self.read(move |journal| journal.job(id)).await? else {
            return Ok(Redelivery::Unknown);
        };
        if whose.is_some_and(|whose| whose.as_deref() != stored.key.as_deref()) {
            return Ok(Redelivery::Unknown);
        }
        let queue = match (stored.delivery, stored.state, stored.queue) {
            (Delivered::Delivered | Delivered::Dead, _, Some(queue)) => queue,
            (Delivered::Pending, _, Some(queue)) => return Ok(Redelivery::UnderWay { queue }),
            (_, State::Queued, _) => return Ok(Redelivery::NotEnded),
            _ => return Ok(Redelivery::NoQueue),
        };
        may_name(stored.key.as_deref(), &queue)?;
        let (tell, told) = oneshot::channel();
        {
            let journal = self.journal.read();
            let Some(journal) = &*journal else { return Err(closed()) };
            let jobs = Arc::clone(self);
            // Whoever asked may leave; the message is on its way all the same.
            journal.redeliver(id, move |job| {
                let found = job.is_some();
                if let Some(job) = job {
                    let live_job = jobs.shared.remember(&job);
                    if let Some(queue) = job.queue {
                        jobs.deliveries.add(PendingDelivery::new(
                            live_job,
                            queue,
                            job.pending.unwrap_or_default(),
                            None,
                        ));
                    }
                }
                // Whoever asked may have left.
                let _ = tell.send(found);
            });
        }
        // Somebody else may have asked for the same meanwhile.
        Ok(if told.await.unwrap_or_default() { Redelivery::Begun } else { Redelivery::UnderWay { queue } })
    }

    /// Tells when a job has ended, on disk; at once where it has, or isn't known.
    #[must_use]
    pub fn watch(&self, id: JobId) -> Option<oneshot::Receiver<()>> {
        self.shared.find(id)?.wait()
    }
}
