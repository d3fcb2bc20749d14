//! Speaks HTTP/1.1 or HTTP/2 on a connection. It owns the connection's timeouts, what it may buffer, and its end. What is asked it knows of
//! connections for probes alone, which get nothing else.

use std::{
    convert::Infallible,
    future::poll_fn,
    io,
    pin::pin,
    sync::{Arc, atomic::Ordering},
    task::Poll,
    time::{Duration, Instant},
};

use hyper::{
    Method, Request,
    body::Incoming,
    server::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::graceful::GracefulConnection,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    sync::watch,
    time::{sleep, timeout},
};
use tokio_rustls::TlsAcceptor;

use super::{
    connection_slots::ConnectionSlot,
    exchange::Exchange,
    grpc, lingering_close,
    peer::Peer,
    request_headers::{Known, put_headers},
    response_body::respond,
    router,
    write_limit::WriteLimit,
};
use crate::{
    egress::{self, HttpResponse, and_close},
    work::JobError,
};

/// An HTTP/2 peer that doesn't answer a ping within this time is gone.
const PING_INTERVAL: Duration = Duration::from_secs(20);
/// How long a connection may ask for nothing that has carried a call of gRPC: its clients keep channels open for as long as they run, and take one that
/// ends for a failure.
const GRPC_IDLE_TIME: Duration = Duration::from_secs(1800);
/// Requests that one HTTP/2 connection may have open.
const STREAMS_MAX: u32 = 256;
/// Bytes that the caller may send ahead on one stream of HTTP/2, and on all streams of a connection.
const STREAM_WINDOW_BYTES: u32 = 256 << 10;
const CONNECTION_WINDOW_BYTES: u32 = 1 << 20;
/// Bytes of one answer that HTTP/2 asks for ahead of what its caller takes.
const STREAM_SEND_BYTES: usize = 64 << 10;
/// Between two looks whether the answers of an HTTP/2 connection get anywhere.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);
/// Such looks within the limit, at least.
const PROGRESS_LOOKS: u32 = 4;

/// What a connection may ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// Anything.
    Any,
    /// `/livez` and `/readyz`, once.
    Probes,
}

/// Serves a connection to its end, on the thread that it was given to.
pub(super) async fn run(
    peer: Arc<Peer>,
    stream: std::net::TcpStream,
    http2: bool,
    tls: Option<TlsAcceptor>,
    _slot: ConnectionSlot,
    shutdown: watch::Receiver<bool>,
) {
    begin(Arc::clone(&peer), stream, http2, tls, shutdown).await;
    lingering_close::finish(&peer).await;
}

async fn begin(
    peer: Arc<Peer>,
    stream: std::net::TcpStream,
    http2: bool,
    tls: Option<TlsAcceptor>,
    mut shutdown: watch::Receiver<bool>,
) {
    // It is this thread's runtime that watches the socket from here on.
    let Ok(stream) = TcpStream::from_std(stream) else { return };
    let stream = WriteLimit::new(stream, Arc::clone(&peer));
    let Some(tls) = tls else { return speak(stream, http2, Role::Any, peer, shutdown).await };
    let begun = tokio::select! {
        begun = timeout(peer.context.server.header_timeout, tls.accept(stream)) => begun,
        () = ended(&mut shutdown) => return,
    };
    match begun.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
        Ok(stream) => {
            // Who speaks HTTP/2 over TLS says so in the handshake.
            let http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
            Box::pin(speak(stream, http2, Role::Any, peer, shutdown)).await;
        }
        Err(error) => {
            tracing::debug!(peer = %peer.from, %error, "a connection ended before it asked for anything");
        }
    }
}

/// Speaks HTTP on a connection that has said which version.
pub(super) async fn speak(
    stream: impl AsyncRead + AsyncWrite + Unpin + 'static,
    http2: bool,
    role: Role,
    peer: Arc<Peer>,
    shutdown: watch::Receiver<bool>,
) {
    let begin = {
        let peer = Arc::clone(&peer);
        move || {
            peer.asked.store(true, Ordering::Relaxed);
            Exchange::begin(Arc::clone(&peer), http2)
        }
    };
    let stream = TokioIo::new(stream);
    let server = &peer.context.server;
    if http2 {
        let mut protocol = http2::Builder::new(TokioExecutor::new());
        protocol
            .timer(TokioTimer::new())
            .keep_alive_interval(PING_INTERVAL)
            .keep_alive_timeout(PING_INTERVAL)
            .max_concurrent_streams(STREAMS_MAX)
            .max_header_list_size(server.header_bytes_max as u32)
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .max_send_buf_size(STREAM_SEND_BYTES);
        // Each request is a task of its own. What it may become is boxed: a task is as large as the largest of it.
        let service = service_fn(move |request| {
            let exchange = begin();
            async move {
                let response = match role {
                    Role::Any if grpc::is_call(&request) => {
                        return Ok(Box::pin(grpc::answer(exchange, request)).await);
                    }
                    Role::Any => Box::pin(router::answer(&exchange, request)).await,
                    Role::Probes => Box::pin(answer_probe(&exchange, request)).await,
                };
                Ok::<_, Infallible>(respond(exchange, response))
            }
        });
        tokio::select! {
            () = drive(protocol.serve_connection(stream, service), &peer, shutdown) => {}
            () = idled(&peer) => tracing::debug!(peer = %peer.from, "a connection asked for nothing any more"),
            () = stalled(&peer) => tracing::debug!(peer = %peer.from, "a connection took nothing of its answers any more (server.write_timeout_ms)"),
        }
    } else {
        let service = service_fn(move |request| {
            let exchange = begin();
            async move {
                let response = match role {
                    Role::Any => router::answer(&exchange, request).await,
                    Role::Probes => Box::pin(answer_probe(&exchange, request)).await,
                };
                Ok::<_, Infallible>(respond(exchange, response))
            }
        });
        let mut protocol = http1::Builder::new();
        protocol
            .timer(peer.timer.clone())
            .header_read_timeout(server.keep_alive_timeout)
            .max_buf_size(server.header_bytes_max);
        drive(protocol.serve_connection(stream, service), &peer, shutdown).await;
    }
}

