//! A BERT's graph, made of its weights: embeddings, layers of attention and a feed-forward part, each after the other.
//!
//! It knows names and shapes of weights as `transformers` saves them, and writes an ONNX model of them, which whoever runs it optimises as any other.

use half::{bf16, f16};
use modalkit_sdk::PipelineError;
use rten_onnx::onnx::{
    AttributeProto, AttributeType, DataType, Dimension, GraphProto, ModelProto, NodeProto,
    OperatorSetIdProto, TensorProto, TensorShapeProto, TypeProto, TypeProtoTensor, ValueInfoProto,
};
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;

/// The graph's inputs: `[texts, tokens]` whole numbers, and what is added to the attention's scores, `[texts, 1, 1, tokens]`.
pub(crate) const IDS: &str = "input_ids";
pub(crate) const TYPES: &str = "token_type_ids";
pub(crate) const POSITIONS: &str = "position_ids";
pub(crate) const BIAS: &str = "bias";
/// Its output: `[texts, tokens, size]`.
pub(crate) const HIDDEN: &str = "last_hidden_state";

/// RoBERTa's token for padding, where its configuration doesn't say.
const ROBERTA_PADDING: u32 = 1;

/// The versions of the operators and of the format that have all that is used.
const OPSET: i64 = 20;
const IR_VERSION: i64 = 9;

/// Of `config.json`.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Shape {
    #[serde(default)]
    pub(crate) model_type: String,
    hidden_size: Option<usize>,
    num_attention_heads: Option<usize>,
    num_hidden_layers: Option<usize>,
    #[serde(default = "gelu")]
    hidden_act: String,
    #[serde(default = "epsilon")]
    layer_norm_eps: f32,
    max_position_embeddings: Option<usize>,
    pad_token_id: Option<u32>,
    pub(crate) vocab_size: Option<u32>,
    position_embedding_type: Option<String>,
}

/// What must be known of a network to write it.
struct Sizes {
    hidden: usize,
    heads: usize,
    layers: usize,
}

fn gelu() -> String {
    "gelu".to_owned()
}

fn epsilon() -> f32 {
    1e-12
}

impl Shape {
    /// The number of a text's first position: RoBERTa's begin after the one for padding.
    pub(crate) fn first_position(&self) -> u32 {
        if self.is_roberta() { self.pad_token_id.unwrap_or(ROBERTA_PADDING) + 1 } else { 0 }
    }

    /// Tokens that there are positions for.
    pub(crate) fn positions(&self) -> Option<usize> {
        self.max_position_embeddings.map(|count| count.saturating_sub(self.first_position() as usize))
    }

    /// Whether its graph can be written here.
    pub(crate) fn is_known(&self) -> bool {
        self.model_type == "bert" || self.is_roberta()
    }

    fn is_roberta(&self) -> bool {
        ["roberta", "xlm-roberta", "camembert"].contains(&self.model_type.as_str())
    }

    fn check(&self) -> Result<Sizes, PipelineError> {
        let refused = |what: String| {
            Err(PipelineError::permanent(format!(
                "config.json: {what}. Other models are run from `onnx/model.onnx` in their folder: `optimum-cli export onnx` makes it"
            )))
        };
        if !self.is_known() {
            return refused(format!(
                "expected the model_type bert, roberta, xlm-roberta or camembert, found {}",
                self.model_type
            ));
        }
        if let Some(other) = self.position_embedding_type.as_ref().filter(|kind| *kind != "absolute") {
            return refused(format!("expected absolute positions, found {other}"));
        }
        if !["gelu", "gelu_new", "gelu_pytorch_tanh", "relu"].contains(&self.hidden_act.as_str()) {
            return refused(format!(
                "expected gelu, gelu_new or relu as hidden_act, found {}",
                self.hidden_act
            ));
        }
        let (Some(hidden), Some(heads), Some(layers)) =
            (self.hidden_size, self.num_attention_heads, self.num_hidden_layers)
        else {
            return refused("expected hidden_size, num_attention_heads and num_hidden_layers".to_owned());
        };
        if heads == 0 || !hidden.is_multiple_of(heads) {
            return refused(format!("hidden_size {hidden} can't be divided among {heads} heads"));
        }
        Ok(Sizes { hidden, heads, layers })
    }
}

