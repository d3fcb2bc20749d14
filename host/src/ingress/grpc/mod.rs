//! gRPC on the connections of HTTP/2, beside everything else: which call is asked, whether it is let in, until when it may take. Messages that run pipelines
//! are read and written here, within the limits of bodies; those of all other calls, which are small, by tonic. It never knows how a batch is run.

mod body;
mod call;
mod cost;
mod health;
mod infer;
mod methods;
mod reader;
mod service;
mod stream;
mod writer;

use std::{
    convert::Infallible,
    pin::pin,
    sync::{Arc, atomic::Ordering},
    task::{Context as Task, Poll},
};

use hyper::{
    HeaderMap, Method as HttpMethod, Request, Response,
    body::Incoming,
    header::{CONTENT_TYPE, HeaderName, HeaderValue},
};
use modalkit_proto::grpc_inference_service_server::GrpcInferenceServiceServer;
use tonic::{Status, codec::CompressionEncoding, codegen::Service as _, metadata::AsciiMetadataValue};
use tonic_health::pb::health_server::HealthServer;
use tonic_reflection::server::Builder;

use self::{
    body::{Incomings, SmallMessages},
    call::{GrpcCall, http_status},
    health::HealthService,
    infer::Inferred,
    methods::{Kind, Service, find, no_such_call},
    reader::{MessageReader, coding_of},
    service::InferenceService,
    stream::InferStream,
};
use super::{
    content_coding::Coding,
    endpoints::OpenTo,
    exchange::Exchange,
    grpc_text::cut_text,
    request_headers::{Head, put_id},
    response_body::{Messages, Outgoing, respond_grpc, respond_messages},
};
use crate::{egress::job_status, protocol::Answer, work::JobError};

const GRPC: &str = "application/grpc";
/// In what a call's messages are compressed.
const ENCODING: HeaderName = HeaderName::from_static("grpc-encoding");
const ACCEPT_ENCODING: HeaderName = HeaderName::from_static("grpc-accept-encoding");
/// In what they may be.
const ACCEPTED: &str = "identity,gzip,deflate";
/// Where the time went.
const EXPLAIN: HeaderName = HeaderName::from_static("x-modalkit-explain");
/// Headers that most answers have.
const HEADERS_USUAL: usize = 4;
/// Bytes of a message of a call that runs no pipeline.
const SMALL_BYTES_MAX: usize = 64 << 10;

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
    let exchange = Arc::new(exchange);
    let context = &*exchange.context;
    let (parts, incoming) = request.into_parts();
    let incomings = Incomings::new(incoming, exchange.peer());
    let head = Head::of(&parts);
    let id = context.ids.of(&head.known);
    let method = find(parts.uri.path());
    let admitted = match method {
        Some(method) => GrpcCall::admit(&exchange, &head, &id, method).map(Arc::new),
        None => Err(Status::unimplemented(no_such_call(parts.uri.path()))),
    };
    let (mut response, is_counted) = match admitted {
        Ok(call) => {
            if call.method.open_to != OpenTo::Everybody {
                exchange.speaks_grpc.store(true, Ordering::Relaxed);
            }
            let encoding = parts.headers.get(ENCODING);
            let response = match call.method.kind {
                Kind::Infer => infer(&call, incomings, &parts.headers).await,
                Kind::StreamInfer => {
                    let coding = coding_of(encoding);
                    let reader = MessageReader::new(incomings, coding, Some(Arc::clone(&call)));
                    call.is_counted.store(true, Ordering::Relaxed);
                    let stream = InferStream::new(Arc::clone(&call), reader);
                    respond_messages(&exchange, started(None), Box::new(stream))
                }
                Kind::Small => {
                    let body = SmallMessages::new(incomings, &call);
                    respond_grpc(&exchange, small(&call, Request::from_parts(parts, body)).await)
                }
            };
            (response, call.is_counted.load(Ordering::Relaxed))
        }
        Err(status) => (respond_grpc(&exchange, status.into_http()), false),
    };
    if let Some(method) = method.filter(|_| !is_counted) {
        // Where it has failed, its status stands among the headers.
        let status = Status::from_header_map(response.headers()).map_or(200, |status| http_status(&status));
        context.metrics.requests("", method.path, status).inc();
    }
    cut_text(response.headers_mut());
    put_id(&id, response.headers_mut());
    response
}

