//! How busy devices are, as NVML says: free memory and utilisation, of all processes together and without a context on any device.
//! NVML comes with the driver and is looked for at run time; where there is none, nothing is known.

use std::ffi::OsStr;

use nvml_wrapper::Nvml;
use serde::Serialize;

/// The names of its library, the second with the driver's developer files only.
const LIBRARIES: [&str; 2] = ["libnvidia-ml.so.1", "libnvidia-ml.so"];

/// A connection to NVML.
pub(crate) struct Monitor(Nvml);

/// How busy a device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Usage {
    /// Bytes that nobody uses.
    pub memory_free_bytes: u64,
    /// Bytes that processes, and the driver, use.
    pub memory_used_bytes: u64,
    /// Of 100: the share of the last moments in which it ran something.
    pub utilization_percent: Option<u32>,
}

impl Monitor {
    /// Connects, where there is something to connect to.
    pub(crate) fn open() -> Option<Self> {
        LIBRARIES.iter().find_map(|name| Nvml::builder().lib_path(OsStr::new(name)).init().ok()).map(Self)
    }

    /// How busy a device is. `None` where NVML doesn't say.
    pub(crate) fn usage(&self, uuid: &str) -> Option<Usage> {
        let device = self.0.device_by_uuid(uuid).ok()?;
        let memory = device.memory_info().ok()?;
        Some(Usage {
            memory_free_bytes: memory.free,
            memory_used_bytes: memory.total.saturating_sub(memory.free),
            // Some devices, and parts of devices, don't know it.
            utilization_percent: device.utilization_rates().ok().map(|rates| rates.gpu),
        })
    }
}
