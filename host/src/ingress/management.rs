//! What operators ask: how models, devices and the configuration stand, metrics, reloads, rollbacks. It asks, and waits as long as it takes; who may ask
//! is decided by access.

use std::sync::Arc;

use hyper::http::request::Parts;

use super::{
    Context,
    endpoints::{Route, Target},
    refusal::refuse,
    request_headers::Headers,
};
use crate::{
    access::Origin,
    admin,
    egress::{self, HttpResponse},
    reload::ControlError,
    work::JobError,
};

/// Answers a management path to those who may manage.
pub(super) async fn answer(
    context: &Context,
    from: &Origin,
    head: &Parts,
    target: Target<'_>,
) -> HttpResponse {
    let name = target.name();
    let action = target.action(&head.method, &name);
    match context.access.manage(from, &Headers(&head.headers)) {
        Ok(caller) => {
            let underway = context.audit.begin(action, &caller, from);
            let response = carry_out(context, target.route(), &name).await;
            underway.answered(response.status().as_u16());
            response
        }
        Err(denied) => refuse(context, from, action, &denied),
    }
}

/// Asks, and waits for what comes of it.
async fn carry_out(context: &Context, route: Route, name: &str) -> HttpResponse {
    let control = &context.control;
    let answered = match route {
        Route::Model => match control.report(name).await {
            Ok(report) => {
                let (models, name) = (Arc::clone(&context.models), name.to_owned());
                // It counts the memory of libraries, which takes longer than this thread's callers should wait.
                let made = context.blocking.spawn_blocking(move || admin::model(&models, &name, &report));
                made.await.map_err(|_| ControlError::Stopping)
            }
            Err(error) => Err(error),
        },
        Route::ReloadModel => control.reload(name).await.map(|record| egress::reloaded(&record)),
        Route::RollBack => control.roll_back(name).await.map(|record| egress::reloaded(&record)),
        Route::Unload => control.unload(name).await.map(|unloaded| egress::unloaded(&unloaded)),
        Route::ReloadVolume => {
            control.reload_volume(name).await.map(|report| egress::volume_reloaded(&report))
        }
        Route::Models => Ok(admin::models(&context.models)),
        Route::Devices => Ok(admin::devices(&context.devices)),
        Route::Metrics => {
            context.metrics.requests_in_flight.set(context.gate.requests() as i64);
            context.metrics.bytes_in_flight.set(context.budget.bytes() as i64);
            Ok(admin::metrics(&context.metrics, &context.devices, &context.buckets))
        }
        Route::Config => Ok(admin::config(&context.configuration.now())),
        Route::ReloadConfig => Ok(egress::reconfigured(&context.configuration.reload().await)),
        other => {
            tracing::error!(route = ?other, "a path that isn't management's was taken for one of it");
            return egress::error(&JobError::Lost);
        }
    };
    answered.unwrap_or_else(|error| egress::control_error(&error))
}
