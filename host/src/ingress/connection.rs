//! Accepts connections and speaks HTTP/1.1 or HTTP/2 on each. It owns their number, their timeouts and their end, and
//! never knows what is asked.

use std::{
    convert::Infallible,
    future::poll_fn,
    io,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::Poll,
    time::{Duration, Instant},
};

use hyper::{
    server::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::graceful::GracefulConnection,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, Interest},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    time::timeout,
};

use tokio_rustls::{TlsAcceptor, server::TlsStream};

use super::{
    Context,
    io_threads::{IoThread, Post},
    routes,
    timer::ConnectionTimer,
};
use crate::access::Origin;

/// After a failed `accept` (out of file descriptors, say), the wait until the next.
const ACCEPT_RETRY: Duration = Duration::from_millis(50);
/// What an HTTP/2 connection begins with, as far as it takes to tell it from any HTTP/1 method.
const HTTP2_PREFACE: &[u8] = b"PRI ";
/// Between two looks at a connection that has sent a part of those bytes.
const PREFACE_RETRY: Duration = Duration::from_millis(5);
/// An HTTP/2 peer that doesn't answer a ping within this time is gone.
const PING_INTERVAL: Duration = Duration::from_secs(20);
/// Requests that one HTTP/2 connection may have open.
const STREAMS_MAX: u32 = 256;

/// What the requests of one connection share.
pub(super) struct Peer {
    pub(super) context: Arc<Context>,
    pub(super) from: Origin,
    pub(super) post: Arc<Post>,
    pub(super) timer: ConnectionTimer,
    asked: AtomicBool,
    /// Requests of an HTTP/2 connection: those that are open, and how many there ever were.
    open: AtomicUsize,
    begun: AtomicUsize,
}

/// An open port and the threads behind it.
pub struct Listener {
    listener: TcpListener,
    threads: Vec<IoThread>,
    context: Arc<Context>,
    tls: Option<TlsAcceptor>,
}

impl Listener {
    /// Starts the threads; with an acceptor, connections begin with a handshake of TLS.
    ///
    /// # Errors
    /// The system gives no more threads.
    pub fn new(listener: TcpListener, context: Arc<Context>, tls: Option<TlsAcceptor>) -> io::Result<Self> {
        let threads = (0..context.server.io_threads).map(IoThread::start).collect::<io::Result<_>>()?;
        Ok(Self { listener, threads, context, tls })
    }

    /// Accepts connections until `shutdown` turns true, and closes the port then. Open connections end with the request
    /// they are in; their threads live on in the value that is returned.
    pub async fn serve(self, mut shutdown: watch::Receiver<bool>) -> (Vec<IoThread>, Connections) {
        let Self { listener, threads, context, tls } = self;
        let places = Arc::new(Semaphore::new(context.server.connections_max));
        for thread in threads.iter().cycle() {
            let place = tokio::select! {
                place = Arc::clone(&places).acquire_owned() => place.expect("the semaphore is never closed"),
                () = ended(&mut shutdown) => break,
            };
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted.and_then(|(stream, peer)| Ok((stream.into_std()?, peer))),
                () = ended(&mut shutdown) => break,
            };
            match accepted {
                Ok((stream, address)) => {
                    let peer = Arc::new(Peer {
                        context: Arc::clone(&context),
                        from: Origin::Network(address),
                        post: Arc::clone(&thread.post),
                        timer: ConnectionTimer::default(),
                        asked: AtomicBool::new(false),
                        open: AtomicUsize::new(0),
                        begun: AtomicUsize::new(0),
                    });
                    thread.runtime.spawn(run(peer, stream, tls.clone(), place, shutdown.clone()));
                }
                Err(error) => {
                    tracing::warn!(%error, "can't accept a connection");
                    tokio::time::sleep(ACCEPT_RETRY).await;
                }
            }
        }
        (threads, Connections { places, connections_max: context.server.connections_max })
    }
}

/// The connections that are open still.
pub struct Connections {
    places: Arc<Semaphore>,
    connections_max: usize,
}

impl Connections {
    /// Waits for the last one's end.
    pub async fn closed(&self) {
        let all = u32::try_from(self.connections_max).expect("the configuration's limit is lower");
        // The semaphore is never closed, so this ends with every place taken.
        let _ = self.places.acquire_many(all).await;
    }
}

