//! Arrays of one kind of element: as JSON writes them, as tensors carry them, and as engines take them.
//!
//! It knows nothing of models.

use std::ops::Range;

use half::f16;
use modalkit_sdk::{Datatype, Invalid, PipelineError, Tensor};
use serde::{Serialize, Serializer, ser::SerializeSeq};

/// A number alone has the shape `[]`, `[[1, 2, 3], [4, 5, 6]]` has `[2, 3]`.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Array {
    pub(crate) shape: Vec<usize>,
    pub(crate) elements: Elements,
}

/// A number that another can be made into: one for which it has room, as was looked at before.
trait Number: Copy {
    fn of_integer(value: i64) -> Self;
    fn of_float(value: f64) -> Self;
}

macro_rules! numbers {
    ($($element:ty)*) => {
        $(
            impl Number for $element {
                fn of_integer(value: i64) -> Self {
                    value as $element
                }

                fn of_float(value: f64) -> Self {
                    value as $element
                }
            }
        )*
    };
}

numbers! { u8 u16 u32 u64 i8 i16 i32 i64 f32 f64 }

impl Number for bool {
    fn of_integer(value: i64) -> Self {
        value != 0
    }

    fn of_float(value: f64) -> Self {
        value != 0.0
    }
}

impl Number for f16 {
    fn of_integer(value: i64) -> Self {
        Self::from_f64(value as f64)
    }

    fn of_float(value: f64) -> Self {
        Self::from_f64(value)
    }
}

macro_rules! kinds {
    ($($variant:ident $element:ident $datatype:ident),*) => {
        /// The elements of an array, the last dimension's neighbours side by side.
        #[derive(Clone, Debug, PartialEq)]
        pub(crate) enum Elements {
            $($variant(Vec<$element>),)*
            Strings(Vec<String>),
        }

        impl Elements {
            /// Room for so many; `None` for a datatype that no array has.
            pub(crate) fn with_capacity(datatype: Datatype, count: usize) -> Option<Self> {
                Some(match datatype {
                    $(Datatype::$datatype => Self::$variant(Vec::with_capacity(count)),)*
                    Datatype::Bytes => Self::Strings(Vec::with_capacity(count)),
                    _ => return None,
                })
            }

            pub(crate) fn datatype(&self) -> Datatype {
                match self {
                    $(Self::$variant(_) => Datatype::$datatype,)*
                    Self::Strings(_) => Datatype::Bytes,
                }
            }

            pub(crate) fn len(&self) -> usize {
                match self {
                    $(Self::$variant(values) => values.len(),)*
                    Self::Strings(values) => values.len(),
                }
            }

            /// Appends a part of others: of the same kind, or what JSON's numbers were read as. Others are a fault of whoever should have refused
            /// them, and are left out.
            pub(crate) fn append(&mut self, from: &Self, range: Range<usize>) {
                match (self, from) {
                    $(
                        (Self::$variant(to), Self::$variant(from)) => to.extend_from_slice(&from[range]),
                        #[allow(unreachable_patterns, reason = "the arm before has the two kinds that JSON's numbers are")]
                        (Self::$variant(to), Self::I64(from)) => {
                            to.extend(from[range].iter().map(|value| <$element as Number>::of_integer(*value)));
                        }
                        #[allow(unreachable_patterns, reason = "the arm before has the two kinds that JSON's numbers are")]
                        (Self::$variant(to), Self::F64(from)) => {
                            to.extend(from[range].iter().map(|value| <$element as Number>::of_float(*value)));
                        }
                    )*
                    (Self::Strings(to), Self::Strings(from)) => to.extend_from_slice(&from[range]),
                    _ => {}
                }
            }

            /// The numbers as `f32`; `None` where they are strings.
            pub(crate) fn to_f32(&self) -> Option<Vec<f32>> {
                Some(match self {
                    Self::F32(values) => values.clone(),
                    Self::F64(values) => values.iter().map(|value| *value as f32).collect(),
                    Self::F16(values) => values.iter().map(|value| value.to_f32()).collect(),
                    Self::Strings(_) => return None,
                    whole => whole.to_integers()?.into_iter().map(|value| value as f32).collect(),
                })
            }

            fn serialize_element<S: Serializer>(&self, index: usize, serializer: S) -> Result<S::Ok, S::Error> {
                match self {
                    $(Self::$variant(values) => values[index].as_json().serialize(serializer),)*
                    Self::Strings(values) => values[index].serialize(serializer),
                }
            }
        }
    };
}

