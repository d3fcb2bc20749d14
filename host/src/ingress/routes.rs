//! Which path is answered by whom, and what every answer has: an id, a count, a line in the log when it failed.

use hyper::{
    Method, Request, StatusCode,
    body::Incoming,
    header::{ALLOW, HeaderValue},
    http::request::Parts,
};
use serde_json::json;

use super::{
    Context,
    exchange::Exchange,
    jobs::Asked,
    manage::{self, Managed},
    pages::Foreign,
    predict,
    request::{Headers, put_id},
};
use crate::{
    access::{AccessError, Origin, Sight},
    admin,
    audit::{Action, Does},
    egress::{self, HttpResponse, object_response},
};

/// The paths of this host. Their names are labels of metrics.
const GET_ONLY: [&str; 6] = ["/health", "/livez", "/readyz", "/metrics", "/models", "/devices"];
const PREDICTIONS: [&str; 3] = ["/predict_sync", "/predict_batch", "/predict_async"];

pub(super) async fn answer(peer: &Exchange, request: Request<Incoming>) -> HttpResponse {
    let (head, body) = request.into_parts();
    let context = &*peer.context;
    let id = context.ids.of(&head.headers);
    let is_post = head.method == Method::POST;
    let looked_at = if context.access.is_keyless() { context.pages.check(&head) } else { Ok(()) };
    // The rarer ones are boxed: every request's future is as large as the largest of them.
    let mut response = match (head.uri.path(), looked_at) {
        (_, Err(foreign)) => refuse_page(context, &peer.from, &head, &foreign),
        ("/predict_sync", _) if is_post => predict::sync(peer, &head, body, &id).await,
        ("/predict_batch", _) if is_post => Box::pin(predict::batch(peer, &head, body, &id)).await,
        ("/predict_async", _) if is_post => Box::pin(predict::asynchronous(peer, &head, body, &id)).await,
        _ => Box::pin(beside_predictions(context, &peer.from, Some(peer), &head)).await,
    };
    put_id(&id, response.headers_mut());
    response
}

/// Everything but predictions: over the network, where an exchange takes part in the limits, and over the management socket.
pub(super) async fn beside_predictions(
    context: &Context,
    from: &Origin,
    exchange: Option<&Exchange>,
    head: &Parts,
) -> HttpResponse {
    let path = head.uri.path();
    match (Managed::parse(path), Asked::parse(path)) {
        (Some(managed), _) => manage::answer(context, from, head, managed).await,
        (_, Some(asked)) => asked.answer(context, from, exchange, head).await,
        (None, None) => elsewhere(context, from, head),
    }
}

/// The path with placeholders, as a label of metrics, and what stands in the placeholder; `None` where there is no such path.
fn endpoint(path: &str) -> Option<(&'static str, &str)> {
    if let Some(managed) = Managed::parse(path) {
        return Some((managed.endpoint(), managed.name()));
    }
    if let Some(asked) = Asked::parse(path) {
        return Some((asked.endpoint(), asked.name()));
    }
    GET_ONLY.iter().chain(&PREDICTIONS).find(|known| **known == path).map(|known| (*known, ""))
}

/// A request that a page in a browser has made.
fn refuse_page(context: &Context, from: &Origin, head: &Parts, foreign: &Foreign) -> HttpResponse {
    let status = StatusCode::FORBIDDEN;
    let known = endpoint(head.uri.path());
    if let Some((endpoint, _)) = known {
        context.metrics.requests("", endpoint, status.as_u16()).inc();
    }
    let (endpoint, name) = known.unwrap_or(("another path", ""));
    let action = Action { method: head.method.as_str(), endpoint, name, does: Does::Look };
    context.audit.refused(action, None, from, status.as_u16());
    object_response(status, &json!({"detail": foreign.to_string()}))
}

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

