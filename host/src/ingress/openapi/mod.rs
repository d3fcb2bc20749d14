//! `GET /openapi.json`: what this host answers, as a document of OpenAPI 3.1. It is made of the list of endpoints and of the models that serve, and made again
//! when these change.

mod document;
mod operations;
mod plugin_schema;
mod shapes;

use std::sync::Arc;

use arc_swap::ArcSwapOption;
use bytes::Bytes;
use hyper::{
    HeaderMap, StatusCode,
    header::{CACHE_CONTROL, ETAG, HeaderValue, IF_NONE_MATCH},
    http::request::Parts,
};
use modalkit_engine::{Datatype, Signature, TensorSpec};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use self::plugin_schema::{Components, adopt, component_name, reference};
use super::{Context, body::SmallBody, endpoints::Target, refusal::let_in};
use crate::{
    access::Origin,
    config::Task,
    egress::{self, HttpResponse},
    pipeline::Generation,
    protocol::{object, v2::Form},
    work::JobError,
};

/// A model, as the document describes it.
struct DescribedModel {
    name: String,
    /// What its schemas' names begin with.
    component: String,
    task: Option<Task>,
    /// The schema of an input, and of the answer with its output.
    input: Value,
    answer: Value,
    /// An input that it takes, where one can be made up; and a request of the Open Inference Protocol.
    example: Option<Value>,
    infer_example: Option<Value>,
}

/// The document as it was made last.
#[derive(Default)]
pub(super) struct Cache(ArcSwapOption<Made>);

struct Made {
    of: Vec<Served>,
    key_header: Option<String>,
    tag: HeaderValue,
    document: Bytes,
}

/// A model that serves, and what its description is made of.
#[derive(Clone)]
struct Served {
    name: String,
    task: Option<Task>,
    generation: Arc<Generation>,
    signature: Option<Arc<Signature>>,
}

impl PartialEq for Served {
    fn eq(&self, other: &Self) -> bool {
        let same = |one: &Option<Arc<Signature>>, other: &Option<Arc<Signature>>| match (one, other) {
            (Some(one), Some(other)) => Arc::ptr_eq(one, other),
            (None, None) => true,
            _ => false,
        };
        self.name == other.name
            && self.task == other.task
            && Arc::ptr_eq(&self.generation, &other.generation)
            && same(&self.signature, &other.signature)
    }
}

pub(super) async fn answer(
    context: &Context,
    from: &Origin,
    body: SmallBody<'_>,
    head: &Parts,
    target: Target<'_>,
) -> HttpResponse {
    let caller = match let_in(context, from, head, target, "") {
        Ok(caller) => caller,
        Err(refused) => return *refused,
    };
    body.keep(caller.permit.as_ref());
    let made = match made(context).await {
        Ok(made) => made,
        Err(error) => return egress::error(&error),
    };
    let mut response = match made.tag.to_str() {
        Ok(tag) if is_known(&head.headers, tag) => not_modified(),
        _ => HttpResponse::new(made.document.clone().into()),
    };
    response.headers_mut().insert(ETAG, made.tag.clone());
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("private, no-cache"));
    response
}

/// Whether a caller has this already.
pub(super) fn is_known(headers: &HeaderMap, tag: &str) -> bool {
    let plain = |tag: &str| tag.trim().trim_start_matches("W/").to_owned();
    headers
        .get_all(IF_NONE_MATCH)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .any(|known| known.trim() == "*" || known.split(',').any(|known| plain(known) == plain(tag)))
}

pub(super) fn not_modified() -> HttpResponse {
    let mut response = HttpResponse::default();
    *response.status_mut() = StatusCode::NOT_MODIFIED;
    response
}

/// The document as things are now.
async fn made(context: &Context) -> Result<Arc<Made>, JobError> {
    let of = served(context);
    let key_header = context.access.key_header();
    let last = context.openapi.0.load_full();
    if let Some(last) = last.filter(|last| last.of == of && last.key_header == key_header) {
        return Ok(last);
    }
    // Schemas may be large, and are as many as there are models.
    let made = context.blocking.spawn_blocking(move || Arc::new(make(of, key_header)));
    let made = made.await.map_err(|_| JobError::Lost)?;
    context.openapi.0.store(Some(Arc::clone(&made)));
    Ok(made)
}

