//! Who may call, resolved: which keys there are, and where each one's value is. A host that others reach asks them, or says that it
//! doesn't.

use super::{
    AuthSpec, Environment, Fault, KeyLimits, KeySource, KeySpec, Place, SecretText, SsmSpec, TlsFiles,
    Warning,
    fault::listed,
    keys::{ApiKey, Root},
    layer::child,
    secrets,
};

pub(super) const KEY: &str = "app_settings.auth_config";
/// The name of the one key.
const DEFAULT_NAME: &str = "default";
/// The secrets that `secure` compares with.
const MODAL_SECRETS: (&str, &str) = ("modal-key", "modal-secret");
const SOURCES: [&str; 4] = ["api_key", "variable", "secret", "ssm_key"];
pub(super) const DEFAULT_REGION: &str = "us-east-1";

pub(super) fn resolve(
    written: &Root,
    environment: &Environment,
    faults: &mut Vec<Fault>,
    warnings: &mut Vec<Warning>,
) -> AuthSpec {
    let (app, server) = (written.app_settings(), written.server());
    let deployment = app.deployment_config();
    let auth = app.auth_config.value().cloned().unwrap_or_default();
    let region = || {
        let own = auth.ssm_region.value().or_else(|| deployment.region.value()).map(String::as_str);
        own.or_else(|| environment.get("AWS_REGION")).unwrap_or(DEFAULT_REGION).to_owned()
    };
    let mut keys = Vec::new();
    let one = ApiKey { api_key: auth.api_key.clone(), ssm_key: auth.ssm_key.clone(), ..ApiKey::default() };
    if one != ApiKey::default() {
        keys.extend(key(DEFAULT_NAME, (&one, &app.auth_config.at()), KEY, environment, faults));
    }
    for (name, (spec, at)) in auth.keys.value().into_iter().flat_map(|keys| &keys.entries) {
        let path = child(&child(KEY, "keys"), name);
        if name == DEFAULT_NAME && !keys.is_empty() {
            let fault =
                Fault::new(at, &path, "another name", "the name of the key that api_key or ssm_key gives");
            faults.push(fault);
        }
        keys.extend(key(name, (spec, at), &path, environment, faults));
    }
    // One that is wrong has been told.
    let is_wrong = faults.iter().any(|fault| fault.key.starts_with(KEY));
    if app.auth_config.value().is_some()
        && !is_wrong
        && keys.is_empty()
        && auth.keys.value().is_none_or(|keys| keys.entries.is_empty())
    {
        let fault = Fault::new(
            &app.auth_config.at(),
            KEY,
            "a key: api_key, ssm_key or keys",
            "none, so that nobody could call",
        );
        faults.push(fault);
    }
    for (index, key) in keys.iter().enumerate() {
        let same = |other: &&KeySpec| key.source == other.source;
        if let Some(other) = keys[..index].iter().find(same) {
            let path = child(&child(KEY, "keys"), &key.name);
            let found = format!("the one of {}", other.name);
            faults.push(Fault::new(&app.auth_config.at(), &path, "a value of its own for each key", found));
        }
    }
    let header = auth.auth_header();
    if ["host", "content-length", "content-type", "cookie", "modal-key", "modal-secret"]
        .contains(&header.to_ascii_lowercase().as_str())
    {
        let expected = "a header that has no other meaning";
        faults.push(Fault::new(&auth.auth_header.at(), &child(KEY, "auth_header"), expected, header.clone()));
    }
    if header.is_empty() || !header.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
    {
        let expected = "the name of a header: letters, digits, - and _";
        faults.push(Fault::new(
            &auth.auth_header.at(),
            &child(KEY, "auth_header"),
            expected,
            "a text with other characters",
        ));
    }
    AuthSpec {
        header: header.to_ascii_lowercase(),
        keys,
        modal: deployment.secure().then(|| {
            let folder = server.secrets_folder();
            let missing = |name| {
                let value = secrets::value(name, environment, folder.as_ref());
                value.is_ok_and(|value| value.is_none_or(|value| value.is_empty()))
            };
            if missing(MODAL_SECRETS.0) || missing(MODAL_SECRETS.1) {
                let why = format!(
                    "there are no secrets {:?} and {:?}, neither in the environment nor in {folder}: nobody is let in",
                    MODAL_SECRETS.0, MODAL_SECRETS.1
                );
                let key = "app_settings.deployment_config.secure".to_owned();
                warnings.push(Warning { at: deployment.secure.at(), key, why });
            }
            // A variable stays what it is; a file is followed.
            let spec = |name: &str| KeySpec {
                name: name.to_owned(),
                source: match secrets::variable(name, environment) {
                    Some(value) => KeySource::Value(SecretText::new(value)),
                    None => KeySource::Secret(name.to_owned()),
                },
                manages: false,
                explains: false,
                allowed_queues: None,
                limits: KeyLimits::default(),
            };
            [spec(MODAL_SECRETS.0), spec(MODAL_SECRETS.1)]
        }),
        ssm: SsmSpec { endpoint: auth.ssm_endpoint.value().map(|url| url.0.clone()), region: region() },
        refresh: auth.refresh_seconds().duration(),
        secrets_folder: server.secrets_folder().into(),
    }
}

