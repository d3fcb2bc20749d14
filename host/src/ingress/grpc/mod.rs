//! gRPC on the connections of HTTP/2, beside everything else: which call is asked, whether it is let in, until when it may take. tonic reads and writes
//! messages; what they ask is answered by the services here. It never knows how a batch is run.

mod body;
mod call;
mod health;
mod infer;
mod methods;
mod service;
mod stream;

use std::{
    convert::Infallible,
    pin::pin,
    sync::{Arc, atomic::Ordering},
};

use hyper::{
    Method as HttpMethod, Request, Response,
    body::Incoming,
    header::{CONTENT_TYPE, HeaderName, HeaderValue},
};
use modalkit_proto::grpc_inference_service_server::GrpcInferenceServiceServer;
use tonic::{Status, codec::CompressionEncoding, codegen::Service as _};
use tonic_health::pb::health_server::HealthServer;
use tonic_reflection::server::Builder;

use self::{
    body::CountedBody,
    call::{GrpcCall, http_status},
    health::HealthService,
    methods::{Service, find, no_such_call},
    service::InferenceService,
};
use super::{
    body::RequestBody,
    exchange::Exchange,
    lingering_close,
    request_headers::{Head, put_id},
    response_body::{Outgoing, respond_grpc},
};
use crate::{egress::job_status, work::JobError};

const GRPC: &str = "application/grpc";
/// In what a caller's messages are compressed.
const ENCODING: HeaderName = HeaderName::from_static("grpc-encoding");

type Answered = Response<tonic::body::Body>;

/// Whether a request over HTTP/2 is a call of gRPC.
pub(super) fn is_call(request: &Request<Incoming>) -> bool {
    let content_type = request.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
    // As it is, or with the name of its encoding; `application/grpc-web` is another protocol.
    let rest = content_type.and_then(|content_type| content_type.strip_prefix(GRPC));
    request.method() == HttpMethod::POST
        && rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(['+', ';']))
}

/// Answers a call.
pub(super) async fn answer(exchange: Exchange, request: Request<Incoming>) -> Response<Outgoing> {
    exchange.speaks_grpc.store(true, Ordering::Relaxed);
    let exchange = Arc::new(exchange);
    let context = &*exchange.context;
    let (parts, incoming) = request.into_parts();
    let head = Head::of(&parts);
    let id = context.ids.of(&head.known);
    let method = find(parts.uri.path());
    let admitted = match method {
        Some(method) => GrpcCall::admit(&exchange, &head, &id, method).map(Arc::new),
        None => Err(Status::unimplemented(no_such_call(parts.uri.path()))),
    };
    let (mut response, is_counted) = match admitted {
        Ok(call) => {
            let body = CountedBody::new(incoming, &call.meter);
            let mut limit = pin!(exchange.timer.limit(call.deadline.0));
            let mut work = pin!(dispatch(&call, Request::from_parts(parts, body)));
            // One that runs a pipeline ends by itself at its deadline, with what is counted then, once its message is there.
            let answered = tokio::select! {
                biased;
                answered = &mut work => answered,
                () = &mut limit => job_status(&JobError::DeadlinePassed).into_http(),
            };
            (answered, call.is_counted.load(Ordering::Relaxed))
        }
        Err(status) => {
            lingering_close::read_on(RequestBody::new(incoming), Arc::clone(exchange.peer()));
            (status.into_http(), false)
        }
    };
    if let Some(method) = method.filter(|_| !is_counted) {
        // Where it has failed, its status stands among the headers.
        let status = Status::from_header_map(response.headers()).map_or(200, |status| http_status(&status));
        context.metrics.requests("", method.path, status).inc();
    }
    put_id(&id, response.headers_mut());
    respond_grpc(exchange, response)
}

/// Has the service of a call answer it.
async fn dispatch(call: &Arc<GrpcCall>, request: Request<CountedBody>) -> Answered {
    // Answers are compressed as requests are: clients that only could take it would have it always.
    let encoding = request.headers().get(ENCODING).and_then(encoding_of);
    let bytes_max = call.context().server.body_bytes_max;
    let call = Arc::clone(call);
    let answered: Result<Answered, Infallible> = match call.method.service {
        Service::Inference => {
            let mut server = GrpcInferenceServiceServer::new(InferenceService(call))
                .max_decoding_message_size(bytes_max)
                .accept_compressed(CompressionEncoding::Gzip)
                .accept_compressed(CompressionEncoding::Deflate);
            if let Some(encoding) = encoding {
                server = server.send_compressed(encoding);
            }
            server.call(request).await
        }
        Service::Health => HealthServer::new(HealthService(call)).call(request).await,
        Service::Reflection => match reflection().build_v1() {
            Ok(mut server) => server.call(request).await,
            Err(error) => Ok(Status::internal(error.to_string()).into_http()),
        },
        Service::ReflectionAlpha => match reflection().build_v1alpha() {
            Ok(mut server) => server.call(request).await,
            Err(error) => Ok(Status::internal(error.to_string()).into_http()),
        },
    };
    let Ok(answered) = answered;
    answered
}

fn encoding_of(value: &HeaderValue) -> Option<CompressionEncoding> {
    match value.as_bytes() {
        b"gzip" => Some(CompressionEncoding::Gzip),
        b"deflate" => Some(CompressionEncoding::Deflate),
        _ => None,
    }
}

fn reflection() -> Builder<'static> {
    Builder::configure()
        .register_encoded_file_descriptor_set(modalkit_proto::DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
}
