//! The commands that ask a running host: its models, a reload, a rollback. It chooses where the host is asked, and writes what people
//! read, or the host's own JSON.

use std::{
    fs, io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
};

use modalkit::config::{self, Environment, Faults};
use serde_json::value::RawValue;

use super::{
    DONE, NOT_DONE, WRONG_USAGE,
    args::Host,
    client::{self, Answer, ClientError, Place, Sent},
    print::{complain, print},
    request::{Ask, How},
    show::for_people,
};

/// An input as it is said on the command line: JSON, `@FILE`, or `-` for standard input.
pub(crate) fn input(said: &str) -> io::Result<String> {
    match said.strip_prefix('@') {
        Some(file) => fs::read_to_string(file),
        None if said == "-" => io::read_to_string(io::stdin()),
        None => Ok(said.to_owned()),
    }
}

/// What the host answered, to be printed; and whether it did what was asked.
pub(crate) struct Answered {
    /// The text, with its last line's end.
    pub(crate) text: String,
    /// Whether that was done.
    pub(crate) done: bool,
}

/// Asks a running host and prints what it says; not done where it didn't do what was asked.
pub(crate) fn run(what: &Ask, host: &Host, files: &[PathBuf], environment: &Environment) -> u8 {
    let place = match place(what, host, files, environment) {
        Ok(place) => place,
        Err(faults) => {
            complain(&anyhow::Error::new(faults));
            return WRONG_USAGE;
        }
    };
    match ask(&place, what, host) {
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

/// Where the host is asked: predictions over the network, all else over the management socket, unless an address or a key was said.
/// What was said on the command line beats what the environment says.
fn place(what: &Ask, host: &Host, files: &[PathBuf], environment: &Environment) -> Result<Place, Faults> {
    let predicts = matches!(what, Ask::Predict { .. });
    let socket = |said: Option<PathBuf>| said.filter(|_| !predicts).map(Place::Socket);
    let url = |said: Option<&str>| said.map(|url| Place::Url(url.trim_end_matches('/').to_owned()));
    let said = socket(host.socket.clone())
        .or_else(|| url(host.url.as_deref()))
        .or_else(|| socket(environment.get("MODALKIT_SOCKET").map(PathBuf::from)))
        .or_else(|| url(environment.get("MODALKIT_URL")));
    if let Some(place) = said {
        return Ok(place);
    }
    let found = config::host_place(files, environment)?;
    let own = found.management_socket.filter(|_| host.key.is_none());
    Ok(socket(own).unwrap_or_else(|| Place::Url(url_of(found.listen, found.tls))))
}

/// A host that listens everywhere is found here too.
fn url_of(mut listen: SocketAddr, tls: bool) -> String {
    if listen.ip().is_unspecified() {
        listen.set_ip(if listen.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() });
    }
    format!("{}://{listen}", if tls { "https" } else { "http" })
}

/// Asks the host.
///
/// # Errors
/// It can't be reached, or isn't a host of this kind.
fn ask(place: &Place, ask: &Ask, host: &Host) -> Result<Answered, ClientError> {
    let (path, sent) = request(ask);
    let Answer { status, body } = client::send(place, &path, sent, host)?;
    let done = (200..300).contains(&status);
    if *ask == Ask::Metrics && done {
        return Ok(Answered { text: body, done });
    }
    // What a pipeline or a caller wrote is JSON that a `Value` may not hold: such a number, or so many levels.
    if serde_json::from_str::<&RawValue>(&body).is_err() {
        let url = match place {
            Place::Url(url) => format!("{url}{path}"),
            Place::Socket(socket) => socket.display().to_string(),
        };
        return Err(ClientError::Foreign { url, status });
    }
    let text = if host.json { format!("{body}\n") } else { for_people(ask, &body) };
    let hint = match status {
        401 if host.key.is_none() => "show a key: MODALKIT_KEY or --key\n",
        _ => "",
    };
    Ok(Answered { text: text + hint, done })
}

/// The path, and what is sent there.
fn request(ask: &Ask) -> (String, Sent) {
    let nothing = || Sent::Post(String::new());
    match ask {
        Ask::Models(None) => ("/models".to_owned(), Sent::Get),
        Ask::Models(Some(name)) => (format!("/models/{}", escaped(name)), Sent::Get),
        Ask::Reload(name) => (format!("/models/{}/reload", escaped(name)), nothing()),
        Ask::RollBack(name) => (format!("/models/{}/rollback", escaped(name)), nothing()),
        Ask::Unload(name) => (format!("/models/{}/unload", escaped(name)), nothing()),
        Ask::ReloadVolume(name) => (format!("/volumes/{}/reload", escaped(name)), nothing()),
        Ask::Devices => ("/devices".to_owned(), Sent::Get),
        Ask::Metrics => ("/metrics".to_owned(), Sent::Get),
        Ask::Config => ("/config".to_owned(), Sent::Get),
        Ask::ReloadConfig => ("/config/reload".to_owned(), nothing()),
        Ask::Job(id, None) => (format!("/jobs/{}", escaped(id)), Sent::Get),
        Ask::Job(id, Some(wait)) => (format!("/jobs/{}?wait_ms={wait}", escaped(id)), Sent::Get),
        Ask::CancelJob(id) => (format!("/jobs/{}", escaped(id)), Sent::Delete),
        Ask::Redeliver(id) => (format!("/jobs/{}/redeliver", escaped(id)), nothing()),
        Ask::Jobs { state, delivery, model, after, limit } => {
            let parameter = |name: &str, value: &Option<String>| {
                value.as_ref().map(|value| format!("&{name}={}", escaped(value))).unwrap_or_default()
            };
            let filters = parameter("state", state)
                + &parameter("delivery", delivery)
                + &parameter("model", model)
                + &parameter("after", after);
            (format!("/jobs?limit={limit}{filters}"), Sent::Get)
        }
        Ask::Predict { model, input, how } => {
            let model =
                model.as_ref().map(|name| format!("?model_name={}", escaped(name))).unwrap_or_default();
            match how {
                How::Now => (format!("/predict_sync{model}"), Sent::Post(input.clone())),
                How::Batch => (format!("/predict_batch{model}"), Sent::Post(input.clone())),
                How::Later => {
                    (format!("/predict_async{model}"), Sent::Post(format!("{{\"message\": {input}}}")))
                }
            }
        }
    }
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
    fn the_socket_is_used_unless_an_address_or_a_key_is_said() {
        let host = |url: Option<&str>, socket: Option<&str>, key: Option<&str>| Host {
            url: url.map(ToOwned::to_owned),
            socket: socket.map(PathBuf::from),
            json: false,
            ca: None,
            key: key.map(ToOwned::to_owned),
        };
        let predict = Ask::Predict { model: None, input: String::new(), how: How::Now };
        let network = |url: &str| Place::Url(url.to_owned());
        let at = |path: &str| Place::Socket(PathBuf::from(path));
        let configured = network("http://127.0.0.1:8000");
        let none: &[(&str, &str)] = &[];
        let both = &[("MODALKIT_SOCKET", "/env.sock"), ("MODALKIT_URL", "http://env/")][..];
        for (what, host, variables, expected) in [
            (&Ask::Config, host(None, None, None), none, at("/var/lib/modalkit/manage.sock")),
            (&predict, host(None, None, None), none, configured.clone()),
            (&Ask::Config, host(None, None, Some("k")), none, configured.clone()),
            (
                &Ask::Config,
                host(None, None, None),
                &[("MODALKIT_SERVER__MANAGEMENT_SOCKET", "")],
                configured.clone(),
            ),
            (&Ask::Config, host(None, None, None), both, at("/env.sock")),
            (&predict, host(None, None, None), both, network("http://env")),
            (&Ask::Config, host(Some("http://said"), None, None), both, network("http://said")),
            (&Ask::Config, host(None, Some("/said.sock"), None), both, at("/said.sock")),
            (&predict, host(None, Some("/said.sock"), None), none, configured.clone()),
        ] {
            let environment =
                variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
            assert_eq!(place(what, &host, &[], &environment).unwrap(), expected, "{what:?} {variables:?}");
        }
    }

    #[test]
    fn a_name_is_one_step_of_a_path() {
        assert_eq!(escaped("my model/é"), "my%20model%2F%C3%A9");
    }
}
