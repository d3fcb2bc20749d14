//! Tensors as every engine takes and gives them, and what a pipeline says of those that it wants.

use std::{fmt, sync::Arc};

use bytes::Bytes;
use smallvec::SmallVec;

/// A tensor's bytes begin at a multiple of this, so that any element can be read where it lies.
pub const TENSOR_ALIGNMENT: usize = 64;
/// The elements that a shape may speak of: no address space holds more bytes.
const ELEMENTS_MAX: u64 = i64::MAX as u64;

/// A tensor's dimensions, the slowest first. Those of most tensors are few, and stand in it.
pub type Shape = SmallVec<[u64; 4]>;

macro_rules! datatypes {
    ($($name:ident $text:literal $size:expr;)*) => {
        /// What a tensor's elements are. Shown, it has its name in the Open Inference Protocol.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[expect(missing_docs, reason = "their names in the protocol say what they are")]
        pub enum Datatype {
            $($name,)*
        }

        impl Datatype {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// Its name in the Open Inference Protocol.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)*
                }
            }

            /// Bytes of an element; `None` where they differ: each string stands after its length, an unsigned number of 32 bits.
            #[must_use]
            pub fn element_bytes(self) -> Option<u64> {
                match self {
                    $(Self::$name => $size,)*
                }
            }
        }
    };
}

datatypes! {
    Bool "BOOL" Some(1);
    Uint8 "UINT8" Some(1);
    Uint16 "UINT16" Some(2);
    Uint32 "UINT32" Some(4);
    Uint64 "UINT64" Some(8);
    Int8 "INT8" Some(1);
    Int16 "INT16" Some(2);
    Int32 "INT32" Some(4);
    Int64 "INT64" Some(8);
    Fp16 "FP16" Some(2);
    Bf16 "BF16" Some(2);
    Fp32 "FP32" Some(4);
    Fp64 "FP64" Some(8);
    Bytes "BYTES" None;
}

impl Datatype {
    /// The one with this name in the Open Inference Protocol.
    #[must_use]
    pub fn of_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|known| known.name() == name)
    }
}

impl fmt::Display for Datatype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Why bytes are not a tensor of a datatype and a shape.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TensorError {
    /// No machine holds as many elements.
    #[error("a tensor of {datatype} and the shape {shape:?} is larger than memory can be")]
    TooLarge {
        /// Its datatype.
        datatype: Datatype,
        /// Its shape.
        shape: Vec<u64>,
    },
    /// There are more bytes, or fewer.
    #[error("expected {expected} bytes for {datatype} and the shape {shape:?}, found {found}")]
    Size {
        /// Bytes that its shape says.
        expected: u64,
        /// Its datatype.
        datatype: Datatype,
        /// Its shape.
        shape: Vec<u64>,
        /// Bytes there are.
        found: usize,
    },
    /// A truth value is none.
    #[error("expected bytes of 0 or 1 for BOOL, found {found}")]
    Bool {
        /// The first other one.
        found: u8,
    },
    /// They are not as many strings as the shape says.
    #[error(
        "expected {expected} strings, each after its length in 32 bits (little-endian), found {found} and {rest} bytes that are none"
    )]
    Strings {
        /// Strings that its shape says.
        expected: u64,
        /// Strings there are.
        found: u64,
        /// Bytes behind them.
        rest: usize,
    },
}

/// A named array of one datatype. A clone shares the elements.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    name: Arc<str>,
    datatype: Datatype,
    shape: Shape,
    data: Bytes,
}

impl Tensor {
    /// A tensor of these bytes: its elements one after the other, little-endian, the last dimension's neighbours side by side.
    ///
    /// # Errors
    /// They are another number of elements than the shape says, or no such elements.
    pub fn new(
        name: Arc<str>,
        datatype: Datatype,
        shape: impl Into<Shape>,
        data: Bytes,
    ) -> Result<Self, TensorError> {
        let shape = shape.into();
        check(datatype, &shape, &data)?;
        Ok(Self { name, datatype, shape, data })
    }

