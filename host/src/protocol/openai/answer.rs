//! A pipeline's outputs, as answers. Of an output counts: for embeddings `embedding`, a list of numbers; for texts `text`, or for chats `message` (an object
//! as the answer shall have it, with tool calls, say), and `finish_reason` ("stop" where it says nothing) and `logprobs`; for both `usage`
//! (`prompt_tokens`, `completion_tokens`).

use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;
use modalkit_engine::{Failure, FailureKind};
use serde::{Deserialize, Serialize};
use serde_json::{json, value::RawValue};

use crate::{
    config::Task,
    protocol::json::{Object, object},
};

/// What every answer, and every chunk of one, begins with.
#[derive(Clone, Debug)]
pub struct AnswerHead {
    /// The request's.
    pub id: String,
    /// Seconds since 1970.
    pub created: u64,
    /// The model's name.
    pub model: String,
    /// What the model does.
    pub task: Task,
}

/// How many tokens there were.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub(super) struct Usage {
    #[serde(default)]
    prompt_tokens: u64,
    #[serde(default)]
    completion_tokens: u64,
}

impl Usage {
    fn add(self, other: Self) -> Self {
        Self {
            prompt_tokens: self.prompt_tokens.saturating_add(other.prompt_tokens),
            completion_tokens: self.completion_tokens.saturating_add(other.completion_tokens),
        }
    }

    pub(super) fn json(self, task: Task) -> serde_json::Value {
        let Self { prompt_tokens, completion_tokens } = self;
        let total = prompt_tokens.saturating_add(completion_tokens);
        match task {
            Task::Embedding => json!({"prompt_tokens": prompt_tokens, "total_tokens": total}),
            Task::Completion | Task::Chat => {
                json!({"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total})
            }
        }
    }
}

/// An output of a pipeline for texts.
#[derive(Default, Deserialize)]
pub(super) struct TextOutput<'a> {
    #[serde(default)]
    pub(super) text: Option<String>,
    /// What chunks of text came to, where the pipeline says nothing else: a generator in Python.
    #[serde(borrow, default)]
    output: Option<&'a RawValue>,
    #[serde(borrow, default)]
    pub(super) message: Option<&'a RawValue>,
    #[serde(default)]
    finish_reason: Option<String>,
    #[serde(borrow, default)]
    pub(super) logprobs: Option<&'a RawValue>,
    #[serde(default)]
    pub(super) usage: Option<Usage>,
}

impl<'a> TextOutput<'a> {
    /// Reads an output.
    ///
    /// # Errors
    /// It isn't of the form that its model's task has.
    pub(super) fn read(output: &'a [u8], head: &AnswerHead) -> Result<Self, Failure> {
        let form = if head.task == Task::Chat { CHAT_FORM } else { TEXT_FORM };
        let whole = serde_json::from_slice::<Object<TextOutput<'a>>>(output).map(|Object(mut read)| {
            let joined = || serde_json::from_str(read.output?.get()).ok();
            read.text = read.text.take().or_else(joined);
            Object(read)
        });
        match whole {
            Ok(Object(read)) if read.message.is_some_and(|message| !is_object(message)) => {
                Err(wrong_form(head, form, "its message is no object"))
            }
            Ok(Object(read)) if read.text.is_some() => Ok(read),
            Ok(Object(read)) if head.task == Task::Chat && read.message.is_some() => Ok(read),
            Ok(_) => Err(wrong_form(head, form, "it has neither")),
            Err(error) => Err(wrong_form(head, form, &error.to_string())),
        }
    }

    pub(super) fn finish_reason(&self) -> &str {
        self.finish_reason.as_deref().unwrap_or("stop")
    }
}

const TEXT_FORM: &str = r#"{"text": "…", "finish_reason"?, "logprobs"?, "usage"?}"#;
const CHAT_FORM: &str = r#"{"text": "…"} or {"message": {…}}, with "finish_reason"?, "logprobs"?, "usage"?"#;
const EMBEDDING_FORM: &str = r#"{"embedding": [number, …], "usage"?}"#;

