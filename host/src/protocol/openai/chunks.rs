//! A pipeline's chunks, as events of a stream. A chunk is a text, or an object with `text`, or for chats with `delta`, an object as the event shall have it. What
//! the output has beside its chunks follows at the end: the rest of its text, and members of its message that no delta had.

use std::collections::{BTreeMap, BTreeSet};

use modalkit_engine::{Failure, FailureKind};
use serde::{Deserialize, Serialize};
use serde_json::{
    Value,
    value::{RawValue, to_raw_value},
};
use sha2::{Digest, Sha256};

use super::answer::{ASSISTANT, AnswerHead, TextOutput, Usage, is_object};
use crate::{
    config::Task,
    protocol::{json::Object, object, put_data},
};

/// The last event of a stream that ends well.
pub const DONE: &[u8] = b"data: [DONE]\n\n";
/// Bytes of a chunk, or of a stream's output: they are read on a connection's thread.
const BYTES_MAX: usize = 4 << 20;
/// Members of messages and deltas that are treated by themselves.
const ROLE: &str = "role";
const CONTENT: &str = "content";
const TOOL_CALLS: &str = "tool_calls";
/// Where a tool's call stands in its message; deltas must say so.
const INDEX: &str = "index";

type Members<'a> = BTreeMap<String, &'a RawValue>;

/// Writes the events of one stream.
pub struct TextChunks {
    head: AnswerHead,
    with_usage: bool,
    has_begun: bool,
    /// The text that was sent: how long it is, and what tells whether another one begins so.
    sent_bytes: usize,
    sent: Sha256,
    /// Members of deltas that were sent, beside those that are treated by themselves.
    sent_members: BTreeSet<String>,
    /// A chunk was too large.
    too_large: Option<usize>,
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
    pub fn new(head: AnswerHead, with_usage: bool) -> Self {
        Self {
            head,
            with_usage,
            has_begun: false,
            sent_bytes: 0,
            sent: Sha256::new(),
            sent_members: BTreeSet::new(),
            too_large: None,
        }
    }

    /// Writes what a chunk says; nothing of one that says nothing here.
    pub fn put_chunk(&mut self, chunk: &[u8], events: &mut Vec<u8>) {
        if chunk.len() > BYTES_MAX {
            self.too_large.get_or_insert(chunk.len());
        } else if chunk.first() == Some(&b'"') {
            if let Ok(text) = serde_json::from_slice::<String>(chunk) {
                self.put_text(&text, events);
            }
        } else if let Ok(Object(ChunkObject { text, delta })) = serde_json::from_slice(chunk) {
            match (text, delta) {
                (_, Some(delta)) if self.head.task == Task::Chat && is_object(delta) => {
                    self.put_delta(delta, events);
                }
                (Some(text), _) => self.put_text(&text, events),
                _ => {}
            }
        }
    }

    /// Writes what of the output wasn't sent, and the end.
    ///
    /// # Errors
    /// The output isn't of the form that its model's task has, or it or a chunk is too large.
    pub fn put_end(&mut self, output: &[u8], events: &mut Vec<u8>) -> Result<(), Failure> {
        if let Some(found) = self.too_large.or(Some(output.len()).filter(|bytes| *bytes > BYTES_MAX)) {
            let message = format!(
                "expected chunks, and an output, of at most {BYTES_MAX} bytes for a stream, found {found}"
            );
            return Err(Failure { kind: FailureKind::Permanent, message });
        }
        let head = self.head.clone();
        let output = TextOutput::read(output, &head)?;
        self.begin(events);
        match (output.message, &output.text) {
            (Some(message), _) if head.task == Task::Chat => self.put_rest_of_message(message, events),
            (_, Some(text)) => self.put_rest(text, events),
            _ => {}
        }
        let last = match head.task {
            Task::Chat => Content::Delta(Delta::Said { role: None, content: None }),
            Task::Completion | Task::Embedding => Content::Text(""),
        };
        self.put(last, output.logprobs, Some(output.finish_reason()), events);
        if self.with_usage
            && let Some(usage) = output.usage
        {
            self.put_event(&[], Some(Some(Usage::json(usage, head.task))), events);
        }
        Ok(())
    }

