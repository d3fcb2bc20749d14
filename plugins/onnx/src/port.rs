//! A model's inputs and outputs as its file declares them, and what a request's arrays must be to fit.

use std::collections::BTreeMap;

use half::f16;
use modalkit_sdk::{Datatype, Invalid};

use crate::{
    array::{Array, Elements},
    engine::Engine,
};

/// A request's or an answer's arrays, by the names of inputs or outputs.
pub(crate) type Arrays = BTreeMap<String, Array>;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Dim {
    Fixed(usize),
    /// Any size, the same wherever the name stands.
    Symbolic(String),
}

/// One input or output.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Port {
    pub(crate) name: String,
    pub(crate) datatype: Datatype,
    pub(crate) dims: Vec<Dim>,
    /// Whether the file says what shape it has: of outputs, some don't.
    pub(crate) is_shaped: bool,
}

/// The least and the largest whole numbers that an input takes.
type Range = (i64, i64);

impl Port {
    /// Its datatype and dimensions for people: `f32[N, 64]`.
    pub(crate) fn describe(&self) -> String {
        let dims: Vec<String> = self
            .dims
            .iter()
            .map(|dim| match dim {
                Dim::Fixed(size) => size.to_string(),
                Dim::Symbolic(name) => name.clone(),
            })
            .collect();
        format!("{}[{}]", short(self.datatype), dims.join(", "))
    }

    /// Without an axis: what one of the items that are batched along it has.
    pub(crate) fn without(&self, axis: Option<usize>) -> Self {
        let mut port = self.clone();
        if let Some(axis) = axis {
            port.dims.remove(axis);
        }
        port
    }

    /// Where a symbol stands in it.
    pub(crate) fn axis_of(&self, symbol: &str) -> Option<usize> {
        self.dims.iter().position(|dim| matches!(dim, Dim::Symbolic(name) if name == symbol))
    }

    fn check_numbers(&self, array: &Array, narrowed: Option<Range>) -> Result<(), Invalid> {
        let wrong = |found: String| Err(Invalid::new(found).at(self.name.as_str()));
        let expected = short(self.datatype);
        let Some((mut least, mut most)) = range(self.datatype) else {
            // Numbers with fractions, or strings.
            let most = match self.datatype {
                Datatype::Fp16 => f64::from(f16::MAX),
                Datatype::Fp32 => f64::from(f32::MAX),
                _ => f64::INFINITY,
            };
            return match (&array.elements, self.datatype == Datatype::Bytes) {
                (Elements::Strings(_), true) => Ok(()),
                (Elements::Strings(_), false) => {
                    wrong(format!("expected numbers ({expected}), found strings"))
                }
                (_, true) => wrong("expected strings, found numbers".into()),
                (Elements::F64(values), false) => {
                    match values.iter().find(|value| value.is_finite() && value.abs() > most) {
                        Some(value) => {
                            wrong(format!("expected numbers up to {most:e} ({expected}), found {value:e}"))
                        }
                        None => Ok(()),
                    }
                }
                _ => Ok(()),
            };
        };
        if let Some((narrow_least, narrow_most)) = narrowed {
            (least, most) = (least.max(narrow_least), most.min(narrow_most));
        }
        let outside = match &array.elements {
            // Of its own kind each has room, but where the engine has less.
            own if own.datatype() == self.datatype && narrowed.is_none() => None,
            whole if matches!(whole, Elements::I64(_)) || whole.datatype() == self.datatype => {
                whole.first_outside(least, most)
            }
            Elements::Strings(_) => return wrong(format!("expected numbers ({expected}), found strings")),
            _ => {
                return wrong(format!(
                    "expected whole numbers from {least} to {most}, found one with a fraction, or one that is larger"
                ));
            }
        };
        outside.map_or(Ok(()), |(_, value)| {
            wrong(format!("expected whole numbers from {least} to {most} ({expected}), found {value}"))
        })
    }
}

