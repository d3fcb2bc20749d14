//! From a specification and credentials to a store that can be asked. It asks nothing itself.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU16, Ordering},
    },
    time::Duration,
};

use object_store::{
    BackoffConfig, ClientOptions, ObjectStore, RetryConfig,
    aws::{AmazonS3Builder, AmazonS3ConfigKey},
    azure::{AzureConfigKey, MicrosoftAzureBuilder},
    client::{HttpClient, HttpConnector, HttpError, HttpRequest, HttpResponse, HttpService},
    gcp::{GoogleCloudStorageBuilder, GoogleConfigKey},
};

use crate::{
    error::MirrorError,
    spec::{BucketSpec, Provider, Secret},
};

const CONNECT_TIME_MAX: Duration = Duration::from_secs(5);
/// How long a store may be silent, in an answer's middle too.
const SILENCE_TIME_MAX: Duration = Duration::from_secs(30);
/// Tries of one request beside the first, within this time; the next listing is a further one.
const RETRIES_MAX: usize = 2;
const RETRY_TIME_MAX: Duration = Duration::from_secs(30);

/// Access keys of Google's that speak S3.
const HMAC: [&str; 2] = ["GOOGLE_ACCESS_KEY_ID", "GOOGLE_ACCESS_KEY_SECRET"];
/// A service account's key file in JSON, by the names under which people have it.
const SERVICE_ACCOUNT: [&str; 3] =
    ["SERVICE_ACCOUNT_JSON", "GOOGLE_SERVICE_ACCOUNT_KEY", "GOOGLE_SERVICE_ACCOUNT_JSON"];
const GOOGLES_S3: &str = "https://storage.googleapis.com";
/// Where stores have no regions, as R2.
const ANY_REGION: &str = "auto";

/// A store that can be asked.
#[derive(Clone)]
pub(crate) struct Store {
    pub(crate) objects: Arc<dyn ObjectStore>,
    /// The credentials that it was opened with.
    pub(crate) secret: Secret,
    /// The status of the last answer.
    status: LastStatus,
}

/// The status of the last answer: a failed listing's error names none.
type LastStatus = Arc<AtomicU16>;

impl Store {
    /// A store with these credentials.
    pub(crate) fn open(spec: &BucketSpec, secret: Secret) -> Result<Self, MirrorError> {
        let status = LastStatus::default();
        let objects = open(spec, &secret, Connector::new(spec, &status))?;
        Ok(Self { objects, secret, status })
    }

    /// One that is there already.
    #[cfg(test)]
    pub(crate) fn of(objects: Arc<dyn ObjectStore>) -> Self {
        Self { objects, secret: Secret::default(), status: LastStatus::default() }
    }

    /// What a request failed of.
    pub(crate) fn error(&self, error: &object_store::Error) -> MirrorError {
        MirrorError::of_store(error, &self.secret)
    }

    /// What a listing failed of.
    pub(crate) fn listing_error(&self, error: &object_store::Error) -> MirrorError {
        match (self.error(error), self.status.load(Ordering::Relaxed)) {
            (MirrorError::Store(said), 401 | 403) => MirrorError::Refused(said),
            (MirrorError::Store(said), 404) => MirrorError::NoBucket(said),
            (other, _) => other,
        }
    }
}

fn open(
    spec: &BucketSpec,
    secret: &Secret,
    connector: Connector,
) -> Result<Arc<dyn ObjectStore>, MirrorError> {
    let provider = provider(spec, secret);
    let only_s3 = |key: &str| {
        let found = format!("it for {provider}");
        Err(MirrorError::Setup(format!(
            "expected {key} for a bucket of S3 alone, found {found}; leave it out"
        )))
    };
    match provider {
        Provider::S3 => s3(spec, secret, connector),
        _ if spec.requester_pays => only_s3("requester_pays"),
        _ if spec.role.is_some() => only_s3("oidc_auth_role_arn"),
        Provider::Gcs => gcs(spec, secret, connector),
        Provider::Azure => azure(spec, secret, connector),
    }
    .map_err(|error| match error {
        MirrorError::Setup(said) => MirrorError::Setup(secret.hide_in(said)),
        other => other,
    })
}

