//! A tensor's elements as lists of JSON: read into bytes, and written from them.

use std::fmt;

use bytes::{BufMut, Bytes, BytesMut};
use modalkit_engine::{Datatype, Tensor};
use serde::{
    Deserializer,
    de::{self, DeserializeSeed, SeqAccess, Visitor},
};
use serde_json::value::{RawValue, to_raw_value};

/// Characters shown of a list that isn't what the datatype wants.
const SHOWN_CHARS: usize = 40;

/// Whether JSON has elements of this datatype.
pub(super) fn fit_json(datatype: Datatype) -> bool {
    !matches!(datatype, Datatype::Fp16 | Datatype::Bf16)
}

/// The bytes of a list of as many elements as the shape says, which may be nested. No more is read than that.
pub(super) fn read(list: &RawValue, datatype: Datatype, shape: &[u64]) -> Result<Bytes, String> {
    if !list.get().starts_with('[') {
        return Err("expected a list".to_owned());
    }
    if !fit_json(datatype) {
        return Err(format!("expected {datatype} as bytes (binary_data_size), found JSON"));
    }
    let count = shape.iter().try_fold(1_u64, |count, size| count.checked_mul(*size));
    let count =
        count.ok_or_else(|| format!("a tensor of the shape {shape:?} is larger than memory can be"))?;
    // An element takes two bytes of a list at least.
    let bytes =
        count.min(list.get().len() as u64 / 2 + 1).saturating_mul(datatype.element_bytes().unwrap_or(4));
    let mut bytes = BytesMut::with_capacity(usize::try_from(bytes).unwrap_or_default());
    let (mut left, mut json) = (count, serde_json::Deserializer::from_str(list.get()));
    let read = Elements { datatype, bytes: &mut bytes, left: &mut left }.deserialize(&mut json);
    read.map_err(|error| {
        let shown: String = list.get().chars().take(SHOWN_CHARS).collect();
        format!("{error} in {shown}…")
    })?;
    if left > 0 {
        return Err(format!("expected {count} elements, as the shape says, found {}", count - left));
    }
    Ok(bytes.freeze())
}

/// Elements of a datatype, each or lists of them.
struct Elements<'b> {
    datatype: Datatype,
    bytes: &'b mut BytesMut,
    /// Elements that the shape has room for.
    left: &'b mut u64,
}

impl Elements<'_> {
    /// Counts one more.
    fn count<E: de::Error>(&mut self) -> Result<(), E> {
        *self.left = self
            .left
            .checked_sub(1)
            .ok_or_else(|| E::custom("there are more elements than the shape says"))?;
        Ok(())
    }

    fn put_integer<E: de::Error>(mut self, value: i128) -> Result<(), E> {
        self.count()?;
        let wrong = || E::custom(format!("expected {}, found {value}", self.datatype));
        macro_rules! put {
            ($type:ty, $put:ident) => {
                self.bytes.$put(<$type>::try_from(value).map_err(|_| wrong())?)
            };
        }
        match self.datatype {
            Datatype::Uint8 => put!(u8, put_u8),
            Datatype::Uint16 => put!(u16, put_u16_le),
            Datatype::Uint32 => put!(u32, put_u32_le),
            Datatype::Uint64 => put!(u64, put_u64_le),
            Datatype::Int8 => put!(i8, put_i8),
            Datatype::Int16 => put!(i16, put_i16_le),
            Datatype::Int32 => put!(i32, put_i32_le),
            Datatype::Int64 => put!(i64, put_i64_le),
            Datatype::Fp32 => self.bytes.put_f32_le(value as f32),
            Datatype::Fp64 => self.bytes.put_f64_le(value as f64),
            Datatype::Bool if value == 0 || value == 1 => self.bytes.put_u8(value as u8),
            _ => return Err(wrong()),
        }
        Ok(())
    }
}

