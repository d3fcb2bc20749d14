//! Reads JSON into typed values as their JSON Schema says: where it says an object, a list is refused. What serde derives for a struct
//! takes its fields by their places in a list as well, in the order in which the source happens to name them.
//!
//! It wraps a deserializer and looks at nothing but this. Two forms pass by, since serde reads them through a buffer of its own: structs
//! inside `#[serde(flatten)]`, and those inside `#[serde(untagged)]` or internally tagged enums.

use serde::{
    Deserialize,
    de::{
        DeserializeSeed, Deserializer, EnumAccess, Error, MapAccess, SeqAccess, Unexpected, VariantAccess,
        Visitor,
    },
};

/// Reads one value.
///
/// # Errors
/// Those of serde_json, and a list where a struct is expected.
pub(crate) fn from_slice<'de, T: Deserialize<'de>>(json: &'de [u8]) -> serde_json::Result<T> {
    let mut deserializer = serde_json::Deserializer::from_slice(json);
    let value = T::deserialize(Strict(&mut deserializer))?;
    deserializer.end()?;
    Ok(value)
}

/// A deserializer that takes no list for a struct, at any depth.
pub(crate) struct Strict<D>(pub(crate) D);

struct Visit<V> {
    visitor: V,
    /// A struct is expected.
    is_struct: bool,
}

impl<V> Visit<V> {
    fn any(visitor: V) -> Self {
        Self { visitor, is_struct: false }
    }
}

/// What a visitor is given to go on with.
struct Access<A>(A);

struct Seed<S>(S);

/// For scalars, which hold nothing that a list could stand for: what looks further would cost a long list of numbers a part of its time.
macro_rules! forward_scalars {
    ($($method:ident;)*) => {
        $(
            #[inline]
            fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, D::Error> {
                self.0.$method(visitor)
            }
        )*
    };
}

macro_rules! forward {
    ($($method:ident($($argument:ident: $ty:ty),*);)*) => {
        $(
            #[inline]
            fn $method<V: Visitor<'de>>(self, $($argument: $ty,)* visitor: V) -> Result<V::Value, D::Error> {
                self.0.$method($($argument,)* Visit::any(visitor))
            }
        )*
    };
}

impl<'de, D: Deserializer<'de>> Deserializer<'de> for Strict<D> {
    type Error = D::Error;

    forward_scalars! {
        deserialize_bool;
        deserialize_i8;
        deserialize_i16;
        deserialize_i32;
        deserialize_i64;
        deserialize_i128;
        deserialize_u8;
        deserialize_u16;
        deserialize_u32;
        deserialize_u64;
        deserialize_u128;
        deserialize_f32;
        deserialize_f64;
        deserialize_char;
        deserialize_str;
        deserialize_string;
        deserialize_identifier;
    }

    forward! {
        deserialize_any();
        deserialize_bytes();
        deserialize_byte_buf();
        deserialize_option();
        deserialize_unit();
        deserialize_unit_struct(name: &'static str);
        deserialize_newtype_struct(name: &'static str);
        deserialize_seq();
        deserialize_tuple(length: usize);
        deserialize_tuple_struct(name: &'static str, length: usize);
        deserialize_map();
        deserialize_enum(name: &'static str, variants: &'static [&'static str]);
        deserialize_ignored_any();
    }

    #[inline]
    fn deserialize_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, D::Error> {
        self.0.deserialize_struct(name, fields, Visit { visitor, is_struct: true })
    }

    fn is_human_readable(&self) -> bool {
        self.0.is_human_readable()
    }
}

macro_rules! visit {
    ($($method:ident: $ty:ty;)*) => {
        $(
            #[inline]
            fn $method<E: Error>(self, value: $ty) -> Result<V::Value, E> {
                self.visitor.$method(value)
            }
        )*
    };
}

impl<'de, V: Visitor<'de>> Visitor<'de> for Visit<V> {
    type Value = V::Value;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.visitor.expecting(f)
    }

    visit! {
        visit_bool: bool;
        visit_i8: i8;
        visit_i16: i16;
        visit_i32: i32;
        visit_i64: i64;
        visit_i128: i128;
        visit_u8: u8;
        visit_u16: u16;
        visit_u32: u32;
        visit_u64: u64;
        visit_u128: u128;
        visit_f32: f32;
        visit_f64: f64;
        visit_char: char;
        visit_str: &str;
        visit_borrowed_str: &'de str;
        visit_string: String;
        visit_bytes: &[u8];
        visit_borrowed_bytes: &'de [u8];
        visit_byte_buf: Vec<u8>;
    }

    #[inline]
    fn visit_none<E: Error>(self) -> Result<V::Value, E> {
        self.visitor.visit_none()
    }

    #[inline]
    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<V::Value, D::Error> {
        self.visitor.visit_some(Strict(deserializer))
    }

    #[inline]
    fn visit_unit<E: Error>(self) -> Result<V::Value, E> {
        self.visitor.visit_unit()
    }

    #[inline]
    fn visit_newtype_struct<D: Deserializer<'de>>(self, deserializer: D) -> Result<V::Value, D::Error> {
        self.visitor.visit_newtype_struct(Strict(deserializer))
    }

    #[inline]
    fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<V::Value, A::Error> {
        if self.is_struct {
            return Err(A::Error::invalid_type(Unexpected::Seq, &self.visitor));
        }
        self.visitor.visit_seq(Access(list))
    }

    #[inline]
    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<V::Value, A::Error> {
        self.visitor.visit_map(Access(map))
    }

    #[inline]
    fn visit_enum<A: EnumAccess<'de>>(self, variant: A) -> Result<V::Value, A::Error> {
        self.visitor.visit_enum(Access(variant))
    }
}

