//! Metrics of models, and one model's looked up once.

use prometheus::{Histogram, IntCounter, IntGauge};

use super::registrar::families;
use crate::insight::traces::Traces;

families! {
    /// Of all models.
    pub(super) struct ModelFamilies {
        request: seconds("modalkit_request_seconds", "from a request's headers to its answer, of all but streams", ["model"]);
        requests: counters("modalkit_requests_total", "requests answered, streams by the status of their end (499: the caller left), those over gRPC by the status that they would have over HTTP", ["model", "endpoint", "status"]);
        first_event: seconds("modalkit_stream_first_event_seconds", "from the headers of a request for a stream to its first event", ["model"]);
        stream: seconds("modalkit_stream_seconds", "from the headers of a request for a stream to its end; these are not in modalkit_request_seconds", ["model"]);
        streams: gauges("modalkit_streams", "streams that have begun and not ended", ["model"]);
        stream_chunks: counters("modalkit_stream_chunks_total", "chunks of streams that were taken for their callers", ["model"]);
        streams_ended: counters("modalkit_streams_ended_total", "streams that had begun, by how they ended: complete, failed, left (the caller, or its connection was ended), slow (the caller read nothing for stream_wait_seconds and was cut off)", ["model", "reason"]);
        queue_wait: seconds("modalkit_queue_wait_seconds", "from a job's arrival to its batch", ["model"]);
        batch_wait: seconds("modalkit_batch_wait_seconds", "how long a batch waited to be filled while a replica was free", ["model"]);
        stage: seconds("modalkit_stage_seconds", "a batch's time in one stage", ["model", "stage"]);
        batch_size: items("modalkit_batch_size_items", "items in a batch", ["model"]);
        cost: counters("modalkit_cost_total", "cost of the items of batches that ran, in the unit of the model's pipeline (tokens, say; 1 an item where it doesn't say)", ["model"]);
        padding: counters("modalkit_padding_cost_total", "what the items of batches would cost more if each cost as much as the largest of its batch: what is lost where a pipeline pads them to one length", ["model"]);
        batches_closed: counters("modalkit_batches_closed_total", "batches by why they closed: full (max_batch_size), costly (max_batch_cost), waited (wait_ms), drained (the host or the model ends), alone (its one item runs without company)", ["model", "reason"]);
        jobs_skipped: counters("modalkit_jobs_skipped_total", "jobs dropped before they took a slot", ["model", "reason"]);
        batches_failed: counters("modalkit_batches_failed_total", "batches that failed whole, and not those whose items failed one by one", ["model", "reason"]);
        queued: gauges("modalkit_queued_jobs", "jobs that wait", ["model"]);
        replicas: gauges("modalkit_replicas", "replicas that serve", ["model"]);
        replicas_stuck: gauges("modalkit_replicas_stuck", "threads that overran their time and have not come back, of earlier generations too", ["model"]);
        replicas_given_up: counters("modalkit_replicas_given_up_total", "replicas given up after batch_timeout_seconds", ["model"]);
        item_reruns: counters("modalkit_item_reruns_total", "items that ran again since their batch came to nothing: in halves of it where it had failed as a whole (halved), without company where its process had died (alone)", ["model", "reason"]);
        worker_deaths: counters("modalkit_worker_deaths_total", "worker processes that died while they should have served, by themselves or killed after batch_timeout_seconds", ["model"]);
        workers_recycled: counters("modalkit_workers_recycled_total", "worker processes replaced after recycle_after_batches or recycle_after_mb", ["model"]);
        ready: gauges("modalkit_model_ready", "1 while the model serves", ["model"]);
        reloads: counters("modalkit_reloads_total", "changes of a model's plugin by how they ended", ["model", "outcome"]);
        hooks: counters("modalkit_volume_hooks_total", "calls of on_volume_reload by how they ended", ["model", "outcome"]);
        generation: gauges("modalkit_generation", "the generation that serves", ["model"]);
    }
}

