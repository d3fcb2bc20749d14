//! ONNX Runtime, from a shared library that is found when the first model wants it.

use std::{
    borrow::Cow,
    path::PathBuf,
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use half::f16;
use modalkit_sdk::{Datatype, PipelineError};
use ort::{
    ErrorCode,
    environment::Environment,
    ep,
    logging::LogLevel,
    session::{Session, SessionInputValue, builder::GraphOptimizationLevel},
    value::{DynValue, Tensor},
};

use super::{Engine, RunFault, Wanted};
use crate::{
    array::{Array, Elements},
    port::Port,
};

/// What the library is called where its folder is the linker's to know.
const LIBRARY: &str = "libonnxruntime.so";
/// Where the library's file is named, if not in the configuration.
const LIBRARY_VARIABLE: &str = "ORT_DYLIB_PATH";

/// What it says where there is no memory for a run.
const NO_MEMORY: &str = "Failed to allocate memory";

/// The library can be loaded once in a process, and has one environment, for all models and all their generations.
static ENVIRONMENT: OnceLock<(PathBuf, Environment)> = OnceLock::new();
/// Held while it is loaded.
static LOADING: Mutex<()> = Mutex::new(());

pub(crate) struct OnnxRuntime {
    /// A session runs one batch at a time.
    session: Mutex<Session>,
    inputs: Vec<String>,
    outputs: Vec<(String, Datatype)>,
}

impl OnnxRuntime {
    pub(crate) fn open(wanted: &Wanted<'_>) -> Result<Self, PipelineError> {
        let environment = environment(wanted.library)?;
        let session = session(environment, wanted).map_err(|error| {
            PipelineError::permanent(format!("ONNX Runtime doesn't take it: {}", one_line(&error)))
        })?;
        let inputs = wanted.inputs.iter().map(|port| port.name.clone()).collect();
        let outputs = wanted.outputs.iter().map(|port| (port.name.clone(), port.datatype)).collect();
        Ok(Self { session: Mutex::new(session), inputs, outputs })
    }
}

impl Engine for OnnxRuntime {
    fn name(&self) -> &'static str {
        "onnxruntime"
    }

    fn narrowed(&self, _: &Port) -> Option<(i64, i64)> {
        None
    }

    fn run(&self, inputs: Vec<Array>) -> Result<Vec<Array>, RunFault> {
        let mut values: Vec<(Cow<'_, str>, SessionInputValue<'_>)> = Vec::with_capacity(inputs.len());
        for (name, array) in self.inputs.iter().zip(inputs) {
            // Strings with a NUL in them, say.
            let value = value(array).map_err(|error| RunFault::Input(one_line(&error)))?;
            values.push((name.into(), value.into()));
        }
        let mut session = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        let outputs = session.run(values).map_err(fault)?;
        let array = |(name, datatype): &(String, Datatype)| {
            let value = outputs.get(name).ok_or_else(|| {
                RunFault::Engine(PipelineError::permanent(format!("ONNX Runtime gave no output `{name}`")))
            })?;
            array(value, *datatype).map_err(RunFault::Engine)
        };
        self.outputs.iter().map(array).collect()
    }
}

/// The one environment, made of the library when the first model asks.
fn environment(library: Option<&PathBuf>) -> Result<&'static Environment, PipelineError> {
    let _one_at_a_time = LOADING.lock().unwrap_or_else(PoisonError::into_inner);
    let path = match library {
        Some(path) => path.clone(),
        None => std::env::var_os(LIBRARY_VARIABLE).map_or_else(|| PathBuf::from(LIBRARY), PathBuf::from),
    };
    if let Some((loaded, environment)) = ENVIRONMENT.get() {
        return match library.is_none_or(|_| *loaded == path) {
            true => Ok(environment),
            false => Err(PipelineError::permanent(format!(
                "`library` is {}, and a process can have one ONNX Runtime, which is {} here: name the same for all models, or give this one `isolation = \"process\"`",
                path.display(),
                loaded.display()
            ))),
        };
    }
    let said = |what: String| {
        PipelineError::permanent(format!(
            "ONNX Runtime can't be loaded from {}: {what}. Expected its shared library, 1.24 or later: set `library` to its path (the Python package onnxruntime has it as `onnxruntime/capi/libonnxruntime.so.1.…`), or {LIBRARY_VARIABLE}",
            path.display()
        ))
    };
    let environment = ort::init_from(&path).map_err(|error| said(error.to_string()))?;
    // What fails is an error of whoever asked as well: a request's faults mustn't fill the log.
    let log = |level: LogLevel, _: &str, _: &str, place: &str, said: &str| {
        tracing::debug!(?level, place, said, "ONNX Runtime says");
    };
    let environment = environment
        .with_telemetry(false)
        .with_logger(Arc::new(log))
        .build()
        .map_err(|error| said(one_line(&error)))?;
    tracing::info!(library = %path.display(), build = ort::info(), "ONNX Runtime loaded");
    Ok(&ENVIRONMENT.get_or_init(|| (path, environment)).1)
}

