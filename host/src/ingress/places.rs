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

use crate::{config::Server, telemetry::Metrics};

/// Connections beyond the limit that get an answer, to the probes or that there is no room.
const KEPT_PLACES: usize = 64;
/// The fewest of them that one address may have; else its part is the same as of all connections, so that it can't keep others'
/// probes out.
const KEPT_PER_ADDRESS_MIN: usize = 8;
/// Between two lines of the log that say the same.
const LOG_INTERVAL: Duration = Duration::from_secs(10);
/// Of an IPv6 address, what one customer of a provider has at least.
const NETWORK_BITS: u32 = 64;

/// The places of connections.
pub(super) struct Places {
    open: Arc<Semaphore>,
    kept: Arc<Semaphore>,
    connections_max: usize,
    per_address_max: usize,
    kept_per_address_max: usize,
    addresses: Mutex<HashMap<IpAddr, Taken>>,
    metrics: Arc<Metrics>,
    told: Mutex<Told>,
}

/// The places that one address has.
#[derive(Default)]
struct Taken {
    open: usize,
    kept: usize,
}

/// What the log was told.
#[derive(Default)]
struct Told {
    /// When the listener was last found full, while it counts as full.
    full: Option<Instant>,
    full_said: Option<Instant>,
    address_said: Option<Instant>,
    /// Connections that were closed since the last line about it.
    closed: u64,
}

/// A connection's place, given back when dropped.
pub(super) struct Place {
    places: Arc<Places>,
    address: IpAddr,
    kept: bool,
    _permit: OwnedSemaphorePermit,
}

impl Place {
    /// Whether it is one of those beyond the limit.
    pub(super) fn is_kept(&self) -> bool {
        self.kept
    }
}

impl Places {
    pub(super) fn new(server: &Server, metrics: Arc<Metrics>) -> Arc<Self> {
        let kept_part = KEPT_PLACES * server.connections_per_address_max / server.connections_max;
        Arc::new(Self {
            open: Arc::new(Semaphore::new(server.connections_max)),
            kept: Arc::new(Semaphore::new(KEPT_PLACES)),
            connections_max: server.connections_max,
            per_address_max: server.connections_per_address_max,
            kept_per_address_max: kept_part.clamp(KEPT_PER_ADDRESS_MIN, KEPT_PLACES),
            addresses: Mutex::default(),
            metrics,
            told: Mutex::default(),
        })
    }

    /// A place for a connection from this address: one of the kept ones where the address has as many as it may, or there are no others;
    /// `None` where it is to be closed.
    pub(super) fn take(self: &Arc<Self>, address: IpAddr) -> Option<Place> {
        let address = network(address);
        let mut addresses = self.addresses.lock();
        let taken = addresses.entry(address).or_default();
        let within = taken.open < self.per_address_max;
        let open = if within { Arc::clone(&self.open).try_acquire_owned().ok() } else { None };
        let kept = open.is_none();
        let permit = open.or_else(|| {
            let may = taken.kept < self.kept_per_address_max;
            may.then(|| Arc::clone(&self.kept).try_acquire_owned().ok()).flatten()
        });
        match (&permit, kept) {
            (Some(_), false) => taken.open += 1,
            (Some(_), true) => taken.kept += 1,
            (None, _) if taken.open + taken.kept == 0 => drop(addresses.remove(&address)),
            (None, _) => {}
        }
        drop(addresses);
        if within {
            self.tell_of_room(kept, permit.is_none());
        } else {
            self.tell_of_address(address);
        }
        let Some(permit) = permit else {
            self.metrics
                .connections_refused
                .with_label_values(&[if within { "full" } else { "address" }])
                .inc();
            return None;
        };
        self.metrics.connections.inc();
        Some(Place { places: Arc::clone(self), address, kept, _permit: permit })
    }

    /// Waits until every place is free.
    pub(super) async fn emptied(&self) {
        let all = u32::try_from(self.connections_max).expect("the configuration's limit is lower");
        // The semaphores are never closed, so this ends with every place taken.
        let _ = self.open.acquire_many(all).await;
        let _ = self.kept.acquire_many(KEPT_PLACES as u32).await;
    }

    fn leave(&self, address: IpAddr, kept: bool) {
        let mut addresses = self.addresses.lock();
        if let Some(taken) = addresses.get_mut(&address) {
            *(if kept { &mut taken.kept } else { &mut taken.open }) -= 1;
            if taken.open + taken.kept == 0 {
                addresses.remove(&address);
            }
        }
    }