/// A datatype's name as it is short: `f32`.
pub(crate) fn short(datatype: Datatype) -> &'static str {
    match datatype {
        Datatype::Bool => "bool",
        Datatype::Uint8 => "u8",
        Datatype::Uint16 => "u16",
        Datatype::Uint32 => "u32",
        Datatype::Uint64 => "u64",
        Datatype::Int8 => "i8",
        Datatype::Int16 => "i16",
        Datatype::Int32 => "i32",
        Datatype::Int64 => "i64",
        Datatype::Fp16 => "f16",
        Datatype::Fp32 => "f32",
        Datatype::Fp64 => "f64",
        Datatype::Bytes => "string",
        _ => "of another type",
    }
}

fn range(datatype: Datatype) -> Option<Range> {
    Some(match datatype {
        Datatype::Bool => (0, 1),
        Datatype::Uint8 => (0, i64::from(u8::MAX)),
        Datatype::Uint16 => (0, i64::from(u16::MAX)),
        Datatype::Uint32 => (0, i64::from(u32::MAX)),
        Datatype::Uint64 => (0, i64::MAX),
        Datatype::Int8 => (i64::from(i8::MIN), i64::from(i8::MAX)),
        Datatype::Int16 => (i64::from(i16::MIN), i64::from(i16::MAX)),
        Datatype::Int32 => (i64::from(i32::MIN), i64::from(i32::MAX)),
        Datatype::Int64 => (i64::MIN, i64::MAX),
        _ => return None,
    })
}

pub(crate) fn describe_all(ports: &[Port]) -> String {
    let ports: Vec<String> = ports.iter().map(|port| format!("{} {}", port.name, port.describe())).collect();
    ports.join(", ")
}

/// What a request is held against beside the model's inputs.
pub(crate) struct Limits<'a> {
    /// What stands for inputs that it leaves out.
    pub(crate) defaults: &'a Arrays,
    /// The most that dimensions of any size may have.
    pub(crate) dimensions_max: &'a BTreeMap<String, usize>,
    /// Says for which whole numbers it has room.
    pub(crate) engine: &'a dyn Engine,
}

/// Whether a request fits: every input there that has no default, none unknown, shapes and numbers as declared, sizes with one name equal.
pub(crate) fn check(ports: &[Port], arrays: &Arrays, limits: &Limits<'_>) -> Result<(), Invalid> {
    let mut sizes: BTreeMap<&str, (usize, &str)> = BTreeMap::new();
    for port in ports {
        let wrong = |found: String| Err(Invalid::new(found).at(port.name.as_str()));
        let Some(array) = arrays.get(&port.name).or_else(|| limits.defaults.get(&port.name)) else {
            return wrong(format!("field required: `{}`, {}", port.name, port.describe()));
        };
        let fits = |(size, dim): (&usize, &Dim)| matches!(dim, Dim::Symbolic(_)) || *dim == Dim::Fixed(*size);
        if array.shape.len() != port.dims.len() || !array.shape.iter().zip(&port.dims).all(fits) {
            return wrong(format!("expected {}, found the shape {:?}", port.describe(), array.shape));
        }
        if array.elements.len() == 0 {
            return wrong(format!(
                "expected {}, found no element at all: the shape {:?}",
                port.describe(),
                array.shape
            ));
        }
        for (size, dim) in array.shape.iter().zip(&port.dims) {
            let Dim::Symbolic(symbol) = dim else { continue };
            if let Some(most) = limits.dimensions_max.get(symbol).filter(|most| *size > **most) {
                return wrong(format!("expected at most {most} along `{symbol}`, found {size}"));
            }
            match sizes.get(symbol.as_str()) {
                Some((other, of)) if other != size => {
                    return wrong(format!(
                        "expected as many along `{symbol}` as `{of}` has, {other}; found {size}"
                    ));
                }
                _ => drop(sizes.insert(symbol, (*size, &port.name))),
            }
        }
        port.check_numbers(array, limits.engine.narrowed(port))?;
    }
    match arrays.keys().find(|name| !ports.iter().any(|port| port.name == **name)) {
        Some(unknown) => {
            let found = format!("the model has no input `{unknown}`; expected {}", describe_all(ports));
            Err(Invalid::new(found).at(unknown.as_str()))
        }
        None => Ok(()),
    }
}
