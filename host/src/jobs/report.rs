//! What is told of a job.

use modalkit_journal::{State, Stored};
use serde::Serialize;
use serde_json::value::RawValue;

use super::live_job::LiveJob;
use crate::protocol;

/// The state that isn't written: only this process knows it.
const RUNNING: &str = "running";

/// A job, as `GET /jobs/{id}` shows it. Times are milliseconds since 1970.
#[derive(Debug, Serialize)]
pub struct Report {
    job_id: String,
    model: String,
    state: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    result: Option<Box<RawValue>>,
    /// Why it failed, or its last attempt did.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    attempts: u32,
    /// How often a host died while it was running.
    #[serde(skip_serializing_if = "is_zero")]
    crashes: u32,
    accepted_unix_ms: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    started_unix_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    finished_unix_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    next_attempt_unix_ms: Option<u64>,
    delivery: Delivery,
}

#[derive(Debug, Serialize)]
struct Delivery {
    state: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    queue: Option<String>,
    /// While it is pending.
    #[serde(skip_serializing_if = "Option::is_none")]
    attempts: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ended_unix_ms: Option<u64>,
}

/// Jobs, as `GET /jobs` shows them.
#[derive(Debug, Serialize)]
pub struct Listed {
    /// The jobs, the youngest first.
    pub jobs: Vec<Report>,
    /// Where to go on, as `after`.
    pub next: Option<String>,
}

impl Report {
    /// Whether its batch runs.
    pub(super) fn runs(&self) -> bool {
        self.state == RUNNING
    }

    /// From what is written of it, and what this process knows beside that.
    pub(super) fn of(stored: Stored, progress: Option<&LiveJob>) -> Self {
        let mut report = Self {
            job_id: stored.id.to_string(),
            model: stored.model,
            state: stored.state.word(),
            result: stored.result.map(|result| protocol::raw_json(&result).into_owned()),
            error: stored.error,
            attempts: stored.attempts,
            crashes: stored.crashes,
            accepted_unix_ms: stored.accepted,
            started_unix_ms: stored.started,
            finished_unix_ms: stored.finished,
            next_attempt_unix_ms: stored.next,
            delivery: Delivery {
                state: stored.delivery.word(),
                queue: stored.queue,
                attempts: None,
                error: stored.delivery_error,
                ended_unix_ms: stored.delivered,
            },
        };
        let Some(live_job) = progress else { return report };
        let progress = live_job.progress.lock();
        if stored.state == State::Queued {
            report.attempts = report.attempts.max(progress.attempts);
            report.started_unix_ms = progress.started.or(report.started_unix_ms);
            report.next_attempt_unix_ms = progress.next;
            report.error = progress.error.clone().or(report.error);
            if progress.runs() {
                report.state = RUNNING;
                // An attempt is counted when it ends, so the one that runs is added.
                report.attempts += u32::from(progress.is_running());
                report.next_attempt_unix_ms = None;
            }
        } else {
            report.delivery.attempts = Some(progress.delivery_attempts);
            report.delivery.error.clone_from(&progress.delivery_error);
        }
        report
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for a reference")]
fn is_zero(count: &u32) -> bool {
    *count == 0
}
