//! Watches the threads that serve connections: a plugin that holds one for too long decodes elsewhere from then on. It advances the
//! ticks by which that is measured.

use std::{
    io,
    sync::{Arc, Weak},
    thread,
    time::Duration,
};

use super::{
    io_threads::IoThreads,
    ticks::{DECODE_TICKS_MAX, Ticks},
};
use crate::{models::Models, pipeline::Generation};

/// Between two checks. Each wakes a core, 50 µs on a small virtual machine, whether or not anybody asks for anything.
const TICK: Duration = Duration::from_millis(25);

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
