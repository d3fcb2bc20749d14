//! Which path is answered by whom, and what every answer has: an id, a count, a line in the log when it failed.

use std::net::IpAddr;

use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode,
    body::Incoming,
    header::{ALLOW, HeaderValue},
    http::request::Parts,
};
use serde_json::json;

use super::{
    Context,
    connection::Peer,
    jobs::Asked,
    manage::{Managed, may_look, may_manage},
    predict,
    request::put_id,
};
use crate::{
    admin,
    egress::{self, HttpResponse, object_response},
};

/// The paths of this host. Their names are labels of metrics.
const GET_ONLY: [&str; 6] = ["/health", "/livez", "/readyz", "/metrics", "/models", "/devices"];

pub(super) async fn answer(peer: &Peer, request: Request<Incoming>) -> Response<Full<Bytes>> {
    let (head, body) = request.into_parts();
    let id = peer.context.ids.of(&head.headers);
    let is_post = head.method == Method::POST;
    // The rarer ones are boxed: every request's future is as large as the largest of them.
    let mut response = match head.uri.path() {
        "/predict_sync" if is_post => predict::sync(peer, &head, body, &id).await,
        "/predict_batch" if is_post => Box::pin(predict::batch(peer, &head, body, &id)).await,
        "/predict_async" if is_post => Box::pin(predict::asynchronous(peer, &head, body, &id)).await,
        path => match (Managed::parse(path), Asked::parse(path)) {
            (Some(managed), _) => Box::pin(manage(&peer.context, peer.address.ip(), &head, managed)).await,
            (_, Some(asked)) => Box::pin(asked.answer(&peer.context, peer.address.ip(), &head)).await,
            (None, None) => elsewhere(&peer.context, peer.address.ip(), &head),
        },
    };
    put_id(&id, response.headers_mut());
    response
}

/// What operators ask of one model or volume.
async fn manage(context: &Context, caller: IpAddr, head: &Parts, managed: Managed<'_>) -> HttpResponse {
    let response = if head.method != managed.method() {
        wrong_method(if managed.method() == Method::GET { "GET" } else { "POST" })
    } else {
        match may_manage(context, caller, head) {
            Ok(()) => managed.answer(context).await,
            Err(denied) => egress::denied(&denied),
        }
    };
    context.metrics.requests("", managed.endpoint(), response.status().as_u16()).inc();
    response
}

/// Everything that isn't on the hot path.
fn elsewhere(context: &Context, caller: IpAddr, head: &Parts) -> HttpResponse {
    let endpoint = head.uri.path();
    let is_get = head.method == Method::GET;
    // Reasons hold paths and the like.
    let may_look = || may_look(context, caller, head);
    let response = match endpoint {
        "/health" if is_get => admin::health(&context.models, may_look()),
        "/livez" if is_get => admin::live(),
        "/readyz" if is_get => {
            let Context { models, gate, access, jobs, devices, .. } = context;
            admin::ready(models, gate, access, jobs, devices, may_look())
        }
        "/metrics" | "/models" | "/devices" if is_get => match may_manage(context, caller, head) {
            Err(denied) => egress::denied(&denied),
            Ok(()) if endpoint == "/models" => admin::models(&context.models),
            Ok(()) if endpoint == "/devices" => admin::devices(&context.devices),
            Ok(()) => {
                context.metrics.requests_in_flight.set(context.gate.requests() as i64);
                admin::metrics(&context.metrics, &context.devices)
            }
        },
        known if GET_ONLY.contains(&known) => wrong_method("GET"),
        "/predict_sync" | "/predict_batch" | "/predict_async" => wrong_method("POST"),
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
    async fn management_endpoints_answer_callers_on_this_machine_only() {
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
        let jobs = Jobs::open(state.path(), loaded.config.server.jobs, around).unwrap();
        let context = {
            let server = loaded.config.server.clone();
            let configuration = reconfigure::Handle::of_nobody(loaded);
            Context::new(
                server,
                Access::new(AuthSpec::default(), metrics.calls_by_key.clone()),
                gate,
                models,
                jobs,
                metrics,
                Devices::none(),
                Control::of_nobody(),
                configuration,
            )
        };
        let status = |caller: &str, path: &str| {
            let (head, ()) = Request::builder().uri(path).body(()).unwrap().into_parts();
            elsewhere(&context, caller.parse().unwrap(), &head).status().as_u16()
        };
        for path in ["/metrics", "/models", "/devices"] {
            for (caller, expected) in
                [("127.0.0.1", 200), ("::1", 200), ("::ffff:127.0.0.1", 200), ("192.0.2.7", 403)]
            {
                assert_eq!(status(caller, path), expected, "{path} for {caller}");
            }
        }
        assert_eq!(status("192.0.2.7", "/livez"), 200);
        for (method, path) in
            [("GET", "/models/a"), ("POST", "/models/a/reload"), ("POST", "/volumes/a/reload")]
        {
            let (head, ()) = Request::builder().method(method).uri(path).body(()).unwrap().into_parts();
            let managed = Managed::parse(path).unwrap();
            let status = async |caller: &str| {
                manage(&context, caller.parse().unwrap(), &head, managed).await.status().as_u16()
            };
            assert_eq!(status("192.0.2.7").await, 403, "{path}");
            assert_eq!(status("127.0.0.1").await, 503, "{path}: nobody is there to ask");
            let request = Request::builder().uri(path).header("origin", "http://page.test");
            let (proxied, ()) = request.method(method).body(()).unwrap().into_parts();
            let answer = manage(&context, "127.0.0.1".parse().unwrap(), &proxied, managed).await;
            assert_eq!(answer.status().as_u16(), 403, "{path} from a page in a browser");
        }
    }
}
