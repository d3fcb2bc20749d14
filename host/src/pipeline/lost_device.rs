//! What failures have to do with the devices under a replica: the driver is asked, and words are corrected. It never decides what follows.

use modalkit_device::Lease;
use modalkit_engine::{Failure, FailureKind};

use super::stages::is_no_fault;

/// Finds out whether what failed has to do with its device, and corrects what was said of that. The driver is asked once for a batch.
pub(super) fn examine<'f>(lease: Option<&Lease>, failures: impl Iterator<Item = &'f mut Failure>) {
    let failures: Vec<&mut Failure> = failures.filter(|failure| !is_no_fault(failure)).collect();
    if failures.is_empty() {
        return;
    }
    let lost = lease.is_some_and(|lease| {
        let claim = failures.iter().find(|failure| failure.kind == FailureKind::DeviceLost);
        lease.examine(claim.map(|failure| failure.message.as_str()))
    });
    failures.into_iter().for_each(|failure| correct(failure, lost));
}

/// Asks the driver what a failure on these devices means, and says so in it. Without devices, or where what failed has a process of its own and
/// the device is well without that, none is lost.
pub(super) fn judge(lease: Option<&Lease>, failure: &mut Failure) {
    let claim = (failure.kind == FailureKind::DeviceLost).then(|| failure.message.clone());
    correct(failure, lease.is_some_and(|lease| lease.examine(claim.as_deref())));
}

/// Sets a failure's kind by whether a device is lost; a loss that the plugin claims and the driver doesn't confirm is transient.
fn correct(failure: &mut Failure, lost: bool) {
    failure.kind = match failure.kind {
        _ if lost => FailureKind::DeviceLost,
        FailureKind::DeviceLost | FailureKind::DeviceSuspected => FailureKind::Transient,
        kind => kind,
    };
}
