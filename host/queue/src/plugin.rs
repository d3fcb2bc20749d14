//! One's own queue, in a plugin. The plugin's code runs on a thread of its own, one call at a time; a file that comes later, or changes, is
//! taken up between two calls.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::{Duration, Instant, SystemTime},
};

use modalkit_engine::{Failure, FailureKind, Outgoing, QueueBackend, QueuePlugin};
use tokio::sync::{mpsc, oneshot};

use crate::{Answer, Backend, Message, PluginSpec, QueueError};

/// Opens a plugin's file: a private copy, tried in another process first; where a SHA-256 is given, only a file that has it. Blocking.
pub type OpenPlugin = Arc<dyn Fn(&Path, Option<&str>) -> Result<Arc<dyn QueuePlugin>, String> + Send + Sync>;

/// Between two looks at the file.
const BETWEEN_LOOKS: Duration = Duration::from_secs(1);
/// The same where the file was not taken.
const AFTER_A_FAILURE: Duration = Duration::from_secs(3);
/// Calls that wait for the one under way; more wait for their turn to do so.
const WAITING_MAX: usize = 4;

pub(crate) struct PluginQueue {
    work: mpsc::Sender<Call>,
    batch_max: usize,
}

/// One call.
enum Call {
    Check(oneshot::Sender<Result<(), QueueError>>),
    Send { queue: String, messages: Vec<Message>, reply: oneshot::Sender<Vec<Result<(), QueueError>>> },
}

/// What runs on the thread.
struct Worker {
    spec: PluginSpec,
    open: OpenPlugin,
    file: Option<FileVersion>,
    looked: Option<Instant>,
    backend: Result<Box<dyn QueueBackend>, QueueError>,
}

/// Tells one content of a file from another.
#[derive(Clone, Debug, PartialEq, Eq)]
struct FileVersion {
    path: PathBuf,
    length: u64,
    changed: Option<SystemTime>,
}

impl PluginQueue {
    pub(crate) fn open(spec: &PluginSpec, open: &OpenPlugin) -> Self {
        let (work, calls) = mpsc::channel(WAITING_MAX);
        let worker = Worker {
            spec: spec.clone(),
            open: Arc::clone(open),
            file: None,
            looked: None,
            backend: Err(QueueError::Unavailable("its plugin has not been looked for yet".to_owned())),
        };
        let named = thread::Builder::new().name(format!("queue.{}", spec.name));
        if let Err(error) = named.spawn(move || worker.run(calls)) {
            // Its calls will say that nobody is there.
            tracing::error!(backend = spec.name, %error, "can't start the thread of a queue plugin");
        }
        Self { work, batch_max: spec.batch_max }
    }

    /// Waits for its turn; whoever calls has a limit of its own.
    async fn ask(&self, work: Call) -> Result<(), QueueError> {
        self.work.send(work).await.map_err(|_| ended())
    }
}

fn ended() -> QueueError {
    QueueError::Unavailable("the plugin's thread has ended".to_owned())
}

impl Backend for PluginQueue {
    fn check(&self) -> Answer<'_, Result<(), QueueError>> {
        Box::pin(async {
            let (reply, told) = oneshot::channel();
            self.ask(Call::Check(reply)).await?;
            told.await.unwrap_or_else(|_| Err(ended()))
        })
    }

    fn batch_max(&self, _: &str) -> usize {
        self.batch_max
    }

    fn send<'a>(
        &'a self,
        queue: &'a str,
        messages: &'a [Message],
    ) -> Answer<'a, Vec<Result<(), QueueError>>> {
        Box::pin(async move {
            let (reply, told) = oneshot::channel();
            let work = Call::Send { queue: queue.to_owned(), messages: messages.to_vec(), reply };
            match self.ask(work).await {
                Ok(()) => told.await.unwrap_or_else(|_| vec![Err(ended()); messages.len()]),
                Err(error) => vec![Err(error); messages.len()],
            }
        })
    }
}

