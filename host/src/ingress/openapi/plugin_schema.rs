//! A plugin's JSON Schema as a component of the OpenAPI document: its definitions get names of their own there, and its references lead to them. One that can't
//! be that is left out, with the reason: it is its plugin's fault, and hurts nobody else's description. It never knows models.

use std::collections::{BTreeMap, BTreeSet};

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use serde_json::{Map, Value, json};

/// Where components stand in the document.
pub(super) const COMPONENTS: &str = "#/components/schemas/";
/// What may stand in a JSON pointer in a URI as it is.
const IN_POINTERS: &AsciiSet =
    &NON_ALPHANUMERIC.remove(b'/').remove(b'~').remove(b'-').remove(b'.').remove(b'_').remove(b'$');
/// Bytes of a schema as a text, and levels of it, up to which it is taken.
const BYTES_MAX: usize = 256 << 10;
const DEPTH_MAX: usize = 64;
/// Members that would change what a schema's references lead to, or what its words mean.
const NOT_IN_A_COMPONENT: [&str; 7] =
    ["$id", "$schema", "$anchor", "$dynamicRef", "$dynamicAnchor", "$recursiveRef", "$recursiveAnchor"];

/// Why a schema can't be a component.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Unfit(String);

/// Schemas by their names.
pub(super) type Components = BTreeMap<String, Value>;

/// A reference to a component.
pub(super) fn reference(name: &str) -> Value {
    json!({ "$ref": format!("{COMPONENTS}{name}") })
}

/// A name of letters that a component's may have, without the dot, which stands between a model and what is its own.
pub(super) fn component_name(name: &str) -> String {
    let letter = |letter: char| {
        let fits = letter.is_ascii_alphanumeric() || matches!(letter, '_' | '-');
        if fits { letter } else { '_' }
    };
    name.chars().map(letter).collect()
}

/// A name as generated code may have it: it tells neither case nor what stands between letters.
pub(super) fn plain_name(name: &str) -> String {
    name.chars().filter(char::is_ascii_alphanumeric).map(|letter| letter.to_ascii_lowercase()).collect()
}

/// Takes a schema in, as `MODEL.ROLE`, and its definitions as `MODEL.NAME`.
///
/// # Errors
/// Why it can't be taken; nothing of it was.
pub(super) fn adopt(text: &str, model: &str, role: &str, components: &mut Components) -> Result<(), Unfit> {
    if text.len() > BYTES_MAX {
        return Err(Unfit(format!("expected at most {BYTES_MAX} bytes, found {}", text.len())));
    }
    let mut root: Value =
        serde_json::from_str(text).map_err(|error| Unfit(format!("it is no JSON: {error}")))?;
    // As a validator takes it: also its patterns and references.
    jsonschema::draft202012::new(&root).map_err(|error| Unfit(error.to_string()))?;
    if let Some(members) = root.as_object_mut() {
        // What it is written in, and where it can be found: the document's business.
        members.remove("$schema");
        members.remove("$id");
    }
    let mut definitions = Vec::new();
    for room in ["$defs", "definitions"] {
        let taken = root.as_object_mut().and_then(|members| members.remove(room));
        let Some(Value::Object(taken)) = taken else { continue };
        definitions.extend(taken.into_iter().map(|(name, schema)| Definition {
            place: format!("#/{room}/{}", escaped(&name)),
            name,
            schema,
        }));
    }
    // Its name in the document says more than `Input`.
    let drop_title = |schema: &mut Value| schema.as_object_mut().map(|members| members.remove("title"));
    drop_title(&mut root);
    definitions.iter_mut().for_each(|definition| drop(drop_title(&mut definition.schema)));
    let root_name = format!("{model}.{role}");
    let mut known: BTreeMap<String, String> = BTreeMap::new();
    // Names that are there already, with another content, or that differ in letters that no name may have.
    let of_model = ["Input", "Output", "Answer"].map(|role| plain_name(&format!("{model}.{role}")));
    let mut taken: BTreeSet<String> =
        components.keys().map(|name| plain_name(name)).chain(of_model).collect();
    for Definition { place, name, .. } in &definitions {
        let plain = format!("{model}.{}", component_name(name));
        let of_role = format!("{model}.{role}.{}", component_name(name));
        let numbered = (2..).map(|number| format!("{of_role}.{number}"));
        let mut candidates = [plain, of_role.clone()].into_iter().chain(numbered);
        let Some(free) = candidates.find(|name| !taken.contains(&plain_name(name))) else { continue };
        taken.insert(plain_name(&free));
        known.insert(place.clone(), free);
    }
    let rewriter = Rewriter { root: &root_name, known: &known };
    let mut adopted = Components::new();
    rewriter.schema(&mut root, 0)?;
    adopted.insert(root_name.clone(), root);
    for Definition { place, mut schema, .. } in definitions {
        rewriter.schema(&mut schema, 0)?;
        if let Some(name) = known.get(&place) {
            adopted.insert(name.clone(), schema);
        }
    }
    components.append(&mut adopted);
    Ok(())
}

