//! Puts the outputs of a request's inputs together, as they were wanted.

use std::sync::Arc;

use modalkit_engine::{Failure, FailureKind, Tensor};

use super::Wanted;

/// Shapes that an error lists.
const SHAPES_SHOWN: usize = 8;

impl Wanted {
    /// How much of these outputs is copied or written as JSON.
    #[must_use]
    pub fn bytes_to_write(&self, outputs: &[Arc<[Tensor]>]) -> usize {
        let stays = |tensor: &&Tensor| {
            outputs.len() == 1
                && self.outputs().any(|(spec, as_bytes)| as_bytes && *spec.name == *tensor.name())
        };
        let tensors = outputs.iter().flat_map(|output| output.iter());
        tensors.filter(|tensor| !stays(tensor)).map(|tensor| tensor.data().len()).sum()
    }
}

/// The outputs that were wanted, in that order, of each input's output.
///
/// # Errors
/// The outputs are not those of the signature, which is the plugin's fault; or they can't be put together, which is the caller's.
pub fn outputs_of(wanted: &Wanted, outputs: &[Arc<[Tensor]>]) -> Result<Vec<Tensor>, Failure> {
    let failed = |kind, message: String| Failure { kind, message };
    let batched = wanted.signature.batched;
    let mut tensors = Vec::with_capacity(wanted.outputs().len());
    for (spec, _) in wanted.outputs() {
        let name = &spec.name;
        let row = |output: &Arc<[Tensor]>| {
            let mut named = output.iter().filter(|tensor| *tensor.name() == **name);
            let (Some(tensor), None) = (named.next(), named.next()) else {
                let found =
                    format!("the plugin's signature has one output `{name}`, and it gave none or two");
                return Err(failed(FailureKind::Permanent, found));
            };
            if tensor.datatype() != spec.datatype || !fits(tensor.shape(), &spec.shape) {
                let (datatype, shape) = (tensor.datatype(), tensor.shape());
                let size = |size: &Option<u64>| size.map_or("any".to_owned(), |size| size.to_string());
                let sizes: Vec<String> = spec.shape.iter().map(size).collect();
                let found = format!(
                    "the plugin gave {datatype} {shape:?} for its output `{name}`, which is {} [{}] in its signature",
                    spec.datatype,
                    sizes.join(", ")
                );
                return Err(failed(FailureKind::Permanent, found));
            }
            Ok(tensor.clone())
        };
        if let [output] = outputs {
            let row = row(output)?;
            tensors.push(if batched { row.as_batch() } else { row });
            continue;
        }
        let rows = outputs.iter().map(row).collect::<Result<Vec<_>, _>>()?;
        let whole = Tensor::from_rows(&rows).ok_or_else(|| {
            let shapes: Vec<&[u64]> = rows.iter().map(Tensor::shape).take(SHAPES_SHOWN).collect();
            let found = format!(
                "the outputs `{name}` of this request's inputs can't be put together, their shapes are {shapes:?}: ask for each alone"
            );
            failed(FailureKind::InvalidInput, found)
        })?;
        tensors.push(whole);
    }
    Ok(tensors)
}

fn fits(shape: &[u64], spec: &[Option<u64>]) -> bool {
    shape.len() == spec.len()
        && shape.iter().zip(spec).all(|(found, size)| size.is_none_or(|size| size == *found))
}