    fn begin(&mut self, events: &mut Vec<u8>) {
        if !std::mem::replace(&mut self.has_begun, true) && self.head.task == Task::Chat {
            let delta = Delta::Said { role: Some(ASSISTANT), content: Some("") };
            self.put(Content::Delta(delta), None, None, events);
        }
    }

    fn put_text(&mut self, text: &str, events: &mut Vec<u8>) {
        if text.is_empty() {
            return;
        }
        self.begin(events);
        self.note_sent(text);
        let content = match self.head.task {
            Task::Chat => Content::Delta(Delta::Said { role: None, content: Some(text) }),
            Task::Completion | Task::Embedding => Content::Text(text),
        };
        self.put(content, None, None, events);
    }

    /// Writes a delta of the pipeline's own, without the role, which the first event has.
    fn put_delta(&mut self, delta: &RawValue, events: &mut Vec<u8>) {
        let Ok(mut members) = serde_json::from_str::<Members<'_>>(delta.get()) else { return };
        self.begin(events);
        members.remove(ROLE);
        if let Some(content) = members.get(CONTENT).and_then(|content| text_of(content)) {
            self.note_sent(&content);
        }
        let others = members.keys().filter(|name| *name != CONTENT).cloned();
        self.sent_members.extend(others);
        self.put(Content::Delta(Delta::Own(&members)), None, None, events);
    }

    /// Writes of a message what the deltas didn't have.
    fn put_rest_of_message(&mut self, message: &RawValue, events: &mut Vec<u8>) {
        let Ok(mut members) = serde_json::from_str::<Members<'_>>(message.get()) else { return };
        members.remove(ROLE);
        if let Some(content) = members.remove(CONTENT).and_then(text_of) {
            self.put_rest(&content, events);
        }
        members.retain(|name, _| !self.sent_members.contains(name));
        let calls = members.get(TOOL_CALLS).and_then(|calls| numbered(calls));
        if let Some(calls) = &calls {
            members.insert(TOOL_CALLS.to_owned(), calls);
        }
        if !members.is_empty() {
            self.put(Content::Delta(Delta::Own(&members)), None, None, events);
        }
    }

    /// Writes what of a text wasn't sent; nothing where it doesn't begin with what was.
    fn put_rest(&mut self, text: &str, events: &mut Vec<u8>) {
        let Some((begin, rest)) = text.split_at_checked(self.sent_bytes) else { return };
        if self.sent_bytes == 0 || Sha256::digest(begin) == self.sent.clone().finalize() {
            self.put_text(rest, events);
        }
    }

    fn note_sent(&mut self, text: &str) {
        self.sent_bytes += text.len();
        self.sent.update(text);
    }

    /// Writes an event with one choice.
    fn put(
        &self,
        content: Content<'_>,
        logprobs: Option<&RawValue>,
        finish_reason: Option<&str>,
        events: &mut Vec<u8>,
    ) {
        let (text, delta) = match content {
            Content::Text(text) => (Some(text), None),
            Content::Delta(delta) => (None, Some(delta)),
        };
        let choice = Choice { index: 0, text, delta, logprobs, finish_reason };
        let usage = if self.with_usage { Some(None) } else { None };
        self.put_event(&[choice], usage, events);
    }

