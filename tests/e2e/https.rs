//! HTTPS: both protocols, a certificate that changes, and hosts that have none.

use std::{
    fs,
    path::Path,
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use modalkit_tests::{Host, Setup, built, wait_until};
use rcgen::{CertifiedKey, KeyPair};
use serde_json::json;

/// Writes a certificate for this machine that is its own authority.
fn certify(folder: &Path) -> String {
    let CertifiedKey { cert, signing_key } =
        rcgen::generate_simple_self_signed(vec!["127.0.0.1".to_owned()]).unwrap();
    let signing_key: KeyPair = signing_key;
    fs::write(folder.join("key.pem"), signing_key.serialize_pem()).unwrap();
    fs::write(folder.join("certificate.pem"), cert.pem()).unwrap();
    cert.pem()
}

fn start() -> (Host, std::path::PathBuf, String) {
    let setup = Setup::new().plugin("echo");
    let folder = setup.folder();
    let pem = certify(&folder);
    let config = format!(
        "[server.tls]\ncertificate = {:?}\nprivate_key = {:?}\n",
        folder.join("certificate.pem").display().to_string(),
        folder.join("key.pem").display().to_string()
    );
    (setup.config(&config).start(), folder, pem)
}

fn agent(pem: &str) -> ureq::Agent {
    let certificate = ureq::tls::Certificate::from_pem(pem.as_bytes()).unwrap();
    let roots = ureq::tls::RootCerts::Specific(Arc::new(vec![certificate]));
    let tls = ureq::tls::TlsConfig::builder().root_certs(roots).build();
    ureq::Agent::config_builder().tls_config(tls).http_status_as_error(false).build().into()
}

fn predict(host: &Host, pem: &str) -> Result<String, ureq::Error> {
    let url = format!("https://{}/predict_sync?model_name=echo", host.address);
    agent(pem).post(url).send(json!({"text": "a"}).to_string())?.body_mut().read_to_string()
}

#[test]
fn a_new_certificate_is_in_force_without_a_restart() {
    let (host, folder, first) = start();
    assert_eq!(host.log_line("listening")["url"], format!("https://{}", host.address));
    wait_until("it serves", || predict(&host, &first).is_ok_and(|body| body.contains("\"A\"")));
    let second = certify(&folder);
    wait_until("the new certificate is in force", || predict(&host, &second).is_ok());
    assert!(predict(&host, &first).is_err(), "the one before is not");
    // What is no certificate leaves the one that is.
    fs::write(folder.join("certificate.pem"), "nothing\n").unwrap();
    let _ = host.log_line("the certificate stays as it was");
    assert!(predict(&host, &second).is_ok());
    // Who speaks no TLS gets no answer, and harms nobody.
    let plain: ureq::Agent = ureq::Agent::config_builder().build().into();
    assert!(plain.get(format!("http://{}/livez", host.address)).call().is_err());
    assert!(predict(&host, &second).is_ok());
    // The command line asks it too.
    fs::write(folder.join("authority.pem"), &second).unwrap();
    let output = Command::new(built().join("modalkit"))
        .args([
            "predict",
            "echo",
            "--input",
            "{\"text\": \"a\"}",
            "--url",
            &format!("https://{}", host.address),
        ])
        .env("MODALKIT_CA", folder.join("authority.pem"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stdout).contains("\"translated_text\": \"A\""), "{output:?}");
}

#[test]
fn a_chain_that_is_cut_between_two_certificates_must_hold_still_for_longer() {
    let (host, folder, first) = start();
    // With another one behind it, as one of an authority would be.
    let chain =
        first.clone() + &rcgen::generate_simple_self_signed(vec!["authority".to_owned()]).unwrap().cert.pem();
    fs::write(folder.join("certificate.pem"), &chain).unwrap();
    assert_eq!(host.log_line("a new certificate is in force")["level"], "INFO");
    let in_force =
        || host.log().iter().filter(|line| line["message"] == "a new certificate is in force").count();
    let written = Instant::now();
    fs::write(folder.join("certificate.pem"), &first).unwrap();
    wait_until("it has held still", || in_force() == 2);
    assert!(written.elapsed() > Duration::from_secs(9), "{:?}", written.elapsed());
}

#[test]
fn both_protocols_are_spoken_over_tls() {
    let (host, _folder, pem) = start();
    wait_until("it serves", || predict(&host, &pem).is_ok_and(|body| body.contains("\"A\"")));
    // Another test may have been first.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let url = format!("https://{}/predict_sync", host.address);
    let ask = |client: reqwest::blocking::ClientBuilder| {
        let authority = reqwest::Certificate::from_pem(pem.as_bytes()).unwrap();
        let client = client.tls_certs_only([authority]).build().unwrap();
        let answer = client.post(&url).body(json!({"text": "a"}).to_string()).send().unwrap();
        (answer.version(), answer.text().unwrap())
    };
    let builder = reqwest::blocking::Client::builder;
    let (version, body) = ask(builder().http1_only());
    assert!(version == reqwest::Version::HTTP_11 && body.contains("\"A\""), "{version:?} {body}");
    let (version, body) = ask(builder());
    assert!(version == reqwest::Version::HTTP_2 && body.contains("\"A\""), "{version:?} {body}");
}

#[test]
fn a_certificate_that_cannot_be_used_ends_the_start() {
    let (status, said) = Setup::new()
        .config(
            "[server.tls]\ncertificate = \"/nowhere/certificate.pem\"\nprivate_key = \"/nowhere/key.pem\"\n",
        )
        .refuses_to_start();
    assert_eq!(status.code(), Some(1));
    assert!(said.contains("can't read /nowhere/certificate.pem"), "{said}");
}