/// As a number stands in JSON: truth values are 0 and 1 there.
trait AsJson {
    type Json: Serialize;
    fn as_json(&self) -> Self::Json;
}

macro_rules! as_themselves {
    ($($element:ty)*) => {
        $(
            impl AsJson for $element {
                type Json = Self;

                fn as_json(&self) -> Self {
                    *self
                }
            }
        )*
    };
}

as_themselves! { u8 u16 u32 u64 i8 i16 i32 i64 f32 f64 }

impl AsJson for bool {
    type Json = u8;

    fn as_json(&self) -> u8 {
        u8::from(*self)
    }
}

impl AsJson for f16 {
    type Json = f32;

    fn as_json(&self) -> f32 {
        self.to_f32()
    }
}

kinds! {
    Bool bool Bool, U8 u8 Uint8, U16 u16 Uint16, U32 u32 Uint32, U64 u64 Uint64, I8 i8 Int8, I16 i16 Int16, I32 i32 Int32,
    I64 i64 Int64, F16 f16 Fp16, F32 f32 Fp32, F64 f64 Fp64
}

impl Elements {
    /// The first whole number outside a range, and its place.
    pub(crate) fn first_outside(&self, least: i64, most: i64) -> Option<(usize, i64)> {
        let find = |values: &[i64]| {
            let place = values.iter().position(|value| !(least..=most).contains(value))?;
            Some((place, values[place]))
        };
        match self {
            // Tokens of texts, mostly: looked at where they are.
            Self::I64(values) => find(values),
            others => find(&others.to_integers()?),
        }
    }

    /// Whole numbers, each as wide as any; `None` where they are none, or don't fit.
    pub(crate) fn to_integers(&self) -> Option<Vec<i64>> {
        Some(match self {
            Self::Bool(values) => values.iter().map(|value| i64::from(*value)).collect(),
            Self::U8(values) => values.iter().map(|value| i64::from(*value)).collect(),
            Self::U16(values) => values.iter().map(|value| i64::from(*value)).collect(),
            Self::U32(values) => values.iter().map(|value| i64::from(*value)).collect(),
            Self::U64(values) => {
                return values.iter().map(|value| i64::try_from(*value).ok()).collect();
            }
            Self::I8(values) => values.iter().map(|value| i64::from(*value)).collect(),
            Self::I16(values) => values.iter().map(|value| i64::from(*value)).collect(),
            Self::I32(values) => values.iter().map(|value| i64::from(*value)).collect(),
            Self::I64(values) => values.clone(),
            _ => return None,
        })
    }
}

impl Array {
    /// Items' arrays of one shape as one, with a new axis for the items.
    pub(crate) fn stack(items: &[&Self], axis: usize, datatype: Datatype) -> Result<Self, PipelineError> {
        let shape = items.first().map(|item| item.shape.clone()).unwrap_or_default();
        let inner: usize = shape[axis..].iter().product();
        let outer: usize = shape[..axis].iter().product();
        let mut elements = Elements::with_capacity(datatype, outer * inner * items.len())
            .ok_or_else(|| PipelineError::permanent(format!("no array has elements of {datatype}")))?;
        for part in 0..outer {
            for item in items {
                elements.append(&item.elements, part * inner..(part + 1) * inner);
            }
        }
        let mut shape = shape;
        shape.insert(axis, items.len());
        Self::whole(shape, elements)
    }

    /// The same numbers, of the kind that a model wants.
    pub(crate) fn cast(&self, datatype: Datatype) -> Result<Self, PipelineError> {
        let mut elements = Elements::with_capacity(datatype, self.elements.len())
            .ok_or_else(|| PipelineError::permanent(format!("no array has elements of {datatype}")))?;
        elements.append(&self.elements, 0..self.elements.len());
        Self::whole(self.shape.clone(), elements)
    }

    /// One item's part along an axis, without that axis.
    pub(crate) fn item(&self, axis: usize, index: usize) -> Option<Self> {
        let count = *self.shape.get(axis).filter(|count| index < **count)?;
        let inner: usize = self.shape[axis + 1..].iter().product();
        let outer: usize = self.shape[..axis].iter().product();
        let mut elements = Elements::with_capacity(self.elements.datatype(), outer * inner)?;
        for part in 0..outer {
            let start = (part * count + index) * inner;
            elements.append(&self.elements, start..start + inner);
        }
        let mut shape = self.shape.clone();
        shape.remove(axis);
        Some(Self { shape, elements })
    }

