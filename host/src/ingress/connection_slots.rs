//! How many connections there may be: of all, of one address, and a few more that only ask whether the host lives. It owns their
//! counts and says when there is no room, and never knows what they send.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::{config::Server, insight::metrics::Metrics};

/// Connections beyond the limit that get an answer, to the probes or that there is no room.
const RESERVED_SLOTS: usize = 64;
/// The fewest of them that one address may have; else its part is the same as of all connections, so that it can't keep others'
/// probes out.
const RESERVED_PER_ADDRESS_MIN: usize = 8;
/// Between two lines of the log that say the same.
const LOG_INTERVAL: Duration = Duration::from_secs(10);
/// Of an IPv6 address, what one customer of a provider has at least.
const NETWORK_BITS: u32 = 64;

/// The slots of connections.
pub(super) struct ConnectionSlots {
    open: Arc<Semaphore>,
    reserved: Arc<Semaphore>,
    connections_max: usize,
    per_address_max: usize,
    reserved_per_address_max: usize,
    addresses: Mutex<HashMap<IpAddr, AddressSlots>>,
    metrics: Arc<Metrics>,
    log_state: Mutex<LogState>,
}

/// The slots that one address has.
#[derive(Default)]
struct AddressSlots {
    open: usize,
    reserved: usize,
}

/// What was logged lately.
#[derive(Default)]
struct LogState {
    /// When the listener was last found full, while it counts as full.
    full: Option<Instant>,
    full_said: Option<Instant>,
    address_said: Option<Instant>,
    /// Connections that were closed since the last line about it.
    closed: u64,
}

/// A connection's slot, given back when dropped.
pub(super) struct ConnectionSlot {
    slots: Arc<ConnectionSlots>,
    address: IpAddr,
    reserved: bool,
    _permit: OwnedSemaphorePermit,
}

impl ConnectionSlot {
    /// Whether it is one of those beyond the limit.
    pub(super) fn is_reserved(&self) -> bool {
        self.reserved
    }
}

impl ConnectionSlots {
    pub(super) fn new(server: &Server, metrics: Arc<Metrics>) -> Arc<Self> {
        let reserved_part = RESERVED_SLOTS * server.connections_per_address_max / server.connections_max;
        Arc::new(Self {
            open: Arc::new(Semaphore::new(server.connections_max)),
            reserved: Arc::new(Semaphore::new(RESERVED_SLOTS)),
            connections_max: server.connections_max,
            per_address_max: server.connections_per_address_max,
            reserved_per_address_max: reserved_part.clamp(RESERVED_PER_ADDRESS_MIN, RESERVED_SLOTS),
            addresses: Mutex::default(),
            metrics,
            log_state: Mutex::default(),
        })
    }

    /// A slot for a connection from this address: one of the reserved ones where the address has as many as it may, or there are no others;
    /// `None` where it is to be closed.
    pub(super) fn take(self: &Arc<Self>, address: IpAddr) -> Option<ConnectionSlot> {
        let address = network(address);
        let mut addresses = self.addresses.lock();
        let taken = addresses.entry(address).or_default();
        let within = taken.open < self.per_address_max;
        let open = if within { Arc::clone(&self.open).try_acquire_owned().ok() } else { None };
        let reserved = open.is_none();
        let permit = open.or_else(|| {
            let may = taken.reserved < self.reserved_per_address_max;
            may.then(|| Arc::clone(&self.reserved).try_acquire_owned().ok()).flatten()
        });
        match (&permit, reserved) {
            (Some(_), false) => taken.open += 1,
            (Some(_), true) => taken.reserved += 1,
            (None, _) if taken.open + taken.reserved == 0 => drop(addresses.remove(&address)),
            (None, _) => {}
        }
        drop(addresses);
        if within {
            self.log_when_full(reserved, permit.is_none());
        } else {
            self.log_address(address);
        }
        let Some(permit) = permit else {
            self.metrics
                .connections_refused
                .with_label_values(&[if within { "full" } else { "address" }])
                .inc();
            return None;
        };
        self.metrics.connections.inc();
        Some(ConnectionSlot { slots: Arc::clone(self), address, reserved, _permit: permit })
    }

    /// Waits until every slot is free.
    pub(super) async fn emptied(&self) {
        let all = u32::try_from(self.connections_max).expect("the configuration's limit is lower");
        // The semaphores are never closed, so this ends with every slot taken.
        let _ = self.open.acquire_many(all).await;
        let _ = self.reserved.acquire_many(RESERVED_SLOTS as u32).await;
    }

    fn leave(&self, address: IpAddr, reserved: bool) {
        let mut addresses = self.addresses.lock();
        if let Some(taken) = addresses.get_mut(&address) {
            *(if reserved { &mut taken.reserved } else { &mut taken.open }) -= 1;
            if taken.open + taken.reserved == 0 {
                addresses.remove(&address);
            }
        }
    }