fn served(context: &Context) -> Vec<Served> {
    let all = context.models.all();
    let one = |model: &Arc<crate::pipeline::Model>| {
        let generation = model.serving().ok()?;
        let signature = generation.signature().ok()?;
        Some(Served { name: model.name.clone(), task: model.spec().task, generation, signature })
    };
    all.values().filter_map(one).collect()
}

fn make(of: Vec<Served>, key_header: Option<String>) -> Made {
    let mut components = Components::new();
    let mut models: Vec<DescribedModel> = Vec::with_capacity(of.len());
    for served in &of {
        let plain = component_name(&served.name);
        let is_taken = |name: &String| models.iter().any(|model| model.component == *name);
        let numbered = (2..).map(|number| format!("{plain}_{number}"));
        let component =
            std::iter::once(plain.clone()).chain(numbered).find(|name| !is_taken(name)).unwrap_or(plain);
        models.push(describe(served, component, &mut components));
    }
    let document = object(&document::document(&models, components, key_header.as_deref()));
    let digest = Sha256::digest(&document);
    let tag = format!("W/\"{}\"", digest[..12].iter().map(|byte| format!("{byte:02x}")).collect::<String>());
    let tag = HeaderValue::try_from(tag).unwrap_or_else(|_| HeaderValue::from_static("W/\"\""));
    Made { of, key_header, tag, document }
}

fn describe(served: &Served, component: String, components: &mut Components) -> DescribedModel {
    let Served { name, task, generation, signature } = served;
    let description = generation.plugin.description();
    let mut take = |text: &str, role: &str| {
        if let Err(why) = adopt(text, &component, role, components) {
            tracing::warn!(
                model = name,
                role,
                why,
                "the plugin's JSON Schema can't stand in the OpenAPI document, and is left out there"
            );
            let about = format!("anything: the plugin's JSON Schema can't be shown here ({why})");
            components.insert(format!("{component}.{role}"), json!({ "description": about }));
        }
    };
    take(&description.input_schema, "Input");
    take(&description.output_schema, "Output");
    let output = format!("{component}.Output");
    let answer = with_status(&components[&output], &output);
    components.insert(format!("{component}.Answer"), answer);
    let example = signature.as_ref().and_then(|signature| json_example(signature)).filter(|example| {
        // Names of tensors need not be those of JSON.
        let schema = serde_json::from_str::<Value>(&description.input_schema);
        schema.is_ok_and(|schema| {
            jsonschema::validator_for(&schema).is_ok_and(|validator| validator.is_valid(example))
        })
    });
    DescribedModel {
        name: name.clone(),
        example,
        task: *task,
        input: reference(&format!("{component}.Input")),
        answer: reference(&format!("{component}.Answer")),
        infer_example: infer_example(Form::of(signature.clone()).signature(), signature.is_none()),
        component,
    }
}

/// The schema of an answer: an output's, with the status before it.
fn with_status(output: &Value, name: &str) -> Value {
    let status = json!({"type": "string", "const": "success"});
    let is_plain = output.get("properties").is_some_and(Value::is_object) && output.get("$ref").is_none();
    if !is_plain {
        let status = json!({"type": "object", "properties": {"status": status}, "required": ["status"]});
        return json!({"allOf": [status, reference(name)]});
    }
    let mut whole = output.clone();
    whole["properties"]["status"] = status;
    match whole["required"].as_array_mut() {
        Some(required) => required.push(json!("status")),
        None => whole["required"] = json!(["status"]),
    }
    whole
}

/// Elements of a tensor that is shown.
const ELEMENTS_MAX: u64 = 4096;

