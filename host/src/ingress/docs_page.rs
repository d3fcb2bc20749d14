//! `GET /docs`: the page that shows the OpenAPI document and lets people try it, and its files. It never knows what is in them.

use bytes::Bytes;
use hyper::{
    StatusCode,
    header::{
        ACCEPT_ENCODING, CACHE_CONTROL, CONTENT_ENCODING, CONTENT_SECURITY_POLICY, CONTENT_TYPE, ETAG,
        HeaderName, HeaderValue, REFERRER_POLICY, VARY, X_CONTENT_TYPE_OPTIONS,
    },
    http::request::Parts,
};
use serde_json::json;

use super::{
    Context,
    content_coding::takes_gzip,
    endpoints::{Route, Target},
    openapi::{is_known, not_modified},
};
use crate::{
    egress::{self, HttpResponse, object_response},
    ui::{self, Asset},
    work::JobError,
};

/// Whether pages of other sites may look into its window.
const OPENER_POLICY: HeaderName = HeaderName::from_static("cross-origin-opener-policy");

/// The page, or one of its files.
pub(super) async fn answer(context: &Context, head: &Parts, target: Target<'_>) -> HttpResponse {
    if target.route() == Route::Docs {
        return file(context, &ui::DOCS, head).await;
    }
    let name = target.name();
    match ui::docs_asset(&name) {
        Some(asset) => file(context, asset, head).await,
        None => {
            let known: Vec<&str> = ui::docs_asset_names().collect();
            let detail = format!("no file {name:?} of this page; expected one of {known:?}");
            object_response(StatusCode::NOT_FOUND, &json!({ "detail": detail }))
        }
    }
}

async fn file(context: &Context, asset: &'static Asset, head: &Parts) -> HttpResponse {
    let tag = asset.tag();
    let mut response =
        if is_known(&head.headers, tag) { not_modified() } else { body(context, asset, head).await };
    if response.status().is_server_error() {
        return response;
    }
    let headers = response.headers_mut();
    if let Ok(tag) = HeaderValue::from_str(tag) {
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

async fn body(context: &Context, asset: &'static Asset, head: &Parts) -> HttpResponse {
    let whole = |bytes: &'static [u8]| HttpResponse::new(Bytes::from_static(bytes).into());
    if !asset.is_compressed {
        return whole(asset.bytes);
    }
    if takes_gzip(head.headers.get(ACCEPT_ENCODING)) {
        let mut response = whole(asset.bytes);
        response.headers_mut().insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
        return response;
    }
    let plain = context.blocking.spawn_blocking(|| asset.plain()).await;
    match plain {
        Ok(Ok(plain)) => whole(plain),
        Ok(Err(error)) => {
            let detail = format!("the file {} in this program is broken: {error}", asset.name);
            object_response(StatusCode::INTERNAL_SERVER_ERROR, &json!({ "detail": detail }))
        }
        Err(_) => egress::error(&JobError::Lost),
    }
}