/// A definition within a schema.
struct Definition {
    /// Where it is, as references in the schema say it.
    place: String,
    name: String,
    schema: Value,
}

/// A step of a JSON pointer.
fn escaped(step: &str) -> String {
    step.replace('~', "~0").replace('/', "~1")
}

/// Rewrites references.
struct Rewriter<'a> {
    root: &'a str,
    /// Definitions' names in the document, by their places in the schema.
    known: &'a BTreeMap<String, String>,
}

impl Rewriter<'_> {
    fn schema(&self, schema: &mut Value, depth: usize) -> Result<(), Unfit> {
        if depth > DEPTH_MAX {
            return Err(Unfit(format!("expected at most {DEPTH_MAX} levels")));
        }
        // `true` and `false` are schemas too.
        let Value::Object(members) = schema else { return Ok(()) };
        if let Some(found) = NOT_IN_A_COMPONENT.iter().find(|name| members.contains_key(**name)) {
            return Err(Unfit(format!("{found} has no meaning within another document")));
        }
        for (word, value) in members.iter_mut() {
            match (word.as_str(), value) {
                ("$ref", Value::String(place)) => *place = self.place(place)?,
                (
                    "properties" | "patternProperties" | "$defs" | "definitions" | "dependentSchemas"
                    | "dependencies",
                    Value::Object(schemas),
                ) => self.schemas(schemas, depth)?,
                ("allOf" | "anyOf" | "oneOf" | "prefixItems" | "items", Value::Array(schemas)) => {
                    schemas.iter_mut().try_for_each(|schema| self.schema(schema, depth + 1))?;
                }
                (
                    "items"
                    | "additionalProperties"
                    | "additionalItems"
                    | "not"
                    | "if"
                    | "then"
                    | "else"
                    | "contains"
                    | "propertyNames"
                    | "unevaluatedItems"
                    | "unevaluatedProperties"
                    | "contentSchema",
                    schema,
                ) => self.schema(schema, depth + 1)?,
                _ => {}
            }
        }
        Ok(())
    }

    fn schemas(&self, schemas: &mut Map<String, Value>, depth: usize) -> Result<(), Unfit> {
        schemas.values_mut().try_for_each(|schema| self.schema(schema, depth + 1))
    }

    /// Where a reference leads in the document.
    fn place(&self, place: &str) -> Result<String, Unfit> {
        if place == "#" {
            return Ok(format!("{COMPONENTS}{}", self.root));
        }
        // A reference is a URI's: letters of its names may be escaped in it.
        let plain = percent_decode_str(place).decode_utf8_lossy();
        if let Some(name) = self.known.get(&*plain) {
            return Ok(format!("{COMPONENTS}{name}"));
        }
        // Into a definition, or into the schema itself.
        for (definition, name) in self.known {
            if let Some(rest) = plain.strip_prefix(definition.as_str()).filter(|rest| rest.starts_with('/')) {
                return Ok(format!("{COMPONENTS}{name}{}", utf8_percent_encode(rest, IN_POINTERS)));
            }
        }
        if plain.starts_with("#/") && !plain.starts_with("#/$defs/") && !plain.starts_with("#/definitions/") {
            return Ok(format!("{COMPONENTS}{}{}", self.root, utf8_percent_encode(&plain[1..], IN_POINTERS)));
        }
        Err(Unfit(format!("the reference {place:?} leads to no definition of it")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adopted(schema: &Value) -> Result<Components, String> {
        let mut components = Components::new();
        let taken = adopt(&schema.to_string(), "m", "Input", &mut components);
        taken.map(|()| components).map_err(|unfit| unfit.to_string())
    }

    #[test]
    fn definitions_become_components_and_references_lead_to_them() {
        let schema = json!({
            "$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Input", "type": "object",
            "properties": {
                "points": {"type": "array", "items": {"$ref": "#/$defs/a%20point"}},
                "again": {"$ref": "#"},
                "$ref": {"const": {"$ref": "data, and no reference"}},
                "own": {"$ref": "#/properties/points"},
                "part": {"$ref": "#/$defs/a%20point/properties/x"},
            },
            "dependencies": {"again": {"$ref": "#/$defs/a%20point"}, "points": ["part"]},
            "$defs": {"a point": {"type": "object", "properties": {"x": {"type": "number"}, "next": {"$ref": "#/$defs/a%20point"}}}},
        });
        let components = adopted(&schema).unwrap();
        assert_eq!(components.keys().collect::<Vec<_>>(), ["m.Input", "m.a_point"]);
        let properties = &components["m.Input"]["properties"];
        assert_eq!(properties["points"]["items"], reference("m.a_point"));
        assert_eq!(properties["again"], reference("m.Input"));
        assert_eq!(properties["own"]["$ref"], "#/components/schemas/m.Input/properties/points");
        assert_eq!(components["m.Input"]["dependencies"]["again"], reference("m.a_point"));
        assert_eq!(properties["$ref"]["const"]["$ref"], "data, and no reference");
        assert_eq!(properties["part"]["$ref"], "#/components/schemas/m.a_point/properties/x");
        assert_eq!(components["m.a_point"]["properties"]["next"], reference("m.a_point"));
        assert!(
            components["m.Input"].get("$schema").is_none() && components["m.Input"].get("title").is_none()
        );
    }

    #[test]
    fn no_name_is_taken_twice() {
        let schema = |kind: &str| json!({"$ref": "#/$defs/Input", "$defs": {"Input": {"type": kind}, "Answer": true, "a b": true, "a_b": false, "A-B": {}}, "definitions": {"a b": {}}});
        let mut components = Components::new();
        adopt(&schema("string").to_string(), "m", "Input", &mut components).unwrap();
        adopt(&schema("number").to_string(), "m", "Output", &mut components).unwrap();
        for (role, kind) in [("Input", "string"), ("Output", "number")] {
            let root = &components[&format!("m.{role}")];
            let name = root["$ref"].as_str().unwrap().strip_prefix(COMPONENTS).unwrap();
            assert_eq!(components[name]["type"], kind);
        }
        assert!(!components.contains_key("m.Answer"), "it is the host's");
        assert_eq!(components.len(), 14, "{components:?}");
        let plain: BTreeSet<String> = components.keys().map(|name| plain_name(name)).collect();
        assert_eq!(plain.len(), components.len());
    }

    #[test]
    fn what_is_no_schema_or_leads_elsewhere_is_refused_and_leaves_nothing() {
        for (schema, expected) in [
            (json!({"type": 7}), "7"),
            (json!([]), "[]"),
            (json!({"$ref": "https://elsewhere.test/schema"}), "elsewhere.test"),
            (json!({"pattern": "("}), "regex"),
            (json!({"properties": {"a": {"$ref": "#/$defs/missing"}}}), "missing"),
            (json!({"properties": {"a": {"$id": "b"}}}), "$id has no meaning"),
            (json!({"items": {"$anchor": "a"}}), "$anchor has no meaning"),
        ] {
            let mut components = Components::new();
            let why = adopt(&schema.to_string(), "m", "Input", &mut components).unwrap_err().to_string();
            assert!(why.contains(expected), "{schema}: {why}");
            assert!(components.is_empty());
        }
        assert!(
            adopt("{", "m", "Input", &mut Components::new()).unwrap_err().to_string().contains("no JSON")
        );
        let deep = (0..100).fold(json!({"type": "string"}), |inner, _| json!({"items": inner}));
        assert!(adopted(&deep).unwrap_err().contains("at most 64 levels"));
        let large = json!({"description": "x".repeat(BYTES_MAX)});
        assert!(adopted(&large).unwrap_err().contains("at most 262144 bytes"));
    }
}
