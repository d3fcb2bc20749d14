//! Writes an output as a JSON object, and refuses what is no object or has a member that the host adds to it.

use std::io;

use serde::{
    Serialize,
    ser::{self, Impossible, SerializeMap, SerializeStruct, Serializer},
};

use crate::{PipelineError, finite::Finite};

/// Members that the host adds; an output may not have them.
pub(crate) const RESERVED: [&str; 3] = ["status", "error", "meta"];

const TYPICAL_OUTPUT_BYTES: usize = 128;

/// The output's JSON.
pub(crate) fn to_json<T: Serialize>(output: &T) -> Result<Vec<u8>, PipelineError> {
    let mut json = Vec::with_capacity(TYPICAL_OUTPUT_BYTES);
    // Whatever is nested in it is written by serde_json, which would make `null` of what is no number.
    match Finite(output).serialize(Object { json: &mut json }) {
        Ok(()) => Ok(json),
        Err(Refused(reason)) => Err(PipelineError::permanent(match faulty_member(output) {
            Some(path) => format!("{reason} in `{path}`"),
            None => reason,
        })),
    }
}

/// The path of the value that can't be written, such as `scores[3]`: the output is written once more, to nowhere.
fn faulty_member<T: Serialize>(output: &T) -> Option<String> {
    let mut nowhere = serde_json::Serializer::new(io::sink());
    let error = serde_path_to_error::serialize(output, Finite(&mut nowhere)).err()?;
    // A path without a step is the output itself.
    error.path().iter().next().is_some().then(|| error.path().to_string())
}

struct Object<'a> {
    json: &'a mut Vec<u8>,
}

struct Members<'a> {
    json: &'a mut Vec<u8>,
    key_end: usize,
}

#[derive(Debug)]
struct Refused(String);

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Refused {}

impl ser::Error for Refused {
    fn custom<T: std::fmt::Display>(message: T) -> Self {
        Self(format!("the pipeline's output can't be written as JSON: {message}"))
    }
}

impl From<serde_json::Error> for Refused {
    fn from(error: serde_json::Error) -> Self {
        ser::Error::custom(error)
    }
}

fn no_object<T>(found: &str) -> Result<T, Refused> {
    Err(Refused(format!(
        "the pipeline's output must be a JSON object, found {found}: make `Output` a struct with named fields"
    )))
}

fn reserved(key: &str) -> Refused {
    Refused(format!("the pipeline's output has a member `{key}`, which is the host's: rename it"))
}

impl<'a> Object<'a> {
    fn open(self) -> Members<'a> {
        self.json.push(b'{');
        Members { key_end: 0, json: self.json }
    }
}

impl Members<'_> {
    /// Begins a member; what stands before it is the brace or another member.
    fn separate(&mut self) {
        if self.json.len() > 1 {
            self.json.push(b',');
        }
    }

    fn close(self) {
        self.json.push(b'}');
    }

    fn put<T: Serialize + ?Sized>(&mut self, key: &'static str, value: &T) -> Result<(), Refused> {
        if RESERVED.contains(&key) {
            return Err(reserved(key));
        }
        self.separate();
        serde_json::to_writer(&mut *self.json, key)?;
        self.json.push(b':');
        Ok(serde_json::to_writer(&mut *self.json, value)?)
    }
}

impl SerializeStruct for Members<'_> {
    type Ok = ();
    type Error = Refused;

    fn serialize_field<T: Serialize + ?Sized>(
        &mut self,
        key: &'static str,
        value: &T,
    ) -> Result<(), Refused> {
        self.put(key, value)
    }

    fn end(self) -> Result<(), Refused> {
        self.close();
        Ok(())
    }
}

impl SerializeMap for Members<'_> {
    type Ok = ();
    type Error = Refused;

    fn serialize_key<T: Serialize + ?Sized>(&mut self, key: &T) -> Result<(), Refused> {
        self.separate();
        let start = self.json.len();
        // A map of one entry makes serde_json write the key as it writes any key: numbers quoted, lists refused.
        serde_json::to_writer(&mut *self.json, &OneEntry(key))?;
        // `{"key":null}` becomes `"key":`.
        self.json.remove(start);
        self.json.truncate(self.json.len() - "null}".len());
        let written = &self.json[start..self.json.len() - 1];
        if let Some(key) = RESERVED.iter().find(|name| {
            written.strip_prefix(b"\"").and_then(|rest| rest.strip_suffix(b"\"")) == Some(name.as_bytes())
        }) {
            return Err(reserved(key));
        }
        self.key_end = self.json.len();
        Ok(())
    }

    fn serialize_value<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), Refused> {
        debug_assert_eq!(
            self.key_end,
            self.json.len(),
            "serde calls serialize_value right after serialize_key"
        );
        Ok(serde_json::to_writer(&mut *self.json, value)?)
    }

    fn end(self) -> Result<(), Refused> {
        self.close();
        Ok(())
    }
}

struct OneEntry<'k, K: ?Sized>(&'k K);

impl<K: Serialize + ?Sized> Serialize for OneEntry<'_, K> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(1))?;
        map.serialize_entry(self.0, &())?;
        map.end()
    }
}

macro_rules! refuse {
    ($($method:ident($($ty:ty),*) $found:literal;)*) => {
        $(fn $method(self, $(_: $ty),*) -> Result<(), Refused> {
            no_object($found)
        })*
    };
}

