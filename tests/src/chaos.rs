//! Hosts and brokers that are killed while jobs come in, and the books that are kept meanwhile: which jobs were accepted, and whose
//! results came out.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicI64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::{
    Host, Setup,
    brokers::{self, Server},
    free_port, wait_at_most, wait_until,
};

const RESULTS: &str = "results";
/// How long a client waits before it asks a host again that was not there.
const BETWEEN_TRIES: Duration = Duration::from_millis(10);
/// How long a client waits for an answer.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(5);
/// Within this after a round's start something is killed.
const MOMENT_MAX: u64 = 800;
/// How long a broker is away.
const AWAY: Duration = Duration::from_millis(300);
/// How long what was accepted may take to be delivered after a round.
const ROUND_TIME_MAX: Duration = Duration::from_secs(120);
/// The longest that hosts which share a queue may take for it.
const SHARING_TIME_MAX: Duration = Duration::from_secs(900);
/// After the last result, how long results of requests that were run twice may still come: longer than `visibility_seconds`.
const DUPLICATES_TIME: Duration = Duration::from_secs(8);
/// Results that are taken from SQS before they are counted.
const TAKEN_AT_ONCE: usize = 200;

/// Who is killed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Victim {
    /// The host, with -9.
    #[default]
    Host,
    /// The broker, with -9; SQS, which keeps nothing here, hangs instead.
    Broker,
    /// Both, at moments of their own.
    Both,
}

/// Where results go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Broker {
    /// A stream of Redis, whose every write is synced.
    #[default]
    Redis,
    /// A queue of an SQS on this machine.
    Sqs,
}

/// Rounds of jobs during which something is killed.
#[derive(Clone, Copy, Debug)]
pub struct Chaos {
    /// Rounds.
    pub rounds: usize,
    /// Jobs in each.
    pub jobs: usize,
    /// Clients that send them.
    pub clients: usize,
    /// Who is killed.
    pub victim: Victim,
    /// Where results go.
    pub broker: Broker,
}

impl Default for Chaos {
    fn default() -> Self {
        Self { rounds: 1, jobs: 500, clients: 32, victim: Victim::Host, broker: Broker::Redis }
    }
}

/// The books.
#[derive(Clone, Debug, Default)]
pub struct Counted {
    /// Jobs whose id a client received.
    pub accepted: usize,
    /// Results that came for them.
    pub delivered: usize,
    /// Of these, results of a job that had one already.
    pub duplicates: usize,
    /// Accepted jobs without a result.
    pub lost: usize,
    /// Results that belong to another job than they say.
    pub foreign: usize,
    /// Results of jobs whose id no client received, since the host died before it could answer.
    pub unheard: usize,
}

impl Chaos {
    /// Runs the rounds.
    ///
    /// # Panics
    /// Where a host or a broker doesn't come back, or something isn't delivered in time.
    #[must_use]
    pub fn run(&self) -> Counted {
        let (mut broker, config) = self.broker();
        broker.start();
        let port = free_port();
        let mut host = Setup::new()
            .plugin("puppet")
            .config(&format!(
                "[server]\nlog = \"warn,modalkit::app=info\"\njob_crashes_max = 1000\n[app_settings.batch_config]\nmax_batch_size = 16\n\
                 [app_settings.deployment_config]\nbatches_in_flight = 4\nretries = 1000\n{config}"
            ))
            .variable("MODALKIT_SERVER__LISTEN", &format!("127.0.0.1:{port}"))
            .ready();
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        let next = AtomicI64::new(0);
        let mut counted = Counted::default();
        for round in 0..self.rounds {
            let accepted: Mutex<HashMap<String, i64>> = Mutex::default();
            thread::scope(|scope| {
                for number in 0..self.clients {
                    let jobs = self.jobs / self.clients + usize::from(number < self.jobs % self.clients);
                    let (next, accepted) = (&next, &accepted);
                    scope.spawn(move || client(address, jobs, next, accepted));
                }
                // Not at the same moment in every round, and the same in every run.
                let moment = Duration::from_millis((round as u64 * 397 + 61) % MOMENT_MAX);
                self.strike(moment, &mut host, &mut broker);
            });
            let accepted = accepted.into_inner().unwrap_or_else(PoisonError::into_inner);
            self.settle(&host, &broker, &accepted, &mut counted);
        }
        counted
    }

    fn broker(&self) -> (Server, String) {
        match self.broker {
            Broker::Redis => {
                let server = brokers::redis(&[]);
                let config = format!(
                    "[app_settings.queue_config]\nbackend = \"main\"\nallowed_queues = [\"results\"]\n[app_settings.queue_config.backends.main]\nkind = \"redis\"\n\
                     broker_url = \"redis://127.0.0.1:{}\"\nredis_type = \"stream\"\n",
                    server.port
                );
                (server, config)
            }
            Broker::Sqs => {
                let server = brokers::ministack();
                let config = format!(
                    "[app_settings.queue_config]\nbackend = \"main\"\nallowed_queues = [\"results\"]\n[app_settings.queue_config.backends.main]\nkind = \"sqs\"\n\
                     broker_url = \"http://127.0.0.1:{}/\"\naccess_key_id = \"k\"\nsecret_access_key = \"s\"\n",
                    server.port
                );
                (server, config)
            }
        }
    }

