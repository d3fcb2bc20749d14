//! The commands that ask a running host: its models, a reload, a rollback. It speaks to the host as anybody could, over HTTP,
//! and writes what people read, or the host's own JSON.

use std::{
    fs, io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use modalkit::config::{self, Environment};
use serde_json::value::RawValue;

use super::{
    DONE, NOT_DONE, WRONG_USAGE,
    args::Host,
    print::{complain, print},
    show::for_people,
};

/// How long the host may take to take a connection. A reload itself may take as long as a model's load does.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Ask {
    /// All models, or one with its history.
    Models(Option<String>),
    /// A model's plugin, taken from its volume again.
    Reload(String),
    /// A volume, looked through.
    ReloadVolume(String),
    /// A model's generation before.
    RollBack(String),
    /// A model, unloaded.
    Unload(String),
    /// The GPUs.
    Devices,
    /// The configuration in force.
    Config,
    /// The configuration, read again.
    ReloadConfig,
    /// What became of a job.
    Job(String, Option<u64>),
    /// A job, taken back.
    CancelJob(String),
    /// A job's result, delivered again.
    Redeliver(String),
    /// Jobs.
    Jobs {
        /// In this state.
        state: Option<String>,
        /// Whose results are so.
        delivery: Option<String>,
        /// Of this model.
        model: Option<String>,
        /// Before this one.
        after: Option<String>,
        /// At most so many.
        limit: usize,
    },
    /// An answer.
    Predict {
        /// Of which model.
        model: Option<String>,
        /// To this JSON.
        input: String,
        /// How it is asked for.
        how: How,
    },
}

/// How an answer is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum How {
    /// And waited for.
    Now,
    /// To each input of a list.
    Batch,
    /// As an asynchronous job.
    Later,
}

