//! What the CUDA driver says: which devices are here, and whether one has failed. The driver is looked for at run time, by the
//! loader's own search path; where there is none, that is an answer. All `unsafe` of this crate stands here. It makes no
//! context of its own, and so costs no device memory.

use std::{
    ffi::{CStr, c_int, c_uint},
    panic::catch_unwind,
    sync::OnceLock,
};

use cudarc::driver::{
    result::{self, DriverError},
    sys::{self, CUdevice_attribute as Attribute, CUresult},
};

use crate::Device;

/// What a look for devices found.
pub(crate) struct Found {
    pub(crate) devices: Vec<Device>,
    /// Why there are none.
    pub(crate) why_none: Option<String>,
}

/// Results that last until the process ends, as CUDA's documentation of `CUresult` says of each (the SDK, which this crate doesn't know, has
/// the same, and a test holds the two against each other); and 999, which is all that it says where a
/// device fell off the bus.
const LASTING: [u32; 15] = [214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721, 999];

/// How the driver says that a device is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Health {
    /// Its context takes work.
    Sound,
    /// Every call in its context fails until the process ends, with this error.
    Lost(String),
    /// It can't be told, for this reason: nothing of this process works on the device, for one.
    Unknown(String),
}

/// `CU_STREAM_PER_THREAD`.
const STREAM_PER_THREAD: usize = 2;

/// Whether there is a driver. cudarc panics at the first call where there is none, so this is asked before any.
fn is_present() -> bool {
    static PRESENT: OnceLock<bool> = OnceLock::new();
    // SAFETY: it loads the driver's library, whose constructors are as trusted as the machine's driver.
    *PRESENT.get_or_init(|| unsafe { sys::is_culib_present() })
}

/// Lists the devices, in the driver's order. May take as long as the driver needs to wake them: seconds.
pub(crate) fn find() -> Found {
    let none = |why: String| Found { devices: Vec::new(), why_none: Some(why) };
    if !is_present() {
        return none("there is no CUDA driver (libcuda.so) on this machine".to_owned());
    }
    match without_panic(list) {
        Ok(devices) if devices.is_empty() => none("the CUDA driver sees no device".to_owned()),
        Ok(devices) => Found { devices, why_none: None },
        Err(Trouble::Driver(DriverError(CUresult::CUDA_ERROR_NO_DEVICE))) => {
            none("the CUDA driver sees no device".to_owned())
        }
        Err(trouble) => none(format!("the CUDA driver can't be used: {trouble}")),
    }
}

fn list() -> Result<Vec<Device>, DriverError> {
    result::init()?;
    let mut devices = Vec::new();
    for ordinal in 0..result::device::get_count()? {
        match describe(ordinal) {
            Ok(device) => devices.push(device),
            // The others are no worse for it.
            Err(error) => {
                tracing::error!(device = ordinal, error = describe_error(error), "a device can't be used");
            }
        }
    }
    Ok(devices)
}

fn describe(ordinal: c_int) -> Result<Device, DriverError> {
    let device = result::device::get(ordinal)?;
    let attribute = |which| {
        // SAFETY: the device came from `get`.
        unsafe { result::device::get_attribute(device, which) }
    };
    let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    Ok(Device {
        ordinal: ordinal.unsigned_abs(),
        name: result::device::get_name(device)?,
        uuid: uuid(result::device::get_uuid(device)?),
        // SAFETY: the device came from `get`.
        memory_bytes: unsafe { result::device::total_mem(device) }? as u64,
        compute_capability: format!("{major}.{minor}"),
        pci_address: pci_address(device)?,
    })
}

