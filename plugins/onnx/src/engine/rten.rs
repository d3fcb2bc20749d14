//! rten: all operators in this plugin, no library to be found. It has 32 bits for whole numbers of 64 and for truth values, and single precision for
//! double and half: numbers are made into these on the way in, and into what the file declares on the way out.

use std::{
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Arc,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread,
};

use half::f16;
use modalkit_sdk::{Datatype, PipelineError};
use rten::{
    LoadErrorKind, Model, NodeId, RunError, RunErrorKind, RunOptions, ThreadPool, Value, ValueOrView,
};
use rten_tensor::Layout;

use super::{Engine, RunFault, Wanted};
use crate::{
    array::{Array, Elements},
    port::{Port, short},
};

/// What to try where rten doesn't do.
const INSTEAD: &str = "try `engine = \"onnxruntime\"`";

pub(crate) struct Rten {
    inputs: Vec<NodeId>,
    outputs: Vec<Datatype>,
    runs: SyncSender<Run>,
}

type Values = Vec<(NodeId, ValueOrView<'static>)>;
/// A panic is handed on.
type Ran = thread::Result<Result<Vec<Value>, RunError>>;

/// One run, and who waits for it.
struct Run {
    values: Values,
    ran: SyncSender<Ran>,
}

/// Runs that wait for the one under way; more wait where they come from.
const WAITING_RUNS: usize = 4;

impl Rten {
    pub(crate) fn open(wanted: &Wanted<'_>) -> Result<Self, PipelineError> {
        if wanted.device.is_some() {
            return Err(PipelineError::permanent(format!(
                "rten runs on CPUs, and this model was given a GPU: leave `gpu` out, or {INSTEAD}"
            )));
        }
        for (kind, port) in (wanted.inputs.iter().map(|port| ("input", port)))
            .chain(wanted.outputs.iter().map(|port| ("output", port)))
        {
            if !takes(port.datatype) {
                let (name, found) = (&port.name, short(port.datatype));
                return Err(PipelineError::permanent(format!(
                    "its {kind} `{name}` has elements of type {found}; rten has bool, i8, u8, i32, i64, f16, f32 and f64: {INSTEAD}"
                )));
            }
        }
        let model = Model::load_file(wanted.path).map_err(|error| {
            PipelineError::permanent(match error.kind() {
                LoadErrorKind::IoError | LoadErrorKind::ParseError | LoadErrorKind::ExternalDataError => {
                    format!("rten can't read it: {error}")
                }
                _ => format!("rten doesn't take it: {error}: {INSTEAD}"),
            })
        })?;
        let node = |port: &Port| {
            model.node_id(&port.name).map_err(|error| PipelineError::permanent(format!("{error}")))
        };
        let inputs = wanted.inputs.iter().map(node).collect::<Result<_, _>>()?;
        let nodes = wanted.outputs.iter().map(node).collect::<Result<Vec<_>, _>>()?;
        let (runs, queue) = sync_channel(WAITING_RUNS);
        let threads = ThreadPool::with_num_threads(wanted.threads);
        thread::Builder::new()
            .name("rten".to_owned())
            .spawn(move || run_all(&model, &nodes, threads, queue))?;
        Ok(Self { inputs, outputs: wanted.outputs.iter().map(|port| port.datatype).collect(), runs })
    }
}

/// Runs what comes, until nobody can ask any more.
///
/// It does so as one task of the pool, on one of its threads. A task for each run would find that thread looking around for work, which it
/// does for as long as many a small model takes, before it sleeps.
fn run_all(model: &Model, outputs: &[NodeId], threads: ThreadPool, queue: Receiver<Run>) {
    let threads = Arc::new(threads);
    let options = RunOptions::default().with_thread_pool(Some(Arc::clone(&threads)));
    threads.run(move || {
        while let Ok(Run { values, ran }) = queue.recv() {
            let run = || model.run(values, outputs, Some(options.clone()));
            // Whoever waited may have been given up.
            let _ = ran.send(catch_unwind(AssertUnwindSafe(run)));
        }
    });
}

impl Engine for Rten {
    fn name(&self) -> &'static str {
        "rten"
    }

    fn narrowed(&self, port: &Port) -> Option<(i64, i64)> {
        (port.datatype == Datatype::Int64).then_some((i64::from(i32::MIN), i64::from(i32::MAX)))
    }

    fn run(&self, inputs: Vec<Array>) -> Result<Vec<Array>, RunFault> {
        let values = self.inputs.iter().zip(inputs).map(|(node, array)| Ok((*node, value(array)?.into())));
        let values = values.collect::<Result<_, _>>().map_err(RunFault::Engine)?;
        let (ran, outcome) = sync_channel(1);
        let gone = || RunFault::Engine(PipelineError::permanent("rten's thread has ended"));
        self.runs.send(Run { values, ran }).map_err(|_| gone())?;
        let outputs = outcome.recv().map_err(|_| gone())?.unwrap_or_else(|panic| resume_unwind(panic));
        let outputs = outputs.map_err(|error| match error.kind() {
            RunErrorKind::OperatorError | RunErrorKind::InvalidInput => RunFault::Input(error.to_string()),
            _ => RunFault::Engine(PipelineError::permanent(error)),
        })?;
        let arrays = outputs.into_iter().zip(&self.outputs).map(|(value, datatype)| array(value, *datatype));
        arrays.collect::<Result<_, _>>().map_err(RunFault::Engine)
    }
}