/// The headers of an answer in messages.
fn started(coding: Option<Coding>) -> HeaderMap {
    let mut headers = HeaderMap::with_capacity(HEADERS_USUAL);
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(GRPC));
    headers.insert(ACCEPT_ENCODING, HeaderValue::from_static(ACCEPTED));
    if let Some(coding) = coding {
        headers.insert(ENCODING, HeaderValue::from_static(coding.name()));
    }
    headers
}

/// Whether a caller takes answers in this coding; one that doesn't say takes that of its requests.
fn takes(headers: &HeaderMap, coding: Coding) -> bool {
    let accepted = headers.get(ACCEPT_ENCODING).and_then(|accepted| accepted.to_str().ok());
    accepted.is_none_or(|accepted| accepted.split(',').any(|name| name.trim() == coding.name()))
}

/// One message.
struct Once(Option<Answer>);

impl Messages for Once {
    fn poll_next(&mut self, _: &mut Task<'_>) -> Poll<Option<Result<Answer, Status>>> {
        Poll::Ready(self.0.take().map(Ok))
    }
}

/// `ModelInfer`.
async fn infer(call: &GrpcCall, incomings: Incomings, headers: &HeaderMap) -> Response<Outgoing> {
    let coding = coding_of(headers.get(ENCODING));
    // Answers are compressed as requests are, where that is taken: clients that only could take it would have it always.
    let of_answer = coding.as_ref().ok().copied().flatten().filter(|coding| takes(headers, *coding));
    match infer::answer(call, MessageReader::new(incomings, coding, None)).await {
        Ok(Inferred { message, explanation }) => {
            let message = writer::compressed(call.context(), of_answer, message).await;
            let mut headers = started(of_answer);
            if let Some(value) = explanation.and_then(|told| HeaderValue::try_from(told.to_string()).ok()) {
                headers.insert(EXPLAIN, value);
            }
            respond_messages(&call.exchange, headers, Box::new(Once(Some(message))))
        }
        Err(status) => respond_grpc(&call.exchange, status.into_http()),
    }
}

/// Has tonic read a call whose messages are small, and the service answer it.
async fn small(call: &Arc<GrpcCall>, request: Request<SmallMessages>) -> Response<tonic::body::Body> {
    let dispatch = dispatch(call, request);
    // What is managed takes as long as it takes, where its caller hasn't said how long it waits.
    let ends_at = match call.method.open_to {
        OpenTo::Management => call.ends_at,
        OpenTo::Everybody | OpenTo::Callers => Some(call.deadline.0),
    };
    let Some(ends_at) = ends_at else { return dispatch.await };
    let mut limit = pin!(call.exchange.timer.limit(ends_at));
    tokio::select! {
        biased;
        answered = dispatch => answered,
        () = &mut limit => job_status(&JobError::DeadlinePassed).into_http(),
    }
}

/// A service that takes small messages, compressed or not: what makes it so is a method of each.
macro_rules! compressible {
    ($server:expr) => {
        $server
            .max_decoding_message_size(SMALL_BYTES_MAX)
            .accept_compressed(CompressionEncoding::Gzip)
            .accept_compressed(CompressionEncoding::Deflate)
    };
}

async fn dispatch(call: &Arc<GrpcCall>, request: Request<SmallMessages>) -> Response<tonic::body::Body> {
    let answered: Result<_, Infallible> = match call.method.service {
        Service::Inference => {
            let server = GrpcInferenceServiceServer::new(InferenceService(Arc::clone(call)));
            compressible!(server).call(request).await
        }
        Service::Health => {
            let server = HealthServer::new(HealthService(Arc::clone(call)));
            compressible!(server).call(request).await
        }
        Service::Reflection => match reflection().build_v1() {
            Ok(server) => compressible!(server).call(request).await,
            Err(error) => Ok(Status::internal(error.to_string()).into_http()),
        },
        Service::ReflectionAlpha => match reflection().build_v1alpha() {
            Ok(server) => compressible!(server).call(request).await,
            Err(error) => Ok(Status::internal(error.to_string()).into_http()),
        },
    };
    let Ok(answered) = answered;
    answered
}

fn reflection() -> Builder<'static> {
    Builder::configure()
        .register_encoded_file_descriptor_set(modalkit_proto::DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
}

/// What is accepted, for those who send something else.
fn accepted() -> AsciiMetadataValue {
    AsciiMetadataValue::from_static(ACCEPTED)
}
