//! What operators ask of single models and volumes: how they stand, a reload, a rollback. It finds the path's name, asks, and
//! waits as long as it takes; who may ask was decided before.

use std::{net::IpAddr, sync::Arc};

use hyper::{
    HeaderMap, Method,
    header::{FORWARDED, HOST, HeaderName, ORIGIN, VIA},
    http::{request::Parts, uri::Authority},
};

use super::{
    Context,
    request::{Headers, percent_decoded},
};
use crate::{
    access::AccessError,
    admin,
    egress::{self, HttpResponse},
    reload::ControlError,
};

/// Whether a caller may look at the host's inside and change it: with a key that manages; where there is none, from this machine.
pub(super) fn may_manage(context: &Context, caller: IpAddr, head: &Parts) -> Result<(), AccessError> {
    if context.access.has_management_keys() {
        return context.access.manage(&Headers(&head.headers));
    }
    from_here(caller, head)
}

/// The same, of one who asked for something else: a refusal isn't counted.
pub(super) fn may_look(context: &Context, caller: IpAddr, head: &Parts) -> bool {
    if context.access.has_management_keys() {
        return context.access.may_manage(&Headers(&head.headers)).is_ok();
    }
    from_here(caller, head).is_ok()
}

fn from_here(caller: IpAddr, head: &Parts) -> Result<(), AccessError> {
    if caller.to_canonical().is_loopback() && names_this_machine(head) && !comes_from_elsewhere(&head.headers)
    {
        return Ok(());
    }
    Err(AccessError::Forbidden(
        "this answers callers on this machine only, by its loopback address and through no proxy; a key with management = true opens it to others",
    ))
}

/// Whether the request is for a loopback address: a page in a browser may have made another name lead here.
fn names_this_machine(head: &Parts) -> bool {
    let written =
        head.headers.get(HOST).map(|host| host.to_str().unwrap_or("unreadable").parse::<Authority>());
    let authority = match (head.uri.authority(), written) {
        (Some(authority), _) => authority.clone(),
        (None, Some(Ok(authority))) => authority,
        (None, Some(Err(_))) => return false,
        // HTTP/1.0 has no such thing, and no browser speaks it.
        (None, None) => return true,
    };
    let host = authority.host().trim_start_matches('[').trim_end_matches(']');
    host.eq_ignore_ascii_case("localhost")
        || host.parse::<IpAddr>().is_ok_and(|address| address.to_canonical().is_loopback())
}

/// Whether somebody else asks through a program on this machine: a proxy, or a page in a browser.
fn comes_from_elsewhere(headers: &HeaderMap) -> bool {
    let of_proxies = |name: &HeaderName| {
        let name = name.as_str();
        name.starts_with("x-forwarded") || ["x-real-ip", "cf-connecting-ip", "true-client-ip"].contains(&name)
    };
    let cross_site =
        headers.get("sec-fetch-site").is_some_and(|site| site != "none" && site != "same-origin");
    cross_site
        || [ORIGIN, FORWARDED, VIA].iter().any(|name| headers.contains_key(name))
        || headers.keys().any(of_proxies)
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

    /// The method that it takes.
    pub(super) fn method(self) -> Method {
        match self {
            Self::Model(_) | Self::Config => Method::GET,
            _ => Method::POST,
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
}
