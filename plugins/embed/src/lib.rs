//! Embeds texts with a BERT-like model, from a folder as Hugging Face's hub lays it out.
//!
//! It owns the way from texts to vectors: tokens, which texts share a run, pooling. What runs is a graph, of a file or made of the weights.
//!
//! ```toml
//! [model_settings.model_entries.minilm]
//! plugin = "embed"
//! path = "all-MiniLM-L6-v2"     # the folder, within local_model_repository_folder
//! task = "embedding"            # /v1/embeddings
//! batch_config = { max_batch_size = 64, max_batch_cost = 512 }
//! ```
//!
//! An input is `{"input": "a text"}`, or a list of its tokens, and its output `{"embedding": [0.1, …], "truncated": false, "usage": {"prompt_tokens": 12}}`;
//! as tensors a string `input` and an `embedding`.

mod bert;
mod folder;
mod network;
mod pool;
mod texts;

use std::{
    borrow::Cow,
    num::NonZeroUsize,
    path::{Path, PathBuf},
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering},
    },
};

use modalkit_sdk::{
    Datatype, InferencePipeline, Invalid, LoadContext, Outcome, PipelineError, Signature, Tensor, Tensors,
    VolumeReload, export_pipeline,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use folder::Folder;
use network::Network;
use pool::Pooling;
use texts::{Encoded, Texts};

/// How often a folder was read in this process.
static READINGS: AtomicU64 = AtomicU64::new(0);

/// Texts whose lengths, rounded up to this many tokens, are equal share runs: no more is padded than that.
const LENGTH_STEP: usize = 16;

/// The keys of a model's entry.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
struct Settings {
    /// The model's folder, within the folder of all models' data: `tokenizer.json`, `config.json`, and `model.safetensors` or `onnx/model.onnx`.
    #[schemars(extend("x-modalkit-file" = true, "x-modalkit-folder-with" = "tokenizer.json"))]
    path: PathBuf,
    /// Tokens of a text at most; without it what the folder says.
    #[serde(default)]
    max_tokens: Option<NonZeroUsize>,
    /// Whether longer texts are cut, and their answers say so; else they are refused.
    #[serde(default = "yes")]
    truncate: bool,
    /// Makes one vector of the tokens'; without it what the folder says, else the mean.
    #[serde(default)]
    pooling: Option<Pooling>,
    /// Whether vectors have the length 1; without it what the folder says.
    #[serde(default)]
    normalize: Option<bool>,
    /// Tokens of a run at most, with those that are padded.
    #[serde(default = "some_tokens")]
    max_batch_tokens: NonZeroUsize,
    /// Threads of each replica that share one run.
    #[serde(default = "one")]
    threads: NonZeroUsize,
}

fn yes() -> bool {
    true
}

fn one() -> NonZeroUsize {
    NonZeroUsize::MIN
}

/// On CPUs larger runs make a token no cheaper.
fn some_tokens() -> NonZeroUsize {
    NonZeroUsize::new(512).unwrap_or(NonZeroUsize::MIN)
}

/// One text.
#[derive(Debug, Deserialize, JsonSchema)]
struct Input {
    /// The text, or its tokens' numbers.
    input: Text,
    /// Of OpenAI's clients: vectors have as many numbers as the model gives, and no other number can be asked for.
    #[serde(default)]
    dimensions: Option<usize>,
    /// Of OpenAI's clients; nothing is done with it.
    #[serde(default)]
    #[expect(dead_code, reason = "callers send it, and mustn't be refused for it")]
    user: Option<String>,
    /// Made when it is first asked for, and whose reading of the folder made it.
    #[serde(skip)]
    encoded: OnceLock<(u64, Result<Encoded, String>)>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "expected a text, or a list of its tokens' numbers")]
enum Text {
    Words(String),
    Tokens(Vec<u32>),
}

/// One text's vector.
#[derive(Debug, Serialize, JsonSchema)]
struct Output {
    embedding: Vec<f32>,
    /// Whether the text was longer than the model takes, and its end was left out.
    truncated: bool,
    usage: Usage,
}

#[derive(Debug, Serialize, JsonSchema)]
struct Usage {
    /// The text's tokens, with those that the model puts around it.
    prompt_tokens: usize,
}

struct Pipeline {
    path: PathBuf,
    settings: Settings,
    loaded: Loaded,
}

