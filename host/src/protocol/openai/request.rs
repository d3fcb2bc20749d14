//! Requests, as inputs of a pipeline.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    fmt::{self, Display},
};

use bytes::{Bytes, BytesMut};
use serde::{
    Deserialize, Deserializer,
    de::{Error, MapAccess, SeqAccess, Visitor},
};
use serde_json::value::RawValue;

use crate::{
    config::Task,
    protocol::json::Object,
    work::{Detail, JobError},
};

/// The most answers to one prompt, and the most texts in one request: those of OpenAI.
const CHOICES_MAX: usize = 128;
const TEXTS_MAX: usize = 2048;
/// Members of a request.
const MEMBERS_MAX: usize = 256;
/// Said to the server, and not to the model.
const OF_THE_SERVER: [&str; 5] = ["model", "n", "stream", "stream_options", "encoding_format"];

/// Bytes of a model's name, beyond which there is no such model.
const NAME_BYTES_MAX: usize = 256;
/// Characters of what a caller sent in a message.
const FOUND_CHARS_MAX: usize = 160;

type Members<'a> = BTreeMap<String, &'a RawValue>;

/// What is asked of which model.
#[derive(Debug)]
pub struct Request {
    /// The model's name.
    pub model: String,
    /// In which form the answer is wanted.
    pub form: AnswerForm,
    /// The member that has the texts.
    pub member: &'static str,
    /// The texts, each as it stands in the body.
    items: Vec<Bytes>,
    /// How many answers there shall be to each.
    of_each: usize,
    /// What goes along with each text, and the end of the object.
    rest: Bytes,
}

/// The form of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AnswerForm {
    /// Vectors: as lists of numbers, or as little-endian 32 bit floats in base64.
    Embeddings {
        /// Whether in base64.
        in_base64: bool,
    },
    /// Texts, whole.
    Texts,
    /// One text, bit by bit.
    Stream {
        /// Whether a chunk of its own says how many tokens there were.
        with_usage: bool,
    },
}

impl Request {
    /// Reads a request for a task. It takes as long as the body is to parse.
    ///
    /// # Errors
    /// [`JobError::Invalid`], with the member that isn't what it should be.
    pub fn read(body: &Bytes, task: Task) -> Result<Self, JobError> {
        let mut members: Members<'_> = match body.trim_ascii_start().first() {
            Some(b'{') => {
                let Limited(members) = serde_json::from_slice(body).map_err(|error| not_an_object(&error))?;
                members
            }
            Some(_) => return Err(not_an_object(&"found something else")),
            None => return Err(not_an_object(&"found nothing")),
        };
        members.retain(|_, value| value.get() != "null");
        let model: String = required(&members, "model", "the name of a model")?;
        if !(1..=NAME_BYTES_MAX).contains(&model.len()) {
            let found = cut(&model);
            return Err(invalid("model", format!("expected the name of a model, found {found:?}")));
        }
        let (form, of_each) = match task {
            Task::Embedding => (encoding(&members)?, 1),
            Task::Completion | Task::Chat => texts(&members)?,
        };
        let member = match task {
            Task::Embedding => "input",
            Task::Completion => "prompt",
            Task::Chat => "messages",
        };
        let Some(given) = members.remove(member) else {
            return Err(missing(member, if task == Task::Chat { "a list of messages" } else { TEXT }));
        };
        let items = match task {
            Task::Chat => vec![conversation(given)?],
            Task::Embedding | Task::Completion => one_or_many(member, given)?,
        };
        if matches!(form, AnswerForm::Stream { .. }) && items.len() * of_each != 1 {
            let found = items.len() * of_each;
            return Err(invalid(
                "stream",
                format!("expected one text for a stream, found {found}: ask for each by itself"),
            ));
        }
        members.retain(|name, _| !OF_THE_SERVER.contains(&name.as_str()));
        let items = items.into_iter().map(|item| body.slice_ref(item.as_bytes())).collect();
        Ok(Self { model, form, member, items, of_each, rest: rest(&members) })
    }

    /// How many inputs there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.items.len() * self.of_each
    }

    /// Bytes of all inputs together, each answer's counted by itself.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let around = self.member.len() + 4 + self.rest.len();
        let of_texts: usize = self.items.iter().map(|item| item.len() + around).sum();
        of_texts.saturating_mul(self.of_each)
    }

    /// The pipeline's inputs, in the order of the answer.
    ///
    /// # Errors
    /// [`JobError::TooLarge`] where they have more bytes than this.
    pub fn inputs(&self, bytes_max: usize) -> Result<Vec<Bytes>, JobError> {
        let bytes = self.bytes();
        if bytes > bytes_max {
            return Err(JobError::TooLarge(format!(
                "expected at most {bytes_max} bytes of inputs (server.body_bytes_max), found {bytes}: what goes along with each text counts as often as there are texts, and each text n times"
            )));
        }
        let input = |item: &Bytes| {
            let mut text = BytesMut::with_capacity(item.len() + self.member.len() + 4 + self.rest.len());
            text.extend_from_slice(b"{\"");
            text.extend_from_slice(self.member.as_bytes());
            text.extend_from_slice(b"\":");
            text.extend_from_slice(item);
            text.extend_from_slice(&self.rest);
            text.freeze()
        };
        Ok(self.items.iter().flat_map(|item| std::iter::repeat_n(input(item), self.of_each)).collect())
    }
}