impl Worker {
    fn run(mut self, mut calls: mpsc::Receiver<Call>) {
        while let Some(work) = calls.blocking_recv() {
            self.look();
            // Whoever asked may have given up.
            match work {
                Call::Check(reply) => drop(reply.send(self.check())),
                Call::Send { queue, messages, reply } => {
                    if !reply.is_closed() {
                        let _ = reply.send(self.send(&queue, &messages));
                    }
                }
            }
        }
    }

    fn check(&self) -> Result<(), QueueError> {
        let backend = self.backend.as_ref().map_err(Clone::clone)?;
        backend.check().map_err(queue_error)
    }

    fn send(&self, queue: &str, messages: &[Message]) -> Vec<Result<(), QueueError>> {
        let backend = match &self.backend {
            Ok(backend) => backend,
            Err(error) => return vec![Err(error.clone()); messages.len()],
        };
        let crossing: Vec<Outgoing<'_>> = messages
            .iter()
            .map(|message| Outgoing {
                job_id: &message.job_id,
                body: &message.body,
                traceparent: message.traceparent.as_deref(),
            })
            .collect();
        let each = |result: Result<(), Failure>| {
            result.map_err(|failure| match failure.kind {
                // Of a message, this says that it will never be taken.
                FailureKind::Permanent | FailureKind::InvalidInput => QueueError::Rejected(failure.message),
                _ => QueueError::Unavailable(failure.message),
            })
        };
        backend.send(queue, &crossing).into_iter().map(each).collect()
    }

    /// Takes up the plugin's file where there is a new one.
    fn look(&mut self) {
        // One that can't be taken is tried in a process of its own each time.
        let pause =
            if self.file.is_some() && self.backend.is_err() { AFTER_A_FAILURE } else { BETWEEN_LOOKS };
        if self.looked.is_some_and(|looked| looked.elapsed() < pause) {
            return;
        }
        self.looked = Some(Instant::now());
        let Some(found) = self.find() else {
            if self.backend.is_err() {
                let names = format!("{0}.so or lib{0}.so", self.spec.plugin);
                self.backend =
                    Err(QueueError::Unavailable(format!("it waits for its plugin {names} in a volume")));
            }
            return;
        };
        if self.file.as_ref() == Some(&found) && self.backend.is_ok() {
            return;
        }
        let opened = (self.open)(&found.path, self.spec.sha256.as_deref()).map_err(QueueError::Unavailable);
        let opened = opened.and_then(|plugin| {
            let opened = plugin.open(&self.spec.name, &self.spec.settings, &self.spec.secrets);
            let opened = opened.map_err(queue_error)?;
            tracing::info!(
                backend = self.spec.name,
                sha256 = plugin.sha256(),
                version = plugin.version(),
                "queue plugin opened"
            );
            Ok(opened)
        });
        match (&self.backend, opened) {
            // The one before goes on.
            (Ok(_), Err(error)) => {
                tracing::error!(backend = self.spec.name, %error, "the changed queue plugin is not taken; the one before goes on");
            }
            (_, opened) => self.backend = opened,
        }
        self.file = Some(found);
    }

    fn find(&self) -> Option<FileVersion> {
        let names = [format!("{}.so", self.spec.plugin), format!("lib{}.so", self.spec.plugin)];
        let paths = self.spec.folders.iter().flat_map(|folder| names.iter().map(|name| folder.join(name)));
        paths.into_iter().find_map(|path| {
            let file = path.metadata().ok().filter(std::fs::Metadata::is_file)?;
            Some(FileVersion { path, length: file.len(), changed: file.modified().ok() })
        })
    }
}

/// An error of the whole backend: a permanent one waits for somebody who changes something.
fn queue_error(failure: Failure) -> QueueError {
    let Failure { kind, message } = failure;
    match kind {
        FailureKind::Permanent | FailureKind::InvalidInput => QueueError::Denied(message),
        _ => QueueError::Unavailable(message),
    }
}
