//! Google's protocol, as far as a stand-in speaks it: listings, ETags that are no hexadecimal digits, and no account.

use std::fs;

use super::{mirrored, mount_point, mounted};
use modalkit_tests::{Setup, stores::Store, wait_until};

#[test]
fn what_a_bucket_of_google_has_is_mirrored_and_followed() {
    let store = Store::gcs();
    store.put("v3/a.txt", "one");
    store.put("v30/b.txt", "another prefix's");
    let keys = "provider = \"gcs\"\nkey_prefix = \"v3\"\nread_only = true";
    let host = mounted(Setup::new(), &store.endpoint, &store.secret(), keys).start();
    mirrored(&host, 1);
    let shown = || fs::read_to_string(mount_point(&host.folder()).join("a.txt")).unwrap();
    assert_eq!(shown(), "one");
    store.put("v3/a.txt", "two");
    wait_until("the change is shown", || shown() == "two");
}