/// An input as it is said on the command line: JSON, `@FILE`, or `-` for standard input.
pub(crate) fn input(said: &str) -> io::Result<String> {
    match said.strip_prefix('@') {
        Some(file) => fs::read_to_string(file),
        None if said == "-" => io::read_to_string(io::stdin()),
        None => Ok(said.to_owned()),
    }
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClientError {
    /// Nobody answered.
    #[error("can't reach the host at {url}; say where it listens with --url or MODALKIT_URL")]
    Unreachable {
        /// Where it was looked for.
        url: String,
        /// What happened.
        #[source]
        source: Box<ureq::Error>,
    },
    /// The certificate of an authority can't be used.
    #[error("can't use the certificate in {}", path.display())]
    Authority {
        /// Its file.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The answer is none of this host's.
    #[error("{url} answered {status} with something that is no JSON; is it a modalkit host?")]
    Foreign {
        /// What was asked.
        url: String,
        /// The status.
        status: u16,
    },
}

/// The most bytes that an answer may have.
const ANSWER_BYTES_MAX: u64 = 1 << 30;

/// What the host answered, to be printed; and whether it did what was asked.
pub(crate) struct Answered {
    /// The text, with its last line's end.
    pub(crate) text: String,
    /// Whether that was done.
    pub(crate) done: bool,
}

/// Asks a running host and prints what it says; not done where it didn't do what was asked.
pub(crate) fn run(what: &Ask, host: &Host, files: &[PathBuf], environment: &Environment) -> u8 {
    let url = match &host.url {
        Some(url) => url.trim_end_matches('/').to_owned(),
        None => match config::load(files, environment) {
            Ok(loaded) => url_of(loaded.config.server.listen, loaded.config.server.tls.is_some()),
            Err(faults) => {
                complain(&anyhow::Error::new(faults));
                return WRONG_USAGE;
            }
        },
    };
    match ask(&url, what, host) {
        Ok(answered) => {
            print(&answered.text);
            if answered.done { DONE } else { NOT_DONE }
        }
        Err(error) => {
            complain(&anyhow::Error::new(error));
            NOT_DONE
        }
    }
}

/// A host that listens everywhere is found here too.
fn url_of(mut listen: SocketAddr, tls: bool) -> String {
    if listen.ip().is_unspecified() {
        listen.set_ip(if listen.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() });
    }
    format!("{}://{listen}", if tls { "https" } else { "http" })
}

/// Asks the host at `url`, which has no slash at its end.
///
/// # Errors
/// It can't be reached, or isn't a host of this kind.
fn ask(url: &str, ask: &Ask, host: &Host) -> Result<Answered, ClientError> {
    let agent = agent(host.ca.as_deref())?;
    let model = |name: &Option<String>| match name {
        Some(name) => format!("?model_name={}", escaped(name)),
        None => String::new(),
    };
    let (path, body) = match ask {
        Ask::Models(None) => ("/models".to_owned(), None),
        Ask::Models(Some(name)) => (format!("/models/{}", escaped(name)), None),
        Ask::Reload(name) => (format!("/models/{}/reload", escaped(name)), Some(String::new())),
        Ask::RollBack(name) => (format!("/models/{}/rollback", escaped(name)), Some(String::new())),
        Ask::Unload(name) => (format!("/models/{}/unload", escaped(name)), Some(String::new())),
        Ask::ReloadVolume(name) => (format!("/volumes/{}/reload", escaped(name)), Some(String::new())),
        Ask::Devices => ("/devices".to_owned(), None),
        Ask::Config => ("/config".to_owned(), None),
        Ask::ReloadConfig => ("/config/reload".to_owned(), Some(String::new())),
        Ask::Job(id, None) => (format!("/jobs/{}", escaped(id)), None),
        Ask::Job(id, Some(wait)) => (format!("/jobs/{}?wait_ms={wait}", escaped(id)), None),
        Ask::CancelJob(id) => (format!("/jobs/{}", escaped(id)), None),
        Ask::Redeliver(id) => (format!("/jobs/{}/redeliver", escaped(id)), Some(String::new())),
        Ask::Jobs { state, delivery, model, after, limit } => {
            let parameter = |name: &str, value: &Option<String>| {
                value.as_ref().map(|value| format!("&{name}={}", escaped(value))).unwrap_or_default()
            };
            let filters = parameter("state", state)
                + &parameter("delivery", delivery)
                + &parameter("model", model)
                + &parameter("after", after);
            (format!("/jobs?limit={limit}{filters}"), None)
        }
        Ask::Predict { model: name, input, how: How::Now } => {
            (format!("/predict_sync{}", model(name)), Some(input.clone()))
        }
        Ask::Predict { model: name, input, how: How::Batch } => {
            (format!("/predict_batch{}", model(name)), Some(input.clone()))
        }
        Ask::Predict { model: name, input, how: How::Later } => {
            (format!("/predict_async{}", model(name)), Some(format!("{{\"message\": {input}}}")))
        }
    };
    let whole = format!("{url}{path}");
    let bearer = host.key.as_ref().map(|key| format!("Bearer {key}"));
    let sent = match body {
        None if matches!(ask, Ask::CancelJob(_)) => match &bearer {
            Some(bearer) => agent.delete(&whole).header("authorization", bearer),
            None => agent.delete(&whole),
        }
        .call(),
        Some(body) => {
            let request = agent.post(&whole).header("content-type", "application/json");
            match &bearer {
                Some(bearer) => request.header("authorization", bearer),
                None => request,
            }
            .send(body)
        }
        None => match &bearer {
            Some(bearer) => agent.get(&whole).header("authorization", bearer),
            None => agent.get(&whole),
        }
        .call(),
    };
    let unreachable = |source| ClientError::Unreachable { url: url.to_owned(), source: Box::new(source) };
    let mut response = sent.map_err(unreachable)?;
    let status = response.status().as_u16();
    let body =
        response.body_mut().with_config().limit(ANSWER_BYTES_MAX).read_to_string().map_err(unreachable)?;
    // What a pipeline or a caller wrote is JSON that a `Value` may not hold: such a number, or so many levels.
    if serde_json::from_str::<&RawValue>(&body).is_err() {
        return Err(ClientError::Foreign { url: whole, status });
    }
    let text = if host.json { format!("{body}\n") } else { for_people(ask, &body) };
    let hint = match status {
        401 if host.key.is_none() => "show a key: MODALKIT_KEY or --key\n",
        _ => "",
    };
    Ok(Answered { text: text + hint, done: (200..300).contains(&status) })
}

fn agent(ca: Option<&Path>) -> Result<ureq::Agent, ClientError> {
    let mut tls = ureq::tls::TlsConfig::builder();
    if let Some(path) = ca {
        let unusable = |source: Box<dyn std::error::Error + Send + Sync>| ClientError::Authority {
            path: path.to_owned(),
            source,
        };
        let pem = fs::read(path).map_err(|error| unusable(error.into()))?;
        let certificate = ureq::tls::Certificate::from_pem(&pem).map_err(|error| unusable(error.into()))?;
        tls = tls.root_certs(ureq::tls::RootCerts::new_with_certs(&[certificate]));
    }
    let config = ureq::Agent::config_builder()
        .http_status_as_error(false)
        .timeout_connect(Some(CONNECT_TIMEOUT))
        .tls_config(tls.build());
    Ok(config.build().into())
}

/// A name as a step of a path.
fn escaped(name: &str) -> String {
    let byte = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => char::from(byte).to_string(),
        other => format!("%{other:02X}"),
    };
    name.bytes().map(byte).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_one_step_of_a_path() {
        assert_eq!(escaped("my model/é"), "my%20model%2F%C3%A9");
    }
}
