//! `GET /docs`: the page that shows the OpenAPI document and lets people try it, and its files. It never knows what is in them.

use std::io::Read;

use flate2::read::GzDecoder;
use hyper::{
    StatusCode,
    header::{
        ACCEPT_ENCODING, CACHE_CONTROL, CONTENT_ENCODING, CONTENT_SECURITY_POLICY, CONTENT_TYPE, ETAG,
        HeaderName, HeaderValue, REFERRER_POLICY, VARY, X_CONTENT_TYPE_OPTIONS,
    },
    http::request::Parts,
};
use serde_json::json;
use sha2::{Digest, Sha256};

use super::{
    content_coding::takes_gzip,
    endpoints::{Route, Target},
    openapi::{is_known, not_modified},
};
use crate::{
    egress::{HttpResponse, object_response},
    ui::{self, Asset},
};

/// Whether pages of other sites may look into its window.
const OPENER_POLICY: HeaderName = HeaderName::from_static("cross-origin-opener-policy");

/// The page, or one of its files.
pub(super) fn answer(head: &Parts, target: Target<'_>) -> HttpResponse {
    if target.route() == Route::Docs {
        return file(&ui::DOCS, head);
    }
    let name = target.name();
    match ui::docs_asset(&name) {
        Some(asset) => file(asset, head),
        None => {
            let known: Vec<&str> = ui::docs_asset_names().collect();
            let detail = format!("no file {name:?} of this page; expected one of {known:?}");
            object_response(StatusCode::NOT_FOUND, &json!({ "detail": detail }))
        }
    }
}

fn file(asset: &'static Asset, head: &Parts) -> HttpResponse {
    // The same file has the same tag, whether it is compressed or not.
    let digest = Sha256::digest(asset.bytes);
    let tag = format!("W/\"{}\"", digest[..12].iter().map(|byte| format!("{byte:02x}")).collect::<String>());
    let mut response = if is_known(&head.headers, &tag) { not_modified() } else { body(asset, head) };
    let headers = response.headers_mut();
    if let Ok(tag) = HeaderValue::try_from(tag) {
        headers.insert(ETAG, tag);
    }
    // It is asked for again each time, and not sent again.
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert(VARY, HeaderValue::from_name(ACCEPT_ENCODING));
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(asset.content_type));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static(ui::POLICY));
    headers.insert(REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    headers.insert(OPENER_POLICY, HeaderValue::from_static("same-origin"));
    response
}

fn body(asset: &'static Asset, head: &Parts) -> HttpResponse {
    if !asset.is_compressed {
        return HttpResponse::new(bytes::Bytes::from_static(asset.bytes).into());
    }
    if takes_gzip(head.headers.get(ACCEPT_ENCODING)) {
        let mut response = HttpResponse::new(bytes::Bytes::from_static(asset.bytes).into());
        response.headers_mut().insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
        return response;
    }
    let mut plain = Vec::new();
    match GzDecoder::new(asset.bytes).read_to_end(&mut plain) {
        Ok(_) => HttpResponse::new(bytes::Bytes::from(plain).into()),
        Err(error) => {
            let detail = format!("the file {} in this program is broken: {error}", asset.name);
            object_response(StatusCode::INTERNAL_SERVER_ERROR, &json!({ "detail": detail }))
        }
    }
}
