//! `GET /openapi.json`: what this host answers, as a document of OpenAPI 3.1. It is made of the list of endpoints and of the models that serve, and made again
//! when these change.

mod document;
mod operations;
mod parameters;
mod plugin_schema;
mod problems;
mod shapes;

use std::sync::{Arc, Weak};

use arc_swap::ArcSwapOption;
use bytes::Bytes;
use hyper::{
    HeaderMap, StatusCode,
    header::{CACHE_CONTROL, ETAG, HeaderValue, IF_NONE_MATCH},
    http::request::Parts,
};
use modalkit_engine::{Datatype, Signature, TensorSpec};
use serde_json::{Value, json};

use self::plugin_schema::{COMPONENTS, Components, adopt, component_name, plain_name, reference};
use super::{Context, body::SmallBody, endpoints::Target, refusal::let_in};
use crate::{
    access::{AskedFor, Origin},
    config::Task,
    egress::{self, HttpResponse},
    pipeline::{Generation, Model},
    protocol::{object, v2::Form},
    ui::weak_tag,
    work::JobError,
};

/// What the document is made of beside the endpoints.
struct Described {
    /// The models that serve.
    models: Vec<DescribedModel>,
    /// All models' names and tasks, also of those that don't serve now.
    known: Vec<(String, Option<Task>)>,
    asked_for: AskedFor,
}

/// A model that serves, as the document describes it.
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
pub(super) struct Cache {
    last: ArcSwapOption<Made>,
    /// One is made at a time.
    making: tokio::sync::Mutex<()>,
}

struct Made {
    of: Key,
    tag: HeaderValue,
    document: Bytes,
}

/// What a document was made of. It keeps no generation, and with it no library, from going.
struct Key {
    known: Vec<(String, Option<Task>)>,
    serving: Vec<(String, Weak<Generation>, Option<Weak<Signature>>)>,
    asked_for: AskedFor,
}

impl PartialEq for Key {
    fn eq(&self, other: &Self) -> bool {
        let same = |(one, other): (&(_, Weak<Generation>, Option<Weak<Signature>>), &(_, _, _))| {
            let signatures = match (&one.2, &other.2) {
                (Some(one), Some(other)) => Weak::ptr_eq(one, other),
                (None, None) => true,
                _ => false,
            };
            one.0 == other.0 && Weak::ptr_eq(&one.1, &other.1) && signatures
        };
        self.known == other.known
            && self.asked_for == other.asked_for
            && self.serving.len() == other.serving.len()
            && self.serving.iter().zip(&other.serving).all(same)
    }
}

/// A model that serves.
struct Served {
    name: String,
    task: Option<Task>,
    generation: Arc<Generation>,
    signature: Option<Arc<Signature>>,
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
    let fresh = |key: &Key| context.openapi.last.load_full().filter(|last| last.of == *key);
    if let Some(last) = fresh(&key(context, &served(context))) {
        return Ok(last);
    }
    let _making = context.openapi.making.lock().await;
    // Whoever was here before may have made it.
    let served = served(context);
    let key = key(context, &served);
    if let Some(last) = fresh(&key) {
        return Ok(last);
    }
    // Schemas may be large, and are as many as there are models.
    let made = context.blocking.spawn_blocking(move || Arc::new(make(served, key)));
    let made = made.await.map_err(|_| JobError::Lost)?;
    context.openapi.last.store(Some(Arc::clone(&made)));
    Ok(made)
}

fn served(context: &Context) -> Vec<Served> {
    let all = context.models.all();
    let one = |model: &Arc<Model>| {
        let generation = model.serving().ok()?;
        let signature = generation.signature().ok()?;
        Some(Served { name: model.name.clone(), task: model.spec().task, generation, signature })
    };
    all.values().filter_map(one).collect()
}

fn key(context: &Context, served: &[Served]) -> Key {
    let all = context.models.all();
    let one = |served: &Served| {
        let signature = served.signature.as_ref().map(Arc::downgrade);
        (served.name.clone(), Arc::downgrade(&served.generation), signature)
    };
    Key {
        known: all.values().map(|model| (model.name.clone(), model.spec().task)).collect(),
        serving: served.iter().map(one).collect(),
        asked_for: context.access.asked_for(),
    }
}