fn wrong_form(head: &AnswerHead, form: &str, found: &str) -> Failure {
    let (model, task) = (&head.model, head.task.name());
    Failure {
        kind: FailureKind::Permanent,
        message: format!("expected the model {model}, whose task is {task:?}, to answer {form}: {found}"),
    }
}

pub(super) fn is_object(value: &RawValue) -> bool {
    value.get().starts_with('{')
}

/// The answer of texts.
///
/// # Errors
/// An output isn't of the form that its model's task has.
pub fn write_texts(head: &AnswerHead, outputs: &[Bytes]) -> Result<Bytes, Failure> {
    #[derive(Serialize)]
    struct Choice<'a> {
        index: usize,
        #[serde(skip_serializing_if = "Option::is_none")]
        text: Option<&'a str>,
        #[serde(skip_serializing_if = "Option::is_none")]
        message: Option<Message<'a>>,
        logprobs: Option<&'a RawValue>,
        finish_reason: &'a str,
    }
    #[derive(Serialize)]
    #[serde(untagged)]
    enum Message<'a> {
        Whole(&'a RawValue),
        Text { role: &'static str, content: &'a str, refusal: Option<&'a str> },
    }
    #[derive(Serialize)]
    struct Answer<'a> {
        id: &'a str,
        object: &'static str,
        created: u64,
        model: &'a str,
        choices: Vec<Choice<'a>>,
        #[serde(skip_serializing_if = "Option::is_none")]
        usage: Option<serde_json::Value>,
    }
    let read = outputs.iter().map(|output| TextOutput::read(output, head)).collect::<Result<Vec<_>, _>>()?;
    let choices = read
        .iter()
        .enumerate()
        .map(|(index, output)| {
            let (text, message) = match (head.task, output.message) {
                (Task::Chat, Some(whole)) => (None, Some(Message::Whole(whole))),
                (Task::Chat, None) => {
                    let content = output.text.as_deref().unwrap_or_default();
                    (None, Some(Message::Text { role: ASSISTANT, content, refusal: None }))
                }
                _ => (output.text.as_deref(), None),
            };
            let finish_reason = output.finish_reason();
            Choice { index, text, message, logprobs: output.logprobs, finish_reason }
        })
        .collect();
    let object_name = if head.task == Task::Chat { "chat.completion" } else { "text_completion" };
    Ok(object(&Answer {
        id: &head.id,
        object: object_name,
        created: head.created,
        model: &head.model,
        choices,
        usage: sum(read.iter().map(|output| output.usage)).map(|usage| usage.json(head.task)),
    }))
}

/// Who answers.
pub(super) const ASSISTANT: &str = "assistant";

/// Of all, where each has said so.
fn sum(mut each: impl Iterator<Item = Option<Usage>>) -> Option<Usage> {
    each.try_fold(Usage::default(), |sum, usage| Some(sum.add(usage?)))
}