/// What of a pipeline is read again when files change.
struct Loaded {
    /// Which reading of a folder it is, in this process.
    reading: u64,
    texts: Texts,
    network: Network,
    pooling: Pooling,
    normalize: bool,
}

/// Texts that run together, by their places in the batch, and the length that they are padded to.
struct Group {
    places: Vec<usize>,
    length: usize,
}

impl Loaded {
    fn read(path: &Path, settings: &Settings) -> Result<Self, PipelineError> {
        let read = || {
            let folder = Folder::open(path)?;
            let network = Network::open(&folder, settings.threads.get())?;
            let texts = Texts::open(&folder, settings.max_tokens.map(NonZeroUsize::get), settings.truncate)?;
            let pooling = match settings.pooling {
                Some(pooling) => pooling,
                None => folder.pooling.clone()?.unwrap_or(Pooling::Mean),
            };
            let normalize = settings.normalize.unwrap_or(folder.normalizes);
            tracing::info!(
                path = %path.display(), weights = %folder.weights.display(), size = network.size(), max_tokens = texts.max_tokens(),
                ?pooling, normalize, "embedding model loaded"
            );
            let reading = READINGS.fetch_add(1, Ordering::Relaxed);
            Ok(Self { reading, texts, network, pooling, normalize })
        };
        read().map_err(|error: PipelineError| error.context(format!("the model's folder {}", path.display())))
    }

    /// A text that was measured before the folder was read again is made tokens again.
    fn encoded<'i>(&self, input: &'i Input) -> Result<Cow<'i, Encoded>, Invalid> {
        let encode = || match &input.input {
            Text::Words(words) => self.texts.encode(words),
            Text::Tokens(tokens) => self.texts.take(tokens),
        };
        let invalid = |said: &String| Invalid::new(said).at("input");
        let (reading, encoded) = input.encoded.get_or_init(|| (self.reading, encode()));
        match *reading == self.reading {
            true => encoded.as_ref().map(Cow::Borrowed).map_err(invalid),
            false => encode().map(Cow::Owned).map_err(|said| invalid(&said)),
        }
    }

    fn padded(&self, encoded: &Encoded) -> usize {
        encoded
            .tokens
            .len()
            .next_multiple_of(LENGTH_STEP)
            .min(self.texts.max_tokens().max(encoded.tokens.len()))
    }

    fn run(&self, inputs: &[Input], group: &Group) -> Outcome<Vec<Vec<f32>>> {
        let encoded: Vec<Cow<'_, Encoded>> = (group.places.iter())
            .map(|place| {
                self.encoded(&inputs[*place])
                    .map_err(|invalid| PipelineError::invalid_input(invalid.to_string()))
            })
            .collect::<Result<_, _>>()?;
        let length = group.length.max(encoded.iter().map(|text| text.tokens.len()).max().unwrap_or(1));
        let texts: Vec<&Encoded> = encoded.iter().map(AsRef::as_ref).collect();
        let hidden = self.network.run(&texts, length)?;
        let size = self.network.size();
        let of_text = |(row, text): (&[f32], &&Encoded)| {
            let mut vector = self.pooling.pool(row, size, text.tokens.len());
            if self.normalize {
                pool::to_unit(&mut vector);
            }
            vector
        };
        Ok(hidden.chunks_exact(length * size).zip(&texts).map(of_text).collect())
    }
}

impl InferencePipeline for Pipeline {
    type Settings = Settings;
    type Input = Input;
    type Output = Output;
    type Preprocessed = Vec<Group>;
    type RawOutput = Vec<Option<Outcome<Vec<f32>>>>;

    fn load(ctx: LoadContext<Settings>) -> Result<Self, PipelineError> {
        if ctx.device().is_some() {
            return Err(PipelineError::permanent(
                "this pipeline runs on CPUs, and was given a GPU: leave `gpu` out of the model's entry",
            ));
        }
        let path = ctx.all_model_data_folder().join(&ctx.settings().path);
        let settings = ctx.into_settings();
        let loaded = Loaded::read(&path, &settings)?;
        Ok(Self { path, settings, loaded })
    }

    fn validate(&self, input: &Input) -> Result<(), Invalid> {
        let size = self.loaded.network.size();
        if let Some(wanted) = input.dimensions.filter(|wanted| *wanted != size) {
            return Err(Invalid::new(format!(
                "expected {size}, which this model's vectors have; found {wanted}"
            ))
            .at("dimensions"));
        }
        self.loaded.encoded(input).map(drop)
    }

