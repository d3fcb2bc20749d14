//! A queue whose broker is a model's own code: messages go to the replica that looks at inputs, which sends them by whatever its author wrote. It
//! never knows how.

use std::sync::Arc;

use modalkit_engine::{Failure, FailureKind, Outgoing};
use modalkit_queue::{Answer, Backend, Message, ModelSpec, OpenModel, QueueError};

use crate::{models::Models, pipeline::SharedInstance};

/// Messages in one call: no batch runs meanwhile, and each may take its time.
const BATCH_MAX: usize = 1;

struct OfModel {
    models: Arc<Models>,
    spec: ModelSpec,
}

/// What makes the adapters, for the models of a host.
pub fn opener(models: Arc<Models>) -> OpenModel {
    Arc::new(move |spec| Arc::new(OfModel { models: Arc::clone(&models), spec: spec.clone() }))
}

impl OfModel {
    fn instance(&self) -> Result<SharedInstance, QueueError> {
        let name = &self.spec.model;
        let unavailable = |why: &str| QueueError::Unavailable(format!("the model {name} {why}"));
        let model = self.models.find(Some(name)).map_err(|_| unavailable("is not there"))?;
        let serving = model.serving().map_err(|_| unavailable("does not serve now"))?;
        serving.validating().ok_or_else(|| unavailable("has no replica now"))
    }
}

impl Backend for OfModel {
    fn check(&self) -> Answer<'_, Result<(), QueueError>> {
        Box::pin(async { self.instance().map(drop) })
    }

    fn batch_max(&self, _: &str) -> usize {
        BATCH_MAX
    }

    fn send<'a>(
        &'a self,
        queue: &'a str,
        messages: &'a [Message],
    ) -> Answer<'a, Vec<Result<(), QueueError>>> {
        Box::pin(async move {
            let instance = match self.instance() {
                Ok(instance) => instance,
                Err(error) => return vec![Err(error); messages.len()],
            };
            let (queue, messages) = (queue.to_owned(), messages.to_vec());
            // The author's code takes what time it takes.
            let sent = tokio::task::spawn_blocking(move || {
                let outgoing: Vec<Outgoing<'_>> = messages.iter().map(outgoing).collect();
                instance.send(&queue, &outgoing)
            });
            // One that failed over it has no results, which whoever asked fills up.
            sent.await.unwrap_or_default().into_iter().map(|sent| sent.map_err(error)).collect()
        })
    }
}

fn outgoing(message: &Message) -> Outgoing<'_> {
    Outgoing { job_id: &message.job_id, body: &message.body, traceparent: message.traceparent.as_deref() }
}

fn error(Failure { kind, message }: Failure) -> QueueError {
    match kind {
        FailureKind::InvalidInput | FailureKind::Permanent => QueueError::Rejected(message),
        _ => QueueError::Unavailable(message),
    }
}