impl<'de, S: DeserializeSeed<'de>> DeserializeSeed<'de> for Seed<S> {
    type Value = S::Value;

    #[inline]
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<S::Value, D::Error> {
        self.0.deserialize(Strict(deserializer))
    }
}

impl<'de, A: SeqAccess<'de>> SeqAccess<'de> for Access<A> {
    type Error = A::Error;

    #[inline]
    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, A::Error> {
        self.0.next_element_seed(Seed(seed))
    }

    #[inline]
    fn size_hint(&self) -> Option<usize> {
        self.0.size_hint()
    }
}

impl<'de, A: MapAccess<'de>> MapAccess<'de> for Access<A> {
    type Error = A::Error;

    #[inline]
    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, A::Error> {
        self.0.next_key_seed(Seed(seed))
    }

    #[inline]
    fn next_value_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<T::Value, A::Error> {
        self.0.next_value_seed(Seed(seed))
    }

    #[inline]
    fn size_hint(&self) -> Option<usize> {
        self.0.size_hint()
    }
}

impl<'de, A: EnumAccess<'de>> EnumAccess<'de> for Access<A> {
    type Error = A::Error;
    type Variant = Access<A::Variant>;

    #[inline]
    fn variant_seed<T: DeserializeSeed<'de>>(self, seed: T) -> Result<(T::Value, Self::Variant), A::Error> {
        let (value, variant) = self.0.variant_seed(Seed(seed))?;
        Ok((value, Access(variant)))
    }
}

impl<'de, A: VariantAccess<'de>> VariantAccess<'de> for Access<A> {
    type Error = A::Error;

    #[inline]
    fn unit_variant(self) -> Result<(), A::Error> {
        self.0.unit_variant()
    }

    #[inline]
    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, seed: T) -> Result<T::Value, A::Error> {
        self.0.newtype_variant_seed(Seed(seed))
    }

    #[inline]
    fn tuple_variant<V: Visitor<'de>>(self, length: usize, visitor: V) -> Result<V::Value, A::Error> {
        self.0.tuple_variant(length, Visit::any(visitor))
    }

    #[inline]
    fn struct_variant<V: Visitor<'de>>(
        self,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, A::Error> {
        self.0.struct_variant(fields, Visit { visitor, is_struct: true })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::value::RawValue;

    use super::*;

    #[derive(Debug, Deserialize, PartialEq)]
    struct Point {
        x: f64,
        y: f64,
    }

    #[derive(Debug, Deserialize, PartialEq)]
    struct Newtype(Point);

    #[derive(Debug, Deserialize, PartialEq)]
    enum Shape {
        Dot,
        Circle { center: Point, radius: f64 },
        Line(Point, Point),
        At(Point),
    }

    #[derive(Debug, Default, Deserialize, PartialEq)]
    #[serde(default)]
    struct All {
        point: Option<Point>,
        points: Vec<Point>,
        named: BTreeMap<String, Point>,
        pair: Option<(Point, u8)>,
        newtype: Option<Newtype>,
        shapes: Vec<Shape>,
    }

    fn refused(json: &str) -> String {
        from_slice::<All>(json.as_bytes()).unwrap_err().to_string()
    }

    #[test]
    fn a_list_is_no_struct_at_any_depth() {
        for (json, name) in [
            ("[]", "All"),
            (r#"{"point": [1, 2]}"#, "Point"),
            (r#"{"points": [{"x": 1, "y": 2}, [1, 2]]}"#, "Point"),
            (r#"{"named": {"a": [1, 2]}}"#, "Point"),
            (r#"{"pair": [[1, 2], 3]}"#, "Point"),
            (r#"{"newtype": [1, 2]}"#, "Point"),
            (r#"{"shapes": [{"Circle": [{"x": 1, "y": 2}, 3]}]}"#, "Shape::Circle"),
            (r#"{"shapes": [{"Circle": {"center": [1, 2], "radius": 3}}]}"#, "Point"),
            (r#"{"shapes": [{"Line": [{"x": 1, "y": 2}, [3, 4]]}]}"#, "Point"),
            (r#"{"shapes": [{"At": [1, 2]}]}"#, "Point"),
        ] {
            let said = refused(json);
            assert!(said.contains("invalid type: sequence") && said.contains(name), "{json}: {said}");
            assert!(said.contains("line 1 column"), "{said}");
        }
    }

    #[test]
    fn what_fits_is_read_as_serde_json_reads_it() {
        let json = br#"{"point": {"y": 2, "x": 1}, "points": [{"x": 1e3, "y": -0.5}], "named": {"a": {"x": 1, "y": 2}},
            "pair": [{"x": 1, "y": 2}, 3], "newtype": {"x": 1, "y": 2}, "unknown": [[{}]],
            "shapes": ["Dot", {"Circle": {"center": {"x": 1, "y": 2}, "radius": 3}}, {"Line": [{"x": 1, "y": 2}, {"x": 3, "y": 4}]}]}"#;
        let read: All = from_slice(json).unwrap();
        assert_eq!(read, serde_json::from_slice(json).unwrap());
        assert_eq!((read.points.len(), read.shapes.len()), (1, 3));
        assert_eq!(from_slice::<serde_json::Value>(b"[1, [2]]").unwrap(), serde_json::json!([1, [2]]));
        assert_eq!(from_slice::<&RawValue>(b"[1e999]").unwrap().get(), "[1e999]");
        assert_eq!(from_slice::<(u8, &str)>(br#"[1, "a"]"#).unwrap(), (1, "a"));
        assert!(from_slice::<u8>(b"1 2").is_err());
    }
}
