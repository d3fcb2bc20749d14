//! A plugin that is opened in worker processes alone. It never knows how a worker is kept.

use std::{collections::BTreeMap, io, time::Duration};

use modalkit_engine::{
    Checked, Confinement, Decoded, Description, Failure, FailureKind, Instance, Load, LoadError, Measure,
    Payload, Plugin, PluginLog, Rejection, Staged,
};

use crate::{
    documents::{Described, DeviceDocument, Hello, Serves, Task},
    frame::PROTOCOL,
    instance::{WorkerInput, WorkerInstance},
    items,
    python::Interpreter,
    start::{self, Program, Started},
};

/// How a plugin's workers are made.
pub(crate) struct Maker {
    pub(crate) program: Program,
    pub(crate) log: Option<PluginLog>,
    pub(crate) confinement: Confinement,
    /// For a folder of Python.
    pub(crate) interpreter: Option<Interpreter>,
}

/// A plugin, and how its workers are made.
pub(crate) struct WorkerPlugin {
    maker: Maker,
    description: Description,
    /// For what is done beside serving.
    limit: Duration,
}

impl Maker {
    fn start(&self, lanes: usize, hello: Hello) -> io::Result<Started> {
        start::start(&self.program, self.log.as_ref(), &self.confinement, lanes, hello)
    }

    fn hello(&self, task: Task, staged: &Staged) -> Hello {
        Hello {
            protocol: PROTOCOL,
            task,
            file: staged.path().to_owned(),
            origin: staged.origin().to_owned(),
            model_name: staged.origin().file_stem().unwrap_or_default().to_string_lossy().into_owned(),
            all_model_data_folder: String::new(),
            common_settings: "{}".into(),
            application: "{}".into(),
            settings: "{}".into(),
            secrets: BTreeMap::new(),
            devices: Vec::new(),
            confinement: Default::default(),
            python: self.interpreter.as_ref().map(|interpreter| interpreter.document(self.confinement.cores)),
            warnings: Vec::new(),
        }
    }
}

impl WorkerPlugin {
    /// Has a worker open a staged copy and say what it says of itself.
    ///
    /// # Errors
    /// It is no plugin that can be run, or it ended the worker, or took longer than the limit.
    pub(crate) fn open(maker: Maker, staged: &Staged, limit: Duration) -> Result<Self, LoadError> {
        let hello = maker.hello(Task::Describe, staged);
        let failed = |source| LoadError::Preflight { path: maker.program.path.clone(), source };
        let mut started = maker.start(0, hello).map_err(failed)?;
        let answer = started.answer(limit, "it did not open in time");
        let was_killed = started.life.killed_at().is_some();
        started.end();
        let said = answer.map_err(|failure| match failure.kind {
            FailureKind::Died if was_killed => LoadError::Hung { limit },
            FailureKind::Died if staged.path().is_dir() => LoadError::Refused(format!(
                "its worker process died while its modules were imported: {}",
                failure.message
            )),
            FailureKind::Died => LoadError::Crashed { how: failure.message },
            _ => LoadError::Refused(failure.message),
        })?;
        let said: Described =
            items::read(&said).map_err(|garbage| LoadError::Refused(format!("its worker sent {garbage}")))?;
        let description = Description {
            name: said.name,
            version: said.version,
            abi: said.abi,
            sdk: said.sdk,
            rustc: said.rustc,
            has_debug_assertions: said.has_debug_assertions,
            input_schema: said.input_schema,
            output_schema: said.output_schema,
            settings_schema: said.settings_schema,
            staged: staged.clone(),
        };
        Ok(Self { maker, description, limit })
    }

    /// Whether a plugin that is asked for is this one.
    pub(crate) fn is(
        &self,
        staged: &Staged,
        confinement: &Confinement,
        interpreter: Option<&Interpreter>,
    ) -> bool {
        let own = &self.description.staged;
        (own.sha256(), own.environment()) == (staged.sha256(), staged.environment())
            && self.maker.confinement == *confinement
            && self.maker.interpreter.as_ref().map(Interpreter::place) == interpreter.map(Interpreter::place)
    }
}

impl Plugin for WorkerPlugin {
    fn description(&self) -> &Description {
        &self.description
    }

    fn check_settings(&self, settings: &str) -> Result<(), Failure> {
        if self.maker.interpreter.is_some() {
            // They are its constructor's arguments: what it takes, only a load tells.
            return Ok(());
        }
        let mut hello = self.maker.hello(Task::CheckSettings, &self.description.staged);
        settings.clone_into(&mut hello.settings);
        let mut started = self.maker.start(0, hello).map_err(|error| no_worker(&error))?;
        let checked = started.answer(self.limit, "its check of the settings did not end in time");
        started.end();
        checked.map(drop)
    }

    fn is_isolated(&self) -> bool {
        true
    }

    fn measures_inputs(&self) -> bool {
        // A pipeline in Python has nothing to say it with.
        self.maker.interpreter.is_none()
    }

    fn batches_at_once(&self) -> Option<usize> {
        // Of an interpreter, one thread runs the user's code.
        self.maker.interpreter.as_ref().map(|_| 1)
    }

    fn load(&self, with: &Load<'_>) -> Result<Box<dyn Instance>, Failure> {
        let device = |device: &modalkit_engine::Device<'_>| DeviceDocument {
            name: device.name.to_owned(),
            uuid: device.uuid.to_owned(),
            memory_bytes: device.memory_bytes,
            memory_budget_bytes: device.memory_budget_bytes,
        };
        let hello = Hello {
            model_name: with.model_name.to_owned(),
            all_model_data_folder: with.all_model_data_folder.to_owned(),
            common_settings: with.common_settings.to_owned(),
            application: with.application.to_owned(),
            settings: with.settings.to_owned(),
            secrets: with.secrets.clone(),
            devices: with.devices.iter().map(device).collect(),
            ..self.maker.hello(Task::Serve, &self.description.staged)
        };
        let lanes = with.batches_in_flight.max(1);
        let mut started = self.maker.start(lanes, hello).map_err(|error| no_worker(&error))?;
        let late =
            format!("`load` and `warmup` did not return within {:?} (load_timeout_seconds)", with.limit);
        let said = match started.answer(with.limit, &late) {
            Ok(said) => said,
            Err(failure) => {
                // Before its devices count as free.
                started.end();
                return Err(failure);
            }
        };
        let serves = items::read::<Serves>(&said).ok().and_then(|serves| {
            let signature = match serves.signature {
                Some(document) => Some(document.signature()?),
                None => None,
            };
            Some((serves.pid, signature, serves.warnings))
        });
        let Some((pid, signature, warnings)) = serves else {
            let death =
                started.life.wait_for_death(Duration::ZERO, "what it said when it had loaded can't be read");
            return Err(Failure { kind: FailureKind::Died, message: death.how });
        };
        started.life.set_pid(pid);
        started.warnings.extend(warnings);
        let instance =
            WorkerInstance::new(started, signature, self.maker.interpreter.is_some(), self.maker.log);
        Ok(Box::new(instance))
    }

    fn decode(&self, payload: &Payload) -> Result<Decoded, Rejection> {
        Ok(undecoded(payload))
    }
}

/// An input as it came: what it is, the worker says.
pub(crate) fn undecoded(payload: &Payload) -> Decoded {
    Decoded {
        input: Box::new(WorkerInput(payload.clone())),
        measure: Measure { cost: 1, shape: 0 },
        checked: Checked::Nothing,
    }
}

fn no_worker(error: &io::Error) -> Failure {
    Failure { kind: FailureKind::Transient, message: format!("can't start a worker process: {error}") }
}
