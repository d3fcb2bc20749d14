//! What the section `server` means: limits, state, socket, certificate, traces. It never knows models.

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use super::{
    Environment, Fault, JobSpec, Place, SecretText, Server, TlsFiles, TraceSpec, Warning, keys, types::Secret,
};

/// The management socket's name in the state folder.
pub(super) const MANAGEMENT_SOCKET: &str = "manage.sock";
/// The folder of state is called this, where the platform keeps the state of all programs.
pub(super) const STATE_NAME: &str = "modalkit";
/// The default of versions before.
pub(super) const STATE_BEFORE: &str = "state";

pub(super) fn traces(written: &keys::Server) -> Option<TraceSpec> {
    let traces = written.traces.value()?;
    let header = |(name, value): (&str, &Secret)| (name.to_owned(), SecretText::new(value.0.clone()));
    Some(TraceSpec {
        endpoint: traces.endpoint.value()?.0.clone(),
        sample_ratio: traces.sample_ratio().0,
        headers: traces.headers.value().into_iter().flat_map(|headers| headers.iter()).map(header).collect(),
    })
}

/// Where the management socket lies.
pub(super) fn place_of_socket(written: &keys::Server, environment: &Environment) -> Option<PathBuf> {
    management_socket(written, &state_folder(written, environment, &mut Vec::new()))
}

pub(super) fn management_socket(written: &keys::Server, state_folder: &Path) -> Option<PathBuf> {
    match written.management_socket.value() {
        Some(path) if path.is_empty() => None,
        Some(path) => Some(path.into()),
        None => Some(state_folder.join(MANAGEMENT_SOCKET)),
    }
}

/// Names are compared without ports.
pub(super) fn check_allowed_hosts(written: &keys::Server, faults: &mut Vec<Fault>) {
    let is_name = |host: &str| {
        host.parse::<IpAddr>().is_ok()
            || !host.is_empty()
                && host.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
    };
    for (index, host) in written.allowed_hosts().iter().enumerate().filter(|(_, host)| !is_name(host)) {
        faults.push(Fault::new(
            &written.allowed_hosts.at(),
            &format!("server.allowed_hosts[{index}]"),
            "a name or an address as in https://NAME/, without a scheme, a port and brackets",
            format!("{host:?}"),
        ));
    }
}

/// Origins are compared letter by letter with what browsers send.
pub(super) fn check_cors_origins(written: &keys::Server, asks_for_keys: bool, faults: &mut Vec<Fault>) {
    let is_origin = |text: &str| {
        let parsed = text.parse::<http::Uri>().ok();
        let scheme_and_host =
            parsed.and_then(|uri| Some((uri.scheme_str()?.to_owned(), uri.authority()?.to_string())));
        scheme_and_host.is_some_and(|(scheme, host)| {
            let usual = match scheme.as_str() {
                "http" => ":80",
                "https" => ":443",
                _ => return false,
            };
            // As a browser writes it: nothing behind the port, no port that goes without saying, and small letters.
            text == format!("{scheme}://{host}")
                && !host.ends_with(usual)
                && !text.contains(char::is_uppercase)
                && !text.contains('@')
        })
    };
    for (index, origin) in written.cors_origins().iter().enumerate() {
        let key = format!("server.cors_origins[{index}]");
        let at = written.cors_origins.at();
        if origin == "*" {
            if !asks_for_keys {
                let expected = "origins by their names, since this host asks nobody for a key: every page that its user opens could call it";
                faults.push(Fault::new(&at, &key, expected, "\"*\""));
            }
        } else if !is_origin(origin) {
            let expected =
                "an origin as browsers write it, such as https://app.example or http://localhost:3000, or *";
            faults.push(Fault::new(&at, &key, expected, format!("{origin:?}")));
        }
    }
}

