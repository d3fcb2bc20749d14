//! A reply in chunks on its way to its caller. It owns how many wait for a caller who reads slowly, and how each side hears that the other has left. It
//! never knows what a chunk says.

use std::{
    mem,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use bytes::Bytes;
use modalkit_engine::{ChunkState, Interest};
use parking_lot::{Condvar, Mutex};

use super::{Budget, JobError, Mailbox, Reply};

/// Chunks of one reply that wait for its caller.
pub const STREAM_CHUNKS_MAX: usize = 64;
/// Their bytes; a larger chunk waits alone.
pub const STREAM_BYTES_MAX: usize = 64 << 10;

/// What both sides share.
pub(super) struct Stream {
    state: Mutex<State>,
    /// The caller has taken what waited, or has left.
    room: Condvar,
    mailbox: Arc<Mailbox>,
    budget: Arc<Budget>,
}

#[derive(Default)]
struct State {
    chunks: Vec<Bytes>,
    bytes: usize,
    /// Until the caller takes it.
    end: Option<Reply>,
    has_ended: bool,
    has_left: bool,
    /// Of the task that waits for what comes next.
    waker: Option<Waker>,
    /// The mailbox has it: what else comes before it is delivered needs no further wake-up.
    is_posted: bool,
}

/// Where the lane that runs the job puts chunks.
#[derive(Clone)]
pub struct ChunkSender(Arc<Stream>);

/// Ends a stream, once. Dropped unused, it says that the job was lost.
pub(super) struct StreamEnd(Arc<Stream>);

/// Receives a reply in chunks. Dropped, it says that the caller has left.
pub struct PendingStream(Arc<Stream>);

/// What has come.
#[derive(Debug)]
pub struct Received {
    /// In order; there may be none.
    pub chunks: Vec<Bytes>,
    /// Once it is there, nothing follows.
    pub end: Option<Reply>,
}

/// Both ends of a reply in chunks, whose receiver is woken through this mailbox and whose waiting bytes count in this budget.
pub(super) fn stream(mailbox: &Arc<Mailbox>, budget: &Arc<Budget>) -> (StreamEnd, PendingStream) {
    let stream = Arc::new(Stream {
        state: Mutex::default(),
        room: Condvar::new(),
        mailbox: Arc::clone(mailbox),
        budget: Arc::clone(budget),
    });
    (StreamEnd(Arc::clone(&stream)), PendingStream(stream))
}

impl Stream {
    fn interest(&self) -> Interest {
        let state = self.state.lock();
        if state.is_over() { Interest::Nothing } else { Interest::Chunks }
    }

    /// Notes the reply, unless there is one.
    fn end(self: &Arc<Self>, reply: Reply) {
        let mut state = self.state.lock();
        if state.has_ended {
            return;
        }
        (state.end, state.has_ended) = (Some(reply), true);
        let posts = state.posts();
        drop(state);
        self.room.notify_all();
        if posts {
            self.mailbox.put_stream(Arc::clone(self));
        }
    }

    /// Wakes the receiver; the mailbox's task calls this on the receiver's thread.
    pub(super) fn wake(&self) {
        let mut state = self.state.lock();
        state.is_posted = false;
        let waker = state.waker.take();
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl State {
    fn is_over(&self) -> bool {
        self.has_left || self.has_ended
    }

    fn has_room_for(&self, bytes: usize) -> bool {
        self.chunks.is_empty()
            || self.chunks.len() < STREAM_CHUNKS_MAX && self.bytes + bytes <= STREAM_BYTES_MAX
    }

    /// Whether the receiver waits and is to be woken.
    fn posts(&mut self) -> bool {
        self.waker.is_some() && !mem::replace(&mut self.is_posted, true)
    }
}

impl ChunkSender {
    /// Puts a chunk behind the others. Where they are too many it waits for the caller to take them, for as long as `wait_left`, and takes what it waited
    /// from that.
    pub fn send(&self, chunk: Bytes, wait_left: &mut Duration) -> ChunkState {
        let mut state = self.0.state.lock();
        if !state.has_room_for(chunk.len()) && !state.is_over() && !wait_left.is_zero() {
            let begun = Instant::now();
            let until = begun + *wait_left;
            while !state.has_room_for(chunk.len()) && !state.is_over() {
                if self.0.room.wait_until(&mut state, until).timed_out() {
                    break;
                }
            }
            *wait_left = wait_left.saturating_sub(begun.elapsed());
        }
        if state.is_over() {
            return ChunkState::Unwanted;
        }
        if !state.has_room_for(chunk.len()) {
            return ChunkState::Full;
        }
        self.0.budget.count(chunk.len());
        state.bytes += chunk.len();
        state.chunks.push(chunk);
        let posts = state.posts();
        drop(state);
        if posts {
            self.0.mailbox.put_stream(Arc::clone(&self.0));
        }
        ChunkState::Taken
    }

    /// Ends the stream from the producer's side before its reply is there.
    pub fn cut_off(&self, error: JobError) {
        self.0.end(Err(error));
    }
}

impl StreamEnd {
    pub(super) fn send(self, reply: Reply) {
        self.0.end(reply);
    }

    pub(super) fn interest(&self) -> Interest {
        self.0.interest()
    }

    pub(super) fn sender(&self) -> ChunkSender {
        ChunkSender(Arc::clone(&self.0))
    }
}

impl Drop for StreamEnd {
    fn drop(&mut self) {
        self.0.end(Err(JobError::Lost));
    }
}

impl PendingStream {
    /// Takes what has come, as soon as there is anything.
    pub fn poll_next(&mut self, task: &mut Context<'_>) -> Poll<Received> {
        let mut state = self.0.state.lock();
        if state.chunks.is_empty() && state.end.is_none() {
            if state.waker.as_ref().is_none_or(|waker| !waker.will_wake(task.waker())) {
                state.waker = Some(task.waker().clone());
            }
            return Poll::Pending;
        }
        let bytes = mem::take(&mut state.bytes);
        let received = Received { chunks: mem::take(&mut state.chunks), end: state.end.take() };
        drop(state);
        self.0.room.notify_all();
        self.0.budget.give_back(bytes);
        Poll::Ready(received)
    }
}

impl Drop for PendingStream {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        state.has_left = true;
        let bytes = mem::take(&mut state.bytes);
        let unread = (mem::take(&mut state.chunks), state.end.take(), state.waker.take());
        drop(state);
        self.0.room.notify_all();
        self.0.budget.give_back(bytes);
        drop(unread);
    }
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, thread};

    use modalkit_engine::Payload;

    use super::*;

    const NO_WAIT: Duration = Duration::ZERO;

    fn ends() -> (StreamEnd, PendingStream, Arc<Budget>) {
        let budget = Arc::new(Budget::new(1 << 20));
        let (end, pending) = stream(&Arc::default(), &budget);
        (end, pending, budget)
    }

    fn now(pending: &mut PendingStream) -> Option<(Vec<Bytes>, Option<Reply>)> {
        match pending.poll_next(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(Received { chunks, end }) => Some((chunks, end)),
            Poll::Pending => None,
        }
    }

    #[test]
    fn chunks_come_in_order_before_the_end_and_nothing_after_it() {
        let (end, mut pending, budget) = ends();
        let sender = end.sender();
        assert!(now(&mut pending).is_none());
        for chunk in ["a", "b"] {
            assert_eq!(sender.send(chunk.into(), &mut { NO_WAIT }), ChunkState::Taken);
        }
        assert_eq!(budget.bytes(), 2);
        end.send(Ok(Payload::Json("{}".into())));
        assert_eq!(sender.send("c".into(), &mut { NO_WAIT }), ChunkState::Unwanted);
        sender.cut_off(JobError::Lost);
        let (chunks, reply) = now(&mut pending).unwrap();
        assert_eq!(chunks, ["a", "b"]);
        assert!(reply.unwrap().is_ok());
        assert_eq!(budget.bytes(), 0);
    }

    #[test]
    fn a_caller_who_does_not_read_holds_up_its_own_stream_and_no_more_than_the_bounds() {
        let (end, mut pending, budget) = ends();
        let sender = end.sender();
        let sent = |bytes: usize| sender.send(vec![b'1'; bytes].into(), &mut { NO_WAIT });
        let taken = (0..2 * STREAM_CHUNKS_MAX).filter(|_| sent(1) == ChunkState::Taken).count();
        assert_eq!((taken, sent(1)), (STREAM_CHUNKS_MAX, ChunkState::Full));
        assert_eq!(now(&mut pending).unwrap().0.len(), STREAM_CHUNKS_MAX);
        assert_eq!(sent(STREAM_BYTES_MAX + 1), ChunkState::Taken, "one that is larger waits alone");
        assert_eq!(sent(1), ChunkState::Full);
        assert_eq!(budget.bytes(), STREAM_BYTES_MAX + 1);
        drop(pending);
        assert_eq!((sent(1), budget.bytes()), (ChunkState::Unwanted, 0));
        assert_eq!(end.interest(), Interest::Nothing);
    }

    #[test]
    fn a_producer_waits_until_its_caller_reads_or_leaves_and_no_longer_than_it_may() {
        let (end, mut pending, _) = ends();
        let sender = end.sender();
        let fill = || while sender.send("1".into(), &mut { NO_WAIT }) == ChunkState::Taken {};
        fill();
        let mut left = Duration::from_millis(20);
        assert_eq!(sender.send("2".into(), &mut left), ChunkState::Full);
        assert_eq!(left, NO_WAIT);
        thread::scope(|scope| {
            let sent = scope.spawn(|| sender.send("2".into(), &mut Duration::from_secs(600)));
            while now(&mut pending).is_none_or(|(chunks, _)| chunks != ["2"]) {
                thread::yield_now();
            }
            assert_eq!(sent.join().unwrap(), ChunkState::Taken);
            fill();
            let sent = scope.spawn(|| sender.send("3".into(), &mut Duration::from_secs(600)));
            drop(pending);
            assert_eq!(sent.join().unwrap(), ChunkState::Unwanted);
        });
    }

    #[tokio::test]
    async fn the_receiver_is_woken_through_its_mailbox_and_told_of_a_job_that_was_lost() {
        let mailbox = Arc::new(Mailbox::default());
        let delivering = tokio::spawn({
            let mailbox = Arc::clone(&mailbox);
            async move { mailbox.deliver().await }
        });
        let (end, mut pending) = stream(&mailbox, &Arc::new(Budget::new(1)));
        let sender = end.sender();
        let producer = thread::spawn(move || {
            for number in 0..1000 {
                let chunk = Bytes::from(format!("{number}"));
                assert_eq!(sender.send(chunk, &mut Duration::from_secs(600)), ChunkState::Taken);
            }
            drop(end);
        });
        let mut seen = Vec::new();
        let end = loop {
            let Received { chunks, end } = poll_fn(|task| pending.poll_next(task)).await;
            seen.extend(chunks);
            if let Some(end) = end {
                break end;
            }
        };
        assert!(matches!(end, Err(JobError::Lost)));
        assert!(seen.iter().enumerate().all(|(number, chunk)| *chunk == number.to_string()));
        assert_eq!(seen.len(), 1000);
        producer.join().unwrap();
        delivering.abort();
    }
}
