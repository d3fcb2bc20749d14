//! What the metrics of one request cost: every counter and histogram that a request of a batch of one touches.

use std::{hint::black_box, time::Instant};

use modalkit::insight::{metrics::Metrics, traces::Traces};

const ROUNDS: usize = 50;
const REQUESTS: u32 = 100_000;

pub(crate) fn of_one_request() {
    let metrics = Metrics::new(Traces::default());
    let model = metrics.model("echo");
    let mut times = Vec::with_capacity(ROUNDS);
    for _ in 0..ROUNDS {
        let begun = Instant::now();
        for _ in 0..REQUESTS {
            let elapsed = black_box(0.000_123);
            model.queued.set(1);
            model.closed_full.inc();
            model.batch_size.observe(1.0);
            model.queued.set(0);
            for histogram in [
                &model.batch_wait,
                &model.queue_wait,
                &model.preprocess,
                &model.predict,
                &model.postprocess,
                &model.request,
            ] {
                histogram.observe(elapsed);
            }
            model.ok_sync.inc();
        }
        times.push(begun.elapsed().as_nanos() as f64 / f64::from(REQUESTS));
    }
    times.sort_by(f64::total_cmp);
    println!(
        "metrics of a request in a batch of one: {:.0} ns (median of {ROUNDS} rounds of {REQUESTS})",
        times[ROUNDS / 2]
    );
}