async fn run(
    peer: Arc<Peer>,
    stream: std::net::TcpStream,
    tls: Option<TlsAcceptor>,
    _place: OwnedSemaphorePermit,
    mut shutdown: watch::Receiver<bool>,
) {
    let _open = Open::count(&peer.context);
    // It is this thread's runtime that watches the socket from here on.
    let Ok(stream) = TcpStream::from_std(stream) else { return };
    // Answers are whole when they are written; waiting to fill a packet would only delay them.
    let _ = stream.set_nodelay(true);
    let begun = timeout(peer.context.server.header_timeout, begin(stream, tls));
    let begun = tokio::select! {
        begun = begun => begun.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())),
        () = ended(&mut shutdown) => return,
    };
    match begun {
        Ok(Begun::Plain(stream, http2)) => speak(stream, http2, peer, shutdown).await,
        Ok(Begun::Tls(stream, http2)) => Box::pin(speak(*stream, http2, peer, shutdown)).await,
        Err(error) => {
            tracing::debug!(peer = %peer.from, %error, "a connection ended before it asked for anything");
        }
    }
}

/// A connection that has said which protocol it speaks.
enum Begun {
    Plain(TcpStream, bool),
    Tls(Box<TlsStream<TcpStream>>, bool),
}

async fn begin(stream: TcpStream, tls: Option<TlsAcceptor>) -> io::Result<Begun> {
    let Some(tls) = tls else {
        let http2 = speaks_http2(&stream).await?;
        return Ok(Begun::Plain(stream, http2));
    };
    let stream = tls.accept(stream).await?;
    // Who speaks HTTP/2 over TLS says so in the handshake.
    let http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
    Ok(Begun::Tls(Box::new(stream), http2))
}

async fn speak(
    stream: impl AsyncRead + AsyncWrite + Unpin + 'static,
    http2: bool,
    peer: Arc<Peer>,
    shutdown: watch::Receiver<bool>,
) {
    let service = service_fn({
        let peer = Arc::clone(&peer);
        move |request| {
            peer.asked.store(true, Ordering::Relaxed);
            let peer = Arc::clone(&peer);
            async move {
                let _open = http2.then(|| OpenRequest::count(&peer));
                Ok::<_, Infallible>(routes::answer(&peer, request).await)
            }
        }
    });
    let stream = TokioIo::new(stream);
    if http2 {
        let mut protocol = http2::Builder::new(TokioExecutor::new());
        protocol
            .timer(TokioTimer::new())
            .keep_alive_interval(PING_INTERVAL)
            .keep_alive_timeout(PING_INTERVAL)
            .max_concurrent_streams(STREAMS_MAX);
        tokio::select! {
            () = drive(protocol.serve_connection(stream, service), &peer, shutdown) => {}
            () = idled(&peer) => tracing::debug!(peer = %peer.from, "a connection asked for nothing any more"),
        }
    } else {
        let mut protocol = http1::Builder::new();
        protocol.timer(peer.timer.clone()).header_read_timeout(peer.context.server.header_timeout);
        drive(protocol.serve_connection(stream, service), &peer, shutdown).await;
    }
}

/// Looks at the first bytes and leaves them where they are. They may come one by one.
async fn speaks_http2(stream: &TcpStream) -> io::Result<bool> {
    let mut first = [0; HTTP2_PREFACE.len()];
    loop {
        let length = stream.peek(&mut first).await?;
        if length == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if first[..length] != HTTP2_PREFACE[..length] {
            return Ok(false);
        }
        if length == HTTP2_PREFACE.len() {
            return Ok(true);
        }
        // The bytes stay where they are, so that their end shows neither in them nor in a length of 0.
        if stream.ready(Interest::READABLE).await?.is_read_closed() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        // For the same reason no event tells of the next byte.
        tokio::time::sleep(PREFACE_RETRY).await;
    }
}

/// Drives a connection to its end. HTTP/1 minds its own header timeout; HTTP/2 has none before its first request.
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

/// Returns when nothing was asked on an HTTP/2 connection for `header_timeout` or up to twice that. Its pings prove that somebody
/// is there, and not that they want anything.
async fn idled(peer: &Peer) {
    let mut seen = peer.begun.load(Ordering::Relaxed);
    loop {
        tokio::time::sleep(peer.context.server.header_timeout).await;
        let begun = peer.begun.load(Ordering::Relaxed);
        if begun == seen && peer.open.load(Ordering::Relaxed) == 0 {
            return;
        }
        seen = begun;
    }
}

/// Counts a request of an HTTP/2 connection while it is open.
struct OpenRequest(Arc<Peer>);

impl OpenRequest {
    fn count(peer: &Arc<Peer>) -> Self {
        peer.begun.fetch_add(1, Ordering::Relaxed);
        peer.open.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(peer))
    }
}

impl Drop for OpenRequest {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

enum Ending {
    Done,
    Early(hyper::Error),
    Silent,
}

/// Counts an open connection.
struct Open(prometheus::IntGauge);

impl Open {
    fn count(context: &Context) -> Self {
        context.metrics.connections.inc();
        Self(context.metrics.connections.clone())
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.dec();
    }
}

async fn ended(shutdown: &mut watch::Receiver<bool>) {
    // A sender that is gone means the same.
    let _ = shutdown.wait_for(|ended| *ended).await;
}
