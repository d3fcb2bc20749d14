//! How a model's inputs and outputs appear in the protocol: as its own tensors, or, for a pipeline that has none, as one string in and one out, which
//! hold its JSON. Everything behind it knows tensors alone.

use std::sync::{Arc, LazyLock};

use bytes::{BufMut, BytesMut};
use modalkit_engine::{Datatype, Failure, FailureKind, Payload, Signature, Tensor, TensorSpec};

use super::BatchTensors;

/// The tensor that holds an input of a pipeline without tensors, as JSON.
const JSON_INPUT: &str = "input";
/// The tensor that holds its output.
const JSON_OUTPUT: &str = "output";
/// The tensor that holds one chunk of its output, where it is asked for a stream.
pub const JSON_CHUNK: &str = "chunk";

/// What stands before a string's bytes.
const LENGTH_BYTES: usize = size_of::<u32>();

static OF_JSON: LazyLock<Arc<Signature>> = LazyLock::new(|| of_json(&[JSON_OUTPUT]));
static OF_JSON_STREAM: LazyLock<Arc<Signature>> = LazyLock::new(|| of_json(&[JSON_OUTPUT, JSON_CHUNK]));

fn of_json(outputs: &[&str]) -> Arc<Signature> {
    let text = |name: &&str| TensorSpec {
        name: (*name).into(),
        datatype: Datatype::Bytes,
        shape: vec![Some(1)],
        optional: false,
    };
    let outputs = outputs.iter().map(text).collect();
    Arc::new(Signature { inputs: vec![text(&JSON_INPUT)], outputs, batched: true })
}

/// How a model's inputs and outputs appear.
#[derive(Clone, Debug)]
pub enum Form {
    /// As the pipeline's own tensors.
    Tensors(Arc<Signature>),
    /// As strings of JSON.
    Json,
}

impl Form {
    /// That of a pipeline with this signature, or with none.
    #[must_use]
    pub fn of(signature: Option<Arc<Signature>>) -> Self {
        signature.map_or(Self::Json, Self::Tensors)
    }

    /// What requests are held against.
    #[must_use]
    pub fn signature(&self) -> &Arc<Signature> {
        match self {
            Self::Tensors(signature) => signature,
            Self::Json => &OF_JSON,
        }
    }

    /// What requests for streams are held against: chunks are an output of JSON.
    #[must_use]
    pub fn stream_signature(&self) -> &Arc<Signature> {
        match self {
            Self::Tensors(signature) => signature,
            Self::Json => &OF_JSON_STREAM,
        }
    }

    /// A request's inputs, as the pipeline takes them.
    #[must_use]
    pub fn inputs(&self, tensors: BatchTensors) -> Vec<Payload> {
        let rows = tensors.into_inputs().into_iter();
        match self {
            Self::Tensors(_) => rows.map(Payload::Tensors).collect(),
            // The signature has one tensor of one string.
            Self::Json => rows.map(|row| Payload::Json(row[0].data().slice(LENGTH_BYTES..))).collect(),
        }
    }

    /// An output as tensors.
    ///
    /// # Errors
    /// The plugin gave an output that isn't of its input's form, or a text that no tensor can hold.
    pub fn output(&self, output: Payload) -> Result<Arc<[Tensor]>, Failure> {
        match self {
            Self::Tensors(_) => output.into_tensors(),
            Self::Json => Ok(Arc::from([json_tensor(JSON_OUTPUT, &output.into_json()?)?])),
        }
    }
}

/// A tensor of one string that holds this JSON.
///
/// # Errors
/// It is longer than a string can be.
pub fn json_tensor(name: &str, json: &[u8]) -> Result<Tensor, Failure> {
    let too_long = |_| Failure {
        kind: FailureKind::Permanent,
        message: format!("expected an output below 4 GiB, found {} bytes", json.len()),
    };
    let length = u32::try_from(json.len()).map_err(too_long)?;
    let mut data = BytesMut::with_capacity(LENGTH_BYTES + json.len());
    data.put_u32_le(length);
    data.put_slice(json);
    Ok(Tensor::new(name.into(), Datatype::Bytes, vec![1], data.freeze()).expect("it is one string"))
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::protocol::v2::{outputs_of, read_infer};

    #[test]
    fn a_pipeline_without_tensors_takes_and_gives_its_json_as_strings() {
        let body =
            br#"{"inputs":[{"name":"input","datatype":"BYTES","shape":[2,1],"data":["{\"a\":1}","7"]}]}"#;
        let form = Form::of(None);
        let request = read_infer(&Bytes::from_static(body), None, form.signature(), 8).unwrap();
        let inputs = form.inputs(request.tensors);
        let texts: Vec<&[u8]> = inputs.iter().map(|input| &**input.json().unwrap()).collect();
        assert_eq!(texts, [&br#"{"a":1}"#[..], b"7"]);
        let outputs: Vec<_> =
            ["{}", r#"{"b":2}"#].map(|text| form.output(Payload::Json(text.into())).unwrap()).into();
        let whole = outputs_of(&request.wanted, &outputs).unwrap();
        assert_eq!((whole[0].name(), whole[0].shape()), ("output", &[2, 1][..]));
        assert_eq!(**whole[0].data(), *b"\x02\0\0\0{}\x07\0\0\0{\"b\":2}");
        assert!(form.output(Payload::Tensors(Arc::from([]))).is_err());
    }
}
