//! Runs a whole pipeline in an ordinary `#[test]`, with no host: the same parsing, validation, stages, counting and
//! writing of answers that the host's calls go through. A panic of the pipeline fails the test, with its own message and
//! backtrace; in the host it fails the batch.

use std::{mem, path::PathBuf};

use modalkit_abi::{ChunkResult, Interest, WhenFull};
use serde_json::{Value, json, value::to_raw_value};

use crate::{
    Chunks, Device, InferencePipeline, Invalid, Outcome, PipelineError, Tensor, VolumeReload,
    chunks::ChunkSink,
    context::Secrets,
    document,
    instance::{Batch, Instance, Item, Refusal, Rendered},
    schema,
};

/// Loads a pipeline as the host would.
///
/// ```
/// use modalkit_sdk::testkit::TestKit;
///
/// # use modalkit_sdk::{InferencePipeline, LoadContext, NoSettings, Outcome, PipelineError};
/// # use std::collections::BTreeMap;
/// # struct Reader(std::path::PathBuf, String);
/// # impl InferencePipeline for Reader {
/// #     type Settings = NoSettings;
/// #     type Input = BTreeMap<String, f32>;
/// #     type Output = BTreeMap<String, f32>;
/// #     type Preprocessed = ();
/// #     type RawOutput = ();
/// #     fn load(ctx: LoadContext<NoSettings>) -> Result<Self, PipelineError> {
/// #         assert_eq!(ctx.common_settings()["device"], "cpu");
/// #         Ok(Self(ctx.all_model_data_folder().join("weights.bin"), ctx.model_name().to_owned()))
/// #     }
/// #     fn preprocess(&self, _: &[Self::Input]) -> Result<(), PipelineError> { Ok(()) }
/// #     fn predict(&self, _: &[Self::Input], (): ()) -> Result<(), PipelineError> { Ok(()) }
/// #     fn postprocess(&self, inputs: &[Self::Input], (): ()) -> Result<Vec<Outcome<Self::Output>>, PipelineError> {
/// #         Ok(inputs.iter().map(|input| Ok(input.clone())).collect())
/// #     }
/// # }
/// let model = TestKit::new()
///     .model_name("digits")
///     .all_model_data_folder("/mnt/models")
///     .common_settings(serde_json::json!({"device": "cpu"}))
///     .settings(serde_json::json!({}))
///     .load::<Reader>()?;
/// # drop(model);
/// # Ok::<(), PipelineError>(())
/// ```
#[derive(Clone, Debug)]
pub struct TestKit {
    model_name: String,
    all_model_data_folder: PathBuf,
    common_settings: Value,
    settings: Value,
    secrets: Secrets,
    devices: Vec<Device>,
}

impl Default for TestKit {
    fn default() -> Self {
        Self::new()
    }
}

impl TestKit {
    /// A model named `test`, whose data lies in the current folder, with no settings.
    #[must_use]
    pub fn new() -> Self {
        Self {
            model_name: "test".into(),
            all_model_data_folder: ".".into(),
            common_settings: json!({}),
            settings: json!({}),
            secrets: Secrets::default(),
            devices: Vec::new(),
        }
    }

    /// Names the model.
    #[must_use]
    pub fn model_name(mut self, name: impl Into<String>) -> Self {
        self.model_name = name.into();
        self
    }

    /// Says where the model's data lies.
    #[must_use]
    pub fn all_model_data_folder(mut self, folder: impl Into<PathBuf>) -> Self {
        self.all_model_data_folder = folder.into();
        self
    }

    /// Gives `model_settings.common`, a JSON object.
    #[must_use]
    pub fn common_settings(mut self, settings: Value) -> Self {
        self.common_settings = settings;
        self
    }

    /// Gives the model's own keys, a JSON object.
    #[must_use]
    pub fn settings(mut self, settings: Value) -> Self {
        self.settings = settings;
        self
    }

    /// Gives a secret.
    #[must_use]
    pub fn secret(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.secrets.0.insert(name.into(), value.into());
        self
    }