impl<'a> Serializer for Object<'a> {
    type Ok = ();
    type Error = Refused;
    type SerializeSeq = Impossible<(), Refused>;
    type SerializeTuple = Impossible<(), Refused>;
    type SerializeTupleStruct = Impossible<(), Refused>;
    type SerializeTupleVariant = Impossible<(), Refused>;
    type SerializeMap = Members<'a>;
    type SerializeStruct = Members<'a>;
    type SerializeStructVariant = Impossible<(), Refused>;

    refuse! {
        serialize_bool(bool) "a boolean";
        serialize_i8(i8) "a number";
        serialize_i16(i16) "a number";
        serialize_i32(i32) "a number";
        serialize_i64(i64) "a number";
        serialize_u8(u8) "a number";
        serialize_u16(u16) "a number";
        serialize_u32(u32) "a number";
        serialize_u64(u64) "a number";
        serialize_f32(f32) "a number";
        serialize_f64(f64) "a number";
        serialize_char(char) "a string";
        serialize_str(&str) "a string";
        serialize_bytes(&[u8]) "a list";
        serialize_none() "null";
        serialize_unit() "null";
        serialize_unit_struct(&'static str) "null";
        serialize_unit_variant(&'static str, u32, &'static str) "a string";
    }

    fn serialize_some<T: Serialize + ?Sized>(self, value: &T) -> Result<(), Refused> {
        value.serialize(self)
    }

    fn serialize_newtype_struct<T: Serialize + ?Sized>(
        self,
        _: &'static str,
        value: &T,
    ) -> Result<(), Refused> {
        value.serialize(self)
    }

    fn serialize_newtype_variant<T: Serialize + ?Sized>(
        self,
        _: &'static str,
        _: u32,
        variant: &'static str,
        value: &T,
    ) -> Result<(), Refused> {
        let mut members = self.open();
        members.put(variant, value)?;
        members.close();
        Ok(())
    }

    fn serialize_seq(self, _: Option<usize>) -> Result<Self::SerializeSeq, Refused> {
        no_object("a list")
    }

    fn serialize_tuple(self, _: usize) -> Result<Self::SerializeTuple, Refused> {
        no_object("a list")
    }

    fn serialize_tuple_struct(
        self,
        _: &'static str,
        _: usize,
    ) -> Result<Self::SerializeTupleStruct, Refused> {
        no_object("a list")
    }

    fn serialize_tuple_variant(
        self,
        _: &'static str,
        _: u32,
        _: &'static str,
        _: usize,
    ) -> Result<Self::SerializeTupleVariant, Refused> {
        no_object("an externally tagged enum; use `#[serde(tag = \"…\")]`")
    }

    fn serialize_map(self, _: Option<usize>) -> Result<Members<'a>, Refused> {
        Ok(self.open())
    }

    fn serialize_struct(self, _: &'static str, _: usize) -> Result<Members<'a>, Refused> {
        Ok(self.open())
    }

    fn serialize_struct_variant(
        self,
        _: &'static str,
        _: u32,
        _: &'static str,
        _: usize,
    ) -> Result<Self::SerializeStructVariant, Refused> {
        no_object("an externally tagged enum; use `#[serde(tag = \"…\")]`")
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[derive(Serialize)]
    struct Flat {
        text: String,
        #[serde(flatten)]
        rest: BTreeMap<String, u32>,
    }

    fn text(json: Result<Vec<u8>, PipelineError>) -> String {
        match json {
            Ok(json) => String::from_utf8(json).unwrap(),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn structs_and_maps_are_objects() {
        #[derive(Serialize)]
        struct Plain {
            a: Vec<u8>,
            b: Option<f32>,
        }
        assert_eq!(text(to_json(&Plain { a: vec![1, 2], b: None })), r#"{"a":[1,2],"b":null}"#);
        assert_eq!(text(to_json(&BTreeMap::from([(1, "x"), (2, "y\n")]))), r#"{"1":"x","2":"y\n"}"#);
        let flat = Flat { text: "q\"".into(), rest: BTreeMap::from([("k".into(), 3)]) };
        assert_eq!(text(to_json(&flat)), r#"{"text":"q\"","k":3}"#);
        assert_eq!(text(to_json(&BTreeMap::<String, ()>::new())), "{}");
    }

    #[test]
    fn reserved_members_are_refused_wherever_they_come_from() {
        for name in RESERVED {
            let flat = Flat { text: String::new(), rest: BTreeMap::from([(name.into(), 1)]) };
            assert!(text(to_json(&flat)).contains(&format!("`{name}`, which is the host's")));
        }
        #[derive(Serialize)]
        struct Owns {
            meta: u8,
        }
        assert!(text(to_json(&Owns { meta: 1 })).contains("`meta`"));
    }

    #[test]
    fn what_is_no_number_is_refused() {
        let said = text(to_json(&BTreeMap::from([("a", vec![1.0, f64::NAN])])));
        assert!(said.ends_with("expected a finite number, found NaN in `a[1]`"), "{said}");
        assert_eq!(text(to_json(&BTreeMap::from([("a", 1.0)]))), r#"{"a":1.0}"#);
    }

    #[test]
    fn what_is_no_object_is_refused_with_what_it_is() {
        assert!(text(to_json(&vec![1])).contains("found a list"));
        assert!(text(to_json(&"x")).contains("found a string"));
        assert!(text(to_json(&1.5)).contains("found a number"));
        assert!(text(to_json(&Option::<Flat>::None)).contains("found null"));
    }
}
