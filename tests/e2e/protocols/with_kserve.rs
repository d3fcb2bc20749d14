//! KServe's own clients.

use modalkit_tests::client_python;

use super::calls::{Calls, run, three_models};

#[test]
fn kserves_clients_get_what_predict_sync_gives() {
    let host = three_models();
    let calls = Calls::of(&host);
    for kind in ["rest", "grpc"] {
        let address = host.address.to_string();
        calls.assert_same(&run(
            &client_python("kserve"),
            "kserve_client.py",
            &[&address, kind],
            &calls.calls,
        ));
    }
    let names = host.get("/v2/models").1;
    assert_eq!(names, serde_json::json!({"models": ["digits", "echo", "similarity"]}));
}
