//! Requests as clients write them, and as nobody should.

use std::sync::Arc;

use bytes::Bytes;
use modalkit_engine::{Datatype, Signature, Tensor, TensorSpec};
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::work::JobError;

const INPUTS_MAX: usize = 8;

fn spec(name: &str, datatype: Datatype, shape: &[Option<u64>], optional: bool) -> TensorSpec {
    TensorSpec { name: name.into(), datatype, shape: shape.to_vec(), optional }
}

fn signature() -> Signature {
    Signature {
        inputs: vec![
            spec("x", Datatype::Fp32, &[Some(2)], false),
            spec("words", Datatype::Bytes, &[None], true),
        ],
        outputs: vec![spec("y", Datatype::Int64, &[None], false), spec("z", Datatype::Bytes, &[None], false)],
        batched: true,
    }
}

fn read(body: &[u8], json_bytes: Option<usize>) -> Result<InferRequest, String> {
    let body = Bytes::copy_from_slice(body);
    read_infer(&body, json_bytes, &Arc::new(signature()), INPUTS_MAX).map_err(|error| match error {
        JobError::Invalid(details) => format!("{:?} {}", details[0].loc, details[0].msg),
        JobError::TooLarge(reason) => format!("too large: {reason}"),
        other => panic!("{other:?} is none of the caller's errors"),
    })
}

fn read_json(body: &Value) -> Result<InferRequest, String> {
    read(body.to_string().as_bytes(), None)
}

fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

#[test]
fn a_batch_is_taken_apart_whether_it_is_json_or_bytes() {
    let as_json = json!({"inputs": [
        {"name": "x", "datatype": "FP32", "shape": [2, 2], "data": [[1, 2.5], [3, 4]]},
        {"name": "words", "datatype": "BYTES", "shape": [2, 1], "data": ["a", "bc"]},
    ]});
    let flat = json!({"inputs": [
        {"name": "words", "datatype": "BYTES", "shape": [2, 1], "data": ["a", "bc"]},
        {"name": "x", "datatype": "FP32", "shape": [2, 2], "data": [1, 2.5, 3, 4]},
    ]});
    let head = json!({"inputs": [
        {"name": "x", "datatype": "FP32", "shape": [2, 2], "parameters": {"binary_data_size": 16}},
        {"name": "words", "datatype": "BYTES", "shape": [2, 1], "parameters": {"binary_data_size": 11}},
    ]})
    .to_string();
    let mut as_bytes = head.clone().into_bytes();
    as_bytes.extend(floats(&[1.0, 2.5, 3.0, 4.0]));
    as_bytes.extend(b"\x01\0\0\0a\x02\0\0\0bc");
    for request in [read_json(&as_json), read_json(&flat), read(&as_bytes, Some(head.len()))] {
        let inputs = request.unwrap().tensors.into_inputs();
        assert_eq!(inputs.len(), 2);
        let named = |input: usize, name: &str| {
            inputs[input].iter().find(|tensor| tensor.name() == name).unwrap().clone()
        };
        assert_eq!(**named(1, "x").data(), floats(&[3.0, 4.0]));
        assert_eq!(**named(1, "words").data(), *b"\x02\0\0\0bc");
        assert_eq!(named(0, "x").shape(), [2]);
    }
}

#[test]
fn bytes_alone_are_the_only_input() {
    let mut one = signature();
    one.inputs.pop();
    let body = Bytes::from(floats(&[1.0, 2.0]));
    let request = read_infer(&body, Some(0), &Arc::new(one.clone()), INPUTS_MAX).unwrap();
    assert_eq!(request.tensors.clone().into_inputs()[0][0].data(), &body);
    one.inputs[0].shape = vec![None, Some(2)];
    let request = read_infer(&body, Some(0), &Arc::new(one.clone()), INPUTS_MAX).unwrap();
    assert_eq!(request.tensors.into_inputs()[0][0].shape(), [1, 2]);
    assert!(read_infer(&body.slice(1..), Some(0), &Arc::new(one.clone()), INPUTS_MAX).is_err());
    one.inputs[0].shape = vec![None, None];
    assert!(read_infer(&body, Some(0), &Arc::new(one.clone()), INPUTS_MAX).is_err());
    assert!(read(&body, Some(0)).err().unwrap().contains("the model has 2 inputs"));
    // A string is the body itself; what comes back is bytes, since nothing else can be asked for.
    let mut words = signature();
    words.inputs.remove(0);
    let request =
        read_infer(&Bytes::from_static(b"some text"), Some(0), &Arc::new(words), INPUTS_MAX).unwrap();
    assert_eq!(**request.tensors.clone().into_inputs()[0][0].data(), *b"\x09\0\0\0some text");
    assert!(request.wanted.outputs().all(|(_, as_bytes)| as_bytes));
}

