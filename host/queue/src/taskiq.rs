//! Tasks that a Python worker of TaskIQ executes, over Redis: `task(job_id=…, output=…)`, as the JSON formatter of TaskIQ writes them.

use std::collections::{BTreeMap, HashSet};

use parking_lot::Mutex;
use redis::Pipeline;
use serde_json::{json, value::RawValue};

use crate::{Answer, Backend, Message, QueueError, RedisShape, SpecError, TaskIqSpec, redis::Redis};

/// The group of TaskIQ's own workers.
const GROUP: &str = "taskiq";

pub(crate) struct TaskIq {
    redis: Redis,
    shape: RedisShape,
    task: String,
    tasks: BTreeMap<String, String>,
    /// Streams whose group is known to be there.
    grouped: Mutex<HashSet<String>>,
}

impl TaskIq {
    pub(crate) fn open(spec: &TaskIqSpec) -> Result<Self, SpecError> {
        Ok(Self {
            redis: Redis::open(&spec.redis)?,
            shape: spec.redis.shape,
            task: spec.task.clone(),
            tasks: spec.tasks.clone(),
            grouped: Mutex::default(),
        })
    }

    fn task(&self, queue: &str, message: &Message) -> String {
        let task_name = self.tasks.get(queue).unwrap_or(&self.task);
        // As it stands: parsed and written again, it could be another number.
        let output = std::str::from_utf8(&message.body)
            .ok()
            .and_then(|body| RawValue::from_string(body.to_owned()).ok());
        let mut labels = json!({});
        if let Some(trace) = &message.traceparent {
            labels["traceparent"] = json!(trace);
        }
        let id = serde_json::to_string(&message.job_id).unwrap_or_default();
        let task_name = serde_json::to_string(task_name).unwrap_or_default();
        let output = output.as_deref().map_or("null", RawValue::get);
        format!(
            "{{\"task_id\":{id},\"task_name\":{task_name},\"labels\":{labels},\"args\":[],\"kwargs\":{{\"job_id\":{id},\"output\":{output}}}}}"
        )
    }

    /// A group that a worker makes begins with what comes after it: what was sent before the first worker came would never be run.
    async fn group(&self, queue: &str) -> Result<(), QueueError> {
        if self.shape == RedisShape::List || self.grouped.lock().contains(queue) {
            return Ok(());
        }
        let mut pipeline = Pipeline::new();
        pipeline.ignore_errors();
        pipeline.cmd("XGROUP").arg("CREATE").arg(queue).arg(GROUP).arg("0").arg("MKSTREAM");
        match self.redis.run(&pipeline).await?.remove(0) {
            Err(QueueError::Unavailable(why)) if why.contains("BUSYGROUP") => {}
            other => drop(other?),
        }
        self.grouped.lock().insert(queue.to_owned());
        Ok(())
    }
}

impl Backend for TaskIq {
    fn check(&self) -> Answer<'_, Result<(), QueueError>> {
        self.redis.check()
    }

    fn batch_max(&self, queue: &str) -> usize {
        self.redis.batch_max(queue)
    }

    fn send<'a>(
        &'a self,
        queue: &'a str,
        messages: &'a [Message],
    ) -> Answer<'a, Vec<Result<(), QueueError>>> {
        Box::pin(async move {
            if let Err(error) = self.group(queue).await {
                return vec![Err(error); messages.len()];
            }
            let sent = self.redis.send_each(messages, |pipeline, message| {
                let task = self.task(queue, message);
                match self.shape {
                    RedisShape::List => pipeline.cmd("LPUSH").arg(queue).arg(task),
                    RedisShape::Stream => pipeline.cmd("XADD").arg(queue).arg("*").arg("data").arg(task),
                };
            });
            let results = sent.await;
            if results.iter().any(Result::is_err) {
                // A Redis that came back empty has no group any more.
                self.grouped.lock().remove(queue);
            }
            results
        })
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::RedisSpec;

    #[test]
    fn a_result_is_passed_on_to_the_letter() {
        let redis = RedisSpec {
            url: "redis://127.0.0.1:1".to_owned(),
            username: None,
            password: None,
            ca: None,
            shape: RedisShape::List,
            stream_length_max: None,
            message_bytes_max: 100,
            consumer: String::new(),
        };
        let tasks = BTreeMap::from([("other".to_owned(), "mod:other".to_owned())]);
        let backend = TaskIq::open(&TaskIqSpec { redis, task: "on_result".to_owned(), tasks }).unwrap();
        let message = Message {
            job_id: "j1".to_owned(),
            delivery_id: "j1".to_owned(),
            body: Bytes::from_static(b"{\"a\": 1e999, \"b\": 0.10}"),
            traceparent: None,
        };
        assert_eq!(
            backend.task("q", &message),
            "{\"task_id\":\"j1\",\"task_name\":\"on_result\",\"labels\":{},\"args\":[],\"kwargs\":{\"job_id\":\"j1\",\"output\":{\"a\": 1e999, \"b\": 0.10}}}"
        );
        assert!(backend.task("other", &message).contains("\"task_name\":\"mod:other\""));
    }
}
