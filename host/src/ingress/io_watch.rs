//! Watches the threads that serve connections: a plugin that holds one for too long decodes elsewhere from then on. It owns the ticks
//! by which that is measured, so that requests read no clock.

use std::{
    io,
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use super::io_threads::IoThreads;
use crate::{dispatch::Models, pipeline::Generation};

/// Between two looks.
const TICK: Duration = Duration::from_millis(10);
/// What a plugin may take to decode an input on such a thread, in ticks: 100 ms. A busy machine may take the thread off its core for
/// tens of milliseconds; that is not the plugin's doing.
const DECODE_TICKS_MAX: u64 = 10;

/// Ticks since the start. They stand still with the process, as when it is suspended.
#[derive(Default)]
pub(super) struct Ticks(AtomicU64);

impl Ticks {
    pub(super) fn now(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// Whether what began then has taken too long.
    pub(super) fn are_too_many_since(&self, then: u64) -> bool {
        self.now().saturating_sub(then) > DECODE_TICKS_MAX
    }

    pub(super) fn advance(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// Starts the watch; it ends with the threads.
pub(super) fn start(threads: &Arc<IoThreads>, ticks: Arc<Ticks>, models: Arc<Models>) -> io::Result<()> {
    let threads: Weak<IoThreads> = Arc::downgrade(threads);
    thread::Builder::new().name("io watch".to_owned()).spawn(move || {
        loop {
            thread::sleep(TICK);
            ticks.advance();
            let Some(threads) = threads.upgrade() else { return };
            for address in threads.overruns() {
                move_elsewhere(&models, address);
            }
        }
    })?;
    Ok(())
}

/// Has the generation at this address decode elsewhere. One that serves no more is never found.
fn move_elsewhere(models: &Models, address: usize) {
    for (name, model) in models.all().iter() {
        if let Ok(generation) = model.serving()
            && Arc::as_ptr(&generation) as usize == address
        {
            mark(name, &generation);
        }
    }
}

fn mark(model: &str, generation: &Generation) {
    if generation.decode_elsewhere() {
        let limit = TICK * DECODE_TICKS_MAX as u32;
        tracing::warn!(
            model,
            generation = generation.number,
            ?limit,
            "the plugin held a thread that serves connections for too long while it parsed and validated an input: until its next generation it does so on threads of its own (as for inputs over server.decode_inline_bytes_max)"
        );
    }
}