#[test]
fn what_is_wrong_is_told_with_its_place() {
    let x = |change: &dyn Fn(&mut Value)| {
        let mut tensor = json!({"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]});
        change(&mut tensor);
        read_json(&json!({"inputs": [tensor]})).err().unwrap_or_default()
    };
    assert_eq!(x(&|_| {}), "");
    type Change = dyn Fn(&mut Value);
    let cases: [(&Change, &str); 13] = [
        (&|x| x["name"] = json!("q"), r#"the model has no input `q`; expected one of ["x", "words"]"#),
        (&|x| x["datatype"] = json!("INT8"), "expected FP32 for `x`, found INT8"),
        (&|x| x["shape"] = json!([2]), "expected FP32 [batch, 2] for `x`, found [2]"),
        (&|x| x["shape"] = json!([1, 3]), "found [1, 3]"),
        (&|x| x["shape"] = json!([]), "found []"),
        (&|x| x["shape"] = json!([0, 2]), "more elements than the shape says"),
        (&|x| x["shape"] = json!([u64::MAX, 2]), "is larger than memory can be"),
        (&|x| x["shape"] = json!([2, 2]), "expected 4 elements, as the shape says, found 2"),
        (&|x| x["data"] = json!(["a", 2]), "a string"),
        (&|x| x["data"] = json!(7), "expected a list"),
        (&|x| x["data"] = json!([1e300, 2]), "expected FP32, found 1"),
        (&|x| x["data"] = json!(null), "expected data, or a binary_data_size"),
        (&|x| x["parameters"] = json!({"binary_data_size": 8}), "found both"),
    ];
    for (change, expected) in cases {
        let said = x(change);
        assert!(said.contains(expected), "expected {expected:?}, found {said:?}");
    }
    let whole = |body: Value| read_json(&body).err().unwrap_or_default();
    assert!(whole(json!({"inputs": []})).contains("expected a tensor `x` of FP32 [batch, 2]"));
    assert!(whole(json!({})).contains("missing field `inputs`"));
    // serde would take these for structs.
    assert!(whole(json!([null, null, []])).contains("expected an object"));
    assert!(whole(json!({"inputs": [["x", "FP32", [1, 2], null, [1, 2]]]})).contains("expected an object"));
    let x = json!({"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]});
    assert!(whole(json!({"inputs": [x, x]})).contains("found `x` again"));
    assert!(whole(json!({"inputs": [x], "outputs": [{"name": "w"}]})).contains("no output `w`"));
    let twice = json!([{"name": "y"}, {"name": "y"}]);
    assert!(whole(json!({"inputs": [x], "outputs": twice})).contains("found `y` again"));
    let region = json!({"shared_memory_region": "r", "shared_memory_byte_size": 8});
    assert!(
        whole(json!({"inputs": [x], "outputs": [{"name": "y", "parameters": region}]}))
            .contains("no shared memory")
    );
    assert!(
        whole(json!({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "parameters": region}]}))
            .contains("no shared memory")
    );
    assert!(whole(json!({"inputs": [x], "parameters": {"sequence_id": 1}})).contains("sequence_id"));
    let nulls = json!({"id": null, "parameters": null, "outputs": null, "inputs": [
        {"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2], "parameters": null}]});
    assert_eq!(whole(nulls), "");
    let nothing = json!({"name": "words", "datatype": "BYTES", "shape": [2, 0], "data": []});
    let signature = Signature { inputs: vec![signature().inputs.remove(1)], ..signature() };
    let nothing = Bytes::from(json!({"inputs": [nothing]}).to_string());
    assert!(matches!(
        read_infer(&nothing, None, &Arc::new(signature), INPUTS_MAX),
        Err(JobError::Invalid(_))
    ));
    let classes = json!([{"name": "y", "parameters": {"classification": 3}}]);
    assert!(whole(json!({"inputs": [x], "outputs": classes})).contains("classification"));
    let many = json!({"name": "x", "datatype": "FP32", "shape": [9, 2], "data": vec![0; 18]});
    assert!(whole(json!({"inputs": [many]})).contains("too large: expected a batch of at most 8"));
    let two = json!({"name": "words", "datatype": "BYTES", "shape": [2, 1], "data": ["a", "b"]});
    assert!(whole(json!({"inputs": [x, two]})).contains("the same batch size"));
    assert!(read(b"{}", Some(3)).err().unwrap().contains("at most the 2 bytes of the body, found 3"));
    let longer = [json!({"inputs": [x]}).to_string().as_bytes(), b"more"].concat();
    assert!(read(&longer, Some(longer.len() - 4)).err().unwrap().contains("4 bytes stand behind"));
}

fn outputs(rows: &[(&[i64], &[u8])]) -> Vec<Arc<[Tensor]>> {
    let row = |(y, z): &(&[i64], &[u8])| {
        let bytes: Vec<u8> = y.iter().flat_map(|value| value.to_le_bytes()).collect();
        let y = Tensor::new("y".into(), Datatype::Int64, vec![y.len() as u64], bytes.into());
        let z = Tensor::new("z".into(), Datatype::Bytes, vec![1], Bytes::copy_from_slice(z));
        Arc::from([z.unwrap(), y.unwrap()])
    };
    rows.iter().map(row).collect()
}

fn answered(request: &Value, rows: &[(&[i64], &[u8])]) -> Result<(Value, Vec<u8>), String> {
    let mut request = request.clone();
    request["inputs"] = json!([{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]);
    let wanted = read_json(&request).unwrap().wanted;
    let answer = write_infer("m", 3, wanted, &outputs(rows)).map_err(|failure| failure.message)?;
    let body = answer.body.into_bytes();
    let json_bytes = answer.json_bytes.unwrap_or(body.len());
    Ok((serde_json::from_slice(&body[..json_bytes]).unwrap(), body[json_bytes..].to_vec()))
}

#[test]
fn outputs_are_put_together_in_the_order_and_the_form_that_was_asked_for() {
    let rows: [(&[i64], &[u8]); 2] = [(&[1, -2], b"\x01\0\0\0a"), (&[3, 4], b"\0\0\0\0")];
    let (all, rest) = answered(&json!({"id": "7"}), &rows).unwrap();
    assert_eq!(
        all,
        json!({"model_name": "m", "model_version": "3", "id": "7", "outputs": [
            {"name": "y", "datatype": "INT64", "shape": [2, 2], "data": [1, -2, 3, 4]},
            {"name": "z", "datatype": "BYTES", "shape": [2, 1], "data": ["a", ""]},
        ]})
    );
    assert!(rest.is_empty());
    let asked = json!({"outputs": [{"name": "z", "parameters": {"binary_data": true}}, {"name": "y"}]});
    let (some, rest) = answered(&asked, &rows).unwrap();
    assert_eq!(some["outputs"][0]["parameters"], json!({"binary_data_size": 9}));
    assert_eq!(
        (&some["outputs"][1]["data"], &rest[..]),
        (&json!([1, -2, 3, 4]), &b"\x01\0\0\0a\0\0\0\0"[..])
    );
    let all_as_bytes = json!({"parameters": {"binary_data_output": true}});
    assert_eq!(answered(&all_as_bytes, &rows).unwrap().1.len(), 32 + 9);
    let two_of_one: [(&[i64], &[u8]); 1] = [(&[1], b"\x01\0\0\0a\0\0\0\0")];
    assert!(
        std::panic::catch_unwind(|| outputs(&two_of_one)).is_err(),
        "a tensor that is none is refused where it is made"
    );
    let unlike: [(&[i64], &[u8]); 2] = [(&[1], b"\0\0\0\0"), (&[3, 4], b"\0\0\0\0")];
    assert!(answered(&json!({}), &unlike).unwrap_err().contains("their shapes are [[1], [2]]"));
    assert!(answered(&json!({}), &[(&[1], b"\x01\0\0\0\xff")]).unwrap_err().contains("isn't UTF-8"));
}

#[test]
fn problems_are_one_text() {
    let text =
        |body: &str| serde_json::from_slice::<Value>(&problem(body.as_bytes())).unwrap()["error"].clone();
    assert_eq!(text(r#"{"detail": "no such model"}"#), "no such model");
    let two = r#"{"detail": [{"loc": ["body", "inputs", 0], "msg": "a"}, {"loc": ["body"], "msg": "b"}]}"#;
    assert_eq!(text(two), "inputs.0: a; b");
    assert_eq!(text("whatever"), "whatever");
    assert_eq!(problem(br#"{"ready":false}"#), r#"{"ready":false}"#);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(10_000))]

    /// Whatever stands in a request, it is taken and fits the signature, or it is the caller's error, and nothing panics.
    #[test]
    fn any_request_is_taken_or_refused(
        name in "x|words|q",
        datatype in "FP32|BYTES|INT64|FP99|",
        shape in prop::collection::vec(
            prop_oneof![0..4_u64, Just(2), Just(u64::MAX), Just(1 << 32), Just(1 << 62)], 0..4),
        size in prop::option::of(prop_oneof![0..40_u64, Just(8), Just(u64::MAX)]),
        data in prop::option::of(prop::collection::vec(-3.0..3.0_f64, 0..6)),
        rest in prop::collection::vec(any::<u8>(), 0..40),
        shift in -3..4_isize,
    ) {
        let mut tensor = json!({"name": name, "datatype": datatype, "shape": shape});
        if let Some(size) = size {
            tensor["parameters"] = json!({"binary_data_size": size});
        }
        if let Some(data) = data {
            tensor["data"] = json!(data);
        }
        let head = json!({"inputs": [tensor]}).to_string();
        let json_bytes = head.len().saturating_add_signed(shift);
        let body = [head.as_bytes(), &rest].concat();
        if let Ok(request) = read(&body, Some(json_bytes)) {
            for input in &request.tensors.into_inputs() {
                prop_assert_eq!(input[0].name(), "x");
                prop_assert_eq!(input[0].shape(), &[2][..]);
                prop_assert_eq!(input[0].data().len(), 8);
            }
        }
    }
}
