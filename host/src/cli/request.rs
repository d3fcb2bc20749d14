//! What a running host can be asked from the command line. It never knows how the host is reached, nor how answers are printed.

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Ask {
    /// All models, or one with its history.
    Models(Option<String>),
    /// A model's plugin, taken from its volume again.
    Reload(String),
    /// A volume, looked through.
    ReloadVolume(String),
    /// A model's generation before.
    RollBack(String),
    /// A model, unloaded.
    Unload(String),
    /// The GPUs.
    Devices,
    /// What is counted, in Prometheus' text format.
    Metrics,
    /// The configuration in force.
    Config,
    /// The configuration, read again.
    ReloadConfig,
    /// What became of a job.
    Job(String, Option<u64>),
    /// A job, taken back.
    CancelJob(String),
    /// A job's result, delivered again.
    Redeliver(String),
    /// Jobs.
    Jobs {
        /// In this state.
        state: Option<String>,
        /// Whose results are so.
        delivery: Option<String>,
        /// Of this model.
        model: Option<String>,
        /// Before this one.
        after: Option<String>,
        /// At most so many.
        limit: usize,
    },
    /// An answer.
    Predict {
        /// Of which model.
        model: Option<String>,
        /// To this JSON.
        input: String,
        /// How it is asked for.
        how: How,
    },
}

/// How an answer is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum How {
    /// And waited for.
    Now,
    /// To each input of a list.
    Batch,
    /// As an asynchronous job.
    Later,
}
