//! Queues in this process, for development and for hosts without a broker: bounded, and empty again after a restart.

use std::collections::{BTreeMap, VecDeque};

use parking_lot::Mutex;

use crate::{Answer, Backend, MemorySpec, Message, QueueError, fits};

/// Messages sent at once: it costs nothing.
const BATCH: usize = 256;

/// All queues of this kind.
pub struct Memory {
    messages_max: usize,
    bytes_max: usize,
    queues: Mutex<Queues>,
}

#[derive(Default)]
struct Queues {
    by_name: BTreeMap<String, VecDeque<Message>>,
    bytes: usize,
}

/// What a queue holds.
#[derive(Clone, Debug)]
pub struct Shelf {
    /// Messages in it.
    pub length: usize,
    /// The oldest of them.
    pub messages: Vec<Message>,
}

impl Memory {
    pub(crate) fn new(spec: &MemorySpec) -> Self {
        Self { messages_max: spec.messages_max, bytes_max: spec.bytes_max, queues: Mutex::default() }
    }

    /// The names of the queues that hold something, and how much.
    #[must_use]
    pub fn lengths(&self) -> BTreeMap<String, usize> {
        self.queues.lock().by_name.iter().map(|(name, queue)| (name.clone(), queue.len())).collect()
    }

    /// The oldest messages of a queue, which stay there.
    #[must_use]
    pub fn look(&self, queue: &str, max: usize) -> Shelf {
        let queues = self.queues.lock();
        let Some(queue) = queues.by_name.get(queue) else { return Shelf { length: 0, messages: Vec::new() } };
        Shelf { length: queue.len(), messages: queue.iter().take(max).cloned().collect() }
    }

    /// Takes the oldest messages out of a queue.
    #[must_use]
    pub fn take(&self, queue: &str, max: usize) -> Shelf {
        let mut queues = self.queues.lock();
        let Some(waiting) = queues.by_name.get_mut(queue) else {
            return Shelf { length: 0, messages: Vec::new() };
        };
        let messages: Vec<Message> = waiting.drain(..max.min(waiting.len())).collect();
        let length = waiting.len();
        if length == 0 {
            queues.by_name.remove(queue);
        }
        queues.bytes -= messages.iter().map(|message| message.body.len()).sum::<usize>();
        Shelf { length, messages }
    }

    fn put(&self, queue: &str, message: &Message) -> Result<(), QueueError> {
        fits(message, self.bytes_max)?;
        let mut queues = self.queues.lock();
        let length = queues.by_name.get(queue).map_or(0, VecDeque::len);
        if length >= self.messages_max || queues.bytes + message.body.len() > self.bytes_max {
            return Err(QueueError::Unavailable(format!(
                "the queue {queue:?} in memory is full ({length} messages): take some with DELETE /queues/{queue}, or configure a broker"
            )));
        }
        queues.bytes += message.body.len();
        queues.by_name.entry(queue.to_owned()).or_default().push_back(message.clone());
        Ok(())
    }
}

impl Backend for Memory {
    fn check(&self) -> Answer<'_, Result<(), QueueError>> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn batch_max(&self, _: &str) -> usize {
        BATCH
    }

    fn send<'a>(
        &'a self,
        queue: &'a str,
        messages: &'a [Message],
    ) -> Answer<'a, Vec<Result<(), QueueError>>> {
        let results = messages.iter().map(|message| self.put(queue, message)).collect();
        Box::pin(std::future::ready(results))
    }

    fn memory(&self) -> Option<&Memory> {
        Some(self)
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    #[test]
    fn a_queue_is_bounded_and_room_comes_back() {
        let memory = Memory::new(&MemorySpec { messages_max: 2, bytes_max: 10 });
        let message = |body: &'static str| Message {
            job_id: "j".to_owned(),
            delivery_id: "j".to_owned(),
            body: Bytes::from_static(body.as_bytes()),
            traceparent: None,
        };
        assert_eq!(memory.put("a", &message("12345")), Ok(()));
        assert!(matches!(memory.put("b", &message("123456")), Err(QueueError::Unavailable(_))));
        assert!(matches!(memory.put("b", &message("12345678901")), Err(QueueError::Rejected(_))));
        assert_eq!(memory.put("a", &message("1")), Ok(()));
        assert!(matches!(memory.put("a", &message("2")), Err(QueueError::Unavailable(_))));
        assert_eq!(memory.look("a", 1).length, 2);
        assert_eq!(memory.take("a", 9).messages.len(), 2);
        assert_eq!(memory.put("b", &message("1234567890")), Ok(()));
        assert_eq!(memory.lengths().keys().collect::<Vec<_>>(), ["b"]);
    }
}
