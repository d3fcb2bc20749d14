//! The management socket: a Unix socket over which this host's own user, and root, look at the host and change it without a key. It owns
//! the socket's file and a thread of its own, so that it answers whatever callers and plugins do on others. It speaks HTTP/1.1, and
//! never runs plugin code: predictions are asked for over the network.

use std::{
    convert::Infallible,
    fs, io,
    os::unix::{
        fs::{FileTypeExt, MetadataExt, PermissionsExt},
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    process,
    sync::Arc,
    thread,
    time::Duration,
};

use http_body_util::{BodyExt, Full, Limited};
use hyper::{Request, Response, StatusCode, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::GracefulShutdown,
};
use rustix::process::geteuid;
use serde_json::json;
use tokio::{
    sync::{Semaphore, oneshot},
    time::{sleep, timeout},
};

use super::{
    Context,
    body::SmallBody,
    endpoints::Target,
    request_headers::{Known, put_headers},
    router::{self, takes_for_get},
};
use crate::{
    access::Origin,
    audit::{Action, Effect},
    egress::{HttpResponse, and_close, object_response, without_body},
    unix_path::ShortPath,
};

/// Open connections; further ones wait in the kernel's backlog.
const CONNECTIONS_MAX: usize = 64;
/// Bytes of a request's body: more than any that says something.
const BODY_BYTES_MAX: usize = 1 << 20;
/// After a failed `accept`, the wait until the next.
const ACCEPT_RETRY: Duration = Duration::from_millis(50);
/// How long answers that are being written get at the end.
const WRITE_TIME_MAX: Duration = Duration::from_secs(2);
/// Who else than this host's user may connect.
const ROOT: u32 = 0;

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Another host answers there.
    #[error("another host's management socket is at {}; say another path with server.management_socket", .0.display())]
    InUse(PathBuf),
    /// Something else is there.
    #[error("expected a socket or nothing at {}, found another file; say another path with server.management_socket", .0.display())]
    NoSocket(PathBuf),
    /// The system refuses it.
    #[error(
        "can't make the management socket {}; say another path with server.management_socket, or \"\" for none",
        path.display()
    )]
    Refused {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// An open socket that nobody answers yet.
pub struct ManagementSocket {
    listener: UnixListener,
    file: File,
}

/// The socket's file: it goes when this is dropped, unless it has become another's.
struct File {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl Drop for File {
    fn drop(&mut self) {
        let same = |found: fs::Metadata| (found.dev(), found.ino()) == (self.device, self.inode);
        if fs::symlink_metadata(&self.path).is_ok_and(same) {
            // It may be gone by now.
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl ManagementSocket {
    /// Makes it, with mode 0600 from its first moment under this name. The file of a host that is gone is replaced.
    ///
    /// # Errors
    /// [`SocketError`].
    pub fn bind(path: &Path) -> Result<Self, SocketError> {
        let refused = |source| SocketError::Refused { path: path.to_owned(), source };
        match fs::symlink_metadata(path) {
            Ok(found) if !found.file_type().is_socket() => {
                return Err(SocketError::NoSocket(path.to_owned()));
            }
            Ok(_) => {
                let connected = ShortPath::of(path).and_then(UnixStream::connect);
                if connected.is_ok() {
                    return Err(SocketError::InUse(path.to_owned()));
                }
            }
            Err(_) => {}
        }
        let mut name = std::ffi::OsString::from(".");
        name.push(path.file_name().unwrap_or_default());
        name.push(format!(".{}", process::id()));
        let unready = path.with_file_name(name);
        // Another process with this number may have left it.
        let _ = fs::remove_file(&unready);
        let listener = ShortPath::of(&unready).and_then(UnixListener::bind).map_err(refused)?;
        let published = publish(&listener, &unready, path).inspect_err(|_| drop(fs::remove_file(&unready)));
        Ok(Self { listener, file: published.map_err(refused)? })
    }

    /// Answers on a thread of its own; `url` is where predictions are asked for.
    ///
    /// # Errors
    /// The system gives no more threads.
    pub fn serve(self, context: Arc<Context>, url: String) -> io::Result<Serving> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (stop, stopped) = oneshot::channel::<()>();
        let (tell_end, ended) = oneshot::channel::<()>();
        let listener = self.listener;
        thread::Builder::new().name("management".to_owned()).spawn(move || {
            runtime.block_on(async {
                match tokio::net::UnixListener::from_std(listener) {
                    Ok(listener) => accept(listener, context, url.into(), stopped).await,
                    Err(error) => tracing::error!(%error, "the management socket can't be used"),
                }
            });
            runtime.shutdown_background();
            // Whoever waits may have left.
            let _ = tell_end.send(());
        })?;
        Ok(Serving { file: self.file, stop, ended })
    }
}

fn publish(listener: &UnixListener, unready: &Path, path: &Path) -> io::Result<File> {
    listener.set_nonblocking(true)?;
    fs::set_permissions(unready, fs::Permissions::from_mode(0o600))?;
    let made = fs::symlink_metadata(unready)?;
    fs::rename(unready, path)?;
    Ok(File { path: path.to_owned(), device: made.dev(), inode: made.ino() })
}

/// A socket that is answered. Dropped, it ends with all of its connections.
pub struct Serving {
    file: File,
    stop: oneshot::Sender<()>,
    ended: oneshot::Receiver<()>,
}

impl Serving {
    /// Takes the file away, and lets connections end with the request they are in.
    pub async fn stop(self) {
        drop(self.file);
        drop(self.stop);
        // The thread ends by itself within half of this, unless something holds it.
        let _ = timeout(2 * WRITE_TIME_MAX, self.ended).await;
    }
}

async fn accept(
    listener: tokio::net::UnixListener,
    context: Arc<Context>,
    url: Arc<str>,
    mut stopped: oneshot::Receiver<()>,
) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let connections = GracefulShutdown::new();
    loop {
        let next = async {
            let place = Arc::clone(&places).acquire_owned().await.expect("the semaphore is never closed");
            (place, listener.accept().await)
        };
        let (place, accepted) = tokio::select! {
            next = next => next,
            _ = &mut stopped => break,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "can't accept a connection of the management socket");
                sleep(ACCEPT_RETRY).await;
                continue;
            }
        };
        let Some(from) = admitted(&context, &stream) else { continue };
        let (context, url) = (Arc::clone(&context), Arc::clone(&url));
        let header_timeout = context.server.header_timeout;
        let service = service_fn(move |request| {
            let (context, url) = (Arc::clone(&context), Arc::clone(&url));
            async move {
                let answer = answer(&context, &from, request, &url).await;
                // Nothing that is answered here is a stream.
                Ok::<_, Infallible>(
                    answer.map(|body| Full::new(body.whole().unwrap_or_default().into_bytes())),
                )
            }
        });
        let mut protocol = http1::Builder::new();
        protocol.timer(TokioTimer::new()).header_read_timeout(header_timeout);
        let connection = connections.watch(protocol.serve_connection(TokioIo::new(stream), service));
        tokio::spawn(async move {
            let _place = place;
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection of the management socket ended early");
            }
        });
    }
    drop(listener);
    // Slow readers have had their time.
    let _ = timeout(WRITE_TIME_MAX, connections.shutdown()).await;
}

