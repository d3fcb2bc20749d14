//! Answers to requests that nobody carries out: of callers who aren't let in, and with a method that a path doesn't have.

use hyper::{StatusCode, header::ALLOW, http::request::Parts};
use serde_json::json;

use super::{
    Context,
    cors::allow,
    endpoints::{OpenTo, Target},
    request_headers::Headers,
};
use crate::{
    access::{AccessError, Caller, Origin},
    audit::Action,
    egress::{self, HttpResponse, object_response},
};

/// The answer to a caller who isn't let in. Keys that are wrong, missing or may not do this stand in the audit log.
pub(super) fn refuse(
    context: &Context,
    from: &Origin,
    action: Action<'_>,
    denied: &AccessError,
) -> HttpResponse {
    let response = egress::denied(denied);
    let key = match denied {
        AccessError::Missing { .. } | AccessError::Wrong { .. } => None,
        AccessError::NoManagement { key } => key.as_deref(),
        AccessError::TooOften(_) | AccessError::TooMany | AccessError::Unknown => return response,
    };
    context.audit.refused(action, key, from, response.status().as_u16());
    response
}

/// Lets a caller in, or refuses it, as the path says whom it is open to.
///
/// # Errors
/// The answer to one who isn't let in.
pub(super) fn let_in(
    context: &Context,
    from: &Origin,
    head: &Parts,
    target: Target<'_>,
    name: &str,
) -> Result<Caller, Box<HttpResponse>> {
    let headers = Headers(&head.headers);
    let admitted = match target.endpoint.open_to {
        OpenTo::Management => context.access.manage(from, &headers),
        OpenTo::Callers => context.access.admit(from, &headers),
        OpenTo::Everybody => Ok(Caller::default()),
    };
    admitted.map_err(|denied| Box::new(refuse(context, from, target.action(&head.method, name), &denied)))
}

/// The answer to a method that a path doesn't have.
pub(super) fn wrong_method(expected: &'static str) -> HttpResponse {
    let detail = format!("expected the method {}", expected.replace(", ", " or "));
    let mut response = object_response(StatusCode::METHOD_NOT_ALLOWED, &json!({"detail": detail}));
    response.headers_mut().insert(ALLOW, allow(expected));
    response
}