/// Where state lies: as it is written, or where this platform keeps such things.
pub(super) fn state_folder(
    written: &keys::Server,
    environment: &Environment,
    warnings: &mut Vec<Warning>,
) -> PathBuf {
    if let Some(folder) = written.state_folder.value() {
        return folder.0.clone();
    }
    let variable = |name| {
        // systemd gives several with colons between them.
        let first = environment.get(name).and_then(|value| value.split(':').next()).map(PathBuf::from);
        // A user without a home has / for one.
        first.filter(|path| path.is_absolute() && path.parent().is_some())
    };
    let folder = variable("STATE_DIRECTORY")
        .or_else(|| Some(variable("XDG_STATE_HOME")?.join(STATE_NAME)))
        .or_else(|| Some(variable("HOME")?.join(".local/state").join(STATE_NAME)))
        .unwrap_or_else(|| PathBuf::from("/var/lib").join(STATE_NAME));
    if Path::new(STATE_BEFORE).join("jobs.sqlite").exists() {
        let why = format!(
            "jobs of an earlier start lie in the folder {STATE_BEFORE:?} here, which was the default once; this one keeps its jobs in {}: set it to go on with those, or move them",
            folder.display()
        );
        warnings.push(Warning { at: Place::Default, key: "server.state_folder".to_owned(), why });
    }
    folder
}

pub(super) fn server(written: &keys::Server, tls: Option<TlsFiles>, state_folder: PathBuf) -> Server {
    let listen = written.listen().0;
    let milliseconds = |count: u64| Duration::from_millis(count);
    let request_timeout_max = milliseconds(written.request_timeout_ms_max().0);
    let connections_max = written.connections_max().0;
    let per_address_max =
        written.connections_per_address_max.value().map_or(connections_max / 2, |max| max.0);
    Server {
        listen,
        insecure: written.insecure(),
        io_threads: written.io_threads() as usize,
        connections_max: connections_max as usize,
        connections_per_address_max: per_address_max.max(1) as usize,
        header_timeout: milliseconds(written.header_timeout_ms().0),
        keep_alive_timeout: milliseconds(written.keep_alive_timeout_ms().0),
        header_bytes_max: written.header_bytes_max().0 as usize,
        body_timeout: milliseconds(written.body_timeout_ms().0),
        body_bytes_max: written.body_bytes_max().0 as usize,
        bytes_in_flight_max: written.bytes_in_flight_max().0 as usize,
        write_timeout: milliseconds(written.write_timeout_ms().0),
        decode_inline_bytes_max: written.decode_inline_bytes_max().0 as usize,
        compress_bytes_min: written.compress_bytes_min().0 as usize,
        stream_heartbeat: milliseconds(written.stream_heartbeat_ms().0),
        request_timeout: milliseconds(written.request_timeout_ms().0).min(request_timeout_max),
        request_timeout_max,
        drain_delay: Duration::from_secs(written.drain_delay_seconds().0),
        drain_timeout: Duration::from_secs(written.drain_timeout_seconds().0),
        preflight_timeout: Duration::from_secs(written.preflight_timeout_seconds().0),
        settle: milliseconds(written.settle_ms().0),
        settle_timeout: Duration::from_secs(written.settle_timeout_seconds().0),
        poll_interval: milliseconds(written.poll_interval_ms().0),
        removed_plugin: written.removed_plugin_seconds.value().map(|seconds| Duration::from_secs(seconds.0)),
        generations_max: written.generations_max().0 as usize,
        plugins_of_any_owner: written.plugins_of_any_owner(),
        plugins_of_any_mode: written.plugins_of_any_mode(),
        management_socket: management_socket(written, &state_folder),
        allowed_hosts: written.allowed_hosts(),
        cors_origins: written.cors_origins(),
        state_folder,
        jobs: JobSpec {
            jobs_max: written.jobs_max().0 as usize,
            jobs_per_model_max: written.jobs_per_model_max().0 as usize,
            retention: Duration::from_secs(written.job_retention_seconds().0),
            bytes_max: written.job_store_bytes_max().0,
            result_bytes_max: written.result_bytes_max().0 as usize,
            crashes_max: written.job_crashes_max().0 as u32,
            names: Duration::from_secs(written.idempotency_window_seconds().0),
        },
        log: written.log().0,
        bucket_wait: Duration::from_secs(written.bucket_wait_seconds().0),
        secrets_folder: written.secrets_folder().into(),
        tls,
        traces: traces(written),
    }
}
