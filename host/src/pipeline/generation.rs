//! A loaded plugin with a model's settings. It decodes inputs and builds instances, and never knows who runs them.

use std::sync::{
    Arc, OnceLock,
    atomic::{AtomicBool, Ordering},
};

use arc_swap::ArcSwapOption;
use jsonschema::Validator;
use modalkit_device::Lease;
use modalkit_engine::{
    Checked, Decoded, Device, Failure, FailureKind, Instance, Load, Payload, Plugin, Rejection, Signature,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::{batch_stats::BatchStats, inference_stats::InferenceStats, input_faults};
use crate::{
    config::ModelSpec,
    fence::{Fence, Loading},
    work::{Detail, JobError},
};

/// An instance, looked at by many.
pub type SharedInstance = Arc<Box<dyn Instance>>;

/// One version of a model.
pub struct Generation {
    /// Counts the versions of this model, from 1.
    pub number: u64,
    /// The plugin that its instances are loaded from.
    pub plugin: Arc<dyn Plugin>,
    /// The model's settings.
    pub spec: ModelSpec,
    /// Statistics of its batches.
    pub batch_stats: BatchStats,
    /// Sums of what it has done.
    pub inference_stats: InferenceStats,
    /// What is noted of its loads.
    fence: Arc<Fence>,
    /// Whether its replicas take work. Changed under the queue's lock, by `Queue::update_lane_states`, or to
    /// `false` without it, where a probation is failed.
    serves: AtomicBool,
    /// A replica of it has loaded, in this fleet or in one before.
    has_loaded: AtomicBool,
    /// An instance that validates inputs on their way in; `None` while there is none.
    validating: ArcSwapOption<Box<dyn Instance>>,
    /// The signature that its instances had last.
    signature: ArcSwapOption<Signature>,
    /// Whether it has held a connection's thread for too long: it decodes on others then.
    decodes_elsewhere: AtomicBool,
    /// Inputs that are decoded on other threads at once: as many as there are cores. One that hangs starves this generation alone.
    decoding: Arc<Semaphore>,
    /// Built when the first bad input comes.
    input_schema: OnceLock<Option<Validator>>,
}

impl Generation {
    /// A generation without instances.
    pub(crate) fn new(number: u64, plugin: Arc<dyn Plugin>, spec: ModelSpec, fence: Arc<Fence>) -> Arc<Self> {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Arc::new(Self {
            number,
            plugin,
            spec,
            batch_stats: BatchStats::default(),
            inference_stats: InferenceStats::default(),
            fence,
            serves: AtomicBool::new(false),
            has_loaded: AtomicBool::new(false),
            validating: ArcSwapOption::empty(),
            signature: ArcSwapOption::empty(),
            decodes_elsewhere: AtomicBool::new(false),
            decoding: Arc::new(Semaphore::new(cores)),
            input_schema: OnceLock::new(),
        })
    }

    /// Whether its replicas take work.
    #[must_use]
    pub fn serves(&self) -> bool {
        self.serves.load(Ordering::SeqCst)
    }

    /// Batches that each of its replicas runs at once.
    #[must_use]
    pub fn batches_in_flight(&self) -> usize {
        let wanted = self.spec.replicas.batches_in_flight;
        self.plugin.batches_at_once().map_or(wanted, |most| most.min(wanted))
    }

    /// Whether a replica of it has loaded, in this fleet or in one before.
    #[must_use]
    pub fn has_loaded(&self) -> bool {
        self.has_loaded.load(Ordering::SeqCst)
    }

    /// A replica of it has loaded.
    pub fn note_loaded(&self) {
        self.has_loaded.store(true, Ordering::SeqCst);
    }

    /// Marks the generation as serving, or not.
    pub fn set_serves(&self, serves: bool) {
        self.serves.store(serves, Ordering::SeqCst);
    }

    /// Whether inputs of any size are decoded on other threads than connections'.
    #[must_use]
    pub fn decodes_elsewhere(&self) -> bool {
        self.decodes_elsewhere.load(Ordering::Relaxed)
    }

    /// Has all inputs decoded on other threads from now on; says whether that is new.
    pub fn decode_elsewhere(&self) -> bool {
        !self.decodes_elsewhere.swap(true, Ordering::Relaxed)
    }

    /// Waits for a turn to decode on another thread.
    ///
    /// # Errors
    /// Never: the turns last as long as the generation.
    pub async fn decoding_turn(&self) -> Result<OwnedSemaphorePermit, JobError> {
        Arc::clone(&self.decoding).acquire_owned().await.map_err(|_| JobError::Lost)
    }

    /// Parses and validates one input. Runs code of the plugin, which is why large inputs come here on other threads
    /// than the runtime's.
    ///
    /// # Errors
    /// [`JobError::Invalid`] with details, or [`JobError::Failed`] where the plugin failed.
    pub fn decode(&self, input: &Payload) -> Result<Decoded, JobError> {
        let decoded = match &*self.validating.load() {
            Some(instance) => match instance.decode(input) {
                // The replica that runs it will validate it.
                Err(Rejection::Busy) => self.plugin.decode(input),
                decoded => decoded,
            },
            None => self.plugin.decode(input),
        };
        let decoded = decoded.map_err(|rejection| self.rejected(rejection, input))?;
        self.check_schema(input)?;
        Ok(decoded)
    }

    /// Parses and validates inputs before any of them is queued; one result each, in order. Where the plugin is in a process of its own, that is
    /// asked and waited for: not on a thread that others need.
    pub fn decode_each<'i>(
        &'i self,
        inputs: &'i [Payload],
    ) -> Box<dyn Iterator<Item = Result<Decoded, JobError>> + 'i> {
        let validating = self.validating.load_full().filter(|instance| instance.process().is_some());
        let Some(instance) = validating else {
            return Box::new(inputs.iter().map(|input| self.decode(input)));
        };
        let decoded: Vec<Result<Decoded, JobError>> = inputs.iter().map(|input| self.decode(input)).collect();
        let measured = {
            let all: Vec<&Decoded> = decoded.iter().flatten().collect();
            instance.validate(&all)
        };
        let mut measured = measured.into_iter();
        let each = move |(decoded, input): (Result<Decoded, JobError>, &Payload)| {
            let mut decoded = decoded?;
            match measured.next() {
                Some(Ok(measure)) => (decoded.measure, decoded.checked) = (measure, Checked::Validated),
                // What could not be looked at now is, where it runs.
                None | Some(Err(Rejection::Busy)) => {}
                Some(Err(Rejection::Failed(failure))) if failure.kind == FailureKind::Died => {
                    decoded.checked = Checked::Suspect;
                }
                Some(Err(rejection)) => return Err(self.rejected(rejection, input)),
            }
            Ok(decoded)
        };
        Box::new(decoded.into_iter().zip(inputs).map(each))
    }

    /// Whether a process has to be asked what an input costs and with what it fits, and can say so.
    #[must_use]
    pub fn is_asked_to_measure(&self) -> bool {
        self.plugin.is_isolated() && self.plugin.measures_inputs()
    }

    /// Parses and validates one input before it is queued. Where the plugin is in a process of its own, the batch has that done; but where inputs are
    /// `measured` before, it is asked now.
    ///
    /// # Errors
    /// As [`Generation::decode`].
    pub fn decode_to_queue(&self, input: &Payload, measured: bool) -> Result<Decoded, JobError> {
        if measured {
            let decoded = self.decode_each(std::slice::from_ref(input)).next();
            return decoded.unwrap_or(Err(JobError::Lost));
        }
        self.decode(input)
    }

    /// Of so many bytes of one input, those that are parsed when it comes: none where its batch has that done in another process, all there could be
    /// where that is asked before since inputs are `measured`.
    #[must_use]
    pub fn bytes_to_parse(&self, bytes: usize, measured: bool) -> usize {
        match self.plugin.is_isolated() {
            true if measured => usize::MAX,
            true if !self.spec.enforce_schema => 0,
            _ => bytes,
        }
    }

    /// Of so many bytes that a request brings: those that are to be parsed before its inputs are queued; all there could be where a process is
    /// asked about them.
    #[must_use]
    pub fn bytes_to_decode(&self, bytes: usize) -> usize {
        if self.plugin.is_isolated() { usize::MAX } else { bytes }
    }

    /// Whether it is the version that was asked for, where one was.
    ///
    /// # Errors
    /// [`JobError::UnknownVersion`].
    pub fn check_version(&self, version: Option<&str>) -> Result<(), JobError> {
        match version {
            Some(version) if version.parse() != Ok(self.number) => Err(JobError::UnknownVersion {
                model: self.spec.name.clone(),
                version: version.to_owned(),
                serving: self.number,
            }),
            _ => Ok(()),
        }
    }

    /// The tensors that it takes and gives, as its pipeline is loaded now; while no replica serves, as it was before. `None` where it takes
    /// none, and is asked in JSON alone.
    ///
    /// # Errors
    /// [`JobError::Unavailable`] where nobody could be asked yet.
    pub fn signature(&self) -> Result<Option<Arc<Signature>>, JobError> {
        let name = &self.spec.name;
        if let Some(instance) = &*self.validating.load() {
            let signature = instance.signature();
            // A changed one is noted, and not each look at it.
            let noted = self.signature.load().as_ref().map(Arc::as_ptr);
            if noted != signature.as_ref().map(Arc::as_ptr) {
                self.signature.store(signature.clone());
            }
            return Ok(signature);
        }
        if !self.has_loaded() {
            return Err(JobError::Unavailable(format!("no replica of {name} serves now")));
        }
        Ok(self.signature.load_full())
    }

    /// Compares an input that was decoded with its schema, where the model's entry asks for that.
    ///
    /// # Errors
    /// [`JobError::Invalid`].
    pub fn check_schema(&self, input: &Payload) -> Result<(), JobError> {
        // Tensors are held against the signature.
        match (self.input_schema().filter(|_| self.spec.enforce_schema), input.json()) {
            (Some(schema), Some(json)) => input_faults::check(schema, json).map_err(JobError::Invalid),
            _ => Ok(()),
        }
    }

    /// Turns a plugin's rejection into what the caller is told.
    #[must_use]
    pub fn rejected(&self, rejection: Rejection, input: &Payload) -> JobError {
        match rejection {
            Rejection::Malformed { message } => {
                let json = input.json().map_or(&[][..], |json| json);
                JobError::Invalid(input_faults::malformed(self.input_schema(), json, &message))
            }
            Rejection::Invalid { faults } => JobError::Invalid(
                faults.into_iter().take(input_faults::DETAILS_MAX).map(Detail::invalid).collect(),
            ),
            Rejection::Failed(failure) => JobError::Failed(failure),
            Rejection::Busy => JobError::Unavailable(format!("the model {} is changing", self.spec.name)),
        }
    }

    /// Loads and warms up an instance on these devices; takes as long as the author's code.
    ///
    /// # Errors
    /// What `load` or `warmup` said.
    pub fn instance(&self, lease: Option<&Lease>) -> Result<Box<dyn Instance>, Failure> {
        let spec = &self.spec;
        if spec.enforce_schema && self.input_schema().is_none() {
            let message = "enforce_schema is set, and the JSON Schema of the pipeline's input is none that can be checked";
            return Err(Failure { kind: FailureKind::Permanent, message: message.into() });
        }
        let budget = lease.and_then(Lease::memory_mb).map(|memory| memory << 20);
        let leased = lease.into_iter().flat_map(Lease::devices).map(|device| Device {
            ordinal: device.ordinal,
            name: &device.name,
            uuid: &device.uuid,
            memory_bytes: device.memory_bytes,
            memory_budget_bytes: budget,
        });
        let devices: Vec<Device<'_>> = leased.collect();
        let folder = spec.all_model_data_folder.to_string_lossy();
        // A process of its own ends nobody else's.
        let of_host = !self.plugin.is_isolated();
        let loading = of_host.then(|| self.fence.loading(&spec.name, self.plugin.description().sha256()));
        let loading = loading.flatten();
        self.plugin.load(&Load {
            model_name: &spec.name,
            all_model_data_folder: &folder,
            common_settings: &spec.common_settings,
            application: &spec.application,
            settings: &spec.settings.json(),
            secrets: spec.secrets.values(),
            devices: &devices,
            crash_note: loading.as_ref().map(Loading::note),
            batches_in_flight: self.batches_in_flight(),
            limit: spec.replicas.load_timeout,
        })
    }

    /// The instance that validates now, if any.
    #[must_use]
    pub fn validating(&self) -> Option<SharedInstance> {
        self.validating.load_full()
    }

    /// Names the instance that validates from now on.
    pub fn validate_with(&self, instance: Option<SharedInstance>) {
        if let Some(instance) = &instance {
            self.signature.store(instance.signature());
        }
        self.validating.store(instance);
    }

    /// Whether this is an input as the plugin's JSON Schema has it.
    #[must_use]
    pub fn is_of_schema(&self, input: &serde_json::Value) -> bool {
        self.input_schema().is_some_and(|schema| schema.is_valid(input))
    }

    fn input_schema(&self) -> Option<&Validator> {
        let compile = || {
            let schema = serde_json::from_str(&self.plugin.description().input_schema).ok()?;
            jsonschema::validator_for(&schema).inspect_err(|error| {
                tracing::warn!(model = self.spec.name, %error, "the plugin's input schema is no JSON Schema; details of bad inputs will be terse");
            }).ok()
        };
        self.input_schema.get_or_init(compile).as_ref()
    }
}
