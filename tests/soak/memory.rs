//! What generations leave behind: the growth of the process beside what it says it retains, up to the last library that it
//! opens.

use std::fs;

use modalkit_tests::{
    Host, Setup, library,
    load::{ECHO, Load},
    put, wait_until,
};

const RELOADS: u64 = 200;
const MIB: f64 = 1024.0 * 1024.0;

pub(crate) fn of_200_reloads() {
    let config = "[server]\nlog = \"error,modalkit::app=info\"\n[app_settings.deployment_config]\nprobation_seconds = 0";
    let host = Setup::new().plugin("echo").config(config).ready();
    let load = Load::start(host.address, 2, ECHO);
    // The first ones fill allocators and thread stacks.
    (1..=5).for_each(|number| reload(&host, number));
    let retained = |host: &Host| host.report("echo")["retired"]["bytes"].as_u64().unwrap_or_default() as f64;
    let (before, retained_before) = (pss(&host), retained(&host));
    (6..=RELOADS + 5).for_each(|number| reload(&host, number));
    let grown = pss(&host) - before;
    let reported = retained(&host) - retained_before;
    println!(
        "{RELOADS} reloads of echo: the process grew by {:.1} MiB (PSS), {:.3} a generation; reported as retained: {:.1} MiB; ratio {:.2}",
        grown / MIB,
        grown / MIB / RELOADS as f64,
        reported / MIB,
        grown / reported
    );
    assert!(grown <= 1.5 * reported, "it keeps more than it says");
    // Up to the last library.
    let mut opened = RELOADS + 5;
    while host.report("echo")["history"][0]["outcome"] == "swapped" {
        opened += 1;
        install(&host, opened);
        let known = host.report("echo")["history"][0]["at_unix_ms"].clone();
        wait_until("it was taken or refused", || host.report("echo")["history"][0]["at_unix_ms"] != known);
    }
    let entry = host.report("echo")["history"][0].clone();
    println!("library {} is refused: {}", opened + 1, entry["reason"]);
    assert_eq!(host.metric("modalkit_plugin_libraries"), 256.0);
    assert_eq!(opened, 256);
    load.stop().assert_faultless();
}

fn install(host: &Host, number: u64) {
    let mut bytes = fs::read(library("echo")).expect("echo is built");
    // Behind the section table, where nobody looks: other content, the same code.
    bytes.extend(number.to_le_bytes());
    put(&bytes, &host.volume().join("echo.so"));
}

fn reload(host: &Host, number: u64) {
    install(host, number);
    wait_until("it serves", || host.report("echo")["generation"]["number"] == number + 1);
    wait_until("the old one has left", || {
        host.report("echo")["history"][0]["phases"]["drain_ms"].is_number()
    });
}

/// The process' memory, shared pages by their share.
fn pss(host: &Host) -> f64 {
    let rollup = fs::read_to_string(format!("/proc/{}/smaps_rollup", host.id())).expect("the kernel says");
    let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:")).expect("a total");
    line.trim().trim_end_matches("kB").trim().parse::<f64>().expect("kibibytes") * 1024.0
}
