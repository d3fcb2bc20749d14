//! GPUs: which are here (`driver`), how busy they are (`monitor`), what models ask for (`wanted`), who holds which (`ledger`, which
//! is pure), and which are lost. It never knows what is run on them, nor HTTP.
//!
//! A device is leased, whole or by a share of its memory, and comes back when the last holder drops its [`Lease`]. A device that
//! failed in a way that lasts until the process ends is fenced here for good: the driver's own memory of it can't be relied on,
//! as some calls clear an error that they report.

mod driver;
mod ledger;
mod monitor;
mod wanted;

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc::sync_channel,
    },
    thread,
    time::Duration,
};

use parking_lot::Mutex;
use serde::Serialize;
use tokio::sync::watch;

use driver::Health;
use ledger::{Ledger, Refusal};
use monitor::Monitor;

pub use monitor::Usage;
pub use wanted::{NoPreference, Preference, Wanted};

/// How long the driver may take to list its devices. One that is broken may never answer.
pub const FIND_TIME_MAX: Duration = Duration::from_secs(30);
/// How long the driver may take to say how a device is.
pub const HEALTH_TIME_MAX: Duration = Duration::from_secs(5);

const MEBIBYTE: u64 = 1 << 20;

/// One device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Device {
    /// Its number in this process, from 0.
    pub ordinal: u32,
    /// As its maker calls it.
    pub name: String,
    /// Its own for ever: `GPU-…`.
    pub uuid: String,
    /// All of its memory.
    pub memory_bytes: u64,
    /// What its hardware can do: `9.0`.
    pub compute_capability: String,
    /// Where it is plugged in: `0000:3b:00.0`.
    pub pci_address: String,
}

/// Who holds a lease.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Holder {
    /// The model.
    pub model: String,
    /// The number of its generation.
    pub generation: u64,
    /// The number of the generation's replica.
    pub replica: u64,
}

/// A device, and how it stands.
#[derive(Clone, Debug, Serialize)]
pub struct Standing<'a> {
    /// The device.
    #[serde(flatten)]
    pub device: &'a Device,
    /// How busy it is, with other processes' work; `None` where nobody says.
    #[serde(flatten)]
    pub usage: Option<Usage>,
    /// Mebibytes that leases have: all of them where one has the whole device.
    pub leased_mb: u64,
    /// Who has them.
    pub holders: Vec<Holder>,
    /// Why it is fenced, where it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lost: Option<String>,
}

/// A device that failed for good.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Lost {
    /// Its number.
    pub ordinal: u32,
    /// What it is.
    pub name: String,
    /// What happened.
    pub why: String,
}

/// Why there is no lease.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoLease {
    /// Nothing here would ever do.
    #[error("it asks for the device {wanted} (deployment_config.gpu), and {here}")]
    NotHere {
        /// What was asked for.
        wanted: String,
        /// What there is.
        here: String,
    },
    /// Others hold what would do.
    #[error("it asks for the device {wanted} (deployment_config.gpu), and none is free: {held}")]
    NotFree {
        /// What was asked for.
        wanted: String,
        /// Who holds what.
        held: String,
    },
    /// Only what the generation before holds would do, and it can't be shared.
    #[error(
        "it asks for the device {wanted} (deployment_config.gpu), which the generation before holds and can't share like this; reload_gpu = \"stop_first\" stops that one before"
    )]
    NotBeside {
        /// What was asked for.
        wanted: String,
    },
    /// A device is lost, and the process is about to be started anew.
    #[error("a device is lost, and none is given out until this process has been started again")]
    Lost,
}

/// The devices of this machine.
pub struct Devices {
    devices: Vec<Device>,
    why_none: Option<String>,
    monitor: Option<Monitor>,
    usage: Mutex<Vec<Option<Usage>>>,
    book: Mutex<Book>,
    /// By place: looked at before each batch, and so without a lock.
    fenced: Vec<AtomicBool>,
    freed: AtomicU64,
    lost: watch::Sender<Option<Lost>>,
}

#[derive(Default)]
struct Book {
    ledger: Ledger,
    /// By the numbers of grants.
    holders: BTreeMap<u64, Vec<(u64, Holder)>>,
    held_ever: u64,
    lost: BTreeMap<usize, String>,
}

/// Devices that are kept for a model. Dropped, they are anybody's.
pub struct Reservation {
    of: Arc<Devices>,
    model: String,
}

/// Devices that somebody holds. Dropped, they are free, unless another shares them.
pub struct Lease {
    of: Arc<Devices>,
    grant: u64,
    hold: u64,
    places: Vec<usize>,
    memory_mb: Option<u64>,
}

