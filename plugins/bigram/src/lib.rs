//! Generates text word by word, each chosen by the one before it as often as it followed that in a text: the smallest language model, and an
//! example of how one is served. All texts of a batch grow by a word at a time, as a decoder's do, and callers who stream get each word as
//! it comes.
//!
//! It owns the way from a prompt to a text; what it learnt is in `model.rs`. It never knows who reads along.
//!
//! ```toml
//! [model_settings.model_entries.babble]
//! plugin = "bigram"
//! corpus = "harbour.corpus"        # a text; within local_model_repository_folder
//! task = "completion"              # or "chat": also for clients of OpenAI's API
//! batch_config = { max_batch_size = 32, wait_ms = 2 }
//! ```
//!
//! `{"prompt": "The keeper", "max_tokens": 20, "seed": 7}` is answered by `{"text": "…", "finish_reason": "stop", "usage": {…}}`; a chunk is
//! `{"text": " lights"}`. The same request has the same answer. A new text in the volume takes the old one's place between two batches.

mod model;

use std::{borrow::Cow, fs, path::PathBuf};

use modalkit_sdk::{
    Chunks, InferencePipeline, Invalid, LoadContext, Outcome, PipelineError, VolumeReload, export_pipeline,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use model::{Model, Word};

/// Words that are generated where a request doesn't say how many at most.
const TOKENS: usize = 50;
/// The most that a request may ask for.
const TOKENS_MAX: usize = 4096;

/// The keys of a model's entry.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
pub struct Settings {
    /// The text to learn from, within the folder of all models' data.
    #[schemars(extend("x-modalkit-file" = true))]
    corpus: PathBuf,
}

/// One request.
#[derive(Debug, Deserialize, JsonSchema)]
pub struct Input {
    /// What the text goes on from: its last word counts. Without one it begins as a sentence does.
    #[serde(default)]
    prompt: String,
    /// A conversation in place of a prompt: what was said last counts.
    #[serde(default)]
    messages: Vec<Message>,
    /// How many words at most, from 1 to 4096; 50 where this is left out.
    #[serde(default)]
    #[schemars(range(min = 1, max = 4096))]
    max_tokens: Option<usize>,
    /// The same, as newer clients call it.
    #[serde(default)]
    #[schemars(range(min = 1, max = 4096))]
    max_completion_tokens: Option<usize>,
    /// Which of all texts: the same seed gives the same one.
    #[serde(default)]
    seed: i64,
}

/// What somebody said.
#[derive(Debug, Deserialize, JsonSchema)]
pub struct Message {
    /// In words; nothing where a tool was called.
    #[serde(default)]
    content: Option<Content>,
}

/// What a message says.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(untagged)]
enum Content {
    /// In one text.
    Text(String),
    /// In parts, of which the texts count.
    Parts(Vec<Part>),
}

/// A part of a message.
#[derive(Debug, Deserialize, JsonSchema)]
struct Part {
    /// Its text, where it is one.
    #[serde(default)]
    text: String,
}

impl Input {
    fn prompt(&self) -> Cow<'_, str> {
        match self.messages.last().map(|message| &message.content) {
            None => Cow::Borrowed(&self.prompt),
            Some(None) => Cow::Borrowed(""),
            Some(Some(Content::Text(text))) => Cow::Borrowed(text),
            Some(Some(Content::Parts(parts))) => parts.iter().map(|part| part.text.as_str()).collect(),
        }
    }

    fn tokens_max(&self) -> usize {
        self.max_completion_tokens.or(self.max_tokens).unwrap_or(TOKENS)
    }
}

/// One answer.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Output {
    /// What comes after the prompt.
    text: String,
    /// Why there is no more.
    finish_reason: FinishReason,
    /// How many words there were.
    usage: Usage,
}

/// Words of a request and its answer.
#[derive(Clone, Copy, Debug, Serialize, JsonSchema)]
struct Usage {
    /// Of the prompt.
    prompt_tokens: usize,
    /// Of the text.
    completion_tokens: usize,
}

/// Why a text ended.
#[derive(Clone, Copy, Debug, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum FinishReason {
    /// At the end of a sentence.
    Stop,
    /// It has as many words as were asked for.
    Length,
}

/// A part of a text.
#[derive(Serialize)]
struct Chunk<'t> {
    text: &'t str,
}

/// The pipeline.
pub struct Bigram {
    corpus: PathBuf,
    model: Model,
}

/// A text that grows.
pub struct Draft {
    last: Word,
    random: fastrand::Rng,
    text: String,
    /// So much of it has gone to the caller.
    sent_bytes: usize,
    /// Not before it is as long as this is it tried again: a caller who doesn't read costs its neighbours next to nothing.
    try_at_bytes: usize,
    usage: Usage,
    tokens_max: usize,
    outcome: Option<Outcome<FinishReason>>,
}

