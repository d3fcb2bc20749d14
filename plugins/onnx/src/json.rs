//! Arrays as JSON writes them: nested lists of numbers or strings, read into one flat list and a shape.

use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{
    Deserialize, Deserializer,
    de::{self, SeqAccess, Visitor},
};

use crate::array::{Array, Elements};

/// Lists may be nested this deep; ONNX has no tensors of more dimensions in practice.
const DIMENSIONS_MAX: usize = 8;

/// What is known of the array while it is read.
struct Building {
    /// Whole numbers are kept exactly until one has a fraction. `None` before the first element.
    elements: Option<Elements>,
    /// The lengths of the lists, from the outermost; `None` while the first list of that depth is still open.
    lengths: Vec<Option<usize>>,
    /// At which depth the elements stand, once one was met.
    leaf: Option<usize>,
}

impl Building {
    fn push_integer<E: de::Error>(&mut self, value: i64) -> Result<(), E> {
        match self.elements.get_or_insert_with(|| Elements::I64(Vec::new())) {
            Elements::I64(values) => values.push(value),
            Elements::F64(values) => values.push(value as f64),
            _ => return Err(mixed()),
        }
        Ok(())
    }

    fn push_float<E: de::Error>(&mut self, value: f64) -> Result<(), E> {
        if let Some(Elements::I64(values)) = &self.elements {
            self.elements = Some(Elements::F64(values.iter().map(|value| *value as f64).collect()));
        }
        match self.elements.get_or_insert_with(|| Elements::F64(Vec::new())) {
            Elements::F64(values) => values.push(value),
            _ => return Err(mixed()),
        }
        Ok(())
    }

    fn push_string<E: de::Error>(&mut self, value: &str) -> Result<(), E> {
        match self.elements.get_or_insert_with(|| Elements::Strings(Vec::new())) {
            Elements::Strings(values) => values.push(value.to_owned()),
            _ => return Err(mixed()),
        }
        Ok(())
    }
}

fn mixed<E: de::Error>() -> E {
    E::custom("numbers and strings stand side by side")
}

impl<'de> Deserialize<'de> for Array {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut building = Building { elements: None, lengths: Vec::new(), leaf: None };
        de::DeserializeSeed::deserialize(At { depth: 0, building: &mut building }, deserializer)?;
        let shape = building.lengths.into_iter().map(|length| length.unwrap_or_default()).collect();
        Ok(Self { shape, elements: building.elements.unwrap_or(Elements::I64(Vec::new())) })
    }
}

struct At<'b> {
    depth: usize,
    building: &'b mut Building,
}

impl At<'_> {
    fn element<E: de::Error>(self, push: impl FnOnce(&mut Building) -> Result<(), E>) -> Result<(), E> {
        match self.building.leaf {
            Some(depth) if depth != self.depth => {
                return Err(E::custom("lists and single elements stand side by side"));
            }
            None if self.building.lengths.len() > self.depth => {
                return Err(E::custom("lists and single elements stand side by side"));
            }
            _ => self.building.leaf = Some(self.depth),
        }
        push(self.building)
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
        f.write_str("a number, a string or a nested list of them")
    }

    fn visit_bool<E: de::Error>(self, value: bool) -> Result<(), E> {
        self.element(|building| building.push_integer(i64::from(value)))
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<(), E> {
        self.element(|building| building.push_integer(value))
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<(), E> {
        self.element(|building| match i64::try_from(value) {
            Ok(value) => building.push_integer(value),
            Err(_) => building.push_float(value as f64),
        })
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<(), E> {
        self.element(|building| building.push_float(value))
    }

    fn visit_str<E: de::Error>(self, value: &str) -> Result<(), E> {
        self.element(|building| building.push_string(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        let Self { depth, building } = self;
        if depth == DIMENSIONS_MAX {
            return Err(de::Error::custom(format!("lists are nested deeper than {DIMENSIONS_MAX}")));
        }
        if building.leaf.is_some_and(|leaf| leaf <= depth) {
            return Err(de::Error::custom("lists and single elements stand side by side"));
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

impl JsonSchema for Array {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Array".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        // To the second level, and anything below it: a schema that leads to itself is more than generators of clients take.
        json_schema!({
            "description": "a number or a string, or a list of such or of lists, all of the same length",
            "type": ["number", "boolean", "string", "array"],
            "items": {"type": ["number", "boolean", "string", "array"], "items": {}}
        })
    }
}
