//! Holds what a request says against the model's signature, however it was written: names, datatypes, shapes, the size of its batch, the outputs that it
//! wants. What comes out fits.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use modalkit_engine::{Datatype, Shape, Signature, Tensor, TensorSpec};
use smallvec::SmallVec;

use super::{elements, form::JSON_CHUNK};
use crate::work::{Detail, JobError, Location};

/// Tensors that a request may have.
pub const TENSORS_MAX: usize = 1024;
/// Bytes of a request's id, which each of its answers repeats.
pub const ID_BYTES_MAX: usize = 1 << 10;
/// Wanted outputs that need no memory of their own: few models have more.
const OUTPUTS_INLINE: usize = 4;
/// Characters of a name that an error repeats, and sizes of a shape.
const SHOWN_CHARS: usize = 80;
const SIZES_SHOWN: usize = 16;
/// Why a region of shared memory is not read.
pub(super) const NO_SHARED_MEMORY: &str =
    "expected the elements in the request: this host has no shared memory";

/// A request that fits its model's signature.
pub struct InferRequest {
    /// Its tensors.
    pub tensors: BatchTensors,
    /// What is wanted back.
    pub wanted: Wanted,
    /// After how long its caller doesn't want an answer any more; `None` where it didn't say.
    pub timeout: Option<Duration>,
}

/// A tensor as its request describes it.
pub(super) struct InputDescription<'a> {
    pub(super) name: &'a str,
    pub(super) datatype: &'a str,
    pub(super) shape: &'a [u64],
}

/// An output as a request names it.
pub(super) struct OutputDescription<'a> {
    pub(super) name: &'a str,
    pub(super) as_bytes: bool,
    /// Its greatest elements are wanted instead of it; 0 where they aren't.
    pub(super) classes: u64,
    pub(super) has_region: bool,
}

/// A request's tensors, of one input or of a batch of them.
#[derive(Clone)]
pub struct BatchTensors {
    pub(super) tensors: Vec<Tensor>,
    /// The size of the batch; `None` where the tensors have no such dimension.
    pub(super) batch: Option<u64>,
}

impl BatchTensors {
    /// How many inputs they are.
    #[must_use]
    pub fn inputs(&self) -> u64 {
        self.batch.unwrap_or(1)
    }

    /// How many bytes of them are strings, which are taken one by one.
    #[must_use]
    pub fn bytes_of_strings(&self) -> usize {
        let strings = self.tensors.iter().filter(|tensor| tensor.datatype() == Datatype::Bytes);
        strings.map(|tensor| tensor.data().len()).sum()
    }

    /// The tensors of each input, without the dimension of the batch.
    #[must_use]
    pub fn into_inputs(self) -> Vec<Arc<[Tensor]>> {
        let Some(rows) = self.batch else {
            return vec![self.tensors.into_iter().map(Tensor::aligned).collect()];
        };
        if rows == 1 {
            return vec![self.tensors.into_iter().filter_map(Tensor::only_row).collect()];
        }
        let mut by_tensor: Vec<_> =
            self.tensors.into_iter().map(|tensor| tensor.rows().into_iter()).collect();
        (0..rows).map(|_| by_tensor.iter_mut().filter_map(Iterator::next).collect()).collect()
    }
}

/// What a request wants back.
pub struct Wanted {
    pub(super) id: Option<String>,
    pub(super) signature: Arc<Signature>,
    /// The outputs by their places there, and whether as bytes.
    places: SmallVec<[(usize, bool); OUTPUTS_INLINE]>,
}

impl Wanted {
    /// Whether the chunks of an output are wanted, which are no part of its end.
    pub fn take_chunks(&mut self) -> bool {
        let before = self.places.len();
        self.places.retain(|(place, _)| *self.signature.outputs[*place].name != *JSON_CHUNK);
        self.places.len() < before
    }

    /// Whether nothing is wanted, or nothing but chunks.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// The outputs in the order in which they are wanted, and whether as bytes.
    pub(super) fn outputs(&self) -> impl ExactSizeIterator<Item = (&TensorSpec, bool)> {
        self.places.iter().map(|(place, as_bytes)| (&self.signature.outputs[*place], *as_bytes))
    }

