//! The trait that a pipeline implements.

use schemars::JsonSchema;
use serde::{Serialize, de::DeserializeOwned};

use crate::{Chunks, Invalid, LoadContext, PipelineError, Signature, Tensor, Tensors, VolumeReload};

/// What became of one item of a batch. An `Err` fails this item alone; its neighbours are answered.
///
/// ```
/// use modalkit_sdk::{Outcome, PipelineError};
///
/// fn divide(a: i64, b: i64) -> Outcome<i64> {
///     a.checked_div(b).ok_or_else(|| PipelineError::invalid_input("expected a divisor other than 0, found 0"))
/// }
///
/// let outcomes: Vec<_> = [(6, 3), (1, 0)].into_iter().map(|(a, b)| divide(a, b)).collect();
/// assert_eq!(outcomes[0], Ok(2));
/// assert!(outcomes[1].is_err());
/// ```
pub type Outcome<T> = Result<T, PipelineError>;

/// A model behind three stages: `preprocess`, `predict`, `postprocess`.
///
/// The host calls `load` once for each replica, then runs batches through the stages. Inputs were parsed and
/// validated before; every stage sees the whole batch, in the order in which it has to be answered. A panic in a stage
/// fails that batch and nothing else.
///
/// Stages of one batch follow each other, but may run on different threads: what belongs to a thread (a current CUDA context, thread-locals) is
/// set in each stage that wants it.
///
/// The crate's front page has the smallest example. One with settings, validation and outcomes of its own for each item:
///
/// ```
/// use modalkit_sdk::{
///     InferencePipeline, Invalid, LoadContext, Outcome, PipelineError, VolumeReload, testkit::TestKit,
/// };
/// use schemars::JsonSchema;
/// use serde::{Deserialize, Serialize};
/// use serde_json::json;
///
/// #[derive(Deserialize, JsonSchema)]
/// struct Settings {
///     scale: f64,
/// }
///
/// #[derive(Deserialize, JsonSchema)]
/// struct Input {
///     values: Vec<f64>,
/// }
///
/// #[derive(Serialize, JsonSchema)]
/// struct Output {
///     mean: f64,
/// }
///
/// struct Mean {
///     scale: f64,
///     reloads: usize,
/// }
///
/// impl InferencePipeline for Mean {
///     type Settings = Settings;
///     type Input = Input;
///     type Output = Output;
///     type Preprocessed = Vec<f64>;
///     type RawOutput = Vec<f64>;
///
///     fn load(ctx: LoadContext<Settings>) -> Result<Self, PipelineError> {
///         Ok(Self { scale: ctx.settings().scale, reloads: 0 })
///     }
///     fn validate(&self, input: &Input) -> Result<(), Invalid> {
///         if input.values.is_empty() {
///             return Err(Invalid::new("expected at least one number, found none").at("values"));
///         }
///         Ok(())
///     }
///     fn preprocess(&self, inputs: &[Input]) -> Result<Vec<f64>, PipelineError> {
///         Ok(inputs.iter().map(|input| input.values.iter().sum()).collect())
///     }
///     fn predict(&self, inputs: &[Input], sums: Vec<f64>) -> Result<Vec<f64>, PipelineError> {
///         Ok(sums.iter().zip(inputs).map(|(sum, input)| self.scale * sum / input.values.len() as f64).collect())
///     }
///     fn postprocess(&self, _: &[Input], means: Vec<f64>) -> Result<Vec<Outcome<Output>>, PipelineError> {
///         let outcome = |mean: f64| match mean.is_finite() {
///             true => Ok(Output { mean }),
///             false => Err(PipelineError::invalid_input("the mean is no finite number")),
///         };
///         Ok(means.into_iter().map(outcome).collect())
///     }
///     fn warmup(&self) -> Result<(), PipelineError> {
///         self.predict(&[Input { values: vec![1.0] }], vec![1.0]).map(drop)
///     }
///     fn on_volume_reload(&mut self, _: &VolumeReload) -> Result<(), PipelineError> {
///         self.reloads += 1;
///         Ok(())
///     }
/// }
///
/// let model = TestKit::new().settings(json!({"scale": 2})).load::<Mean>()?;
/// let answers = model.run_json(&[json!({"values": [1, 2]}), json!({"values": []}), json!({"values": [1e308, 1e308]})]);
/// assert_eq!(answers[0].as_ref().unwrap()["mean"], 3.0);
/// assert!(answers[1].as_ref().unwrap_err().to_string().contains("values: expected at least one number"));
/// assert!(answers[2].is_err());
/// model.volume_reload(&VolumeReload::new("models", "/mnt/models", ["scale.json"]))?;
/// assert_eq!(model.run(vec![Input { values: vec![4.0] }])?.remove(0)?.mean, 8.0);
/// # Ok::<(), PipelineError>(())
/// ```
pub trait InferencePipeline: Send + Sync + Sized + 'static {
    /// The pipeline's own keys of the model's entry in the configuration; [`crate::NoSettings`] where it has none.
    /// A key that it doesn't know is an error before load; its JSON Schema lets the host name the line and the nearest key. One that names a
    /// file in the data folder says so with `#[schemars(extend("x-modalkit-file" = true))]`: `modalkit check` looks whether it is there. With `"x-modalkit-extensions" = ["onnx"]` beside it, or
    /// `"x-modalkit-folder-with" = "tokenizer.json"` where it names a folder, `modalkit inspect` finds the pipeline for such files.
    type Settings: DeserializeOwned + JsonSchema;
    /// One request. Its JSON Schema explains to callers what was wrong with theirs.
    type Input: DeserializeOwned + JsonSchema + Send + Sync + 'static;
    /// One answer: a JSON object, without members named `status`, `error` or `meta`, which the host adds.
    type Output: Serialize + JsonSchema;
    /// What `preprocess` hands to `predict`: tensors, token ids.
    type Preprocessed: Send + 'static;
    /// What `predict` hands to `postprocess`.
    type RawOutput: Send + 'static;

    /// Reads weights, builds the model. Runs on the replica's own thread and may take its time.
    ///
    /// # Errors
    /// Whatever keeps the pipeline from serving; the host shows it and doesn't serve the model.
    fn load(ctx: LoadContext<Self::Settings>) -> Result<Self, PipelineError>;

    /// Looks at one parsed input before it is queued; what it refuses gets a 422 and never takes a slot in a batch.
    ///
    /// It may run on the host's network threads: check shapes and ranges here, and leave real work to `preprocess`. What only the schema
    /// says, as `#[schemars(length(min = 1))]` does, is not checked unless the model's entry says `enforce_schema = true`.
    ///
    /// # Errors
    /// What is wrong with the input, and where.
    fn validate(&self, input: &Self::Input) -> Result<(), Invalid> {
        let _ = input;
        Ok(())
    }

    /// How much work an input is, in a unit of the pipeline's own: tokens, pixels, rows. Asked once, after `validate`, under the same
    /// terms. The host counts it (`modalkit_cost_total`), and where `max_batch_cost` is set, no batch of several inputs costs more,
    /// as far as they were asked about before they were queued (see `docs/batching.md`). A pipeline that pads the inputs of a batch to one length gives each its cost
    /// so padded, and a [`InferencePipeline::shape`].
    ///
    /// ```
    /// # struct Input { text: String }
    /// # struct Tagger;
    /// # impl Tagger {
    /// fn cost(&self, input: &Input) -> u64 {
    ///     input.text.split_whitespace().count().max(1) as u64
    /// }
    /// # }
    /// # assert_eq!(Tagger.cost(&Input { text: "a b".into() }), 2);
    /// ```
    fn cost(&self, input: &Self::Input) -> u64 {
        let _ = input;
        1
    }

    /// A key of an input's shape: inputs with the same key share batches, others don't; a length rounded up, say. Asked as [`InferencePipeline::cost`] is. It is
    /// a wish: an input that nobody was asked about before it was queued has 0, whatever it is, and of very many shapes at once some share batches.
    ///
    /// ```
    /// # struct Input { tokens: Vec<u32> }
    /// # struct Tagger;
    /// # impl Tagger {
    /// fn shape(&self, input: &Input) -> u64 {
    ///     input.tokens.len().next_multiple_of(32) as u64
    /// }
    /// # }
    /// # assert_eq!(Tagger.shape(&Input { tokens: vec![7; 40] }), 64);
    /// ```
    fn shape(&self, input: &Self::Input) -> u64 {
        let _ = input;
        0
    }

    /// The tensors that the pipeline takes and gives, as it is loaded now, where it takes any (`POST /v2/models/{name}/infer`): then
    /// [`InferencePipeline::input_from_tensors`] and [`InferencePipeline::output_to_tensors`] are to be there as well. The host holds requests
    /// against it, and asks again after `on_volume_reload`.
    ///
    /// ```
    /// # use modalkit_sdk::{Datatype, InferencePipeline, Invalid, LoadContext, NoSettings, Outcome, PipelineError};
    /// # use modalkit_sdk::{Signature, Tensor, Tensors, testkit::TestKit};
    /// # #[derive(serde::Deserialize, schemars::JsonSchema)]
    /// # struct Input { values: Vec<f32> }
    /// # #[derive(serde::Serialize, schemars::JsonSchema)]
    /// # struct Output { sum: f32 }
    /// # struct Sum;
    /// # impl InferencePipeline for Sum {
    /// #     type Settings = NoSettings;
    /// #     type Input = Input;
    /// #     type Output = Output;
    /// #     type Preprocessed = ();
    /// #     type RawOutput = ();
    /// #     fn load(_: LoadContext<NoSettings>) -> Result<Self, PipelineError> { Ok(Self) }
    /// #     fn preprocess(&self, _: &[Input]) -> Result<(), PipelineError> { Ok(()) }
    /// #     fn predict(&self, _: &[Input], (): ()) -> Result<(), PipelineError> { Ok(()) }
    /// #     fn postprocess(&self, inputs: &[Input], (): ()) -> Result<Vec<Outcome<Output>>, PipelineError> {
    /// #         Ok(inputs.iter().map(|input| Ok(Output { sum: input.values.iter().sum() })).collect())
    /// #     }
    /// fn signature(&self) -> Option<Signature> {
    ///     Some(Signature::new().input("values", Datatype::Fp32, [-1]).output("sum", Datatype::Fp32, [1]))
    /// }
    ///
    /// fn input_from_tensors(mut tensors: Tensors) -> Result<Input, Invalid> {
    ///     Ok(Input { values: tensors.take("values")?.values()?.to_vec() })
    /// }
    ///
    /// fn output_to_tensors(&self, output: Output) -> Result<Vec<Tensor>, PipelineError> {
    ///     Ok(vec![Tensor::new("sum", [1], vec![output.sum])?])
    /// }
    /// # }
    ///
    /// # let model = TestKit::new().load::<Sum>()?;
    /// let values = Tensor::new("values", [2], vec![1.0_f32, 2.0])?;
    /// let answers = model.run_tensors(vec![vec![values]]);
    /// assert_eq!(answers[0].as_ref().unwrap()[0].values::<f32>().unwrap(), [3.0]);
    /// # Ok::<(), PipelineError>(())
    /// ```
    fn signature(&self) -> Option<Signature> {
        None
    }

    /// Makes an input of tensors; runs where `Input` would be parsed. They fit a signature that the pipeline gave: where that changes with its
    /// data, `validate` or a stage looks again. A [`Tensor`] may be kept as it is, without a copy; the request's other tensors may be kept with it.
    ///
    /// # Errors
    /// What is wrong with them, and in which.
    fn input_from_tensors(tensors: Tensors) -> Result<Self::Input, Invalid> {
        let _ = tensors;
        Err(Invalid::new("this pipeline takes no tensors"))
    }

    /// Makes tensors of an output, for a request that came with tensors.
    ///
    /// # Errors
    /// Fails the item.
    fn output_to_tensors(&self, output: Self::Output) -> Result<Vec<Tensor>, PipelineError> {
        let _ = output;
        Err(PipelineError::permanent("this pipeline gives no tensors: `output_to_tensors` is missing"))
    }

    /// Prepares a batch for the model.
    ///
    /// # Errors
    /// Fails the whole batch. To fail one item, carry its error through to `postprocess`.
    fn preprocess(&self, inputs: &[Self::Input]) -> Result<Self::Preprocessed, PipelineError>;

    /// Runs the model.
    ///
    /// # Errors
    /// Fails the whole batch.
    fn predict(
        &self,
        inputs: &[Self::Input],
        preprocessed: Self::Preprocessed,
    ) -> Result<Self::RawOutput, PipelineError>;

    /// Turns the model's output into answers: exactly one for each input, in the inputs' order.
    ///
    /// # Errors
    /// Fails the whole batch; an `Err` inside the list fails that item alone.
    fn postprocess(
        &self,
        inputs: &[Self::Input],
        raw_output: Self::RawOutput,
    ) -> Result<Vec<Outcome<Self::Output>>, PipelineError>;

    /// As [`InferencePipeline::postprocess`], with chunks: parts of an output for callers who want them as they come (`POST /predict_stream`). The host
    /// always calls this one. Where a pipeline doesn't have it, it is `postprocess`, and such callers get the output as the one event of their stream.
    ///
    /// Outputs are whole here too: callers who don't stream, and jobs, get nothing else. So a pipeline that streams adds up what it sends, and its
    /// `postprocess` is this with [`Chunks::discarding`]. Where making the output is what takes the time (a decoder's loop), `predict` prepares and the loop stands
    /// here; an item whose caller has left ends early, whether it streamed or not.
    ///
    /// ```
    /// # use modalkit_sdk::{Chunks, InferencePipeline, LoadContext, NoSettings, Outcome, PipelineError, testkit::TestKit};
    /// # use serde_json::json;
    /// # #[derive(serde::Deserialize, schemars::JsonSchema)]
    /// # struct Input { to: usize }
    /// #[derive(serde::Serialize, schemars::JsonSchema)]
    /// struct Output {
    ///     text: String,
    /// }
    /// # struct Counter;
    /// # impl InferencePipeline for Counter {
    /// #     type Settings = NoSettings;
    /// #     type Input = Input;
    /// #     type Output = Output;
    /// #     type Preprocessed = ();
    /// #     type RawOutput = ();
    /// #     fn load(_: LoadContext<NoSettings>) -> Result<Self, PipelineError> { Ok(Self) }
    /// #     fn preprocess(&self, _: &[Input]) -> Result<(), PipelineError> { Ok(()) }
    /// #     fn predict(&self, _: &[Input], (): ()) -> Result<(), PipelineError> { Ok(()) }
    ///
    /// fn postprocess(&self, inputs: &[Input], raw: ()) -> Result<Vec<Outcome<Output>>, PipelineError> {
    ///     self.postprocess_stream(inputs, raw, &mut Chunks::discarding())
    /// }
    ///
    /// fn postprocess_stream(
    ///     &self,
    ///     inputs: &[Input],
    ///     (): (),
    ///     chunks: &mut Chunks<'_>,
    /// ) -> Result<Vec<Outcome<Output>>, PipelineError> {
    ///     // Item by item; a batch whose items go on together is in `plugins/bigram`.
    ///     let text_of = |(item, input): (usize, &Input)| {
    ///         let mut text = String::new();
    ///         for number in 1..=input.to {
    ///             let word = format!("{number} ");
    ///             chunks.send(item, &word)?;
    ///             text.push_str(&word);
    ///         }
    ///         Ok(Output { text })
    ///     };
    ///     Ok(inputs.iter().enumerate().map(text_of).collect())
    /// }
    /// # }
    ///
    /// # let model = TestKit::new().load::<Counter>()?;
    /// let (chunks, output) = model.stream_json(&[json!({"to": 3})]).remove(0);
    /// assert_eq!(chunks, [json!("1 "), json!("2 "), json!("3 ")]);
    /// assert_eq!(output?, json!({"text": "1 2 3 "}));
    /// # Ok::<(), PipelineError>(())
    /// ```
    ///
    /// # Errors
    /// Fails the whole batch; an `Err` inside the list fails that item alone.
    fn postprocess_stream(
        &self,
        inputs: &[Self::Input],
        raw_output: Self::RawOutput,
        chunks: &mut Chunks<'_>,
    ) -> Result<Vec<Outcome<Self::Output>>, PipelineError> {
        // Called by such a `postprocess`, where there is no other `postprocess_stream`: the two would call each other without end.
        if chunks.are_discarded() {
            return Err(PipelineError::permanent(
                "this pipeline has no `postprocess_stream` of its own to be called with chunks that go nowhere, as its `postprocess` may do: implement it, or call `postprocess`",
            ));
        }
        self.postprocess(inputs, raw_output)
    }

    /// Runs once after `load`, before the replica takes work: the place for a first slow run.
    ///
    /// # Errors
    /// Keeps the replica from serving, as an error of `load` does.
    fn warmup(&self) -> Result<(), PipelineError> {
        Ok(())
    }

    /// Called when files of a volume changed and the plugin itself did not, between batches.
    ///
    /// # Errors
    /// Is logged; the pipeline goes on serving as it is.
    fn on_volume_reload(&mut self, reload: &VolumeReload) -> Result<(), PipelineError> {
        let _ = reload;
        Ok(())
    }
}
