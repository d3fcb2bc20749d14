//! Which path is answered by whom, and what every answer has: an id and a type; what is no prediction is counted here.

use std::sync::{Arc, atomic::Ordering};

use hyper::{Method, Request, StatusCode, body::Incoming, http::request::Parts};
use serde_json::json;

use super::{
    Context,
    body::{RequestBody, SmallBody},
    content_coding,
    cross_site::Foreign,
    docs_page,
    endpoints::{Endpoint, Route, Target, V1, V2, no_such_path, protocol_of},
    exchange::Exchange,
    jobs, lingering_close, management, openapi, predict,
    query::Query,
    refusal::{refuse, wrong_method},
    request_headers::{Head, Headers, put_headers},
    task_models, v2,
};
use crate::{
    access::{Origin, Visibility},
    admin::{self, Readiness},
    audit::{Action, Effect},
    egress::{self, HttpResponse, and_close, object_response, without_body},
};

/// An answer in the form of its path.
fn in_form(head: &Parts, response: HttpResponse) -> HttpResponse {
    match protocol_of(head.uri.path()) {
        Some(V2) => egress::in_v2(response),
        Some(V1) => egress::in_openai(response),
        _ => response,
    }
}

pub(super) async fn answer(exchange: &Exchange, request: Request<Incoming>) -> HttpResponse {
    let (mut parts, body) = request.into_parts();
    let mut body = RequestBody::new(body);
    let context = &*exchange.context;
    let asks_for_head = takes_for_get(&mut parts);
    let head = Head::of(&parts);
    let id = context.ids.of(&head.known);
    let is_post = head.method == Method::POST;
    let looked_at = if context.access.is_keyless() { context.pages.check(&head) } else { Ok(()) };
    let target = Target::of(head.uri.path());
    let mut response = match (target, looked_at) {
        (_, Err(foreign)) => in_form(&head, refuse_page(context, &exchange.from, &head, target, &foreign)),
        (Some(target), _) if head.method == Method::OPTIONS => options(context, &head, target),
        (Some(target), _) if is_post && let Some(prediction) = target.route().prediction() => {
            predict::answer(exchange, &head, &mut body, &id, target, prediction).await
        }
        _ => {
            let small = SmallBody::Incoming(exchange, &mut body);
            Box::pin(beside_predictions(context, &exchange.from, small, &head)).await
        }
    };
    response = content_coding::encoded(exchange, head.known.accept_encoding, response).await;
    context.cors.put(head.known.origin, response.headers_mut());
    put_headers(&mut response, &id, parts.headers);
    if body.is_read() {
        exchange.sends_on.store(false, Ordering::Relaxed);
    } else if exchange.is_http2() {
        lingering_close::read_on(body, Arc::clone(exchange.peer()));
    } else {
        // What is unread of the body stands before the next request.
        response = and_close(response);
    }
    if asks_for_head { without_body(response) } else { response }
}

/// The answer to OPTIONS, which asks nothing of the path.
fn options(context: &Context, head: &Parts, target: Target<'_>) -> HttpResponse {
    let response = context.cors.options(head, target);
    context.metrics.requests("", target.endpoint.pattern, response.status().as_u16()).inc();
    response
}

/// Takes a HEAD for the GET whose headers it asks for; says whether it is one.
pub(super) fn takes_for_get(head: &mut Parts) -> bool {
    let is_head = head.method == Method::HEAD;
    if is_head {
        head.method = Method::GET;
    }
    is_head
}

/// Everything but predictions: over the network, where an exchange takes part in the limits, and over the management socket.
pub(super) async fn beside_predictions(
    context: &Context,
    from: &Origin,
    body: SmallBody<'_>,
    head: &Parts,
) -> HttpResponse {
    let path = head.uri.path();
    let Some(target) = Target::of(path) else {
        return in_form(head, object_response(StatusCode::NOT_FOUND, &json!({"detail": no_such_path(path)})));
    };
    let endpoint = target.endpoint;
    let response = if target.takes(&head.method) {
        match target.route() {
            Route::Health => {
                let visibility = visibility(context, from, head, endpoint);
                admin::health(&context.models, &context.buckets, visibility)
            }
            Route::Live => admin::live(),
            Route::Ready => ready(context, head, endpoint, visibility(context, from, head, endpoint)),
            Route::Jobs | Route::Job | Route::Redeliver | Route::Queues | Route::Queue => {
                jobs::answer(context, from, body.exchange(), head, target).await
            }
            Route::Docs | Route::DocsAsset => docs_page::answer(context, head, target).await,
            Route::OpenApi => openapi::answer(context, from, body, head, target).await,
            Route::TaskModels | Route::TaskModel => task_models::answer(context, from, body, head, target),
            Route::V2(call) => v2::answer(context, from, body, head, target, call).await,
            _ => management::answer(context, from, head, target).await,
        }
    } else {
        wrong_method(endpoint.methods)
    };
    let response = in_form(head, response);
    context.metrics.requests("", endpoint.pattern, response.status().as_u16()).inc();
    response
}

