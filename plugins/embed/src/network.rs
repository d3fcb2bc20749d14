//! The network by rten: texts' tokens in, the tokens' vectors out.

use std::{fs, sync::Arc};

use modalkit_sdk::PipelineError;
use rten::{Model, ModelOptions, NodeId, RunOptions, ThreadPool, Value};
use rten_tensor::Layout;

use crate::{bert, folder::Folder, texts::Encoded};

/// Added to the scores of tokens that are padding: nothing of them is left after a softmax, and nothing is infinite.
const HIDES: f32 = -1e9;
/// The inputs that files have, beside those of [`bert`].
const MASK: &str = "attention_mask";

pub(crate) struct Network {
    model: Model,
    inputs: Vec<(NodeId, Kind)>,
    output: NodeId,
    size: usize,
    first_position: u32,
    threads: Arc<ThreadPool>,
}

/// What an input is made of.
#[derive(Clone, Copy)]
enum Kind {
    Ids,
    Types,
    Positions,
    Mask,
    Bias,
}

impl Network {
    pub(crate) fn open(folder: &Folder, threads: usize) -> Result<Self, PipelineError> {
        let said = |error| PipelineError::permanent(format!("{}: {error}", folder.weights.display()));
        let mut options = ModelOptions::with_all_ops();
        // It takes some memory, and a tenth off the time.
        options.prepack_weights(true);
        let is_graph = folder.weights.extension().is_some_and(|kind| kind == "onnx");
        let model = if is_graph {
            options.load_file(&folder.weights).map_err(said)?
        } else {
            options.load(bert::write(&folder.shape, &fs::read(&folder.weights)?)?).map_err(said)?
        };
        let name = |node: &NodeId| {
            model.node_info(*node).and_then(|info| info.name()).unwrap_or_default().to_owned()
        };
        let kind = |node: &NodeId| {
            let name = name(node);
            let kind = match name.as_str() {
                bert::IDS => Kind::Ids,
                bert::TYPES => Kind::Types,
                bert::POSITIONS => Kind::Positions,
                bert::BIAS => Kind::Bias,
                MASK => Kind::Mask,
                _ => {
                    return Err(PipelineError::permanent(format!(
                        "{} has the input `{name}`; expected {}, {MASK} and {}",
                        folder.weights.display(),
                        bert::IDS,
                        bert::TYPES
                    )));
                }
            };
            Ok((*node, kind))
        };
        let inputs = model.input_ids().iter().map(kind).collect::<Result<_, _>>()?;
        let output = model
            .output_ids()
            .iter()
            .find(|node| ["last_hidden_state", "token_embeddings"].contains(&name(node).as_str()))
            .or_else(|| model.output_ids().first())
            .copied()
            .ok_or_else(|| PipelineError::permanent("the graph has no output"))?;
        Ok(Self {
            model,
            inputs,
            output,
            size: folder.shape.hidden_size,
            first_position: folder.shape.first_position(),
            threads: Arc::new(ThreadPool::with_num_threads(threads)),
        })
    }

    /// Numbers of a vector.
    pub(crate) fn size(&self) -> usize {
        self.size
    }

    /// The vectors of each text's tokens, text by text, of all padded to one length.
    pub(crate) fn run(&self, texts: &[&Encoded], length: usize) -> Result<Vec<f32>, PipelineError> {
        let rows = |of: &dyn Fn(&Encoded, usize) -> i32| -> Vec<i32> {
            texts.iter().flat_map(|text| (0..length).map(|place| of(text, place))).collect()
        };
        let whole = |number: Option<&u32>| number.map_or(0, |number| *number as i32);
        let shape = [texts.len(), length];
        let mut inputs = Vec::with_capacity(self.inputs.len());
        for (node, kind) in &self.inputs {
            let value = match kind {
                Kind::Ids => Value::from_shape(shape, rows(&|text, place| whole(text.tokens.get(place))))?,
                Kind::Types => Value::from_shape(shape, rows(&|text, place| whole(text.types.get(place))))?,
                Kind::Mask => {
                    Value::from_shape(shape, rows(&|text, place| i32::from(place < text.tokens.len())))?
                }
                // Of padding, any that there is will do.
                Kind::Positions => Value::from_shape(
                    shape,
                    rows(&|text, place| self.first_position as i32 + place.min(text.tokens.len() - 1) as i32),
                )?,
                Kind::Bias => {
                    let bias =
                        |text: &Encoded, place: usize| if place < text.tokens.len() { 0.0 } else { HIDES };
                    let values: Vec<f32> = texts
                        .iter()
                        .flat_map(|text| (0..length).map(move |place| bias(text, place)))
                        .collect();
                    Value::from_shape([texts.len(), 1, 1, length], values)?
                }
            };
            inputs.push((*node, value.into()));
        }
        let options = RunOptions::default().with_thread_pool(Some(Arc::clone(&self.threads)));
        let outputs = self.model.run(inputs, &[self.output], Some(options)).map_err(|error| {
            PipelineError::permanent(format!(
                "{} texts of {length} tokens can't be run: {error}",
                texts.len()
            ))
        })?;
        let expected = [texts.len(), length, self.size];
        match outputs.into_iter().next() {
            Some(Value::FloatTensor(tensor)) if tensor.shape() == expected => Ok(tensor.into_data()),
            Some(other) => Err(PipelineError::permanent(format!(
                "the graph gave the shape {:?}; expected {expected:?}, each token's vector",
                other.shape()
            ))),
            None => Err(PipelineError::permanent("the graph gave nothing")),
        }
    }
}
