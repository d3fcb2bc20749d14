//! A pipeline's chunks, as events of a stream. A chunk is a text, or an object with `text`, or for chats with `delta`, an object as the event shall have it. What
//! of the output's text the chunks didn't have is sent at the end.

use modalkit_engine::Failure;
use serde::{Deserialize, Serialize};
use serde_json::{Value, value::RawValue};

use super::answer::{ASSISTANT, Head, TextOutput, is_object};
use crate::{
    config::Task,
    protocol::{json::Object, object, put_data},
};

/// The last event of a stream that ends well.
pub const DONE: &[u8] = b"data: [DONE]\n\n";

/// Writes the events of one stream.
pub struct TextChunks {
    head: Head,
    with_usage: bool,
    /// The text that was sent.
    sent: String,
    /// The first event was written, and something of the answer.
    has_begun: bool,
    has_content: bool,
}

#[derive(Deserialize)]
struct ChunkObject<'a> {
    #[serde(default)]
    text: Option<String>,
    #[serde(borrow, default)]
    delta: Option<&'a RawValue>,
}

impl TextChunks {
    /// Of a stream that begins.
    #[must_use]
    pub fn new(head: Head, with_usage: bool) -> Self {
        Self { head, with_usage, sent: String::new(), has_begun: false, has_content: false }
    }

    /// Writes what a chunk says; nothing of one that says nothing here.
    pub fn put_chunk(&mut self, chunk: &[u8], events: &mut Vec<u8>) {
        if chunk.first() == Some(&b'"') {
            if let Ok(text) = serde_json::from_slice::<String>(chunk) {
                self.put_text(&text, events);
            }
        } else if let Ok(Object(ChunkObject { text, delta })) = serde_json::from_slice(chunk) {
            match (text, delta) {
                (_, Some(delta)) if self.head.task == Task::Chat && is_object(delta) => {
                    self.begin(events);
                    self.has_content = true;
                    self.put(Content::Delta(Delta::Own(delta)), None, events);
                }
                (Some(text), _) => self.put_text(&text, events),
                _ => {}
            }
        }
    }

    /// Writes what of the output's text wasn't sent, and the end.
    ///
    /// # Errors
    /// The output isn't of the form that its model's task has.
    pub fn put_end(&mut self, output: &[u8], events: &mut Vec<u8>) -> Result<(), Failure> {
        let head = self.head.clone();
        let output = TextOutput::read(output, &head)?;
        self.begin(events);
        match (&output.text, output.message) {
            (_, Some(message)) if head.task == Task::Chat && !self.has_content => {
                self.put(Content::Delta(Delta::Own(message)), None, events);
            }
            (Some(text), _) => {
                if let Some(rest) = text.strip_prefix(self.sent.as_str()).filter(|rest| !rest.is_empty()) {
                    let rest = rest.to_owned();
                    self.put_text(&rest, events);
                }
            }
            _ => {}
        }
        let last = match head.task {
            Task::Chat => Content::Delta(Delta::Said { role: None, content: None }),
            Task::Completion | Task::Embedding => Content::Text(""),
        };
        self.put(last, Some(output.finish_reason()), events);
        if self.with_usage
            && let Some(usage) = output.usage
        {
            self.put_event(&[], Some(Some(usage.json(head.task))), events);
        }
        Ok(())
    }

    fn begin(&mut self, events: &mut Vec<u8>) {
        if !std::mem::replace(&mut self.has_begun, true) && self.head.task == Task::Chat {
            let delta = Delta::Said { role: Some(ASSISTANT), content: Some("") };
            self.put(Content::Delta(delta), None, events);
        }
    }

    fn put_text(&mut self, text: &str, events: &mut Vec<u8>) {
        if text.is_empty() {
            return;
        }
        self.begin(events);
        self.has_content = true;
        self.sent.push_str(text);
        let content = match self.head.task {
            Task::Chat => Content::Delta(Delta::Said { role: None, content: Some(text) }),
            Task::Completion | Task::Embedding => Content::Text(text),
        };
        self.put(content, None, events);
    }

    /// Writes an event with one choice.
    fn put(&self, content: Content<'_>, finish_reason: Option<&str>, events: &mut Vec<u8>) {
        let (text, delta) = match content {
            Content::Text(text) => (Some(text), None),
            Content::Delta(delta) => (None, Some(delta)),
        };
        let choice = Choice { index: 0, text, delta, logprobs: (), finish_reason };
        let usage = if self.with_usage { Some(None) } else { None };
        self.put_event(&[choice], usage, events);
    }

