//! How plugin code fails: of which kind, and in which words.

/// What the caller of a failed call can do about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailureKind {
    /// The input itself can't be served; the same input fails again.
    InvalidInput,
    /// The pipeline failed and would fail again.
    Permanent,
    /// The pipeline failed; the same input may succeed on another try.
    Transient,
    /// The device under the pipeline is lost until the process ends.
    DeviceLost,
    /// It may be, by the words of an error or panic that had no code to give. Words may be anybody's: the driver knows.
    DeviceSuspected,
    /// The plugin's code panicked.
    Panicked,
    /// The process that ran it has died, with all that it was running; which of that did it, nobody knows yet.
    Died,
    /// The process that was to run it had died before.
    NeverBegan,
    /// Nobody wanted the item any more, and the pipeline was told so: no fault of anybody's.
    Unwanted,
}

/// Why a call failed.
#[derive(Clone, Debug)]
pub struct Failure {
    /// What can be done.
    pub kind: FailureKind,
    /// The error and its causes, one line.
    pub message: String,
}

/// One step of the way to a value inside an input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PathSegment {
    /// A member of an object.
    Key(String),
    /// An element of an array, from 0.
    Index(u64),
}

/// One thing that is wrong with an input.
#[derive(Clone, Debug)]
pub struct InputFault {
    /// Where in the input.
    pub path: Vec<PathSegment>,
    /// What is wrong.
    pub message: String,
    /// A short name for the kind of fault, where the pipeline gives one.
    pub kind: Option<String>,
}

/// Why an input was not taken.
#[derive(Clone, Debug)]
pub enum Rejection {
    /// The bytes are not the pipeline's input.
    Malformed {
        /// What the parser said.
        message: String,
    },
    /// The input was parsed, and the pipeline's validation turned it down.
    Invalid {
        /// What is wrong with it; one fault at least.
        faults: Vec<InputFault>,
    },
    /// The plugin failed (or panicked) while it looked at the input.
    Failed(Failure),
    /// The instance is busy changing, so its validation could not run: decode without an instance and validate later.
    Busy,
}