const TEXT: &str = "a text, a list of texts, or their tokens";

/// What stands behind a text in each input.
fn rest(members: &Members<'_>) -> Bytes {
    let mut rest = Vec::new();
    for (name, value) in members {
        rest.push(b',');
        serde_json::to_writer(&mut rest, name).expect("a text is JSON");
        rest.push(b':');
        rest.extend_from_slice(value.get().as_bytes());
    }
    rest.push(b'}');
    rest.into()
}

/// The beginning of what a caller sent, for a message.
fn cut(text: &str) -> String {
    match text.char_indices().nth(FOUND_CHARS_MAX) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

fn encoding(members: &Members<'_>) -> Result<AnswerForm, JobError> {
    const EXPECTED: &str = "\"float\" or \"base64\"";
    match optional::<String>(members, "encoding_format", EXPECTED)?.as_deref() {
        None | Some("float") => Ok(AnswerForm::Embeddings { in_base64: false }),
        Some("base64") => Ok(AnswerForm::Embeddings { in_base64: true }),
        Some(other) => {
            Err(invalid("encoding_format", format!("expected {EXPECTED}, found {:?}", cut(other))))
        }
    }
}

/// The form of the answer, and how many there shall be to each prompt.
fn texts(members: &Members<'_>) -> Result<(AnswerForm, usize), JobError> {
    #[derive(Default, Deserialize)]
    struct StreamOptions {
        #[serde(default)]
        include_usage: Option<bool>,
    }
    let expected = format!("a number from 1 to {CHOICES_MAX}");
    let of_each: usize = optional(members, "n", &expected)?.unwrap_or(1);
    if !(1..=CHOICES_MAX).contains(&of_each) {
        return Err(invalid("n", format!("expected {expected}, found {of_each}")));
    }
    let options: Object<StreamOptions> =
        optional(members, "stream_options", "an object with include_usage")?.unwrap_or_default();
    Ok(match optional(members, "stream", "true or false")? {
        Some(true) => (AnswerForm::Stream { with_usage: options.0.include_usage == Some(true) }, of_each),
        None | Some(false) => (AnswerForm::Texts, of_each),
    })
}

/// A list of messages, which says who speaks in each.
fn conversation(messages: &RawValue) -> Result<&str, JobError> {
    #[derive(Deserialize)]
    struct Message<'a> {
        #[serde(rename = "role", borrow)]
        _role: Cow<'a, str>,
    }
    let read = serde_json::from_str::<Vec<Object<Message<'_>>>>(messages.get());
    match read {
        Ok(read) if read.is_empty() => {
            Err(invalid("messages", "expected a message at least, found an empty list"))
        }
        Ok(_) => Ok(messages.get()),
        Err(error) => Err(invalid(
            "messages",
            format!("expected a list of messages, each an object with role: {}", cut(&error.to_string())),
        )),
    }
}

/// A text, or tokens; or a list of these.
fn one_or_many<'a>(member: &str, given: &'a RawValue) -> Result<Vec<&'a str>, JobError> {
    let wrong =
        |found: &dyn Display| invalid(member, format!("expected {TEXT}: {}", cut(&found.to_string())));
    if given.get().starts_with('"') {
        return Ok(vec![given.get()]);
    }
    let List { first, count, are_tokens } =
        serde_json::from_str(given.get()).map_err(|error: serde_json::Error| wrong(&error))?;
    if count == 0 {
        return Err(wrong(&"found an empty list"));
    }
    // One list of numbers is one text.
    if are_tokens {
        return Ok(vec![given.get()]);
    }
    if count > TEXTS_MAX {
        return Err(invalid(member, format!("expected at most {TEXTS_MAX} texts, found {count}")));
    }
    let one = |(index, element): (usize, &'a RawValue)| {
        let text = element.get();
        let are_tokens = |list: List<'_>| list.count > 0 && list.are_tokens;
        if text.starts_with('"') || serde_json::from_str(text).is_ok_and(are_tokens) {
            Ok(text)
        } else {
            Err(wrong(&format_args!("the element at {index} is neither a text nor a list of tokens")))
        }
    };
    first.into_iter().enumerate().map(one).collect()
}

