//! Requests that come as tensors: what the model says of them, and the way from their elements to arrays and back.

use std::collections::BTreeMap;

use modalkit_sdk::{Datatype, Invalid, Outcome, PipelineError, Signature, Tensor, Tensors};
use tract_onnx::prelude::DatumType;

use crate::{
    Output,
    array::{Array, Values},
    classify::Classifier,
    model::{Dim, Model, Port},
};

/// The tensor with the labels of the best classes, the best first.
const LABELS: &str = "top_labels";
/// The tensor with their scores.
const SCORES: &str = "top_scores";

/// The model's inputs and outputs, by their own names; none where one has elements that no array holds.
pub(crate) fn signature(model: &Model, classifier: Option<&Classifier>) -> Option<Signature> {
    let mut signature = if model.is_batched() { Signature::new() } else { Signature::new().unbatched() };
    for port in &model.inputs {
        signature = signature.input(port.name.as_str(), datatype(port)?, sizes(model, port));
    }
    for port in &model.outputs {
        signature = signature.output(port.name.as_str(), datatype(port)?, sizes(model, port));
    }
    Some(match classifier {
        Some(_) => signature.output(LABELS, Datatype::Bytes, [-1]).output(SCORES, Datatype::Fp32, [-1]),
        None => signature,
    })
}

fn datatype(port: &Port) -> Option<Datatype> {
    Some(match port.element {
        DatumType::F32 => Datatype::Fp32,
        DatumType::F64 => Datatype::Fp64,
        DatumType::I64 => Datatype::Int64,
        DatumType::I32 => Datatype::Int32,
        DatumType::I8 => Datatype::Int8,
        DatumType::U8 => Datatype::Uint8,
        DatumType::Bool => Datatype::Bool,
        _ => return None,
    })
}

fn sizes(model: &Model, port: &Port) -> Vec<i64> {
    let size = |dim: &Dim| match dim {
        Dim::Fixed(size) => i64::try_from(*size).unwrap_or(i64::MAX),
        Dim::Symbolic(_) => -1,
    };
    model.item_dims(port).iter().map(size).collect()
}

/// One request's arrays.
pub(crate) fn arrays(tensors: Tensors) -> Result<BTreeMap<String, Array>, Invalid> {
    tensors.into_iter().map(|tensor| Ok((tensor.name().to_owned(), array(&tensor)?))).collect()
}

fn array(tensor: &Tensor) -> Result<Array, Invalid> {
    macro_rules! integers {
        ($element:ty) => {
            Values::Integers(tensor.values::<$element>()?.iter().map(|value| i64::from(*value)).collect())
        };
    }
    let values = match tensor.datatype() {
        Datatype::Fp32 => Values::Singles(tensor.values::<f32>()?.to_vec()),
        Datatype::Fp64 => Values::Floats(tensor.values::<f64>()?.to_vec()),
        Datatype::Int64 => integers!(i64),
        Datatype::Int32 => integers!(i32),
        Datatype::Int8 => integers!(i8),
        Datatype::Uint8 | Datatype::Bool => integers!(u8),
        other => return Err(Invalid::new(format!("no model takes {other}")).at(tensor.name())),
    };
    Ok(Array { shape: tensor.shape().to_vec(), values })
}

/// One answer's tensors.
pub(crate) fn tensors(model: &Model, classifies: bool, output: Output) -> Result<Vec<Tensor>, PipelineError> {
    let Output { top, mut outputs, .. } = output;
    let mut tensors = Vec::with_capacity(model.outputs.len() + 2);
    for port in &model.outputs {
        let array = outputs
            .remove(&port.name)
            .ok_or_else(|| PipelineError::permanent(format!("the model gave no output `{}`", port.name)))?;
        tensors.push(tensor(port, array)?);
    }
    if classifies {
        let labels = top.iter().map(|best| best.label.as_bytes());
        tensors.push(Tensor::of_strings(LABELS, [top.len()], labels)?);
        let scores = top.iter().map(|best| best.score).collect();
        tensors.push(Tensor::new::<f32>(SCORES, [top.len()], scores)?);
    }
    Ok(tensors)
}

fn tensor(port: &Port, Array { shape, values }: Array) -> Outcome<Tensor> {
    let name = port.name.as_str();
    macro_rules! integers {
        ($integers:ident, $element:ty) => {
            Tensor::new(
                name,
                shape,
                $integers.into_iter().map(<$element>::try_from).collect::<Result<Vec<_>, _>>()?,
            )
        };
    }
    match (values, port.element) {
        (Values::Singles(values), _) => Tensor::new(name, shape, values),
        (Values::Floats(values), _) => Tensor::new(name, shape, values),
        (Values::Integers(values), DatumType::I64) => Tensor::new(name, shape, values),
        (Values::Integers(values), DatumType::I32) => integers!(values, i32),
        (Values::Integers(values), DatumType::I8) => integers!(values, i8),
        (Values::Integers(values), DatumType::U8) => integers!(values, u8),
        (Values::Integers(values), _) => {
            Tensor::of_bools(name, shape, values.into_iter().map(|value| value != 0))
        }
    }
}