    /// The same, as an input of a pipeline: its bytes begin at a place where any element can be read. They are copied where they don't.
    #[must_use]
    pub fn aligned(self) -> Self {
        Self { data: aligned(self.data), ..self }
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What its elements are.
    #[must_use]
    pub fn datatype(&self) -> Datatype {
        self.datatype
    }

    /// Its dimensions, the slowest first.
    #[must_use]
    pub fn shape(&self) -> &[u64] {
        &self.shape
    }

    /// Its elements' bytes.
    #[must_use]
    pub fn data(&self) -> &Bytes {
        &self.data
    }

    /// The parts of a batch, each without the first dimension, and as an input. None where there is no such dimension.
    #[must_use]
    pub fn rows(self) -> Vec<Self> {
        let Some((rows, shape)) = self.shape.split_first() else { return Vec::new() };
        let Self { name, datatype, data, .. } = &self;
        let part = |data: Bytes| Self {
            name: Arc::clone(name),
            datatype: *datatype,
            shape: shape.into(),
            data: aligned(data),
        };
        let elements: u64 = shape.iter().product();
        let mut start = 0;
        (0..*rows)
            .map(|_| {
                let end = match datatype.element_bytes() {
                    Some(bytes) => start + (elements * bytes) as usize,
                    None => start + strings(&data[start..], elements).1,
                };
                let row = part(data.slice(start..end));
                start = end;
                row
            })
            .collect()
    }

    /// The only part of a batch of one, as [`Tensor::rows`] would give it. `None` of any other.
    #[must_use]
    pub fn only_row(mut self) -> Option<Self> {
        if self.shape.first() != Some(&1) {
            return None;
        }
        self.shape.remove(0);
        Some(self.aligned())
    }

    /// A batch of it alone.
    #[must_use]
    pub fn as_batch(&self) -> Self {
        let mut shape = Shape::with_capacity(self.shape.len() + 1);
        shape.push(1);
        shape.extend_from_slice(&self.shape);
        Self { shape, ..self.clone() }
    }

    /// The parts of a batch put together again: tensors of the same name, datatype and shape. `None` where they aren't, or there are none.
    #[must_use]
    pub fn from_rows(rows: &[Self]) -> Option<Self> {
        let first = rows.first()?;
        let alike =
            |row: &Self| row.name == first.name && row.datatype == first.datatype && row.shape == first.shape;
        if !rows.iter().all(alike) {
            return None;
        }
        let shape = std::iter::once(rows.len() as u64).chain(first.shape.iter().copied()).collect();
        let mut data = Vec::with_capacity(rows.iter().map(|row| row.data.len()).sum());
        rows.iter().for_each(|row| data.extend_from_slice(&row.data));
        Some(Self { name: Arc::clone(&first.name), datatype: first.datatype, shape, data: data.into() })
    }
}

fn check(datatype: Datatype, shape: &[u64], data: &[u8]) -> Result<(), TensorError> {
    let too_large = || TensorError::TooLarge { datatype, shape: shape.to_vec() };
    // Where one size is 0, the others still bound what whoever multiplies them gets.
    let most = shape.iter().try_fold(1_u64, |count, size| count.checked_mul((*size).max(1)));
    most.filter(|most| *most <= ELEMENTS_MAX).ok_or_else(too_large)?;
    let count = shape.iter().product::<u64>();
    match datatype.element_bytes() {
        Some(bytes) => {
            let expected = count.checked_mul(bytes).ok_or_else(too_large)?;
            if expected == data.len() as u64 {
                let truths = if datatype == Datatype::Bool { data } else { &[] };
                let wrong = truths.iter().find(|byte| **byte > 1);
                return wrong.map_or(Ok(()), |found| Err(TensorError::Bool { found: *found }));
            }
            Err(TensorError::Size { expected, datatype, shape: shape.to_vec(), found: data.len() })
        }
        None => {
            let (found, bytes) = strings(data, count);
            if found == count && bytes == data.len() {
                return Ok(());
            }
            Err(TensorError::Strings { expected: count, found, rest: data.len() - bytes })
        }
    }
}

/// How many whole strings the bytes begin with, up to a number of them, and how many bytes these are.
fn strings(data: &[u8], count_max: u64) -> (u64, usize) {
    let (mut count, mut bytes) = (0, 0);
    while count < count_max {
        let Some((length, rest)) = data[bytes..].split_first_chunk::<4>() else { break };
        let length = u32::from_le_bytes(*length) as usize;
        if length > rest.len() {
            break;
        }
        bytes += length.saturating_add(4);
        count += 1;
    }
    (count, bytes)
}

fn aligned(data: Bytes) -> Bytes {
    if data.is_empty() || data.as_ptr().align_offset(TENSOR_ALIGNMENT) == 0 {
        return data;
    }
    let mut copy: Vec<u8> = Vec::with_capacity(data.len() + TENSOR_ALIGNMENT - 1);
    let start = copy.as_ptr().align_offset(TENSOR_ALIGNMENT);
    copy.resize(start, 0);
    copy.extend_from_slice(&data);
    Bytes::from(copy).slice(start..)
}

/// The tensors that a pipeline takes and gives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signature {
    /// What it takes.
    pub inputs: Vec<TensorSpec>,
    /// What it gives.
    pub outputs: Vec<TensorSpec>,
    /// Requests have one more dimension before those of the specifications: that of the batch.
    pub batched: bool,
}

