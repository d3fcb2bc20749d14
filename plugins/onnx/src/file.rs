//! What an ONNX file says of itself: inputs, outputs, and the tables that its inputs are looked up in. Weights are left to engines.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs::File,
    path::Path,
};

use modalkit_sdk::{Datatype, PipelineError};
use rten_onnx::onnx::{DataType, GraphProto, ModelProto, NodeProto, ValueInfoProto};

use crate::port::{Dim, Port};

/// Operators that hand on their first input's numbers as they are, or in another shape.
const HANDS_ON: [&str; 6] = ["Cast", "Identity", "Unsqueeze", "Squeeze", "Reshape", "Flatten"];
/// Operators whose output has their first input's rows.
const KEEPS_ROWS: [&str; 4] = ["Cast", "Identity", "DequantizeLinear", "Mul"];
/// Of a chain of such operators.
const HANDED_ON_MAX: usize = 16;

#[derive(Debug)]
pub(crate) struct ModelFile {
    pub(crate) inputs: Vec<Port>,
    pub(crate) outputs: Vec<Port>,
    pub(crate) tables: Vec<Table>,
    /// Whether weights have 8 bits.
    pub(crate) is_quantised: bool,
}

/// A table of weights whose rows an input's numbers choose: a vocabulary's embeddings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Table {
    /// The input's name.
    pub(crate) input: String,
    pub(crate) rows: i64,
}

impl ModelFile {
    /// `wanted`: the outputs that are asked for, in their order; all where nothing is said. Others may be what is taken by no engine.
    pub(crate) fn read(path: &Path, wanted: Option<&[String]>) -> Result<Self, PipelineError> {
        let file = File::open(path)?;
        let model = ModelProto::parse_file(file)
            .map_err(|error| PipelineError::permanent(format!("it is no ONNX model: {error}")))?;
        let graph = model
            .graph
            .as_ref()
            .ok_or_else(|| PipelineError::permanent("there is no graph in the file: is it an ONNX model?"))?;
        // Before version 4 of the format, weights stood among the inputs as well.
        let constants: HashSet<&str> =
            graph.initializer.iter().filter_map(|tensor| tensor.name.as_deref()).collect();
        let is_input = |value: &&ValueInfoProto| !constants.contains(name(value));
        let inputs: Vec<Port> = graph
            .input
            .iter()
            .filter(is_input)
            .map(|value| port("input", value))
            .collect::<Result<_, _>>()?;
        let values: Vec<&ValueInfoProto> = match wanted {
            None => graph.output.iter().collect(),
            Some(names) => names
                .iter()
                .map(|wanted| {
                    graph.output.iter().find(|value| name(value) == wanted).ok_or_else(|| {
                        let known: Vec<&str> = graph.output.iter().map(name).collect();
                        PipelineError::permanent(format!(
                            "`outputs` names `{wanted}`; expected some of `{}`",
                            known.join("`, `")
                        ))
                    })
                })
                .collect::<Result<_, _>>()?,
        };
        let outputs: Vec<Port> = (values
            .into_iter()
            .map(|value| port("output", value))
            .collect::<Result<_, _>>())
        .map_err(|error: PipelineError| {
            PipelineError::permanent(format!("{error}. `outputs` in the model's entry can leave it out"))
        })?;
        if let Some(nameless) = outputs.iter().find(|port| !is_made(graph, &constants, &port.name)) {
            return Err(PipelineError::permanent(format!(
                "nothing in it makes the output `{}`",
                nameless.name
            )));
        }
        let tables = tables(graph, &inputs);
        let is_small = |kind: &Option<DataType>| matches!(*kind, Some(DataType::INT8 | DataType::UINT8));
        let is_quantised =
            graph.initializer.iter().any(|tensor| is_small(&tensor.data_type) && tensor.dims.len() > 1);
        Ok(Self { inputs, outputs, tables, is_quantised })
    }

    /// Gives dimensions with names fixed sizes.
    pub(crate) fn pin(&mut self, sizes: &BTreeMap<String, usize>) -> Result<(), PipelineError> {
        self.check_symbols("dimensions", sizes.keys())?;
        for dim in self.inputs.iter_mut().chain(&mut self.outputs).flat_map(|port| &mut port.dims) {
            if let Dim::Symbolic(name) = dim
                && let Some(size) = sizes.get(name)
            {
                *dim = Dim::Fixed(*size);
            }
        }
        Ok(())
    }

    /// Whether these are names of inputs' dimensions of any size; `key` is what names them.
    pub(crate) fn check_symbols<'n>(
        &self,
        key: &str,
        mut names: impl Iterator<Item = &'n String>,
    ) -> Result<(), PipelineError> {
        let dims = self.inputs.iter().flat_map(|port| &port.dims);
        let mut known: Vec<String> = dims
            .filter_map(|dim| if let Dim::Symbolic(name) = dim { Some(name.clone()) } else { None })
            .collect();
        if let Some(unknown) = names.find(|name| !known.contains(*name)) {
            known.sort();
            known.dedup();
            let known = if known.is_empty() {
                "none, its inputs are of fixed sizes".to_owned()
            } else {
                known.join("`, `")
            };
            return Err(PipelineError::permanent(format!(
                "`{key}` names `{unknown}`; the dimensions that can be set are `{known}`"
            )));
        }
        Ok(())
    }
}

