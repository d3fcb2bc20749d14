//! Asynchronous jobs and what became of them, in memory. It owns the records and their number, and never runs a job.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use bytes::Bytes;
use parking_lot::Mutex;
use prometheus::IntGauge;
use serde::Serialize;
use serde_json::value::RawValue;
use uuid::Uuid;

use crate::job::JobError;

/// The jobs that are remembered.
pub struct Jobs {
    jobs_max: usize,
    records: Mutex<Records>,
    remembered: IntGauge,
}

#[derive(Default)]
struct Records {
    by_id: HashMap<Uuid, Record>,
    /// In the order in which they finished: the first to be forgotten.
    finished: VecDeque<Uuid>,
}

struct Record {
    model: String,
    /// The name of the key that it came with.
    key: Option<Arc<str>>,
    /// `None` until it has finished.
    result: Option<Finished>,
}

/// How a job ended: the message that a queue would get.
#[derive(Clone, Debug)]
pub enum Finished {
    /// It has an answer.
    Succeeded(Bytes),
    /// It has none.
    Failed(Bytes),
}

/// A job as `GET /jobs/{id}` shows it.
#[derive(Debug, Serialize)]
pub struct Report {
    job_id: Uuid,
    model: String,
    state: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    result: Option<Box<RawValue>>,
}

impl Jobs {
    /// Remembers at most this many.
    #[must_use]
    pub fn new(jobs_max: usize, remembered: IntGauge) -> Self {
        Self { jobs_max, records: Mutex::default(), remembered }
    }

    /// Takes a new job in. The oldest finished one is forgotten where there are too many.
    ///
    /// # Errors
    /// [`JobError::Busy`] where none has finished.
    pub fn accept(&self, model: &str, key: Option<Arc<str>>) -> Result<Uuid, JobError> {
        let id = Uuid::now_v7();
        let mut records = self.records.lock();
        if records.by_id.len() >= self.jobs_max {
            let Some(oldest) = records.finished.pop_front() else {
                return Err(JobError::Busy("too many asynchronous jobs are unfinished (server.jobs_max)"));
            };
            records.by_id.remove(&oldest);
        }
        records.by_id.insert(id, Record { model: model.to_owned(), key, result: None });
        self.remembered.set(records.by_id.len() as i64);
        Ok(id)
    }

    /// Forgets a job that was not queued after all.
    pub fn withdraw(&self, id: Uuid) {
        let mut records = self.records.lock();
        records.by_id.remove(&id);
        self.remembered.set(records.by_id.len() as i64);
    }

    /// Says how a job ended.
    pub fn finish(&self, id: Uuid, result: Finished) {
        let mut records = self.records.lock();
        if let Some(record) = records.by_id.get_mut(&id) {
            record.result = Some(result);
            records.finished.push_back(id);
        }
    }

    /// What is known of a job; where it says whose, only of one that came with that key, or with none.
    #[must_use]
    pub fn report(&self, id: Uuid, whose: Option<Option<&str>>) -> Option<Report> {
        let records = self.records.lock();
        let record =
            records.by_id.get(&id).filter(|record| whose.is_none_or(|key| record.key.as_deref() == key))?;
        let (state, result) = match &record.result {
            None => ("queued", None),
            Some(Finished::Succeeded(json)) => ("succeeded", Some(json.clone())),
            Some(Finished::Failed(json)) => ("failed", Some(json.clone())),
        };
        let model = record.model.clone();
        drop(records);
        let result = result.and_then(|json| serde_json::from_slice(&json).ok());
        Some(Report { job_id: id, model, state, result })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_finished_job_makes_room_and_unfinished_ones_are_kept() {
        let jobs = Jobs::new(2, IntGauge::new("n", "n").unwrap());
        let accept = || jobs.accept("m", None);
        let (first, second) = (accept().unwrap(), accept().unwrap());
        assert!(matches!(accept(), Err(JobError::Busy(_))));
        jobs.finish(second, Finished::Succeeded(Bytes::from_static(b"{}")));
        let third = accept().unwrap();
        assert!(jobs.report(second, None).is_none());
        assert_eq!(jobs.report(first, None).unwrap().state, "queued");
        jobs.withdraw(third);
        assert!(jobs.report(third, None).is_none());
    }

    #[test]
    fn a_job_is_shown_to_the_key_that_it_came_with() {
        let jobs = Jobs::new(2, IntGauge::new("n", "n").unwrap());
        let id = jobs.accept("m", Some("one".into())).unwrap();
        assert!(jobs.report(id, Some(Some("one"))).is_some());
        assert!(jobs.report(id, Some(Some("other"))).is_none());
        assert!(jobs.report(id, Some(None)).is_none());
        assert!(jobs.report(id, None).is_some(), "who manages sees all");
    }
}
