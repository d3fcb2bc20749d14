//! How a running host is reached: over its management socket, or over the network as anybody could. It never knows what is asked.

use std::{
    fs, io,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::Duration,
};

use modalkit::{app::install_cryptography, unix_path::ShortPath};

use super::args::Host;

/// How long the host may take to take a connection. A reload itself may take as long as a model's load does.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// The most bytes that an answer may have.
const ANSWER_BYTES_MAX: u64 = 1 << 30;

/// Where a host is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// On the network, without a slash at its end.
    Url(String),
    /// At its management socket.
    Socket(PathBuf),
}

/// What is sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Sent {
    /// `GET`.
    Get,
    /// `DELETE`.
    Delete,
    /// `POST` with this body.
    Post(String),
}

/// What came back.
pub(crate) struct Answer {
    /// The status.
    pub(crate) status: u16,
    /// The body.
    pub(crate) body: String,
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
    /// Nobody listens at the socket.
    #[error(
        "no host answers at the management socket {}; start one with this configuration, or say where its socket is with --socket or MODALKIT_SOCKET, or where it listens with --url and a key that has management = true{}",
        path.display(), hint_of_socket(path)
    )]
    NoSocket {
        /// Where it was looked for.
        path: PathBuf,
        /// What happened.
        #[source]
        source: io::Error,
    },
    /// The socket is another user's.
    #[error(
        "the management socket {} is open to the host's own user and to root; ask as one of them, or with --url and a key that has management = true",
        path.display()
    )]
    NotOurs {
        /// Where it is.
        path: PathBuf,
        /// What happened.
        #[source]
        source: io::Error,
    },
    /// The connection over the socket broke off.
    #[error("the host at the management socket {} did not answer", path.display())]
    BrokenOff {
        /// Where it is.
        path: PathBuf,
        /// What happened.
        #[source]
        source: reqwest::Error,
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

/// The socket of `cargo xtask run`, which its configuration doesn't tell: it keeps its state in the tree.
const SOCKET_IN_TREE: &str = "target/state/manage.sock";

fn hint_of_socket(path: &Path) -> String {
    if path == Path::new(SOCKET_IN_TREE) || !Path::new(SOCKET_IN_TREE).exists() {
        return String::new();
    }
    format!("; there is one in this folder: MODALKIT_SOCKET={SOCKET_IN_TREE}")
}

/// Asks the host there for a path.
///
/// # Errors
/// It can't be reached, or breaks off.
pub(crate) fn send(place: &Place, path: &str, sent: Sent, host: &Host) -> Result<Answer, ClientError> {
    match place {
        Place::Url(url) => over_network(url, path, sent, host),
        Place::Socket(socket) => over_socket(socket, path, sent),
    }
}

fn over_network(url: &str, path: &str, sent: Sent, host: &Host) -> Result<Answer, ClientError> {
    let agent = agent(url, host.ca.as_deref())?;
    let whole = format!("{url}{path}");
    let bearer = host.key.as_ref().map(|key| format!("Bearer {key}"));
    let answered = match sent {
        Sent::Post(body) => {
            let request = agent.post(&whole).header("content-type", "application/json");
            match &bearer {
                Some(bearer) => request.header("authorization", bearer),
                None => request,
            }
            .send(body)
        }
        Sent::Get | Sent::Delete => {
            let request = if sent == Sent::Get { agent.get(&whole) } else { agent.delete(&whole) };
            match &bearer {
                Some(bearer) => request.header("authorization", bearer),
                None => request,
            }
            .call()
        }
    };
    let unreachable = |source| ClientError::Unreachable { url: url.to_owned(), source: Box::new(source) };
    let mut response = answered.map_err(unreachable)?;
    let status = response.status().as_u16();
    let body =
        response.body_mut().with_config().limit(ANSWER_BYTES_MAX).read_to_string().map_err(unreachable)?;
    Ok(Answer { status, body })
}

fn over_socket(socket: &Path, path: &str, sent: Sent) -> Result<Answer, ClientError> {
    let refused = |source: io::Error| {
        let path = socket.to_owned();
        match source.kind() {
            io::ErrorKind::PermissionDenied => ClientError::NotOurs { path, source },
            _ => ClientError::NoSocket { path, source },
        }
    };
    let short = ShortPath::of(socket).map_err(refused)?;
    // A look beforehand says why nobody can be reached.
    drop(UnixStream::connect(&short).map_err(refused)?);
    let broken_off = |source| ClientError::BrokenOff { path: socket.to_owned(), source };
    install_cryptography();
    // However long a reload takes.
    let client =
        reqwest::blocking::Client::builder().unix_socket(short.as_ref()).no_proxy().timeout(None).build();
    let client = client.map_err(broken_off)?;
    let url = format!("http://localhost{path}");
    let request = match sent {
        Sent::Get => client.get(url),
        Sent::Delete => client.delete(url),
        Sent::Post(body) => client.post(url).header("content-type", "application/json").body(body),
    };
    let response = request.send().map_err(broken_off)?;
    let status = response.status().as_u16();
    Ok(Answer { status, body: response.text().map_err(broken_off)? })
}

fn agent(url: &str, ca: Option<&Path>) -> Result<ureq::Agent, ClientError> {
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
    let mut config = ureq::Agent::config_builder();
    if modalkit_queue::is_loopback(url) {
        config = config.proxy(None);
    }
    let config =
        config.http_status_as_error(false).timeout_connect(Some(CONNECT_TIMEOUT)).tls_config(tls.build());
    Ok(config.build().into())
}