impl Draft {
    /// Adds a word.
    fn grow(&mut self, model: &Model) {
        let next = model.next(self.last, &mut self.random);
        self.text.push_str(model.text_of(next));
        self.last = next;
        self.usage.completion_tokens += 1;
        if model.ends_a_sentence(next) {
            self.outcome = Some(Ok(FinishReason::Stop));
        } else if self.usage.completion_tokens == self.tokens_max {
            self.outcome = Some(Ok(FinishReason::Length));
        }
    }

    /// Sends what its caller doesn't have yet. Nobody waits for one who reads slowly: the words gather in the next chunk, and all are in the
    /// output.
    fn send(&mut self, item: usize, chunks: &mut Chunks<'_>) {
        if self.text.len() < self.try_at_bytes {
            return;
        }
        match chunks.try_send(item, &Chunk { text: &self.text[self.sent_bytes..] }) {
            Ok(true) => self.sent_bytes = self.text.len(),
            Ok(false) => self.try_at_bytes = 2 * self.text.len() - self.sent_bytes,
            Err(error) => self.outcome = Some(Err(error)),
        }
    }

    fn into_outcome(self) -> Outcome<Output> {
        let Self { text, usage, outcome, .. } = self;
        let finish_reason = outcome.expect("the loop ends when each has one")?;
        Ok(Output { text, finish_reason, usage })
    }
}

impl InferencePipeline for Bigram {
    type Settings = Settings;
    type Input = Input;
    type Output = Output;
    type Preprocessed = Vec<Draft>;
    type RawOutput = Vec<Draft>;

    fn load(ctx: LoadContext<Settings>) -> Result<Self, PipelineError> {
        let corpus = ctx.all_model_data_folder().join(&ctx.settings().corpus);
        Ok(Self { model: learn(&corpus)?, corpus })
    }

    fn validate(&self, input: &Input) -> Result<(), Invalid> {
        match input.tokens_max() {
            1..=TOKENS_MAX => Ok(()),
            found => Err(Invalid::new(format!("expected 1 to {TOKENS_MAX}, found {found}")).at("max_tokens")),
        }
    }

    fn cost(&self, input: &Input) -> u64 {
        input.tokens_max() as u64
    }

    fn preprocess(&self, inputs: &[Input]) -> Result<Vec<Draft>, PipelineError> {
        let draft = |input: &Input| Draft {
            last: self.model.last_of(&input.prompt()),
            random: fastrand::Rng::with_seed(input.seed as u64),
            text: String::new(),
            sent_bytes: 0,
            try_at_bytes: 0,
            usage: Usage { prompt_tokens: input.prompt().split_whitespace().count(), completion_tokens: 0 },
            tokens_max: input.tokens_max(),
            outcome: None,
        };
        Ok(inputs.iter().map(draft).collect())
    }

    fn predict(&self, _: &[Input], drafts: Vec<Draft>) -> Result<Vec<Draft>, PipelineError> {
        // A larger model would read the prompts here; each word is a prediction of its own, below.
        Ok(drafts)
    }

    fn postprocess(
        &self,
        inputs: &[Input],
        drafts: Vec<Draft>,
    ) -> Result<Vec<Outcome<Output>>, PipelineError> {
        self.postprocess_stream(inputs, drafts, &mut Chunks::discarding())
    }

    fn postprocess_stream(
        &self,
        _: &[Input],
        mut drafts: Vec<Draft>,
        chunks: &mut Chunks<'_>,
    ) -> Result<Vec<Outcome<Output>>, PipelineError> {
        while drafts.iter().any(|draft| draft.outcome.is_none()) {
            for (item, draft) in drafts.iter_mut().enumerate().filter(|(_, draft)| draft.outcome.is_none()) {
                draft.grow(&self.model);
                draft.send(item, chunks);
            }
        }
        Ok(drafts.into_iter().map(Draft::into_outcome).collect())
    }

    fn on_volume_reload(&mut self, _: &VolumeReload) -> Result<(), PipelineError> {
        self.model = learn(&self.corpus)?;
        Ok(())
    }
}

fn learn(corpus: &PathBuf) -> Result<Model, PipelineError> {
    let reading = || format!("reading the text {}", corpus.display());
    let text = fs::read_to_string(corpus).map_err(|error| PipelineError::from(error).context(reading()))?;
    Model::learn(&text)
        .ok_or_else(|| PipelineError::permanent("expected a text of two words at least").context(reading()))
}

export_pipeline!(Bigram);

#[cfg(test)]
mod tests {
    use modalkit_sdk::testkit::{LoadedPipeline, Reader, TestKit};
    use serde_json::{Value, json};

    use super::*;

