//! The protocol's paths beside inference, over HTTP: who may ask, what bodies say, and answers as JSON.

use std::{collections::BTreeMap, fmt::Display};

use bytes::Bytes;
use hyper::{Method, StatusCode, http::request::Parts};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    LogSettings, Served, TraceSettings, change_log, change_traces, index, is_model_ready, is_ready, load,
    log_settings, no_model_settings, no_shared_memory, server,
    settings::{check_fixed, invalid_setting},
    statistics, trace_settings, unload,
};
use crate::{
    access::{Caller, Origin, Visibility},
    egress::{HttpResponse, Refusal, object_response},
    ingress::{
        Context,
        body::SmallBody,
        endpoints::{Target, V2Call},
        refusal::let_in,
    },
    work::{Detail, JobError},
};

/// Answers one of the protocol's paths.
pub(in crate::ingress) async fn answer(
    context: &Context,
    from: &Origin,
    body: SmallBody<'_>,
    head: &Parts,
    target: Target<'_>,
    call: V2Call,
) -> HttpResponse {
    let name = target.name();
    let action = target.action(&head.method, &name);
    let caller = match let_in(context, from, head, target, &name) {
        Ok(caller) => caller,
        Err(refused) => return *refused,
    };
    let underway = context.audit.begin(action, &caller, from);
    body.keep(caller.permit.as_ref());
    // A body is read where one says something: others are nobody's concern.
    let read = match head.method {
        Method::POST if call.reads_body() => body.read(&head.headers).await,
        _ => Ok(Bytes::new()),
    };
    let response = match read {
        Ok(body) => {
            let version = target.version();
            let asked =
                Asked { head, name: &name, version: version.as_deref(), body: &body, caller: &caller };
            asked.carry_out(context, call).await.unwrap_or_else(Refusal::into_response)
        }
        Err(error) => error.into_response(),
    };
    underway.answered(response.status().as_u16());
    response
}

/// What a request says.
struct Asked<'a> {
    head: &'a Parts,
    name: &'a str,
    version: Option<&'a str>,
    body: &'a [u8],
    caller: &'a Caller,
}

#[derive(Default, Deserialize)]
struct IndexBody {
    #[serde(default)]
    ready: bool,
}

#[derive(Default, Deserialize)]
struct LoadBody {
    #[serde(default)]
    parameters: BTreeMap<String, Value>,
}

impl Asked<'_> {
    async fn carry_out(&self, context: &Context, call: V2Call) -> Result<HttpResponse, Refusal> {
        let Self { name, version, .. } = *self;
        let changes = self.head.method == Method::POST;
        Ok(match call {
            V2Call::Server => object_response(StatusCode::OK, &server(context)),
            V2Call::Live => object_response(StatusCode::OK, &json!({"live": true})),
            V2Call::Ready => ready_or_not(is_ready(context), json!({})),
            V2Call::Models => {
                let models = context.models.all();
                object_response(StatusCode::OK, &json!({"models": models.keys().collect::<Vec<_>>()}))
            }
            V2Call::Model => {
                object_response(StatusCode::OK, &Served::find(context, name, version)?.metadata())
            }
            V2Call::ModelReady => {
                ready_or_not(is_model_ready(context, name, version)?, json!({"name": name}))
            }
            V2Call::ModelConfig => {
                object_response(StatusCode::OK, &Served::find(context, name, version)?.config())
            }
            V2Call::ModelStatistics => of_models(json!(statistics(context, Some(name), version)?)),
            V2Call::Statistics => of_models(json!(statistics(context, None, None)?)),
            V2Call::Index => {
                let IndexBody { ready } = self.parsed()?;
                let visibility = if self.caller.manages { Visibility::Reasons } else { Visibility::Names };
                object_response(StatusCode::OK, &index(context, ready, visibility))
            }
            V2Call::Load => {
                let LoadBody { parameters } = self.parsed()?;
                load(context, name, parameters.keys().map(String::as_str)).await?;
                nothing()
            }
            V2Call::Unload => {
                let LoadBody { .. } = self.parsed()?;
                unload(context, name).await?;
                nothing()
            }
            V2Call::ModelTrace if changes => {
                return Err(no_model_settings());
            }
            V2Call::Trace | V2Call::ModelTrace => {
                if call == V2Call::ModelTrace {
                    context.models.find(Some(name))?;
                }
                if changes {
                    change_traces(context, &self.trace_settings()?)?;
                }
                object_response(StatusCode::OK, &traces_shown(context))
            }
            V2Call::Log => {
                if changes {
                    change_log(context, self.log_settings()?).await?;
                }
                object_response(StatusCode::OK, &log_shown())
            }
            V2Call::SystemSharedMemory | V2Call::CudaSharedMemory => return Err(no_shared_memory()),
        })
    }

    /// The body, which may be left out.
    fn parsed<T: Default + for<'de> Deserialize<'de>>(&self) -> Result<T, Refusal> {
        if self.body.is_empty() {
            return Ok(T::default());
        }
        let invalid = |why: &dyn Display| {
            let msg = format!("expected a JSON object, or nothing: {why}");
            JobError::Invalid(vec![Detail { loc: vec!["body".into()], msg, kind: "json_invalid".into() }])
        };
        // serde takes the members of a struct from a list as well, by their places.
        if self.body.trim_ascii_start().starts_with(b"[") {
            return Err(invalid(&"found a list").into());
        }
        serde_json::from_slice(self.body).map_err(|error| invalid(&error).into())
    }

    fn trace_settings(&self) -> Result<TraceSettings, Refusal> {
        let settings = self.parsed::<BTreeMap<String, Value>>()?.into_iter();
        let mut settings = settings.map(|(name, value)| Ok((texts(&name, &value)?, name)));
        settings.try_fold(TraceSettings::default(), |change, setting: Result<_, Refusal>| {
            let (values, name) = setting?;
            change.with(&name, values)
        })
    }

    fn log_settings(&self) -> Result<LogSettings, Refusal> {
        let mut settings = LogSettings::default();
        for (name, value) in self.parsed::<BTreeMap<String, Value>>()? {
            let truth = || value.as_bool().ok_or_else(|| wrong(&name, "true or false", &value));
            let number = || whole(&value).ok_or_else(|| wrong(&name, "a whole number", &value));
            match name.as_str() {
                "log_info" => settings.info = Some(truth()?),
                "log_warning" => settings.warning = Some(truth()?),
                "log_error" => settings.error = Some(truth()?),
                "log_verbose_level" => settings.verbose_level = Some(number()?),
                "log_file" => fixed(&name, &texts(&name, &value)?, "")?,
                "log_format" => fixed(&name, &texts(&name, &value)?, "default")?,
                _ => {
                    return Err(unknown(&name, "log_info, log_warning, log_error, log_verbose_level"));
                }
            }
        }
        Ok(settings)
    }
}