/// A request's members; too many are refused as they come.
struct Limited<'a>(Members<'a>);

impl<'de> Deserialize<'de> for Limited<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Map;

        impl<'de> Visitor<'de> for Map {
            type Value = Limited<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "an object of at most {MEMBERS_MAX} members")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Limited<'de>, A::Error> {
                let mut members = Members::new();
                while let Some((name, value)) = map.next_entry()? {
                    members.insert(name, value);
                    if members.len() > MEMBERS_MAX {
                        return Err(A::Error::invalid_length(members.len(), &self));
                    }
                }
                Ok(Limited(members))
            }
        }

        deserializer.deserialize_map(Map)
    }
}

/// A list, of which as many elements are kept as there may be texts.
struct List<'a> {
    first: Vec<&'a RawValue>,
    count: usize,
    /// Whether all of them are.
    are_tokens: bool,
}

impl<'de> Deserialize<'de> for List<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Elements;

        impl<'de> Visitor<'de> for Elements {
            type Value = List<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<List<'de>, A::Error> {
                let mut list = List { first: Vec::new(), count: 0, are_tokens: true };
                while let Some(element) = elements.next_element::<&RawValue>()? {
                    list.count += 1;
                    list.are_tokens &= element.get().parse::<u32>().is_ok();
                    if list.count <= TEXTS_MAX {
                        list.first.push(element);
                    }
                }
                Ok(list)
            }
        }

        deserializer.deserialize_seq(Elements)
    }
}

fn required<'a, T: Deserialize<'a>>(
    members: &Members<'a>,
    name: &str,
    expected: &str,
) -> Result<T, JobError> {
    optional(members, name, expected)?.ok_or_else(|| missing(name, expected))
}

fn optional<'a, T: Deserialize<'a>>(
    members: &Members<'a>,
    name: &str,
    expected: &str,
) -> Result<Option<T>, JobError> {
    let Some(value) = members.get(name) else { return Ok(None) };
    serde_json::from_str(value.get())
        .map(Some)
        .map_err(|error| invalid(name, format!("expected {expected}: {}", cut(&error.to_string()))))
}

fn missing(name: &str, expected: &str) -> JobError {
    fault(vec!["body".into(), name.into()], format!("expected {expected}, found nothing"), "missing")
}

fn invalid(name: &str, msg: impl Into<String>) -> JobError {
    fault(vec!["body".into(), name.into()], msg.into(), "value_error")
}

fn not_an_object(why: &dyn Display) -> JobError {
    let why = cut(&why.to_string());
    fault(vec!["body".into()], format!("expected a JSON object: {why}"), "json_invalid")
}

