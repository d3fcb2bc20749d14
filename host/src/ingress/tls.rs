//! HTTPS: the certificate, read from its files and again when these change. It never knows what is asked.

use std::{fmt, fs, io, path::PathBuf, sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use rustls::{
    ServerConfig,
    crypto::CryptoProvider,
    pki_types::{
        CertificateDer, PrivateKeyDer,
        pem::{self, PemObject},
    },
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use tokio::{task::JoinError, time::timeout};
use tokio_rustls::TlsAcceptor;

use crate::{
    config::{CUT_STILL_TIME, Looks, TlsFiles, looks_cut},
    transient::{Outage, is_transient},
};

/// How often the files are looked at. A change counts when two looks in a row have seen the same: certificate and key are two
/// files, and nobody writes both at once. Where one looks cut short, all looks for [`CUT_STILL_TIME`] must have: a chain that is cut
/// between two certificates is a chain as well.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// How long reading both may take until that is told. It is waited for all the same: on a mount that hangs, no second read begins.
const READ_TIME_MAX: Duration = Duration::from_secs(10);

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file can't be read.
    #[error("can't read {}", path.display())]
    Unreadable {
        /// Which.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A file holds something else.
    #[error("expected {expected} in {}", path.display())]
    Malformed {
        /// Which.
        path: PathBuf,
        /// What belongs there.
        expected: &'static str,
        /// What was found.
        #[source]
        source: pem::Error,
    },
    /// They don't fit together, or this program can't use them.
    #[error("the certificate in {} and the key in {} can't be used together", certificate.display(), private_key.display())]
    Unfit {
        /// The certificate's file.
        certificate: PathBuf,
        /// The key's file.
        private_key: PathBuf,
        /// Why.
        #[source]
        source: rustls::Error,
    },
}

/// The certificate in force.
pub struct Certificate {
    files: TlsFiles,
    provider: Arc<CryptoProvider>,
    now: ArcSwap<CertifiedKey>,
    /// What the files held just before they were first read.
    first: [Vec<u8>; 2],
}

impl Certificate {
    /// Reads it.
    ///
    /// # Errors
    /// [`TlsError`].
    pub fn read(files: TlsFiles) -> Result<Arc<Self>, TlsError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let first = contents(&files)?;
        let now = ArcSwap::from_pointee(read(&files, &provider)?);
        Ok(Arc::new(Self { files, provider, now, first }))
    }

    /// Accepts TLS connections with it.
    ///
    /// # Panics
    /// Where the provider doesn't know the versions of TLS that it was made for.
    #[must_use]
    pub fn acceptor(self: &Arc<Self>) -> TlsAcceptor {
        let mut config = ServerConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_safe_default_protocol_versions()
            .expect("ring knows TLS 1.2 and 1.3")
            .with_no_client_auth()
            .with_cert_resolver(Arc::clone(self) as Arc<dyn ResolvesServerCert>);
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        TlsAcceptor::from(Arc::new(config))
    }

    /// Reads it again when its files change, until it is dropped. One that can't be used leaves the one before in force.
    pub async fn follow(self: Arc<Self>) -> std::convert::Infallible {
        let mut outage = Outage::new("the certificate");
        let mut in_force = self.first.clone();
        let mut known = Some(in_force.clone());
        let mut seen = Looks::new(in_force.clone());
        loop {
            tokio::time::sleep(LOOK_INTERVAL).await;
            let found = match self.look(&mut outage).await {
                Ok(found) => found,
                Err(error) => {
                    outage.note(Some(&chain(error)));
                    continue;
                }
            };
            let Some(still) = seen.note(found) else { continue };
            let found = seen.seen();
            let is_cut = found.iter().zip(&in_force).any(|(now, before)| looks_cut(now, before));
            if known.as_ref() == Some(found) {
                outage.note(None);
                continue;
            }
            if is_cut && still < CUT_STILL_TIME {
                continue;
            }
            known = Some(found.clone());
            match self.off_the_loop(&mut outage, |this| read(&this.files, &this.provider)).await {
                Ok(certificate) => {
                    outage.note(None);
                    self.now.store(Arc::new(certificate));
                    in_force.clone_from(found);
                    tracing::info!(file = %self.files.certificate.display(), "a new certificate is in force");
                }
                Err(error) if error.is_transient() => {
                    known = None;
                    outage.note(Some(&chain(error)));
                }
                Err(error) => {
                    outage.note(None);
                    tracing::error!(error = chain(error), "the certificate stays as it was");
                }
            }
        }
    }

    async fn look(self: &Arc<Self>, outage: &mut Outage) -> Result<[Vec<u8>; 2], TlsError> {
        self.off_the_loop(outage, |this| contents(&this.files)).await
    }

    /// Reads on another thread, for as long as that takes: the task that waits for it also waits for signals.
    async fn off_the_loop<T: Send + 'static>(
        self: &Arc<Self>,
        outage: &mut Outage,
        read: impl FnOnce(&Self) -> T + Send + 'static,
    ) -> T {
        let this = Arc::clone(self);
        let mut reading = tokio::task::spawn_blocking(move || read(&this));
        let done = match timeout(READ_TIME_MAX, &mut reading).await {
            Ok(done) => done,
            Err(_) => {
                outage.note(Some(&format!("its files were not read within {READ_TIME_MAX:?}")));
                reading.await
            }
        };
        match done.map_err(JoinError::try_into_panic) {
            Ok(read) => read,
            Err(Ok(panic)) => std::panic::resume_unwind(panic),
            // The runtime ends, and this task with it.
            Err(Err(_)) => std::future::pending().await,
        }
    }
}