/// Writes the model, with its weights in it.
pub(crate) fn write(shape: &Shape, weights: &[u8]) -> Result<Vec<u8>, PipelineError> {
    let sizes = shape.check()?;
    let weights = SafeTensors::deserialize(weights)?;
    let mut graph = Building { graph: GraphProto::default(), weights: &weights, prefix: prefix(&weights) };
    graph.inputs();
    let mut hidden = graph.embeddings(shape)?;
    for layer in 0..sizes.layers {
        hidden = graph.layer(shape, &sizes, layer, &hidden)?;
    }
    graph.node("Identity", &[&hidden], HIDDEN);
    let size = i64::try_from(sizes.hidden)?;
    graph.graph.output = vec![value(HIDDEN, DataType::FLOAT, &[None, None, Some(size)])];
    let opset = OperatorSetIdProto { domain: None, version: Some(OPSET) };
    let model = ModelProto {
        ir_version: Some(IR_VERSION),
        graph: Some(graph.graph),
        opset_import: vec![opset],
        ..ModelProto::default()
    };
    model
        .write_buf()
        .map_err(|error| PipelineError::permanent(format!("the graph can't be written: {error}")))
}

/// What stands before the weights' names: a model saved with a head has it.
fn prefix(weights: &SafeTensors<'_>) -> &'static str {
    ["", "bert.", "roberta.", "model."]
        .into_iter()
        .find(|prefix| weights.tensor(&format!("{prefix}embeddings.word_embeddings.weight")).is_ok())
        .unwrap_or_default()
}

struct Building<'w> {
    graph: GraphProto,
    weights: &'w SafeTensors<'w>,
    prefix: &'static str,
}

