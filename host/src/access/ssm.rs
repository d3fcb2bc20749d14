//! Keys from AWS Systems Manager's Parameter Store: one signed request a key. Credentials are found as AWS's own programs find
//! them: environment, web identity, container or instance metadata.

use std::time::Duration;

use object_store::{
    aws::{AmazonS3Builder, AwsAuthorizer, AwsCredential},
    client::{HttpClient, HttpRequestBody},
};
use serde_json::{Value, json};

use crate::config::SsmSpec;

const CONNECT_TIME_MAX: Duration = Duration::from_secs(5);
const RESPONSE_TIME_MAX: Duration = Duration::from_secs(30);

/// Why there is no value.
#[derive(Debug, thiserror::Error)]
pub enum SsmError {
    /// There are no credentials, or the request couldn't be signed or sent.
    #[error("can't ask SSM at {endpoint}")]
    Unreachable {
        /// Where it was looked for.
        endpoint: String,
        /// What happened.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// SSM said no.
    #[error("SSM at {endpoint} answered {status} {kind} for the parameter {parameter}")]
    Refused {
        /// Who answered.
        endpoint: String,
        /// The status.
        status: u16,
        /// AWS's name for the error.
        kind: String,
        /// What was asked for.
        parameter: String,
    },
}

/// Asks for one parameter, decrypted.
///
/// # Errors
/// [`SsmError`].
pub(super) async fn parameter(spec: &SsmSpec, name: &str) -> Result<String, SsmError> {
    let endpoint =
        spec.endpoint.clone().unwrap_or_else(|| format!("https://ssm.{}.amazonaws.com", spec.region));
    let unreachable = |source: Box<dyn std::error::Error + Send + Sync>| SsmError::Unreachable {
        endpoint: endpoint.clone(),
        source,
    };
    let answer = ask(spec, &endpoint, name).await.map_err(unreachable)?;
    let (status, body) = answer;
    let text = body["Parameter"]["Value"].as_str();
    match text.filter(|_| status == 200) {
        Some(text) => Ok(text.strip_suffix('\n').unwrap_or(text).to_owned()),
        None => Err(SsmError::Refused {
            endpoint,
            status,
            // Never the body itself: it may hold what nobody should see.
            kind: body["__type"]
                .as_str()
                .filter(|kind| is_name(kind))
                .unwrap_or("something else than a parameter")
                .to_owned(),
            parameter: name.to_owned(),
        }),
    }
}

/// As AWS names errors; anything else is not for a log.
fn is_name(kind: &str) -> bool {
    kind.len() <= 128 && kind.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".#:/".contains(&byte))
}

async fn ask(
    spec: &SsmSpec,
    endpoint: &str,
    name: &str,
) -> Result<(u16, Value), Box<dyn std::error::Error + Send + Sync>> {
    let credential = credential(&spec.region).await?;
    let body = json!({"Name": name, "WithDecryption": true}).to_string();
    let mut request = http::Request::post(endpoint)
        .header("content-type", "application/x-amz-json-1.1")
        .header("x-amz-target", "AmazonSSM.GetParameter")
        .body(HttpRequestBody::from(body))?;
    AwsAuthorizer::new(&credential, "ssm", &spec.region).try_authorize(&mut request, None)?;
    let mut client = reqwest::Client::builder().connect_timeout(CONNECT_TIME_MAX).timeout(RESPONSE_TIME_MAX);
    if modalkit_queue::is_loopback(endpoint) {
        client = client.no_proxy();
    }
    let client = HttpClient::new(client.build()?);
    let response = client.execute(request).await?;
    let status = response.status().as_u16();
    let bytes = response.into_body().bytes().await?;
    Ok((status, serde_json::from_slice(&bytes).unwrap_or_default()))
}

async fn credential(region: &str) -> object_store::Result<std::sync::Arc<AwsCredential>> {
    // The store is never asked for anything: it knows where credentials come from.
    let store = AmazonS3Builder::from_env().with_region(region).with_bucket_name("none").build()?;
    store.credentials().get_credential().await
}
