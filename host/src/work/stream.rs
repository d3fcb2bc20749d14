//! A reply in chunks on its way to its caller. It owns how many wait for a caller who reads slowly, and how each side hears that the other has left. It
//! never knows what a chunk says.

use std::{
    mem,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use bytes::Bytes;
use modalkit_engine::{ChunkResult, FailureKind, Interest, Payload};
use parking_lot::{Condvar, Mutex};

use super::{Budget, Deadline, JobError, Mailbox, Reply};

/// Chunks of one reply that wait for its caller.
pub(super) const CHUNKS_MAX: usize = 64;
/// Their bytes; a larger chunk waits alone.
pub(super) const BYTES_MAX: usize = 64 << 10;

/// What both sides share.
pub(super) struct ReplyStream {
    state: Mutex<State>,
    /// The caller has taken what waited, or has left.
    room: Condvar,
    mailbox: Arc<Mailbox>,
    budget: Arc<Budget>,
    /// After which nobody wants anything of it; who reads looks at it as well, and need not read.
    deadline: Instant,
}

#[derive(Default)]
struct State {
    chunks: Vec<Bytes>,
    /// Of the chunks and the end, in the budget.
    bytes: usize,
    /// Until the caller takes it.
    end: Option<Reply>,
    has_ended: bool,
    has_left: bool,
    /// Since when a chunk has found no room, and the caller has taken nothing.
    full_since: Option<Instant>,
    /// Of the task that waits for what comes next.
    waker: Option<Waker>,
    /// The mailbox has it: what else comes before it is delivered needs no further wake-up.
    is_posted: bool,
}

/// Where the lane that runs the job puts chunks.
#[derive(Clone)]
pub struct ChunkSender(Arc<ReplyStream>);

/// Ends a stream, once. Dropped unused, it says that the job was lost.
pub(super) struct StreamEnd(Arc<ReplyStream>);

/// Receives a reply in chunks. Dropped, it says that the caller has left.
pub struct PendingStream(Arc<ReplyStream>);

/// What has come.
#[derive(Debug, Default)]
pub struct Received {
    /// In order; there may be none.
    pub chunks: Vec<Bytes>,
    /// Once it is there, nothing follows.
    pub end: Option<Reply>,
}

/// Both ends of a reply in chunks, whose receiver is woken through this mailbox and whose waiting bytes count in this budget.
pub(super) fn stream(
    mailbox: &Arc<Mailbox>,
    budget: &Arc<Budget>,
    deadline: Deadline,
) -> (StreamEnd, PendingStream) {
    let stream = Arc::new(ReplyStream {
        state: Mutex::default(),
        room: Condvar::new(),
        mailbox: Arc::clone(mailbox),
        budget: Arc::clone(budget),
        deadline: deadline.0,
    });
    (StreamEnd(Arc::clone(&stream)), PendingStream(stream))
}

impl ReplyStream {
    fn interest(&self) -> Interest {
        let is_over = self.state.lock().is_over() || self.is_late();
        if is_over { Interest::Nothing } else { Interest::Chunks }
    }

    fn is_late(&self) -> bool {
        Instant::now() >= self.deadline
    }

    /// Notes the reply, unless there is one. What nobody wanted any more, or was not begun, although its caller is there, has had its time.
    fn end(self: &Arc<Self>, reply: Reply) {
        let reply = match reply {
            Err(JobError::Failed(failure)) if failure.kind == FailureKind::Unwanted => {
                Err(JobError::DeadlinePassed)
            }
            Err(JobError::Lost) if self.is_late() => Err(JobError::DeadlinePassed),
            reply => reply,
        };
        let mut state = self.state.lock();
        if state.has_ended {
            return;
        }
        if !state.has_left {
            let bytes = reply.as_ref().map_or(0, payload_bytes);
            self.budget.count(bytes);
            state.bytes += bytes;
            state.end = Some(reply);
        }
        state.has_ended = true;
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

    /// Why a chunk isn't taken now. There is always room for one alone; where bytes are scarce in the whole host, for no more than that.
    fn refusal(&mut self, bytes: usize, stream: &ReplyStream) -> Option<ChunkResult> {
        if self.is_over() {
            return Some(ChunkResult::Unwanted);
        }
        let has_room = self.chunks.is_empty()
            || self.chunks.len() < CHUNKS_MAX
                && self.bytes + bytes <= BYTES_MAX
                && stream.budget.has_room_for(bytes);
        if has_room {
            return None;
        }
        self.full_since.get_or_insert_with(Instant::now);
        Some(if stream.is_late() { ChunkResult::Unwanted } else { ChunkResult::Full })
    }

    /// Whether the receiver waits and is to be woken.
    fn posts(&mut self) -> bool {
        self.waker.is_some() && !mem::replace(&mut self.is_posted, true)
    }
}

impl ChunkSender {
    /// Puts a chunk behind the others, where there is room. A stream has one producer: the room that it has found is still there once the chunk is
    /// copied, for which whoever reads doesn't wait.
    pub fn try_send(&self, chunk: &[u8]) -> ChunkResult {
        if let Some(refused) = self.0.state.lock().refusal(chunk.len(), &self.0) {
            return refused;
        }
        let chunk = Bytes::copy_from_slice(chunk);
        let mut state = self.0.state.lock();
        if let Some(refused) = state.refusal(chunk.len(), &self.0) {
            return refused;
        }
        self.0.budget.count(chunk.len());
        state.bytes += chunk.len();
        state.chunks.push(chunk);
        let posts = state.posts();
        drop(state);
        if posts {
            self.0.mailbox.put_stream(Arc::clone(&self.0));
        }
        ChunkResult::Taken
    }

    /// Waits until a caller whose queue is full has taken something, has left, or has had its time; `false` where it has taken nothing for so long.
    #[must_use]
    pub fn wait_for_room(&self, stall_max: Duration) -> bool {
        let mut state = self.0.state.lock();
        while let Some(since) = state.full_since.filter(|_| !state.is_over()) {
            let until = self.0.deadline.min(since + stall_max);
            if self.0.room.wait_until(&mut state, until).timed_out() {
                return state.full_since.is_none() || state.is_over() || self.0.is_late();
            }
        }
        true
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
        state.full_since = None;
        let bytes = mem::take(&mut state.bytes);
        let received = Received { chunks: mem::take(&mut state.chunks), end: state.end.take() };
        drop(state);
        self.0.room.notify_all();
        self.0.budget.give_back(bytes);
        Poll::Ready(received)
    }
}

impl PendingStream {
    /// Whether its caller was cut off, of whom nothing more was heard.
    #[must_use]
    pub fn is_cut_off(&self) -> bool {
        matches!(self.0.state.lock().end, Some(Err(JobError::StoppedReading(_))))
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

fn payload_bytes(payload: &Payload) -> usize {
    payload.json().map_or(0, Bytes::len)
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, thread};

    use modalkit_engine::Failure;

    use super::*;

    const STALL_MAX: Duration = Duration::from_secs(600);

    fn deadline(from_now: Duration) -> Deadline {
        Deadline(Instant::now() + from_now)
    }

    fn ends() -> (StreamEnd, PendingStream, Arc<Budget>) {
        let budget = Arc::new(Budget::new(1 << 20));
        let (end, pending) = stream(&Arc::default(), &budget, deadline(STALL_MAX));
        (end, pending, budget)
    }

    fn now(pending: &mut PendingStream) -> Option<(Vec<Bytes>, Option<Reply>)> {
        match pending.poll_next(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(Received { chunks, end }) => Some((chunks, end)),
            Poll::Pending => None,
        }
    }

    fn fill(sender: &ChunkSender) {
        while sender.try_send(b"1") == ChunkResult::Taken {}
    }

    #[test]
    fn chunks_come_in_order_before_the_end_and_nothing_after_it() {
        let (end, mut pending, budget) = ends();
        let sender = end.sender();
        assert!(now(&mut pending).is_none());
        for chunk in [b"a", b"b"] {
            assert_eq!(sender.try_send(chunk), ChunkResult::Taken);
        }
        assert_eq!(budget.bytes(), 2);
        end.send(Ok(Payload::Json("{}".into())));
        assert_eq!(budget.bytes(), 4);
        assert_eq!(sender.try_send(b"c"), ChunkResult::Unwanted);
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
        let sent = |bytes: usize| sender.try_send(&vec![b'1'; bytes]);
        let taken = (0..2 * CHUNKS_MAX).filter(|_| sent(1) == ChunkResult::Taken).count();
        assert_eq!((taken, sent(1)), (CHUNKS_MAX, ChunkResult::Full));
        assert_eq!(now(&mut pending).unwrap().0.len(), CHUNKS_MAX);
        assert_eq!(sent(BYTES_MAX + 1), ChunkResult::Taken, "one that is larger waits alone");
        assert_eq!(sent(1), ChunkResult::Full);
        assert_eq!(budget.bytes(), BYTES_MAX + 1);
        drop(pending);
        assert_eq!((sent(1), budget.bytes()), (ChunkResult::Unwanted, 0));
        assert_eq!(end.interest(), Interest::Nothing);
        end.send(Ok(Payload::Json("{}".into())));
        assert_eq!(budget.bytes(), 0, "nobody reads the end");
    }

    #[test]
    fn where_bytes_are_scarce_one_chunk_waits_at_a_time() {
        let budget = Arc::new(Budget::new(10));
        let (end, mut pending) = stream(&Arc::default(), &budget, deadline(STALL_MAX));
        let sender = end.sender();
        budget.count(10);
        assert_eq!(sender.try_send(b"1"), ChunkResult::Taken);
        assert_eq!(sender.try_send(b"2"), ChunkResult::Full);
        now(&mut pending).unwrap();
        assert_eq!((sender.try_send(b"2"), budget.bytes()), (ChunkResult::Taken, 11));
    }

    #[test]
    fn a_producer_waits_until_its_caller_reads_or_leaves_and_no_longer_than_it_may() {
        let (end, mut pending, _) = ends();
        let sender = end.sender();
        assert!(sender.wait_for_room(STALL_MAX), "nothing was in want of room");
        fill(&sender);
        assert!(!sender.wait_for_room(Duration::from_millis(20)));
        assert!(!sender.wait_for_room(Duration::from_millis(20)), "it has stalled for that long already");
        // As long as the producer needs to begin to wait, and for all that matters longer.
        let soon = || thread::sleep(Duration::from_millis(50));
        thread::scope(|scope| {
            let waits = scope.spawn(|| sender.wait_for_room(STALL_MAX));
            soon();
            assert_eq!(now(&mut pending).unwrap().0.len(), CHUNKS_MAX);
            assert!(waits.join().unwrap());
            fill(&sender);
            let waits = scope.spawn(|| sender.wait_for_room(STALL_MAX));
            soon();
            drop(pending);
            assert!(waits.join().unwrap());
        });
        assert_eq!(sender.try_send(b"1"), ChunkResult::Unwanted);
    }

    #[test]
    fn a_job_that_was_given_up_or_not_begun_at_its_deadline_says_so() {
        let unwanted = Failure { kind: FailureKind::Unwanted, message: String::new() };
        for reply in [Some(Err(JobError::Failed(unwanted))), None] {
            let (end, mut pending) =
                stream(&Arc::default(), &Arc::new(Budget::new(1)), deadline(Duration::ZERO));
            match reply {
                Some(reply) => end.send(reply),
                None => drop(end),
            }
            assert!(matches!(now(&mut pending), Some((_, Some(Err(JobError::DeadlinePassed))))));
        }
    }

    #[test]
    fn who_does_not_read_has_no_more_time_than_its_deadline() {
        let late = deadline(Duration::from_millis(30));
        let (end, _pending) = stream(&Arc::default(), &Arc::new(Budget::new(1 << 20)), late);
        let sender = end.sender();
        assert_eq!(end.interest(), Interest::Chunks);
        fill(&sender);
        assert!(sender.wait_for_room(STALL_MAX));
        assert_eq!((sender.try_send(b"1"), end.interest()), (ChunkResult::Unwanted, Interest::Nothing));
    }

    #[tokio::test]
    async fn the_receiver_is_woken_through_its_mailbox_and_told_of_a_job_that_was_lost() {
        let mailbox = Arc::new(Mailbox::default());
        let delivering = tokio::spawn({
            let mailbox = Arc::clone(&mailbox);
            async move { mailbox.deliver().await }
        });
        let (end, mut pending) = stream(&mailbox, &Arc::new(Budget::new(1 << 20)), deadline(STALL_MAX));
        let sender = end.sender();
        let producer = thread::spawn(move || {
            for number in 0..1000 {
                while sender.try_send(number.to_string().as_bytes()) == ChunkResult::Full {
                    assert!(sender.wait_for_room(STALL_MAX));
                }
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