/// What a store speaks: as the specification names it, else as its address and the names in the secret tell.
fn provider(spec: &BucketSpec, secret: &Secret) -> Provider {
    let at = |host: &str| spec.endpoint.as_ref().is_some_and(|endpoint| endpoint.contains(host));
    match spec.provider {
        Some(provider) => provider,
        None if secret.any_of(&HMAC).is_some() => Provider::S3,
        None if at(".blob.core.windows.net")
            || secret.0.keys().any(|key| key.starts_with("AZURE_STORAGE_")) =>
        {
            Provider::Azure
        }
        None if at("storage.googleapis.com") || secret.any_of(&SERVICE_ACCOUNT).is_some() => Provider::Gcs,
        None => Provider::S3,
    }
}

fn s3(spec: &BucketSpec, secret: &Secret, connector: Connector) -> Result<Arc<dyn ObjectStore>, MirrorError> {
    let mut builder = AmazonS3Builder::new();
    for (name, value) in &secret.0 {
        if let Some(Ok(key)) =
            name.starts_with("AWS_").then(|| name.to_ascii_lowercase().parse::<AmazonS3ConfigKey>())
        {
            builder = builder.with_config(key, value);
        }
    }
    if let [Some(id), Some(key)] = HMAC.map(|name| secret.any_of(&[name])) {
        builder = builder.with_access_key_id(id).with_secret_access_key(key).with_endpoint(GOOGLES_S3);
        builder = builder.with_region(ANY_REGION);
    }
    if secret.any_of(&["AWS_REGION", "AWS_DEFAULT_REGION"]).is_none() {
        let is_elsewhere = spec.endpoint.as_ref().is_some_and(|endpoint| !endpoint.contains("amazonaws.com"));
        match &spec.region {
            Some(region) if !is_elsewhere => builder = builder.with_region(region),
            _ if is_elsewhere => builder = builder.with_region(ANY_REGION),
            _ => {}
        }
    }
    if let Some(endpoint) = &spec.endpoint {
        builder = builder.with_endpoint(endpoint.trim_end_matches('/'));
    }
    if let Some(role) = &spec.role {
        if secret.any_of(&["AWS_WEB_IDENTITY_TOKEN_FILE"]).is_none() {
            return Err(MirrorError::Setup(
                "expected AWS_WEB_IDENTITY_TOKEN_FILE in the environment, the file with the token that oidc_auth_role_arn is asked for with; found none"
                    .to_owned(),
            ));
        }
        builder = builder.with_config(AmazonS3ConfigKey::RoleArn, role);
    }
    let endpoints = [spec.endpoint.as_deref(), secret.any_of(&["AWS_ENDPOINT_URL_STS"])];
    builder
        .with_bucket_name(&spec.bucket)
        .with_request_payer(spec.requester_pays)
        .with_allow_http(endpoints.into_iter().flatten().any(is_plain))
        .with_retry(retry())
        .with_http_connector(connector)
        .build()
        .map(|store| Arc::new(store) as _)
        .map_err(setup)
}

fn gcs(
    spec: &BucketSpec,
    secret: &Secret,
    connector: Connector,
) -> Result<Arc<dyn ObjectStore>, MirrorError> {
    let mut builder = GoogleCloudStorageBuilder::new();
    for (name, value) in &secret.0 {
        if let Some(Ok(key)) =
            name.starts_with("GOOGLE_").then(|| name.to_ascii_lowercase().parse::<GoogleConfigKey>())
        {
            builder = builder.with_config(key, value);
        }
    }
    let account = secret.any_of(&SERVICE_ACCOUNT).map(str::to_owned);
    let account = match &spec.endpoint {
        Some(endpoint) => Some(at_endpoint(account.as_deref(), endpoint)?),
        None => account,
    };
    if let Some(account) = account {
        builder = builder.with_service_account_key(account);
    }
    builder
        .with_bucket_name(&spec.bucket)
        .with_client_options(
            ClientOptions::new().with_allow_http(spec.endpoint.as_deref().is_some_and(is_plain)),
        )
        .with_retry(retry())
        .with_http_connector(connector)
        .build()
        .map(|store| Arc::new(store) as _)
        .map_err(setup)
}