/// Everything that isn't on the hot path.
fn elsewhere(context: &Context, from: &Origin, head: &Parts) -> HttpResponse {
    let endpoint = head.uri.path();
    let is_get = head.method == Method::GET;
    let action = Action { method: head.method.as_str(), endpoint, name: "", does: Does::Look };
    let sight = || {
        let seen = context.access.sight(from, &Headers(&head.headers));
        seen.unwrap_or_else(|wrong| {
            // It is answered all the same; only the log says that it tried.
            let _ = refuse(context, from, action, &wrong);
            Sight::Status
        })
    };
    let response = match endpoint {
        "/health" if is_get => admin::health(&context.models, sight()),
        "/livez" if is_get => admin::live(),
        "/readyz" if is_get => {
            let Context { models, gate, access, jobs, devices, .. } = context;
            admin::ready(models, gate, access, jobs, devices, sight())
        }
        "/metrics" | "/models" | "/devices" if is_get => {
            match context.access.manage(from, &Headers(&head.headers)) {
                Err(denied) => refuse(context, from, action, &denied),
                Ok(caller) => {
                    let underway = context.audit.begin(action, &caller, from);
                    let response = look(context, endpoint);
                    underway.answered(response.status().as_u16());
                    response
                }
            }
        }
        known if GET_ONLY.contains(&known) => wrong_method("GET"),
        known if PREDICTIONS.contains(&known) => wrong_method("POST"),
        _ => {
            let detail = format!(
                "no such path: {endpoint}; there are POST /predict_sync, /predict_batch, /predict_async, /jobs/{{id}}/redeliver, /models/{{name}}/reload, /models/{{name}}/rollback, /models/{{name}}/unload, /volumes/{{name}}/reload, /config/reload, DELETE /jobs/{{id}}, /queues/{{name}} and GET /jobs, /jobs/{{id}}, /queues, /queues/{{name}}, /models/{{name}}, /config, {}",
                GET_ONLY.join(", ")
            );
            return object_response(StatusCode::NOT_FOUND, &json!({"detail": detail}));
        }
    };
    context.metrics.requests("", endpoint, response.status().as_u16()).inc();
    response
}

/// What a caller who manages sees of the whole host.
fn look(context: &Context, endpoint: &str) -> HttpResponse {
    match endpoint {
        "/models" => admin::models(&context.models),
        "/devices" => admin::devices(&context.devices),
        _ => {
            context.metrics.requests_in_flight.set(context.gate.requests() as i64);
            context.metrics.bytes_in_flight.set(context.budget.bytes() as i64);
            admin::metrics(&context.metrics, &context.devices)
        }
    }
}

pub(super) fn wrong_method(expected: &'static str) -> HttpResponse {
    let detail = format!("expected the method {}", expected.replace(", ", " or "));
    let mut response = object_response(StatusCode::METHOD_NOT_ALLOWED, &json!({"detail": detail}));
    response.headers_mut().insert(ALLOW, HeaderValue::from_static(expected));
    response
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use modalkit_device::Devices;

    use super::*;
    use crate::{
        access::Access,
        admission::Gate,
        config::{self, AuthSpec},
        dispatch::Models,
        jobs::{self, Jobs},
        queues::Queues,
        reconfigure,
        reload::Control,
        telemetry::Metrics,
    };

    #[tokio::test]
    async fn no_address_manages_and_the_socket_does() {
        let loaded = config::load(&[], &config::Environment::default()).unwrap();
        let metrics = Metrics::new(crate::traces::Traces::default());
        let state = tempfile::tempdir().unwrap();
        let gate = Gate::new(1);
        let models: Arc<Models> = Arc::default();
        let around = jobs::Around {
            models: Arc::clone(&models),
            gate: Arc::clone(&gate),
            queues: Queues::of_nobody(),
            metrics: Arc::clone(&metrics),
        };
        let jobs = Jobs::open(
            modalkit_journal::FolderLock::take(state.path()).unwrap(),
            loaded.config.server.jobs,
            around,
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
            let status =
                async |from: &Origin| beside_predictions(&context, from, None, &head).await.status().as_u16();
            for address in &addresses {
                assert_eq!(status(address).await, 403, "{method} {path} from {address}");
            }
            assert_eq!(status(&socket).await, expected, "{method} {path}");
        }
        let (head, ()) = Request::builder().uri("/livez").body(()).unwrap().into_parts();
        assert_eq!(beside_predictions(&context, &addresses[3], None, &head).await.status().as_u16(), 200);
    }

    #[test]
    fn every_path_is_known_by_its_placeholders() {
        assert_eq!(endpoint("/models/a/reload"), Some(("/models/{name}/reload", "a")));
        assert_eq!(endpoint("/queues/q"), Some(("/queues/{name}", "q")));
        assert_eq!(endpoint("/predict_sync"), Some(("/predict_sync", "")));
        assert_eq!(endpoint("/livez"), Some(("/livez", "")));
        assert_eq!(endpoint("/nowhere"), None);
    }
}