fn make(served: Vec<Served>, of: Key) -> Made {
    let mut components = Components::new();
    let mut models: Vec<DescribedModel> = Vec::with_capacity(served.len());
    for served in &served {
        let plain = component_name(&served.name);
        let is_taken =
            |name: &String| models.iter().any(|model| plain_name(&model.component) == plain_name(name));
        let numbered = (2..).map(|number| format!("{plain}_{number}"));
        let component = std::iter::once(plain.clone()).chain(numbered).find(|name| !is_taken(name));
        models.push(describe(served, component.unwrap_or(plain), &mut components));
    }
    let described = Described { models, known: of.known.clone(), asked_for: of.asked_for.clone() };
    let document = object(&document::document(&described, components));
    let tag = HeaderValue::try_from(weak_tag(&document)).expect("it is of letters and digits");
    Made { of, tag, document }
}

fn describe(served: &Served, component: String, components: &mut Components) -> DescribedModel {
    let Served { name, task, generation, signature } = served;
    let description = generation.plugin.description();
    let mut take = |text: &str, role: &str| {
        if let Err(why) = adopt(text, &component, role, components) {
            tracing::warn!(
                model = name,
                role,
                %why,
                "the plugin's JSON Schema can't stand in the OpenAPI document, and is left out there"
            );
            let why: String = why.to_string().chars().take(REASON_CHARS_MAX).collect();
            let about = format!("anything: the plugin's JSON Schema can't be shown here ({why})");
            components.insert(format!("{component}.{role}"), json!({ "description": about }));
        }
    };
    take(&description.input_schema, "Input");
    take(&description.output_schema, "Output");
    let output = format!("{component}.Output");
    let answer = with_status(&components[&output], components);
    components.insert(format!("{component}.Answer"), answer);
    let example = signature.as_ref().and_then(|signature| json_example(signature)).filter(|example| {
        // Names of tensors need not be those of JSON.
        generation.is_of_schema(example)
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

/// Characters of the reason why a schema isn't there: it may repeat the schema.
const REASON_CHARS_MAX: usize = 300;
/// Definitions that an output's schema leads to, up to which they stand in its answer's: they are copied there, and may lead to others many times over.
const REFERENCES_MAX: usize = 32;

/// The schema of an answer: an output's, with the status before it.
fn with_status(output: &Value, components: &Components) -> Value {
    let status = json!({"type": "string", "const": "success"});
    let is_plain = output.get("properties").is_some_and(Value::is_object) && output.get("$ref").is_none();
    if !is_plain {
        let status = json!({"type": "object", "properties": {"status": status}, "required": ["status"]});
        return json!({"allOf": [status, opened(output, components, &mut { REFERENCES_MAX })]});
    }
    let mut whole = output.clone();
    whole["properties"]["status"] = status;
    let required = json!("status");
    match whole["required"].as_array_mut() {
        Some(known) if known.contains(&required) => {}
        Some(known) => known.push(required),
        None => whole["required"] = json!([required]),
    }
    whole
}

/// The same schema, which allows one more member, as far as so many references lead.
fn opened(schema: &Value, components: &Components, references: &mut usize) -> Value {
    let named = |reference: &Value| {
        let name = reference.as_str()?.strip_prefix(COMPONENTS)?;
        components.get(name)
    };
    if *references > 0
        && let Some(definition) = schema.get("$ref").and_then(named)
    {
        *references -= 1;
        return opened(definition, components, references);
    }
    let mut schema = schema.clone();
    let Value::Object(members) = &mut schema else { return schema };
    for word in ["additionalProperties", "unevaluatedProperties"] {
        if members.get(word) == Some(&json!(false)) {
            members.remove(word);
        }
    }
    for word in ["allOf", "anyOf", "oneOf"] {
        if let Some(Value::Array(branches)) = members.get_mut(word) {
            branches.iter_mut().for_each(|branch| *branch = opened(branch, components, references));
        }
    }
    schema
}

/// Elements of all tensors of an input that is shown, and dimensions of each.
const ELEMENTS_MAX: usize = 4096;
const DIMENSIONS_MAX: usize = 8;

/// An input's tensor of zeros: its shape and its elements, in one row; `None` where it is too large to be shown, or has no JSON.
fn zeros(spec: &TensorSpec, text: &str) -> Option<(Vec<u64>, Vec<Value>)> {
    if spec.shape.len() > DIMENSIONS_MAX {
        return None;
    }
    let shape: Vec<u64> = spec.shape.iter().map(|size| size.unwrap_or(1)).collect();
    let elements = shape.iter().try_fold(1u64, |product, size| product.checked_mul(*size))?;
    let elements = usize::try_from(elements).ok().filter(|elements| *elements <= ELEMENTS_MAX)?;
    let element = match spec.datatype {
        Datatype::Fp16 | Datatype::Bf16 => return None,
        Datatype::Bool => json!(false),
        Datatype::Bytes => json!(text),
        _ => json!(0),
    };
    Some((shape, vec![element; elements]))
}

/// A tensor of zeros: its shape, and its elements in one row.
struct Zeros<'s> {
    spec: &'s TensorSpec,
    shape: Vec<u64>,
    elements: Vec<Value>,
}

/// The tensors that an input must have, of zeros.
fn zeros_of<'s>(signature: &'s Signature, text: &str) -> Option<Vec<Zeros<'s>>> {
    let mut left = ELEMENTS_MAX;
    let tensor = |spec: &'s TensorSpec| {
        let (shape, elements) = zeros(spec, text)?;
        left = left.checked_sub(elements.len().max(1))?;
        Some(Zeros { spec, shape, elements })
    };
    signature.inputs.iter().filter(|spec| !spec.optional).map(tensor).collect()
}

