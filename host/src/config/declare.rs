//! How keys are declared: one list for each table, from which its parts in files, their merging, their defaults, their schema
//! and what `check` prints all follow. It never knows which keys there are.

/// Declares a table: `name: Type = default or "what the default follows from";`.
macro_rules! layer {
    (
        $(#[doc = $about:literal])+
        pub(super) struct $layer:ident {
            $( $(#[doc = $doc:literal])+ $field:ident: $type:ty $(= $default:expr)? $(, or $note:literal)?; )*
        }
        $(rest $rest:ident;)?
    ) => {
        $(#[doc = $about])+
        #[derive(Clone, Debug, Default, PartialEq)]
        pub(super) struct $layer {
            $( $(#[doc = $doc])+ pub(super) $field: $crate::config::layer::Slot<$type>, )*
            $( pub(super) $rest: $crate::config::types::FreeForm, )?
        }

        impl $layer {
            /// The keys that have a meaning here.
            pub(super) const KEYS: &[&str] = &[$($crate::config::layer::name(stringify!($field)),)*];
            $($(
                /// What is written, else the default.
                #[allow(dead_code, reason = "defaults of keys whose feature isn't here yet are only shown")]
                pub(super) fn $field(&self) -> $type {
                    let default: fn() -> $type = || $default;
                    self.$field.value().cloned().unwrap_or_else(default)
                }
            )?)*
        }

        impl $crate::config::layer::Setting for $layer {
            fn expected() -> String {
                format!("a table with the keys {}", $crate::config::fault::listed(Self::KEYS.iter().copied()))
            }

            fn empty() -> Option<Self> {
                Some(Self::default())
            }

            fn read(
                node: &$crate::config::node::Node,
                key: &str,
                reader: &mut $crate::config::layer::Reader,
            ) -> Option<Self> {
                let node = node.opened();
                if !matches!(node.value, $crate::config::node::Value::Map(_)) {
                    return reader.refuse_kind(&node, key, Self::expected());
                }
                let mut read = Self::default();
                for entry in node.entries() {
                    let path = $crate::config::layer::child(key, &entry.name);
                    let before = reader.faults.len();
                    $( if entry.name == $crate::config::layer::name(stringify!($field)) {
                        read.$field = $crate::config::layer::Slot::read(&entry.node, &path, reader);
                        reader.add_hints::<$type>(before, &path, &[$($doc),+], $crate::config::declare::layer!(@option $($default)?));
                        continue;
                    } )*
                    if !$crate::config::declare::layer!(@rest read, entry $(, $rest)?) {
                        reader.unknown(&entry.at, key, &entry.name, Self::KEYS);
                    }
                }
                Some(read)
            }

            fn merge(&mut self, later: Self) {
                $( self.$field.merge(later.$field); )*
                $( $crate::config::layer::Setting::merge(&mut self.$rest, later.$rest); )?
            }

            fn json(&self, defaults: bool) -> serde_json::Value {
                let mut members = serde_json::Map::new();
                $( if let Some(value) = self.$field.json($crate::config::declare::layer!(@option $($default)?), defaults) {
                    members.insert($crate::config::layer::name(stringify!($field)).to_owned(), value);
                } )*
                $( if let serde_json::Value::Object(own) = self.$rest.json(defaults) {
                    members.extend(own);
                } )?
                serde_json::Value::Object(members)
            }

            fn schema() -> serde_json::Value {
                let mut properties = serde_json::Map::new();
                $( properties.insert($crate::config::layer::name(stringify!($field)).to_owned(), $crate::config::layer::property::<$type>(
                    &[$($doc),+], $crate::config::declare::layer!(@option $($default)?), $crate::config::declare::layer!(@option $($note)?),
                )); )*
                let rest = $crate::config::declare::layer!(@has $($rest)?);
                $crate::config::layer::table_schema(&[$($about),+], properties, rest)
            }

            fn rows(
                &self,
                key: &str,
                _at: &$crate::config::fault::Place,
                defaults: bool,
                rows: &mut Vec<$crate::config::layer::Row>,
            ) {
                $( self.$field.rows(
                    &$crate::config::layer::child(key, $crate::config::layer::name(stringify!($field))),
                    $crate::config::declare::layer!(@option $($default)?), $crate::config::declare::layer!(@option $($note)?), defaults, rows,
                ); )*
                $( $crate::config::layer::Setting::rows(&self.$rest, key, &$crate::config::fault::Place::Default, defaults, rows); )?
            }

            fn warn(&self, key: &str, warnings: &mut Vec<$crate::config::fault::Warning>) {
                $( if let Some(value) = self.$field.value() {
                    $crate::config::layer::Setting::warn(value, &$crate::config::layer::child(key, $crate::config::layer::name(stringify!($field))), warnings);
                } )*
                // A table without such keys has nothing to say.
                let _ = (key, warnings);
            }
        }
    };
    (@option) => { None };
    (@option $value:expr) => { Some($value) };
    (@has) => { false };
    (@has $rest:ident) => { true };
    (@rest $read:ident, $entry:ident) => { false };
    (@rest $read:ident, $entry:ident, $rest:ident) => {{
        $read.$rest.add($entry);
        true
    }};
}
pub(crate) use layer;
