//! An ONNX file made ready to run: named inputs and outputs, and one plan for any batch size.

use std::{collections::BTreeSet, sync::Arc};

use modalkit_sdk::PipelineError;
use tract_onnx::{
    pb,
    prelude::*,
    tract_core::ops::cast::cast,
    tract_hir::{infer::Factoid, internal::ensure},
};

/// The element types that requests and answers can carry.
const ELEMENT_TYPES: [DatumType; 7] = [
    DatumType::F32,
    DatumType::F64,
    DatumType::I64,
    DatumType::I32,
    DatumType::I8,
    DatumType::U8,
    DatumType::Bool,
];

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Dim {
    Fixed(usize),
    /// Any size: a name such as `N`, or an expression such as `2*N`.
    Symbolic(String),
}

/// One input or output, as the file names it.
#[derive(Clone, Debug)]
pub(crate) struct Port {
    pub(crate) name: String,
    pub(crate) element: DatumType,
    pub(crate) dims: Vec<Dim>,
}

pub(crate) struct Model {
    pub(crate) inputs: Vec<Port>,
    pub(crate) outputs: Vec<Port>,
    batched: bool,
    plan: Arc<TypedRunnableModel>,
}

impl Model {
    pub(crate) fn load(bytes: &[u8]) -> Result<Self, PipelineError> {
        Self::read(bytes).map_err(|error| PipelineError::permanent(format!("{error:#}")))
    }

    fn read(bytes: &[u8]) -> TractResult<Self> {
        let onnx = onnx();
        let file = onnx.proto_model_for_read(&mut &*bytes)?;
        let graph = checked(&onnx, &file)?;
        // Names are taken before optimising, which renames, merges and drops nodes; the order stays.
        let output_names: Vec<String> = graph.output.iter().map(|output| output.name.clone()).collect();
        let mut model = onnx.model_for_proto_model(&file)?;
        let input_names: Vec<String> =
            model.input_outlets()?.iter().map(|outlet| model.node(outlet.node).name.clone()).collect();
        name_unknown_dims(&mut model, &input_names)?;
        let mut model = model.into_typed()?;
        shapes_as_integers(&mut model)?;
        let model = model.into_optimized()?;
        let inputs = (input_names.into_iter().enumerate())
            .map(|(index, name)| port(name, model.input_fact(index)?))
            .collect::<TractResult<Vec<_>>>()?;
        let outputs = (output_names.into_iter().enumerate())
            .map(|(index, name)| port(name, model.output_fact(index)?))
            .collect::<TractResult<Vec<_>>>()?;
        let batched = share_a_batch_dimension(inputs.iter().chain(&outputs));
        Ok(Self { inputs, outputs, batched, plan: model.into_runnable()? })
    }

    /// Whether one run serves several requests.
    pub(crate) fn is_batched(&self) -> bool {
        self.batched
    }

    /// What one request's part of a port looks like.
    pub(crate) fn item_dims<'p>(&self, port: &'p Port) -> &'p [Dim] {
        if self.batched { &port.dims[1..] } else { &port.dims }
    }

    /// Runs the model; each run has a state of its own.
    pub(crate) fn run(&self, inputs: TVec<TValue>) -> Result<Vec<Tensor>, PipelineError> {
        let outputs =
            self.plan.run(inputs).map_err(|error| PipelineError::permanent(format!("{error:#}")))?;
        Ok(outputs.into_iter().map(TValue::into_tensor).collect())
    }

    pub(crate) fn inputs_text(&self) -> String {
        text(&self.inputs)
    }

    pub(crate) fn outputs_text(&self) -> String {
        text(&self.outputs)
    }
}

/// Shape and element type for people: `f32[N, 64]`.
pub(crate) fn describe(element: DatumType, dims: &[Dim]) -> String {
    let dims: Vec<String> = dims
        .iter()
        .map(|dim| match dim {
            Dim::Fixed(size) => size.to_string(),
            Dim::Symbolic(name) => name.clone(),
        })
        .collect();
    format!("{}[{}]", format!("{element:?}").to_lowercase(), dims.join(", "))
}