/// A service account that asks at another address: the client takes that from the account's own file. Without an account it asks nobody for a
/// token; the client would look for one at the cloud's metadata server.
fn at_endpoint(account: Option<&str>, endpoint: &str) -> Result<String, MirrorError> {
    let mut document = match account {
        Some(account) => serde_json::from_str(account).map_err(|_| {
            MirrorError::Setup(
                "expected a service account's key file in JSON, found something else".to_owned(),
            )
        })?,
        None => {
            serde_json::json!({"disable_oauth": true, "client_email": "", "private_key": "", "private_key_id": ""})
        }
    };
    let base = endpoint.trim_end_matches('/');
    match document.as_object_mut() {
        Some(members) => members.entry("gcs_base_url").or_insert_with(|| base.into()),
        None => {
            return Err(MirrorError::Setup(
                "expected a service account's key file, found other JSON".to_owned(),
            ));
        }
    };
    Ok(document.to_string())
}

fn azure(
    spec: &BucketSpec,
    secret: &Secret,
    connector: Connector,
) -> Result<Arc<dyn ObjectStore>, MirrorError> {
    let mut builder = MicrosoftAzureBuilder::new();
    for (name, value) in &secret.0 {
        if let Some(Ok(key)) =
            name.starts_with("AZURE_").then(|| name.to_ascii_lowercase().parse::<AzureConfigKey>())
        {
            builder = builder.with_config(key, value);
        }
    }
    if let Some(endpoint) = &spec.endpoint {
        builder = builder.with_endpoint(endpoint.trim_end_matches('/').to_owned());
    }
    builder
        .with_container_name(&spec.bucket)
        .with_allow_http(spec.endpoint.as_deref().is_some_and(is_plain))
        .with_retry(retry())
        .with_http_connector(connector)
        .build()
        .map(|store| Arc::new(store) as _)
        .map_err(setup)
}

fn setup(error: object_store::Error) -> MirrorError {
    let said = error.to_string();
    MirrorError::Setup(format!("the bucket's settings don't fit: {said}"))
}

fn is_plain(endpoint: &str) -> bool {
    endpoint.starts_with("http://")
}

fn retry() -> RetryConfig {
    let backoff = BackoffConfig {
        init_backoff: Duration::from_millis(100),
        max_backoff: Duration::from_secs(2),
        base: 2.0,
    };
    RetryConfig { backoff, max_retries: RETRIES_MAX, retry_timeout: RETRY_TIME_MAX }
}

/// Makes the client that a store asks with: large objects may take as long as they come, and what goes to this machine asks no proxy.
#[derive(Debug)]
struct Connector {
    loopback: bool,
    status: LastStatus,
}

impl Connector {
    fn new(spec: &BucketSpec, status: &LastStatus) -> Self {
        let host = |endpoint: &str| {
            let rest = endpoint.split_once("://").map_or(endpoint, |(_, rest)| rest);
            let host = rest.split('/').next().unwrap_or_default();
            host.starts_with("127.") || host.starts_with("localhost") || host.starts_with("[::1]")
        };
        Self { loopback: spec.endpoint.as_deref().is_some_and(host), status: Arc::clone(status) }
    }
}

impl HttpConnector for Connector {
    fn connect(&self, _: &ClientOptions) -> object_store::Result<HttpClient> {
        let mut client =
            reqwest::Client::builder().connect_timeout(CONNECT_TIME_MAX).read_timeout(SILENCE_TIME_MAX);
        if self.loopback {
            client = client.no_proxy();
        }
        let client = client.build();
        let failed =
            |source: reqwest::Error| object_store::Error::Generic { store: "HTTP", source: Box::new(source) };
        client
            .map(|client| HttpClient::new(Client { client, status: Arc::clone(&self.status) }))
            .map_err(failed)
    }
}

