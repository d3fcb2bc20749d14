//! Requests that come as tensors: what the model says of them, and answers as tensors.

use modalkit_sdk::{Datatype, Invalid, PipelineError, Signature, Tensor, Tensors};

use crate::{
    Output,
    array::Array,
    model::Model,
    port::{Arrays, Dim, Port},
};

/// The tensor with the labels of the best classes, the best first.
const LABELS: &str = "top_labels";
/// The tensor with their scores.
const SCORES: &str = "top_scores";

/// One request's inputs and outputs, by the model's own names.
pub(crate) fn signature(model: &Model, outputs: &[Port], classifies: bool) -> Signature {
    let mut signature = if model.is_batched() { Signature::new() } else { Signature::new().unbatched() };
    for port in &model.item_inputs {
        signature = match model.may_be_left_out(port) {
            true => signature.optional_input(port.name.as_str(), port.datatype, sizes(port)),
            false => signature.input(port.name.as_str(), port.datatype, sizes(port)),
        };
    }
    for port in outputs {
        signature = signature.output(port.name.as_str(), port.datatype, sizes(port));
    }
    match classifies {
        true => signature.output(LABELS, Datatype::Bytes, [-1]).output(SCORES, Datatype::Fp32, [-1]),
        false => signature,
    }
}

fn sizes(port: &Port) -> Vec<i64> {
    let size = |dim: &Dim| match dim {
        Dim::Fixed(size) => i64::try_from(*size).unwrap_or(i64::MAX),
        Dim::Symbolic(_) => -1,
    };
    port.dims.iter().map(size).collect()
}

/// One request's arrays.
pub(crate) fn arrays(tensors: Tensors) -> Result<Arrays, Invalid> {
    tensors.into_iter().map(|tensor| Ok((tensor.name().to_owned(), Array::of_tensor(&tensor)?))).collect()
}

/// One answer's tensors.
pub(crate) fn tensors(
    outputs: &[Port],
    classifies: bool,
    output: Output,
) -> Result<Vec<Tensor>, PipelineError> {
    let Output { top, outputs: mut arrays, .. } = output;
    let mut tensors = Vec::with_capacity(outputs.len() + 2);
    for port in outputs {
        let array = arrays
            .remove(&port.name)
            .ok_or_else(|| PipelineError::permanent(format!("the model gave no output `{}`", port.name)))?;
        tensors.push(array.into_tensor(&port.name)?);
    }
    if classifies {
        let labels = top.iter().map(|best| best.label.as_bytes());
        tensors.push(Tensor::of_strings(LABELS, [top.len()], labels)?);
        let scores = top.iter().map(|best| best.score).collect();
        tensors.push(Tensor::new::<f32>(SCORES, [top.len()], scores)?);
    }
    Ok(tensors)
}
