//! Azure's protocol, as azurite speaks it: ETags without quotes in listings, and conditions that hold.

use std::fs;

use super::{LOOKS, ROUNDS, bucket, is_followed, mirrored, mount_point, mounted, survives_its_store};
use modalkit_tests::{Setup, stores::Store, wait_until};

#[test]
fn a_large_bucket_is_followed_and_no_look_sees_half_a_change() {
    is_followed(&Store::azurite(), LOOKS / 4, ROUNDS / 2);
}

#[test]
fn a_store_that_goes_away_takes_nothing_along() {
    let mut store = Store::azurite();
    survives_its_store(&mut store);
}

#[test]
fn files_go_up_and_nothing_is_overwritten() {
    let store = Store::azurite();
    store.put("out/theirs", "one");
    let host = mounted(Setup::new(), &store.endpoint, &store.secret(), "poll_interval_ms = 600000").start();
    mirrored(&host, 1);
    let mount = mount_point(&host.folder());
    fs::write(mount.join("out/mine"), "mine").unwrap();
    wait_until("the file has gone up", || store.object("out/mine").as_deref() == Some(b"mine"));
    fs::write(mount.join("out/mine"), "mine, longer").unwrap();
    wait_until("and its change has", || store.object("out/mine").as_deref() == Some(b"mine, longer"));
    store.put("out/theirs", "two");
    fs::write(mount.join("out/theirs"), "my own").unwrap();
    wait_until("the conflict is told", || bucket(&host)["conflicts"] == 1);
    assert_eq!(store.object("out/theirs").as_deref(), Some(&b"two"[..]));
    wait_until("the bucket's is shown", || {
        fs::read_to_string(mount.join("out/theirs")).is_ok_and(|text| text == "two")
    });
}
