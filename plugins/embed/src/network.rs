//! The network by rten: texts' tokens in, the tokens' vectors out.

use std::{
    fmt::Display,
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use modalkit_sdk::PipelineError;
use rten::{Model, ModelOptions, NodeId, RunOptions, ThreadPool, Value};
use rten_tensor::{Layout, Tensor};

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
        let graph = match folder.weights.extension() {
            Some(kind) if kind == "onnx" => None,
            _ => Some(bert::write(&folder.shape, &fs::read(&folder.weights)?)?),
        };
        let threads = ThreadPool::with_num_threads(threads);
        // On these threads, or others would be started to pack the weights.
        let load = || {
            let mut options = ModelOptions::with_all_ops();
            // It takes some memory, and a tenth off the time.
            options.prepack_weights(true);
            match graph {
                Some(graph) => options.load(graph),
                None => options.load_file(&folder.weights),
            }
        };
        let model = threads.run(load).map_err(said)?;
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
        let inputs = model.input_ids().iter().map(kind).collect::<Result<Vec<_>, _>>()?;
        // Texts are padded: without it their vectors would depend on that.
        if !inputs.iter().any(|(_, kind)| matches!(kind, Kind::Mask | Kind::Bias)) {
            return Err(PipelineError::permanent(format!(
                "{} has no input `{MASK}`, which says what is padding: export it with one",
                folder.weights.display()
            )));
        }
        let output = model
            .output_ids()
            .iter()
            .find(|node| ["last_hidden_state", "token_embeddings"].contains(&name(node).as_str()))
            .or_else(|| model.output_ids().first())
            .copied()
            .ok_or_else(|| PipelineError::permanent("the graph has no output"))?;
        let mut network = Self {
            model,
            inputs,
            output,
            size: 0,
            first_position: folder.shape.first_position(),
            threads: Arc::new(threads),
        };
        network.size = network.find_size()?;
        Ok(network)
    }

    /// Runs a text of two tokens: what it gives for each is the size.
    fn find_size(&self) -> Result<usize, PipelineError> {
        let text = Encoded { tokens: vec![0; 2], types: vec![0; 2], truncated: false };
        let tensor = self.run_graph(&[&text], 2).map_err(|error| error.context("a first run"))?;
        match tensor.shape() {
            [1, 2, size] if *size > 0 => Ok(*size),
            other => Err(PipelineError::permanent(format!(
                "its output has the shape {other:?} for a text of 2 tokens; expected [1, 2, size], each token's vector. Export the model without what makes one of them"
            ))),
        }
    }

    /// Numbers of a vector.
    pub(crate) fn size(&self) -> usize {
        self.size
    }

    /// The vectors of each text's tokens, text by text, of all padded to one length.
    pub(crate) fn run(&self, texts: &[&Encoded], length: usize) -> Result<Vec<f32>, PipelineError> {
        let tensor = self.run_graph(texts, length)?;
        let expected = [texts.len(), length, self.size];
        if tensor.shape() != expected {
            return Err(PipelineError::permanent(format!(
                "the graph gave the shape {:?}; expected {expected:?}, each token's vector",
                tensor.shape()
            )));
        }
        Ok(tensor.into_data())
    }

    fn run_graph(&self, texts: &[&Encoded], length: usize) -> Result<Tensor<f32>, PipelineError> {
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
        let said = |error: &dyn Display| {
            PipelineError::permanent(format!(
                "{} texts of {length} tokens can't be run: {error}",
                texts.len()
            ))
        };
        let run = || self.model.run(inputs, &[self.output], Some(options));
        let outputs = catch_unwind(AssertUnwindSafe(run))
            .map_err(|_| said(&"the engine panicked"))?
            .map_err(|error| said(&error))?;
        match outputs.into_iter().next() {
            Some(Value::FloatTensor(tensor)) => Ok(tensor),
            _ => Err(PipelineError::permanent("the graph gave no tensor of numbers with fractions")),
        }
    }
}