/// An input in JSON, of zeros: each tensor by its name, as lists of lists.
fn json_example(signature: &Signature) -> Option<Value> {
    let member = |Zeros { spec, shape, elements }: Zeros<'_>| {
        let nested = shape.iter().rev().fold(elements, |elements, size| {
            let size = usize::try_from(*size).unwrap_or(usize::MAX).max(1);
            elements.chunks(size).map(|chunk| Value::from(chunk.to_vec())).collect()
        });
        Some((spec.name.to_string(), nested.into_iter().next()?))
    };
    let members = zeros_of(signature, "")?.into_iter().map(member);
    members.collect::<Option<serde_json::Map<_, _>>>().map(Value::from)
}

/// A request of the Open Inference Protocol with one input, of zeros.
fn infer_example(signature: &Signature, is_json: bool) -> Option<Value> {
    let tensor = |Zeros { spec, shape, elements }: Zeros<'_>| {
        let shape: Vec<u64> = signature.batched.then_some(1).into_iter().chain(shape).collect();
        json!({"name": &*spec.name, "datatype": spec.datatype.name(), "shape": shape, "data": elements})
    };
    let inputs = zeros_of(signature, if is_json { "{}" } else { "" })?.into_iter().map(tensor);
    Some(json!({"inputs": inputs.collect::<Vec<_>>()}))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_an_output_with_its_status() {
        let open = json!({"type": "object", "properties": {"a": {}}, "required": ["a"], "additionalProperties": false});
        let none = Components::new();
        let whole = with_status(&open, &none);
        assert_eq!(whole["required"], json!(["a", "status"]));
        assert_eq!(whole["properties"]["status"]["const"], "success");
        assert_eq!(with_status(&whole, &none)["required"], whole["required"], "nothing is required twice");
        assert_eq!(with_status(&json!({}), &none)["allOf"][1], json!({}));
        let closed = json!({"type": "object", "additionalProperties": false});
        let components = Components::from([("m.One".to_owned(), closed.clone())]);
        let either = json!({"oneOf": [{"$ref": "#/components/schemas/m.One"}, closed]});
        let answer = with_status(&either, &components);
        assert_eq!(answer["allOf"][1]["oneOf"], json!([{"type": "object"}, {"type": "object"}]));
        // Each leads to the next ten times: copied everywhere they would fill any memory.
        let next = |number: u32| json!({"anyOf": vec![reference(&format!("m.D{}", number + 1)); 10]});
        let components = (0..20).map(|number| (format!("m.D{number}"), next(number))).collect();
        assert!(with_status(&reference("m.D0"), &components).to_string().len() < 100_000);
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
        let flat =
            Signature { inputs: vec![spec("f", Datatype::Fp32, &[Some(1); 20_000], false)], ..half.clone() };
        assert!(infer_example(&flat, false).is_none() && json_example(&flat).is_none());
        let many =
            (0..5000).map(|number| spec(&format!("t{number}"), Datatype::Int8, &[Some(0)], false)).collect();
        assert!(json_example(&Signature { inputs: many, ..half }).is_none());
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
