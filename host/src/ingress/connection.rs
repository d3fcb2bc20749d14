//! Accepts connections and speaks HTTP/1.1 or HTTP/2 on each. It owns their number, their timeouts and their end, and
//! never knows what is asked.

use std::{
    convert::Infallible,
    net::SocketAddr,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use hyper::service::service_fn;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto::Builder,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, watch},
};

use super::{Context, routes};

/// After a failed `accept` (out of file descriptors, say), the wait until the next.
const ACCEPT_RETRY: Duration = Duration::from_millis(50);
/// An HTTP/2 peer that doesn't answer a ping within this time is gone.
const PING_INTERVAL: Duration = Duration::from_secs(20);
/// Requests that one HTTP/2 connection may have open.
const STREAMS_MAX: u32 = 256;

/// Serves connections until `shutdown` turns true; then no more are accepted, and open ones end with the request they
/// are in.
pub async fn serve(listener: TcpListener, context: Arc<Context>, mut shutdown: watch::Receiver<bool>) {
    let places = Arc::new(Semaphore::new(context.server.connections_max));
    let builder = Arc::new(protocol(&context));
    loop {
        let place = tokio::select! {
            place = Arc::clone(&places).acquire_owned() => place.expect("the semaphore is never closed"),
            () = ended(&mut shutdown) => return,
        };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = ended(&mut shutdown) => return,
        };
        match accepted {
            Ok((stream, peer)) => {
                let connection = Connection { context: Arc::clone(&context), peer, _place: place };
                tokio::spawn(connection.run(stream, Arc::clone(&builder), shutdown.clone()));
            }
            Err(error) => {
                tracing::warn!(%error, "can't accept a connection");
                tokio::time::sleep(ACCEPT_RETRY).await;
            }
        }
    }
}

fn protocol(context: &Context) -> Builder<TokioExecutor> {
    let mut builder = Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(context.server.header_timeout);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_INTERVAL)
        .max_concurrent_streams(STREAMS_MAX);
    builder
}

struct Connection {
    context: Arc<Context>,
    peer: SocketAddr,
    _place: OwnedSemaphorePermit,
}

impl Connection {
    async fn run(
        self,
        stream: TcpStream,
        builder: Arc<Builder<TokioExecutor>>,
        mut shutdown: watch::Receiver<bool>,
    ) {
        let Self { context, peer, _place } = self;
        let _open = Open::count(&context);
        // Answers are whole when they are written; waiting to fill a packet would only delay them.
        let _ = stream.set_nodelay(true);
        let asked = Arc::new(AtomicBool::new(false));
        let service = service_fn({
            let (context, asked) = (Arc::clone(&context), Arc::clone(&asked));
            move |request| {
                asked.store(true, Ordering::Relaxed);
                let context = Arc::clone(&context);
                async move { Ok::<_, Infallible>(routes::answer(&context, peer, request).await) }
            }
        });
        let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), service));
        // The protocol's detection waits for its first bytes without a limit, and so does HTTP/2 for its first request.
        let mut first_request = pin!(tokio::time::sleep(context.server.header_timeout));
        let mut waiting = true;
        let mut draining = false;
        loop {
            tokio::select! {
                biased;
                ended = &mut connection => {
                    if let Err(error) = ended {
                        tracing::debug!(%peer, error, "a connection ended early");
                    }
                    return;
                }
                () = &mut first_request, if waiting => {
                    waiting = false;
                    if !asked.load(Ordering::Relaxed) {
                        tracing::debug!(%peer, "a connection asked for nothing in time");
                        return;
                    }
                }
                () = ended(&mut shutdown), if !draining => {
                    draining = true;
                    connection.as_mut().graceful_shutdown();
                }
            }
        }
    }
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
