//! The kernel for GPUs, run on a CPU by the machine's C compiler: its text is nearly C, and what it finds can be checked without a GPU.

#![allow(clippy::unwrap_used, reason = "a test ends at what it did not expect, and shows where")]

use std::{fs, path::Path, process::Command};

#[test]
fn the_kernel_finds_the_best_of_each_chunk() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let kernel = fs::read_to_string(here.join("src/top_k.cu")).unwrap();
    let around = fs::read_to_string(here.join("tests/on_a_cpu.c")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let (source, program) = (folder.path().join("kernel.c"), folder.path().join("kernel"));
    let text = around.replace("\nKERNEL\n", &kernel.replace("extern \"C\" ", ""));
    assert!(text.contains("LEAST"), "the kernel stands in it");
    fs::write(&source, text).unwrap();
    let compiled =
        Command::new("cc").args(["-O1", "-pthread", "-o"]).arg(&program).arg(&source).output().unwrap();
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    let ran = Command::new(&program).output().unwrap();
    let said = String::from_utf8(ran.stdout).unwrap();
    assert!(ran.status.success() && said.starts_with("0 wrong of "), "{said}");
}
