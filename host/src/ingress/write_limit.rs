//! A socket whose writes must get somewhere: one that waits for longer than the limit without a byte taken fails. It never knows
//! what is written.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll, ready},
    time::Instant,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::Sleep,
};

use super::peer::Peer;

/// A socket with a limit on the progress of its writes. The timer is armed by the first write that waits: most never do.
pub(super) struct WriteLimit {
    /// There until this is dropped.
    socket: Option<TcpStream>,
    peer: Arc<Peer>,
    waits_since: Option<Instant>,
    alarm: Option<Pin<Box<Sleep>>>,
}

impl WriteLimit {
    pub(super) fn new(socket: TcpStream, peer: Arc<Peer>) -> Self {
        Self { socket: Some(socket), peer, waits_since: None, alarm: None }
    }

    fn socket(&mut self) -> Pin<&mut TcpStream> {
        Pin::new(self.socket.as_mut().expect("it is there until this is dropped"))
    }

    fn watched<T>(&mut self, written: Poll<io::Result<T>>, context: &mut Context<'_>) -> Poll<io::Result<T>> {
        match written {
            Poll::Pending => {
                ready!(self.poll_limit(context));
                Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
            }
            written => {
                if self.waits_since.take().is_some() {
                    self.peer.stalled.store(false, Ordering::Relaxed);
                }
                written
            }
        }
    }

    fn poll_limit(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let since = *self.waits_since.get_or_insert_with(|| {
            self.peer.stalled.store(true, Ordering::Relaxed);
            Instant::now()
        });
        // Looked up again each time: a shutdown makes it shorter.
        let at = tokio::time::Instant::from_std(since + self.peer.write_time_max());
        let alarm = self.alarm.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(at)));
        if alarm.deadline() != at {
            alarm.as_mut().reset(at);
        }
        alarm.as_mut().poll(context)
    }
}

impl AsyncRead for WriteLimit {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = self.socket().poll_read(context, buffer);
        if buffer.filled().len() > before {
            self.peer.timer.bytes_came();
            self.peer.sends_on.store(true, Ordering::Relaxed);
        }
        read
    }
}

impl AsyncWrite for WriteLimit {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = self.socket().poll_write(context, bytes);
        self.watched(written, context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = self.socket().poll_write_vectored(context, buffers);
        self.watched(written, context)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.as_ref().is_some_and(AsyncWrite::is_write_vectored)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.socket().poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.socket().poll_shutdown(context)
    }
}

impl Drop for WriteLimit {
    /// Leaves the socket of a caller who is still sending to be closed with care.
    fn drop(&mut self) {
        if self.peer.sends_on.load(Ordering::Relaxed) {
            *self.peer.closing.lock() = self.socket.take();
        }
    }
}
