//! Arrays as JSON writes them: nested lists of numbers, read into one flat list and a shape.

use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{self, SeqAccess, Visitor},
    ser::SerializeSeq,
};

/// Lists may be nested this deep; ONNX has no tensors of more dimensions in practice.
const DIMENSIONS_MAX: usize = 8;

/// A number alone has the shape `[]`, `[[1, 2, 3], [4, 5, 6]]` has `[2, 3]`.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Array {
    pub(crate) shape: Vec<usize>,
    pub(crate) values: Values,
}

/// Whole numbers are kept exactly until one has a fraction.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Values {
    Integers(Vec<i64>),
    Floats(Vec<f64>),
    /// Of tensors: shorter in JSON than the same numbers as `f64`.
    Singles(Vec<f32>),
}

impl Values {
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Integers(values) => values.len(),
            Self::Floats(values) => values.len(),
            Self::Singles(values) => values.len(),
        }
    }

    fn push_integer(&mut self, value: i64) {
        match self {
            Self::Integers(values) => values.push(value),
            Self::Floats(values) => values.push(value as f64),
            Self::Singles(values) => values.push(value as f32),
        }
    }

    fn push_float(&mut self, value: f64) {
        if let Self::Integers(values) = self {
            *self = Self::Floats(values.iter().map(|value| *value as f64).collect());
        }
        match self {
            Self::Floats(values) => values.push(value),
            Self::Singles(values) => values.push(value as f32),
            Self::Integers(_) => unreachable!("turned into floats above"),
        }
    }
}

/// What is known of the array while it is read.
struct Building {
    values: Values,
    /// The lengths of the lists, from the outermost; `None` while the first list of that depth is still open.
    lengths: Vec<Option<usize>>,
    /// At which depth the numbers stand, once one was met.
    leaf: Option<usize>,
}

impl<'de> Deserialize<'de> for Array {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut building = Building { values: Values::Integers(Vec::new()), lengths: Vec::new(), leaf: None };
        de::DeserializeSeed::deserialize(At { depth: 0, building: &mut building }, deserializer)?;
        let shape = building.lengths.into_iter().map(|length| length.unwrap_or_default()).collect();
        Ok(Self { shape, values: building.values })
    }
}

struct At<'b> {
    depth: usize,
    building: &'b mut Building,
}

impl At<'_> {
    fn number<E: de::Error>(self, push: impl FnOnce(&mut Values)) -> Result<(), E> {
        match self.building.leaf {
            Some(depth) if depth != self.depth => {
                return Err(E::custom("lists and numbers stand side by side"));
            }
            None if self.building.lengths.len() > self.depth => {
                return Err(E::custom("lists and numbers stand side by side"));
            }
            _ => self.building.leaf = Some(self.depth),
        }
        push(&mut self.building.values);
        Ok(())
    }
}

impl<'de> de::DeserializeSeed<'de> for At<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for At<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a number or a nested list of numbers")
    }

    fn visit_bool<E: de::Error>(self, value: bool) -> Result<(), E> {
        self.number(|values| values.push_integer(i64::from(value)))
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<(), E> {
        self.number(|values| values.push_integer(value))
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<(), E> {
        self.number(|values| match i64::try_from(value) {
            Ok(value) => values.push_integer(value),
            Err(_) => values.push_float(value as f64),
        })
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<(), E> {
        self.number(|values| values.push_float(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        let Self { depth, building } = self;
        if depth == DIMENSIONS_MAX {
            return Err(de::Error::custom(format!("lists are nested deeper than {DIMENSIONS_MAX}")));
        }
        if building.leaf.is_some_and(|leaf| leaf <= depth) {
            return Err(de::Error::custom("lists and numbers stand side by side"));
        }
        if building.lengths.len() == depth {
            building.lengths.push(None);
        }
        let mut length = 0;
        while list.next_element_seed(At { depth: depth + 1, building })?.is_some() {
            length += 1;
        }
        match building.lengths[depth] {
            Some(expected) if expected != length => Err(de::Error::custom(format!(
                "the lists at depth {depth} differ in length: expected {expected} elements, found {length}"
            ))),
            _ => {
                building.lengths[depth] = Some(length);
                Ok(())
            }
        }
    }
}

impl Serialize for Array {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Part { shape: &self.shape, values: &self.values, start: 0 }.serialize(serializer)
    }
}

struct Part<'a> {
    shape: &'a [usize],
    values: &'a Values,
    start: usize,
}

impl Serialize for Part<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Some((length, inner)) = self.shape.split_first() else {
            return match self.values {
                Values::Integers(values) => serializer.serialize_i64(values[self.start]),
                Values::Floats(values) => serializer.serialize_f64(values[self.start]),
                Values::Singles(values) => serializer.serialize_f32(values[self.start]),
            };
        };
        let stride: usize = inner.iter().product();
        let mut list = serializer.serialize_seq(Some(*length))?;
        for index in 0..*length {
            list.serialize_element(&Part {
                shape: inner,
                values: self.values,
                start: self.start + index * stride,
            })?;
        }
        list.end()
    }
}

impl JsonSchema for Array {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Array".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        // To the second level, and anything below it: a schema that leads to itself is more than generators of clients take.
        json_schema!({
            "description": "a number, or a list of numbers or of such lists, all of the same length",
            "type": ["number", "boolean", "array"],
            "items": {"type": ["number", "boolean", "array"], "items": {}}
        })
    }
}