    /// Gives a device, as the host would lease it; several where it is called again.
    #[must_use]
    pub fn device(mut self, device: Device) -> Self {
        self.devices.push(device);
        self
    }

    /// Checks the pipeline's types, then runs its `load` and `warmup`.
    ///
    /// # Errors
    /// What `load` or `warmup` return, settings that don't fit, or an `Output` that the host would refuse.
    pub fn load<P: InferencePipeline>(&self) -> Result<LoadedPipeline<P>, PipelineError> {
        schema::of_output::<P::Output>()?;
        let instance = Instance::load(document::Load {
            model_name: self.model_name.clone(),
            all_model_data_folder: self.all_model_data_folder.to_string_lossy().into_owned(),
            common_settings: &to_raw_value(&self.common_settings)?,
            settings: &to_raw_value(&self.settings)?,
            secrets: self.secrets.0.clone(),
            devices: self.devices.clone(),
        })?;
        instance.warmup()?;
        Ok(LoadedPipeline { instance })
    }
}

fn answers<T>(of_items: Vec<(Option<usize>, Outcome<T>)>) -> Vec<Outcome<T>> {
    of_items.into_iter().map(|(_, answer)| answer).collect()
}

fn json_of(rendered: Rendered) -> Outcome<Value> {
    match rendered {
        Rendered::Json(json) => Ok(serde_json::from_slice(&json)?),
        Rendered::Tensors(_) => unreachable!("no item was made of tensors"),
    }
}

/// What a caller who wants chunks does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reader {
    /// Takes the next one.
    Reads,
    /// Has no room for one now: `try_send` returns `false`, and `send` waits in vain.
    Lags,
    /// Nobody is there any more.
    Left,
}

/// The callers of one batch.
trait BatchReaders: ChunkSink {
    /// The batch has so many items.
    fn begin(&mut self, items: usize);
}

/// Nobody wants chunks.
struct NoReaders;

impl BatchReaders for NoReaders {
    fn begin(&mut self, _: usize) {}
}

impl ChunkSink for NoReaders {
    fn interest(&mut self, _: usize) -> Interest {
        Interest::OUTCOME
    }

    fn chunk(&mut self, _: usize, _: &[u8], _: WhenFull) -> ChunkResult {
        ChunkResult::TAKEN
    }
}

/// Everybody wants chunks.
struct Readers<R> {
    /// By the item's place in the batch.
    chunks: Vec<Vec<Value>>,
    /// Who has left, or was cut off: for good.
    gone: Vec<bool>,
    /// What an item's caller will do with the chunk that it was asked about.
    next: Option<(usize, Reader)>,
    reader: R,
}

impl<R: FnMut(usize, usize) -> Reader + Send> BatchReaders for Readers<R> {
    fn begin(&mut self, items: usize) {
        self.chunks.resize(items, Vec::new());
        self.gone.resize(items, false);
    }
}

impl<R: FnMut(usize, usize) -> Reader + Send> Readers<R> {
    /// # Panics
    /// Where there is no such item: a chunk would be another caller's, or nobody's.
    fn does(&mut self, item: usize) -> Reader {
        let items = self.chunks.len();
        let Some(chunks) = self.chunks.get(item) else {
            panic!("a chunk of item {item} in a batch of {items}: items are named by their places, from 0");
        };
        if self.gone[item] {
            return Reader::Left;
        }
        let does = (self.reader)(item, chunks.len());
        self.gone[item] = does == Reader::Left;
        does
    }
}

impl<R: FnMut(usize, usize) -> Reader + Send> ChunkSink for Readers<R> {
    fn interest(&mut self, item: usize) -> Interest {
        let does = self.does(item);
        self.next = Some((item, does));
        if does == Reader::Left { Interest::NOTHING } else { Interest::CHUNKS }
    }