impl Devices {
    /// Looks for them. Takes as long as the driver does, up to [`FIND_TIME_MAX`].
    #[must_use]
    pub fn find() -> Arc<Self> {
        let found = within(FIND_TIME_MAX, driver::find).unwrap_or_else(|| driver::Found {
            devices: Vec::new(),
            why_none: Some(format!("the CUDA driver did not list its devices within {FIND_TIME_MAX:?}")),
        });
        // NVML may hang as well as the driver may.
        let monitor =
            if found.devices.is_empty() { None } else { within(FIND_TIME_MAX, Monitor::open).flatten() };
        Arc::new(Self::new(found, monitor))
    }

    /// Of a machine without any.
    #[must_use]
    pub fn none() -> Arc<Self> {
        Arc::new(Self::new(driver::Found { devices: Vec::new(), why_none: None }, None))
    }

    fn new(found: driver::Found, monitor: Option<Monitor>) -> Self {
        let slots = found.devices.iter().map(|device| (device.name.clone(), device.memory_bytes / MEBIBYTE));
        Self {
            book: Mutex::new(Book { ledger: Ledger::new(slots), ..Book::default() }),
            usage: Mutex::new(vec![None; found.devices.len()]),
            fenced: found.devices.iter().map(|_| AtomicBool::new(false)).collect(),
            devices: found.devices,
            why_none: found.why_none,
            monitor,
            freed: AtomicU64::new(0),
            lost: watch::Sender::new(None),
        }
    }

    /// The devices, in the driver's order.
    #[must_use]
    pub fn all(&self) -> &[Device] {
        &self.devices
    }

    /// Why there are none.
    #[must_use]
    pub fn why_none(&self) -> Option<&str> {
        self.why_none.as_deref()
    }

    /// Asks how busy they are. Blocks for some milliseconds a device, or as long as NVML hangs.
    pub fn look(&self) {
        let Some(monitor) = &self.monitor else { return };
        let usage = self.devices.iter().map(|device| monitor.usage(&device.uuid)).collect();
        *self.usage.lock() = usage;
    }

    /// How each stands, as of the last look.
    #[must_use]
    pub fn standing(&self) -> Vec<Standing<'_>> {
        let (usage, book) = (self.usage.lock(), self.book.lock());
        let standing = |(place, device)| {
            let holders = book.ledger.grants_on(place).filter_map(|grant| book.holders.get(&grant));
            Standing {
                device,
                usage: usage[place],
                leased_mb: book.ledger.leased_mb(place),
                holders: holders.flatten().map(|(_, holder)| holder.clone()).collect(),
                lost: book.lost.get(&place).cloned(),
            }
        };
        self.devices.iter().enumerate().map(standing).collect()
    }

    /// Leases what is asked for.
    ///
    /// # Errors
    /// [`NoLease`], with what there is and who has it.
    pub fn lease(self: &Arc<Self>, wanted: &Wanted, holder: Holder) -> Result<Lease, NoLease> {
        let mut book = self.book.lock();
        let (grant, places) = book.ledger.grant(wanted, &holder.model).map_err(|refusal| match refusal {
            Refusal::NotHere => NoLease::NotHere { wanted: wanted.to_string(), here: self.here() },
            Refusal::NotFree => NoLease::NotFree { wanted: wanted.to_string(), held: self.held(&book) },
            Refusal::Lost => NoLease::Lost,
        })?;
        let hold = book.hold(grant, holder);
        Ok(Lease { of: Arc::clone(self), grant, hold, places, memory_mb: wanted.memory_mb })
    }

    /// Whether a model would get what it asks for, were it not for these leases.
    #[must_use]
    pub fn has_room_without(&self, leases: &[Weak<Lease>], wanted: &Wanted, model: &str) -> bool {
        // Before the lock: the last holder of a lease that lets go of it takes the lock.
        let grants = grants(leases);
        self.book.lock().ledger.has_room_without(&grants, wanted, model)
    }

    /// Keeps the devices of these leases for a model, also when they have ended.
    #[must_use]
    pub fn reserve(self: &Arc<Self>, leases: &[Weak<Lease>], model: &str) -> Reservation {
        let grants = grants(leases);
        let mut book = self.book.lock();
        grants.into_iter().for_each(|grant| book.ledger.reserve(grant, model));
        Reservation { of: Arc::clone(self), model: model.to_owned() }
    }

    /// Grows with each lease that ends: what was refused may be granted now.
    #[must_use]
    pub fn freed(&self) -> u64 {
        self.freed.load(Ordering::SeqCst)
    }

    /// The first device that was lost, once one is.
    #[must_use]
    pub fn lost(&self) -> watch::Receiver<Option<Lost>> {
        self.lost.subscribe()
    }

    /// What there is, for those who find nothing that would do.
    fn here(&self) -> String {
        if let Some(why) = &self.why_none {
            return format!("{why}; `gpu = []` runs it on the CPU, if its pipeline can");
        }
        let one = |device: &Device| {
            format!("{} ({}, {} MiB)", device.ordinal, device.name, device.memory_bytes / MEBIBYTE)
        };
        let all: Vec<String> = self.devices.iter().map(one).collect();
        format!("this machine has {}", all.join(", "))
    }

    fn held(&self, book: &Book) -> String {
        let of = |(place, device): (usize, &Device)| {
            let holders: Vec<String> = book
                .ledger
                .grants_on(place)
                .filter_map(|grant| book.holders.get(&grant))
                .flatten()
                .map(|(_, holder)| format!("replica {} of {}", holder.replica, holder.model))
                .collect();
            let who = if holders.is_empty() { "nobody".to_owned() } else { holders.join(" and ") };
            format!("{} ({}) is held by {who}", device.ordinal, device.name)
        };
        self.devices.iter().enumerate().map(of).collect::<Vec<_>>().join(", ")
    }

    fn fence(&self, place: usize, why: String) {
        let device = &self.devices[place];
        {
            let mut book = self.book.lock();
            if !book.ledger.fence(place) {
                return;
            }
            book.lost.insert(place, why.clone());
        }
        self.fenced[place].store(true, Ordering::SeqCst);
        tracing::error!(
            device = device.ordinal,
            name = device.name,
            uuid = device.uuid,
            why,
            "a device is lost until this process ends"
        );
        let lost = Lost { ordinal: device.ordinal, name: device.name.clone(), why };
        self.lost.send_modify(|first| {
            first.get_or_insert(lost);
        });
    }
}

