//! One's own message queue: the trait, and what its exported functions do.
//!
//! Every `unsafe` here rests on the ownership rules in `modalkit_abi::QueueModule`, which the host's loader keeps.

use std::fmt;

use modalkit_abi::{
    Failure, QueueHandle, QueueMessage, QueueModule, QueueModuleRef, Sent,
    abi_stable::{
        library::{LibHeader, RootModuleResult},
        marker_type::ErasedPrefix,
        prefix_type::{PrefixRefTrait, PrefixTypeTrait},
        std_types::{ROk, RResult, RSlice, RStr, RString},
    },
};
use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde_json::json;

use crate::{
    PipelineError,
    context::{Secrets, parse_settings},
    document,
    export::{attach, discard, from_raw, guarded, into_raw},
    forward::{self, serving},
    schema,
};

/// A message queue of one's own, to be exported with [`crate::export_queue_backend!`] from a crate of type `cdylib`.
///
/// The host names it in its configuration (`kind = "plugin"`), and sends results to it: each at least once, from one thread at a
/// time. A result counts as delivered when [`QueueBackend::send`] has said so: before that it must be where it survives.
///
/// ```
/// use std::sync::Mutex;
///
/// use modalkit_sdk::{NoSettings, QueueBackend, QueueContext, QueueError, QueuedMessage, export_queue_backend};
///
/// /// Keeps messages, to be looked at in a debugger.
/// struct Drawer(Mutex<Vec<String>>);
///
/// impl QueueBackend for Drawer {
///     type Settings = NoSettings;
///
///     fn open(_: QueueContext<NoSettings>) -> Result<Self, QueueError> {
///         Ok(Self(Mutex::default()))
///     }
///
///     fn send(&self, queue: &str, messages: &[QueuedMessage<'_>]) -> Vec<Result<(), QueueError>> {
///         let keep = |message: &QueuedMessage<'_>| {
///             let mut drawer = self.0.lock().map_err(|_| QueueError::retry("the drawer is stuck"))?;
///             drawer.push(format!("{queue}: {}", message.job_id));
///             Ok(())
///         };
///         messages.iter().map(keep).collect()
///     }
/// }
///
/// export_queue_backend!(Drawer);
/// ```
pub trait QueueBackend: Send + Sync + Sized + 'static {
    /// Its own keys: `settings` of its entry in `queue_config.backends`. A mistyped key is an error.
    type Settings: DeserializeOwned + JsonSchema;

    /// Opens it. A host tries again, now and then, what fails here.
    ///
    /// # Errors
    /// [`QueueError::refuse`] where somebody has to change something.
    fn open(context: QueueContext<Self::Settings>) -> Result<Self, QueueError>;

    /// Whether messages could be sent now.
    ///
    /// # Errors
    /// As for [`QueueBackend::open`].
    fn check(&self) -> Result<(), QueueError> {
        Ok(())
    }

    /// Sends messages to the queue of this name, in order; one result each, in their order.
    ///
    /// What fails is tried again, but for [`QueueError::refuse`].
    fn send(&self, queue: &str, messages: &[QueuedMessage<'_>]) -> Vec<Result<(), QueueError>>;
}

/// Why a message isn't in its queue, or a backend can't be used.
///
/// Any error becomes one by `?`, and is then tried again: that a message will never be taken has to be said.
///
/// ```
/// use modalkit_sdk::QueueError;
///
/// fn append(path: &str, body: &str) -> Result<(), QueueError> {
///     if body.len() > 1 << 20 {
///         return Err(QueueError::refuse("expected at most a mebibyte"));
///     }
///     std::fs::write(path, body)?;
///     Ok(())
/// }
/// # assert!(append("/nowhere/at/all", "{}").is_err());
/// ```
#[derive(Debug)]
pub struct QueueError(PipelineError);

impl QueueError {
    /// Another try may help.
    #[must_use]
    pub fn retry(message: impl fmt::Display) -> Self {
        Self(PipelineError::transient(message))
    }

    /// Of a message: it will never be taken. Of a backend: somebody has to change something, a wrong password, say.
    #[must_use]
    pub fn refuse(message: impl fmt::Display) -> Self {
        Self(PipelineError::permanent(message))
    }

    /// The same, with what was being done in front.
    #[must_use]
    pub fn context(self, doing: impl fmt::Display) -> Self {
        Self(self.0.context(doing))
    }

    fn into_pipeline_error(self) -> PipelineError {
        self.0
    }
}

impl<E: std::error::Error> From<E> for QueueError {
    fn from(error: E) -> Self {
        let mut text = error.to_string();
        let mut source = error.source();
        while let Some(cause) = source {
            text = format!("{text}: {cause}");
            source = cause.source();
        }
        Self::retry(text)
    }
}

/// What [`QueueBackend::open`] gets.
#[derive(Debug)]
pub struct QueueContext<S> {
    backend_name: String,
    settings: S,
    secrets: Secrets,
}

impl<S> QueueContext<S> {
    /// For tests: a backend of this name with these settings and no secrets.
    #[must_use]
    pub fn new(backend_name: &str, settings: S) -> Self {
        Self { backend_name: backend_name.to_owned(), settings, secrets: Secrets::default() }
    }

    /// The backend's name in the configuration.
    #[must_use]
    pub fn backend_name(&self) -> &str {
        &self.backend_name
    }

    /// Its own keys.
    #[must_use]
    pub fn settings(&self) -> &S {
        &self.settings
    }

    /// A secret that its entry names in `secrets`.
    #[must_use]
    pub fn secret(&self, name: &str) -> Option<&str> {
        self.secrets.0.get(name).map(String::as_str)
    }

    /// The settings, to be kept.
    #[must_use]
    pub fn into_settings(self) -> S {
        self.settings
    }
}

/// A message on its way to a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueuedMessage<'a> {
    /// The job that it tells of: the same when it is sent again.
    pub job_id: &'a str,
    /// One JSON object.
    pub body: &'a str,
    /// The trace that it belongs to, in the form of the header `traceparent`.
    pub traceparent: Option<&'a str>,
}