impl Building<'_> {
    fn inputs(&mut self) {
        let of_tokens = |name| value(name, DataType::INT32, &[None, None]);
        self.graph.input = vec![
            of_tokens(IDS),
            of_tokens(TYPES),
            of_tokens(POSITIONS),
            value(BIAS, DataType::FLOAT, &[None, Some(1), Some(1), None]),
        ];
    }

    fn embeddings(&mut self, shape: &Shape) -> Result<String, PipelineError> {
        let mut rows = Vec::new();
        for (table, chosen_by) in
            [("word_embeddings", IDS), ("token_type_embeddings", TYPES), ("position_embeddings", POSITIONS)]
        {
            let weight = self.weight(&format!("embeddings.{table}.weight"))?;
            let name = format!("embeddings.{table}");
            self.node("Gather", &[&weight, chosen_by], &name);
            rows.push(name);
        }
        self.node("Add", &[&rows[0], &rows[1]], "embeddings.typed");
        self.node("Add", &["embeddings.typed", &rows[2]], "embeddings.sum");
        self.norm(shape, "embeddings.LayerNorm", "embeddings.sum")
    }

    fn layer(
        &mut self,
        shape: &Shape,
        sizes: &Sizes,
        number: usize,
        hidden: &str,
    ) -> Result<String, PipelineError> {
        let layer = format!("encoder.layer.{number}");
        let of = |part: &str| format!("{layer}.{part}");
        let heads = i64::try_from(sizes.heads)?;
        let size = i64::try_from(sizes.hidden)?;
        let split = self.sizes(&of("split"), &[0, 0, heads, size / heads]);
        let mut parts = Vec::new();
        // Queries and values as [texts, heads, tokens, part], keys with their last two turned.
        for (name, turn) in [("query", [0, 2, 1, 3]), ("key", [0, 2, 3, 1]), ("value", [0, 2, 1, 3])] {
            let linear = self.linear(&of(&format!("attention.self.{name}")), hidden)?;
            let (apart, turned) = (format!("{linear}.heads"), format!("{linear}.turned"));
            self.node("Reshape", &[&linear, &split], &apart);
            self.node("Transpose", &[&apart], &turned).push(ints("perm", &turn));
            parts.push(turned);
        }
        let scale = self.floats(&of("scale"), &[], vec![1.0 / ((size / heads) as f32).sqrt()]);
        let [products, scaled, scores, shares] =
            ["products", "scaled", "scores", "shares"].map(|name| of(&format!("attention.{name}")));
        self.node("MatMul", &[&parts[0], &parts[1]], &products);
        self.node("Mul", &[&products, &scale], &scaled);
        self.node("Add", &[&scaled, BIAS], &scores);
        self.node("Softmax", &[&scores], &shares).push(int("axis", -1));
        let [context, turned, joined] =
            ["context", "turned", "joined"].map(|name| of(&format!("attention.{name}")));
        self.node("MatMul", &[&shares, &parts[2]], &context);
        self.node("Transpose", &[&context], &turned).push(ints("perm", &[0, 2, 1, 3]));
        let join = self.sizes(&of("join"), &[0, 0, size]);
        self.node("Reshape", &[&turned, &join], &joined);
        let attended = self.linear(&of("attention.output.dense"), &joined)?;
        self.node("Add", &[&attended, hidden], &of("attention.sum"));
        let attended = self.norm(shape, &of("attention.output.LayerNorm"), &of("attention.sum"))?;

        let wide = self.linear(&of("intermediate.dense"), &attended)?;
        let active = of("intermediate.active");
        match shape.hidden_act.as_str() {
            "relu" => drop(self.node("Relu", &[&wide], &active)),
            "gelu" => drop(self.node("Gelu", &[&wide], &active)),
            _ => self.node("Gelu", &[&wide], &active).push(text("approximate", "tanh")),
        }
        let narrow = self.linear(&of("output.dense"), &active)?;
        self.node("Add", &[&narrow, &attended], &of("sum"));
        self.norm(shape, &of("output.LayerNorm"), &of("sum"))
    }

    /// A product with weights, which are saved with outputs first, and a sum.
    fn linear(&mut self, name: &str, input: &str) -> Result<String, PipelineError> {
        let saved = self.saved(&format!("{name}.weight"))?;
        let [outputs, inputs] = saved.shape[..] else {
            return Err(PipelineError::permanent(format!(
                "the weight `{name}.weight` has the shape {:?}; expected [outputs, inputs]",
                saved.shape
            )));
        };
        let turned = (0..inputs).flat_map(|input| (0..outputs).map(move |output| output * inputs + input));
        let values = turned.map(|place| saved.values[place]).collect();
        let sizes = [i64::try_from(inputs)?, i64::try_from(outputs)?];
        let weight = self.floats(&format!("{name}.weight"), &sizes, values);
        let bias = self.weight(&format!("{name}.bias"))?;
        let product = format!("{name}.product");
        self.node("MatMul", &[input, &weight], &product);
        self.node("Add", &[&product, &bias], name);
        Ok(name.to_owned())
    }

    fn norm(&mut self, shape: &Shape, name: &str, input: &str) -> Result<String, PipelineError> {
        let (weight, bias) = (self.weight(&format!("{name}.weight"))?, self.weight(&format!("{name}.bias"))?);
        let attributes = self.node("LayerNormalization", &[input, &weight, &bias], name);
        attributes.push(int("axis", -1));
        attributes.push(AttributeProto {
            name: Some("epsilon".to_owned()),
            f: Some(shape.layer_norm_eps),
            r#type: Some(AttributeType::FLOAT),
            ..AttributeProto::default()
        });
        Ok(name.to_owned())
    }

    /// Adds an operator, and gives its attributes.
    fn node(&mut self, operator: &str, inputs: &[&str], output: &str) -> &mut Vec<AttributeProto> {
        self.graph.node.push(NodeProto {
            op_type: Some(operator.to_owned()),
            name: Some(output.to_owned()),
            input: inputs.iter().map(|input| (*input).to_owned()).collect(),
            output: vec![output.to_owned()],
            ..NodeProto::default()
        });
        let place = self.graph.node.len() - 1;
        &mut self.graph.node[place].attribute
    }

    /// Adds weights as they are saved, and gives their name.
    fn weight(&mut self, name: &str) -> Result<String, PipelineError> {
        let saved = self.saved(name)?;
        let sizes: Vec<i64> =
            saved.shape.iter().map(|size| Ok(i64::try_from(*size)?)).collect::<Result<_, PipelineError>>()?;
        Ok(self.floats(name, &sizes, saved.values))
    }

    fn saved(&self, name: &str) -> Result<Saved, PipelineError> {
        let whole = format!("{}{name}", self.prefix);
        let tensor = self.weights.tensor(&whole).map_err(|error| {
            PipelineError::permanent(format!(
                "the weights have no `{whole}`, which a model of this type has: {error}"
            ))
        })?;
        let bytes = tensor.data();
        let pairs = || bytes.chunks_exact(2).map(|pair| [pair[0], pair[1]]);
        let values = match tensor.dtype() {
            Dtype::F32 => bytes
                .chunks_exact(4)
                .map(|word| f32::from_le_bytes([word[0], word[1], word[2], word[3]]))
                .collect(),
            Dtype::F16 => pairs().map(|pair| f16::from_le_bytes(pair).to_f32()).collect(),
            Dtype::BF16 => pairs().map(|pair| bf16::from_le_bytes(pair).to_f32()).collect(),
            other => {
                return Err(PipelineError::permanent(format!(
                    "the weight `{whole}` is of {other:?}; expected F32, F16 or BF16"
                )));
            }
        };
        Ok(Saved { shape: tensor.shape().to_vec(), values })
    }

    fn floats(&mut self, name: &str, sizes: &[i64], values: Vec<f32>) -> String {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.constant(name, DataType::FLOAT, sizes, bytes)
    }

    fn sizes(&mut self, name: &str, sizes: &[i64]) -> String {
        let bytes = sizes.iter().flat_map(|size| size.to_le_bytes()).collect();
        self.constant(name, DataType::INT64, &[sizes.len() as i64], bytes)
    }

    fn constant(&mut self, name: &str, kind: DataType, sizes: &[i64], bytes: Vec<u8>) -> String {
        self.graph.initializer.push(TensorProto {
            name: Some(name.to_owned()),
            dims: sizes.to_vec(),
            data_type: Some(kind),
            raw_data: Some(bytes.into()),
            ..TensorProto::default()
        });
        name.to_owned()
    }
}