    fn log_address(&self, address: IpAddr) {
        let mut log_state = self.log_state.lock();
        if log_state.address_said.is_none_or(|said| said.elapsed() >= LOG_INTERVAL) {
            log_state.address_said = Some(Instant::now());
            let limit = self.per_address_max;
            tracing::warn!(%address, limit, "an address has too many connections open: of further ones only /livez and /readyz are answered (server.connections_per_address_max)");
        }
    }

    /// Says that the listener is full, now and then while it is, and once when it is over.
    fn log_when_full(&self, full: bool, closed: bool) {
        let mut log_state = self.log_state.lock();
        if full {
            log_state.full = Some(Instant::now());
            log_state.closed += u64::from(closed);
            if log_state.full_said.is_none_or(|said| said.elapsed() >= LOG_INTERVAL) {
                log_state.full_said = Some(Instant::now());
                let closed = std::mem::take(&mut log_state.closed);
                let limit = self.connections_max;
                tracing::warn!(
                    limit,
                    closed,
                    "the listener is full: of further connections only /livez and /readyz are answered (server.connections_max)"
                );
            }
        } else if log_state.full.is_some_and(|full| full.elapsed() >= LOG_INTERVAL) {
            log_state.full = None;
            log_state.full_said = None;
            let closed = std::mem::take(&mut log_state.closed);
            tracing::info!(closed, "the listener has room again");
        }
    }
}

impl Drop for ConnectionSlot {
    fn drop(&mut self) {
        self.slots.leave(self.address, self.reserved);
        self.slots.metrics.connections.dec();
    }
}

/// What counts as one address.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => {
            IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & !(u128::MAX >> NETWORK_BITS)))
        }
        address => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{config, insight::traces::Traces};

    fn slots(connections_max: usize, per_address_max: usize) -> Arc<ConnectionSlots> {
        let loaded = config::load(&[], &config::Environment::default()).unwrap();
        let server = Server {
            connections_max,
            connections_per_address_max: per_address_max,
            ..loaded.config.server.clone()
        };
        ConnectionSlots::new(&server, Metrics::new(Traces::default()))
    }

    fn at(address: &str) -> IpAddr {
        address.parse().unwrap()
    }

    #[test]
    fn an_address_has_its_own_limit_and_a_place_comes_back() {
        let slots = slots(100, 2);
        let first = slots.take(at("192.0.2.1")).unwrap();
        let _second = slots.take(at("::ffff:192.0.2.1")).unwrap();
        let reserved: Vec<_> =
            (0..RESERVED_PER_ADDRESS_MIN).map(|_| slots.take(at("192.0.2.1")).unwrap()).collect();
        assert!(reserved.iter().all(ConnectionSlot::is_reserved), "it may ask whether the host lives");
        assert!(slots.take(at("192.0.2.1")).is_none());
        assert!(slots.take(at("192.0.2.2")).is_some_and(|slot| !slot.is_reserved()));
        drop(first);
        assert!(slots.take(at("192.0.2.1")).is_some_and(|slot| !slot.is_reserved()));
        assert_eq!(slots.metrics.connections_refused.with_label_values(&["address"]).get(), 1);
        drop(reserved);
        assert_eq!(slots.metrics.connections.get(), 1);
        assert_eq!(slots.addresses.lock().len(), 1, "addresses without connections are forgotten");
    }

    #[test]
    fn a_network_of_ipv6_counts_as_one_address() {
        let slots = slots(100, 1);
        let _first = slots.take(at("2001:db8:1:2::1")).unwrap();
        assert!(slots.take(at("2001:db8:1:2:ffff::2")).is_some_and(|slot| slot.is_reserved()));
        assert!(slots.take(at("2001:db8:1:3::1")).is_some_and(|slot| !slot.is_reserved()));
    }

    #[tokio::test]
    async fn a_full_listener_keeps_places_for_probes_that_no_single_address_can_take() {
        let slots = slots(4, 2);
        let open: Vec<_> = ["192.0.2.8", "192.0.2.8", "192.0.2.9", "192.0.2.9"]
            .map(|from| slots.take(at(from)).unwrap())
            .into();
        assert!(!open.iter().any(ConnectionSlot::is_reserved));
        let part = RESERVED_SLOTS / 2;
        let one: Vec<_> = (0..part).map(|_| slots.take(at("192.0.2.1")).unwrap()).collect();
        assert!(one.iter().all(ConnectionSlot::is_reserved));
        assert!(slots.take(at("192.0.2.1")).is_none());
        assert_eq!(slots.metrics.connections_refused.with_label_values(&["full"]).get(), 1);
        let others: Vec<_> = (0..RESERVED_SLOTS - part)
            .map(|number| slots.take(at(&format!("198.51.100.{number}"))).unwrap())
            .collect();
        assert!(others.iter().all(ConnectionSlot::is_reserved) && slots.take(at("203.0.113.1")).is_none());
        drop((open, one, others));
        slots.emptied().await;
    }
}