/// What a pipeline says of a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its name.
    pub name: Arc<str>,
    /// What its elements are.
    pub datatype: Datatype,
    /// Its dimensions, each with its size or, for any, none.
    pub shape: Vec<Option<u64>>,
    /// An input may lack it.
    pub optional: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(datatype: Datatype, shape: &[u64], data: &[u8]) -> Result<Tensor, TensorError> {
        Tensor::new("t".into(), datatype, shape.to_vec(), Bytes::copy_from_slice(data))
    }

    #[test]
    fn bytes_are_as_many_as_the_shape_says_and_nothing_overflows() {
        assert!(tensor(Datatype::Fp32, &[2, 3], &[0; 24]).is_ok());
        assert!(tensor(Datatype::Fp32, &[], &[0; 4]).is_ok());
        assert!(tensor(Datatype::Int64, &[0, 7], &[]).is_ok());
        let said =
            |shape: &[u64], bytes| tensor(Datatype::Fp32, shape, &vec![0; bytes]).unwrap_err().to_string();
        assert_eq!(said(&[2, 3], 23), "expected 24 bytes for FP32 and the shape [2, 3], found 23");
        for shape in [&[u64::MAX, 2][..], &[1 << 62, 4], &[1 << 32, 1 << 32], &[u64::MAX]] {
            assert!(said(shape, 8).contains("larger than memory"), "{shape:?}");
        }
        // Of no elements, and of a shape that whoever multiplies its sizes in another order can't hold.
        assert!(said(&[0, u64::MAX], 0).contains("larger than memory"));
        let seven = tensor(Datatype::Bool, &[3], &[0, 1, 7]).unwrap_err().to_string();
        assert_eq!(seven, "expected bytes of 0 or 1 for BOOL, found 7");
    }

    #[test]
    fn strings_are_counted_and_never_read_beyond_their_end() {
        assert!(tensor(Datatype::Bytes, &[2], b"\x01\0\0\0a\0\0\0\0").is_ok());
        for (data, found, rest) in [
            (&b"\x01\0\0\0a"[..], 1, 0),
            (b"\x01\0\0\0a\x02\0\0\0b", 1, 5),
            (b"\xff\xff\xff\xffa", 0, 5),
            (b"\x01\0\0", 0, 3),
            (b"\0\0\0\0\0\0\0\0\0\0\0\0", 2, 4),
        ] {
            let error = tensor(Datatype::Bytes, &[2], data).unwrap_err();
            assert_eq!(error, TensorError::Strings { expected: 2, found, rest }, "{data:?}");
        }
        // A count that no loop gets to the end of.
        assert!(tensor(Datatype::Bytes, &[u64::MAX], b"").is_err());
    }

    #[test]
    fn bytes_begin_where_any_element_can_be_read() {
        let odd = Bytes::from(vec![7; 200]).slice(3..131);
        let tensor = Tensor::new("t".into(), Datatype::Fp64, vec![2, 8], odd.clone()).unwrap();
        assert_eq!(tensor.clone().aligned().data(), &odd);
        for row in tensor.clone().rows().into_iter().chain([tensor.aligned()]) {
            assert_eq!(row.data().as_ptr().align_offset(TENSOR_ALIGNMENT), 0);
        }
    }

    #[test]
    fn a_batch_is_taken_apart_and_put_together_again() {
        let numbers: Vec<u8> = (0..24).collect();
        let strings = b"\x01\0\0\0a\0\0\0\0\x02\0\0\0bc\x01\0\0\0d";
        for (datatype, shape, data) in [
            (Datatype::Int16, vec![3, 2, 2], &numbers[..]),
            (Datatype::Fp64, vec![3], &numbers),
            (Datatype::Fp64, vec![1, 3], &numbers),
            (Datatype::Bytes, vec![2, 2], strings),
            (Datatype::Fp32, vec![2, 0], &[]),
        ] {
            let whole = tensor(datatype, &shape, data).unwrap();
            let rows = whole.clone().rows();
            assert_eq!(rows.len() as u64, shape[0]);
            assert!(rows.iter().all(|row| row.shape() == &shape[1..]));
            assert_eq!(whole.clone().only_row(), rows.first().filter(|_| rows.len() == 1).cloned());
            assert_eq!(Tensor::from_rows(&rows), Some(whole));
        }
        assert_eq!(tensor(Datatype::Fp32, &[], &[0; 4]).unwrap().rows(), []);
        let unlike =
            [tensor(Datatype::Uint8, &[1], &[0]).unwrap(), tensor(Datatype::Uint8, &[2], &[0; 2]).unwrap()];
        assert_eq!(Tensor::from_rows(&unlike), None);
    }
}