struct Saved {
    shape: Vec<usize>,
    values: Vec<f32>,
}

fn value(name: &str, kind: DataType, sizes: &[Option<i64>]) -> ValueInfoProto {
    let dim = |(axis, size): (usize, &Option<i64>)| match size {
        Some(size) => Dimension { dim_value: Some(*size), ..Dimension::default() },
        None => Dimension {
            dim_param: Some(if axis == 0 { "texts" } else { "tokens" }.to_owned()),
            ..Dimension::default()
        },
    };
    let shape = TensorShapeProto { dim: sizes.iter().enumerate().map(dim).collect() };
    let tensor_type = Some(TypeProtoTensor { elem_type: Some(kind), shape: Some(shape) });
    ValueInfoProto {
        name: Some(name.to_owned()),
        r#type: Some(TypeProto { tensor_type, ..TypeProto::default() }),
    }
}

fn int(name: &str, value: i64) -> AttributeProto {
    let name = Some(name.to_owned());
    AttributeProto { name, i: Some(value), r#type: Some(AttributeType::INT), ..AttributeProto::default() }
}

fn ints(name: &str, values: &[i64]) -> AttributeProto {
    let name = Some(name.to_owned());
    AttributeProto {
        name,
        ints: values.to_vec(),
        r#type: Some(AttributeType::INTS),
        ..AttributeProto::default()
    }
}

fn text(name: &str, value: &str) -> AttributeProto {
    let (name, s) = (Some(name.to_owned()), Some(value.to_owned()));
    AttributeProto { name, s, r#type: Some(AttributeType::STRING), ..AttributeProto::default() }
}