impl<'de> DeserializeSeed<'de> for Elements<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Elements<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "elements of {}, or lists of them", self.datatype)
    }

    fn visit_bool<E: de::Error>(self, value: bool) -> Result<(), E> {
        match self.datatype {
            Datatype::Bool => self.put_integer(i128::from(value)),
            _ => Err(E::invalid_type(de::Unexpected::Bool(value), &self)),
        }
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<(), E> {
        self.put_integer(i128::from(value))
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<(), E> {
        self.put_integer(i128::from(value))
    }

    fn visit_f64<E: de::Error>(mut self, value: f64) -> Result<(), E> {
        self.count()?;
        match self.datatype {
            Datatype::Fp32 if (value as f32).is_finite() => self.bytes.put_f32_le(value as f32),
            Datatype::Fp64 => self.bytes.put_f64_le(value),
            _ => return Err(E::custom(format!("expected {}, found {value}", self.datatype))),
        }
        Ok(())
    }

    fn visit_str<E: de::Error>(mut self, value: &str) -> Result<(), E> {
        self.count()?;
        match (self.datatype, u32::try_from(value.len())) {
            (Datatype::Bytes, Ok(length)) => {
                self.bytes.put_u32_le(length);
                self.bytes.put_slice(value.as_bytes());
                Ok(())
            }
            _ => Err(E::invalid_type(de::Unexpected::Str("a string"), &self)),
        }
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        let Self { datatype, bytes, left } = self;
        while list.next_element_seed(Elements { datatype, bytes: &mut *bytes, left: &mut *left })?.is_some() {
        }
        Ok(())
    }
}

/// A tensor's elements as a flat list.
///
/// # Errors
/// JSON has no such elements.
pub(super) fn write(tensor: &Tensor) -> Result<Box<RawValue>, String> {
    let data = tensor.data();
    let as_bytes = |why: &str| {
        format!("the output `{}` can't be JSON, {why}: ask for it as bytes (binary_data)", tensor.name())
    };
    macro_rules! numbers {
        ($type:ty) => {
            data.chunks_exact(size_of::<$type>())
                .map(|bytes| <$type>::from_le_bytes(bytes.try_into().expect("as long")))
                .collect::<Vec<$type>>()
        };
    }
    macro_rules! floats {
        ($type:ty) => {{
            let numbers = numbers!($type);
            if !numbers.iter().all(|number| number.is_finite()) {
                return Err(as_bytes("since an element is no finite number"));
            }
            to_raw_value(&numbers)
        }};
    }
    let list = match tensor.datatype() {
        Datatype::Bool => to_raw_value(&data.iter().map(|byte| *byte != 0).collect::<Vec<bool>>()),
        Datatype::Uint8 => to_raw_value(&data[..]),
        Datatype::Uint16 => to_raw_value(&numbers!(u16)),
        Datatype::Uint32 => to_raw_value(&numbers!(u32)),
        Datatype::Uint64 => to_raw_value(&numbers!(u64)),
        Datatype::Int8 => to_raw_value(&numbers!(i8)),
        Datatype::Int16 => to_raw_value(&numbers!(i16)),
        Datatype::Int32 => to_raw_value(&numbers!(i32)),
        Datatype::Int64 => to_raw_value(&numbers!(i64)),
        Datatype::Fp32 => floats!(f32),
        Datatype::Fp64 => floats!(f64),
        Datatype::Fp16 | Datatype::Bf16 => return Err(as_bytes("which has no such numbers")),
        Datatype::Bytes => {
            let (mut strings, mut rest) = (Vec::new(), &data[..]);
            while let Some((length, after)) = rest.split_first_chunk::<4>() {
                let (string, after) = after.split_at(u32::from_le_bytes(*length) as usize);
                let text = std::str::from_utf8(string);
                strings.push(text.map_err(|_| as_bytes("since a string isn't UTF-8"))?);
                rest = after;
            }
            to_raw_value(&strings)
        }
    };
    Ok(list.expect("numbers and texts are JSON"))
}
