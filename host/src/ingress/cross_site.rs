//! Protection of a host without keys against other sites' pages (cross-site requests, DNS rebinding): any page that its user opens could ask
//! it, and one whose name leads to a loopback address could read the answer. It looks at Host, Origin and Sec-Fetch-Site, which pages can't choose, and never knows
//! what is asked. Where callers show keys there is no need: a page has none.

use std::net::IpAddr;

use hyper::header::HeaderValue;

use super::{
    cors::Cors,
    request_headers::{Head, Known},
};
use crate::config::Server;

/// Paths of probes, which disclose nothing else.
const PROBES: [&str; 2] = ["/livez", "/readyz"];

/// The rules for every request of a host without keys.
pub(super) struct PageRules {
    on_loopback: bool,
    /// Whether Host is looked at. Elsewhere than on loopback a host doesn't know its names unless they are configured.
    names_hosts: bool,
    /// `server.allowed_hosts`.
    allowed_hosts: Vec<String>,
    /// Other sites whose pages may call.
    cors: Cors,
    /// On loopback the Host of most requests: one that has no Origin and no Sec-Fetch-Site either needs no closer look.
    usual: Option<String>,
}

/// Why a request is a page's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Foreign {
    /// Its Host is none of ours.
    #[error(
        "expected the header host to be a loopback name or address, or one of server.allowed_hosts, found {0:?}; this host has no keys (app_settings.auth_config), so it answers to its own names only"
    )]
    Host(String),
    /// It comes from a page of another site.
    #[error(
        "expected the header {header} to be {expected}, found {found:?}; this host has no keys (app_settings.auth_config), so it answers no pages of other sites"
    )]
    Page {
        /// The header that says so.
        header: &'static str,
        /// What it may be.
        expected: String,
        /// What it is.
        found: String,
    },
}

impl PageRules {
    pub(super) fn new(server: &Server) -> Self {
        let on_loopback = server.listen.ip().to_canonical().is_loopback();
        let names_hosts = on_loopback || !server.allowed_hosts.is_empty();
        let usual = on_loopback.then(|| server.listen.to_string());
        let (allowed_hosts, cors) = (server.allowed_hosts.clone(), Cors::new(server));
        Self { on_loopback, names_hosts, allowed_hosts, cors, usual }
    }

    /// Looks at a request. One without Host, as in HTTP/1.0, is no browser's. Elsewhere than on loopback, supervisors ask after a host by an
    /// address that nobody has configured.
    pub(super) fn check(&self, head: &Head<'_>) -> Result<(), Foreign> {
        let Known { host, origin, sec_fetch_site, .. } = head.known;
        let is_usual = self.usual.as_ref().zip(host).is_some_and(|(usual, host)| usual.as_str() == host);
        if is_usual && origin.is_none() && sec_fetch_site.is_none() && head.uri.authority().is_none() {
            return Ok(());
        }
        // HTTP/2 sends it as `:authority`, which is part of the URI.
        let host = match head.uri.authority() {
            Some(authority) => Some(authority.as_str()),
            None => host.map(text),
        };
        if self.names_hosts
            && (self.on_loopback || !PROBES.contains(&head.uri.path()))
            && let Some(host) = host
            && !self.is_ours(host)
        {
            return Err(Foreign::Host(host.to_owned()));
        }
        if origin.is_some_and(|origin| self.cors.allows(origin)) {
            return Ok(());
        }
        if let Some(site) = sec_fetch_site.map(text)
            && !["none", "same-origin"].contains(&site)
        {
            let expected = "none or same-origin".to_owned();
            return Err(Foreign::Page { header: "sec-fetch-site", expected, found: site.to_owned() });
        }
        match origin.map(text) {
            Some(origin) if !is_of(origin, host) => {
                let expected = format!("the origin of this host, {:?}", host.unwrap_or("which has no name"));
                Err(Foreign::Page { header: "origin", expected, found: origin.to_owned() })
            }
            _ => Ok(()),
        }
    }

    fn is_ours(&self, authority: &str) -> bool {
        let name = without_port(authority);
        name.eq_ignore_ascii_case("localhost")
            || name.parse::<IpAddr>().is_ok_and(|address| address.to_canonical().is_loopback())
            || self.allowed_hosts.iter().any(|allowed| allowed.eq_ignore_ascii_case(name))
    }
}

