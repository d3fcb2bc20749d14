//! JSON as it goes in and out: texts that stand as they came.

use std::{borrow::Cow, fmt, marker::PhantomData};

use bytes::Bytes;
use serde::{
    Deserialize, Deserializer, Serialize,
    de::{MapAccess, Visitor, value::MapAccessDeserializer},
};
use serde_json::value::{RawValue, to_raw_value};

/// Bytes as a part of a JSON text, as they stand; those that aren't JSON as a text.
#[must_use]
pub fn raw_json(bytes: &[u8]) -> Cow<'_, RawValue> {
    match serde_json::from_slice::<&RawValue>(bytes) {
        Ok(json) => Cow::Borrowed(json),
        Err(_) => Cow::Owned(to_raw_value(&String::from_utf8_lossy(bytes)).expect("a text is JSON")),
    }
}

/// What is an object in JSON, and nothing else: serde also takes a struct's fields from a list, by their places.
#[derive(Clone, Debug, Default)]
pub(super) struct Object<T>(pub(super) T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Members<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for Members<T> {
            type Value = Object<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, members: A) -> Result<Object<T>, A::Error> {
                T::deserialize(MapAccessDeserializer::new(members)).map(Object)
            }
        }

        deserializer.deserialize_map(Members(PhantomData))
    }
}

/// A value of this host's own types as JSON.
#[must_use]
pub fn object(value: &impl Serialize) -> Bytes {
    serde_json::to_vec(value).expect("what this host writes are JSON values").into()
}
