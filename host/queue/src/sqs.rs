//! Amazon SQS, and what speaks like it: its JSON protocol, signed by object_store, without AWS's SDK.

use std::{collections::HashMap, fs, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use object_store::{
    RetryConfig,
    aws::{AmazonS3Builder, AwsAuthorizer, AwsCredential, AwsCredentialProvider},
    client::{HttpClient, HttpRequestBody, StaticCredentialProvider},
};
use parking_lot::Mutex;
use serde_json::{Value, json};

use crate::{
    Answer, Backend, Message, QueueError, Received, Source, SpecError, SqsSpec, fits, is_loopback,
    sqs_protocol::{
        ATTRIBUTE_BYTES, FIFO, TEXT_CHARS, TRACE, allowed, chain, element, entry, is_about_the_message,
        is_denial, is_missing,
    },
};

/// Messages in one request: the service's own limit.
const BATCH: usize = 10;
/// Requests at once, where a queue keeps no order.
const REQUESTS_AT_ONCE: usize = 8;
const CONNECT_TIME_MAX: Duration = Duration::from_secs(3);
const RESPONSE_TIME_MAX: Duration = Duration::from_secs(10);
/// The longest that the service waits for a message.
const WAIT_MAX: Duration = Duration::from_secs(20);

pub(crate) struct Sqs {
    endpoint: String,
    region: String,
    credentials: AwsCredentialProvider,
    client: HttpClient,
    /// For requests that wait for messages.
    waiting: HttpClient,
    message_bytes_max: usize,
    create_missing: bool,
    /// Queues' addresses by name.
    urls: Mutex<HashMap<String, String>>,
}

/// What the service said no with.
struct Refused {
    kind: String,
    text: String,
}

impl Sqs {
    pub(crate) fn open(spec: &SqsSpec) -> Result<Self, SpecError> {
        let refuse = |error: &dyn std::fmt::Display| SpecError(format!("can't be used: {error}"));
        let credentials: AwsCredentialProvider = match &spec.credentials {
            Some(given) => Arc::new(StaticCredentialProvider::new(AwsCredential {
                key_id: given.key_id.clone(),
                secret_key: given.secret.clone(),
                token: given.token.clone(),
            })),
            None => {
                // The store is never asked for anything: it knows where credentials come from.
                let retry = RetryConfig {
                    max_retries: 1,
                    retry_timeout: RESPONSE_TIME_MAX,
                    ..RetryConfig::default()
                };
                let store = AmazonS3Builder::from_env()
                    .with_region(&spec.region)
                    .with_bucket_name("none")
                    .with_retry(retry);
                Arc::clone(store.build().map_err(|error| refuse(&error))?.credentials())
            }
        };
        let endpoint =
            spec.endpoint.clone().unwrap_or_else(|| format!("https://sqs.{}.amazonaws.com/", spec.region));
        let client = |time_max: Duration| {
            let mut client = reqwest::Client::builder().connect_timeout(CONNECT_TIME_MAX).timeout(time_max);
            if is_loopback(&endpoint) {
                client = client.no_proxy();
            }
            if let Some(file) = &spec.ca {
                let pem = fs::read(file).map_err(|error| refuse(&format!("{}: {error}", file.display())))?;
                let authorities =
                    reqwest::Certificate::from_pem_bundle(&pem).map_err(|error| refuse(&error))?;
                client = client.tls_certs_merge(authorities);
            }
            client.build().map(HttpClient::new).map_err(|error| refuse(&error))
        };
        Ok(Self {
            client: client(RESPONSE_TIME_MAX)?,
            waiting: client(WAIT_MAX + RESPONSE_TIME_MAX)?,
            endpoint,
            region: spec.region.clone(),
            credentials,
            message_bytes_max: spec.message_bytes_max,
            create_missing: spec.create_missing,
            urls: Mutex::default(),
        })
    }

    async fn ask(
        &self,
        client: &HttpClient,
        action: &str,
        body: &Value,
    ) -> Result<Result<Value, Refused>, QueueError> {
        let unavailable = |error: &dyn std::fmt::Display| {
            QueueError::Unavailable(format!("SQS at {}: {error}", self.endpoint))
        };
        let credential = self.credentials.get_credential().await.map_err(|error| {
            QueueError::Denied(format!("no credentials for SQS at {}: {}", self.endpoint, chain(&error)))
        })?;
        let mut request = http::Request::post(&self.endpoint)
            .header("content-type", "application/x-amz-json-1.0")
            .header("x-amz-target", format!("AmazonSQS.{action}"))
            .body(HttpRequestBody::from(body.to_string()))
            .map_err(|error| unavailable(&error))?;
        AwsAuthorizer::new(&credential, "sqs", &self.region)
            .try_authorize(&mut request, None)
            .map_err(|error| unavailable(&chain(&error)))?;
        let response = client.execute(request).await.map_err(|error| unavailable(&chain(&error)))?;
        let status = response.status();
        let bytes = response.into_body().bytes().await.map_err(|error| unavailable(&chain(&error)))?;
        let answer: Value = serde_json::from_slice(&bytes).unwrap_or_default();
        if status.is_success() {
            return Ok(Ok(answer));
        }
        let said = String::from_utf8_lossy(&bytes);
        let kind = answer["__type"].as_str().or_else(|| element(&said, "Code")).unwrap_or_default();
        let kind = kind.rsplit(['#', '.']).next().unwrap_or(kind);
        let kind = if kind.is_empty() { format!("status {}", status.as_u16()) } else { kind.to_owned() };
        let text = answer["message"].as_str().or(answer["Message"].as_str());
        let text = text.or_else(|| element(&said, "Message")).unwrap_or_default();
        let text: String = text.chars().take(TEXT_CHARS).collect();
        let refused = Refused { kind, text };
        if status.as_u16() == 401 || status.as_u16() == 403 || is_denial(&refused.kind) {
            return Err(QueueError::Denied(format!(
                "SQS at {}: {}: {}",
                self.endpoint, refused.kind, refused.text
            )));
        }
        if status.is_server_error() || status.as_u16() == 429 || refused.kind.contains("Throttl") {
            return Err(unavailable(&format!("{}: {}", refused.kind, refused.text)));
        }
        Ok(Err(refused))
    }

    /// The address of a queue, which is asked for by its name, and made where it isn't there.
    async fn url(&self, queue: &str) -> Result<String, QueueError> {
        if queue.starts_with("https://") || queue.starts_with("http://") {
            return Ok(queue.to_owned());
        }
        if let Some(url) = self.urls.lock().get(queue) {
            return Ok(url.clone());
        }
        let found = self.ask(&self.client, "GetQueueUrl", &json!({"QueueName": queue})).await?;
        let answer = match found {
            Ok(answer) => answer,
            Err(refused) if is_missing(&refused.kind) && self.create_missing => {
                let mut make = json!({"QueueName": queue});
                if queue.ends_with(FIFO) {
                    make["Attributes"] = json!({"FifoQueue": "true"});
                }
                let made = self.ask(&self.client, "CreateQueue", &make).await?;
                made.map_err(|refused| self.refusal(queue, &refused))?
            }
            Err(refused) if is_missing(&refused.kind) => {
                return Err(QueueError::Unavailable(format!(
                    "SQS at {} has no queue {queue:?}, and create_missing is false",
                    self.endpoint
                )));
            }
            Err(refused) => return Err(self.refusal(queue, &refused)),
        };
        let Some(url) = answer["QueueUrl"].as_str() else {
            return Err(QueueError::Unavailable(format!(
                "SQS at {} did not name the queue {queue:?}",
                self.endpoint
            )));
        };
        self.urls.lock().insert(queue.to_owned(), url.to_owned());
        Ok(url.to_owned())
    }

    /// What a refusal means: only some say that a message will never be taken. Anything else may pass, or be mended by somebody.
    fn refusal(&self, queue: &str, refused: &Refused) -> QueueError {
        let text = format!("SQS at {}, queue {queue:?}: {}: {}", self.endpoint, refused.kind, refused.text);
        if is_denial(&refused.kind) {
            QueueError::Denied(text)
        } else if is_about_the_message(&refused.kind) {
            QueueError::Rejected(text)
        } else {
            QueueError::Unavailable(text)
        }
    }

    /// A request to a queue; one that has gone is looked for anew the next time.
    async fn ask_queue(
        &self,
        client: &HttpClient,
        action: &str,
        queue: &str,
        mut body: Value,
    ) -> Result<Value, QueueError> {
        body["QueueUrl"] = json!(self.url(queue).await?);
        match self.ask(client, action, &body).await? {
            Ok(answer) => Ok(answer),
            Err(refused) if is_missing(&refused.kind) => {
                self.urls.lock().remove(queue);
                Err(QueueError::Unavailable(format!(
                    "SQS at {}: the queue {queue:?} has gone",
                    self.endpoint
                )))
            }
            Err(refused) => Err(self.refusal(queue, &refused)),
        }
    }

    async fn send_batch(&self, queue: &str, messages: &[&Message]) -> Vec<Result<(), QueueError>> {
        let entries: Vec<Value> =
            messages.iter().enumerate().map(|(index, message)| entry(queue, index, message)).collect();
        let sent = self.ask_queue(&self.client, "SendMessageBatch", queue, json!({"Entries": entries})).await;
        let answer = match sent {
            Ok(answer) => answer,
            Err(QueueError::Rejected(_)) if messages.len() > 1 => {
                // One of them is refused, and the others with it.
                let mut results = Vec::with_capacity(messages.len());
                for message in messages {
                    results.extend(Box::pin(self.send_batch(queue, &[*message])).await);
                }
                return results;
            }
            Err(error) => return vec![Err(error); messages.len()],
        };
        let mut results: Vec<Result<(), QueueError>> =
            vec![
                Err(QueueError::Unavailable("SQS did not answer for every message".to_owned()));
                messages.len()
            ];
        let place = |entry: &Value| entry["Id"].as_str().and_then(|id| id.parse::<usize>().ok());
        for sent in answer["Successful"].as_array().into_iter().flatten() {
            if let Some(result) = place(sent).and_then(|place| results.get_mut(place)) {
                *result = Ok(());
            }
        }
        for failed in answer["Failed"].as_array().into_iter().flatten() {
            let Some(result) = place(failed).and_then(|place| results.get_mut(place)) else { continue };
            let refused = Refused {
                kind: failed["Code"].as_str().unwrap_or_default().to_owned(),
                text: failed["Message"].as_str().unwrap_or_default().chars().take(TEXT_CHARS).collect(),
            };
            *result = Err(self.refusal(queue, &refused));
        }
        results
    }

    /// Sends in batches that the service takes: so many messages, and so many bytes, at once.
    async fn send_all(&self, queue: &str, messages: &[Message]) -> Vec<Result<(), QueueError>> {
        let body_bytes_max = self.message_bytes_max.saturating_sub(ATTRIBUTE_BYTES);
        let written: Vec<Message> = messages
            .iter()
            .map(|message| Message {
                body: allowed(&String::from_utf8_lossy(&message.body)).into(),
                ..message.clone()
            })
            .collect();
        let messages = written.as_slice();
        let mut results: Vec<Result<(), QueueError>> =
            messages.iter().map(|message| fits(message, body_bytes_max)).collect();
        let (mut batches, mut bytes): (Vec<Vec<usize>>, usize) = (Vec::new(), 0);
        for place in (0..messages.len()).filter(|place| results[*place].is_ok()) {
            let size = messages[place].body.len() + ATTRIBUTE_BYTES;
            match batches.last_mut() {
                Some(batch) if batch.len() < BATCH && bytes + size <= self.message_bytes_max => {
                    batch.push(place);
                    bytes += size;
                }
                _ => {
                    batches.push(vec![place]);
                    bytes = size;
                }
            }
        }
        if queue.ends_with(FIFO) {
            // Behind one that isn't there nothing is sent, or it would be overtaken.
            let mut failed = false;
            for batch in batches {
                let sent = if failed {
                    vec![
                        Err(QueueError::Unavailable("it waits for the one before it".to_owned()));
                        batch.len()
                    ]
                } else {
                    let of_batch: Vec<&Message> = batch.iter().map(|place| &messages[*place]).collect();
                    self.send_batch(queue, &of_batch).await
                };
                failed |= sent.iter().any(|result| !matches!(result, Ok(()) | Err(QueueError::Rejected(_))));
                batch.into_iter().zip(sent).for_each(|(place, result)| results[place] = result);
            }
            return results;
        }
        let sent = stream::iter(batches).map(|batch| async move {
            let of_batch: Vec<&Message> = batch.iter().map(|place| &messages[*place]).collect();
            let sent = self.send_batch(queue, &of_batch).await;
            (batch, sent)
        });
        let sent: Vec<_> = sent.buffered(REQUESTS_AT_ONCE).collect().await;
        for (place, result) in sent.into_iter().flat_map(|(batch, sent)| batch.into_iter().zip(sent)) {
            results[place] = result;
        }
        results
    }

    async fn change(&self, action: &str, queue: &str, entries: Vec<Value>) -> Result<(), QueueError> {
        let batches: Vec<Vec<Value>> = entries.chunks(BATCH).map(<[Value]>::to_vec).collect();
        let changed = stream::iter(batches).map(|batch| async move {
            let answer = self.ask_queue(&self.client, action, queue, json!({"Entries": batch})).await?;
            // A receipt that has expired means that the message is somebody else's by now.
            for failed in answer["Failed"].as_array().into_iter().flatten() {
                tracing::debug!(queue, action, code = %failed["Code"], "SQS didn't take a receipt");
            }
            Ok(())
        });
        // Each is tried, whatever becomes of the others.
        let changed: Vec<Result<(), QueueError>> = changed.buffer_unordered(REQUESTS_AT_ONCE).collect().await;
        changed.into_iter().collect()
    }
}

impl Backend for Sqs {
    fn check(&self) -> Answer<'_, Result<(), QueueError>> {
        Box::pin(async {
            match self.ask(&self.client, "ListQueues", &json!({"MaxResults": 1})).await {
                // It knows us, and allows other things.
                Err(QueueError::Denied(why)) if why.contains("AccessDenied") => Ok(()),
                Ok(Err(refused)) => Err(self.refusal("", &refused)),
                answer => answer.map(drop),
            }
        })
    }

    fn batch_max(&self, queue: &str) -> usize {
        if queue.ends_with(FIFO) { BATCH } else { BATCH * REQUESTS_AT_ONCE }
    }

    fn send<'a>(
        &'a self,
        queue: &'a str,
        messages: &'a [Message],
    ) -> Answer<'a, Vec<Result<(), QueueError>>> {
        Box::pin(self.send_all(queue, messages))
    }

    fn source(&self) -> Option<&dyn Source> {
        Some(self)
    }
}

