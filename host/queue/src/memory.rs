//! Queues in this process, for development and for hosts without a broker: bounded in messages and bytes. What is taken is leased: it
//! is gone when whoever took it says that they have it, and comes back into its queue when they don't in time. What they hold is
//! also in the journal, which fills them again after a restart.

use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use crate::{Answer, Backend, MemorySpec, Message, QueueError, fits};

/// Messages sent at once: it costs nothing.
const BATCH: usize = 256;
/// Bytes of the messages that are shown or given away at once; one that is larger goes alone.
const TAKEN_BYTES_MAX: usize = 16 << 20;

/// All queues of this kind.
pub struct Memory {
    messages_max: usize,
    bytes_max: usize,
    queues: Mutex<Queues>,
}

#[derive(Default)]
struct Queues {
    by_name: BTreeMap<String, Queue>,
    /// What was taken and not acknowledged, by receipt.
    leased: BTreeMap<String, Leased>,
    leases_ever: u64,
    bytes: usize,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Message>,
    /// Messages that somebody has taken; they still count.
    leased: usize,
}

struct Leased {
    /// Grows from lease to lease.
    number: u64,
    queue: String,
    messages: Vec<Message>,
    until: Instant,
}

/// What a queue holds.
#[derive(Clone, Debug, Default)]
pub struct Held {
    /// Messages in it, but for those that somebody has taken.
    pub length: usize,
    /// The oldest of them, or those that were taken.
    pub messages: Vec<Message>,
}

/// What was taken is the taker's for a while.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    /// What to acknowledge it with.
    pub receipt: String,
    /// When it isn't within this time, the messages are in their queue again.
    pub time: Duration,
}

impl Memory {
    pub(crate) fn new(spec: &MemorySpec) -> Self {
        Self { messages_max: spec.messages_max, bytes_max: spec.bytes_max, queues: Mutex::default() }
    }

    /// The names of the queues that hold something, and how much.
    #[must_use]
    pub fn lengths(&self, now: Instant) -> BTreeMap<String, usize> {
        let mut queues = self.queues.lock();
        queues.bring_back(now);
        queues.by_name.iter().map(|(name, queue)| (name.clone(), queue.waiting.len())).collect()
    }

    /// The oldest messages of a queue, which stay there.
    #[must_use]
    pub fn look(&self, queue: &str, max: usize, now: Instant) -> Held {
        let mut queues = self.queues.lock();
        queues.bring_back(now);
        let Some(queue) = queues.by_name.get(queue) else { return Held::default() };
        let count = queue.oldest(max);
        Held { length: queue.waiting.len(), messages: queue.waiting.iter().take(count).cloned().collect() }
    }

    /// Takes the oldest messages of a queue for a while. No lease where there are none.
    #[must_use]
    pub fn take(&self, queue: &str, max: usize, time: Duration, now: Instant) -> (Held, Option<Lease>) {
        let mut queues = self.queues.lock();
        queues.bring_back(now);
        let Some(held) = queues.by_name.get_mut(queue) else { return (Held::default(), None) };
        let count = held.oldest(max);
        let messages: Vec<Message> = held.waiting.drain(..count).collect();
        held.leased += messages.len();
        let taken = Held { length: held.waiting.len(), messages: messages.clone() };
        if messages.is_empty() {
            return (taken, None);
        }
        let receipt = format!("{:032x}", fastrand::u128(..));
        queues.leases_ever += 1;
        let number = queues.leases_ever;
        let leased = Leased { number, queue: queue.to_owned(), messages, until: now + time };
        queues.leased.insert(receipt.clone(), leased);
        (taken, Some(Lease { receipt, time }))
    }

    /// Whoever took messages of this queue has them: they are gone from it, and returned. `None` where nobody knows the receipt: it
    /// was acknowledged before, or the messages are in their queue again.
    #[must_use]
    pub fn acknowledge(&self, queue: &str, receipt: &str, now: Instant) -> Option<Vec<Message>> {
        let mut queues = self.queues.lock();
        queues.bring_back(now);
        if queues.leased.get(receipt)?.queue != queue {
            return None;
        }
        let messages = queues.leased.remove(receipt)?.messages;
        queues.bytes -= messages.iter().map(|message| message.body.len()).sum::<usize>();
        queues.release(queue, messages.len());
        Some(messages)
    }