fn key(
    name: &str,
    (spec, at): (&ApiKey, &Place),
    path: &str,
    environment: &Environment,
    faults: &mut Vec<Fault>,
) -> Option<KeySpec> {
    let written = [
        spec.api_key.value().is_some(),
        spec.variable.value().is_some(),
        spec.secret.value().is_some(),
        spec.ssm_key.value().is_some(),
    ];
    let names: Vec<&str> =
        SOURCES.iter().zip(written).filter(|(_, written)| *written).map(|(name, _)| *name).collect();
    if names.len() != 1 {
        let expected = format!("exactly one of {}", listed(SOURCES));
        faults.push(Fault::new(at, path, expected, listed(names)));
        return None;
    }
    let source = if let Some(key) = spec.api_key.value() {
        KeySource::Value(SecretText::new(key.0.clone()))
    } else if let Some(variable) = spec.variable.value() {
        let Some(value) = environment.get(variable).filter(|value| !value.is_empty()) else {
            let key = child(path, "variable");
            // Somebody may have put the key itself there.
            let found = "the name of one that is not set";
            faults.push(Fault::new(
                &spec.variable.at(),
                &key,
                "a variable of the environment that holds the key",
                found,
            ));
            return None;
        };
        KeySource::Value(SecretText::new(value.to_owned()))
    } else if let Some(secret) = spec.secret.value() {
        KeySource::Secret(secret.clone())
    } else {
        KeySource::Ssm(spec.ssm_key.value()?.clone())
    };
    let limits = KeyLimits {
        requests_per_second: spec.requests_per_second.value().map(|rate| rate.0),
        burst: spec.burst.value().map(|burst| burst.0 as u32),
        concurrency_max: spec.concurrency_max.value().map(|limit| limit.0 as usize),
    };
    if limits.burst.is_some() && limits.requests_per_second.is_none() {
        let expected = "requests_per_second beside it, which it is an exception of";
        faults.push(Fault::new(&spec.burst.at(), &child(path, "burst"), expected, "a burst without a rate"));
    }
    Some(KeySpec {
        name: name.to_owned(),
        source,
        manages: spec.management(),
        explains: spec.explain(),
        allowed_queues: spec.allowed_queues.value().cloned(),
        limits,
    })
}

/// The files of HTTPS: both, or none.
pub(super) fn tls(written: &Root, faults: &mut Vec<Fault>) -> Option<TlsFiles> {
    let server = written.server();
    let tls = server.tls.value()?;
    match (tls.certificate.value(), tls.private_key.value()) {
        (Some(certificate), Some(private_key)) => {
            Some(TlsFiles { certificate: certificate.into(), private_key: private_key.into() })
        }
        (certificate, _) => {
            let found = if certificate.is_some() { "no private_key" } else { "no certificate" };
            let fault = Fault::new(
                &server.tls.at(),
                "server.tls",
                "certificate and private_key, two files in PEM",
                found,
            );
            faults.push(fault);
            None
        }
    }
}

/// Whether others than this machine's own programs are let in unasked.
pub(super) fn check_exposure(written: &Root, auth: &AuthSpec, faults: &mut Vec<Fault>) {
    // Whoever meant to ask, and made a mistake, need not be told to open the door.
    let meant_to_ask = faults.iter().any(|fault| fault.key.starts_with(KEY));
    let server = written.server();
    let listen = server.listen().0;
    if meant_to_ask || listen.ip().is_loopback() || auth.asks() || server.insecure() {
        return;
    }
    let expected = "a loopback address, since anybody who reaches another one could use this server";
    let fault = Fault::new(&server.listen.at(), "server.listen", expected, listen.to_string());
    faults.push(fault.hint(
        "set app_settings.auth_config.api_key, so that callers show a key; or, where a proxy or a firewall guards it, server.insecure = true",
    ));
}
