//! Jobs that end whatever runs them, among others that don't, on a host that is started again whenever it dies.

use std::{thread, time::Duration};

use serde_json::{Value, json};

use crate::{Host, Setup, wait_until};

const MODELS: [&str; 3] = ["one", "two", "three"];
/// What poison does, and what must be said of it.
const WAYS: [(&str, &str); 3] = [("segfault", "SIGSEGV"), ("abort", "SIGABRT"), ("exit", "exit()")];
/// Between two looks at a host that doesn't answer.
const BETWEEN_LOOKS: Duration = Duration::from_millis(10);

/// What is sent.
#[derive(Clone, Copy, Debug)]
pub struct Poison {
    /// Jobs that do no harm.
    pub good: u64,
    /// Jobs that do.
    pub poison: u64,
    /// Of the models: `in-process` or `process`.
    pub isolation: &'static str,
}

/// What it took.
#[derive(Debug)]
pub struct Deaths {
    /// Of hosts.
    pub hosts: u64,
    /// Of worker processes.
    pub workers: u64,
}

struct Supervised {
    host: Host,
    deaths: u64,
}

impl Supervised {
    /// Asks until the host answers, and starts it again where it is gone.
    fn until<T>(&mut self, what: &str, mut ask: impl FnMut(&Host) -> Option<T>) -> T {
        let mut answer = None;
        wait_until(what, || {
            answer = ask(&self.host);
            if answer.is_none() && self.host.has_exited() {
                let _ = self.host.wait();
                self.deaths += 1;
                self.host.start_again();
            } else if answer.is_none() {
                thread::sleep(BETWEEN_LOOKS);
            }
            answer.is_some()
        });
        answer.expect("it was waited for")
    }
}

impl Poison {
    /// Sends all of it to three models, and looks at what became of each job.
    ///
    /// # Panics
    /// Where a good job didn't succeed at its first attempt with its own answer, or a poison one didn't fail with what it did.
    #[must_use]
    pub fn run(self) -> Deaths {
        let total = self.good + self.poison;
        let models: String = MODELS.map(|name| entry(name, self.isolation)).concat();
        let config = format!("[server]\nlog = \"error,modalkit::app=info\"\n{models}");
        let host = Setup::new().plugin("killer").config(&config).ready();
        let mut supervised = Supervised { host, deaths: 0 };
        // Spread evenly, each of another kind than the one before.
        let way = |number: u64| {
            let (before, with) = (number * self.poison / total, (number + 1) * self.poison / total);
            (with > before).then(|| WAYS[before as usize % WAYS.len()])
        };
        let mut jobs = Vec::new();
        for number in 0..total {
            let model = MODELS[number as usize % MODELS.len()];
            let what = way(number).map_or("", |(what, _)| what);
            let envelope = json!({"message": {"value": number, "do": what}});
            let name = number.to_string();
            let id = supervised.until("a job is accepted", |host| {
                let path = format!("/predict_async?model_name={model}");
                let (status, answer) = host.try_post(&path, &envelope, &[("idempotency-key", &name)])?;
                // Its model may be loading.
                assert!([200, 503].contains(&status), "{status} {answer}");
                (status == 200).then(|| answer["job_id"].as_str().map(ToOwned::to_owned))?
            });
            jobs.push(id);
        }
        for (number, id) in (0..).zip(&jobs) {
            let report = supervised.until("a job has ended", |host| {
                let (_, report) = host.try_get(&format!("/jobs/{id}?wait_ms=1000"))?;
                (report["state"] == "succeeded" || report["state"] == "failed").then_some(report)
            });
            check(number, way(number), &report);
        }
        let of = |name| format!(r#"modalkit_worker_deaths_total{{model="{name}"}}"#);
        let workers = MODELS.iter().map(|name| supervised.host.metric(&of(name)) as u64).sum();
        Deaths { hosts: supervised.deaths, workers }
    }
}

fn entry(name: &str, isolation: &str) -> String {
    format!(
        "[model_settings.model_entries.{name}]\nplugin = \"killer\"\nbatch_config = {{ max_batch_size = 8, wait_ms = 2 }}\n\
         deployment_config = {{ isolation = \"{isolation}\", retries = 0 }}\n"
    )
}

fn check(number: u64, way: Option<(&str, &str)>, report: &Value) {
    match way {
        Some((_, said)) => {
            assert_eq!(report["state"], "failed", "{report}");
            assert!(report["error"].as_str().is_some_and(|error| error.contains(said)), "{report}");
            assert_eq!(report["attempts"].as_u64().map(|attempts| attempts <= 1), Some(true), "{report}");
        }
        None => {
            assert_eq!(report["state"], "succeeded", "{report}");
            assert_eq!(report["result"]["value"], 2 * number, "{report}");
            assert_eq!(report["attempts"], 1, "{report}");
        }
    }
}