    /// The request's id, which its answers repeat.
    #[must_use]
    pub fn id(&self) -> &str {
        self.id.as_deref().unwrap_or_default()
    }
}

impl InputDescription<'_> {
    /// The input that it says it is.
    ///
    /// # Errors
    /// There is no such input, or it has another datatype or shape.
    pub(super) fn spec<'s>(
        &self,
        signature: &'s Signature,
        index: usize,
    ) -> Result<&'s TensorSpec, JobError> {
        let Some(spec) = signature.inputs.iter().find(|spec| *spec.name == *self.name) else {
            let known: Vec<&str> = signature.inputs.iter().map(|spec| &*spec.name).collect();
            let found = format!("the model has no input `{}`; expected one of {known:?}", brief(self.name));
            return Err(at(index, "name", found));
        };
        if self.datatype != spec.datatype.name() {
            let found =
                format!("expected {} for `{}`, found {}", spec.datatype, spec.name, brief(self.datatype));
            return Err(at(index, "datatype", found));
        }
        let sizes = if signature.batched { self.shape.get(1..) } else { Some(self.shape) };
        let fits = |sizes: &[u64]| {
            sizes.len() == spec.shape.len()
                && sizes.iter().zip(&spec.shape).all(|(found, size)| size.is_none_or(|size| size == *found))
        };
        if !sizes.is_some_and(fits) {
            let (expected, shown) = (described(spec, signature), self.shape.len().min(SIZES_SHOWN));
            let found = format!("expected {expected} for `{}`, found {:?}", spec.name, &self.shape[..shown]);
            return Err(at(index, "shape", found));
        }
        Ok(spec)
    }

    /// The tensor with these bytes.
    ///
    /// # Errors
    /// They are not its elements.
    pub(super) fn tensor(&self, spec: &TensorSpec, data: Bytes, index: usize) -> Result<Tensor, JobError> {
        Tensor::new(Arc::clone(&spec.name), spec.datatype, Shape::from_slice(self.shape), data)
            .map_err(|error| at(index, "data", error.to_string()))
    }
}

/// Tensors that fit one by one, as a whole.
///
/// # Errors
/// One is there twice or missing, they don't have one batch size, or it is larger than may be.
pub(super) fn whole(
    tensors: Vec<Tensor>,
    signature: &Signature,
    inputs_max: usize,
) -> Result<BatchTensors, JobError> {
    for (index, tensor) in tensors.iter().enumerate() {
        if tensors[..index].iter().any(|known| known.name() == tensor.name()) {
            let found = format!("expected each tensor once, found `{}` again", tensor.name());
            return Err(at(index, "name", found));
        }
    }
    if let Some(missing) = signature
        .inputs
        .iter()
        .find(|spec| !spec.optional && !tensors.iter().any(|tensor| *tensor.name() == *spec.name))
    {
        let expected = format!("expected a tensor `{}` of {}", missing.name, described(missing, signature));
        return Err(invalid(&["inputs".into()], expected));
    }
    let batch = signature.batched.then(|| batch(&tensors, inputs_max)).transpose()?;
    Ok(BatchTensors { tensors, batch })
}

/// No more tensors than a request may have.
pub(super) fn count(tensors: usize) -> Result<(), JobError> {
    if tensors > TENSORS_MAX {
        let found = format!("expected at most {TENSORS_MAX} tensors, found {tensors}");
        return Err(invalid(&["inputs".into()], found));
    }
    Ok(())
}

/// How long a request's caller waits, which it says in microseconds; 0 for as long as usual.
pub(super) fn timeout(microseconds: Option<u64>) -> Option<Duration> {
    microseconds.filter(|timeout| *timeout > 0).map(Duration::from_micros)
}

/// Why a request of a sequence is none here.
pub(super) fn no_sequence() -> JobError {
    invalid(&["parameters".into()], "expected no sequence_id: no model here keeps a state".into())
}