fn text(ports: &[Port]) -> String {
    let ports: Vec<String> =
        ports.iter().map(|port| format!("{} {}", port.name, describe(port.element, &port.dims))).collect();
    ports.join(", ")
}

/// tract says little of an operator it doesn't know, and panics over an output that nothing makes.
fn checked<'f>(onnx: &tract_onnx::Onnx, file: &'f pb::ModelProto) -> TractResult<&'f pb::GraphProto> {
    let graph = file
        .graph
        .as_ref()
        .ok_or_else(|| TractError::msg("there is no graph in the file: is it an ONNX model?"))?;
    let unknown: BTreeSet<&str> = graph
        .node
        .iter()
        .map(|node| node.op_type.as_str())
        .filter(|name| !onnx.op_register.0.contains_key(*name))
        .collect();
    ensure!(unknown.is_empty(), "it uses operators that tract doesn't have: {unknown:?}");
    let made: BTreeSet<&str> = (graph.input.iter().map(|input| input.name.as_str()))
        .chain(graph.initializer.iter().map(|constant| constant.name.as_str()))
        .chain(graph.node.iter().flat_map(|node| node.output.iter().map(String::as_str)))
        .collect();
    for output in &graph.output {
        ensure!(made.contains(output.name.as_str()), "nothing in it makes the output `{}`", output.name);
    }
    Ok(graph)
}

/// Gives dimensions without a name one: leading ones share it, others have their own.
fn name_unknown_dims(model: &mut InferenceModel, names: &[String]) -> TractResult<()> {
    let symbols = model.symbols.clone();
    for (index, name) in names.iter().enumerate() {
        let fact = model.input_fact_mut(index)?;
        ensure!(!fact.shape.is_open(), "its input `{name}` declares no shape");
        let rank = fact.shape.rank().concretize().unwrap_or_default();
        for axis in 0..usize::try_from(rank)? {
            if fact.shape.dim(axis).and_then(|dim| dim.concretize()).is_none() {
                let symbol = if axis == 0 { symbols.sym("batch") } else { symbols.new_with_prefix("dim") };
                fact.shape.set_dim(axis, symbol.to_dim());
            }
        }
    }
    Ok(())
}

/// An integer output that is a shape would come back as a symbol; a cast inside the plan puts this run's number there.
fn shapes_as_integers(model: &mut TypedModel) -> TractResult<()> {
    let mut outputs = model.output_outlets()?.to_vec();
    for (index, outlet) in outputs.iter_mut().enumerate() {
        if model.outlet_fact(*outlet)?.datum_type == TDim::datum_type() {
            let name = model.unique_name(format!("output_{index}_as_integer")).into_owned();
            *outlet = model.wire_node(name, cast(i64::datum_type()), &[*outlet])?[0];
        }
    }
    model.select_output_outlets(&outputs)
}

fn port(name: String, fact: &TypedFact) -> TractResult<Port> {
    ensure!(
        ELEMENT_TYPES.contains(&fact.datum_type),
        "`{name}` has elements of type {:?}; expected one of {ELEMENT_TYPES:?}",
        fact.datum_type
    );
    let dims = fact.shape.iter().map(|dim| match dim.to_i64() {
        Ok(size) => Ok(Dim::Fixed(usize::try_from(size)?)),
        Err(_) => Ok(Dim::Symbolic(dim.to_string())),
    });
    Ok(Port { name, element: fact.datum_type, dims: dims.collect::<TractResult<_>>()? })
}

fn share_a_batch_dimension<'p>(mut ports: impl Iterator<Item = &'p Port>) -> bool {
    let Some(first) = ports.next().and_then(|port| port.dims.first()) else { return false };
    matches!(first, Dim::Symbolic(_)) && ports.all(|port| port.dims.first() == Some(first))
}
