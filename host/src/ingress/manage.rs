//! What operators ask of single models and volumes: how they stand, a reload, a rollback. It finds the path's name, asks, and
//! waits as long as it takes; who may ask is decided by access.

use std::sync::Arc;

use hyper::{Method, http::request::Parts};

use super::{
    Context,
    request::{Headers, percent_decoded},
    routes::{refuse, wrong_method},
};
use crate::{
    access::Origin,
    admin,
    audit::{Action, Does},
    egress::{self, HttpResponse},
    reload::ControlError,
};

/// Answers a management path to those who may manage.
pub(super) async fn answer(
    context: &Context,
    from: &Origin,
    head: &Parts,
    managed: Managed<'_>,
) -> HttpResponse {
    let is_get = managed.method() == Method::GET;
    let name = percent_decoded(managed.name());
    let action = Action {
        method: head.method.as_str(),
        endpoint: managed.endpoint(),
        name: &name,
        does: managed.does(),
    };
    let response = if head.method != managed.method() {
        wrong_method(if is_get { "GET" } else { "POST" })
    } else {
        match context.access.manage(from, &Headers(&head.headers)) {
            Ok(caller) => {
                let underway = context.audit.begin(action, &caller, from);
                let response = managed.answer(context).await;
                underway.answered(response.status().as_u16());
                response
            }
            Err(denied) => refuse(context, from, action, &denied),
        }
    };
    context.metrics.requests("", managed.endpoint(), response.status().as_u16()).inc();
    response
}

/// A management path, taken apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Managed<'p> {
    /// `/models/{name}`
    Model(&'p str),
    /// `/models/{name}/reload`
    ReloadModel(&'p str),
    /// `/models/{name}/rollback`
    RollBack(&'p str),
    /// `/models/{name}/unload`
    Unload(&'p str),
    /// `/volumes/{name}/reload`
    ReloadVolume(&'p str),
    /// `/config`
    Config,
    /// `/config/reload`
    ReloadConfig,
}

impl<'p> Managed<'p> {
    /// `None` where the path is none of these.
    pub(super) fn parse(path: &'p str) -> Option<Self> {
        match path {
            "/config" => return Some(Self::Config),
            "/config/reload" => return Some(Self::ReloadConfig),
            _ => {}
        }
        let mut steps = path.strip_prefix('/')?.split('/');
        let path = (steps.next()?, steps.next()?, steps.next());
        if steps.next().is_some() || path.1.is_empty() {
            return None;
        }
        match path {
            ("models", name, None) => Some(Self::Model(name)),
            ("models", name, Some("reload")) => Some(Self::ReloadModel(name)),
            ("models", name, Some("rollback")) => Some(Self::RollBack(name)),
            ("models", name, Some("unload")) => Some(Self::Unload(name)),
            ("volumes", name, Some("reload")) => Some(Self::ReloadVolume(name)),
            _ => None,
        }
    }

    /// The path as a label of metrics.
    pub(super) fn endpoint(self) -> &'static str {
        match self {
            Self::Model(_) => "/models/{name}",
            Self::ReloadModel(_) => "/models/{name}/reload",
            Self::RollBack(_) => "/models/{name}/rollback",
            Self::Unload(_) => "/models/{name}/unload",
            Self::ReloadVolume(_) => "/volumes/{name}/reload",
            Self::Config => "/config",
            Self::ReloadConfig => "/config/reload",
        }
    }

    /// What stands in the path's placeholder.
    pub(super) fn name(self) -> &'p str {
        match self {
            Self::Model(name)
            | Self::ReloadModel(name)
            | Self::RollBack(name)
            | Self::Unload(name)
            | Self::ReloadVolume(name) => name,
            Self::Config | Self::ReloadConfig => "",
        }
    }

    /// The method that it takes.
    pub(super) fn method(self) -> Method {
        match self {
            Self::Model(_) | Self::Config => Method::GET,
            _ => Method::POST,
        }
    }

    /// What it does.
    fn does(self) -> Does {
        match self {
            Self::Model(_) => Does::Look,
            Self::Config => Does::Read,
            _ => Does::Change,
        }
    }

    /// Asks, and waits for what comes of it.
    pub(super) async fn answer(self, context: &Context) -> HttpResponse {
        let control = &context.control;
        let answered = match self {
            Self::Model(name) => match control.report(&percent_decoded(name)).await {
                Ok(report) => {
                    let (models, name) = (Arc::clone(&context.models), percent_decoded(name).into_owned());
                    // It counts the memory of libraries, which takes longer than this thread's callers should wait.
                    let made = context.blocking.spawn_blocking(move || admin::model(&models, &name, &report));
                    made.await.map_err(|_| ControlError::Stopping)
                }
                Err(error) => Err(error),
            },
            Self::ReloadModel(name) => {
                control.reload(&percent_decoded(name)).await.map(|entry| egress::reloaded(&entry))
            }
            Self::RollBack(name) => {
                control.roll_back(&percent_decoded(name)).await.map(|entry| egress::reloaded(&entry))
            }
            Self::Unload(name) => {
                control.unload(&percent_decoded(name)).await.map(|unloaded| egress::unloaded(&unloaded))
            }
            Self::ReloadVolume(name) => {
                let report = control.reload_volume(&percent_decoded(name)).await;
                report.map(|report| egress::volume_reloaded(&report))
            }
            Self::Config => Ok(admin::config(&context.configuration.now())),
            Self::ReloadConfig => Ok(egress::reconfigured(&context.configuration.reload().await)),
        };
        answered.unwrap_or_else(|error| egress::control_error(&error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found_in_paths_and_other_paths_are_nobodys() {
        let parsed = |path| Managed::parse(path);
        assert_eq!(parsed("/models/echo"), Some(Managed::Model("echo")));
        assert_eq!(parsed("/models/echo/rollback"), Some(Managed::RollBack("echo")));
        assert_eq!(parsed("/models/echo/unload"), Some(Managed::Unload("echo")));
        assert_eq!(parsed("/volumes/main/reload"), Some(Managed::ReloadVolume("main")));
        for path in
            ["/models", "/models/", "/models/a/b", "/models/a/reload/c", "/volumes/a", "/jobs/a", "models/a"]
        {
            assert_eq!(parsed(path), None, "{path}");
        }
    }

    #[test]
    fn settings_are_read_and_how_a_model_stands_is_looked_at() {
        for (path, does) in [
            ("/config", Does::Read),
            ("/models/a", Does::Look),
            ("/models/a/reload", Does::Change),
            ("/models/a/rollback", Does::Change),
            ("/models/a/unload", Does::Change),
            ("/volumes/a/reload", Does::Change),
            ("/config/reload", Does::Change),
        ] {
            assert_eq!(Managed::parse(path).unwrap().does(), does, "{path}");
        }
    }
}
