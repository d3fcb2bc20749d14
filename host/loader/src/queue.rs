//! Queue plugins: opened like pipelines, through a symbol and a table of their own.

use std::{collections::BTreeMap, sync::Arc};

use modalkit_abi::{
    QUEUE_HANDSHAKE_SYMBOL, QueueHandle, QueueMessage, QueueModuleRef, abi_stable::std_types::ROption,
};
use modalkit_engine::{
    Failure, FailureKind, LogLevel, Outgoing, PluginLog, QueueBackend, QueuePlugin, Staged,
};

use crate::{
    convert, document,
    error::OpenError,
    library::{Library, Taken, described, described_in, host_api, take},
};

/// An opened library of a queue. It stays mapped until the process ends.
#[derive(Clone)]
pub(crate) struct QueueLibrary {
    shared: Arc<Shared>,
}

struct Shared {
    module: QueueModuleRef,
    version: String,
    /// Keeps the file where debuggers look for it.
    staged: Staged,
}

struct LibraryQueue {
    library: QueueLibrary,
    handle: QueueHandle,
}

impl QueueLibrary {
    /// Opens a staged copy.
    ///
    /// # Errors
    /// The file isn't a queue plugin that this host can use; see [`OpenError`].
    pub(crate) fn open(staged: &Staged) -> Result<Self, OpenError> {
        let Taken { module, .. } = take::<QueueModuleRef>(staged.path(), QUEUE_HANDSHAKE_SYMBOL)?;
        let described = described(module.describe()())?;
        let document::QueueDescription { version } = described_in(&described)?;
        Ok(Self { shared: Arc::new(Shared { module, version, staged: staged.clone() }) })
    }
}

impl Library for QueueLibrary {
    fn attach(&self, level: LogLevel, log: &PluginLog) {
        self.shared.module.attach()(host_api(log), convert::level_of_plugins(level));
    }
}

impl QueuePlugin for QueueLibrary {
    fn version(&self) -> &str {
        &self.shared.version
    }

    fn sha256(&self) -> &str {
        self.shared.staged.sha256()
    }

    fn open(
        &self,
        backend_name: &str,
        settings: &str,
        secrets: &BTreeMap<String, String>,
    ) -> Result<Box<dyn QueueBackend>, Failure> {
        let document = document::open(backend_name, settings, secrets)?;
        let handle = convert::result(self.shared.module.open()(document.as_str().into()))?;
        Ok(Box::new(LibraryQueue { library: self.clone(), handle }))
    }
}

impl QueueBackend for LibraryQueue {
    fn check(&self) -> Result<(), Failure> {
        // SAFETY: the handle is of a live backend of this library.
        convert::result(unsafe { self.library.shared.module.check()(self.handle) })
    }

    fn send(&self, queue: &str, messages: &[Outgoing<'_>]) -> Vec<Result<(), Failure>> {
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
            self.library.shared.module.send()(self.handle, queue.into(), crossing.as_slice().into())
        };
        match convert::result(sent) {
            Ok(results) if results.len() == messages.len() => {
                results.into_iter().map(convert::result).collect()
            }
            Ok(results) => {
                let (expected, found) = (messages.len(), results.len());
                let message = format!("the plugin returned {found} results for {expected} messages");
                vec![Err(Failure { kind: FailureKind::Panicked, message }); expected]
            }
            Err(failure) => vec![Err(failure); messages.len()],
        }
    }
}

impl Drop for LibraryQueue {
    fn drop(&mut self) {
        // SAFETY: the handle is of a live backend of this library, and given up here.
        unsafe { self.library.shared.module.drop_queue()(self.handle) };
    }
}