fn takes(datatype: Datatype) -> bool {
    use Datatype::{Bool, Fp16, Fp32, Fp64, Int8, Int32, Int64, Uint8};
    matches!(datatype, Bool | Int8 | Uint8 | Int32 | Int64 | Fp16 | Fp32 | Fp64)
}

fn value(Array { shape, elements }: Array) -> Result<Value, PipelineError> {
    let unfit = |found: Datatype| PipelineError::permanent(format!("rten has no elements of {found}"));
    Ok(match elements {
        Elements::F32(values) => Value::from_shape(shape, values)?,
        Elements::F16(values) => {
            Value::from_shape(shape, values.into_iter().map(f16::to_f32).collect::<Vec<_>>())?
        }
        Elements::F64(values) => {
            Value::from_shape(shape, values.into_iter().map(|value| value as f32).collect::<Vec<_>>())?
        }
        Elements::I32(values) => Value::from_shape(shape, values)?,
        Elements::I64(values) => {
            let narrow = values.into_iter().map(i32::try_from).collect::<Result<Vec<_>, _>>()?;
            Value::from_shape(shape, narrow)?
        }
        Elements::Bool(values) => {
            Value::from_shape(shape, values.into_iter().map(i32::from).collect::<Vec<_>>())?
        }
        Elements::I8(values) => Value::from_shape(shape, values)?,
        Elements::U8(values) => Value::from_shape(shape, values)?,
        other => return Err(unfit(other.datatype())),
    })
}

fn array(value: Value, datatype: Datatype) -> Result<Array, PipelineError> {
    let shape = value.shape().to_vec();
    let elements = match (value, datatype) {
        (Value::FloatTensor(tensor), Datatype::Fp64) => {
            Elements::F64(tensor.into_data().into_iter().map(f64::from).collect())
        }
        (Value::FloatTensor(tensor), Datatype::Fp16) => {
            Elements::F16(tensor.into_data().into_iter().map(f16::from_f32).collect())
        }
        (Value::FloatTensor(tensor), _) => Elements::F32(tensor.into_data()),
        (Value::Int32Tensor(tensor), Datatype::Int64) => {
            Elements::I64(tensor.into_data().into_iter().map(i64::from).collect())
        }
        (Value::Int32Tensor(tensor), Datatype::Bool) => {
            Elements::Bool(tensor.into_data().into_iter().map(|value| value != 0).collect())
        }
        (Value::Int32Tensor(tensor), _) => Elements::I32(tensor.into_data()),
        (Value::Int8Tensor(tensor), _) => Elements::I8(tensor.into_data()),
        (Value::UInt8Tensor(tensor), _) => Elements::U8(tensor.into_data()),
        _ => return Err(PipelineError::permanent("an output is no tensor of numbers")),
    };
    if elements.datatype() != datatype {
        let (declared, found) = (short(datatype), short(elements.datatype()));
        return Err(PipelineError::permanent(format!(
            "an output is declared as {declared}, and rten gives {found}: {INSTEAD}"
        )));
    }
    Array::whole(shape, elements)
}