    /// Kills somebody, and brings them back.
    fn strike(&self, moment: Duration, host: &mut Host, broker: &mut Server) {
        thread::sleep(moment);
        let broker_too = self.victim != Victim::Host;
        if broker_too {
            match self.broker {
                Broker::Redis => broker.kill(),
                Broker::Sqs => broker.hang(),
            }
        }
        if self.victim != Victim::Broker {
            host.kill();
            host.start_again();
        }
        if broker_too {
            thread::sleep(AWAY);
            match self.broker {
                Broker::Redis => broker.start(),
                Broker::Sqs => broker.go_on(),
            }
        }
    }

    /// Waits until everything that was accepted is delivered, and enters it into the books.
    fn settle(&self, host: &Host, broker: &Server, accepted: &HashMap<String, i64>, counted: &mut Counted) {
        wait_until("the host is ready", || host.get("/readyz").0 == 200);
        let none = |query: &str| host.get(query).1["jobs"].as_array().is_some_and(Vec::is_empty);
        wait_at_most(ROUND_TIME_MAX, "all jobs have ended and are delivered", || {
            none("/jobs?state=queued&limit=1")
                && none("/jobs?state=running&limit=1")
                && none("/jobs?delivery=pending&limit=1")
        });
        let results = match self.broker {
            Broker::Redis => {
                let results = brokers::redis_stream(broker.port, RESULTS);
                brokers::redis_clear(broker.port, RESULTS);
                results.into_iter().map(|(body, job)| (body, job.unwrap_or_default())).collect()
            }
            Broker::Sqs => brokers::sqs_drain(broker.port, RESULTS)
                .into_iter()
                .map(|message| {
                    let body = message["Body"].as_str().unwrap_or_default().as_bytes().to_vec();
                    let job = &message["MessageAttributes"]["job_id"]["StringValue"];
                    (body, job.as_str().unwrap_or_default().to_owned())
                })
                .collect::<Vec<_>>(),
        };
        let mut seen: HashMap<String, usize> = HashMap::new();
        for (body, job) in results {
            let result: Value = serde_json::from_slice(&body).unwrap_or_default();
            match accepted.get(&job) {
                Some(value) => {
                    counted.delivered += 1;
                    counted.foreign +=
                        usize::from(result["value"] != *value || result["meta"]["value"] != *value);
                    *seen.entry(job).or_default() += 1;
                }
                None => counted.unheard += 1,
            }
        }
        counted.accepted += accepted.len();
        counted.duplicates += seen.values().map(|times| times - 1).sum::<usize>();
        counted.lost += accepted.keys().filter(|job| !seen.contains_key(*job)).count();
    }
}

/// Sends jobs, of which some take long and most don't, until it has ids for as many as it should.
fn client(address: SocketAddr, jobs: usize, next: &AtomicI64, accepted: &Mutex<HashMap<String, i64>>) {
    let config =
        ureq::Agent::config_builder().http_status_as_error(false).timeout_global(Some(ANSWER_TIME_MAX));
    let agent: ureq::Agent = config.build().into();
    let mut sent = 0;
    while sent < jobs {
        let value = next.fetch_add(1, Ordering::SeqCst);
        let mut message = json!({"value": value});
        if value % 5 == 0 {
            message["do"] = json!("sleep");
            message["ms"] = json!(value % 40);
        }
        let envelope = json!({"message": message, "success_queue": RESULTS, "failure_queue": RESULTS, "meta": {"value": value}});
        let answered = agent.post(format!("http://{address}/predict_async")).send(envelope.to_string());
        let answer = answered.ok().filter(|answer| answer.status() == 200);
        let text = answer.and_then(|mut answer| answer.body_mut().read_to_string().ok());
        let job = text.and_then(|text| serde_json::from_str::<Value>(&text).ok());
        match job.as_ref().and_then(|job| job["job_id"].as_str()) {
            Some(job) => {
                sent += 1;
                accepted.lock().unwrap_or_else(PoisonError::into_inner).insert(job.to_owned(), value);
            }
            // Whether it was accepted nobody can say: the next one is another.
            None => thread::sleep(BETWEEN_TRIES),
        }
    }
}

/// Hosts that share a queue, one of which is killed every now and then.
#[derive(Clone, Copy, Debug)]
pub struct Sharing {
    /// Hosts.
    pub hosts: usize,
    /// Requests in the queue.
    pub messages: usize,
    /// Between two kills.
    pub every: Duration,
    /// The queue's broker.
    pub broker: Broker,
    /// Every fifth request sleeps, up to this long.
    pub sleep_ms_max: usize,
}

