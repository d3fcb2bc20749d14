//! How a pipeline says that something went wrong, and what can be done about it.

use std::{error::Error, fmt};

use modalkit_abi::{Failure, FailureKind};
use serde::Serialize;

use crate::device::{kind_of_code, kind_of_text};

/// What the caller can do about a [`PipelineError`].
///
/// ```
/// use modalkit_sdk::{ErrorKind, PipelineError};
///
/// assert_eq!(PipelineError::transient("the tokenizer service did not answer").kind(), ErrorKind::Transient);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The input can't be served and would fail again: the caller gets a 422.
    InvalidInput,
    /// The pipeline failed and would fail again: a 500, and no retry.
    Permanent,
    /// The pipeline failed; another try may succeed: a 500.
    Transient,
    /// The device is lost until the process ends: a 503.
    DeviceLost,
}

/// An error of a pipeline, of a whole batch or of one item.
///
/// Any `std::error::Error` becomes a permanent one through `?`, with its causes in the text; one of CUDA becomes what it is: by its code
/// where the SDK's feature `cuda` is on and the error is cudarc's, by its text otherwise. Say more where you know more:
///
/// ```
/// use modalkit_sdk::PipelineError;
///
/// fn read(path: &str) -> Result<String, PipelineError> {
///     Ok(std::fs::read_to_string(path)?)
/// }
///
/// let error = read("/nowhere/weights.bin").unwrap_err().context("reading the weights");
/// assert!(!error.is_retryable());
/// assert!(error.to_string().starts_with("reading the weights: "));
/// assert!(PipelineError::transient("out of device memory").is_retryable());
/// assert!(PipelineError::device_lost("CUDA error 719").is_device_lost());
/// ```
#[derive(Clone, PartialEq, Eq)]
pub struct PipelineError {
    kind: ErrorKind,
    message: String,
    /// The kind was read in the words of an error.
    by_words: bool,
}

impl PipelineError {
    /// The input can't be served: it parsed, but something that only a stage can see is wrong with it.
    ///
    /// ```
    /// # use modalkit_sdk::{ErrorKind, PipelineError};
    /// let error = PipelineError::invalid_input("expected an RGB image, found 4 channels");
    /// assert_eq!(error.kind(), ErrorKind::InvalidInput);
    /// ```
    pub fn invalid_input(message: impl fmt::Display) -> Self {
        Self::new(ErrorKind::InvalidInput, message)
    }

    /// The pipeline failed and would fail again.
    ///
    /// ```
    /// # use modalkit_sdk::PipelineError;
    /// assert!(!PipelineError::permanent("the model has no output `logits`").is_retryable());
    /// ```
    pub fn permanent(message: impl fmt::Display) -> Self {
        Self::new(ErrorKind::Permanent, message)
    }

    /// The pipeline failed, and another try may succeed.
    ///
    /// ```
    /// # use modalkit_sdk::PipelineError;
    /// assert!(PipelineError::transient("out of device memory").is_retryable());
    /// ```
    pub fn transient(message: impl fmt::Display) -> Self {
        Self::new(ErrorKind::Transient, message)
    }

    /// The device under this pipeline is lost until the process ends.
    ///
    /// ```
    /// # use modalkit_sdk::PipelineError;
    /// assert!(PipelineError::device_lost("CUDA error 719").is_device_lost());
    /// ```
    pub fn device_lost(message: impl fmt::Display) -> Self {
        Self::new(ErrorKind::DeviceLost, message)
    }

    /// A result of CUDA other than success, by its number (`CUresult`, `cudaError_t`): for bindings whose errors the SDK doesn't know.
    /// Whether the device is lost, another try may help, or neither, follows from the number.
    ///
    /// ```
    /// # use modalkit_sdk::{ErrorKind, PipelineError};
    /// assert!(PipelineError::cuda(700, "copying the weights").is_device_lost());
    /// assert_eq!(PipelineError::cuda(2, "allocating the batch").kind(), ErrorKind::Transient);
    /// assert_eq!(PipelineError::cuda(1, "launching").kind(), ErrorKind::Permanent);
    /// ```
    pub fn cuda(code: u32, message: impl fmt::Display) -> Self {
        Self::new(kind_of_code(code), format!("{message}: CUDA error {code}"))
    }