fn name(value: &ValueInfoProto) -> &str {
    value.name.as_deref().unwrap_or_default()
}

fn is_made(graph: &GraphProto, constants: &HashSet<&str>, output: &str) -> bool {
    constants.contains(output)
        || graph.input.iter().any(|value| name(value) == output)
        || graph.node.iter().any(|node| node.output.iter().any(|made| made == output))
}

fn port(kind: &str, value: &ValueInfoProto) -> Result<Port, PipelineError> {
    let name = name(value);
    let unfit = |what: &str| Err(PipelineError::permanent(format!("its {kind} `{name}` {what}")));
    let declared = value.r#type.as_ref();
    if declared.is_some_and(|declared| declared.sequence.is_some()) {
        return unfit(
            "is a sequence of tensors; expected a tensor. Export the model with it as a tensor, or as several",
        );
    }
    let Some(tensor) = declared.and_then(|declared| declared.tensor_type.as_ref()) else {
        return unfit("declares no tensor; expected one with the type of its elements");
    };
    let Some(datatype) = tensor.elem_type.and_then(datatype) else {
        let found = tensor.elem_type.map_or_else(|| "none".to_owned(), |found| found.to_string());
        return unfit(&format!(
            "has elements of type {found}; expected numbers of 8 to 64 bits, BOOL or STRING. Export the model with a cast in front"
        ));
    };
    let Some(shape) = &tensor.shape else {
        return match kind {
            // What engines give says it.
            "output" => Ok(Port { name: name.to_owned(), datatype, dims: Vec::new(), is_shaped: false }),
            _ => unfit("declares no shape; expected one, in which sizes may be names"),
        };
    };
    let dim = |(axis, dim): (usize, &rten_onnx::onnx::Dimension)| match (dim.dim_value, &dim.dim_param) {
        (Some(size), _) if usize::try_from(size).is_ok() => {
            Dim::Fixed(usize::try_from(size).unwrap_or_default())
        }
        (_, Some(symbol)) if !symbol.is_empty() && symbol != "?" => Dim::Symbolic(symbol.clone()),
        _ => Dim::Symbolic(format!("{name}.{axis}")),
    };
    let dims = shape.dim.iter().enumerate().map(dim).collect();
    Ok(Port { name: name.to_owned(), datatype, dims, is_shaped: true })
}

fn datatype(number: DataType) -> Option<Datatype> {
    Some(match number {
        DataType::FLOAT => Datatype::Fp32,
        DataType::DOUBLE => Datatype::Fp64,
        DataType::FLOAT16 => Datatype::Fp16,
        DataType::INT8 => Datatype::Int8,
        DataType::INT16 => Datatype::Int16,
        DataType::INT32 => Datatype::Int32,
        DataType::INT64 => Datatype::Int64,
        DataType::UINT8 => Datatype::Uint8,
        DataType::UINT16 => Datatype::Uint16,
        DataType::UINT32 => Datatype::Uint32,
        DataType::UINT64 => Datatype::Uint64,
        DataType::BOOL => Datatype::Bool,
        DataType::STRING => Datatype::Bytes,
        _ => return None,
    })
}

/// The tables whose rows are chosen by an input, directly or handed on.
fn tables(graph: &GraphProto, inputs: &[Port]) -> Vec<Table> {
    // A list, or one row for all, is what a table is multiplied by.
    let rows: HashMap<&str, i64> = graph
        .initializer
        .iter()
        .filter(|tensor| tensor.dims.len() > 1 && tensor.dims[0] > 1)
        .filter_map(|tensor| Some((tensor.name.as_deref()?, *tensor.dims.first()?)))
        .collect();
    let makers: HashMap<&str, &NodeProto> = graph
        .node
        .iter()
        .flat_map(|node| node.output.iter().map(move |output| (output.as_str(), node)))
        .collect();
    let table = |node: &NodeProto| {
        let along_rows = node
            .attribute
            .iter()
            .find(|attribute| attribute.name.as_deref() == Some("axis"))
            .is_none_or(|axis| axis.i.unwrap_or_default() == 0);
        if node.op_type.as_deref() != Some("Gather") || !along_rows {
            return None;
        }
        let weights = source(&makers, node.input.first()?, &KEEPS_ROWS);
        let chosen_by = source(&makers, node.input.get(1)?, &HANDS_ON);
        let port = inputs.iter().find(|port| port.name == chosen_by)?;
        Some(Table { input: port.name.clone(), rows: *rows.get(weights)? })
    };
    graph.node.iter().filter_map(table).collect()
}

/// Where a value comes from, past operators that hand it on.
fn source<'g>(makers: &HashMap<&str, &'g NodeProto>, value: &'g str, operators: &[&str]) -> &'g str {
    let mut value = value;
    for _ in 0..HANDED_ON_MAX {
        let maker = makers
            .get(value)
            .filter(|maker| maker.op_type.as_deref().is_some_and(|operator| operators.contains(&operator)));
        let Some(from) = maker.and_then(|maker| maker.input.first()) else { break };
        value = from;
    }
    value
}