    fn put_event(&self, choices: &[Choice<'_>], usage: Option<Option<Value>>, events: &mut Vec<u8>) {
        let AnswerHead { id, created, model, task } = &self.head;
        let object_name = if *task == Task::Chat { "chat.completion.chunk" } else { "text_completion" };
        put_data(
            events,
            &object(&Event { id, object: object_name, created: *created, model, choices, usage }),
        );
    }
}

fn text_of(value: &RawValue) -> Option<String> {
    serde_json::from_str(value.get()).ok()
}

/// Calls of tools with their places; `None` where they aren't a list of objects.
fn numbered(calls: &RawValue) -> Option<Box<RawValue>> {
    let calls: Vec<Members<'_>> = serde_json::from_str(calls.get()).ok()?;
    let places: Vec<Box<RawValue>> =
        (0..calls.len()).map(|place| to_raw_value(&place)).collect::<Result<_, _>>().ok()?;
    let numbered: Vec<Members<'_>> = calls
        .into_iter()
        .zip(&places)
        .map(|(mut call, place)| {
            call.entry(INDEX.to_owned()).or_insert(place);
            call
        })
        .collect();
    to_raw_value(&numbered).ok()
}

/// What an event adds to its one choice.
enum Content<'a> {
    Text(&'a str),
    Delta(Delta<'a>),
}

#[derive(Serialize)]
#[serde(untagged)]
enum Delta<'a> {
    /// As the pipeline has it. Its members stay texts: what JSON allows and a value doesn't hold is the caller's to read.
    Own(&'a Members<'a>),
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
    logprobs: Option<&'a RawValue>,
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
        let head = AnswerHead { id: "x".into(), created: 7, model: "m".into(), task };
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

    fn content(events: &[Value]) -> String {
        pieces(events, "/choices/0/delta/content").concat()
    }

    #[test]
    fn chunks_and_what_they_lack_are_the_whole_text() {
        let output = r#"{"text":"one two","finish_reason":"length","logprobs":[1e999],"usage":{"prompt_tokens":1,"completion_tokens":2}}"#;
        let output = &output.replace("1e999", "1.5");
        for chunks in
            [vec![], vec![r#"{"text":"one"}"#], vec![r#""one""#, r#""""#, "7", r#"{"text":" two"}"#]]
        {
            let events = stream(Task::Completion, &chunks, output).unwrap();
            assert_eq!(pieces(&events, "/choices/0/text").concat(), "one two", "{chunks:?}");
            assert_eq!(pieces(&events, "/choices/0/finish_reason"), ["length"]);
            assert_eq!(events[events.len() - 2]["choices"][0]["logprobs"], json!([1.5]));
            assert_eq!(events.last().unwrap()["usage"]["total_tokens"], 3);
            let events = stream(Task::Chat, &chunks, output).unwrap();
            assert_eq!(events[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
            assert_eq!(content(&events), "one two", "{chunks:?}");
        }
        // What an output says otherwise than its chunks did isn't said twice.
        let events = stream(Task::Completion, &[r#""one""#], r#"{"text":"One, two"}"#).unwrap();
        assert_eq!(pieces(&events, "/choices/0/text").concat(), "one");
    }

    #[test]
    fn deltas_count_as_what_they_say() {
        let deltas = [r#"{"delta":{"role":"assistant","content":"Hel"}}"#, r#"{"delta":{"content":"lo"}}"#];
        let events = stream(Task::Chat, &deltas, r#"{"text":"Hello, you"}"#).unwrap();
        assert_eq!(content(&events), "Hello, you");
        assert_eq!(pieces(&events, "/choices/0/delta/role"), ["assistant"], "the client adds them up");
    }

    #[test]
    fn of_a_message_everything_that_no_delta_had_follows() {
        let output = r#"{"message":{"role":"assistant","content":"Let me look.","tool_calls":[{"id":"a"},{"id":"b","index":1}]},"finish_reason":"tool_calls"}"#;
        let numbered = json!([{"id": "a", "index": 0}, {"id": "b", "index": 1}]);
        for chunks in [vec![], vec![r#""Let me""#]] {
            let events = stream(Task::Chat, &chunks, output).unwrap();
            assert_eq!(content(&events), "Let me look.");
            let calls: Vec<&Value> =
                events.iter().filter_map(|event| event.pointer("/choices/0/delta/tool_calls")).collect();
            assert_eq!(calls, [&numbered]);
            assert_eq!(pieces(&events, "/choices/0/finish_reason"), ["tool_calls"]);
        }
        let call = r#"{"delta":{"tool_calls":[{"index":0}]}}"#;
        let events = stream(Task::Chat, &[call], output).unwrap();
        assert_eq!(events[1]["choices"][0]["delta"], json!({"tool_calls": [{"index": 0}]}));
        assert_eq!(events.iter().filter(|event| event.to_string().contains("tool_calls\":[")).count(), 1);
        assert!(stream(Task::Chat, &[call], "{}").is_err());
    }

    #[test]
    fn what_is_too_large_for_a_stream_is_told_at_its_end() {
        let large = format!("\"{}\"", "x".repeat(BYTES_MAX));
        let message = stream(Task::Chat, &[&large, r#""a""#], r#"{"text":"a"}"#).unwrap_err().message;
        assert!(message.contains("at most 4194304 bytes"), "{message}");
        let output = format!("{{\"text\":{large}}}");
        assert!(stream(Task::Completion, &[], &output).is_err());
    }
}