fn grants(leases: &[Weak<Lease>]) -> Vec<u64> {
    leases.iter().filter_map(Weak::upgrade).map(|lease| lease.grant).collect()
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.of.book.lock().ledger.end_reservation(&self.model);
        self.of.freed.fetch_add(1, Ordering::SeqCst);
    }
}

impl Book {
    fn hold(&mut self, grant: u64, holder: Holder) -> u64 {
        self.held_ever += 1;
        self.holders.entry(grant).or_default().push((self.held_ever, holder));
        self.held_ever
    }
}

impl Lease {
    /// Its devices, one or more.
    pub fn devices(&self) -> impl Iterator<Item = &Device> {
        self.places.iter().map(|&place| &self.of.devices[place])
    }

    /// Mebibytes of each that were asked for; `None` for whole devices.
    #[must_use]
    pub fn memory_mb(&self) -> Option<u64> {
        self.memory_mb
    }

    /// The same devices for another holder, where they are what it asks for.
    #[must_use]
    pub fn share(&self, wanted: &Wanted, holder: Holder) -> Option<Self> {
        let mut book = self.of.book.lock();
        if !book.ledger.share(self.grant, wanted) {
            return None;
        }
        let hold = book.hold(self.grant, holder);
        let (of, places) = (Arc::clone(&self.of), self.places.clone());
        Some(Self { of, grant: self.grant, hold, places, memory_mb: wanted.memory_mb })
    }

    /// Whether one of its devices is lost.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.places.iter().any(|&place| self.of.fenced[place].load(Ordering::SeqCst))
    }

    /// Asks the driver after something failed on these devices, and fences those that are lost; says whether one is. `claimed` is what
    /// the pipeline said, where it said by a code or of its own accord that its device is lost: it is believed where the driver can't tell.
    ///
    /// Blocks, in most cases for microseconds, at most for [`HEALTH_TIME_MAX`].
    pub fn examine(&self, claimed: Option<&str>) -> bool {
        if self.is_lost() {
            return true;
        }
        for &place in &self.places {
            let ordinal = self.of.devices[place].ordinal;
            // A driver that is slow, as it is while it compiles, has lost nothing.
            let health = within(HEALTH_TIME_MAX, move || driver::health(ordinal)).unwrap_or_else(|| {
                Health::Unknown(format!("the driver did not say how it is within {HEALTH_TIME_MAX:?}"))
            });
            match (health, claimed) {
                (Health::Lost(why), _) => self.of.fence(place, why),
                (Health::Unknown(_), Some(claimed)) => self.of.fence(place, claimed.to_owned()),
                (Health::Sound, Some(claimed)) => {
                    tracing::warn!(
                        device = ordinal,
                        claimed,
                        "a pipeline says that its device is lost, and the driver says that it works: the device is kept"
                    );
                }
                (Health::Sound | Health::Unknown(_), _) => {}
            }
        }
        self.is_lost()
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut book = self.of.book.lock();
        book.ledger.release(self.grant, self.memory_mb);
        if let Some(holders) = book.holders.get_mut(&self.grant) {
            holders.retain(|(hold, _)| *hold != self.hold);
            if holders.is_empty() {
                book.holders.remove(&self.grant);
            }
        }
        drop(book);
        self.of.freed.fetch_add(1, Ordering::SeqCst);
    }
}