    fn model() -> LoadedPipeline<Bigram> {
        let kit = TestKit::new().all_model_data_folder(concat!(env!("CARGO_MANIFEST_DIR"), "/model"));
        kit.settings(json!({"corpus": "harbour.corpus"})).load().unwrap()
    }

    fn inputs() -> Vec<Value> {
        (0..8).map(|seed| json!({"prompt": "The keeper", "seed": seed, "max_tokens": 5 + seed})).collect()
    }

    #[test]
    fn chunks_together_are_the_output_that_callers_get_whole() {
        let model = model();
        let whole = model.run_json(&inputs());
        for ((chunks, output), whole) in model.stream_json(&inputs()).into_iter().zip(whole) {
            let (output, whole) = (output.unwrap(), whole.unwrap());
            let texts: Vec<&str> = chunks.iter().map(|chunk| chunk["text"].as_str().unwrap()).collect();
            assert_eq!(texts.concat(), output["text"].as_str().unwrap());
            assert_eq!(
                (output["usage"]["completion_tokens"].as_u64().unwrap() as usize, &output),
                (chunks.len(), &whole)
            );
        }
    }

    #[test]
    fn a_text_ends_with_its_sentence_or_its_length_or_when_its_caller_leaves() {
        let model = model();
        for answer in model.run_json(&inputs()) {
            let answer = answer.unwrap();
            let ended = answer["text"].as_str().unwrap().ends_with(['.', '"']);
            assert_eq!(answer["finish_reason"] == "stop", ended, "{answer}");
        }
        let long =
            [json!({"prompt": "no such word", "max_tokens": 4096, "seed": 1}), json!({"max_tokens": 0})];
        let mut answers =
            model.stream_json_to(&long, |_, read| if read < 2 { Reader::Reads } else { Reader::Left });
        let (none, refused) = answers.pop().unwrap();
        assert!(
            none.is_empty() && refused.unwrap_err().to_string().contains("max_tokens: expected 1 to 4096")
        );
        let (chunks, left) = answers.pop().unwrap();
        assert_eq!((chunks.len(), left.unwrap_err().is_retryable()), (2, true));
    }

    #[test]
    fn a_conversation_goes_on_from_what_was_said_last() {
        let model = model();
        let text =
            |input: Value| model.run_json(&[input]).remove(0).unwrap()["text"].as_str().unwrap().to_owned();
        let said = text(json!({"prompt": "The keeper", "seed": -3, "max_tokens": 9}));
        for content in [
            json!("The keeper"),
            json!([{"type": "text", "text": "The "}, {"type": "text", "text": "keeper"}]),
        ] {
            let messages = json!([{"role": "user", "content": "x"}, {"role": "user", "content": content}]);
            assert_eq!(text(json!({"messages": messages, "seed": -3, "max_completion_tokens": 9})), said);
        }
        let nothing = json!([{"role": "assistant", "content": null, "tool_calls": []}]);
        assert_eq!(text(json!({"messages": nothing})), text(json!({})));
    }

    #[test]
    fn words_that_a_slow_caller_had_no_room_for_gather_in_its_next_chunk() {
        let model = model();
        let mut asked = 0;
        let late = move |_, _| {
            asked += 1;
            if asked > 3 { Reader::Reads } else { Reader::Lags }
        };
        let input = json!({"prompt": "no such word", "max_tokens": 400, "seed": 5});
        let (chunks, output) = model.stream_json_to(&[input], late).remove(0);
        let texts: Vec<&str> = chunks.iter().map(|chunk| chunk["text"].as_str().unwrap()).collect();
        let text = output.unwrap()["text"].as_str().unwrap().to_owned();
        assert!(!texts.is_empty() && text.starts_with(&texts.concat()), "{texts:?} of {text}");
        assert!(texts.iter().any(|text| text.split_whitespace().count() > 1), "{texts:?}");
    }

    #[test]
    fn a_text_without_two_words_is_refused_and_a_new_one_is_learnt() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a.corpus");
        fs::write(&file, "word").unwrap();
        let kit = TestKit::new().all_model_data_folder(folder.path()).settings(json!({"corpus": "a.corpus"}));
        let refused = kit.load::<Bigram>().err().unwrap().to_string();
        assert!(refused.contains("a.corpus: expected a text of two words at least"), "{refused}");
        fs::write(&file, "One two.").unwrap();
        let model = kit.load::<Bigram>().unwrap();
        assert_eq!(model.run_json(&[json!({})])[0].as_ref().unwrap()["text"], " One two.");
        fs::write(&file, "Three four.").unwrap();
        model.volume_reload(&VolumeReload::new("models", folder.path(), ["a.corpus"])).unwrap();
        assert_eq!(model.run_json(&[json!({})])[0].as_ref().unwrap()["text"], " Three four.");
    }
}