/// Notes the status of each answer.
#[derive(Debug)]
struct Client {
    client: reqwest::Client,
    status: LastStatus,
}

#[async_trait::async_trait]
impl HttpService for Client {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        self.status.store(0, Ordering::Relaxed);
        let answer = self.client.call(request).await?;
        self.status.store(answer.status().as_u16(), Ordering::Relaxed);
        Ok(answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(provider: Option<Provider>, endpoint: Option<&str>) -> BucketSpec {
        BucketSpec {
            name: "weights".into(),
            provider,
            bucket: "demo".into(),
            endpoint: endpoint.map(Into::into),
            region: None,
            prefix: String::new(),
            role: None,
            read_only: true,
            requester_pays: false,
            mount_point: "/mnt/weights".into(),
            folder: "/var/lib/weights".into(),
            poll_interval: Duration::from_secs(60),
            settle: Duration::from_secs(2),
            settle_timeout: Duration::from_secs(10),
            bytes_max: None,
        }
    }

    fn secret(names: &[&str]) -> Secret {
        Secret(names.iter().map(|name| ((*name).to_owned(), "x".to_owned())).collect())
    }

    #[test]
    fn the_address_and_the_secret_say_which_store_it_is() {
        for (endpoint, names, expected) in [
            (None, vec!["AWS_ACCESS_KEY_ID"], Provider::S3),
            (Some("https://1234.r2.cloudflarestorage.com"), vec!["AWS_ACCESS_KEY_ID"], Provider::S3),
            (Some("https://storage.googleapis.com"), vec![HMAC[0], HMAC[1]], Provider::S3),
            (Some("https://storage.googleapis.com"), vec![], Provider::Gcs),
            (None, vec!["SERVICE_ACCOUNT_JSON"], Provider::Gcs),
            (None, vec!["AZURE_STORAGE_ACCOUNT_NAME"], Provider::Azure),
            (Some("https://demo.blob.core.windows.net"), vec![], Provider::Azure),
        ] {
            assert_eq!(provider(&spec(None, endpoint), &secret(&names)), expected, "{endpoint:?} {names:?}");
        }
        assert_eq!(provider(&spec(Some(Provider::Gcs), None), &secret(&["AWS_REGION"])), Provider::Gcs);
    }

    #[test]
    fn what_a_store_does_not_know_is_refused_and_not_passed_over() {
        let mut paying = spec(Some(Provider::Gcs), None);
        paying.requester_pays = true;
        let said =
            Store::open(&paying, Secret::default()).err().map(|error| error.to_string()).unwrap_or_default();
        assert!(said.contains("requester_pays") && said.contains("Google Cloud Storage"), "{said}");
        let mut role = spec(Some(Provider::S3), None);
        role.role = Some("arn".into());
        let said =
            Store::open(&role, Secret::default()).err().map(|error| error.to_string()).unwrap_or_default();
        assert!(said.contains("AWS_WEB_IDENTITY_TOKEN_FILE"), "{said}");
    }

    #[test]
    fn a_store_at_another_address_needs_no_account_of_google() {
        let made = at_endpoint(None, "http://127.0.0.1:1/").unwrap_or_default();
        let document: serde_json::Value = serde_json::from_str(&made).unwrap_or_default();
        assert_eq!(document["gcs_base_url"], "http://127.0.0.1:1");
        assert_eq!(document["disable_oauth"], true);
        let kept = at_endpoint(Some(r#"{"gcs_base_url":"http://own","private_key":"k"}"#), "http://b")
            .unwrap_or_default();
        assert!(kept.contains("http://own"), "{kept}");
        let said = at_endpoint(Some("not JSON, secret"), "http://b").unwrap_err().to_string();
        assert!(!said.contains("secret"), "{said}");
    }
}
