//! Metrics of GPUs.

use modalkit_device::Standing;
use prometheus::IntGaugeVec;

use super::registrar::{Registrar, families};

families! {
    struct DeviceFamilies {
        memory_total: gauges("modalkit_device_memory_bytes", "all of a device's memory", ["device", "name"]);
        memory_free: gauges("modalkit_device_memory_free_bytes", "what no process uses of it", ["device", "name"]);
        memory_leased: gauges("modalkit_device_memory_leased_bytes", "what replicas of this host may use of it", ["device", "name"]);
        utilization: gauges("modalkit_device_utilization_percent", "the share of the last moments in which it ran something", ["device", "name"]);
        leases: gauges("modalkit_device_holders", "replicas of this host that hold it", ["device", "name"]);
        lost: gauges("modalkit_device_lost", "1 once it has failed for good", ["device", "name"]);
    }
}

/// GPUs, by their number and name.
pub struct DeviceMetrics(DeviceFamilies);

impl DeviceMetrics {
    pub(super) fn new(registrar: &Registrar) -> Self {
        Self(DeviceFamilies::new(registrar))
    }

    /// Takes over how a device stands.
    pub fn set(&self, standing: &Standing<'_>) {
        let ordinal = standing.device.ordinal.to_string();
        let device = [ordinal.as_str(), standing.device.name.as_str()];
        let set = |gauge: &IntGaugeVec, value: u64| {
            gauge.with_label_values(&device).set(i64::try_from(value).unwrap_or(i64::MAX));
        };
        set(&self.0.memory_total, standing.device.memory_bytes);
        set(&self.0.memory_leased, standing.leased_mb << 20);
        set(&self.0.leases, standing.holders.len() as u64);
        set(&self.0.lost, u64::from(standing.lost.is_some()));
        let usage = standing.usage.as_ref();
        for (gauge, value) in [
            (&self.0.memory_free, usage.map(|usage| usage.memory_free_bytes)),
            (&self.0.utilization, usage.and_then(|usage| usage.utilization_percent).map(u64::from)),
        ] {
            match value {
                Some(value) => set(gauge, value),
                // What isn't known any more isn't shown; there may have been none.
                None => drop(gauge.remove_label_values(&device)),
            }
        }
    }
}