impl Source for Sqs {
    fn receive<'a>(
        &'a self,
        queue: &'a str,
        max: usize,
        wait: Duration,
        hidden: Duration,
    ) -> Answer<'a, Result<Vec<Received>, QueueError>> {
        Box::pin(async move {
            let body = json!({
                "MaxNumberOfMessages": max.clamp(1, BATCH),
                "WaitTimeSeconds": wait.min(WAIT_MAX).as_secs(),
                "VisibilityTimeout": hidden.as_secs(),
                "MessageAttributeNames": [TRACE],
            });
            let answer = self.ask_queue(&self.waiting, "ReceiveMessage", queue, body).await?;
            let received = |message: &Value| {
                let text = |key: &str| message[key].as_str().map(ToOwned::to_owned);
                Some(Received {
                    id: text("MessageId")?,
                    receipt: text("ReceiptHandle")?,
                    body: Bytes::from(text("Body")?),
                    traceparent: message["MessageAttributes"][TRACE]["StringValue"]
                        .as_str()
                        .map(ToOwned::to_owned),
                })
            };
            Ok(answer["Messages"].as_array().into_iter().flatten().filter_map(received).collect())
        })
    }

    fn acknowledge<'a>(
        &'a self,
        queue: &'a str,
        receipts: &'a [String],
    ) -> Answer<'a, Result<(), QueueError>> {
        let entry =
            |(index, receipt): (usize, &String)| json!({"Id": index.to_string(), "ReceiptHandle": receipt});
        Box::pin(self.change("DeleteMessageBatch", queue, receipts.iter().enumerate().map(entry).collect()))
    }

    fn extend<'a>(
        &'a self,
        queue: &'a str,
        receipts: &'a [String],
        hidden: Duration,
    ) -> Answer<'a, Result<(), QueueError>> {
        let entry = |(index, receipt): (usize, &String)| json!({"Id": index.to_string(), "ReceiptHandle": receipt, "VisibilityTimeout": hidden.as_secs()});
        Box::pin(self.change(
            "ChangeMessageVisibilityBatch",
            queue,
            receipts.iter().enumerate().map(entry).collect(),
        ))
    }
}
