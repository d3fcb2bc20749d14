//! Where a host with this configuration is reached: its address, its scheme, its management socket. Read for programs that ask it, which
//! are told as much of it as can be told: a host that runs is there whatever became of its files since.

use std::{net::SocketAddr, path::PathBuf};

use super::{
    Environment,
    fault::{Fault, Faults},
    files,
    keys::Root,
    layers, resolve_server,
};

/// The keys that say where it is.
const KEYS: [&str; 4] = ["server.listen", "server.tls", "server.management_socket", "server.state_folder"];

/// Where a host is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostPlace {
    /// Where HTTP is served.
    pub listen: SocketAddr,
    /// Whether it is HTTPS.
    pub tls: bool,
    /// The Unix socket for management; `None` for none.
    pub management_socket: Option<PathBuf>,
}

/// Reads where a host is reached, and nothing else: what is wrong elsewhere is left to `check`.
///
/// # Errors
/// A file can't be read, or those keys themselves are wrong.
pub fn host_place(files: &[PathBuf], environment: &Environment) -> Result<HostPlace, Faults> {
    let (mut read, mut faults) = (Vec::new(), Vec::new());
    for path in files {
        match files::read_in_part(path) {
            Ok(file) => read.push(file),
            Err(broken) => faults.extend(broken),
        }
    }
    let mut found = Vec::new();
    let written: Root = layers(&read, environment, &mut found, &mut Vec::new());
    let server = written.server();
    let place = HostPlace {
        listen: server.listen().0,
        tls: server.tls.value().is_some(),
        management_socket: resolve_server::place_of_socket(&server, environment),
    };
    faults.extend(found.into_iter().filter(says_where));
    Faults::or(faults, place)
}

fn says_where(fault: &Fault) -> bool {
    let is_within =
        |key: &str| fault.key.strip_prefix(key).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'));
    fault.key == "server" || KEYS.into_iter().any(is_within)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(text: &str, variables: &[(&str, &str)]) -> Result<HostPlace, Faults> {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("modalkit.toml");
        std::fs::write(&file, text).unwrap();
        let variables = variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        host_place(&[file], &variables.collect())
    }

    #[test]
    fn a_host_is_found_whatever_else_is_wrong_with_its_files() {
        let here = "[server]\nlisten = \"127.0.0.1:9\"\nstate_folder = \"/s\"\n";
        let expected = HostPlace {
            listen: ([127, 0, 0, 1], 9).into(),
            tls: false,
            management_socket: Some("/s/manage.sock".into()),
        };
        for wrong in [
            "",
            "log = 7\nno_such_key = 1\n",
            "[app_settings.auth_config]\nssm_key = \"x\"\napi_key = 7\n",
            "[app_settings.deployment_config]\nsecure = true\n",
            "[app_settings.batch_config]\nwait_ms = 5 ms\n",
            "[model_settings\n",
        ] {
            assert_eq!(place(&format!("{here}{wrong}"), &[]).unwrap(), expected, "{wrong}");
        }
        // Whoever guards an address need not be known to those who ask there.
        let everywhere =
            place("[server]\nlisten = \"0.0.0.0:9\"\nmanagement_socket = \"\"\n[server.tls]\n", &[]).unwrap();
        assert_eq!((everywhere.tls, everywhere.management_socket), (true, None));
        let set = place(here, &[("MODALKIT_SERVER__LISTEN", "127.0.0.1:10"), ("MODALKIT_SERVER__LOG", "7!")]);
        assert_eq!(set.unwrap().listen.port(), 10);
    }

    #[test]
    fn what_says_where_it_is_must_be_right() {
        for wrong in ["[server]\nlisten = 7\n", "server = 7\n", "[server]\nstate_folder = 1\n"] {
            assert!(place(wrong, &[]).is_err(), "{wrong}");
        }
        assert!(host_place(&["/nowhere/modalkit.toml".into()], &Environment::default()).is_err());
    }
}