    /// Its tokens, padded.
    fn cost(&self, input: &Input) -> u64 {
        self.loaded.encoded(input).map_or(1, |encoded| self.loaded.padded(&encoded) as u64)
    }

    fn shape(&self, input: &Input) -> u64 {
        self.cost(input)
    }

    fn signature(&self) -> Option<Signature> {
        let size = i64::try_from(self.loaded.network.size()).ok()?;
        Some(Signature::new().input("input", Datatype::Bytes, [1]).output(
            "embedding",
            Datatype::Fp32,
            [size],
        ))
    }

    fn input_from_tensors(mut tensors: Tensors) -> Result<Input, Invalid> {
        let tensor = tensors.take("input")?;
        let unfit = |what: &str| Invalid::new(what).at("input");
        let strings = tensor.strings()?;
        let bytes = strings.first().ok_or_else(|| unfit("expected a text, found none"))?;
        let text = String::from_utf8(bytes.to_vec()).map_err(|_| unfit("the text is not UTF-8"))?;
        Ok(Input { input: Text::Words(text), dimensions: None, user: None, encoded: OnceLock::new() })
    }

    fn output_to_tensors(&self, output: Output) -> Result<Vec<Tensor>, PipelineError> {
        Ok(vec![Tensor::new("embedding", [output.embedding.len()], output.embedding)?])
    }

    /// Sorted by their lengths; a run has texts of one padded length, and no more tokens than it may.
    fn preprocess(&self, inputs: &[Input]) -> Result<Vec<Group>, PipelineError> {
        let length = |input| self.loaded.encoded(input).map_or(1, |encoded| self.loaded.padded(&encoded));
        let mut sorted: Vec<(usize, usize)> =
            inputs.iter().enumerate().map(|(place, input)| (length(input), place)).collect();
        sorted.sort_unstable();
        let mut groups: Vec<Group> = Vec::new();
        for (length, place) in sorted {
            let has_room = |group: &&mut Group| {
                group.length == length
                    && (group.places.len() + 1) * length <= self.settings.max_batch_tokens.get()
            };
            match groups.last_mut().filter(has_room) {
                Some(group) => group.places.push(place),
                None => groups.push(Group { places: vec![place], length }),
            }
        }
        Ok(groups)
    }

    fn predict(&self, inputs: &[Input], groups: Vec<Group>) -> Result<Self::RawOutput, PipelineError> {
        let mut vectors: Self::RawOutput = inputs.iter().map(|_| None).collect();
        for group in groups {
            match self.loaded.run(inputs, &group) {
                Err(_) if group.places.len() > 1 => {
                    // One of them may be why.
                    for place in group.places {
                        let alone = Group { places: vec![place], length: group.length };
                        let vector = self.loaded.run(inputs, &alone).map(|mut rows| rows.swap_remove(0));
                        vectors[place] = Some(vector);
                    }
                }
                Ok(rows) => {
                    group.places.iter().zip(rows).for_each(|(place, row)| vectors[*place] = Some(Ok(row)))
                }
                Err(error) => {
                    group.places.iter().for_each(|place| vectors[*place] = Some(Err(error.clone())))
                }
            }
        }
        Ok(vectors)
    }

    fn postprocess(
        &self,
        inputs: &[Input],
        vectors: Self::RawOutput,
    ) -> Result<Vec<Outcome<Output>>, PipelineError> {
        let answer = |(input, vector): (&Input, Option<Outcome<Vec<f32>>>)| {
            let embedding =
                vector.unwrap_or_else(|| Err(PipelineError::permanent("no run had this text")))?;
            let encoded = self
                .loaded
                .encoded(input)
                .map_err(|invalid| PipelineError::invalid_input(invalid.to_string()))?;
            let usage = Usage { prompt_tokens: encoded.tokens.len() };
            Ok(Output { embedding, truncated: encoded.truncated, usage })
        };
        Ok(inputs.iter().zip(vectors).map(answer).collect())
    }

    fn on_volume_reload(&mut self, _reload: &VolumeReload) -> Result<(), PipelineError> {
        self.loaded = Loaded::read(&self.path, &self.settings)?;
        Ok(())
    }
}

export_pipeline!(Pipeline);

#[cfg(test)]
mod tests;
