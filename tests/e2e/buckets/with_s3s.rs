//! S3 as s3s-fs speaks it: listings without ETags, conditions that are passed over, and signatures that are verified.

use std::fs;

use super::{LOOKS, ROUNDS, bucket, is_followed, mirrored, mount_point, mounted, survives_its_store, sync};
use modalkit_tests::{Setup, stores::Store, wait_until};

#[test]
fn a_large_bucket_is_followed_and_no_look_sees_half_a_change() {
    is_followed(&Store::s3s(), LOOKS / 4, ROUNDS / 2);
}

#[test]
fn a_store_that_goes_away_takes_nothing_along() {
    let mut store = Store::s3s();
    survives_its_store(&mut store);
}

#[test]
fn without_etags_a_change_is_known_by_size_and_time() {
    let store = Store::s3s();
    store.put("a", "one");
    let host = mounted(Setup::new(), &store.endpoint, &store.secret(), "").start();
    mirrored(&host, 1);
    store.put("a", "two");
    wait_until("other content of the same size is shown", || {
        fs::read_to_string(mount_point(&host.folder()).join("a")).unwrap() == "two"
    });
}

#[test]
fn credentials_that_are_replaced_count_at_the_next_listing() {
    let store = Store::s3s();
    store.put("a", "one");
    let setup = Setup::new();
    let secrets = setup.folder().join("secrets");
    fs::create_dir_all(secrets.join("bucket-keys")).unwrap();
    let write = |text: &str| {
        for (name, value) in text.lines().filter_map(|line| line.split_once('=')) {
            fs::write(secrets.join("bucket-keys").join(name), value).unwrap();
        }
    };
    write(&store.secret());
    fs::write(secrets.join("bucket-keys/AWS_SECRET_ACCESS_KEY"), "another-secret-that-opens-nothing")
        .unwrap();
    let config = format!("[server]\nsecrets_folder = {:?}\n", secrets.display().to_string());
    let host = mounted(setup.config(&config), &store.endpoint, "", "").start();
    wait_until("the store refuses", || bucket(&host)["reason"] == "refused");
    let shown = bucket(&host).to_string();
    assert!(!shown.contains("opens-nothing"), "{shown}");
    write(&store.secret());
    mirrored(&host, 1);
    assert_eq!(sync(&host).0, 200);
    let log = host.whole_log();
    assert!(!log.iter().any(|line| line.to_string().contains("opens-nothing")));
}