fn ready_or_not(ready: bool, mut body: Value) -> HttpResponse {
    body["ready"] = json!(ready);
    object_response(if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, &body)
}

fn of_models(statistics: Value) -> HttpResponse {
    object_response(StatusCode::OK, &json!({"model_stats": statistics}))
}

/// The answer to what was done: clients read nothing of it.
fn nothing() -> HttpResponse {
    object_response(StatusCode::OK, &json!({}))
}

fn traces_shown(context: &Context) -> Value {
    let one = |(name, values): (&str, Vec<String>)| {
        let is_list = name == "trace_level";
        let value = if is_list { json!(values) } else { json!(values.concat()) };
        (name.to_owned(), value)
    };
    trace_settings(context).into_iter().map(one).collect::<serde_json::Map<_, _>>().into()
}

fn log_shown() -> Value {
    let LogSettings { info, warning, error, verbose_level } = log_settings();
    json!({
        "log_file": "", "log_info": info, "log_warning": warning, "log_error": error,
        "log_verbose_level": verbose_level, "log_format": "default",
    })
}

/// One text or several; none for null.
fn texts(name: &str, value: &Value) -> Result<Vec<String>, Refusal> {
    let one = |value: &Value| match value {
        Value::String(text) => Ok(text.clone()),
        Value::Number(number) => Ok(number.to_string()),
        other => Err(wrong(name, "a text", other)),
    };
    match value {
        Value::Null => Ok(Vec::new()),
        Value::Array(values) => values.iter().map(one).collect(),
        value => Ok(vec![one(value)?]),
    }
}

/// A whole number, however it is written: `2.0` is one too.
fn whole(value: &Value) -> Option<u64> {
    let float =
        || value.as_f64().filter(|float| float.fract() == 0.0 && *float >= 0.0).map(|float| float as u64);
    value.as_u64().or_else(float)
}

/// What can't be changed may be said to be what it is.
fn fixed(name: &str, values: &[String], expected: &str) -> Result<(), Refusal> {
    values.iter().try_for_each(|found| check_fixed(name, found, expected))
}

fn wrong(name: &str, expected: &str, found: &Value) -> Refusal {
    invalid_setting(name, format!("expected {expected}, found {found}"))
}

fn unknown(name: &str, expected: &str) -> Refusal {
    invalid_setting(name, format!("expected one of {expected}, found {name:?}"))
}