/// Answers on the thread that never runs plugin code; the next request is for another connection, and may be for another thread.
async fn answer_probe(exchange: &Exchange, request: Request<Incoming>) -> HttpResponse {
    if [Method::GET, Method::HEAD].contains(request.method())
        && ["/livez", "/readyz"].contains(&request.uri().path())
    {
        return and_close(router::answer(exchange, request).await);
    }
    let context = &exchange.context;
    context.metrics.connections_refused.with_label_values(&["unavailable"]).inc();
    let full = JobError::Unavailable(
        "too many connections are open (server.connections_max, server.connections_per_address_max)".into(),
    );
    let mut response = and_close(egress::error(&full));
    let headers = request.into_parts().0.headers;
    let id = context.ids.of(&Known::of(&headers));
    put_headers(&mut response, &id, headers);
    response
}

/// Drives a connection to its end. HTTP/1 has a header timeout of its own; HTTP/2 has none before its first request.
///
/// This is polled with every request, so it looks at its two other concerns only when it must: their wakers are this
/// task's, which stays the same, and were left with them in the first poll.
async fn drive<C>(connection: C, peer: &Peer, mut shutdown: watch::Receiver<bool>)
where
    C: GracefulConnection<Error = hyper::Error>,
{
    let mut connection = pin!(connection);
    let mut first_request = pin!(peer.timer.limit(Instant::now() + peer.context.server.header_timeout));
    let mut shutdown = pin!(ended(&mut shutdown));
    let mut started = false;
    let mut draining = false;
    let ending = poll_fn(|task| {
        if let Poll::Ready(ended) = connection.as_mut().poll(task) {
            return Poll::Ready(ended.err().map_or(Ending::Done, Ending::Early));
        }
        if !peer.asked.load(Ordering::Relaxed) && first_request.as_mut().poll(task).is_ready() {
            return Poll::Ready(Ending::Silent);
        }
        let look = !started || peer.context.gate.is_closed();
        started = true;
        if look && !draining && shutdown.as_mut().poll(task).is_ready() {
            draining = true;
            connection.as_mut().graceful_shutdown();
            task.waker().wake_by_ref();
        }
        Poll::Pending
    });
    match ending.await {
        Ending::Done => {}
        Ending::Early(error) => tracing::debug!(peer = %peer.from, %error, "a connection ended early"),
        Ending::Silent => tracing::debug!(peer = %peer.from, "a connection asked for nothing in time"),
    }
}

/// Returns when nothing was asked on an HTTP/2 connection for `keep_alive_timeout` or up to twice that. Its pings prove that somebody
/// is there, and not that they want anything.
async fn idled(peer: &Peer) {
    let mut seen = peer.begun.load(Ordering::Relaxed);
    loop {
        let speaks_grpc = peer.speaks_grpc.load(Ordering::Relaxed);
        sleep(if speaks_grpc { GRPC_IDLE_TIME } else { peer.context.server.keep_alive_timeout }).await;
        let begun = peer.begun.load(Ordering::Relaxed);
        if begun == seen && peer.open.load(Ordering::Relaxed) == 0 {
            return;
        }
        seen = begun;
    }
}

/// Returns when answers of an HTTP/2 connection wait and its caller has taken nothing of any for the limit. Its flow control keeps them
/// from the socket, whose own limit never sees them.
async fn stalled(peer: &Peer) {
    let look = PROGRESS_INTERVAL.min(peer.context.server.write_timeout / PROGRESS_LOOKS);
    let mut since = Instant::now();
    loop {
        sleep(look).await;
        if peer.progressed.swap(false, Ordering::Relaxed) || peer.unwritten.load(Ordering::Relaxed) == 0 {
            since = Instant::now();
        } else if since.elapsed() >= peer.write_time_max() {
            return;
        }
    }
}

enum Ending {
    Done,
    Early(hyper::Error),
    Silent,
}

pub(super) async fn ended(shutdown: &mut watch::Receiver<bool>) {
    // A sender that is gone means the same.
    let _ = shutdown.wait_for(|ended| *ended).await;
}
