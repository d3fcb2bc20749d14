//! The listener: accepts connections on a thread that never runs plugin code, looks at their first bytes, answers those that ask
//! whether the host lives, and gives all others to the threads that serve them. It never knows what else is asked.

use std::{
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use socket2::SockRef;
use tokio::{
    io::Interest,
    net::{TcpListener, TcpStream},
    sync::watch,
    time::{sleep, timeout},
};
use tokio_rustls::TlsAcceptor;

use super::{
    Context,
    connection::{self, Role, ended, speak},
    connection_slots::{ConnectionSlot, ConnectionSlots},
    io_threads::{IoThread, IoThreads},
    io_watchdog, lingering_close,
    peer::Peer,
    write_limit::WriteLimit,
};

/// After a failed `accept` (out of file descriptors, say), the wait until the next.
const ACCEPT_RETRY: Duration = Duration::from_millis(50);
/// Between two lines of the log about that.
const ACCEPT_LOG_INTERVAL: Duration = Duration::from_secs(5);
/// What an HTTP/2 connection begins with, as far as it takes to tell it from any HTTP/1 method.
const HTTP2_PREFACE: &[u8] = b"PRI ";
/// What a probe's connection begins with.
const PROBES: [&[u8]; 8] = [
    b"GET /livez ",
    b"GET /livez?",
    b"GET /readyz ",
    b"GET /readyz?",
    b"HEAD /livez ",
    b"HEAD /livez?",
    b"HEAD /readyz ",
    b"HEAD /readyz?",
];
/// The longest of those.
const FIRST_BYTES: usize = 13;
/// Between two looks at a connection that has sent a part of those bytes: at first, and at most.
const FIRST_RETRY: Duration = Duration::from_millis(5);
const FIRST_RETRY_MAX: Duration = Duration::from_secs(1);
/// How long a connection beyond the limit may stay.
const KEPT_TIME_MAX: Duration = Duration::from_secs(1);
/// What the kernel takes of an answer beyond what is on its way: progress shows while a slow reader reads, and a caller that never
/// reads takes little memory.
const UNSENT_BYTES_MAX: u32 = 128 << 10;

/// An open port and the threads behind it.
pub struct Listener {
    listener: std::net::TcpListener,
    thread: IoThread,
    acceptor: Arc<Acceptor>,
}

/// The threads of a listener that is closed. Dropped, they end with all of their connections.
pub struct Threads {
    _acceptor: IoThread,
    _others: Arc<IoThreads>,
}

/// The connections that are open still.
pub struct Connections(Arc<ConnectionSlots>);

impl Connections {
    /// Waits for the last one's end.
    pub async fn closed(&self) {
        self.0.emptied().await;
    }
}

/// What arriving connections share.
struct Acceptor {
    context: Arc<Context>,
    threads: Arc<IoThreads>,
    io: Arc<super::io_threads::IoContext>,
    slots: Arc<ConnectionSlots>,
    tls: Option<TlsAcceptor>,
}

/// What the first bytes of a connection say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum First {
    /// HTTP/1, a probe.
    Probe,
    /// HTTP/1, anything else.
    Http1,
    /// HTTP/2.
    Http2,
}

impl Listener {
    /// Starts the threads; with an acceptor, connections begin with a handshake of TLS.
    ///
    /// # Errors
    /// The system gives no more threads.
    pub fn new(listener: TcpListener, context: Arc<Context>, tls: Option<TlsAcceptor>) -> io::Result<Self> {
        let ticks = Arc::default();
        let thread = IoThread::start("acceptor", &ticks)?;
        let threads = IoThreads::start(context.server.io_threads, Arc::clone(&ticks))?;
        io_watchdog::start(&threads, ticks, Arc::clone(&context.models))?;
        let slots = ConnectionSlots::new(&context.server, Arc::clone(&context.metrics));
        let acceptor = Arc::new(Acceptor { context, threads, io: Arc::clone(&thread.io), slots, tls });
        Ok(Self { listener: listener.into_std()?, thread, acceptor })
    }

    /// Accepts connections until `shutdown` turns true, and closes the port then. Open connections end with the request
    /// they are in; their threads live on in the value that is returned.
    pub async fn serve(self, shutdown: watch::Receiver<bool>) -> (Threads, Connections) {
        let Self { listener, thread, acceptor } = self;
        let accepting = thread.runtime.spawn(accept(listener, Arc::clone(&acceptor), shutdown));
        if let Err(error) = accepting.await.map_err(io::Error::other).flatten() {
            tracing::error!(%error, "no connections are accepted any more");
        }
        let connections = Connections(Arc::clone(&acceptor.slots));
        (Threads { _acceptor: thread, _others: Arc::clone(&acceptor.threads) }, connections)
    }
}

async fn accept(
    listener: std::net::TcpListener,
    acceptor: Arc<Acceptor>,
    mut shutdown: watch::Receiver<bool>,
) -> io::Result<()> {
    // It is this thread's runtime that watches the port from here on.
    let listener = TcpListener::from_std(listener)?;
    let mut said: Option<Instant> = None;
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = ended(&mut shutdown) => return Ok(()),
        };
        match accepted {
            Ok((stream, address)) => {
                if let Some(slot) = acceptor.slots.take(address.ip()) {
                    tokio::spawn(Arc::clone(&acceptor).receive(stream, address, slot, shutdown.clone()));
                }
            }
            Err(error) => {
                if said.is_none_or(|said| said.elapsed() >= ACCEPT_LOG_INTERVAL) {
                    said = Some(Instant::now());
                    tracing::warn!(%error, "can't accept connections");
                }
                sleep(ACCEPT_RETRY).await;
            }
        }
    }
}

