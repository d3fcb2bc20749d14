//! Machines with GPUs, for hosts on machines without: the library that stands in for the CUDA driver (`tests/fixtures/cuda_stand_in`),
//! found through the loader's own search path.

use std::{env, ffi::OsString, fs, os::unix::fs::symlink, path::PathBuf};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{Setup, built};

/// The names under which the driver and NVML are looked for.
const NAMES: [&str; 2] = ["libcuda.so", "libnvidia-ml.so.1"];

/// A machine's GPUs, as the stand-in's file describes them.
pub struct Gpus {
    folder: TempDir,
    devices: Value,
}

impl Gpus {
    /// These, by name and mebibytes of memory.
    ///
    /// # Panics
    /// Where there is no place for temporary files.
    #[must_use]
    pub fn new(devices: &[(&str, u64)]) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        for name in NAMES {
            symlink(built().join("libcuda_stand_in.so"), folder.path().join(name))
                .expect("the folder is new");
        }
        let device = |(name, memory_mb): &(&str, u64)| json!({"name": name, "memory_mb": memory_mb});
        let gpus = Self { folder, devices: devices.iter().map(device).collect() };
        gpus.script(&json!({}));
        gpus
    }

    /// A machine without a driver, also where there is one: what is found first is no library.
    ///
    /// # Panics
    /// Where there is no place for temporary files.
    #[must_use]
    pub fn no_driver() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        for name in ["libcuda.so", "libcuda.so.1", "libnvidia-ml.so.1"] {
            fs::write(folder.path().join(name), "no library").expect("the folder is new");
        }
        Self { folder, devices: json!([]) }
    }

    /// Writes the file anew: what happens beside the devices being there.
    ///
    /// # Panics
    /// Where it can't be written.
    pub fn script(&self, happens: &Value) {
        let mut script = happens.clone();
        script["devices"] = self.devices.clone();
        // At once, as it may be read at any moment.
        let new = self.folder.path().join("new");
        fs::write(&new, script.to_string()).expect("the file is written");
        fs::rename(new, self.file()).expect("it is put in place");
    }

    fn file(&self) -> PathBuf {
        self.folder.path().join("gpus.json")
    }

    /// A host on this machine.
    #[must_use]
    pub fn setup(&self) -> Setup {
        let mut path = OsString::from(self.folder.path());
        if let Some(before) = env::var_os("LD_LIBRARY_PATH") {
            path.push(":");
            path.push(before);
        }
        Setup::new()
            .variable("LD_LIBRARY_PATH", &path.to_string_lossy())
            .variable("MODALKIT_CUDA_STAND_IN", &self.file().to_string_lossy())
    }
}