impl TlsError {
    /// Whether the same files may be read on another try.
    fn is_transient(&self) -> bool {
        matches!(self, Self::Unreadable { source, .. } if is_transient(source))
    }
}

fn chain(error: TlsError) -> String {
    format!("{:#}", anyhow::Error::new(error))
}

impl fmt::Debug for Certificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Certificate").field("files", &self.files).finish_non_exhaustive()
    }
}

impl ResolvesServerCert for Certificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.now.load_full())
    }
}

/// What the files hold; nothing where they can't be read, and an error where one can't be now, for a reason that may pass.
fn contents(files: &TlsFiles) -> Result<[Vec<u8>; 2], TlsError> {
    let read = |path: &PathBuf| match fs::read(path) {
        Err(source) if is_transient(&source) => Err(TlsError::Unreadable { path: path.clone(), source }),
        read => Ok(read.unwrap_or_default()),
    };
    Ok([read(&files.certificate)?, read(&files.private_key)?])
}

fn read(files: &TlsFiles, provider: &CryptoProvider) -> Result<CertifiedKey, TlsError> {
    let contents =
        |path: &PathBuf| fs::read(path).map_err(|source| TlsError::Unreadable { path: path.clone(), source });
    let chain = CertificateDer::pem_slice_iter(&contents(&files.certificate)?)
        .collect::<Result<Vec<_>, _>>()
        .and_then(|chain| if chain.is_empty() { Err(pem::Error::NoItemsFound) } else { Ok(chain) })
        .map_err(|source| TlsError::Malformed {
            path: files.certificate.clone(),
            expected: "certificates in PEM",
            source,
        })?;
    let key = PrivateKeyDer::from_pem_slice(&contents(&files.private_key)?).map_err(|source| {
        TlsError::Malformed { path: files.private_key.clone(), expected: "a private key in PEM", source }
    })?;
    CertifiedKey::from_der(chain, key, provider).map_err(|source| TlsError::Unfit {
        certificate: files.certificate.clone(),
        private_key: files.private_key.clone(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use futures_util::FutureExt;
    use rustix::fs::{CWD, FileType, Mode, mknodat};
    use rustls::{
        SignatureAlgorithm, SignatureScheme,
        sign::{Signer, SigningKey},
    };

    use super::*;

    /// Where there is no acceptor.
    #[derive(Debug)]
    struct NoKey;

    impl SigningKey for NoKey {
        fn choose_scheme(&self, _: &[SignatureScheme]) -> Option<Box<dyn Signer>> {
            None
        }

        fn algorithm(&self) -> SignatureAlgorithm {
            SignatureAlgorithm::ED25519
        }
    }

    #[test]
    fn a_read_that_hangs_stops_no_other_task() {
        let folder = tempfile::tempdir().unwrap();
        let [certificate, private_key] = ["certificate", "key"].map(|name| folder.path().join(name));
        fs::write(&certificate, "").unwrap();
        // Opening a pipe takes until somebody opens its other end.
        mknodat(CWD, &private_key, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        let certificate = Arc::new(Certificate {
            files: TlsFiles { certificate, private_key },
            provider: Arc::new(rustls::crypto::ring::default_provider()),
            now: ArcSwap::from_pointee(CertifiedKey::new(Vec::new(), Arc::new(NoKey))),
            first: Default::default(),
        });
        let (done, is_done) = mpsc::sync_channel(1);
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
            let mut outage = Outage::new("the certificate");
            let read = runtime.block_on(async { certificate.look(&mut outage).now_or_never() });
            runtime.shutdown_background();
            done.send(read.is_some()).unwrap();
        });
        let is_read = is_done.recv_timeout(READ_TIME_MAX).expect("the task's thread waits for the file");
        assert!(!is_read, "it goes on with the certificate as it is");
    }
}