/// One model's metrics, looked up once.
pub struct ModelMetrics {
    /// Where spans go.
    pub traces: Traces,
    /// From a request's headers to its answer, seconds.
    pub request: Histogram,
    /// Requests to `/predict_sync` answered with 200.
    pub ok_sync: IntCounter,
    /// Requests to `/predict_batch` answered with 200.
    pub ok_batch: IntCounter,
    /// Requests to `/predict_async` answered with 200.
    pub ok_async: IntCounter,
    /// Requests to `/v2/models/{name}/infer` answered with 200.
    pub ok_infer: IntCounter,
    /// Requests to `ModelInfer` over gRPC answered well.
    pub ok_grpc_infer: IntCounter,
    /// Requests in `ModelStreamInfer` over gRPC answered well.
    pub ok_grpc_stream: IntCounter,
    /// Requests to `/v1/embeddings` answered with 200.
    pub ok_embedding: IntCounter,
    /// Requests to `/v1/completions` answered with 200, or whose streams ended well.
    pub ok_completion: IntCounter,
    /// The same to `/v1/chat/completions`.
    pub ok_chat: IntCounter,
    /// Requests to `/predict_stream` whose streams ended well.
    pub ok_stream: IntCounter,
    /// From the headers of a request for a stream to its first event, seconds.
    pub first_event: Histogram,
    /// From the headers of a request for a stream to its end, seconds.
    pub stream: Histogram,
    /// Streams that have begun and not ended.
    pub streams: IntGauge,
    /// Chunks of streams.
    pub stream_chunks: IntCounter,
    /// Streams that came to their end.
    pub streams_complete: IntCounter,
    /// Streams that ended with an error.
    pub streams_failed: IntCounter,
    /// Streams whose callers left.
    pub streams_left: IntCounter,
    /// Streams whose callers read too slowly.
    pub streams_slow: IntCounter,
    /// From a job's arrival to its batch, seconds.
    pub queue_wait: Histogram,
    /// How long a batch waited to be filled while a replica was free, seconds.
    pub batch_wait: Histogram,
    /// Seconds in `preprocess`.
    pub preprocess: Histogram,
    /// Seconds in `predict`.
    pub predict: Histogram,
    /// Seconds in `postprocess`.
    pub postprocess: Histogram,
    /// Items in a batch.
    pub batch_size: Histogram,
    /// Cost of the items of batches that ran.
    pub cost: IntCounter,
    /// What would be padded.
    pub padding: IntCounter,
    /// Batches closed because they were full.
    pub closed_full: IntCounter,
    /// Batches closed because of what they cost.
    pub closed_costly: IntCounter,
    /// Batches closed because `wait_ms` had passed.
    pub closed_waited: IntCounter,
    /// Batches closed because no more jobs would come.
    pub closed_drained: IntCounter,
    /// Batches of one job that came back.
    pub closed_alone: IntCounter,
    /// Items that ran again without company.
    pub reruns_alone: IntCounter,
    /// Items that ran again in a half of their batch.
    pub reruns_halved: IntCounter,
    /// Worker processes that died.
    pub worker_deaths: IntCounter,
    /// Worker processes replaced by fresh ones.
    pub workers_recycled: IntCounter,
    /// Batches whose process died.
    pub died: IntCounter,
    /// Jobs dropped before they took a slot because the caller had left.
    pub skipped_cancelled: IntCounter,
    /// Jobs dropped before they took a slot because the deadline had passed.
    pub skipped_expired: IntCounter,
    /// Batches that failed whole in a stage.
    pub failed: IntCounter,
    /// Batches that failed because the plugin panicked.
    pub panicked: IntCounter,
    /// Batches that overran `batch_timeout_seconds`.
    pub timed_out: IntCounter,
    /// Jobs that wait.
    pub queued: IntGauge,
    /// Replicas that serve.
    pub replicas: IntGauge,
    /// Replicas that were given up and whose threads haven't come back.
    pub replicas_stuck: IntGauge,
    /// Replicas that were given up, ever.
    pub replicas_given_up: IntCounter,
    /// 1 while the model serves.
    pub ready: IntGauge,
}

/// The words that [`ReloadMetrics::outcome`] knows.
pub const RELOAD_OUTCOMES: [&str; 5] = ["swapped", "rolled_back", "refused", "superseded", "stopped"];

/// One model's reloads.
pub struct ReloadMetrics {
    pub(super) outcomes: [IntCounter; RELOAD_OUTCOMES.len()],
    /// Calls of `on_volume_reload` that went well on every replica.
    pub hooks_ok: IntCounter,
    /// Calls of `on_volume_reload` that failed on some replica.
    pub hooks_failed: IntCounter,
    /// The number of the generation that serves.
    pub generation: IntGauge,
}

impl ReloadMetrics {
    /// The counter of changes that ended so.
    ///
    /// # Panics
    /// Where the word is none of [`RELOAD_OUTCOMES`].
    #[must_use]
    pub fn outcome(&self, word: &str) -> &IntCounter {
        let known = RELOAD_OUTCOMES.iter().position(|known| *known == word);
        &self.outcomes[known.expect("a word of RELOAD_OUTCOMES")]
    }
}
