//! What the requests of one connection share, and how many there are where HTTP/2 has several at once. It never knows what is asked.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize},
    },
    time::Duration,
};

use parking_lot::Mutex;
use tokio::net::TcpStream;

use super::{Context, io_threads::IoContext, timer::ConnectionTimer};
use crate::access::Origin;

/// While the host drains: how long an answer may wait for its caller to take any of it.
const WRITE_TIME_MAX_IN_DRAIN: Duration = Duration::from_secs(5);

/// What the requests of one connection share.
pub(super) struct Peer {
    pub(super) context: Arc<Context>,
    pub(super) from: Origin,
    pub(super) io: Arc<IoContext>,
    pub(super) timer: ConnectionTimer,
    /// A write waits for the caller.
    pub(super) stalled: AtomicBool,
    /// More may be on its way: something came, and no request that was read to its end has been answered since.
    pub(super) sends_on: AtomicBool,
    /// Its socket, where the connection ended while its caller was still sending.
    pub(super) closing: Mutex<Option<TcpStream>>,
    /// A request has come.
    pub(super) asked: AtomicBool,
    /// It has carried a call of gRPC.
    pub(super) speaks_grpc: AtomicBool,
    /// Requests of an HTTP/2 connection: those that are not over, how many there ever were, and those whose answers are not written.
    pub(super) open: AtomicUsize,
    pub(super) begun: AtomicUsize,
    pub(super) unwritten: AtomicUsize,
    /// Its caller took some of an answer since this was last looked at.
    pub(super) progressed: AtomicBool,
}

impl Peer {
    pub(super) fn new(context: &Arc<Context>, address: SocketAddr, io: &Arc<IoContext>) -> Arc<Self> {
        Arc::new(Self {
            context: Arc::clone(context),
            from: Origin::Network(address),
            io: Arc::clone(io),
            timer: ConnectionTimer::new(context.server.header_timeout),
            stalled: AtomicBool::new(false),
            sends_on: AtomicBool::new(false),
            closing: Mutex::default(),
            asked: AtomicBool::new(false),
            speaks_grpc: AtomicBool::new(false),
            open: AtomicUsize::new(0),
            begun: AtomicUsize::new(0),
            unwritten: AtomicUsize::new(0),
            progressed: AtomicBool::new(false),
        })
    }

    /// How long an answer may wait for its caller to take any of it.
    pub(super) fn write_time_max(&self) -> Duration {
        let limit = self.context.server.write_timeout;
        if self.context.gate.is_closed() { limit.min(WRITE_TIME_MAX_IN_DRAIN) } else { limit }
    }
}