impl Acceptor {
    async fn receive(
        self: Arc<Self>,
        stream: TcpStream,
        address: SocketAddr,
        slot: ConnectionSlot,
        mut shutdown: watch::Receiver<bool>,
    ) {
        // Answers are whole when they are written; waiting to fill a packet would only delay them.
        let _ = stream.set_nodelay(true);
        let _ = SockRef::from(&stream).set_tcp_notsent_lowat(UNSENT_BYTES_MAX);
        if slot.is_reserved() {
            // A connection without an answer by then is closed.
            let _ = timeout(KEPT_TIME_MAX, self.answer_probes(stream, address, shutdown)).await;
            return;
        }
        if self.tls.is_some() {
            return self.hand_over(stream, address, false, slot, shutdown);
        }
        let first = tokio::select! {
            first = timeout(self.context.server.header_timeout, first(&stream)) => first,
            () = ended(&mut shutdown) => return,
        };
        match first.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
            Ok(First::Probe) => {
                let peer = Peer::new(&self.context, address, &self.io);
                let stream = WriteLimit::new(stream, Arc::clone(&peer));
                speak(stream, false, Role::Probes, Arc::clone(&peer), shutdown).await;
                lingering_close::finish(&peer).await;
            }
            Ok(first) => self.hand_over(stream, address, first == First::Http2, slot, shutdown),
            Err(error) => {
                tracing::debug!(peer = %address, %error, "a connection ended before it asked for anything");
            }
        }
    }

    /// Gives a connection to a thread that no plugin holds.
    fn hand_over(
        &self,
        stream: TcpStream,
        address: SocketAddr,
        http2: bool,
        slot: ConnectionSlot,
        shutdown: watch::Receiver<bool>,
    ) {
        let Ok(stream) = stream.into_std() else { return };
        let (runtime, io) = self.threads.next();
        let peer = Peer::new(&self.context, address, &io);
        runtime.spawn(connection::run(peer, stream, http2, self.tls.clone(), slot, shutdown));
    }

    /// Serves a connection that is one too many: probes are answered, anything else gets a 503.
    async fn answer_probes(&self, stream: TcpStream, address: SocketAddr, shutdown: watch::Receiver<bool>) {
        let peer = Peer::new(&self.context, address, &self.io);
        match &self.tls {
            None => {
                let Ok(first) = first(&stream).await else { return };
                let stream = WriteLimit::new(stream, Arc::clone(&peer));
                speak(stream, first == First::Http2, Role::Probes, Arc::clone(&peer), shutdown).await;
            }
            Some(tls) => {
                let stream = WriteLimit::new(stream, Arc::clone(&peer));
                let Ok(stream) = tls.accept(stream).await else { return };
                let http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
                speak(stream, http2, Role::Probes, Arc::clone(&peer), shutdown).await;
            }
        }
        lingering_close::finish(&peer).await;
    }
}

/// Looks at the first bytes and leaves them where they are. They may come one by one.
async fn first(stream: &TcpStream) -> io::Result<First> {
    let mut bytes = [0; FIRST_BYTES];
    let mut retry = FIRST_RETRY;
    loop {
        let length = stream.peek(&mut bytes).await?;
        if length == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if let Some(first) = told_by(&bytes[..length]) {
            return Ok(first);
        }
        // `peek` leaves the bytes in the socket, so that its end doesn't show as a length of 0.
        if stream.ready(Interest::READABLE).await?.is_read_closed() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        // The socket stays readable, so readiness doesn't announce the next byte: poll.
        sleep(retry).await;
        retry = FIRST_RETRY_MAX.min(2 * retry);
    }
}

/// `None` while these bytes are the beginning of several things.
fn told_by(bytes: &[u8]) -> Option<First> {
    let begins_with = |whole: &&[u8]| bytes.starts_with(whole);
    let may_become = |whole: &&[u8]| whole.starts_with(bytes);
    if begins_with(&HTTP2_PREFACE) {
        Some(First::Http2)
    } else if PROBES.iter().any(begins_with) {
        Some(First::Probe)
    } else if may_become(&HTTP2_PREFACE) || PROBES.iter().any(may_become) {
        None
    } else {
        Some(First::Http1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probes_and_http2_are_told_from_all_else_by_the_first_bytes() {
        assert_eq!(told_by(b"PRI * HTTP/2.0"), Some(First::Http2));
        assert_eq!(told_by(b"GET /livez HT"), Some(First::Probe));
        assert_eq!(told_by(b"GET /readyz?"), Some(First::Probe));
        assert_eq!(told_by(b"HEAD /readyz HTTP/1.1"), Some(First::Probe));
        for request in
            ["POST /predict_sync", "GET /livezz ", "GET /ready ", "GET /health", "PUT", "get /livez "]
        {
            assert_eq!(told_by(request.as_bytes()), Some(First::Http1), "{request}");
        }
        for part in ["P", "PRI", "HEAD", "GET /", "GET /livez", "GET /readyz"] {
            assert_eq!(told_by(part.as_bytes()), None, "{part}");
        }
        assert!(PROBES.iter().all(|probe| probe.len() <= FIRST_BYTES));
    }
}