/// The size of a batch, which all of its tensors have.
fn batch(tensors: &[Tensor], inputs_max: usize) -> Result<u64, JobError> {
    let sizes: Vec<u64> = tensors.iter().filter_map(|tensor| tensor.shape().first().copied()).collect();
    let Some(&rows) = sizes.first() else {
        return Err(invalid(&["inputs".into()], "expected a tensor".into()));
    };
    if rows == 0 || sizes.iter().any(|size| *size != rows) {
        let found = format!("expected the same batch size in each tensor, at least 1; found {sizes:?}");
        return Err(invalid(&["inputs".into()], found));
    }
    // Rows of nothing would cost the caller nothing.
    if rows > 1 && tensors.iter().all(|tensor| tensor.data().is_empty()) {
        return Err(invalid(
            &["inputs".into()],
            "expected a batch with elements, found none in any tensor".into(),
        ));
    }
    if rows > inputs_max as u64 {
        return Err(JobError::TooLarge(format!(
            "expected a batch of at most {inputs_max} (queue_max), found {rows}: split it over several requests"
        )));
    }
    Ok(rows)
}

/// The outputs that a request names, or all of them where it names none.
///
/// # Errors
/// One of them isn't there, or can't be given as it is wanted.
pub(super) fn wanted<'a>(
    id: Option<String>,
    all_as_bytes: bool,
    outputs: impl Iterator<Item = OutputDescription<'a>>,
    signature: &Arc<Signature>,
) -> Result<Wanted, JobError> {
    if let Some(id) = id.as_ref().filter(|id| id.len() > ID_BYTES_MAX) {
        let found = format!("expected at most {ID_BYTES_MAX} bytes, found {}", id.len());
        return Err(invalid(&["id".into()], found));
    }
    let mut places = SmallVec::<[(usize, bool); OUTPUTS_INLINE]>::new();
    for (index, output) in outputs.enumerate() {
        let place = ["outputs".into(), Location::Index(index as u64)];
        let Some(at) = signature.outputs.iter().position(|spec| *spec.name == *output.name) else {
            let known: Vec<&str> = signature.outputs.iter().map(|spec| &*spec.name).collect();
            let found =
                format!("the model has no output `{}`; expected one of {known:?}", brief(output.name));
            return Err(invalid(&place, found));
        };
        if places.iter().any(|(known, _)| *known == at) {
            return Err(invalid(&place, format!("expected each output once, found `{}` again", output.name)));
        }
        if output.classes > 0 {
            let found = "expected no `classification`: this host doesn't have that extension";
            return Err(invalid(&place, found.into()));
        }
        if output.has_region {
            return Err(invalid(&place, NO_SHARED_MEMORY.into()));
        }
        places.push((at, output.as_bytes));
    }
    if places.is_empty() {
        places = (0..signature.outputs.len()).map(|place| (place, all_as_bytes)).collect();
    }
    let wanted = Wanted { id, signature: Arc::clone(signature), places };
    if let Some((spec, _)) =
        wanted.outputs().find(|(spec, as_bytes)| !as_bytes && !elements::fit_json(spec.datatype))
    {
        let found = format!(
            "the output `{}` is of {}, which JSON doesn't have: ask for it as bytes (binary_data)",
            spec.name, spec.datatype
        );
        return Err(invalid(&["outputs".into()], found));
    }
    Ok(wanted)
}

pub(super) fn invalid(place: &[Location], msg: String) -> JobError {
    let detail = Detail { loc: vec!["body".into()], msg, kind: "value_error".into() };
    JobError::Invalid(vec![detail.inside(place)])
}

pub(super) fn at(index: usize, member: &str, msg: String) -> JobError {
    invalid(&["inputs".into(), Location::Index(index as u64), member.into()], msg)
}

/// The beginning of what a caller wrote.
fn brief(text: &str) -> String {
    match text.char_indices().nth(SHOWN_CHARS) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

/// A tensor's datatype and shape, for people: `FP32 [batch, 3, any]`.
pub(super) fn described(spec: &TensorSpec, signature: &Signature) -> String {
    let batch = signature.batched.then(|| "batch".to_owned());
    let sizes = spec.shape.iter().map(|size| size.map_or_else(|| "any".to_owned(), |size| size.to_string()));
    let shape: Vec<String> = batch.into_iter().chain(sizes).collect();
    format!("{} [{}]", spec.datatype, shape.join(", "))
}
