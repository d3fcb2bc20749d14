//! The threads that serve connections: each has a runtime of its own, and a connection stays on the thread it was given
//! to. Its state stays in that core's caches, and a reply wakes a task of the same thread.

use std::{io, sync::Arc, thread};

use parking_lot::Mutex;
use tokio::{
    runtime::Handle,
    sync::{Notify, oneshot},
};

use crate::{dispatch::Queue, job::Mailbox};

/// A running thread. Dropped, it ends with all of its connections.
pub struct IoThread {
    pub(super) runtime: Handle,
    pub(super) post: Arc<Post>,
    _stop: oneshot::Sender<()>,
}

/// What one thread's connections share on the way to and from the threads that run batches.
#[derive(Default)]
pub(super) struct Post {
    /// Replies that come in.
    pub(super) mailbox: Arc<Mailbox>,
    /// Queues whose lanes are to be woken: each model's at most once.
    wakes: Mutex<Vec<Arc<Queue>>>,
    pending: Notify,
}

impl Post {
    /// Wakes a lane of this queue after every request that is ready on this thread now. The runtime runs its tasks first
    /// in, first out, so the task that this wakes comes behind them.
    pub(super) fn wake_soon(&self, queue: &Arc<Queue>) {
        let mut wakes = self.wakes.lock();
        if !wakes.iter().any(|known| Arc::ptr_eq(known, queue)) {
            wakes.push(Arc::clone(queue));
            self.pending.notify_one();
        }
    }

    async fn wake_lanes(&self) {
        loop {
            self.pending.notified().await;
            let queues = std::mem::take(&mut *self.wakes.lock());
            queues.iter().for_each(|queue| queue.wake());
        }
    }
}

impl IoThread {
    pub(super) fn start(number: usize) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let post = Arc::new(Post::default());
        let (stop, stopped) = oneshot::channel::<()>();
        let (mailbox, waking) = (Arc::clone(&post.mailbox), Arc::clone(&post));
        thread::Builder::new().name(format!("io.{number}")).spawn(move || {
            runtime.spawn(async move { mailbox.deliver().await });
            runtime.spawn(async move { waking.wake_lanes().await });
            // Nothing is ever sent: the sender's end is the signal.
            let _ = runtime.block_on(stopped);
            runtime.shutdown_background();
        })?;
        Ok(Self { runtime: handle, post, _stop: stop })
    }
}
