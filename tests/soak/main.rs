//! What takes longer than a test should: reloads by the hundred under load, what they cost, and what they leave behind; changes
//! of the configuration under load; how long wrong keys take; jobs while hosts and brokers are killed; hostile callers. Each
//! part asserts that nothing was lost or wrong, and prints what was measured: times depend on the machine, and are for people.
//! `cargo xtask bench reload` and `cargo xtask soak` run it.

#![allow(clippy::print_stdout, reason = "it prints what was measured")]

mod config;
mod edits;
mod failing;
mod hostile;
mod isolation;
mod jobs;
mod keys;
mod memory;
mod metrics;
mod mounts;
mod race;
mod reload;

use std::{env, process::ExitCode, time::Instant};

const PARTS: [(&str, fn()); 18] = [
    ("reload", reload::alone),
    ("neighbour", reload::beside_another_model),
    ("failing", failing::updates),
    ("mounts", mounts::polled),
    ("memory", memory::of_200_reloads),
    ("race", race::of_32_threads),
    ("config", config::fifty_changes),
    ("keys", keys::by_matching_prefix),
    ("metrics", metrics::of_one_request),
    ("jobs", jobs::chaos),
    ("sharing", jobs::sharing),
    ("million", jobs::a_million),
    ("hostile", hostile::mix),
    ("killers", isolation::killers),
    ("kills", isolation::kills),
    ("workers", isolation::reloads),
    ("poison", isolation::poison),
    ("edits", edits::two_hundred),
];

fn main() -> ExitCode {
    let wanted: Vec<String> = env::args().skip(1).collect();
    if let Some(unknown) = wanted.iter().find(|name| !PARTS.iter().any(|(known, _)| known == name)) {
        println!("no part {unknown:?}; expected {:?}", PARTS.map(|(name, _)| name));
        return ExitCode::from(2);
    }
    for (name, run) in PARTS {
        if wanted.is_empty() || wanted.iter().any(|wanted| wanted == name) {
            println!("\n== {name}");
            let begun = Instant::now();
            run();
            println!("== {name}: {:.0} s", begun.elapsed().as_secs_f64());
        }
    }
    ExitCode::SUCCESS
}