/// Runs something on a thread of its own, which is left behind where it takes too long.
fn within<T: Send + 'static>(limit: Duration, work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    let (done, result) = sync_channel(1);
    let work = move || {
        // Nobody waits for it any more where it was too slow.
        let _ = done.send(work());
    };
    thread::Builder::new().name("cuda driver".into()).spawn(work).ok()?;
    // Neither of a thread that is too slow nor of one that panicked there is a result.
    result.recv_timeout(limit).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(names: &[&str]) -> Arc<Devices> {
        let device = |(ordinal, name): (usize, &&str)| Device {
            ordinal: ordinal as u32,
            name: (*name).to_owned(),
            uuid: format!("GPU-{ordinal}"),
            memory_bytes: 1000 * MEBIBYTE,
            compute_capability: "9.0".to_owned(),
            pci_address: "0000:01:00.0".to_owned(),
        };
        let devices: Vec<Device> = names.iter().enumerate().map(device).collect();
        let why_none = devices.is_empty().then(|| "there is no CUDA driver".to_owned());
        Arc::new(Devices::new(driver::Found { devices, why_none }, None))
    }

    fn holder(model: &str) -> Holder {
        Holder { model: model.to_owned(), generation: 1, replica: 1 }
    }

    fn wanted(name: &str) -> Wanted {
        Wanted { preferences: vec![name.parse().unwrap()], memory_mb: None }
    }

    #[test]
    fn a_refusal_says_what_is_here_and_who_has_it() {
        let none = machine(&[]).lease(&wanted("H100"), holder("one")).err().unwrap().to_string();
        assert!(
            none.contains("H100") && none.contains("no CUDA driver") && none.contains("gpu = []"),
            "{none}"
        );
        let machine = machine(&["NVIDIA L4"]);
        let other = machine.lease(&wanted("H100:2"), holder("one")).err().unwrap().to_string();
        assert!(other.contains("H100:2") && other.contains("0 (NVIDIA L4, 1000 MiB)"), "{other}");
        let _lease = machine.lease(&wanted("any"), holder("one")).unwrap();
        let taken = machine.lease(&wanted("L4"), holder("two")).err().unwrap().to_string();
        assert!(taken.contains("0 (NVIDIA L4) is held by replica 1 of one"), "{taken}");
    }

    #[test]
    fn a_shared_lease_is_free_when_its_last_holder_has_left() {
        let machine = machine(&["NVIDIA L4"]);
        let first = machine.lease(&wanted("any"), holder("one")).unwrap();
        let second = first.share(&wanted("L4"), Holder { generation: 2, ..holder("one") }).unwrap();
        assert_eq!(machine.standing()[0].holders.len(), 2);
        drop(first);
        assert_eq!(machine.standing()[0].holders[0].generation, 2);
        assert!(machine.lease(&wanted("any"), holder("two")).is_err());
        let freed = machine.freed();
        drop(second);
        assert!(machine.freed() > freed);
        assert_eq!(machine.standing()[0].leased_mb, 0);
        assert!(machine.lease(&wanted("any"), holder("two")).is_ok());
    }

    #[test]
    fn where_the_driver_cannot_tell_the_pipeline_is_believed() {
        let machine = machine(&["NVIDIA L4", "NVIDIA L4"]);
        let lease = machine.lease(&wanted("any"), holder("one")).unwrap();
        assert!(!lease.examine(None), "a failure of another kind");
        assert!(lease.examine(Some("CUDA error 719")));
        let lost = machine.lost().borrow().clone().unwrap();
        assert_eq!((lost.ordinal, lost.why.as_str()), (0, "CUDA error 719"));
        assert_eq!(machine.lease(&wanted("any"), holder("two")).err(), Some(NoLease::Lost));
    }
}
