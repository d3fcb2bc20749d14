//! Tensors as a pipeline takes and gives them, and what it says of those that it wants. Their bytes are never copied on the way from the host.

use std::{fmt, sync::Arc};

use bytemuck::Pod;
use modalkit_abi::Buffer;
use serde::{Serialize, Serializer};

use crate::{Invalid, PipelineError};

macro_rules! datatypes {
    ($($(#[$doc:meta])* $name:ident = $number:ident $size:expr;)*) => {
        /// What a tensor's elements are. Shown, it has its name in the Open Inference Protocol.
        ///
        /// ```
        /// use modalkit_sdk::Datatype;
        ///
        /// assert_eq!(Datatype::Fp32.to_string(), "FP32");
        /// ```
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[non_exhaustive]
        pub enum Datatype {
            $($(#[$doc])* $name,)*
        }

        impl Datatype {
            fn of(number: modalkit_abi::Datatype) -> Option<Self> {
                match number {
                    $(modalkit_abi::Datatype::$number => Some(Self::$name),)*
                    _ => None,
                }
            }

            fn number(self) -> modalkit_abi::Datatype {
                match self {
                    $(Self::$name => modalkit_abi::Datatype::$number,)*
                }
            }

            /// Bytes of an element; `None` where they differ.
            fn element_bytes(self) -> Option<usize> {
                match self {
                    $(Self::$name => $size,)*
                }
            }
        }

        impl fmt::Display for Datatype {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self {
                    $(Self::$name => stringify!($number),)*
                })
            }
        }
    };
}

datatypes! {
    /// A byte each, 0 or 1; read as `u8`.
    Bool = BOOL Some(1);
    /// `u8`.
    Uint8 = UINT8 Some(1);
    /// `u16`.
    Uint16 = UINT16 Some(2);
    /// `u32`.
    Uint32 = UINT32 Some(4);
    /// `u64`.
    Uint64 = UINT64 Some(8);
    /// `i8`.
    Int8 = INT8 Some(1);
    /// `i16`.
    Int16 = INT16 Some(2);
    /// `i32`.
    Int32 = INT32 Some(4);
    /// `i64`.
    Int64 = INT64 Some(8);
    /// 16 bits of IEEE 754; its bytes alone can be read.
    Fp16 = FP16 Some(2);
    /// The upper half of an `f32`; its bytes alone can be read.
    Bf16 = BF16 Some(2);
    /// `f32`.
    Fp32 = FP32 Some(4);
    /// `f64`.
    Fp64 = FP64 Some(8);
    /// Strings of any bytes.
    Bytes = BYTES None;
}

impl Serialize for Datatype {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A type that elements of tensors have.
pub trait Element: Pod + Send + Sync + sealed::Sealed {
    /// The datatype of tensors that are made of such elements.
    const DATATYPE: Datatype;
}

mod sealed {
    pub trait Sealed {}
}

macro_rules! elements {
    ($($element:ty: $datatype:ident;)*) => {
        $(
            impl sealed::Sealed for $element {}

            impl Element for $element {
                const DATATYPE: Datatype = Datatype::$datatype;
            }
        )*
    };
}

elements! {
    u8: Uint8;
    u16: Uint16;
    u32: Uint32;
    u64: Uint64;
    i8: Int8;
    i16: Int16;
    i32: Int32;
    i64: Int64;
    f32: Fp32;
    f64: Fp64;
}

/// A named array of one datatype. A clone shares the elements.
///
/// ```
/// use modalkit_sdk::{Datatype, Tensor};
///
/// let tensor = Tensor::new("scores", [2, 3], vec![0.0_f32, 0.5, 1.0, 1.5, 2.0, 2.5])?;
/// assert_eq!((tensor.datatype(), tensor.shape()), (Datatype::Fp32, &[2, 3][..]));
/// assert_eq!(tensor.values::<f32>().unwrap()[5], 2.5);
/// assert!(tensor.values::<i64>().unwrap_err().to_string().contains("expected INT64, found FP32"));
/// # Ok::<(), modalkit_sdk::PipelineError>(())
/// ```
#[derive(Clone, Debug)]
pub struct Tensor {
    name: String,
    datatype: Datatype,
    shape: Vec<usize>,
    data: Arc<Buffer>,
}

/// Owns elements whose bytes are a tensor's.
struct Elements<T>(Vec<T>);

impl<T: Pod> AsRef<[u8]> for Elements<T> {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}

/// A tensor's bytes, which its clones have as well.
struct Shared(Arc<Buffer>);

impl AsRef<[u8]> for Shared {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Tensor {
    /// A tensor of these elements, the last dimension's neighbours side by side.
    ///
    /// # Errors
    /// The shape is of another number of elements.
    pub fn new<T: Element>(
        name: impl Into<String>,
        shape: impl Into<Vec<usize>>,
        values: Vec<T>,
    ) -> Result<Self, PipelineError> {
        let count = values.len();
        Self::of(name.into(), T::DATATYPE, shape.into(), count, Buffer::from_owner(Elements(values)))
    }

    /// A tensor of truth values.
    ///
    /// # Errors
    /// The shape is of another number of elements.
    ///
    /// ```
    /// # use modalkit_sdk::{Datatype, Tensor};
    /// assert_eq!(Tensor::of_bools("fits", [2], [true, false])?.datatype(), Datatype::Bool);
    /// # Ok::<(), modalkit_sdk::PipelineError>(())
    /// ```
    pub fn of_bools(
        name: impl Into<String>,
        shape: impl Into<Vec<usize>>,
        values: impl IntoIterator<Item = bool>,
    ) -> Result<Self, PipelineError> {
        let values: Vec<u8> = values.into_iter().map(u8::from).collect();
        let count = values.len();
        Self::of(name.into(), Datatype::Bool, shape.into(), count, Buffer::from_owner(values))
    }

    /// A tensor of strings.
    ///
    /// # Errors
    /// The shape is of another number of elements, or a string is longer than 4 GiB.
    ///
    /// ```
    /// # use modalkit_sdk::Tensor;
    /// let labels = Tensor::of_strings("labels", [2], ["cat", "dog"])?;
    /// assert_eq!(labels.strings().unwrap(), [b"cat", b"dog"]);
    /// # Ok::<(), modalkit_sdk::PipelineError>(())
    /// ```
    pub fn of_strings<S: AsRef<[u8]>>(
        name: impl Into<String>,
        shape: impl Into<Vec<usize>>,
        values: impl IntoIterator<Item = S>,
    ) -> Result<Self, PipelineError> {
        let (mut bytes, mut count) = (Vec::new(), 0);
        for value in values {
            let value = value.as_ref();
            bytes.extend_from_slice(&u32::try_from(value.len())?.to_le_bytes());
            bytes.extend_from_slice(value);
            count += 1;
        }
        Self::of(name.into(), Datatype::Bytes, shape.into(), count, Buffer::from_owner(bytes))
    }

    /// A tensor of bytes: its elements one after the other, little-endian. They stay where they are: in memory that is shared with others, say,
    /// or of numbers that no type here stands for.
    ///
    /// # Errors
    /// They are another number of elements than the shape says, or `Bytes`, which [`Tensor::of_strings`] is for.
    ///
    /// ```
    /// # use modalkit_sdk::{Datatype, Tensor};
    /// let halves = Tensor::of_bytes("embedding", Datatype::Fp16, [2], [0x00, 0x3c, 0x00, 0xc0])?;
    /// assert_eq!(halves.bytes()[1], 0x3c);
    /// assert!(Tensor::of_bytes("embedding", Datatype::Fp16, [2], [0; 3]).is_err());
    /// # Ok::<(), modalkit_sdk::PipelineError>(())
    /// ```
    pub fn of_bytes(
        name: impl Into<String>,
        datatype: Datatype,
        shape: impl Into<Vec<usize>>,
        bytes: impl AsRef<[u8]> + Send + Sync + 'static,
    ) -> Result<Self, PipelineError> {
        let (name, data) = (name.into(), Buffer::from_owner(bytes));
        match datatype.element_bytes() {
            Some(_) if datatype == Datatype::Bool && data.iter().any(|byte| *byte > 1) => Err(
                PipelineError::permanent(format!("the tensor `{name}`: truth values are bytes of 0 or 1")),
            ),
            Some(element) if data.len() % element == 0 => {
                let count = data.len() / element;
                Self::of(name, datatype, shape.into(), count, data)
            }
            _ => Err(PipelineError::permanent(format!(
                "the tensor `{name}`: {} bytes are no elements of {datatype}",
                data.len()
            ))),
        }
    }

    fn of(
        name: String,
        datatype: Datatype,
        shape: Vec<usize>,
        found: usize,
        data: Buffer,
    ) -> Result<Self, PipelineError> {
        match shape.iter().try_fold(1_usize, |count, size| count.checked_mul(*size)) {
            Some(expected) if expected == found => Ok(Self { name, datatype, shape, data: Arc::new(data) }),
            _ => Err(PipelineError::permanent(format!(
                "the tensor `{name}` of shape {shape:?} was given {found} elements"
            ))),
        }
    }

    /// Of what a host gave.
    pub(crate) fn from_abi(tensor: modalkit_abi::Tensor) -> Result<Self, Invalid> {
        let name: String = tensor.name.into();
        let unfit = |what: String| Invalid::new(what).at(name.as_str());
        let datatype = Datatype::of(tensor.datatype).ok_or_else(|| {
            unfit(format!("this plugin's SDK doesn't know the datatype {}", tensor.datatype.0))
        })?;
        let sizes = tensor.shape.iter().map(|size| usize::try_from(*size).ok());
        let shape: Option<Vec<usize>> = sizes.collect();
        let count = shape
            .as_ref()
            .and_then(|shape| shape.iter().try_fold(1_usize, |count, size| count.checked_mul(*size)));
        let bytes = match datatype.element_bytes() {
            Some(bytes) => count.and_then(|count| count.checked_mul(bytes)),
            None => count.map(|_| tensor.data.len()),
        };
        match shape {
            Some(shape) if bytes == Some(tensor.data.len()) => {
                Ok(Self { name, datatype, shape, data: Arc::new(tensor.data) })
            }
            _ => Err(unfit(format!(
                "{} bytes are not what a tensor of {datatype} and the shape {:?} has",
                tensor.data.len(),
                tensor.shape.as_slice()
            ))),
        }
    }

    pub(crate) fn into_abi(self) -> modalkit_abi::Tensor {
        let data = Arc::try_unwrap(self.data).unwrap_or_else(|shared| Buffer::from_owner(Shared(shared)));
        modalkit_abi::Tensor {
            name: self.name.into(),
            datatype: self.datatype.number(),
            shape: self.shape.iter().map(|size| *size as u64).collect(),
            data,
            parameters: Default::default(),
        }
    }

    /// Its name in the signature.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The same elements under another name.
    #[must_use]
    pub fn renamed(self, name: impl Into<String>) -> Self {
        Self { name: name.into(), ..self }
    }

    /// What its elements are.
    #[must_use]
    pub fn datatype(&self) -> Datatype {
        self.datatype
    }

    /// Its dimensions, the slowest first; without that of the batch.
    #[must_use]
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Its elements, the last dimension's neighbours side by side; truth values as `u8`.
    ///
    /// # Errors
    /// It has another datatype, or was made by [`Tensor::of_bytes`] of bytes at a place where no such element can be.
    pub fn values<T: Element>(&self) -> Result<&[T], Invalid> {
        let (expected, found) = (T::DATATYPE, self.datatype);
        let unfit = |what: String| Invalid::new(what).at(self.name.as_str());
        if expected != found && (expected, found) != (Datatype::Uint8, Datatype::Bool) {
            return Err(unfit(format!("expected {expected}, found {found}")));
        }
        // Where there are none, they may lie anywhere.
        if self.data.is_empty() {
            return Ok(&[]);
        }
        bytemuck::try_cast_slice(&self.data)
            .map_err(|error| unfit(format!("its bytes can't be read as {expected} where they lie: {error}")))
    }

    /// Its elements, where they are strings ([`Datatype::Bytes`]).
    ///
    /// # Errors
    /// It has another datatype, or its bytes are not as many strings as its shape says.
    pub fn strings(&self) -> Result<Vec<&[u8]>, Invalid> {
        let unfit = |what: String| Invalid::new(what).at(self.name.as_str());
        if self.datatype != Datatype::Bytes {
            return Err(unfit(format!("expected BYTES, found {}", self.datatype)));
        }
        let expected: usize = self.shape.iter().product();
        let (mut strings, mut rest) = (Vec::new(), &**self.data);
        while let Some((length, after)) = rest.split_first_chunk::<4>() {
            let Some((string, after)) = after.split_at_checked(u32::from_le_bytes(*length) as usize) else {
                break;
            };
            strings.push(string);
            rest = after;
        }
        if rest.is_empty() && strings.len() == expected {
            return Ok(strings);
        }
        Err(unfit(format!("its bytes are not {expected} strings, each after its length in 32 bits")))
    }

    /// Its elements' bytes, little-endian.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.data
    }
}

/// The tensors of one input, by name.
///
/// ```
/// use modalkit_sdk::{Invalid, Tensor, Tensors};
///
/// fn vector(mut tensors: Tensors) -> Result<(Vec<f32>, Option<i64>), Invalid> {
///     let vector = tensors.take("vector")?;
///     let top_k = tensors.take_optional("top_k");
///     let top_k = top_k.map(|tensor| Ok(tensor.values::<i64>()?[0])).transpose()?;
///     Ok((vector.values::<f32>()?.to_vec(), top_k))
/// }
///
/// let tensors = Tensors::from(vec![Tensor::new("vector", [2], vec![1.0_f32, 2.0])?]);
/// assert_eq!(vector(tensors).unwrap(), (vec![1.0, 2.0], None));
/// # Ok::<(), modalkit_sdk::PipelineError>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct Tensors(Vec<Tensor>);

impl Tensors {
    /// The tensor of this name, taken out.
    ///
    /// # Errors
    /// There is none.
    pub fn take(&mut self, name: &str) -> Result<Tensor, Invalid> {
        self.take_optional(name).ok_or_else(|| Invalid::new(format!("expected a tensor `{name}`")).at(name))
    }

    /// The tensor of this name, taken out where there is one.
    pub fn take_optional(&mut self, name: &str) -> Option<Tensor> {
        let place = self.0.iter().position(|tensor| tensor.name == name)?;
        Some(self.0.swap_remove(place))
    }
}

impl From<Vec<Tensor>> for Tensors {
    fn from(tensors: Vec<Tensor>) -> Self {
        Self(tensors)
    }
}

impl IntoIterator for Tensors {
    type IntoIter = std::vec::IntoIter<Tensor>;
    type Item = Tensor;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn given(datatype: modalkit_abi::Datatype, shape: &[u64], data: &[u8]) -> Result<Tensor, Invalid> {
        Tensor::from_abi(modalkit_abi::Tensor {
            name: "t".into(),
            datatype,
            shape: shape.to_vec().into(),
            data: Buffer::from_owner(data.to_vec()),
            parameters: Default::default(),
        })
    }

    #[test]
    fn what_a_host_gives_is_a_tensor_or_refused() {
        let fp32 = modalkit_abi::Datatype::FP32;
        // Of no elements: such bytes may lie anywhere.
        let empty = Buffer::from_owner(bytes_at_an_odd_place());
        assert_eq!(empty.len(), 0);
        let none =
            Tensor { name: "t".into(), datatype: Datatype::Fp64, shape: vec![0], data: Arc::new(empty) };
        assert!(none.values::<f64>().unwrap().is_empty());
        assert!(given(fp32, &[0], &[]).unwrap().values::<f32>().unwrap().is_empty());
        for (datatype, shape, data) in [
            (modalkit_abi::Datatype(99), &[1][..], &[0; 4][..]),
            (fp32, &[2], &[0; 7]),
            (fp32, &[u64::MAX, 2], &[]),
            (fp32, &[1 << 62, 4], &[]),
        ] {
            let invalid = given(datatype, shape, data).unwrap_err();
            assert!(invalid.to_string().starts_with("t: "), "{invalid}");
        }
        let strings = given(modalkit_abi::Datatype::BYTES, &[2], b"\x01\0\0\0a\xff\0\0\0").unwrap();
        assert!(strings.strings().unwrap_err().to_string().contains("are not 2 strings"));
    }

    fn bytes_at_an_odd_place() -> impl AsRef<[u8]> + Send + Sync {
        struct Odd([u8; 3]);
        impl AsRef<[u8]> for Odd {
            fn as_ref(&self) -> &[u8] {
                &self.0[1..1]
            }
        }
        Odd([0; 3])
    }
}
