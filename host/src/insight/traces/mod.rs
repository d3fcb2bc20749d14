//! Spans over OTLP: one for each request that is sampled, and one for each batch with such a request in it, which links them. It
//! never knows what is asked; who serves goes on whether or not anybody takes the spans.

mod export;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use opentelemetry::{
    Context, KeyValue,
    propagation::{Extractor, TextMapPropagator},
    trace::{Link, Span, SpanBuilder, SpanKind, Status, TraceContextExt, Tracer, TracerProvider},
};
use opentelemetry_sdk::{
    Resource,
    propagation::TraceContextPropagator,
    trace::{Sampler, SdkTracer, SdkTracerProvider, Span as SdkSpan},
};

use self::export::Exporter;
use crate::{
    config::TraceSpec,
    insight::{BatchTimings, JobTimings, SpanContext},
};

/// How long the last spans may take on their way when the host ends.
const FLUSH_TIME_MAX: Duration = Duration::from_secs(2);
/// Links of one span: a batch holds no more jobs.
const LINKS_MAX: u32 = 1000;

/// Where spans go; nowhere by default. A clone is the same.
#[derive(Clone, Default)]
pub struct Traces(Option<Arc<Exporting>>);

struct Exporting {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
    /// As the configuration has it.
    configured_ratio: f64,
    /// As it is now: the bits of a number of 64.
    sample_ratio: AtomicU64,
    /// Whether the last export failed.
    fails: Arc<AtomicBool>,
}

/// Why there are no spans.
#[derive(Debug, thiserror::Error)]
#[error("can't export traces to {endpoint} (server.traces)")]
pub struct TracesError {
    endpoint: String,
    #[source]
    source: Box<dyn std::error::Error + Send + Sync>,
}

/// One request's span, ended when it is answered.
pub struct RequestSpan(SdkSpan);

/// How a request ended.
pub struct Ended<'a> {
    /// The HTTP status.
    pub status: u16,
    /// The model; empty where none was found.
    pub model: &'a str,
    /// The request's id.
    pub request_id: String,
    /// The jobs of its jobs.
    pub jobs: &'a [Arc<JobTimings>],
}

impl Exporting {
    fn ratio(&self) -> f64 {
        f64::from_bits(self.sample_ratio.load(Ordering::Relaxed))
    }
}

impl Traces {
    /// Starts to export, from a thread of its own.
    ///
    /// # Errors
    /// The endpoint is no address.
    pub fn export(spec: &TraceSpec, app_name: &str) -> Result<Self, TracesError> {
        let resource = Resource::builder_empty()
            .with_service_name(app_name.to_owned())
            .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
            .build();
        let exporter = Exporter::new(spec)?;
        let fails = exporter.fails();
        let provider = SdkTracerProvider::builder()
            .with_batch_exporter(exporter)
            // What is sampled is decided before a span is made.
            .with_sampler(Sampler::AlwaysOn)
            .with_max_links_per_span(LINKS_MAX)
            .with_resource(resource)
            .build();
        let tracer = provider.tracer("modalkit");
        let configured_ratio = spec.sample_ratio;
        let sample_ratio = configured_ratio.to_bits().into();
        Ok(Self(Some(Arc::new(Exporting { provider, tracer, configured_ratio, sample_ratio, fails }))))
    }

    /// Whether spans go anywhere.
    #[must_use]
    pub fn is_exporting(&self) -> bool {
        self.0.is_some()
    }

    /// The share of requests that are sampled where their callers haven't decided; `None` where spans go nowhere.
    #[must_use]
    pub fn sample_ratio(&self) -> Option<f64> {
        self.0.as_ref().map(|exporting| exporting.ratio())
    }

    /// Samples such a share from now on, or, for `None`, the configured one. Nothing where spans go nowhere.
    pub fn set_sample_ratio(&self, ratio: Option<f64>) {
        if let Some(exporting) = &self.0 {
            let ratio = ratio.unwrap_or(exporting.configured_ratio);
            exporting.sample_ratio.store(ratio.to_bits(), Ordering::Relaxed);
        }
    }

    /// A request's span, where it is sampled: as its caller has decided (`traceparent`), else by the ratio.
    #[must_use]
    pub fn begin(&self, name: &'static str, headers: &impl Extractor) -> Option<RequestSpan> {
        let exporting = self.0.as_ref()?;
        let parent = match headers.get("traceparent") {
            Some(_) => TraceContextPropagator::new().extract_with_context(&Context::new(), headers),
            None => Context::new(),
        };
        let caller = parent.span().span_context().clone();
        let sampled =
            if caller.is_valid() { caller.is_sampled() } else { fastrand::f64() < exporting.ratio() };
        if !sampled {
            return None;
        }
        let builder = SpanBuilder::from_name(name).with_kind(SpanKind::Server);
        Some(RequestSpan(exporting.tracer.build_with_context(builder, &parent)))
    }