    fn tell_of_address(&self, address: IpAddr) {
        let mut told = self.told.lock();
        if told.address_said.is_none_or(|said| said.elapsed() >= LOG_INTERVAL) {
            told.address_said = Some(Instant::now());
            let limit = self.per_address_max;
            tracing::warn!(%address, limit, "an address has too many connections open: of further ones only /livez and /readyz are answered (server.connections_per_address_max)");
        }
    }

    /// Says that the listener is full, now and then while it is, and once when it is over.
    fn tell_of_room(&self, full: bool, closed: bool) {
        let mut told = self.told.lock();
        if full {
            told.full = Some(Instant::now());
            told.closed += u64::from(closed);
            if told.full_said.is_none_or(|said| said.elapsed() >= LOG_INTERVAL) {
                told.full_said = Some(Instant::now());
                let closed = std::mem::take(&mut told.closed);
                let limit = self.connections_max;
                tracing::warn!(
                    limit,
                    closed,
                    "the listener is full: of further connections only /livez and /readyz are answered (server.connections_max)"
                );
            }
        } else if told.full.is_some_and(|full| full.elapsed() >= LOG_INTERVAL) {
            told.full = None;
            told.full_said = None;
            let closed = std::mem::take(&mut told.closed);
            tracing::info!(closed, "the listener has room again");
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.places.leave(self.address, self.kept);
        self.places.metrics.connections.dec();
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
    use crate::{config, traces::Traces};

    fn places(connections_max: usize, per_address_max: usize) -> Arc<Places> {
        let loaded = config::load(&[], &config::Environment::default()).unwrap();
        let server = Server {
            connections_max,
            connections_per_address_max: per_address_max,
            ..loaded.config.server.clone()
        };
        Places::new(&server, Metrics::new(Traces::default()))
    }

    fn at(address: &str) -> IpAddr {
        address.parse().unwrap()
    }

    #[test]
    fn an_address_has_its_own_limit_and_a_place_comes_back() {
        let places = places(100, 2);
        let first = places.take(at("192.0.2.1")).unwrap();
        let _second = places.take(at("::ffff:192.0.2.1")).unwrap();
        let kept: Vec<_> = (0..KEPT_PER_ADDRESS_MIN).map(|_| places.take(at("192.0.2.1")).unwrap()).collect();
        assert!(kept.iter().all(Place::is_kept), "it may ask whether the host lives");
        assert!(places.take(at("192.0.2.1")).is_none());
        assert!(places.take(at("192.0.2.2")).is_some_and(|place| !place.is_kept()));
        drop(first);
        assert!(places.take(at("192.0.2.1")).is_some_and(|place| !place.is_kept()));
        assert_eq!(places.metrics.connections_refused.with_label_values(&["address"]).get(), 1);
        drop(kept);
        assert_eq!(places.metrics.connections.get(), 1);
        assert_eq!(places.addresses.lock().len(), 1, "addresses without connections are forgotten");
    }

    #[test]
    fn a_network_of_ipv6_counts_as_one_address() {
        let places = places(100, 1);
        let _first = places.take(at("2001:db8:1:2::1")).unwrap();
        assert!(places.take(at("2001:db8:1:2:ffff::2")).is_some_and(|place| place.is_kept()));
        assert!(places.take(at("2001:db8:1:3::1")).is_some_and(|place| !place.is_kept()));
    }

    #[tokio::test]
    async fn a_full_listener_keeps_places_for_probes_that_no_single_address_can_take() {
        let places = places(4, 2);
        let open: Vec<_> = ["192.0.2.8", "192.0.2.8", "192.0.2.9", "192.0.2.9"]
            .map(|from| places.take(at(from)).unwrap())
            .into();
        assert!(!open.iter().any(Place::is_kept));
        let part = KEPT_PLACES / 2;
        let one: Vec<_> = (0..part).map(|_| places.take(at("192.0.2.1")).unwrap()).collect();
        assert!(one.iter().all(Place::is_kept));
        assert!(places.take(at("192.0.2.1")).is_none());
        assert_eq!(places.metrics.connections_refused.with_label_values(&["full"]).get(), 1);
        let others: Vec<_> = (0..KEPT_PLACES - part)
            .map(|number| places.take(at(&format!("198.51.100.{number}"))).unwrap())
            .collect();
        assert!(others.iter().all(Place::is_kept) && places.take(at("203.0.113.1")).is_none());
        drop((open, one, others));
        places.emptied().await;
    }
}