    fn put(&self, queue: &str, message: &Message) -> Result<(), QueueError> {
        fits(message, self.bytes_max)?;
        let mut queues = self.queues.lock();
        let length = queues.by_name.get(queue).map_or(0, |queue| queue.waiting.len() + queue.leased);
        if length >= self.messages_max || queues.bytes + message.body.len() > self.bytes_max {
            return Err(QueueError::Unavailable(format!(
                "the queue {queue:?} in memory is full ({length} messages): take some with DELETE /queues/{queue} and acknowledge them by their receipt, or configure a broker"
            )));
        }
        queues.bytes += message.body.len();
        queues.by_name.entry(queue.to_owned()).or_default().waiting.push_back(message.clone());
        Ok(())
    }
}

impl Queue {
    /// How many of the oldest messages go at once.
    fn oldest(&self, max: usize) -> usize {
        let mut bytes = 0;
        let fit = |message: &&Message| {
            bytes += message.body.len();
            bytes <= TAKEN_BYTES_MAX
        };
        self.waiting.iter().take(max).take_while(fit).count().max(self.waiting.len().min(max).min(1))
    }
}

impl Queues {
    /// Puts messages back whose takers have not acknowledged them in time, in front, as they were.
    fn bring_back(&mut self, now: Instant) {
        let mut over: Vec<Leased> =
            self.leased.extract_if(.., |_, leased| leased.until <= now).map(|(_, leased)| leased).collect();
        // What was taken first comes to stand in front.
        over.sort_by_key(|leased| std::cmp::Reverse(leased.number));
        for Leased { queue, messages, .. } in over {
            let held = self.by_name.entry(queue).or_default();
            held.leased -= messages.len();
            messages.into_iter().rev().for_each(|message| held.waiting.push_front(message));
        }
    }

    /// Some messages are gone for good, and their queue with the last one.
    fn release(&mut self, queue: &str, count: usize) {
        let Some(held) = self.by_name.get_mut(queue) else { return };
        held.leased -= count;
        if held.waiting.is_empty() && held.leased == 0 {
            self.by_name.remove(queue);
        }
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

    const MINUTE: Duration = Duration::from_secs(60);

    fn message(body: &'static str) -> Message {
        Message {
            job_id: "j".to_owned(),
            delivery_id: "j".to_owned(),
            body: Bytes::from_static(body.as_bytes()),
            traceparent: None,
        }
    }

    #[test]
    fn a_queue_is_bounded_and_room_comes_back_with_the_acknowledgement() {
        let memory = Memory::new(&MemorySpec { messages_max: 2, bytes_max: 10 });
        let now = Instant::now();
        assert_eq!(memory.put("a", &message("12345")), Ok(()));
        assert!(matches!(memory.put("b", &message("123456")), Err(QueueError::Unavailable(_))));
        assert!(matches!(memory.put("b", &message("12345678901")), Err(QueueError::Rejected(_))));
        assert_eq!(memory.put("a", &message("1")), Ok(()));
        assert!(matches!(memory.put("a", &message("2")), Err(QueueError::Unavailable(_))));
        assert_eq!(memory.look("a", 1, now).length, 2);
        let (taken, lease) = memory.take("a", 9, MINUTE, now);
        assert_eq!((taken.length, taken.messages.len()), (0, 2));
        assert!(matches!(memory.put("b", &message("1234567890")), Err(QueueError::Unavailable(_))));
        let receipt = lease.unwrap().receipt;
        assert_eq!(memory.acknowledge("b", &receipt, now), None, "it is another queue's");
        assert_eq!(memory.acknowledge("a", &receipt, now).unwrap().len(), 2);
        assert_eq!(memory.acknowledge("a", &receipt, now), None);
        assert_eq!(memory.put("b", &message("1234567890")), Ok(()));
        assert_eq!(memory.lengths(now).keys().collect::<Vec<_>>(), ["b"]);
    }

    #[test]
    fn what_is_not_acknowledged_in_time_is_there_again_in_its_order() {
        let memory = Memory::new(&MemorySpec { messages_max: 9, bytes_max: 99 });
        let now = Instant::now();
        for body in ["1", "2", "3"] {
            memory.put("a", &message(body)).unwrap();
        }
        let (_, lease) = memory.take("a", 1, MINUTE, now);
        let _ = memory.take("a", 1, MINUTE, now);
        assert_eq!(memory.look("a", 9, now).length, 1);
        let later = now + MINUTE;
        let bodies: Vec<Bytes> =
            memory.look("a", 9, later).messages.into_iter().map(|message| message.body).collect();
        assert_eq!(bodies, ["1", "2", "3"]);
        assert_eq!(memory.acknowledge("a", &lease.unwrap().receipt, later), None);
        assert_eq!(memory.take("none", 9, MINUTE, later).1, None);
    }
}
