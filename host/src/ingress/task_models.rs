//! `GET /v1/models`: the models that OpenAI's clients find, those with a task.

use std::time::UNIX_EPOCH;

use hyper::{StatusCode, http::request::Parts};
use serde_json::{Value, json};

use super::{
    Context,
    body::SmallBody,
    endpoints::{Route, Target},
    refusal::let_in,
};
use crate::{
    access::Origin,
    egress::{self, HttpResponse, object_response},
    pipeline::Model,
    work::JobError,
};

pub(super) fn answer(
    context: &Context,
    from: &Origin,
    body: SmallBody<'_>,
    head: &Parts,
    target: Target<'_>,
) -> HttpResponse {
    let name = target.name();
    let caller = match let_in(context, from, head, target, &name) {
        Ok(caller) => caller,
        Err(refused) => return *refused,
    };
    body.keep(caller.permit.as_ref());
    let all = context.models.all();
    if target.route() == Route::TaskModels {
        let models: Vec<Value> = all.values().filter_map(|model| described(model)).collect();
        return object_response(StatusCode::OK, &json!({"object": "list", "data": models}));
    }
    match all.get(&*name).and_then(|model| described(model)) {
        Some(model) => object_response(StatusCode::OK, &model),
        None => {
            let known = all.values().filter(|model| model.spec().task.is_some());
            let known = known.map(|model| model.name.clone()).collect();
            egress::error(&JobError::UnknownModel { name: Some(name.into_owned()), known })
        }
    }
}

/// A model, where it has a task.
fn described(model: &Model) -> Option<Value> {
    let task = model.spec().task?;
    let created = model.created.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    Some(json!({
        "id": model.name, "object": "model", "created": created, "owned_by": "modalkit", "task": task.name(),
    }))
}
