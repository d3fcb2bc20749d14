//! The device that a replica was given, and what errors of it mean. With the feature `cuda`, the way to it through cudarc.

use serde::{Deserialize, Serialize};

use crate::ErrorKind;

/// A GPU that the host leased to this replica: nobody else uses it, or, where the model has a memory budget, others that have one too.
///
/// With the feature `cuda`, `Device::cuda` is the way to it:
///
/// ```
/// # use modalkit_sdk::{LoadContext, NoSettings, PipelineError};
/// fn where_to_run(ctx: &LoadContext<NoSettings>) -> Result<String, PipelineError> {
///     let device = ctx.device().ok_or_else(|| PipelineError::permanent("give this model a `gpu`"))?;
///     Ok(format!("device {} ({})", device.ordinal(), device.name()))
/// }
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    ordinal: usize,
    name: String,
    uuid: String,
    memory_bytes: u64,
    memory_budget_bytes: Option<u64>,
}

impl Device {
    /// Describes a device. The host makes these; tests may too.
    ///
    /// ```
    /// use modalkit_sdk::Device;
    ///
    /// let device = Device::new(0, "NVIDIA L4", "GPU-0", 24 << 30);
    /// assert_eq!((device.ordinal(), device.memory_budget_bytes()), (0, None));
    /// ```
    pub fn new(ordinal: usize, name: impl Into<String>, uuid: impl Into<String>, memory_bytes: u64) -> Self {
        Self { ordinal, name: name.into(), uuid: uuid.into(), memory_bytes, memory_budget_bytes: None }
    }

    /// Its number in this process, from 0: what cudarc, candle and ONNX Runtime want to be told.
    #[must_use]
    pub fn ordinal(&self) -> usize {
        self.ordinal
    }

    /// As its maker calls it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its own for ever: `GPU-…`.
    #[must_use]
    pub fn uuid(&self) -> &str {
        &self.uuid
    }

    /// Bytes of all of its memory.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        self.memory_bytes
    }

    /// Bytes that this replica may use, where it shares the device (`deployment_config.gpu_memory_mb`). Nobody enforces it: a replica
    /// that takes more takes it from the others.
    #[must_use]
    pub fn memory_budget_bytes(&self) -> Option<u64> {
        self.memory_budget_bytes
    }

    /// The device's primary context in this process, current on the calling thread. All replicas on the device share it, as does
    /// everything else in the process that uses CUDA's runtime.
    ///
    /// ```no_run
    /// # use modalkit_sdk::{LoadContext, NoSettings, PipelineError};
    /// # fn load(ctx: &LoadContext<NoSettings>) -> Result<(), PipelineError> {
    /// let device = ctx.device().ok_or_else(|| PipelineError::permanent("give this model a `gpu`"))?;
    /// let stream = device.cuda()?.new_stream()?;
    /// let weights = stream.clone_htod(&[1.0f32, 2.0])?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// The driver is missing or too old, or it makes no context: for want of memory, or as the device is lost.
    #[cfg(feature = "cuda")]
    pub fn cuda(&self) -> Result<std::sync::Arc<cudarc::driver::CudaContext>, crate::PipelineError> {
        use crate::PipelineError;

        // SAFETY: it loads the driver's library, whose constructors are as trusted as the machine's driver. cudarc panics where there
        // is none.
        if !unsafe { cudarc::driver::sys::is_culib_present() } {
            return Err(PipelineError::permanent("there is no CUDA driver (libcuda.so) on this machine"));
        }
        let context = cudarc::driver::CudaContext::new(self.ordinal)?;
        Ok(context)
    }
}

