//! What is done with a run's outputs before they are answered, where the configuration asks for it: pooling over tokens, softmax, unit length.

use modalkit_sdk::{Datatype, Outcome, PipelineError};
use schemars::JsonSchema;
use serde::Deserialize;

use crate::{
    Settings,
    array::{Array, Elements},
    port::{Port, describe_all},
};

/// The input that says which tokens count, where a model has one.
pub(crate) const MASK: &str = "attention_mask";

/// How the vectors of a text's tokens become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Pooling {
    /// Their mean.
    Mean,
    /// The first one's.
    Cls,
    /// The largest of each place.
    Max,
}

/// Each by the place of the output that it is done to.
pub(crate) struct Finish {
    /// What is answered.
    pub(crate) outputs: Vec<Port>,
    pooling: Option<(usize, Pooling)>,
    softmax: Option<usize>,
    normalize: Option<usize>,
}

impl Finish {
    pub(crate) fn new(mut outputs: Vec<Port>, settings: &Settings) -> Result<Self, PipelineError> {
        let numbers = |port: &Port| matches!(port.datatype, Datatype::Fp32 | Datatype::Fp16 | Datatype::Fp64);
        let pooling = match settings.pooling {
            Some(pooling) => {
                let place = outputs.iter().position(|port| numbers(port) && port.dims.len() == 2);
                let place = place.ok_or_else(|| {
                    PipelineError::permanent(format!(
                        "`pooling` wants an output of tokens' vectors, [tokens, size]; of one request the model gives {}",
                        describe_all(&outputs)
                    ))
                })?;
                outputs[place].dims.remove(0);
                outputs[place].datatype = Datatype::Fp32;
                Some((place, pooling))
            }
            None => None,
        };
        let first = |named: Option<&String>, key: &str| {
            let place = outputs.iter().position(|port| named.is_none_or(|name| port.name == *name));
            place.filter(|place| numbers(&outputs[*place])).ok_or_else(|| {
                PipelineError::permanent(format!(
                    "`{key}` wants an output of numbers with fractions; the model gives {}",
                    describe_all(&outputs)
                ))
            })
        };
        let softmax = settings.softmax.then(|| first(settings.classify.as_ref(), "softmax")).transpose()?;
        let normalize = match (settings.normalize, pooling) {
            (true, Some((place, _))) => Some(place),
            (true, None) => Some(first(None, "normalize")?),
            (false, _) => None,
        };
        for place in softmax.into_iter().chain(normalize) {
            outputs[place].datatype = Datatype::Fp32;
        }
        Ok(Self { outputs, pooling, softmax, normalize })
    }

    /// Of one request's outputs; `mask` says which tokens count, where the model has such an input.
    pub(crate) fn apply(&self, mask: Option<&Array>, mut outputs: Vec<Array>) -> Outcome<Vec<Array>> {
        if let Some((place, pooling)) = self.pooling {
            let mask = mask.and_then(|mask| mask.elements.to_f32());
            outputs[place] = pool(&outputs[place], pooling, mask.as_deref())?;
        }
        if let Some(place) = self.softmax {
            outputs[place] = by_rows(&outputs[place], softmax)?;
        }
        if let Some(place) = self.normalize {
            outputs[place] = by_rows(&outputs[place], unit)?;
        }
        Ok(outputs)
    }
}

fn pool(array: &Array, pooling: Pooling, mask: Option<&[f32]>) -> Outcome<Array> {
    let ([tokens, size], Some(values)) = (&array.shape[..], array.elements.to_f32()) else {
        return Err(PipelineError::permanent(format!(
            "`pooling` wants [tokens, size], and the output has the shape {:?}",
            array.shape
        )));
    };
    let counts = |token: usize| mask.is_none_or(|mask| mask.get(token).is_none_or(|counts| *counts != 0.0));
    let mut rows =
        (0..*tokens).filter(|token| counts(*token)).map(|token| &values[token * size..(token + 1) * size]);
    let Some(first) = rows.next() else {
        return Err(PipelineError::invalid_input(format!(
            "`{MASK}`: expected at least one token that counts, found none"
        )));
    };
    let mut pooled = first.to_vec();
    let mut count = 1.0_f32;
    match pooling {
        Pooling::Cls => {}
        Pooling::Mean => {
            for row in rows {
                pooled.iter_mut().zip(row).for_each(|(sum, value)| *sum += value);
                count += 1.0;
            }
            pooled.iter_mut().for_each(|sum| *sum /= count);
        }
        Pooling::Max => {
            for row in rows {
                pooled.iter_mut().zip(row).for_each(|(largest, value)| *largest = largest.max(*value));
            }
        }
    }
    Array::whole(vec![*size], Elements::F32(pooled))
}

/// Something done to each row of the last dimension.
fn by_rows(array: &Array, row: impl Fn(&mut [f32])) -> Outcome<Array> {
    let Some(mut values) = array.elements.to_f32() else {
        return Err(PipelineError::permanent("expected an output of numbers, found strings"));
    };
    let size = array.shape.last().copied().unwrap_or(1).max(1);
    values.chunks_mut(size).for_each(row);
    Array::whole(array.shape.clone(), Elements::F32(values))
}

fn softmax(row: &mut [f32]) {
    let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    row.iter_mut().for_each(|value| *value = (*value - largest).exp());
    let sum: f32 = row.iter().sum();
    row.iter_mut().for_each(|value| *value /= sum);
}

/// To the length 1; a row of zeros stays.
fn unit(row: &mut [f32]) {
    let length = row.iter().map(|value| value * value).sum::<f32>().sqrt();
    if length > 0.0 {
        row.iter_mut().for_each(|value| *value /= length);
    }
}
