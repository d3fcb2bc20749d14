//! Which addresses are this machine's own.

use std::net::IpAddr;

/// Whether a URL's host is this machine: a proxy (`http_proxy`) would look for it on its own, so no client asks one for it.
#[must_use]
pub fn is_loopback(url: &str) -> bool {
    let authority = url.split_once("://").map_or(url, |(_, rest)| rest);
    let authority = authority.split('/').next().unwrap_or_default();
    let authority = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    let host = match authority.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, _)) => address,
        None => authority.split(':').next().unwrap_or_default(),
    };
    host.eq_ignore_ascii_case("localhost")
        || host.parse::<IpAddr>().is_ok_and(|address| address.to_canonical().is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_is_known_by_its_addresses() {
        for url in [
            "http://127.0.0.1:8000",
            "https://127.9.9.9",
            "http://[::1]:80/x",
            "http://LOCALHOST:1",
            "localhost:8000",
            "http://a:b@[::ffff:127.0.0.1]",
        ] {
            assert!(is_loopback(url), "{url}");
        }
        for url in [
            "http://192.0.2.7:8000",
            "http://localhost.example.com",
            "http://example.com/localhost",
            "http://[2001:db8::1]:80",
        ] {
            assert!(!is_loopback(url), "{url}");
        }
    }
}