/// Who has connected, if it may. The file's mode says the same, but for a moment under another name.
fn admitted(context: &Context, stream: &tokio::net::UnixStream) -> Option<Origin> {
    let uid = match stream.peer_cred() {
        Ok(peer) => peer.uid(),
        Err(error) => {
            tracing::warn!(%error, "can't tell who connects to the management socket");
            return None;
        }
    };
    let from = Origin::Socket { uid };
    if may_connect(uid, geteuid().as_raw()) {
        return Some(from);
    }
    let action = Action { method: "", endpoint: "the management socket", name: "", effect: Effect::Look };
    context.audit.refused(action, None, &from, StatusCode::FORBIDDEN.as_u16());
    None
}

fn may_connect(uid: u32, own: u32) -> bool {
    uid == ROOT || uid == own
}

async fn answer(context: &Context, from: &Origin, request: Request<Incoming>, url: &str) -> HttpResponse {
    let (mut head, body) = request.into_parts();
    let asks_for_head = takes_for_get(&mut head);
    let id = context.ids.of(&Known::of(&head.headers));
    // Few say anything in it; but a connection that closes over unread bytes is reset.
    let read = timeout(context.server.body_timeout, Limited::new(body, BODY_BYTES_MAX).collect());
    let is_prediction =
        Target::of(head.uri.path()).is_some_and(|target| target.route().prediction().is_some());
    let mut response: Response<_> = match read.await {
        Ok(Ok(_)) if is_prediction => {
            let detail =
                format!("expected a request for the host itself: predictions are asked for at {url}");
            object_response(StatusCode::MISDIRECTED_REQUEST, &json!({"detail": detail}))
        }
        Ok(Ok(body)) => {
            router::beside_predictions(context, from, SmallBody::Read(body.to_bytes()), &head).await
        }
        _ => {
            let detail = format!(
                "expected no body, or one of at most {BODY_BYTES_MAX} bytes within {:?}",
                context.server.body_timeout
            );
            and_close(object_response(StatusCode::BAD_REQUEST, &json!({"detail": detail})))
        }
    };
    put_headers(&mut response, &id, head.headers);
    if asks_for_head { without_body(response) } else { response }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_users_may_not_connect_whatever_the_files_mode_says() {
        assert!(may_connect(1000, 1000) && may_connect(0, 1000));
        assert!(!may_connect(1001, 1000) && !may_connect(1000, 0));
    }

    #[test]
    fn the_socket_is_its_owners_and_replaces_only_what_is_dead() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("manage.sock");
        let first = ManagementSocket::bind(&path).unwrap();
        let found = fs::symlink_metadata(&path).unwrap();
        assert_eq!((found.mode() & 0o7777, found.uid()), (0o600, geteuid().as_raw()));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing else is left there");
        assert!(matches!(ManagementSocket::bind(&path), Err(SocketError::InUse(_))));
        // As after `kill -9`: the file is there, and nobody listens.
        let ManagementSocket { listener, file } = first;
        drop(listener);
        let second = ManagementSocket::bind(&path).unwrap();
        drop(file);
        assert!(path.exists(), "the file is another's by now");
        drop(second);
        assert!(!path.exists());
        fs::write(&path, "a file").unwrap();
        assert!(matches!(ManagementSocket::bind(&path), Err(SocketError::NoSocket(_))));
        let nowhere = ManagementSocket::bind(&folder.path().join("nowhere/manage.sock"));
        assert!(matches!(nowhere, Err(SocketError::Refused { .. })));
    }
}
