//! Sends spans to a collector, and says once when that begins to fail, with the reason and the address, and once when it is over. What
//! can't be sent is dropped, as it says; who serves never waits for it.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::{Protocol, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkResult,
    trace::{SpanData, SpanExporter},
};
use parking_lot::Mutex;

use super::TracesError;
use crate::config::TraceSpec;

/// How long one export may take.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(5);

/// The exporter of OpenTelemetry, whose errors hold no reason.
#[derive(Debug)]
pub(super) struct Exporter {
    inner: opentelemetry_otlp::SpanExporter,
    endpoint: String,
    /// Why the last request had no answer.
    reason: Arc<Mutex<Option<String>>>,
    fails: Arc<AtomicBool>,
}

/// A client that keeps why there was no answer.
#[derive(Debug)]
struct Client {
    inner: reqwest::blocking::Client,
    reason: Arc<Mutex<Option<String>>>,
}

impl Exporter {
    pub(super) fn new(spec: &TraceSpec) -> Result<Self, TracesError> {
        let endpoint = format!("{}/v1/traces", spec.endpoint.trim_end_matches('/'));
        let refused = |source| TracesError { endpoint: endpoint.clone(), source };
        let reason = Arc::default();
        let client = Client {
            inner: client(&endpoint).map_err(|error| refused(error.into()))?,
            reason: Arc::clone(&reason),
        };
        let headers = spec.headers.iter().map(|(name, value)| (name.clone(), value.to_string()));
        let exporter = opentelemetry_otlp::SpanExporter::builder()
            .with_http()
            .with_http_client(client)
            .with_protocol(Protocol::HttpBinary)
            .with_endpoint(&endpoint)
            .with_timeout(EXPORT_TIMEOUT)
            .with_headers(headers.collect())
            .build();
        let inner = exporter.map_err(|error| refused(error.into()))?;
        Ok(Self { inner, endpoint, reason, fails: Arc::default() })
    }

    /// Whether the last export failed; kept up to date.
    pub(super) fn fails(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.fails)
    }

    fn tell(&self, result: &OTelSdkResult) {
        let endpoint = &self.endpoint;
        let reason = self.reason.lock().take();
        match result {
            Ok(()) if self.fails.swap(false, Ordering::SeqCst) => {
                tracing::info!(endpoint, "traces are exported again");
            }
            Err(error) if !self.fails.swap(true, Ordering::SeqCst) => {
                let error = reason.unwrap_or_else(|| error.to_string());
                tracing::warn!(
                    endpoint,
                    error,
                    "traces can't be exported and are dropped until they can; see server.traces.endpoint"
                );
            }
            Ok(()) | Err(_) => {}
        }
    }
}

impl SpanExporter for Exporter {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let result = self.inner.export(batch).await;
        self.tell(&result);
        // Told already: the processor would tell of each batch.
        Ok(())
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.inner.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}

impl HttpClient for Client {
    fn send_bytes<'a, 'f>(
        &'a self,
        request: Request<Bytes>,
    ) -> Pin<Box<dyn Future<Output = Result<Response<Bytes>, HttpError>> + Send + 'f>>
    where
        'a: 'f,
        Self: 'f,
    {
        Box::pin(async move {
            let answer = self.inner.send_bytes(request).await;
            if let Err(error) = &answer {
                let mut text = error.to_string();
                let mut cause = error.source();
                while let Some(error) = cause {
                    text = format!("{text}: {error}");
                    cause = error.source();
                }
                *self.reason.lock() = Some(text);
            }
            answer
        })
    }
}

fn client(endpoint: &str) -> io::Result<reqwest::blocking::Client> {
    let mut client = reqwest::blocking::Client::builder().timeout(EXPORT_TIMEOUT);
    if modalkit_queue::is_loopback(endpoint) {
        client = client.no_proxy();
    }
    // It starts a runtime of its own, which a thread with one already may not.
    let built = thread::Builder::new().spawn(move || client.build())?.join();
    built.map_err(|_| io::Error::other("the client's thread panicked"))?.map_err(io::Error::other)
}
