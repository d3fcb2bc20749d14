//! What opened libraries cost in memory, as the kernel says it. It never knows who uses them.

use std::{collections::HashSet, fs};

use modalkit_engine::Staged;

/// Bytes of memory that these files keep in it until the process ends: the resident part of their mappings, pages that are
/// shared with other processes by their share. 0 where the kernel doesn't say.
pub(crate) fn bytes(files: &[Staged]) -> u64 {
    // The kernel names files by their real paths.
    let path = |file: &Staged| file.path().canonicalize().ok()?.to_str().map(ToOwned::to_owned);
    let paths: HashSet<String> = files.iter().filter_map(path).collect();
    // A file of some milliseconds: for reports, not for every request.
    let maps = fs::read_to_string("/proc/self/smaps").unwrap_or_default();
    let mut counts = false;
    let mut kibibytes = 0;
    for line in maps.lines() {
        if let Some(pss) = line.strip_prefix("Pss:") {
            let pss: u64 = pss.trim().trim_end_matches("kB").trim().parse().unwrap_or(0);
            kibibytes += if counts { pss } else { 0 };
        } else if let Some((range, rest)) = line.split_once(' ')
            && range.contains('-')
        {
            counts = rest.find('/').is_some_and(|start| paths.contains(&rest[start..]));
        }
    }
    kibibytes * 1024
}
