//! gRPC's own health checks: of the host, and of models by their names, for those who may see them.

use std::{
    pin::Pin,
    time::{Duration, Instant},
};

use futures_util::{Stream, stream};
use tokio::time::{Interval, MissedTickBehavior, interval};
use tonic::{Request, Response, Status};
use tonic_health::pb::{
    HealthCheckRequest, HealthCheckResponse, health_check_response::ServingStatus, health_server::Health,
};

use super::call::GrpcCall;
use crate::{access::Visibility, egress::job_status, ingress::v2, work::JobError};

/// Between two looks of somebody who watches.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// How long somebody watches who shows no key, where there are keys.
const UNKNOWN_WATCH_TIME_MAX: Duration = Duration::from_secs(1800);
/// Characters of a name that an error repeats.
const SHOWN_CHARS: usize = 80;
/// The service whose health is the host's.
const INFERENCE: &str = modalkit_proto::grpc_inference_service_server::SERVICE_NAME;

/// Answers health checks.
pub(super) struct HealthService(pub(super) std::sync::Arc<GrpcCall>);

/// The status of the host, or of the model with this name; `None` where there is none, or none that this caller may see.
fn status(call: &GrpcCall, service: &str) -> Option<ServingStatus> {
    let context = call.context();
    let serves = match service {
        "" | INFERENCE => v2::is_ready(context),
        _ if call.visibility() == Visibility::Status => return None,
        model => v2::is_model_ready(context, model, None).ok()?,
    };
    Some(if serves { ServingStatus::Serving } else { ServingStatus::NotServing })
}

fn response(status: ServingStatus) -> HealthCheckResponse {
    HealthCheckResponse { status: status.into() }
}

#[tonic::async_trait]
impl Health for HealthService {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<HealthCheckResponse, Status>> + Send>>;

    async fn check(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        let service = request.into_inner().service;
        let unknown = || {
            Status::not_found(format!(
                "no such service: {:?}; expected none, {INFERENCE}, or a model's name (with a key, where there are keys)",
                service.chars().take(SHOWN_CHARS).collect::<String>()
            ))
        };
        status(&self.0, &service).map(|status| Response::new(response(status))).ok_or_else(unknown)
    }

    async fn watch(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        struct Watch {
            call: std::sync::Arc<GrpcCall>,
            service: String,
            told: Option<ServingStatus>,
            looks: Interval,
            is_over: bool,
        }
        let mut looks = interval(LOOK_INTERVAL);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let watch = Watch {
            call: std::sync::Arc::clone(&self.0),
            service: request.into_inner().service,
            told: None,
            looks,
            is_over: false,
        };
        let changes = stream::unfold(watch, |mut watch| async move {
            if watch.is_over {
                return None;
            }
            loop {
                watch.looks.tick().await;
                // Whoever shows no key, where there are keys, asks again now and then.
                let is_unknown = watch.call.visibility() == Visibility::Status;
                if is_unknown && watch.call.begun.elapsed() > UNKNOWN_WATCH_TIME_MAX {
                    watch.is_over = true;
                    let over = JobError::Unavailable("watch again, or show a key".to_owned());
                    return Some((Err(job_status(&over)), watch));
                }
                if watch.call.ends_at.is_some_and(|at| Instant::now() >= at) {
                    // Once: the stream is over behind it.
                    watch.is_over = true;
                    return Some((Err(job_status(&JobError::DeadlinePassed)), watch));
                }
                let now = status(&watch.call, &watch.service).unwrap_or(ServingStatus::ServiceUnknown);
                if watch.told.replace(now) != Some(now) {
                    return Some((Ok(response(now)), watch));
                }
                if watch.call.context().gate.is_closed() {
                    return None;
                }
            }
        });
        Ok(Response::new(Box::pin(changes)))
    }
}
