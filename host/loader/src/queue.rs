//! Queue plugins: opened like pipelines, through a symbol and a table of their own.

use std::{collections::BTreeMap, sync::Arc};

use modalkit_abi::{
    HostApi, LogLevel, QUEUE_HANDSHAKE_SYMBOL, QueueDescription, QueueHandle, QueueMessage, QueueModuleRef,
    QueueOpenArgs, Secret,
    abi_stable::std_types::{ROption, RResult},
};

use crate::{
    Failure, FailureKind, LogSink, OpenError, Staged,
    library::{Taken, forward, set_log_sink, take},
};

/// An opened queue plugin. It stays mapped until the process ends.
#[derive(Clone)]
pub struct QueuePlugin {
    shared: Arc<Shared>,
}

struct Shared {
    module: QueueModuleRef,
    description: QueueDescription,
    /// Keeps the file where debuggers look for it.
    staged: Staged,
}

/// An opened queue backend; ended when dropped.
pub struct Queue {
    plugin: QueuePlugin,
    handle: QueueHandle,
}

/// A message as it crosses the boundary.
#[derive(Clone, Copy, Debug)]
pub struct Outgoing<'a> {
    /// The job that it tells of.
    pub job_id: &'a str,
    /// JSON.
    pub body: &'a [u8],
    /// The trace that it belongs to.
    pub traceparent: Option<&'a str>,
}

impl QueuePlugin {
    /// Opens a staged copy.
    ///
    /// # Errors
    /// The file isn't a queue plugin that this host can use; see [`OpenError`].
    pub fn open(staged: &Staged) -> Result<Self, OpenError> {
        let Taken { module, .. } = take::<QueueModuleRef>(staged.path(), QUEUE_HANDSHAKE_SYMBOL)?;
        let description = match module.describe()() {
            RResult::ROk(description) => description,
            RResult::RErr(failure) => return Err(OpenError::Description { reason: failure.message.into() }),
        };
        Ok(Self { shared: Arc::new(Shared { module, description, staged: staged.clone() }) })
    }

    /// Sends what the plugin logs, down to `level`, to `sink`.
    pub fn attach(&self, level: LogLevel, sink: LogSink) {
        set_log_sink(sink);
        self.shared.module.attach()(HostApi { log: forward, level });
    }

    /// Opens a backend; takes as long as the author's `open`.
    ///
    /// # Errors
    /// What the backend's `open` said.
    pub fn backend(
        &self,
        name: &str,
        settings: &str,
        secrets: &BTreeMap<String, String>,
    ) -> Result<Queue, Failure> {
        let secrets: Vec<Secret<'_>> = secrets
            .iter()
            .map(|(name, value)| Secret { name: name.as_str().into(), value: value.as_str().into() })
            .collect();
        let args = QueueOpenArgs {
            backend_name: name.into(),
            settings: settings.into(),
            secrets: secrets.as_slice().into(),
        };
        let opened = self.shared.module.open()(args).into_result();
        opened.map(|handle| Queue { plugin: self.clone(), handle })
    }

    /// The plugin crate's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.shared.description.name
    }

    /// The plugin crate's version.
    #[must_use]
    pub fn version(&self) -> &str {
        &self.shared.description.version
    }

    /// SHA-256 of the file, in hexadecimal.
    #[must_use]
    pub fn sha256(&self) -> &str {
        self.shared.staged.sha256()
    }
}

impl Queue {
    /// Whether messages could be sent.
    ///
    /// # Errors
    /// What the backend's `check` said.
    pub fn check(&self) -> Result<(), Failure> {
        // SAFETY: the handle is of a live backend of this library.
        unsafe { self.plugin.shared.module.check()(self.handle) }.into_result()
    }

    /// Sends messages to a queue, in order; one result each. Takes as long as the author's `send`.
    pub fn send(&self, queue: &str, messages: &[Outgoing<'_>]) -> Vec<Result<(), Failure>> {
        let crossing: Vec<QueueMessage<'_>> = messages
            .iter()
            .map(|message| QueueMessage {
                job_id: message.job_id.into(),
                body: message.body.into(),
                traceparent: message.traceparent.map_or(ROption::RNone, |trace| ROption::RSome(trace.into())),
            })
            .collect();
        // SAFETY: the handle is of a live backend of this library.
        let sent = unsafe {
            self.plugin.shared.module.send()(self.handle, queue.into(), crossing.as_slice().into())
        };
        match sent.into_result() {
            Ok(results) if results.len() == messages.len() => {
                results.into_iter().map(RResult::into_result).collect()
            }
            Ok(results) => {
                let (expected, found) = (messages.len(), results.len());
                let message = format!("the plugin returned {found} results for {expected} messages").into();
                vec![Err(Failure { kind: FailureKind::Panicked, message }); expected]
            }
            Err(failure) => vec![Err(failure); messages.len()],
        }
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        // SAFETY: the handle is of a live backend of this library, and given up here.
        unsafe { self.plugin.shared.module.drop_queue()(self.handle) };
    }
}
