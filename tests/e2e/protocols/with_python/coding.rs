//! Compressed requests and answers, as tritonclient has them.

use std::process::Command;

use modalkit_tests::{Setup, python_tool, workspace};

#[test]
fn tritons_clients_send_and_take_compressed_bodies() {
    let host = Setup::new().plugin("tensors").config("[server]\nbody_bytes_max = 4_000_000\n").ready();
    let output = Command::new(python_tool("python3"))
        .arg(workspace().join("tests/e2e/protocols/http_calls.py"))
        .arg(host.address.to_string())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