/// As the driver's own tools write it.
fn uuid(uuid: sys::CUuuid) -> String {
    let hex: String = uuid.bytes.iter().map(|byte| format!("{:02x}", byte.cast_unsigned())).collect();
    format!("GPU-{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

fn pci_address(device: sys::CUdevice) -> Result<String, DriverError> {
    // "0000:3b:00.0" and its end, and room for domains of eight digits.
    let mut buffer = [0u8; 32];
    // SAFETY: the driver writes at most as many bytes as it is told, and ends them with a zero.
    unsafe { sys::cuDeviceGetPCIBusId(buffer.as_mut_ptr().cast(), buffer.len() as c_int, device) }
        .result()?;
    let address = CStr::from_bytes_until_nul(&buffer).map_or_else(|_| "".into(), CStr::to_string_lossy);
    Ok(address.to_ascii_lowercase())
}

/// How a device is, by the primary context of this process on it: the one that pipelines share, and in which an error that lasts is
/// seen by everybody. It doesn't wait for work under way.
pub(crate) fn health(ordinal: u32) -> Health {
    if !is_present() {
        return Health::Unknown("there is no CUDA driver".to_owned());
    }
    match without_panic(|| ask(ordinal)) {
        Ok(health) => health,
        Err(trouble) => Health::Unknown(trouble.to_string()),
    }
}

fn ask(ordinal: u32) -> Result<Health, DriverError> {
    result::init()?;
    let device = result::device::get(ordinal as c_int)?;
    let (mut flags, mut active): (c_uint, c_int) = (0, 0);
    // SAFETY: both are written before they are read, and the device came from `get`.
    unsafe { sys::cuDevicePrimaryCtxGetState(device, &raw mut flags, &raw mut active) }.result()?;
    if active == 0 {
        return Ok(Health::Unknown("this process has no primary context on it".to_owned()));
    }
    // SAFETY: the device came from `get`, and what is retained is released below.
    let context = match unsafe { result::primary_ctx::retain(device) } {
        Ok(context) => context,
        Err(error) => return Ok(judge(Err(error))),
    };
    let before = result::ctx::get_current();
    // SAFETY: the context was retained.
    let queried = unsafe { result::ctx::set_current(context) }.and_then(|()| query());
    let before = before.ok().flatten().unwrap_or(std::ptr::null_mut());
    // SAFETY: it was current on this thread a moment ago, or there was none.
    let restored = unsafe { result::ctx::set_current(before) };
    // SAFETY: as often as it was retained.
    let released = unsafe { result::primary_ctx::release(device) };
    let health = judge(queried);
    if health == Health::Sound {
        restored.and(released)?
    };
    Ok(health)
}

/// Asks this thread's own stream of the current context how it is: it never ran anything. The legacy stream would break graphs that another
/// thread captures, and so may any call that isn't made in relaxed mode.
fn query() -> Result<(), DriverError> {
    let mut mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
    // SAFETY: the mode is read and written; the stream is CUDA's name for the thread's own.
    unsafe {
        sys::cuThreadExchangeStreamCaptureMode(&raw mut mode).result()?;
        let queried = sys::cuStreamQuery(std::ptr::without_provenance_mut(STREAM_PER_THREAD)).result();
        sys::cuThreadExchangeStreamCaptureMode(&raw mut mode).result().and(queried)
    }
}

fn judge(queried: Result<(), DriverError>) -> Health {
    match queried {
        // Work under way is a good sign.
        Ok(()) | Err(DriverError(CUresult::CUDA_ERROR_NOT_READY)) => Health::Sound,
        Err(error) if LASTING.contains(&(error.0 as u32)) => Health::Lost(describe_error(error)),
        Err(error) => Health::Unknown(describe_error(error)),
    }
}

/// `CUDA_ERROR_ILLEGAL_ADDRESS (700): an illegal memory access was encountered`.
fn describe_error(error: DriverError) -> String {
    let text = error.error_string().map_or_else(|_| "".into(), CStr::to_string_lossy).into_owned();
    format!("{:?} ({}): {text}", error.0, error.0 as u32)
}

#[derive(Debug)]
enum Trouble {
    Driver(DriverError),
    /// cudarc misses a symbol: the driver is older than it expects.
    Panicked(String),
}

impl std::fmt::Display for Trouble {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Driver(error) => f.write_str(&describe_error(*error)),
            Self::Panicked(message) => write!(f, "it may be too old ({message})"),
        }
    }
}

fn without_panic<T>(
    work: impl FnOnce() -> Result<T, DriverError> + std::panic::UnwindSafe,
) -> Result<T, Trouble> {
    match catch_unwind(work) {
        Ok(result) => result.map_err(Trouble::Driver),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            Err(Trouble::Panicked(text.unwrap_or_else(|| "a call failed".to_owned())))
        }
    }
}
