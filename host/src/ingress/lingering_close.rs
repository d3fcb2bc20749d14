//! Lets callers who are still sending read the answer to what they sent. The system resets a connection that is closed over unread bytes,
//! and the reset takes along what the caller hasn't read; many clients that send a body over HTTP/2 take the end of its stream for the
//! end of everything. What still comes is read for a while and dropped.

use std::{
    io::ErrorKind,
    net::Shutdown,
    sync::Arc,
    time::{Duration, Instant},
};

use socket2::SockRef;
use tokio::time::timeout;

use super::{body::RequestBody, peer::Peer};

/// How long it is read in all, and for how long without a byte.
const TIME_MAX: Duration = Duration::from_secs(10);
const IDLE_TIME_MAX: Duration = Duration::from_secs(2);
/// How long in all while the host drains.
const TIME_MAX_IN_DRAIN: Duration = Duration::from_secs(1);
/// How many bytes are read.
const BYTES_MAX: usize = 256 << 20;
const BUFFER_BYTES: usize = 8 << 10;

/// How much longer to read, where reading began then.
fn left(peer: &Peer, begun: Instant) -> Duration {
    let time_max = if peer.context.gate.is_closed() { TIME_MAX_IN_DRAIN } else { TIME_MAX };
    time_max.saturating_sub(begun.elapsed()).min(IDLE_TIME_MAX)
}

/// Reads the rest of a body that came on one stream of several, beside what the others do.
pub(super) fn read_on(mut body: RequestBody, peer: Arc<Peer>) {
    tokio::spawn(async move {
        let (begun, mut bytes) = (Instant::now(), 0);
        while bytes < BYTES_MAX
            && let Ok(Ok(Some(data))) = timeout(left(&peer, begun), body.next()).await
        {
            bytes += data.len();
        }
    });
}

/// Reads a connection that has ended over the bytes of its caller. Returns when the caller has stopped, or a limit is reached.
pub(super) async fn finish(peer: &Peer) {
    let Some(socket) = peer.closing.lock().take() else { return };
    // hyper may have shut it down with the last answer.
    let _ = SockRef::from(&socket).shutdown(Shutdown::Write);
    let (begun, mut bytes) = (Instant::now(), 0);
    while bytes < BYTES_MAX {
        // Data that is ready is read without yielding, which would starve the time limit and other connections.
        tokio::task::consume_budget().await;
        let left = left(peer, begun);
        if left.is_zero() {
            return;
        }
        let Ok(Ok(())) = timeout(left, socket.readable()).await else { return };
        match socket.try_read(&mut [0; BUFFER_BYTES]) {
            Ok(0) => return,
            Ok(length) => bytes += length,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(_) => return,
        }
    }
}
