//! What a fleet is told from outside: by those who hold it, and by walks that it has started. It carries nothing out.

use std::sync::{Arc, Weak};

use modalkit_device::Lease;
use modalkit_engine::{Failure, FailureKind};
use tokio::sync::oneshot;

use super::{generation::SharedInstance, replica::Replica};

/// A change in a volume, as the pipelines are told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeChange {
    /// The volume's name.
    pub volume: String,
    /// Where it lies.
    pub mount_point: String,
    /// Changed files, relative to it; none where nobody knows which.
    pub changed: Vec<String>,
}

/// Devices that may be shared while their holders are there.
pub type Leases = Vec<Weak<Lease>>;

pub(super) enum FleetCommand {
    DataChanged,
    VolumeReload(VolumeChange, oneshot::Sender<Vec<Result<(), Failure>>>),
    /// A hook overran its time; its replica is given up.
    GiveUp(Arc<Replica>),
    /// The thread of such a hook has returned.
    ThreadReturned,
    Instance(oneshot::Sender<Option<SharedInstance>>),
    Leases(oneshot::Sender<Leases>),
    Stop,
}

/// A failure that the host itself reports.
pub(super) fn failure(message: String) -> Failure {
    Failure { kind: FailureKind::Permanent, message }
}