    fn chunk(&mut self, item: usize, json: &[u8], when_full: WhenFull) -> ChunkResult {
        let next = self.next.take().filter(|(of, _)| *of == item);
        match next.map_or_else(|| self.does(item), |(_, does)| does) {
            Reader::Reads => {
                self.chunks[item].push(serde_json::from_slice(json).expect("a chunk is JSON"));
                ChunkResult::TAKEN
            }
            Reader::Lags if when_full == WhenFull::RETURN => ChunkResult::FULL,
            Reader::Lags | Reader::Left => {
                self.gone[item] = true;
                ChunkResult::UNWANTED
            }
        }
    }
}

/// A loaded pipeline, ready for batches.
///
/// ```
/// # use modalkit_sdk::{InferencePipeline, LoadContext, NoSettings, Outcome, PipelineError, testkit::TestKit};
/// # use std::collections::BTreeMap;
/// # struct Echo;
/// # impl InferencePipeline for Echo {
/// #     type Settings = NoSettings;
/// #     type Input = BTreeMap<String, f32>;
/// #     type Output = BTreeMap<String, f32>;
/// #     type Preprocessed = ();
/// #     type RawOutput = ();
/// #     fn load(_: LoadContext<NoSettings>) -> Result<Self, PipelineError> { Ok(Self) }
/// #     fn preprocess(&self, _: &[Self::Input]) -> Result<(), PipelineError> { Ok(()) }
/// #     fn predict(&self, _: &[Self::Input], (): ()) -> Result<(), PipelineError> { Ok(()) }
/// #     fn postprocess(&self, inputs: &[Self::Input], (): ()) -> Result<Vec<Outcome<Self::Output>>, PipelineError> {
/// #         Ok(inputs.iter().map(|input| Ok(input.clone())).collect())
/// #     }
/// # }
/// let model = TestKit::new().load::<Echo>()?;
/// let answers = model.run_json(&[serde_json::json!({"x": 1.5}), serde_json::json!("no object")]);
/// assert_eq!(answers[0].as_ref().unwrap(), &serde_json::json!({"x": 1.5}));
/// assert!(answers[1].is_err());
/// # Ok::<(), PipelineError>(())
/// ```
pub struct LoadedPipeline<P: InferencePipeline> {
    instance: Instance<P>,
}

impl<P: InferencePipeline> LoadedPipeline<P> {
    /// Runs a batch of typed inputs through validation and the three stages.
    ///
    /// # Errors
    /// What a stage returns for the whole batch, an input that `validate` refuses, or a count of outcomes that differs
    /// from the inputs'.
    pub fn run(&self, inputs: Vec<P::Input>) -> Result<Vec<Outcome<P::Output>>, PipelineError> {
        let items: Vec<Item<P>> =
            inputs.into_iter().map(|input| Item { input, is_of_tensors: false }).collect();
        for item in &items {
            self.instance.validate(item).map_err(Refusal::into_error)?;
        }
        self.stages(items, &mut NoReaders).map(|(_, outcomes)| outcomes)
    }

    /// Runs a batch of JSON inputs and gives the outputs, which are what a caller reads beside `status`. As for callers that come one by one,
    /// an input that isn't the pipeline's `Input` fails alone and takes no place in the batch; an error of the batch fails
    /// each.
    #[must_use]
    pub fn run_json(&self, inputs: &[Value]) -> Vec<Outcome<Value>> {
        let parsed = inputs.iter().map(|input| Item::parse(input.to_string().as_bytes()));
        answers(self.run_items(parsed, &mut NoReaders, json_of))
    }

    /// As [`LoadedPipeline::run_json`], for callers who want chunks: what they get before the output, and the output.
    #[must_use]
    pub fn stream_json(&self, inputs: &[Value]) -> Vec<(Vec<Value>, Outcome<Value>)> {
        self.stream_json_to(inputs, |_, _| Reader::Reads)
    }