/// A request that a page in a browser has made.
fn refuse_page(
    context: &Context,
    from: &Origin,
    head: &Parts,
    target: Option<Target<'_>>,
    foreign: &Foreign,
) -> HttpResponse {
    let status = StatusCode::FORBIDDEN;
    if let Some(target) = target {
        context.metrics.requests("", target.endpoint.pattern, status.as_u16()).inc();
    }
    let endpoint = target.map_or("another path", |target| target.endpoint.pattern);
    let name = target.map(Target::name).unwrap_or_default();
    let action = Action { method: head.method.as_str(), endpoint, name: &name, effect: Effect::Look };
    context.audit.refused(action, None, from, status.as_u16());
    object_response(status, &json!({"detail": foreign.to_string()}))
}

/// How much a caller may see of the host's state. One with a wrong key is answered all the same; only the log says that it tried.
fn visibility(context: &Context, from: &Origin, head: &Parts, endpoint: &Endpoint) -> Visibility {
    context.access.visibility(from, &Headers(&head.headers)).unwrap_or_else(|wrong| {
        let endpoint = endpoint.pattern;
        let action = Action { method: head.method.as_str(), endpoint, name: "", effect: Effect::Look };
        let _ = refuse(context, from, action, &wrong);
        Visibility::Status
    })
}

/// Whether the host is ready, or a model of it: names of models are for those who may see them.
fn ready(context: &Context, head: &Parts, endpoint: &Endpoint, visibility: Visibility) -> HttpResponse {
    let Context { models, gate, access, jobs, devices, .. } = context;
    let readiness = Readiness { models, gate, access, jobs, devices };
    match Query::parse(head.uri.query(), endpoint.parameters).map(|query| query.get("model")) {
        Ok(None) => readiness.of_host(visibility),
        Ok(Some(_)) if visibility == Visibility::Status => egress::denied(&access.missing_key()),
        Ok(Some(model)) => readiness.of_model(&model, visibility),
        Err(error) => egress::error(&error),
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use modalkit_device::Devices;

    use super::*;
    use crate::{
        access::Access,
        buckets::Buckets,
        config::{self, AuthSpec},
        insight::metrics::Metrics,
        jobs::{self, Jobs},
        models::Models,
        queues::Queues,
        reconfigure,
        reload::Control,
        work::Gate,
    };

    #[tokio::test]
    async fn no_address_manages_and_the_socket_does() {
        let loaded = config::load(&[], &config::Environment::default()).unwrap();
        let metrics = Metrics::new(crate::insight::traces::Traces::default());
        let state = tempfile::tempdir().unwrap();
        let gate = Gate::new(1);
        let models: Arc<Models> = Arc::default();
        let context = jobs::JobsContext {
            models: Arc::clone(&models),
            gate: Arc::clone(&gate),
            queues: Queues::of_nobody(),
            metrics: Arc::clone(&metrics),
            death: modalkit_journal::HostDeath::MachineStopped,
        };
        let jobs = Jobs::open(
            modalkit_journal::FolderLock::take(state.path()).unwrap(),
            loaded.config.server.jobs,
            context,
        )
        .unwrap();
        let context = {
            let server = loaded.config.server.clone();
            let configuration = reconfigure::Handle::of_nobody(loaded);
            Context::new(
                server,
                Access::new(AuthSpec::default(), metrics.calls_by_key.clone()),
                Arc::default(),
                gate,
                models,
                jobs,
                metrics,
                Devices::none(),
                Buckets::none(),
                Control::of_nobody(),
                configuration,
            )
        };
        let socket = Origin::Socket { uid: 1000 };
        let network = |address: &str| Origin::Network(format!("{address}:1").parse().unwrap());
        let addresses = ["127.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "192.0.2.7"].map(network);
        // What is there answers; where a model or a volume would be asked, nobody is there in this test.
        for (method, path, expected) in [
            ("GET", "/metrics", 200),
            ("GET", "/models", 200),
            ("GET", "/devices", 200),
            ("GET", "/config", 200),
            ("GET", "/queues", 200),
            ("DELETE", "/queues/a", 404),
            ("GET", "/models/a", 503),
            ("POST", "/models/a/reload", 503),
            ("POST", "/volumes/a/reload", 503),
            ("POST", "/config/reload", 503),
        ] {
            let (head, ()) = Request::builder().method(method).uri(path).body(()).unwrap().into_parts();
            let status = async |from: &Origin| {
                let body = SmallBody::Read(Bytes::new());
                beside_predictions(&context, from, body, &head).await.status().as_u16()
            };
            for address in &addresses {
                assert_eq!(status(address).await, 403, "{method} {path} from {address}");
            }
            assert_eq!(status(&socket).await, expected, "{method} {path}");
        }
        let (head, ()) = Request::builder().uri("/livez").body(()).unwrap().into_parts();
        assert_eq!(
            beside_predictions(&context, &addresses[3], SmallBody::Read(Bytes::new()), &head)
                .await
                .status()
                .as_u16(),
            200
        );
    }
}