fn session(environment: &Environment, wanted: &Wanted<'_>) -> Result<Session, ort::Error> {
    let mut builder = Session::builder(environment)?
        .with_optimization_level(GraphOptimizationLevel::All)
        .map_err(plain)?
        .with_intra_threads(wanted.threads)
        .map_err(plain)?
        // Other models run on these cores meanwhile.
        .with_intra_op_spinning(false)
        .map_err(plain)?;
    if let Some(device) = wanted.device {
        let ordinal = i32::try_from(device.ordinal()).unwrap_or_default();
        let mut provider = ep::CUDA::default().with_device_id(ordinal);
        if let Some(bytes) = device.memory_budget_bytes() {
            provider = provider.with_memory_limit(usize::try_from(bytes).unwrap_or(usize::MAX));
        }
        // A model that was given a GPU doesn't quietly run beside it.
        builder = builder.with_execution_providers([provider.build().error_on_failure()]).map_err(plain)?;
    }
    builder.commit_from_file(wanted.path)
}

/// What an error says, without the builder that it would give back.
fn plain<R>(error: ort::Error<R>) -> ort::Error {
    ort::Error::new_with_code(error.code(), error.message())
}

fn value(Array { shape, elements }: Array) -> Result<DynValue, ort::Error> {
    macro_rules! value {
        ($($variant:ident)*) => {
            match elements {
                $(Elements::$variant(values) => Tensor::from_array((shape, values))?.into_dyn(),)*
                Elements::Strings(values) => Tensor::from_string_array((shape, values.as_slice()))?.into_dyn(),
            }
        };
    }
    Ok(value!(Bool U8 U16 U32 U64 I8 I16 I32 I64 F16 F32 F64))
}

fn array(value: &DynValue, datatype: Datatype) -> Result<Array, PipelineError> {
    let sizes = |shape: &ort::value::Shape| -> Result<Vec<usize>, PipelineError> {
        shape.iter().map(|size| Ok(usize::try_from(*size)?)).collect()
    };
    macro_rules! array {
        ($($datatype:ident $variant:ident $element:ty),*) => {
            match datatype {
                $(
                    Datatype::$datatype => {
                        let (shape, values) = value.try_extract_tensor::<$element>()?;
                        (sizes(shape)?, Elements::$variant(values.to_vec()))
                    }
                )*
                _ => {
                    let (shape, values) = value.try_extract_strings()?;
                    (sizes(shape)?, Elements::Strings(values))
                }
            }
        };
    }
    let (shape, elements) = array! {
        Bool Bool bool, Uint8 U8 u8, Uint16 U16 u16, Uint32 U32 u32, Uint64 U64 u64, Int8 I8 i8, Int16 I16 i16,
        Int32 I32 i32, Int64 I64 i64, Fp16 F16 f16, Fp32 F32 f32, Fp64 F64 f64
    };
    Array::whole(shape, elements)
}

fn fault(error: ort::Error) -> RunFault {
    // The SDK knows what errors of CUDA mean by their words.
    let of_device = PipelineError::from(std::io::Error::other(one_line(&error)));
    match error.code() {
        _ if of_device.is_device_lost() || of_device.is_retryable() => RunFault::Engine(of_device),
        _ if error.message().contains(NO_MEMORY) => {
            RunFault::Engine(PipelineError::transient(one_line(&error)))
        }
        ErrorCode::RuntimeException | ErrorCode::InvalidArgument | ErrorCode::GenericFailure => {
            RunFault::Input(one_line(&error))
        }
        _ => RunFault::Engine(PipelineError::permanent(one_line(&error))),
    }
}

fn one_line<R>(error: &ort::Error<R>) -> String {
    error.message().split_whitespace().collect::<Vec<_>>().join(" ")
}
