//! The minimal batcher: one thread that takes the first job and waits up to 5 ms for 31 more, then "predicts" for 5 ms
//! and 0.1 ms an item.

use std::{
    sync::mpsc::{Receiver, SyncSender, sync_channel},
    thread,
    time::{Duration, Instant},
};

use tokio::sync::oneshot;

const BATCH_MAX: usize = 32;
const WAIT: Duration = Duration::from_millis(5);
const QUEUE_MAX: usize = 4096;

type Job = (String, oneshot::Sender<String>);

pub(crate) struct Batcher {
    jobs: SyncSender<Job>,
}

impl Batcher {
    pub(crate) fn start() -> std::io::Result<Self> {
        let (jobs, received) = sync_channel(QUEUE_MAX);
        thread::Builder::new().name("batcher".into()).spawn(move || work(&received))?;
        Ok(Self { jobs })
    }

    pub(crate) async fn run(&self, text: String) -> String {
        let (sender, receiver) = oneshot::channel();
        // The queue holds more than the benchmark's connections, so this doesn't block.
        if self.jobs.send((text, sender)).is_err() {
            return String::new();
        }
        receiver.await.unwrap_or_default()
    }
}

fn work(received: &Receiver<Job>) {
    while let Ok(first) = received.recv() {
        let until = Instant::now() + WAIT;
        let mut batch = vec![first];
        while batch.len() < BATCH_MAX {
            let Ok(job) = received.recv_timeout(until.saturating_duration_since(Instant::now())) else {
                break;
            };
            batch.push(job);
        }
        thread::sleep(Duration::from_micros(5_000 + 100 * batch.len() as u64));
        for (text, reply) in batch {
            // The caller may have left.
            let _ = reply.send(text.to_uppercase());
        }
    }
}
