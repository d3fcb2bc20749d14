//! From requests' arrays to a batch's tensors and back, with errors that say what the model wanted.

use std::collections::BTreeMap;

use modalkit_sdk::{Invalid, PipelineError};
use tract_onnx::prelude::*;

use crate::{
    array::{Array, Values},
    model::{Dim, Model, Port, describe},
};

type Arrays = BTreeMap<String, Array>;

/// Whether a request fits the model: every input there, none unknown, shapes and numbers as declared.
pub(crate) fn check(model: &Model, arrays: &Arrays) -> Result<(), Invalid> {
    for port in &model.inputs {
        let expected = describe(port.element, model.item_dims(port));
        let Some(array) = arrays.get(&port.name) else {
            return Err(
                Invalid::new(format!("field required: `{}`, {expected}", port.name)).at(port.name.as_str())
            );
        };
        let fits = |(size, dim): (&usize, &Dim)| matches!(dim, Dim::Symbolic(_)) || *dim == Dim::Fixed(*size);
        let dims = model.item_dims(port);
        if array.shape.len() != dims.len() || !array.shape.iter().zip(dims).all(fits) {
            let found = format!("expected {expected}, found the shape {:?}", array.shape);
            return Err(Invalid::new(found).at(port.name.as_str()));
        }
        check_numbers(port, array)?;
    }
    match arrays.keys().find(|name| !model.inputs.iter().any(|port| port.name == **name)) {
        Some(unknown) => {
            let found = format!("the model has no input `{unknown}`; expected {}", model.inputs_text());
            Err(Invalid::new(found).at(unknown.as_str()))
        }
        None => Ok(()),
    }
}

fn check_numbers(port: &Port, array: &Array) -> Result<(), Invalid> {
    let (least, most) = match port.element {
        DatumType::I64 => (i64::MIN, i64::MAX),
        DatumType::I32 => (i64::from(i32::MIN), i64::from(i32::MAX)),
        DatumType::I8 => (i64::from(i8::MIN), i64::from(i8::MAX)),
        DatumType::U8 => (0, i64::from(u8::MAX)),
        DatumType::Bool => (0, 1),
        _ => return Ok(()),
    };
    let wrong = |found: String| Invalid::new(found).at(port.name.as_str());
    match &array.values {
        Values::Integers(values) => match values.iter().find(|value| !(least..=most).contains(*value)) {
            Some(value) => {
                Err(wrong(format!("expected whole numbers from {least} to {most}, found {value}")))
            }
            None => Ok(()),
        },
        _ => Err(wrong(format!("expected whole numbers from {least} to {most}, found one with a fraction"))),
    }
}

/// The shapes of a request's arrays, in the order of the model's inputs; equal ones can be joined.
pub(crate) fn shapes(model: &Model, arrays: &Arrays) -> Vec<Vec<usize>> {
    model
        .inputs
        .iter()
        .map(|port| arrays.get(&port.name).map(|array| array.shape.clone()).unwrap_or_default())
        .collect()
}

/// One tensor for each input: the requests' rows, one after the other.
pub(crate) fn join(model: &Model, requests: &[&Arrays]) -> Result<TVec<TValue>, PipelineError> {
    model.inputs.iter().map(|port| join_input(model, port, requests)).collect()
}

fn join_input(model: &Model, port: &Port, requests: &[&Arrays]) -> Result<TValue, PipelineError> {
    let missing = || PipelineError::permanent(format!("`{}` was not validated", port.name));
    let rows: Vec<&Array> =
        requests.iter().map(|arrays| arrays.get(&port.name).ok_or_else(missing)).collect::<Result<_, _>>()?;
    let mut shape = Vec::with_capacity(port.dims.len());
    if model.is_batched() {
        shape.push(rows.len());
    }
    shape.extend_from_slice(&rows.first().ok_or_else(missing)?.shape);
    let tensor = match port.element {
        DatumType::F32 => {
            Tensor::from_shape(&shape, &gather(&rows, |value| value as f32, |value| value as f32))
        }
        DatumType::F64 => Tensor::from_shape(&shape, &gather(&rows, |value| value as f64, |value| value)),
        DatumType::I64 => Tensor::from_shape(&shape, &gather(&rows, |value| value, |value| value as i64)),
        DatumType::I32 => {
            Tensor::from_shape(&shape, &gather(&rows, |value| value as i32, |value| value as i32))
        }
        DatumType::I8 => Tensor::from_shape(&shape, &gather(&rows, |value| value as i8, |value| value as i8)),
        DatumType::U8 => Tensor::from_shape(&shape, &gather(&rows, |value| value as u8, |value| value as u8)),
        DatumType::Bool => {
            Tensor::from_shape(&shape, &gather(&rows, |value| value != 0, |value| value != 0.0))
        }
        other => {
            return Err(PipelineError::permanent(format!("`{}` has elements of type {other:?}", port.name)));
        }
    };
    Ok(tensor.map_err(|error| PipelineError::permanent(format!("{error:#}")))?.into())
}

fn gather<T>(rows: &[&Array], of_integer: impl Fn(i64) -> T, of_float: impl Fn(f64) -> T) -> Vec<T> {
    let mut values = Vec::with_capacity(rows.iter().map(|row| row.values.len()).sum());
    for row in rows {
        match &row.values {
            Values::Integers(integers) => values.extend(integers.iter().map(|value| of_integer(*value))),
            Values::Floats(floats) => values.extend(floats.iter().map(|value| of_float(*value))),
            Values::Singles(singles) => {
                values.extend(singles.iter().map(|value| of_float(f64::from(*value))))
            }
        }
    }
    values
}

/// One request's part of the outputs.
pub(crate) fn row(
    model: &Model,
    outputs: &[Tensor],
    row: usize,
    rows: usize,
) -> Result<Arrays, PipelineError> {
    let part = |(port, tensor): (&Port, &Tensor)| {
        let array = part_of(tensor, model.is_batched().then_some((row, rows)))
            .map_err(|error| PipelineError::permanent(format!("the output `{}`: {error:#}", port.name)))?;
        Ok((port.name.clone(), array))
    };
    model.outputs.iter().zip(outputs).map(part).collect()
}

fn part_of(tensor: &Tensor, row: Option<(usize, usize)>) -> TractResult<Array> {
    let mut shape = tensor.shape().to_vec();
    let mut range = 0..shape.iter().product();
    if let Some((row, rows)) = row {
        if shape.first() != Some(&rows) {
            return Err(TractError::msg(format!("expected {rows} rows, found the shape {shape:?}")));
        }
        shape.remove(0);
        let stride: usize = shape.iter().product();
        range = row * stride..(row + 1) * stride;
    }
    macro_rules! values {
        ($element:ty, $kind:ident, $to:ty) => {{
            let view = tensor.to_plain_array_view::<$element>()?;
            let all = view.as_slice().ok_or_else(|| TractError::msg("its elements don't lie in order"))?;
            Values::$kind(all[range].iter().map(|value| <$to>::from(*value)).collect())
        }};
    }
    let values = match tensor.datum_type() {
        DatumType::F32 => values!(f32, Singles, f32),
        DatumType::F64 => values!(f64, Floats, f64),
        DatumType::I64 => values!(i64, Integers, i64),
        DatumType::I32 => values!(i32, Integers, i64),
        DatumType::I8 => values!(i8, Integers, i64),
        DatumType::U8 => values!(u8, Integers, i64),
        DatumType::Bool => values!(bool, Integers, i64),
        other => return Err(TractError::msg(format!("its elements are of type {other:?}"))),
    };
    Ok(Array { shape, values })
}
