//! What a pipeline says of the tensors that it takes and gives.

use serde::Serialize;

use crate::{Datatype, Tensor};

/// The tensors that a pipeline takes and gives. Sizes of dimensions are those of one input, and -1 stands for any.
///
/// Requests have one more dimension before these, that of the batch: the host takes a request apart into its inputs, batches them with
/// those of others, and puts the outputs together again. The outputs of one request must therefore have the same shape; where they can't,
/// or where the model has no such dimension, say [`Signature::unbatched`].
///
/// ```
/// use modalkit_sdk::{Datatype, Signature};
///
/// let signature = Signature::new()
///     .input("vector", Datatype::Fp32, [384])
///     .optional_input("top_k", Datatype::Int64, [1])
///     .output("rows", Datatype::Int64, [-1])
///     .output("scores", Datatype::Fp32, [-1]);
/// # let _ = signature;
/// ```
#[derive(Clone, Debug, Serialize)]
pub struct Signature {
    inputs: Vec<TensorSpec>,
    outputs: Vec<TensorSpec>,
    batched: bool,
}

#[derive(Clone, Debug, Serialize)]
struct TensorSpec {
    name: String,
    datatype: Datatype,
    shape: Vec<i64>,
    optional: bool,
}

impl Default for Signature {
    fn default() -> Self {
        Self::new()
    }
}

impl Signature {
    /// One of nothing.
    #[must_use]
    pub fn new() -> Self {
        Self { inputs: Vec::new(), outputs: Vec::new(), batched: true }
    }

    /// A tensor that each input has.
    #[must_use]
    pub fn input(mut self, name: impl Into<String>, datatype: Datatype, shape: impl Into<Vec<i64>>) -> Self {
        self.inputs.push(TensorSpec { name: name.into(), datatype, shape: shape.into(), optional: false });
        self
    }

    /// A tensor that an input may have.
    #[must_use]
    pub fn optional_input(
        mut self,
        name: impl Into<String>,
        datatype: Datatype,
        shape: impl Into<Vec<i64>>,
    ) -> Self {
        self.inputs.push(TensorSpec { name: name.into(), datatype, shape: shape.into(), optional: true });
        self
    }

    /// A tensor that each output has.
    #[must_use]
    pub fn output(mut self, name: impl Into<String>, datatype: Datatype, shape: impl Into<Vec<i64>>) -> Self {
        self.outputs.push(TensorSpec { name: name.into(), datatype, shape: shape.into(), optional: false });
        self
    }

    /// Why tensors are not those of an input.
    pub(crate) fn input_misfit(&self, tensors: &[Tensor]) -> Option<String> {
        misfit("input", &self.inputs, tensors)
    }

    /// Why tensors are not those of an output.
    pub(crate) fn output_misfit(&self, tensors: &[Tensor]) -> Option<String> {
        misfit("output", &self.outputs, tensors)
    }

    /// Says that shapes are whole: a request is one input.
    #[must_use]
    pub fn unbatched(mut self) -> Self {
        self.batched = false;
        self
    }
}

fn misfit(kind: &str, specs: &[TensorSpec], tensors: &[Tensor]) -> Option<String> {
    for spec in specs {
        let mut named = tensors.iter().filter(|tensor| tensor.name() == spec.name);
        let (name, expected) = (&spec.name, format!("{} {:?}", spec.datatype, spec.shape));
        match (named.next(), named.next()) {
            (None, _) if spec.optional => {}
            (None, _) => return Some(format!("the signature has an {kind} `{name}`, and there is none")),
            (Some(_), Some(_)) => return Some(format!("the {kind} `{name}` is there twice")),
            (Some(tensor), None) => {
                let sizes = tensor.shape().iter().zip(&spec.shape);
                let fits = tensor.datatype() == spec.datatype
                    && tensor.shape().len() == spec.shape.len()
                    && sizes
                        .into_iter()
                        .all(|(found, size)| *size == -1 || usize::try_from(*size) == Ok(*found));
                if !fits {
                    let (datatype, shape) = (tensor.datatype(), tensor.shape());
                    return Some(format!(
                        "expected {expected} for the {kind} `{name}`, found {datatype} {shape:?}"
                    ));
                }
            }
        }
    }
    let unknown = tensors.iter().find(|tensor| !specs.iter().any(|spec| spec.name == tensor.name()));
    unknown.map(|tensor| format!("the signature has no {kind} `{}`", tensor.name()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_are_held_against_a_signature() {
        let signature =
            Signature::new().input("a", Datatype::Fp32, [-1, 2]).optional_input("b", Datatype::Int64, [1]);
        let a = |shape: [usize; 2]| Tensor::new("a", shape, vec![0.0_f32; shape[0] * shape[1]]).unwrap();
        assert_eq!(signature.input_misfit(&[a([3, 2])]), None);
        for (tensors, expected) in [
            (vec![], "has an input `a`, and there is none"),
            (vec![a([2, 3])], "expected FP32 [-1, 2] for the input `a`, found FP32 [2, 3]"),
            (vec![a([1, 2]), a([1, 2])], "is there twice"),
            (vec![a([1, 2]), a([1, 2]).renamed("c")], "has no input `c`"),
            (vec![a([1, 2]), a([1, 2]).renamed("b")], "expected INT64 [1] for the input `b`"),
        ] {
            let said = signature.input_misfit(&tensors).unwrap();
            assert!(said.contains(expected), "{said}");
        }
    }
}