fn text(value: &HeaderValue) -> &str {
    value.to_str().unwrap_or("(unreadable)")
}

/// Whether an origin, `scheme://authority`, is that of this Host. `null` is nobody's.
fn is_of(origin: &str, host: Option<&str>) -> bool {
    let authority = origin.split_once("://").map(|(_, authority)| authority);
    authority.zip(host).is_some_and(|(authority, host)| authority.eq_ignore_ascii_case(host))
}

/// The name or address in `name:port`; IPv6 without its brackets.
fn without_port(authority: &str) -> &str {
    if let Some(rest) = authority.strip_prefix('[') {
        return rest.split(']').next().unwrap_or_default();
    }
    authority.split(':').next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use hyper::Request;

    use super::*;
    use crate::config::{self, Environment};

    fn rules(pairs: &[(&str, &str)]) -> PageRules {
        let environment: Environment =
            pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        PageRules::new(&config::load(&[], &environment).unwrap().config.server)
    }

    fn check(rules: &PageRules, headers: &[(&str, &str)]) -> Result<(), Foreign> {
        let mut request = Request::builder().uri("/predict_async");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        rules.check(&Head::of(&request.body(()).unwrap().into_parts().0))
    }

    #[test]
    fn a_host_on_loopback_answers_to_its_own_names_only() {
        let plain = rules(&[]);
        for ours in
            ["localhost", "LocalHost:8000", "127.0.0.1:8000", "127.1.2.3", "[::1]:8000", "[::ffff:127.0.0.1]"]
        {
            assert_eq!(check(&plain, &[("host", ours)]), Ok(()), "{ours}");
        }
        let others = [
            "evil.test",
            "evil.test:8000",
            "127.0.0.1.evil.test",
            "localhost.evil.test",
            "192.0.2.1",
            "",
            "[::2]",
        ];
        for other in others {
            assert!(matches!(check(&plain, &[("host", other)]), Err(Foreign::Host(_))), "{other}");
        }
        assert_eq!(check(&plain, &[]), Ok(()), "no browser leaves it out");
        let named = rules(&[("MODALKIT_SERVER__ALLOWED_HOSTS", r#"["models.test"]"#)]);
        assert_eq!(check(&named, &[("host", "Models.test:443")]), Ok(()));
        assert!(check(&named, &[("host", "evil.test")]).is_err());
    }

    #[test]
    fn elsewhere_names_are_looked_at_where_they_are_configured() {
        let everywhere = ("MODALKIT_SERVER__LISTEN", "0.0.0.0:8000");
        let insecure = ("MODALKIT_SERVER__INSECURE", "true");
        assert_eq!(check(&rules(&[everywhere, insecure]), &[("host", "any.test")]), Ok(()));
        let named = rules(&[everywhere, insecure, ("MODALKIT_SERVER__ALLOWED_HOSTS", r#"["models.test"]"#)]);
        assert_eq!(check(&named, &[("host", "models.test")]), Ok(()));
        assert!(check(&named, &[("host", "any.test")]).is_err());
    }

    #[test]
    fn pages_of_other_sites_are_told_from_the_hosts_own() {
        let plain = rules(&[]);
        let host = ("host", "127.0.0.1:8000");
        assert_eq!(check(&plain, &[host, ("origin", "http://127.0.0.1:8000")]), Ok(()));
        for other in [
            "http://evil.test",
            "null",
            "http://127.0.0.1:8001",
            "http://localhost:8000",
            "",
            "127.0.0.1:8000",
        ] {
            let found = check(&plain, &[host, ("origin", other)]);
            assert!(matches!(found, Err(Foreign::Page { header: "origin", .. })), "{other}: {found:?}");
        }
        assert!(check(&plain, &[("origin", "http://127.0.0.1:8000")]).is_err(), "an origin without Host");
        for (site, expected) in
            [("none", true), ("same-origin", true), ("same-site", false), ("cross-site", false), ("x", false)]
        {
            assert_eq!(check(&plain, &[host, ("sec-fetch-site", site)]).is_ok(), expected, "{site}");
        }
    }
}
