//! Records the compiler's version, which the handshake carries for people who wonder why a plugin was refused.

use std::{env, process::Command};

fn main() {
    let rustc = env::var("RUSTC").expect("cargo sets RUSTC for build scripts");
    let version = Command::new(rustc).arg("--version").output().ok().filter(|out| out.status.success());
    let version = version
        .map_or_else(|| "unknown".into(), |out| String::from_utf8_lossy(&out.stdout).trim().to_owned());
    println!("cargo::rustc-env=MODALKIT_RUSTC_VERSION={version}");
    println!("cargo::rerun-if-changed=build.rs");
}