/// Exports a queue backend as this library's one plugin. The crate's type must be `cdylib`, once in a crate, and without a pipeline
/// beside it.
#[macro_export]
macro_rules! export_queue_backend {
    ($backend:ty) => {
        const _: () = {
            use $crate::__private as private;

            extern "C" fn constructor() -> private::RootModuleResult {
                private::queue_constructor_of::<$backend>(env!("CARGO_PKG_NAME"), env!("CARGO_PKG_VERSION"))
            }

            static HEADER: private::LibHeader = private::queue_header_of(constructor);

            #[unsafe(no_mangle)]
            static modalkit_queue_handshake: private::Handshake =
                private::handshake_of(&HEADER, cfg!(panic = "abort"));

            #[unsafe(no_mangle)]
            static modalkit_plugin_needs: private::Needs = private::NEEDS;
        };
    };
}

#[doc(hidden)]
pub const fn queue_header_of(constructor: extern "C" fn() -> RootModuleResult) -> LibHeader {
    // SAFETY: `export_queue_backend!` passes a constructor that returns what `queue_constructor_of` made: a `QueueModuleRef`.
    unsafe {
        LibHeader::from_constructor::<QueueModuleRef>(
            constructor,
            modalkit_abi::abi_stable::library::CheckTypeLayout::Yes,
        )
    }
}

#[doc(hidden)]
pub fn queue_constructor_of<B: QueueBackend>(name: &'static str, version: &'static str) -> RootModuleResult {
    forward::set_plugin(name, version);
    let module = QueueModule {
        describe: describe::<B>,
        attach,
        open: open::<B>,
        check: check::<B>,
        send: send::<B>,
        drop_queue: drop_queue::<B>,
    };
    // SAFETY: `queue_header_of` names the same type, and abi_stable checks its layout before the host turns it back.
    ROk(unsafe { module.leak_into_prefix().to_prefix_ref().cast::<ErasedPrefix>() })
}

/// An opened backend, and its name for log lines.
struct Opened<B> {
    backend: B,
    name: String,
}

extern "C" fn describe<B: QueueBackend>() -> RResult<RString, Failure> {
    guarded(|| {
        let (name, version) = forward::plugin();
        let settings_schema = schema::of_settings::<B::Settings>();
        let description = json!({"name": name, "version": version, "settings_schema": settings_schema});
        Ok(description.to_string().into())
    })
}

extern "C" fn open<B: QueueBackend>(given: RStr<'_>) -> RResult<QueueHandle, Failure> {
    guarded(|| {
        let given: document::OpenQueue<'_> = document::read("open", given.as_str())?;
        let name = given.backend_name;
        serving(&name);
        let context = QueueContext {
            backend_name: name.clone(),
            settings: parse_settings(given.settings.get())?,
            secrets: Secrets(given.secrets),
        };
        let backend = B::open(context).map_err(QueueError::into_pipeline_error)?;
        let opened = Opened { backend, name };
        Ok(QueueHandle::from_raw(into_raw(opened)))
    })
}

unsafe extern "C" fn check<B: QueueBackend>(queue: QueueHandle) -> RResult<(), Failure> {
    // SAFETY: a live backend of this library.
    let opened = unsafe { opened::<B>(queue) };
    serving(&opened.name);
    guarded(|| opened.backend.check().map_err(QueueError::into_pipeline_error))
}

unsafe extern "C" fn send<B: QueueBackend>(
    queue: QueueHandle,
    name: RStr<'_>,
    messages: RSlice<'_, QueueMessage<'_>>,
) -> RResult<Sent, Failure> {
    // SAFETY: a live backend of this library.
    let opened = unsafe { opened::<B>(queue) };
    serving(&opened.name);
    guarded(|| {
        let text =
            |message| message_of(message).ok_or_else(|| PipelineError::permanent("the message is no UTF-8"));
        let messages = messages.iter().map(text).collect::<Result<Vec<_>, _>>()?;
        let results = opened.backend.send(name.as_str(), &messages);
        if results.len() != messages.len() {
            let (expected, found) = (messages.len(), results.len());
            return Err(PipelineError::transient(format!(
                "the queue backend returned {found} results for {expected} messages"
            )));
        }
        let failure = |error: QueueError| error.into_pipeline_error().into_failure();
        Ok(results.into_iter().map(|result| result.map_err(failure).into()).collect())
    })
}

fn message_of<'a>(message: &'a QueueMessage<'a>) -> Option<QueuedMessage<'a>> {
    Some(QueuedMessage {
        job_id: message.job_id.as_str(),
        body: std::str::from_utf8(message.body.as_slice()).ok()?,
        traceparent: message.traceparent.as_ref().into_option().map(|trace| trace.as_str()),
    })
}

unsafe extern "C" fn drop_queue<B: QueueBackend>(queue: QueueHandle) {
    // SAFETY: a live backend of this library, given up by the caller.
    discard(|| unsafe { from_raw::<Opened<B>>(queue.into_raw()) });
}

/// # Safety
/// A live backend of this library, for as long as the reference is used.
unsafe fn opened<'a, B>(queue: QueueHandle) -> &'a Opened<B> {
    // SAFETY: by the caller's promise.
    unsafe { &*queue.into_raw().cast() }
}
