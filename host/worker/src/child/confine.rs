//! What a worker may use and see, put in force before any plugin code runs. What is asked for and can't be had is said, and where it is a matter of
//! safety the worker refuses to go on.

use rustix::{
    process::{Resource, Rlimit},
    thread::CpuSet,
};

use crate::documents::Hello;

/// Confines this process; what comes back are warnings.
///
/// # Errors
/// A sandbox is asked for, and the system has none.
pub(super) fn confine(hello: &Hello) -> Result<Vec<String>, String> {
    let mut warnings = Vec::new();
    let confinement = &hello.confinement;
    if let Some(bytes) = confinement.memory_bytes {
        let limit = Rlimit { current: Some(bytes), maximum: Some(bytes) };
        if let Err(error) = rustix::process::setrlimit(Resource::Data, limit) {
            warnings.push(format!("memory is not limited: {error}"));
        }
    }
    if let Some(cpus) = confinement.cpus.as_ref().filter(|cpus| !cpus.is_empty()) {
        let mut set = CpuSet::new();
        cpus.iter().for_each(|cpu| set.set(*cpu as usize));
        if let Err(error) = rustix::thread::sched_setaffinity(None, &set) {
            warnings.push(format!("cores are not limited: {error}"));
        }
    }
    rustix::thread::set_no_new_privs(true)
        .map_err(|error| format!("can't give up new privileges: {error}"))?;
    Ok(warnings)
}