    fn new(kind: ErrorKind, message: impl fmt::Display) -> Self {
        Self { kind, message: message.to_string(), by_words: false }
    }

    /// Puts what was being done in front of the message.
    ///
    /// ```
    /// # use modalkit_sdk::PipelineError;
    /// let error = PipelineError::permanent("no such file").context("reading the weights");
    /// assert_eq!(error.to_string(), "reading the weights: no such file");
    /// ```
    #[must_use]
    pub fn context(self, doing: impl fmt::Display) -> Self {
        Self { message: format!("{doing}: {}", self.message), ..self }
    }

    /// What can be done about it.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// Whether the same input may succeed on another try.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        matches!(self.kind, ErrorKind::Transient | ErrorKind::DeviceLost)
    }

    /// Whether the device is lost.
    #[must_use]
    pub fn is_device_lost(&self) -> bool {
        self.kind == ErrorKind::DeviceLost
    }

    pub(crate) fn into_failure(self) -> Failure {
        let kind = match self.kind {
            ErrorKind::InvalidInput => FailureKind::INVALID_INPUT,
            ErrorKind::Permanent => FailureKind::PERMANENT,
            ErrorKind::Transient => FailureKind::TRANSIENT,
            ErrorKind::DeviceLost if self.by_words => FailureKind::DEVICE_SUSPECTED,
            ErrorKind::DeviceLost => FailureKind::DEVICE_LOST,
        };
        failure(kind, self.message)
    }
}

impl fmt::Display for PipelineError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl fmt::Debug for PipelineError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.kind, self.message)
    }
}

// `PipelineError` is no `std::error::Error` itself, or this would overlap with `impl From<T> for T`.
impl<E: Error + 'static> From<E> for PipelineError {
    fn from(error: E) -> Self {
        let mut message = String::new();
        let mut code = None;
        let mut cause: Option<&(dyn Error + 'static)> = Some(&error);
        while let Some(error) = cause {
            let separator = if message.is_empty() { "" } else { ": " };
            message.push_str(separator);
            message.push_str(&error.to_string());
            code = code.or_else(|| cuda_code(error));
            cause = error.source();
        }
        let kind = match code {
            Some(code) => kind_of_code(code),
            None => kind_of_text(&message).unwrap_or(ErrorKind::Permanent),
        };
        Self { kind, message, by_words: code.is_none() }
    }
}

