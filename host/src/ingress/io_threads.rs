//! The threads that serve connections: each has a runtime of its own, and a connection stays on the thread it was given
//! to. Its state stays in that core's caches, and a reply wakes a task of the same thread. Plugins decode small inputs on them; who
//! does so for too long is known, and gets no new connections meanwhile.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    thread,
};

use parking_lot::Mutex;
use tokio::{
    runtime::Handle,
    sync::{Notify, oneshot},
};

use super::ticks::Ticks;
use crate::{
    pipeline::{Generation, Queue},
    work::Mailbox,
};

/// All of them, and those that stand in while others are stuck.
pub(super) struct IoThreads {
    running: Mutex<Running>,
    threads_max: usize,
    ticks: Arc<Ticks>,
}

struct Running {
    threads: Vec<IoThread>,
    next: usize,
}

/// A running thread. Dropped, it ends with all of its connections.
pub(super) struct IoThread {
    pub(super) runtime: Handle,
    pub(super) io: Arc<IoContext>,
    _stop: oneshot::Sender<()>,
}

/// What one thread's connections share on the way to and from the threads that run batches.
pub(super) struct IoContext {
    /// Replies that come in.
    pub(super) mailbox: Arc<Mailbox>,
    /// Queues whose lanes are to be woken: each model's at most once.
    wakes: Mutex<Vec<Arc<Queue>>>,
    pending: Notify,
    decoding: Decoding,
    ticks: Arc<Ticks>,
}

/// What a thread decodes at the moment. Others only look: who writes is the thread itself.
#[derive(Default)]
#[repr(align(128))]
struct Decoding {
    /// The generation's address; 0 while no plugin code runs.
    generation: AtomicUsize,
    since: AtomicU64,
}

/// Plugin code is called while this lives.
pub(super) struct Decodes<'p>(&'p Decoding);

impl Drop for Decodes<'_> {
    fn drop(&mut self) {
        self.0.generation.store(0, Ordering::Release);
    }
}

impl IoContext {
    fn new(ticks: Arc<Ticks>) -> Self {
        Self {
            mailbox: Arc::default(),
            wakes: Mutex::default(),
            pending: Notify::new(),
            decoding: Decoding::default(),
            ticks,
        }
    }

    /// Wakes a lane of this queue after every request that is ready on this thread now. The runtime runs its tasks first
    /// in, first out, so the task that this wakes comes behind them.
    pub(super) fn wake_soon(&self, queue: &Arc<Queue>) {
        let mut wakes = self.wakes.lock();
        if !wakes.iter().any(|known| Arc::ptr_eq(known, queue)) {
            wakes.push(Arc::clone(queue));
            self.pending.notify_one();
        }
    }

    /// Notes that this generation's plugin is called on this thread.
    pub(super) fn decodes(&self, generation: &Arc<Generation>) -> Decodes<'_> {
        self.decoding.since.store(self.ticks.now(), Ordering::Relaxed);
        self.decoding.generation.store(Arc::as_ptr(generation) as usize, Ordering::Release);
        Decodes(&self.decoding)
    }

    /// The address of the generation whose plugin has been at work on this thread for too long.
    pub(super) fn overrun(&self) -> Option<usize> {
        let Decoding { generation, since } = &self.decoding;
        let address = generation.load(Ordering::Acquire);
        // If another call has begun in between, `since` is the newer one's: no false alarm.
        let over = self.ticks.are_too_many_since(since.load(Ordering::Relaxed));
        (address != 0 && over).then_some(address)
    }

    async fn wake_lanes(&self) {
        loop {
            self.pending.notified().await;
            let queues = std::mem::take(&mut *self.wakes.lock());
            queues.iter().for_each(|queue| queue.wake());
        }
    }
}

impl IoThreads {
    /// Starts this many; as many again may stand in for those that are stuck.
    pub(super) fn start(count: usize, ticks: Arc<Ticks>) -> io::Result<Arc<Self>> {
        let threads = (0..count)
            .map(|number| IoThread::start(&format!("io.{number}"), &ticks))
            .collect::<io::Result<_>>()?;
        Ok(Arc::new(Self {
            running: Mutex::new(Running { threads, next: 0 }),
            threads_max: 2 * count,
            ticks,
        }))
    }

    /// The thread for the next connection: one that isn't stuck, as long as there is any or one more may be started.
    pub(super) fn next(&self) -> (Handle, Arc<IoContext>) {
        let mut running = self.running.lock();
        let Running { threads, next } = &mut *running;
        let count = threads.len();
        let found =
            (0..count).map(|step| (*next + step) % count).find(|at| threads[*at].io.overrun().is_none());
        let at = found.or_else(|| self.start_spare(threads)).unwrap_or(*next % count);
        *next = at + 1;
        (threads[at].runtime.clone(), Arc::clone(&threads[at].io))
    }

    fn start_spare(&self, threads: &mut Vec<IoThread>) -> Option<usize> {
        let at = threads.len();
        if at >= self.threads_max {
            return None;
        }
        match IoThread::start(&format!("io.{at}"), &self.ticks) {
            Ok(thread) => {
                tracing::warn!(
                    threads = at + 1,
                    "plugins hold every thread that serves connections; one more is started"
                );
                threads.push(thread);
                Some(at)
            }
            Err(error) => {
                tracing::error!(%error, "no further thread can be started to serve connections");
                None
            }
        }
    }

    /// The generations whose plugins hold a thread, by address.
    pub(super) fn overruns(&self) -> Vec<usize> {
        self.running.lock().threads.iter().filter_map(|thread| thread.io.overrun()).collect()
    }
}

impl IoThread {
    pub(super) fn start(name: &str, ticks: &Arc<Ticks>) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let io = Arc::new(IoContext::new(Arc::clone(ticks)));
        let (stop, stopped) = oneshot::channel::<()>();
        let (mailbox, waking) = (Arc::clone(&io.mailbox), Arc::clone(&io));
        thread::Builder::new().name(name.to_owned()).spawn(move || {
            runtime.spawn(async move { mailbox.deliver().await });
            runtime.spawn(async move { waking.wake_lanes().await });
            // Nothing is ever sent: the sender's end is the signal.
            let _ = runtime.block_on(stopped);
            runtime.shutdown_background();
        })?;
        Ok(Self { runtime: handle, io, _stop: stop })
    }
}