    /// As [`LoadedPipeline::stream_json`], for callers who may be slow, or leave: `reader` says what one does with the next chunk, by the item's place in the batch
    /// and the number of chunks that it has got.
    #[must_use]
    pub fn stream_json_to(
        &self,
        inputs: &[Value],
        reader: impl FnMut(usize, usize) -> Reader + Send,
    ) -> Vec<(Vec<Value>, Outcome<Value>)> {
        let parsed = inputs.iter().map(|input| Item::parse(input.to_string().as_bytes()));
        let mut readers = Readers { chunks: Vec::new(), gone: Vec::new(), next: None, reader };
        let answers = self.run_items(parsed, &mut readers, json_of);
        let mut chunks = |place: usize| readers.chunks.get_mut(place).map(mem::take).unwrap_or_default();
        let answer =
            |(place, answer): (Option<usize>, _)| (place.map(&mut chunks).unwrap_or_default(), answer);
        answers.into_iter().map(answer).collect()
    }

    /// Runs a batch of inputs that are made of tensors and gives the outputs' tensors. Names, datatypes and shapes are held against
    /// the pipeline's signature; otherwise as [`LoadedPipeline::run_json`].
    #[must_use]
    pub fn run_tensors(&self, inputs: Vec<Vec<Tensor>>) -> Vec<Outcome<Vec<Tensor>>> {
        let signature = self.instance.signature();
        let made = inputs.into_iter().map(|tensors| {
            let misfit = match &signature {
                Some(signature) => signature.input_misfit(&tensors),
                None => Some("the pipeline has no signature".into()),
            };
            match misfit {
                Some(misfit) => Err(Refusal::Invalid(Invalid::new(misfit))),
                None => Item::of_tensors(tensors.into()),
            }
        });
        let read = |rendered| match rendered {
            Rendered::Tensors(tensors) => {
                let misfit = signature.as_ref().and_then(|signature| signature.output_misfit(&tensors));
                misfit.map_or(Ok(tensors), |misfit| Err(PipelineError::permanent(misfit)))
            }
            Rendered::Json(_) => unreachable!("every item was made of tensors"),
        };
        answers(self.run_items(made, &mut NoReaders, read))
    }

    /// What became of each input, and its place in the batch; none of one that was refused.
    fn run_items<T>(
        &self,
        items: impl Iterator<Item = Result<Item<P>, Refusal>>,
        readers: &mut dyn BatchReaders,
        read: impl Fn(Rendered) -> Outcome<T>,
    ) -> Vec<(Option<usize>, Outcome<T>)> {
        let (mut places, mut batch) = (Vec::new(), Vec::new());
        for item in items {
            let valid = item.and_then(|item| self.instance.validate(&item).map(|_| item));
            places.push(valid.map_err(Refusal::into_error).map(|item| {
                batch.push(item);
                batch.len() - 1
            }));
        }
        let size = batch.len();
        let outcomes: Vec<Outcome<Rendered>> = match self.stages(batch, readers) {
            Ok((batch, outcomes)) => {
                let outcomes = outcomes.into_iter().enumerate();
                outcomes.map(|(place, outcome)| batch.render(place, outcome)).collect()
            }
            Err(error) => std::iter::repeat_with(|| Err(error.clone())).take(size).collect(),
        };
        let mut outcomes = outcomes.into_iter();
        let mut next = || read(outcomes.next().expect("one outcome for each input of the batch")?);
        let answer = |place: Outcome<usize>| match place {
            Ok(place) => (Some(place), next()),
            Err(error) => (None, Err(error)),
        };
        places.into_iter().map(answer).collect()
    }

    #[expect(clippy::type_complexity, reason = "a batch and what came of it, in one place")]
    fn stages(
        &self,
        items: Vec<Item<P>>,
        readers: &mut dyn BatchReaders,
    ) -> Result<(Batch<P>, Vec<Outcome<P::Output>>), PipelineError> {
        readers.begin(items.len());
        let mut batch = self.instance.begin(items.into_iter());
        batch.preprocess()?;
        batch.predict()?;
        let outcomes = batch.postprocess(&mut Chunks::of(readers))?;
        Ok((batch, outcomes))
    }

    /// Calls the pipeline's `on_volume_reload`.
    ///
    /// # Errors
    /// What the hook returns.
    pub fn volume_reload(&self, reload: &VolumeReload) -> Result<(), PipelineError> {
        self.instance.volume_reload(reload)
    }
}