/// An input's tensor of zeros: its shape and its elements, in one row; `None` where it is too large to be shown, or has no JSON.
fn zeros(spec: &TensorSpec, text: &str) -> Option<(Vec<u64>, Vec<Value>)> {
    let shape: Vec<u64> = spec.shape.iter().map(|size| size.unwrap_or(1)).collect();
    let elements = shape.iter().try_fold(1u64, |product, size| product.checked_mul(*size))?;
    let element = match spec.datatype {
        Datatype::Fp16 | Datatype::Bf16 => return None,
        Datatype::Bool => json!(false),
        Datatype::Bytes => json!(text),
        _ => json!(0),
    };
    (elements <= ELEMENTS_MAX).then(|| (shape, vec![element; elements as usize]))
}

/// An input in JSON, of zeros: each tensor by its name, as lists of lists.
fn json_example(signature: &Signature) -> Option<Value> {
    let member = |spec: &TensorSpec| {
        let (shape, elements) = zeros(spec, "")?;
        let nested = shape.iter().rev().fold(elements, |elements, size| {
            let size = usize::try_from(*size).unwrap_or(usize::MAX).max(1);
            elements.chunks(size).map(|chunk| Value::from(chunk.to_vec())).collect()
        });
        Some((spec.name.to_string(), nested.into_iter().next()?))
    };
    let inputs = signature.inputs.iter().filter(|spec| !spec.optional).map(member);
    inputs.collect::<Option<serde_json::Map<_, _>>>().map(Value::from)
}

/// A request of the Open Inference Protocol with one input, of zeros.
fn infer_example(signature: &Signature, is_json: bool) -> Option<Value> {
    let tensor = |spec: &TensorSpec| {
        let (shape, data) = zeros(spec, if is_json { "{}" } else { "" })?;
        let shape: Vec<u64> = signature.batched.then_some(1).into_iter().chain(shape).collect();
        Some(json!({"name": &*spec.name, "datatype": spec.datatype.name(), "shape": shape, "data": data}))
    };
    let inputs = signature.inputs.iter().filter(|spec| !spec.optional).map(tensor);
    Some(json!({"inputs": inputs.collect::<Option<Vec<_>>>()?}))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_an_output_with_its_status() {
        let open = json!({"type": "object", "properties": {"a": {}}, "required": ["a"], "additionalProperties": false});
        let whole = with_status(&open, "m.Output");
        assert_eq!(whole["required"], json!(["a", "status"]));
        assert_eq!(whole["properties"]["status"]["const"], "success");
        assert_eq!(with_status(&json!({"$ref": "#"}), "m.Output")["allOf"][1], reference("m.Output"));
        assert_eq!(with_status(&json!({}), "m.Output")["allOf"][1], reference("m.Output"));
    }

    #[test]
    fn examples_have_the_shapes_of_a_signature() {
        let spec = |name: &str, datatype, shape: &[Option<u64>], optional| TensorSpec {
            name: name.into(),
            datatype,
            shape: shape.to_vec(),
            optional,
        };
        let inputs = vec![
            spec("m", Datatype::Fp32, &[Some(2), None], false),
            spec("s", Datatype::Bytes, &[], false),
            spec("o", Datatype::Int64, &[], true),
        ];
        let signature = Signature { inputs, outputs: Vec::new(), batched: true };
        assert_eq!(json_example(&signature), Some(json!({"m": [[0], [0]], "s": ""})));
        let infer = infer_example(&signature, false).unwrap();
        assert_eq!(
            infer["inputs"][0],
            json!({"name": "m", "datatype": "FP32", "shape": [1, 2, 1], "data": [0, 0]})
        );
        let half = Signature { inputs: vec![spec("h", Datatype::Fp16, &[Some(1)], false)], ..signature };
        assert!(infer_example(&half, false).is_none() && json_example(&half).is_none());
    }

    #[test]
    fn what_a_caller_has_is_known_by_its_tag() {
        let known = |value: &str| {
            let headers = HeaderMap::from_iter([(IF_NONE_MATCH, HeaderValue::from_str(value).unwrap())]);
            is_known(&headers, "W/\"a1\"")
        };
        assert!(known("W/\"a1\"") && known("\"a1\"") && known("\"b\", W/\"a1\"") && known("*"));
        assert!(!known("\"a2\"") && !known(""));
    }
}