    fn put_event(&self, choices: &[Choice<'_>], usage: Option<Option<Value>>, events: &mut Vec<u8>) {
        let Head { id, created, model, task } = &self.head;
        let object_name = if *task == Task::Chat { "chat.completion.chunk" } else { "text_completion" };
        put_data(
            events,
            &object(&Event { id, object: object_name, created: *created, model, choices, usage }),
        );
    }
}

/// What an event adds to its one choice.
enum Content<'a> {
    Text(&'a str),
    Delta(Delta<'a>),
}

#[derive(Serialize)]
#[serde(untagged)]
enum Delta<'a> {
    /// As the pipeline has it. It stays a text: what JSON allows and a value doesn't hold is the caller's to read.
    Own(&'a RawValue),
    Said {
        #[serde(skip_serializing_if = "Option::is_none")]
        role: Option<&'static str>,
        #[serde(skip_serializing_if = "Option::is_none")]
        content: Option<&'a str>,
    },
}

#[derive(Serialize)]
struct Choice<'a> {
    index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    delta: Option<Delta<'a>>,
    logprobs: (),
    finish_reason: Option<&'a str>,
}

#[derive(Serialize)]
struct Event<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: &'a [Choice<'a>],
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<Value>>,
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn stream(task: Task, chunks: &[&str], output: &str) -> Result<Vec<Value>, Failure> {
        let head = Head { id: "x".into(), created: 7, model: "m".into(), task };
        let mut writer = TextChunks::new(head, true);
        let mut events = Vec::new();
        chunks.iter().for_each(|chunk| writer.put_chunk(chunk.as_bytes(), &mut events));
        writer.put_end(output.as_bytes(), &mut events)?;
        let text = String::from_utf8(events).unwrap();
        let event = |event: &str| serde_json::from_str(event.strip_prefix("data: ").unwrap()).unwrap();
        Ok(text.split_terminator("\n\n").map(event).collect())
    }

    fn pieces(events: &[Value], place: &str) -> Vec<String> {
        let piece = |event: &Value| event.pointer(place).and_then(Value::as_str).map(ToOwned::to_owned);
        events.iter().filter_map(piece).collect()
    }

    #[test]
    fn chunks_and_what_they_lack_are_the_whole_text() {
        let output = r#"{"text":"one two","finish_reason":"length","usage":{"prompt_tokens":1,"completion_tokens":2}}"#;
        for chunks in
            [vec![], vec![r#"{"text":"one"}"#], vec![r#""one""#, r#""""#, "7", r#"{"text":" two"}"#]]
        {
            let events = stream(Task::Completion, &chunks, output).unwrap();
            assert_eq!(pieces(&events, "/choices/0/text").concat(), "one two", "{chunks:?}");
            assert_eq!(pieces(&events, "/choices/0/finish_reason"), ["length"]);
            assert_eq!(events.last().unwrap()["usage"]["total_tokens"], 3);
            let events = stream(Task::Chat, &chunks, output).unwrap();
            assert_eq!(events[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
            assert_eq!(pieces(&events, "/choices/0/delta/content").concat(), "one two", "{chunks:?}");
        }
        // What an output says otherwise than its chunks did isn't said twice.
        let events = stream(Task::Completion, &[r#""one""#], r#"{"text":"One, two"}"#).unwrap();
        assert_eq!(pieces(&events, "/choices/0/text").concat(), "one");
    }

    #[test]
    fn a_chat_may_say_more_than_text() {
        let call = r#"{"delta":{"tool_calls":[{"index":0}]}}"#;
        let output = r#"{"message":{"role":"assistant","content":"x"},"finish_reason":"tool_calls"}"#;
        let events = stream(Task::Chat, &[call], output).unwrap();
        assert_eq!(events[1]["choices"][0]["delta"], json!({"tool_calls": [{"index": 0}]}));
        assert_eq!(pieces(&events, "/choices/0/finish_reason"), ["tool_calls"]);
        let events = stream(Task::Chat, &[], output).unwrap();
        assert_eq!(pieces(&events, "/choices/0/delta/content").concat(), "x");
        assert!(stream(Task::Chat, &[call], "{}").is_err());
    }
}