/// The answer of embeddings.
///
/// # Errors
/// An output isn't of the form that the task has.
pub fn write_embeddings(head: &AnswerHead, outputs: &[Bytes], in_base64: bool) -> Result<Bytes, Failure> {
    #[derive(Deserialize)]
    struct Output<'a> {
        #[serde(borrow)]
        embedding: &'a RawValue,
        #[serde(default)]
        usage: Option<Usage>,
    }
    #[derive(Serialize)]
    struct Answer<'a> {
        object: &'static str,
        data: Vec<Data<'a>>,
        model: &'a str,
        #[serde(skip_serializing_if = "Option::is_none")]
        usage: Option<serde_json::Value>,
    }
    #[derive(Serialize)]
    struct Data<'a> {
        object: &'static str,
        index: usize,
        embedding: Embedding<'a>,
    }
    #[derive(Serialize)]
    #[serde(untagged)]
    enum Embedding<'a> {
        Base64(String),
        Numbers(&'a RawValue),
    }
    let wrong = |error: serde_json::Error| wrong_form(head, EMBEDDING_FORM, &error.to_string());
    let mut usages = Vec::with_capacity(outputs.len());
    let mut data = Vec::with_capacity(outputs.len());
    for (index, output) in outputs.iter().enumerate() {
        let Object(Output { embedding, usage }) = serde_json::from_slice(output).map_err(wrong)?;
        let numbers: Vec<f32> = serde_json::from_str(embedding.get()).map_err(wrong)?;
        let embedding = if in_base64 {
            let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
            Embedding::Base64(STANDARD.encode(bytes))
        } else {
            Embedding::Numbers(embedding)
        };
        usages.push(usage);
        data.push(Data { object: "embedding", index, embedding });
    }
    let usage = sum(usages.into_iter()).map(|usage| usage.json(Task::Embedding));
    Ok(object(&Answer { object: "list", data, model: &head.model, usage }))
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn head(task: Task) -> AnswerHead {
        AnswerHead { id: "x".into(), created: 7, model: "m".into(), task }
    }

    fn texts(task: Task, outputs: &[&'static str]) -> Result<Value, Failure> {
        let outputs: Vec<Bytes> =
            outputs.iter().map(|output| Bytes::from_static(output.as_bytes())).collect();
        write_texts(&head(task), &outputs).map(|answer| serde_json::from_slice(&answer).unwrap())
    }

    #[test]
    fn texts_are_choices_and_their_tokens_are_summed() {
        let of_generator = texts(Task::Completion, &[r#"{"output":"a b"}"#]).unwrap();
        assert_eq!(of_generator["choices"][0]["text"], "a b");
        let one =
            r#"{"text":"a","finish_reason":"length","usage":{"prompt_tokens":2,"completion_tokens":3}}"#;
        let answer = texts(Task::Completion, &[one, r#"{"text":"b","usage":{"prompt_tokens":1}}"#]).unwrap();
        assert_eq!(answer["object"], "text_completion");
        assert_eq!(
            answer["choices"][0],
            json!({"index": 0, "text": "a", "logprobs": null, "finish_reason": "length"})
        );
        assert_eq!(answer["choices"][1]["finish_reason"], "stop");
        assert_eq!(answer["usage"], json!({"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}));
        // Of some only, it would be none of the request's.
        assert_eq!(texts(Task::Completion, &[one, r#"{"text":"b"}"#]).unwrap().get("usage"), None);
        let chat = texts(
            Task::Chat,
            &[one, r#"{"message":{"role":"assistant","tool_calls":[]},"finish_reason":"tool_calls"}"#],
        )
        .unwrap();
        assert_eq!(chat["object"], "chat.completion");
        assert_eq!(
            chat["choices"][0]["message"],
            json!({"role": "assistant", "content": "a", "refusal": null})
        );
        assert_eq!(chat["choices"][1]["message"], json!({"role": "assistant", "tool_calls": []}));
        for wrong in ["{}", r#"{"text":"a","message":"b"}"#, r#"{"text":7}"#, r#"{"message":{}}"#, r#"["a"]"#]
        {
            let failure = texts(Task::Completion, &[wrong]).unwrap_err();
            assert!(
                failure.message.contains(r#"whose task is "completion", to answer {"text""#),
                "{failure:?}"
            );
        }
    }

    #[test]
    fn embeddings_are_lists_of_numbers_or_their_bytes() {
        let outputs =
            [Bytes::from_static(br#"{"embedding":[1,-0.5]}"#), Bytes::from_static(br#"{"embedding":[]}"#)];
        let answer = |in_base64| -> Value {
            serde_json::from_slice(&write_embeddings(&head(Task::Embedding), &outputs, in_base64).unwrap())
                .unwrap()
        };
        assert_eq!(
            answer(false)["data"][0],
            json!({"object": "embedding", "index": 0, "embedding": [1, -0.5]})
        );
        assert_eq!(answer(true)["data"][0]["embedding"], "AACAPwAAAL8=");
        for wrong in [r#"{"embedding":[[1]]}"#, r#"{"embedding":"a"}"#, "{}", "[[1]]"] {
            let output = [Bytes::from_static(wrong.as_bytes())];
            assert!(write_embeddings(&head(Task::Embedding), &output, false).is_err(), "{wrong}");
        }
    }
}