#[cfg(feature = "cuda")]
fn cuda_code(error: &(dyn Error + 'static)) -> Option<u32> {
    error.downcast_ref::<cudarc::driver::DriverError>().map(|error| error.0 as u32)
}

#[cfg(not(feature = "cuda"))]
fn cuda_code(_: &(dyn Error + 'static)) -> Option<u32> {
    None
}

/// Why `validate` turned an input down, and where in it: each fault becomes a `loc` and a `msg` in the list of a 422, of which callers get
/// the first 16.
///
/// ```
/// use modalkit_sdk::Invalid;
///
/// let invalid = Invalid::new("expected at most 512 tokens, found 1024").at("prompt").at(3);
/// assert_eq!(invalid.to_string(), "prompt.3: expected at most 512 tokens, found 1024");
///
/// let both = invalid.and(Invalid::new("expected at least 1, found 0").at("top_k"));
/// assert_eq!(both.to_string(), "prompt.3: expected at most 512 tokens, found 1024; top_k: expected at least 1, found 0");
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Invalid {
    first: Fault,
    more: Vec<Fault>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Fault {
    path: Vec<PathStep>,
    message: String,
}

impl Invalid {
    /// Says what is wrong with the whole input; [`Invalid::at`] narrows it down.
    pub fn new(message: impl fmt::Display) -> Self {
        Self { first: Fault { path: Vec::new(), message: message.to_string() }, more: Vec::new() }
    }

    /// Goes one step further into the input: a member's name or an element's index. Of several faults, this is the last one's step.
    #[must_use]
    pub fn at(mut self, step: impl Into<PathStep>) -> Self {
        self.more.last_mut().unwrap_or(&mut self.first).path.push(step.into());
        self
    }

    /// Says that something else is wrong as well.
    #[must_use]
    pub fn and(mut self, other: Self) -> Self {
        self.more.push(other.first);
        self.more.extend(other.more);
        self
    }

    /// All of these at once; nothing is wrong where there are none.
    ///
    /// ```
    /// use modalkit_sdk::Invalid;
    ///
    /// fn check(values: &[f64]) -> Result<(), Invalid> {
    ///     let negative = values.iter().enumerate().filter(|(_, value)| **value < 0.0);
    ///     Invalid::all(negative.map(|(index, value)| {
    ///         Invalid::new(format!("expected no negative number, found {value}")).at("values").at(index)
    ///     }))
    /// }
    ///
    /// assert!(check(&[1.0]).is_ok());
    /// assert!(check(&[1.0, -2.0, -3.0]).unwrap_err().to_string().contains("values.2: "));
    /// ```
    ///
    /// # Errors
    /// Where there are some.
    pub fn all(faults: impl IntoIterator<Item = Self>) -> Result<(), Self> {
        faults.into_iter().reduce(Self::and).map_or(Ok(()), Err)
    }

    pub(crate) fn into_failure(self) -> Failure {
        // A long list may be wrong in every place; callers get the first ones anyway.
        let faults = || std::iter::once(&self.first).chain(&self.more).take(FAULTS_MAX);
        let message: Vec<String> = faults().map(ToString::to_string).collect();
        let details = serde_json::to_string(&Details { faults: faults().collect() });
        Failure {
            kind: FailureKind::INVALID_INPUT,
            message: message.join("; ").into(),
            // Texts and numbers can be written.
            details: details.unwrap_or_default().into(),
        }
    }
}

/// Faults that leave the plugin.
const FAULTS_MAX: usize = 16;

#[derive(Serialize)]
struct Details<'a> {
    faults: Vec<&'a Fault>,
}

/// A failure that its message says all of.
pub(crate) fn failure(kind: FailureKind, message: String) -> Failure {
    Failure { kind, message: message.into(), details: Default::default() }
}

impl fmt::Display for Invalid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.first)?;
        self.more.iter().try_for_each(|fault| write!(f, "; {fault}"))
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, step) in self.path.iter().enumerate() {
            let dot = if position == 0 { "" } else { "." };
            match step {
                PathStep::Key(key) => write!(f, "{dot}{key}")?,
                PathStep::Index(index) => write!(f, "{dot}{index}")?,
            }
        }
        let colon = if self.path.is_empty() { "" } else { ": " };
        write!(f, "{colon}{}", self.message)
    }
}

/// One step into an input.
///
/// ```
/// use modalkit_sdk::PathStep;
///
/// assert_eq!(PathStep::from("pixels"), PathStep::Key("pixels".into()));
/// assert_eq!(PathStep::from(7), PathStep::Index(7));
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum PathStep {
    /// A member of an object.
    Key(String),
    /// An element of an array, from 0.
    Index(usize),
}

impl From<&str> for PathStep {
    fn from(key: &str) -> Self {
        Self::Key(key.to_owned())
    }
}

impl From<String> for PathStep {
    fn from(key: String) -> Self {
        Self::Key(key)
    }
}

impl From<usize> for PathStep {
    fn from(index: usize) -> Self {
        Self::Index(index)
    }
}