/// What came out.
#[derive(Clone, Debug)]
pub struct Shared {
    /// Requests that have a result.
    pub answered: usize,
    /// Results of requests that had one already.
    pub duplicates: usize,
    /// Hosts that were killed.
    pub kills: usize,
    /// How long all took.
    pub took: Duration,
}

impl Sharing {
    /// Fills the queue, and waits until every request has a result.
    ///
    /// # Panics
    /// Where one has none in time.
    #[must_use]
    pub fn run(&self) -> Shared {
        let chaos = Chaos { broker: self.broker, ..Chaos::default() };
        let (mut broker, config) = chaos.broker();
        broker.start();
        self.fill(&broker);
        let config = format!(
            "[server]\nlog = \"warn,modalkit::app=info\"\njob_crashes_max = 1000\n[app_settings.batch_config]\nmax_batch_size = 16\n\
             [app_settings.deployment_config]\nbatches_in_flight = 4\nretries = 1000\n{config}\
             [[app_settings.queue_config.consume]]\nqueue = \"requests\"\nmodel = \"puppet\"\nin_flight_max = 64\nvisibility_seconds = 5\n"
        );
        let begun = Instant::now();
        let mut hosts: Vec<Host> =
            (0..self.hosts).map(|_| Setup::new().plugin("puppet").config(&config).start()).collect();
        // On a thread of its own: who empties a queue that others fill may be long about it, and hosts must die meanwhile.
        let times: Mutex<HashMap<i64, usize>> = Mutex::default();
        let done = AtomicBool::new(false);
        let answered = || times.lock().unwrap_or_else(PoisonError::into_inner).len();
        let (took, kills) = thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::SeqCst) {
                    self.collect(&broker, &times);
                    thread::sleep(Duration::from_millis(50));
                }
            });
            let (mut kills, mut struck) = (0, Instant::now());
            while answered() < self.messages && begun.elapsed() < SHARING_TIME_MAX {
                if struck.elapsed() > self.every {
                    let victim = kills % hosts.len();
                    hosts[victim].kill();
                    hosts[victim].start_again();
                    (kills, struck) = (kills + 1, Instant::now());
                }
                thread::sleep(Duration::from_millis(20));
            }
            let took = begun.elapsed();
            // What runs twice comes a little later.
            thread::sleep(DUPLICATES_TIME);
            done.store(true, Ordering::SeqCst);
            (took, kills)
        });
        self.collect(&broker, &times);
        let times = times.into_inner().unwrap_or_else(PoisonError::into_inner);
        assert_eq!(times.len(), self.messages, "after {took:?}");
        Shared { answered: times.len(), duplicates: times.values().map(|times| times - 1).sum(), kills, took }
    }

    fn fill(&self, broker: &Server) {
        let request = |value: usize| {
            let mut message = json!({"value": value});
            if value.is_multiple_of(5) {
                message["do"] = json!("sleep");
                message["ms"] = json!(value % self.sleep_ms_max);
            }
            json!({"message": message, "success_queue": RESULTS, "failure_queue": RESULTS}).to_string()
        };
        match self.broker {
            Broker::Redis => {
                let mut connection = brokers::redis_connection(broker.port);
                for value in 0..self.messages {
                    let _ = brokers::xadd(&mut connection, "requests", &request(value));
                }
            }
            Broker::Sqs => {
                let url = brokers::sqs_queue(broker.port, "requests");
                let values: Vec<usize> = (0..self.messages).collect();
                for batch in values.chunks(10) {
                    let entry =
                        |value: &usize| json!({"Id": value.to_string(), "MessageBody": request(*value)});
                    let entries: Vec<Value> = batch.iter().map(entry).collect();
                    let _ = brokers::sqs(
                        broker.port,
                        "SendMessageBatch",
                        &json!({"QueueUrl": url, "Entries": entries}),
                    );
                }
            }
        }
    }

    fn collect(&self, broker: &Server, times: &Mutex<HashMap<i64, usize>>) {
        let bodies: Vec<Vec<u8>> = match self.broker {
            Broker::Redis => brokers::redis_take(broker.port, RESULTS),
            Broker::Sqs => brokers::sqs_take(broker.port, RESULTS, TAKEN_AT_ONCE)
                .iter()
                .map(|message| message["Body"].as_str().unwrap_or_default().as_bytes().to_vec())
                .collect(),
        };
        for body in bodies {
            let result: Value = serde_json::from_slice(&body).unwrap_or_default();
            let value = result["value"].as_i64();
            let value = value.unwrap_or_else(|| panic!("{result}"));
            *times.lock().unwrap_or_else(PoisonError::into_inner).entry(value).or_default() += 1;
        }
    }
}