/// Results of CUDA that last until the process ends: their number in the driver and in the runtime, their names there, and what both
/// call them in words.
const LASTING: [(u32, &str, &str, &str); 15] = [
    (214, "CUDA_ERROR_ECC_UNCORRECTABLE", "cudaErrorECCUncorrectable", "uncorrectable ECC error encountered"),
    (220, "CUDA_ERROR_NVLINK_UNCORRECTABLE", "cudaErrorNvlinkUncorrectable", "uncorrectable NVLink error"),
    (226, "CUDA_ERROR_CONTAINED", "cudaErrorContained", "Invalid access of peer GPU memory"),
    (
        700,
        "CUDA_ERROR_ILLEGAL_ADDRESS",
        "cudaErrorIllegalAddress",
        "an illegal memory access was encountered",
    ),
    (702, "CUDA_ERROR_LAUNCH_TIMEOUT", "cudaErrorLaunchTimeout", "the launch timed out and was terminated"),
    (709, "CUDA_ERROR_CONTEXT_IS_DESTROYED", "cudaErrorContextIsDestroyed", "context is destroyed"),
    (710, "CUDA_ERROR_ASSERT", "cudaErrorAssert", "device-side assert triggered"),
    (714, "CUDA_ERROR_HARDWARE_STACK_ERROR", "cudaErrorHardwareStackError", "hardware stack error"),
    (
        715,
        "CUDA_ERROR_ILLEGAL_INSTRUCTION",
        "cudaErrorIllegalInstruction",
        "an illegal instruction was encountered",
    ),
    (716, "CUDA_ERROR_MISALIGNED_ADDRESS", "cudaErrorMisalignedAddress", "misaligned address"),
    (
        717,
        "CUDA_ERROR_INVALID_ADDRESS_SPACE",
        "cudaErrorInvalidAddressSpace",
        "operation not supported on global/shared address space",
    ),
    (718, "CUDA_ERROR_INVALID_PC", "cudaErrorInvalidPc", "invalid program counter"),
    (719, "CUDA_ERROR_LAUNCH_FAILED", "cudaErrorLaunchFailure", "unspecified launch failure"),
    (721, "CUDA_ERROR_TENSOR_MEMORY_LEAK", "cudaErrorTensorMemoryLeak", "tensor memory not completely freed"),
    // The driver says no more where a device fell off the bus. Its words, "unknown error", are anybody's.
    (999, "CUDA_ERROR_UNKNOWN", "cudaErrorUnknown", "CUDA unknown error"),
];

/// The same of those that another try may not meet.
const PASSING: [(u32, &str, &str, &str); 2] = [
    (2, "CUDA_ERROR_OUT_OF_MEMORY", "cudaErrorMemoryAllocation", "CUDA out of memory"),
    (
        46,
        "CUDA_ERROR_DEVICE_UNAVAILABLE",
        "cudaErrorDevicesUnavailable",
        "CUDA-capable device(s) is/are busy",
    ),
];

/// What a result of the CUDA driver (`CUresult`) or, which is the same number for these, of its runtime means.
pub(crate) fn kind_of_code(code: u32) -> ErrorKind {
    if LASTING.iter().any(|known| known.0 == code) {
        ErrorKind::DeviceLost
    } else if PASSING.iter().any(|known| known.0 == code) {
        ErrorKind::Transient
    } else {
        ErrorKind::Permanent
    }
}

/// What a text of an error means, for those who have no code: the one place that reads texts. `None` where it tells of nothing that CUDA
/// says. Words alone count only beside the word CUDA. The host asks the driver before it believes a text.
pub(crate) fn kind_of_text(text: &str) -> Option<ErrorKind> {
    // Most errors have nothing to do with a device.
    if !text.contains("CUDA") && !text.contains("cuda") {
        return None;
    }
    let tells = |known: &(u32, &str, &str, &str)| {
        has_word(text, known.1) || has_word(text, known.2) || text.contains(known.3)
    };
    if LASTING.iter().any(tells) {
        Some(ErrorKind::DeviceLost)
    } else if PASSING.iter().any(tells) {
        Some(ErrorKind::Transient)
    } else {
        None
    }
}

/// Whether a name stands in a text, and not as a part of a longer one.
fn has_word(text: &str, word: &str) -> bool {
    let part = |letter: char| letter.is_alphanumeric() || letter == '_';
    text.match_indices(word)
        .any(|(at, _)| !text[..at].ends_with(part) && !text[at + word.len()..].starts_with(part))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_of_what_lasts_are_known_and_others_are_not() {
        for text in [
            "DriverError(CUDA_ERROR_ILLEGAL_ADDRESS, \"an illegal memory access was encountered\")",
            "CUDA error: device-side assert triggered",
            "cudaErrorLaunchFailure: unspecified launch failure",
            "called `Result::unwrap()` on an `Err` value: DriverError(CUDA_ERROR_UNKNOWN, \"unknown error\")",
        ] {
            assert_eq!(kind_of_text(text), Some(ErrorKind::DeviceLost), "{text}");
        }
        for text in
            ["CUDA out of memory. Tried to allocate 2 GiB", "DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"\")"]
        {
            assert_eq!(kind_of_text(text), Some(ErrorKind::Transient), "{text}");
        }
        for text in [
            "misaligned address",
            "unknown error",
            "CUDA_ERROR_ASSERTION_OF_MINE",
            "NOT_CUDA_ERROR_ASSERT",
            "CUDA: unknown error",
            "the cuda feature is off",
        ] {
            assert_eq!(kind_of_text(text), None, "{text}");
        }
    }

    #[test]
    fn codes_say_whether_it_lasts() {
        assert_eq!(kind_of_code(700), ErrorKind::DeviceLost);
        assert_eq!(kind_of_code(2), ErrorKind::Transient);
        assert_eq!(kind_of_code(1), ErrorKind::Permanent);
    }
}