fn fault(loc: Vec<crate::work::Location>, msg: String, kind: &'static str) -> JobError {
    JobError::Invalid(vec![Detail { loc, msg, kind: kind.into() }])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::describe;

    fn request(body: &str, task: Task) -> Result<Request, JobError> {
        Request::read(&Bytes::copy_from_slice(body.as_bytes()), task)
    }

    fn inputs(body: &str, task: Task) -> Vec<String> {
        let request = request(body, task).unwrap_or_else(|error| panic!("{}", describe(&error)));
        let inputs = request.inputs(1 << 20).unwrap();
        assert_eq!(inputs.iter().map(Bytes::len).sum::<usize>(), request.bytes());
        assert_eq!(inputs.len(), request.count());
        inputs.iter().map(|input| String::from_utf8(input.to_vec()).unwrap()).collect()
    }

    fn refused(body: &str, task: Task) -> String {
        describe(&request(body, task).unwrap_err())
    }

    #[test]
    fn an_input_is_the_request_with_one_of_its_texts() {
        let body = r#"{"model":"m","input":["a","b\u0000"],"encoding_format":"float","dimensions":1e999,"user":null}"#;
        let expected = [r#"{"input":"a","dimensions":1e999}"#, r#"{"input":"b\u0000","dimensions":1e999}"#];
        assert_eq!(inputs(body, Task::Embedding), expected);
        for (given, expected) in [
            ("\"a\"", vec![r#"{"input":"a"}"#]),
            ("[1,2]", vec![r#"{"input":[1,2]}"#]),
            ("[[1,2],[3],\"c\"]", vec![r#"{"input":[1,2]}"#, r#"{"input":[3]}"#, r#"{"input":"c"}"#]),
        ] {
            assert_eq!(inputs(&format!(r#"{{"model":"m","input":{given}}}"#), Task::Embedding), expected);
        }
        let body = r#"{"model":"m","prompt":["a","b"],"n":2,"max_tokens":5,"stream":false}"#;
        let (a, b) = (r#"{"prompt":"a","max_tokens":5}"#, r#"{"prompt":"b","max_tokens":5}"#);
        assert_eq!(inputs(body, Task::Completion), [a, a, b, b]);
        let body = r#"{"model":"m","messages":[{"role":"user","content":"x"}],"stream":true,"stream_options":{"include_usage":true},"stop":"."}"#;
        assert_eq!(inputs(body, Task::Chat), [r#"{"messages":[{"role":"user","content":"x"}],"stop":"."}"#]);
        let form = request(body, Task::Chat).unwrap().form;
        assert_eq!(form, AnswerForm::Stream { with_usage: true });
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (body, task, expected) in [
            ("", Task::Chat, "expected a JSON object: found nothing"),
            ("[]", Task::Chat, "expected a JSON object"),
            ("{", Task::Chat, "expected a JSON object: EOF"),
            (r#"{"prompt":"a"}"#, Task::Completion, "model: expected the name of a model, found nothing"),
            (
                r#"{"model":7,"prompt":"a"}"#,
                Task::Completion,
                "model: expected the name of a model: invalid type",
            ),
            (r#"{"model":"m"}"#, Task::Completion, "prompt: expected a text"),
            (r#"{"model":"m","prompt":[]}"#, Task::Completion, "prompt: expected a text"),
            (r#"{"model":"m","prompt":{}}"#, Task::Completion, "prompt: expected a text"),
            (r#"{"model":"m","prompt":["a",{}]}"#, Task::Completion, "the element at 1 is neither"),
            (r#"{"model":"m","prompt":"a","n":0}"#, Task::Completion, "n: expected a number from 1 to 128"),
            (r#"{"model":"m","prompt":"a","n":-1}"#, Task::Completion, "n: expected a number from 1 to 128"),
            (
                r#"{"model":"m","prompt":"a","n":2,"stream":true}"#,
                Task::Completion,
                "stream: expected one text",
            ),
            (r#"{"model":"m","prompt":"a","stream":1}"#, Task::Completion, "stream: expected true or false"),
            (r#"{"model":"m","messages":[]}"#, Task::Chat, "messages: expected a message at least"),
            (r#"{"model":"m","messages":[{}]}"#, Task::Chat, "messages: expected a list of messages"),
            (r#"{"model":"m","messages":[["user"]]}"#, Task::Chat, "messages: expected a list of messages"),
            (
                r#"{"model":"m","input":"a","encoding_format":"hex"}"#,
                Task::Embedding,
                "encoding_format: expected",
            ),
        ] {
            let found = refused(body, task);
            assert!(found.contains(expected), "{body}: {found}");
        }
    }

    #[test]
    fn what_goes_along_with_each_text_counts_for_each() {
        let texts = vec!["\"a\""; 1000].join(",");
        for user in ["x".repeat(10_000), "\\u0001".repeat(2_000)] {
            let body = format!(r#"{{"model":"m","input":[{texts}],"user":"{user}","{user}":1}}"#);
            let request = request(&body, Task::Embedding).unwrap();
            assert!(matches!(request.inputs(1 << 20), Err(JobError::TooLarge(_))));
            let inputs = request.inputs(64 << 20).unwrap();
            assert_eq!(inputs.iter().map(Bytes::len).sum::<usize>(), request.bytes());
        }
        let body = format!(r#"{{"model":"m","prompt":"{}","n":128}}"#, "x".repeat(100_000));
        assert!(matches!(
            request(&body, Task::Completion).unwrap().inputs(1 << 20),
            Err(JobError::TooLarge(_))
        ));
        let texts = vec!["\"a\""; TEXTS_MAX + 1].join(",");
        let body = format!(r#"{{"model":"m","input":[{texts}]}}"#);
        assert!(refused(&body, Task::Embedding).contains("at most 2048 texts, found 2049"));
    }

    #[test]
    fn what_there_is_too_much_of_is_not_kept() {
        let members: String = (0..300).map(|number| format!(",\"m{number}\":1")).collect();
        let found = refused(&format!(r#"{{"model":"m","prompt":"a"{members}}}"#), Task::Completion);
        assert!(found.contains("at most 256 members"), "{found}");
        let tokens = vec!["7"; 10_000].join(",");
        assert_eq!(inputs(&format!(r#"{{"model":"m","input":[{tokens}]}}"#), Task::Embedding).len(), 1);
    }

    #[test]
    fn no_message_repeats_all_that_a_caller_sent() {
        let long = "\u{7f}".repeat(100_000);
        for body in [
            format!(r#"{{"model":"{long}","prompt":"a"}}"#),
            format!(r#"{{"model":"m","prompt":"a","n":"{long}"}}"#),
            format!(r#"{{"model":"m","prompt":"a","stream":"{long}"}}"#),
            format!(r#"{{"model":"m","prompt":{{"{long}":1}}}}"#),
        ] {
            assert!(refused(&body, Task::Completion).len() < 2_000);
        }
    }
}