    /// # Errors
    /// They are another number of elements than the shape says: a fault of this plugin or an engine, which must not become a wrong answer.
    pub(crate) fn whole(shape: Vec<usize>, elements: Elements) -> Result<Self, PipelineError> {
        let (expected, found) = (shape.iter().product::<usize>(), elements.len());
        if expected != found {
            return Err(PipelineError::permanent(format!(
                "an array of shape {shape:?} was given {found} elements"
            )));
        }
        Ok(Self { shape, elements })
    }

    pub(crate) fn of_tensor(tensor: &Tensor) -> Result<Self, Invalid> {
        let unfit = |what: String| Invalid::new(what).at(tensor.name());
        let elements = match tensor.datatype() {
            Datatype::Bool => {
                Elements::Bool(tensor.values::<u8>()?.iter().map(|value| *value != 0).collect())
            }
            Datatype::Uint8 => Elements::U8(tensor.values()?.to_vec()),
            Datatype::Uint16 => Elements::U16(tensor.values()?.to_vec()),
            Datatype::Uint32 => Elements::U32(tensor.values()?.to_vec()),
            Datatype::Uint64 => Elements::U64(tensor.values()?.to_vec()),
            Datatype::Int8 => Elements::I8(tensor.values()?.to_vec()),
            Datatype::Int16 => Elements::I16(tensor.values()?.to_vec()),
            Datatype::Int32 => Elements::I32(tensor.values()?.to_vec()),
            Datatype::Int64 => Elements::I64(tensor.values()?.to_vec()),
            Datatype::Fp32 => Elements::F32(tensor.values()?.to_vec()),
            Datatype::Fp64 => Elements::F64(tensor.values()?.to_vec()),
            Datatype::Fp16 => Elements::F16(
                tensor.bytes().chunks_exact(2).map(|pair| f16::from_le_bytes([pair[0], pair[1]])).collect(),
            ),
            Datatype::Bytes => {
                let text = |bytes: &[u8]| {
                    String::from_utf8(bytes.to_vec()).map_err(|_| unfit("a string is not UTF-8".into()))
                };
                Elements::Strings(tensor.strings()?.into_iter().map(text).collect::<Result<_, _>>()?)
            }
            other => return Err(unfit(format!("no model takes {other}"))),
        };
        Ok(Self { shape: tensor.shape().to_vec(), elements })
    }

    pub(crate) fn into_tensor(self, name: &str) -> Result<Tensor, PipelineError> {
        let shape = self.shape;
        match self.elements {
            Elements::Bool(values) => Tensor::of_bools(name, shape, values),
            Elements::U8(values) => Tensor::new(name, shape, values),
            Elements::U16(values) => Tensor::new(name, shape, values),
            Elements::U32(values) => Tensor::new(name, shape, values),
            Elements::U64(values) => Tensor::new(name, shape, values),
            Elements::I8(values) => Tensor::new(name, shape, values),
            Elements::I16(values) => Tensor::new(name, shape, values),
            Elements::I32(values) => Tensor::new(name, shape, values),
            Elements::I64(values) => Tensor::new(name, shape, values),
            Elements::F32(values) => Tensor::new(name, shape, values),
            Elements::F64(values) => Tensor::new(name, shape, values),
            Elements::F16(values) => {
                let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
                Tensor::of_bytes(name, Datatype::Fp16, shape, bytes)
            }
            Elements::Strings(values) => Tensor::of_strings(name, shape, values),
        }
    }
}

impl Serialize for Array {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Part { shape: &self.shape, elements: &self.elements, start: 0 }.serialize(serializer)
    }
}

struct Part<'a> {
    shape: &'a [usize],
    elements: &'a Elements,
    start: usize,
}

impl Serialize for Part<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Some((length, inner)) = self.shape.split_first() else {
            return self.elements.serialize_element(self.start, serializer);
        };
        let stride: usize = inner.iter().product();
        let mut list = serializer.serialize_seq(Some(*length))?;
        for index in 0..*length {
            let start = self.start + index * stride;
            list.serialize_element(&Part { shape: inner, elements: self.elements, start })?;
        }
        list.end()
    }
}
