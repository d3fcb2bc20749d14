//! SQS's words: messages as it wants them, and what its errors mean. It asks nobody.

use serde_json::{Value, json};

use crate::Message;

/// Bytes of a message's attributes, which count with its body.
pub(super) const ATTRIBUTE_BYTES: usize = 256;
/// Bytes of one of the service's own texts in an error.
pub(super) const TEXT_CHARS: usize = 200;
const JOB: &str = "job_id";
pub(super) const TRACE: &str = "traceparent";
/// All messages of one queue are one group: they keep their order.
const GROUP: &str = "modalkit";
/// The end of the names of queues that keep an order.
pub(super) const FIFO: &str = ".fifo";

/// One message of a batch.
pub(super) fn entry(queue: &str, index: usize, message: &Message) -> Value {
    let text = |text: &str| json!({"DataType": "String", "StringValue": text});
    let mut entry = json!({
        "Id": index.to_string(),
        "MessageBody": String::from_utf8_lossy(&message.body),
        "MessageAttributes": {JOB: text(&message.job_id)},
    });
    if let Some(trace) = &message.traceparent {
        entry["MessageAttributes"][TRACE] = text(trace);
    }
    if queue.ends_with(FIFO) {
        entry["MessageGroupId"] = json!(GROUP);
        entry["MessageDeduplicationId"] = json!(message.delivery_id);
    }
    entry
}

/// Two characters that JSON has and SQS refuses are written as escapes, which say the same.
pub(super) fn allowed(body: &str) -> String {
    body.replace('\u{fffe}', "\\ufffe").replace('\u{ffff}', "\\uffff")
}

/// An element of the XML that is answered before anybody has looked at which protocol is spoken.
pub(super) fn element<'x>(xml: &'x str, name: &str) -> Option<&'x str> {
    let (_, rest) = xml.split_once(&format!("<{name}>"))?;
    rest.split_once('<').map(|(text, _)| text)
}

/// Whether an error says that there is no such queue.
pub(super) fn is_missing(kind: &str) -> bool {
    kind.contains("QueueDoesNotExist") || kind.contains("NonExistentQueue")
}

/// Whether an error says that a message will never be taken.
pub(super) fn is_about_the_message(kind: &str) -> bool {
    const KINDS: [&str; 5] = [
        "BatchRequestTooLong",
        "InvalidMessageContents",
        "InvalidParameterValue",
        "MessageTooLong",
        "UnsupportedOperation",
    ];
    KINDS.iter().any(|about| kind.contains(about))
}

/// Whether an error is about who we are, and not about what we ask.
pub(super) fn is_denial(kind: &str) -> bool {
    const KINDS: [&str; 9] = [
        "AccessDenied",
        "ExpiredToken",
        "IncompleteSignature",
        "InvalidAccessKeyId",
        "InvalidClientTokenId",
        "InvalidSecurity",
        "MissingAuthenticationToken",
        "SignatureDoesNotMatch",
        "UnrecognizedClient",
    ];
    KINDS.iter().any(|denial| kind.contains(denial))
}

pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}