    /// The spans of a batch and its stages, linked with its jobs'. Returns the batch's.
    #[must_use]
    pub fn batch(
        &self,
        model: &str,
        batch: &BatchTimings,
        mut jobs: Vec<SpanContext>,
    ) -> Option<SpanContext> {
        let exporting = self.0.as_ref().filter(|_| !jobs.is_empty())?;
        // A request may have many jobs in a batch, and one link says so.
        jobs.sort_by_key(|job| job.span_id().to_bytes());
        jobs.dedup_by_key(|job| job.span_id());
        let links = jobs.into_iter().map(|job| Link::new(job, Vec::new(), 0)).collect();
        let mut span = exporting.tracer.build_with_context(
            SpanBuilder::from_name("batch")
                .with_start_time(moment(batch.taken))
                .with_links(links)
                .with_attributes([
                    KeyValue::new("modalkit.model", model.to_owned()),
                    KeyValue::new("modalkit.batch.size", batch.size as i64),
                    KeyValue::new(
                        "modalkit.batch.closed",
                        format!("{:?}", batch.closed).to_ascii_lowercase(),
                    ),
                    KeyValue::new("modalkit.generation", batch.generation as i64),
                    KeyValue::new("modalkit.replica", batch.replica as i64),
                ]),
            &Context::new(),
        );
        let context = span.span_context().clone();
        let inside = Context::new().with_remote_span_context(context.clone());
        for (stage, begun, ended) in batch.stages() {
            let builder = SpanBuilder::from_name(stage).with_start_time(moment(begun));
            exporting.tracer.build_with_context(builder, &inside).end_with_timestamp(moment(ended));
        }
        span.end_with_timestamp(moment(batch.ended));
        Some(context)
    }

    /// Ends a request's span.
    pub fn end(&self, span: RequestSpan, ended: &Ended<'_>) {
        let (RequestSpan(mut span), Some(exporting)) = (span, self.0.as_ref()) else { return };
        span.set_attribute(KeyValue::new("http.response.status_code", i64::from(ended.status)));
        span.set_attribute(KeyValue::new("modalkit.request_id", ended.request_id.clone()));
        if !ended.model.is_empty() {
            span.set_attribute(KeyValue::new("modalkit.model", ended.model.to_owned()));
        }
        if ended.status >= 500 {
            span.set_status(Status::error(""));
        }
        let inside = Context::new().with_remote_span_context(span.span_context().clone());
        let mut batches: Vec<*const BatchTimings> = Vec::new();
        for ran in ended.jobs.iter().filter_map(|timings| timings.ran()) {
            if batches.contains(&Arc::as_ptr(&ran.batch)) {
                continue;
            }
            batches.push(Arc::as_ptr(&ran.batch));
            let builder = SpanBuilder::from_name("queue").with_start_time(moment(ran.arrived));
            exporting.tracer.build_with_context(builder, &inside).end_with_timestamp(moment(ran.batch.taken));
            if let Some(batch) = &ran.batch.span {
                span.add_link(batch.clone(), Vec::new());
            }
        }
        span.end();
    }

    /// Sends what is left; blocking.
    pub fn stop(&self) {
        let Some(exporting) = &self.0 else { return };
        // The exporter tells the processor of no failure, so that only one of them logs it.
        match exporting.provider.shutdown_with_timeout(FLUSH_TIME_MAX) {
            Err(error) => tracing::warn!(%error, "the last spans were not exported"),
            Ok(()) if exporting.fails.load(Ordering::SeqCst) => {
                tracing::warn!(error = "the export failed", "the last spans were not exported");
            }
            Ok(()) => {}
        }
    }
}

impl RequestSpan {
    /// What others refer to it by.
    #[must_use]
    pub fn context(&self) -> SpanContext {
        self.0.span_context().clone()
    }
}

/// As the header `traceparent`.
#[must_use]
pub fn traceparent(span: &SpanContext) -> String {
    format!("00-{}-{}-{:02x}", span.trace_id(), span.span_id(), span.trace_flags())
}

/// A moment of the monotonic clock, on the wall's.
fn moment(instant: Instant) -> SystemTime {
    SystemTime::now() - instant.elapsed()
}
