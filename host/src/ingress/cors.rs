//! Pages of other sites that an operator lets call this host (CORS): which they are, what a browser is told before it asks, and in every answer. It never
//! knows what is asked.

use hyper::{
    HeaderMap, Method, StatusCode,
    header::{
        ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS, ACCESS_CONTROL_ALLOW_ORIGIN,
        ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE, ACCESS_CONTROL_REQUEST_HEADERS,
        ACCESS_CONTROL_REQUEST_METHOD, ALLOW, HeaderName, HeaderValue, VARY,
    },
    http::request::Parts,
};

use super::endpoints::Target;
use crate::{config::Server, egress::HttpResponse};

/// Every page, whatever its site.
const ANY: &str = "*";
/// Headers of answers that a page may read, beside those that it always may.
const EXPOSED: HeaderValue = HeaderValue::from_static(
    "inference-header-content-length, retry-after, traceparent, x-modalkit-explain, x-request-id, x-should-retry",
);
/// Seconds for which a browser need not ask again before it calls.
const MAX_AGE_SECONDS: HeaderValue = HeaderValue::from_static("600");
const ORIGIN: HeaderValue = HeaderValue::from_static("origin");

/// The sites whose pages may call.
pub(super) struct Cors {
    origins: Vec<String>,
}

impl Cors {
    pub(super) fn new(server: &Server) -> Self {
        Self { origins: server.cors_origins.clone() }
    }

    /// Whether pages of this origin may call.
    pub(super) fn allows(&self, origin: &HeaderValue) -> bool {
        self.origins.iter().any(|allowed| allowed == ANY || allowed.as_bytes() == origin.as_bytes())
    }

    /// Whether any page of another site may.
    pub(super) fn is_on(&self) -> bool {
        !self.origins.is_empty()
    }

    /// What an answer to a page of this origin says beside the rest.
    pub(super) fn put(&self, origin: Option<&HeaderValue>, headers: &mut HeaderMap) {
        if !self.is_on() {
            return;
        }
        // Also where it isn't allowed: a cache must not give one site's answer to another.
        add_to_vary(headers, &ORIGIN);
        if let Some(origin) = origin.filter(|origin| self.allows(origin)) {
            headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
            headers.insert(ACCESS_CONTROL_EXPOSE_HEADERS, EXPOSED);
        }
    }

    /// The answer to OPTIONS: what the path takes, and whether a page may ask that.
    pub(super) fn options(&self, head: &Parts, target: Target<'_>) -> HttpResponse {
        let mut response = HttpResponse::default();
        *response.status_mut() = StatusCode::NO_CONTENT;
        let headers = response.headers_mut();
        headers.insert(ALLOW, methods(target));
        let asked = head.headers.get(ACCESS_CONTROL_REQUEST_METHOD);
        let method = asked.and_then(|method| Method::from_bytes(method.as_bytes()).ok());
        let origin = head.headers.get("origin").filter(|origin| self.allows(origin));
        if origin.is_some() && method.is_some() {
            headers.insert(ACCESS_CONTROL_ALLOW_METHODS, methods(target));
            // Whoever may call may say what every caller may.
            if let Some(wanted) = head.headers.get(ACCESS_CONTROL_REQUEST_HEADERS) {
                headers.insert(ACCESS_CONTROL_ALLOW_HEADERS, wanted.clone());
            }
            headers.insert(ACCESS_CONTROL_MAX_AGE, MAX_AGE_SECONDS);
        }
        response
    }
}

/// The methods of a path, and OPTIONS, which every path has.
pub(super) fn methods(target: Target<'_>) -> HeaderValue {
    allow(target.endpoint.methods)
}

/// A list of methods with OPTIONS behind it, as the header `allow` has it.
pub(super) fn allow(methods: &str) -> HeaderValue {
    HeaderValue::try_from(format!("{methods}, OPTIONS")).expect("methods are letters")
}

/// Says that the answer depends on one more header of its request.
pub(super) fn add_to_vary(headers: &mut HeaderMap, name: &HeaderValue) {
    let value = match headers.get(VARY) {
        Some(known) if known.as_bytes() == name.as_bytes() => return,
        Some(known) => HeaderValue::from_bytes(&[known.as_bytes(), b", ", name.as_bytes()].concat()),
        None => Ok(name.clone()),
    };
    headers.insert(HeaderName::from_static("vary"), value.expect("names of headers"));
}
