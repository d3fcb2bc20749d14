//! Every path that this host answers: the one list from which matching, the methods and parameters that a path takes, labels of metrics, the
//! 404's text, the OpenAPI document and the README's table come. It answers nothing itself.

use std::{borrow::Cow, fmt::Write as _};

use hyper::Method;

use super::query::path_name;
use crate::{
    audit::{Action, Effect},
    config::Task,
};

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Route {
    Predict(Prediction),
    Jobs,
    Job,
    Redeliver,
    Health,
    Live,
    Ready,
    Queues,
    Queue,
    Models,
    Model,
    ReloadModel,
    RollBack,
    Unload,
    ReloadVolume,
    Devices,
    Metrics,
    Config,
    ReloadConfig,
    V2(V2Call),
    /// The models that OpenAI's clients find.
    TaskModels,
    TaskModel,
    OpenApi,
    Docs,
    DocsAsset,
}

/// What is asked by the Open Inference Protocol beside predictions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum V2Call {
    Server,
    Live,
    Ready,
    Models,
    Model,
    ModelReady,
    ModelConfig,
    ModelStatistics,
    Statistics,
    Index,
    Load,
    Unload,
    Trace,
    ModelTrace,
    Log,
    SystemSharedMemory,
    CudaSharedMemory,
}

impl V2Call {
    /// Whether a POST of it has a body that says something.
    pub(super) fn reads_body(self) -> bool {
        matches!(self, Self::Index | Self::Load | Self::Unload | Self::Trace | Self::ModelTrace | Self::Log)
    }
}

/// How a prediction is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Prediction {
    /// One input, one answer.
    Sync,
    /// A list of inputs, a list of answers.
    Batch,
    /// An asynchronous job.
    Async,
    /// Tensors, by the Open Inference Protocol.
    Infer,
    /// One input, chunks of its output as they come.
    Stream,
    /// What OpenAI's clients ask of a model with this task.
    Task(Task),
}

impl Route {
    /// How it runs a pipeline; `None` where it doesn't.
    pub(super) fn prediction(self) -> Option<Prediction> {
        match self {
            Self::Predict(prediction) => Some(prediction),
            _ => None,
        }
    }
}

/// Whom it is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum OpenTo {
    /// Whoever asks.
    Everybody,
    /// Whoever has a key, where there are keys.
    Callers,
    /// A key with `management = true`, and the management socket.
    Management,
}

/// One path.
pub(super) struct Endpoint {
    pub(super) route: Route,
    /// With a placeholder for a name; a label of metrics.
    pub(super) pattern: &'static str,
    /// `/versions/{version}` may follow the name.
    pub(super) versioned: bool,
    /// As the header `allow` names them; HEAD is taken for GET before it gets here.
    pub(super) methods: &'static str,
    pub(super) open_to: OpenTo,
    /// Of the query; others are passed over, unless they are nearly one of these.
    pub(super) parameters: &'static [&'static str],
    /// What it answers, for people.
    pub(super) about: &'static str,
}

const GET: &str = "GET, HEAD";
const POST: &str = "POST";
const GET_OR_DELETE: &str = "GET, HEAD, DELETE";
const GET_OR_POST: &str = "GET, HEAD, POST";

/// What the paths of the Open Inference Protocol begin with.
pub(super) const V2: &str = "/v2";
/// What those of OpenAI's API begin with.
pub(super) const V1: &str = "/v1";
/// `/predict_sync` with its model's name in the path.
const SYNC_BY_PATH: &str = "/models/{name}/predict";
/// In a pattern, whatever follows.
const ANYTHING: &str = "{*}";
/// What may stand before a version in a path.
const VERSIONS: &str = "/versions/";

/// All of them, those first that are asked for most.
static ENDPOINTS: [Endpoint; 48] = [
    Endpoint {
        route: Route::Predict(Prediction::Sync),
        pattern: "/predict_sync",
        versioned: false,
        methods: POST,
        open_to: OpenTo::Callers,
        parameters: &["model_name"],
        about: "one bare input in, `{\"status\":\"success\", …output}` out; `POST /models/NAME/predict` is the same",
    },
    Endpoint {
        route: Route::Predict(Prediction::Batch),
        pattern: "/predict_batch",
        versioned: false,
        methods: POST,
        open_to: OpenTo::Callers,
        parameters: &["model_name", "partial"],
        about: "a list in, a list out, each item in its place. One that isn't the pipeline's input fails the list whole, before anything runs: 422 with its index. With `?partial=true` it stands in its place as `{\"status\":\"error\",\"error\",\"detail\"}`, as one that fails in the pipeline does anyway",
    },
    Endpoint {
        route: Route::Predict(Prediction::Stream),
        pattern: "/predict_stream",
        versioned: false,
        methods: POST,
        open_to: OpenTo::Callers,
        parameters: &["model_name"],
        about: "one bare input in, server-sent events out: each `chunk` as the pipeline makes it, then one `end`, which is what `/predict_sync` answers, or `{\"status\":\"error\",\"status_code\",\"error\"}` with `detail` for an invalid input. Before the first event an error has its own status; a comment comes after `stream_heartbeat_ms` of silence",
    },
    Endpoint {
        route: Route::Predict(Prediction::Async),
        pattern: "/predict_async",
        versioned: false,
        methods: POST,
        open_to: OpenTo::Callers,
        parameters: &["model_name"],
        about: "`{\"message\": input, \"success_queue\", \"failure_queue\", \"meta\": {…}}` in, `{\"job_id\"}` out",
    },
    Endpoint {
        route: Route::Predict(Prediction::Infer),
        pattern: "/v2/models/{name}/infer",
        versioned: true,
        methods: POST,
        open_to: OpenTo::Callers,
        parameters: &[],
        about: "tensors in, tensors out, by the Open Inference Protocol ([`docs/protocols.md`](docs/protocols.md)): JSON, bytes behind it (`Inference-Header-Content-Length`), or bytes alone (0 there). A batch is taken apart, and batched with those of others. Errors are `{\"error\"}`",
    },
    Endpoint {
        route: Route::Predict(Prediction::Task(Task::Embedding)),
        pattern: "/v1/embeddings",
        versioned: false,
        methods: POST,
        open_to: OpenTo::Callers,
        parameters: &[],
        about: "as OpenAI's clients ask ([`docs/protocols.md`](docs/protocols.md)), of models with `task = \"embedding\"`. Errors are `{\"error\":{\"message\", …}}`",
    },
    Endpoint {
        route: Route::Predict(Prediction::Task(Task::Completion)),
        pattern: "/v1/completions",
        versioned: false,
        methods: POST,
        open_to: OpenTo::Callers,
        parameters: &[],
        about: "the same with `task = \"completion\"`, whole or as a stream",
    },
    Endpoint {
        route: Route::Predict(Prediction::Task(Task::Chat)),
        pattern: "/v1/chat/completions",
        versioned: false,
        methods: POST,
        open_to: OpenTo::Callers,
        parameters: &[],
        about: "the same with `task = \"chat\"`",
    },
    Endpoint {
        route: Route::TaskModels,
        pattern: "/v1/models",
        versioned: false,
        methods: GET,
        open_to: OpenTo::Callers,
        parameters: &[],
        about: "the models with a `task`",
    },
    Endpoint {
        route: Route::TaskModel,
        pattern: "/v1/models/{name}",
        versioned: false,
        methods: GET,
        open_to: OpenTo::Callers,
        parameters: &[],
        about: "one of them",
    },
    Endpoint {
        route: Route::Jobs,
        pattern: "/jobs",
        versioned: false,
        methods: GET,
        open_to: OpenTo::Callers,
        parameters: &["state", "delivery", "model", "after", "limit"],
        about: "the caller's jobs, the youngest first; of all callers for management",
    },
    Endpoint {
        route: Route::Job,
        pattern: "/jobs/{id}",
        versioned: false,
        methods: GET_OR_DELETE,
        open_to: OpenTo::Callers,
        parameters: &["wait_ms"],
        about: "a job: state, result, attempts, delivery, once it has ended or `wait_ms` have passed. DELETE takes it back: 202 where its batch runs",
    },
    Endpoint {
        route: Route::Redeliver,
        pattern: "/jobs/{id}/redeliver",
        versioned: false,
        methods: POST,
        open_to: OpenTo::Callers,
        parameters: &[],
        about: "has the job's result delivered once more",
    },
    Endpoint {
        route: Route::Health,
        pattern: "/health",
        versioned: false,
        methods: GET,
        open_to: OpenTo::Everybody,
        parameters: &[],
        about: "how the models are. Their names want a key where there are keys, reasons management",
    },
    Endpoint {
        route: Route::Live,
        pattern: "/livez",
        versioned: false,
        methods: GET,
        open_to: OpenTo::Everybody,
        parameters: &[],
        about: "the process answers",
    },
    Endpoint {
        route: Route::Ready,
        pattern: "/readyz",
        versioned: false,
        methods: GET,
        open_to: OpenTo::Everybody,
        parameters: &["model"],
        about: "what is required serves, or the one model",
    },
    Endpoint {
        route: Route::OpenApi,
        pattern: "/openapi.json",
        versioned: false,
        methods: GET,
        open_to: OpenTo::Callers,
        parameters: &[],
        about: "all this as a document of OpenAPI 3.1, with the schemas of the models that serve",
    },
    Endpoint {
        route: Route::Docs,
        pattern: "/docs",
        versioned: false,
        methods: GET,
        open_to: OpenTo::Everybody,
        parameters: &[],
        about: "a page that shows that document, and tries it",
    },
    Endpoint {
        route: Route::DocsAsset,
        pattern: "/docs/{name}",
        versioned: false,
        methods: GET,
        open_to: OpenTo::Everybody,
        parameters: &[],
        about: "its files",
    },
    Endpoint {
        route: Route::Queues,
        pattern: "/queues",
        versioned: false,
        methods: GET,
        open_to: OpenTo::Management,
        parameters: &[],
        about: "how much the queues in memory hold, and which brokers can't be used",
    },
    Endpoint {
        route: Route::Queue,
        pattern: "/queues/{name}",
        versioned: false,
        methods: GET_OR_DELETE,
        open_to: OpenTo::Management,
        parameters: &["limit", "receipt", "lease_seconds"],
        about: "the oldest messages of a queue in memory. DELETE takes them for a while (60 s) and gives a `receipt`; with it acknowledges them, and they are delivered; else they come back",
    },
    Endpoint {
        route: Route::Models,
        pattern: "/models",
        versioned: false,
        methods: GET,
        open_to: OpenTo::Management,
        parameters: &[],
        about: "the models and where they stand",
    },
    Endpoint {
        route: Route::Model,
        pattern: "/models/{name}",
        versioned: false,
        methods: GET,
        open_to: OpenTo::Management,
        parameters: &[],
        about: "a model, its generations and its last changes",
    },
    Endpoint {
        route: Route::ReloadModel,
        pattern: "/models/{name}/reload",
        versioned: false,
        methods: POST,
        open_to: OpenTo::Management,
        parameters: &[],
        about: "takes the plugin from its volume again: what became of it; 409 where what serves stayed",
    },
    Endpoint {
        route: Route::RollBack,
        pattern: "/models/{name}/rollback",
        versioned: false,
        methods: POST,
        open_to: OpenTo::Management,
        parameters: &[],
        about: "goes back to the generation before; 409 where what serves stayed",
    },
    Endpoint {
        route: Route::Unload,
        pattern: "/models/{name}/unload",
        versioned: false,
        methods: POST,
        open_to: OpenTo::Management,
        parameters: &[],
        about: "unloads a model without an entry, and answers when it has left; 409 for one with an entry",
    },
    Endpoint {
        route: Route::ReloadVolume,
        pattern: "/volumes/{name}/reload",
        versioned: false,
        methods: POST,
        open_to: OpenTo::Management,
        parameters: &[],
        about: "scans a volume now, and calls `on_volume_reload`",
    },
    Endpoint {
        route: Route::Devices,
        pattern: "/devices",
        versioned: false,
        methods: GET,
        open_to: OpenTo::Management,
        parameters: &[],
        about: "GPUs, how busy they are, who holds them",
    },
    Endpoint {
        route: Route::Metrics,
        pattern: "/metrics",
        versioned: false,
        methods: GET,
        open_to: OpenTo::Management,
        parameters: &[],
        about: "Prometheus' text format",
    },
    Endpoint {
        route: Route::Config,
        pattern: "/config",
        versioned: false,
        methods: GET,
        open_to: OpenTo::Management,
        parameters: &[],
        about: "the configuration in force, and where each value comes from",
    },
    Endpoint {
        route: Route::ReloadConfig,
        pattern: "/config/reload",
        versioned: false,
        methods: POST,
        open_to: OpenTo::Management,
        parameters: &[],
        about: "reads the configuration again; 409 where it is wrong",
    },
    Endpoint {
        route: Route::V2(V2Call::Server),
        pattern: "/v2",
        versioned: false,
        methods: GET,
        open_to: OpenTo::Callers,
        parameters: &[],
        about: "what this server is, and the protocol's extensions that it has",
    },
    Endpoint {
        route: Route::V2(V2Call::Live),
        pattern: "/v2/health/live",
        versioned: false,
        methods: GET,
        open_to: OpenTo::Everybody,
        parameters: &[],
        about: "`{\"live\":true}`",
    },
    Endpoint {
        route: Route::V2(V2Call::Ready),
        pattern: "/v2/health/ready",
        versioned: false,
        methods: GET,
        open_to: OpenTo::Everybody,
        parameters: &[],
        about: "`{\"ready\":true}` where `/readyz` says so; else 503",
    },
    Endpoint {
        route: Route::V2(V2Call::Models),
        pattern: "/v2/models",
        versioned: false,
        methods: GET,
        open_to: OpenTo::Callers,
        parameters: &[],
        about: "the models' names, as KServe has it",
    },
    Endpoint {
        route: Route::V2(V2Call::Statistics),
        pattern: "/v2/models/stats",
        versioned: false,
        methods: GET,
        open_to: OpenTo::Callers,
        parameters: &[],
        about: "what all models have done",
    },
    Endpoint {
        route: Route::V2(V2Call::Model),
        pattern: "/v2/models/{name}",
        versioned: true,
        methods: GET,
        open_to: OpenTo::Callers,
        parameters: &[],
        about: "the tensors that a model takes and gives; one without tensors has one of JSON",
    },
    Endpoint {
        route: Route::V2(V2Call::ModelReady),
        pattern: "/v2/models/{name}/ready",
        versioned: true,
        methods: GET,
        open_to: OpenTo::Callers,
        parameters: &[],
        about: "200 where the model takes requests; else 503",
    },
    Endpoint {
        route: Route::V2(V2Call::ModelConfig),
        pattern: "/v2/models/{name}/config",
        versioned: true,
        methods: GET,
        open_to: OpenTo::Callers,
        parameters: &[],
        about: "how it is served, as Triton's clients read it",
    },
    Endpoint {
        route: Route::V2(V2Call::ModelStatistics),
        pattern: "/v2/models/{name}/stats",
        versioned: true,
        methods: GET,
        open_to: OpenTo::Callers,
        parameters: &[],
        about: "what it has done: inputs, batches, times",
    },
    Endpoint {
        route: Route::V2(V2Call::Index),
        pattern: "/v2/repository/index",
        versioned: false,
        methods: POST,
        open_to: OpenTo::Callers,
        parameters: &[],
        about: "the models and whether they serve; with `{\"ready\":true}` those that do",
    },
    Endpoint {
        route: Route::V2(V2Call::Load),
        pattern: "/v2/repository/models/{name}/load",
        versioned: false,
        methods: POST,
        open_to: OpenTo::Management,
        parameters: &[],
        about: "as `/models/NAME/reload`; an empty answer, or 409",
    },
    Endpoint {
        route: Route::V2(V2Call::Unload),
        pattern: "/v2/repository/models/{name}/unload",
        versioned: false,
        methods: POST,
        open_to: OpenTo::Management,
        parameters: &[],
        about: "as `/models/NAME/unload`; an empty answer, or 409",
    },
    Endpoint {
        route: Route::V2(V2Call::Trace),
        pattern: "/v2/trace/setting",
        versioned: false,
        methods: GET_OR_POST,
        open_to: OpenTo::Management,
        parameters: &[],
        about: "which requests are traced; POST changes that until the host ends",
    },
    Endpoint {
        route: Route::V2(V2Call::ModelTrace),
        pattern: "/v2/models/{name}/trace/setting",
        versioned: false,
        methods: GET_OR_POST,
        open_to: OpenTo::Management,
        parameters: &[],
        about: "the same: there are no settings of one model, and to change any is 501",
    },
    Endpoint {
        route: Route::V2(V2Call::Log),
        pattern: "/v2/logging",
        versioned: false,
        methods: GET_OR_POST,
        open_to: OpenTo::Management,
        parameters: &[],
        about: "what is logged; POST changes that until the configuration is read again",
    },
    Endpoint {
        route: Route::V2(V2Call::SystemSharedMemory),
        pattern: "/v2/systemsharedmemory/{*}",
        versioned: false,
        methods: GET_OR_POST,
        open_to: OpenTo::Callers,
        parameters: &[],
        about: "501: there is no shared memory",
    },
    Endpoint {
        route: Route::V2(V2Call::CudaSharedMemory),
        pattern: "/v2/cudasharedmemory/{*}",
        versioned: false,
        methods: GET_OR_POST,
        open_to: OpenTo::Callers,
        parameters: &[],
        about: "501",
    },
];

/// All of them.
pub(super) fn endpoints() -> impl Iterator<Item = &'static Endpoint> {
    ENDPOINTS.iter()
}

/// A path that is one of these, and what stands in it.
#[derive(Clone, Copy)]
pub(super) struct Target<'p> {
    pub(super) endpoint: &'static Endpoint,
    /// As it stands in the path.
    raw_name: &'p str,
    raw_version: Option<&'p str>,
}

impl<'p> Target<'p> {
    /// `None` where the path is none of these.
    pub(super) fn of(path: &'p str) -> Option<Self> {
        let matched = |endpoint: &'static Endpoint| {
            let (raw_name, raw_version) = names_in(endpoint.pattern, endpoint.versioned, path)?;
            Some(Self { endpoint, raw_name, raw_version })
        };
        ENDPOINTS.iter().find_map(matched).or_else(|| {
            let (raw_name, _) = names_in(SYNC_BY_PATH, false, path)?;
            let endpoint =
                ENDPOINTS.iter().find(|endpoint| endpoint.route == Route::Predict(Prediction::Sync))?;
            Some(Self { endpoint, raw_name, raw_version: None })
        })
    }

    pub(super) fn route(self) -> Route {
        self.endpoint.route
    }

    /// What stands in the path's placeholder, decoded.
    pub(super) fn name(self) -> Cow<'p, str> {
        path_name(self.raw_name)
    }

    /// The version that the path names.
    pub(super) fn version(self) -> Option<Cow<'p, str>> {
        self.raw_version.map(path_name)
    }

    /// Whether the path has such a method.
    pub(super) fn takes(self, method: &Method) -> bool {
        self.endpoint.methods.split(", ").any(|known| known == method.as_str())
    }

    /// What a request with this method asks for, as the audit log has it.
    pub(super) fn action<'a>(self, method: &'a Method, name: &'a str) -> Action<'a> {
        let (method, effect) = (method.as_str(), self.effect(method));
        Action { method, endpoint: self.endpoint.pattern, name, effect }
    }

    /// What a request with this method does.
    pub(super) fn effect(self, method: &Method) -> Effect {
        match self.route() {
            Route::V2(V2Call::Index | V2Call::SystemSharedMemory | V2Call::CudaSharedMemory) => Effect::Look,
            _ if method != Method::GET => Effect::Change,
            Route::Config | Route::Queue => Effect::Read,
            Route::V2(V2Call::Trace | V2Call::ModelTrace | V2Call::Log) => Effect::Read,
            _ => Effect::Look,
        }
    }
}

impl Endpoint {
    /// The pattern, with what may stand in it besides.
    fn path_shown(&self) -> Cow<'static, str> {
        if self.versioned {
            Cow::Owned(self.pattern.replacen("{name}", "{name}[/versions/{version}]", 1))
        } else {
            Cow::Borrowed(self.pattern)
        }
    }
}

/// What stands where a pattern has its placeholder, nothing where it has none; and the version, where the path has one.
fn names_in<'p>(pattern: &str, versioned: bool, path: &'p str) -> Option<(&'p str, Option<&'p str>)> {
    let Some((before, rest)) = pattern.split_once('{') else {
        return (pattern == path).then_some(("", None));
    };
    let (_, after) = rest.split_once('}')?;
    let path = path.strip_prefix(before)?;
    if pattern.ends_with(ANYTHING) {
        return Some((path, None));
    }
    let (name, rest) = step(path);
    let (version, rest) = match rest.strip_prefix(VERSIONS).filter(|_| versioned) {
        Some(rest) => {
            let (version, rest) = step(rest);
            (Some(version), rest)
        }
        None => (None, rest),
    };
    (!name.is_empty() && version != Some("") && rest == after).then_some((name, version))
}

/// What stands before the next slash, and what from there on.
fn step(path: &str) -> (&str, &str) {
    path.split_at(path.find('/').unwrap_or(path.len()))
}

/// The methods, without HEAD, which goes with GET.
fn shown(methods: &str, between: &str) -> String {
    methods.replace(", HEAD", "").replace(", ", between)
}

/// What a path of a protocol begins with; `None` of this host's own paths.
pub(super) fn protocol_of(path: &str) -> Option<&'static str> {
    let is_of =
        |begin: &&str| path.strip_prefix(*begin).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    [V2, V1].into_iter().find(is_of)
}

/// The answer to a path that is none of these: the others, or those of a protocol where it begins as they do.
pub(super) fn no_such_path(path: &str) -> String {
    let mut text = format!("no such path: {path}; there are ");
    let alike = ENDPOINTS.iter().filter(|endpoint| protocol_of(endpoint.pattern) == protocol_of(path));
    for (index, endpoint) in alike.enumerate() {
        let comma = if index == 0 { "" } else { ", " };
        let methods = shown(endpoint.methods, " and ");
        let _ = write!(text, "{comma}{methods} {}", endpoint.path_shown());
    }
    if protocol_of(path).is_none() {
        let _ = write!(text, ", {POST} {SYNC_BY_PATH}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(path: &str) -> Option<(Route, String)> {
        Target::of(path).map(|target| (target.route(), target.name().into_owned()))
    }

    #[test]
    fn names_are_found_in_paths_and_other_paths_are_nobodys() {
        assert_eq!(found("/predict_sync"), Some((Route::Predict(Prediction::Sync), String::new())));
        assert_eq!(found("/models/echo"), Some((Route::Model, "echo".into())));
        assert_eq!(found("/models/a%20b/predict"), Some((Route::Predict(Prediction::Sync), "a b".into())));
        assert_eq!(found("/models/a%20b/rollback"), Some((Route::RollBack, "a b".into())));
        assert_eq!(found("/models/reload"), Some((Route::Model, "reload".into())));
        assert_eq!(found("/volumes/main/reload"), Some((Route::ReloadVolume, "main".into())));
        assert_eq!(found("/jobs/a/redeliver"), Some((Route::Redeliver, "a".into())));
        assert_eq!(found("/queues/q"), Some((Route::Queue, "q".into())));
        for path in [
            "/",
            "",
            "/models/",
            "/models/a/b",
            "/models/a/reload/c",
            "/models//reload",
            "/volumes/a",
            "/jobs/",
            "/jobs/a/b",
            "/queues/",
            "/queues/a/b",
            "/job",
            "jobs",
            "models/a",
            "/nowhere",
            "/livez/",
            "/models/{name",
        ] {
            let found = found(path);
            // A brace is a letter as any other.
            assert!(found.is_none() || path == "/models/{name", "{path}: {found:?}");
        }
    }

    #[test]
    fn a_version_stands_behind_a_models_name_where_one_may() {
        let found = |path| {
            let target = Target::of(path)?;
            Some((target.route(), target.name().into_owned(), target.version().map(Cow::into_owned)))
        };
        let infer = Route::Predict(Prediction::Infer);
        let asked = |call| Route::V2(call);
        let (name, two) = (|| "m".to_owned(), || Some("2".to_owned()));
        assert_eq!(found("/v2/models/m/infer"), Some((infer, name(), None)));
        assert_eq!(found("/v2/models/m/versions/2/infer"), Some((infer, name(), two())));
        assert_eq!(found("/v2/models/m/versions/2"), Some((asked(V2Call::Model), name(), two())));
        assert_eq!(
            found("/v2/models/m/versions/2/stats"),
            Some((asked(V2Call::ModelStatistics), name(), two()))
        );
        assert_eq!(found("/v2/models/stats"), Some((asked(V2Call::Statistics), String::new(), None)));
        assert_eq!(found("/v2/models/m"), Some((asked(V2Call::Model), name(), None)));
        assert_eq!(
            found("/v2/systemsharedmemory/region/r/register"),
            Some((asked(V2Call::SystemSharedMemory), "region/r/register".to_owned(), None))
        );
        for path in [
            "/v2/",
            "/v2/models/",
            "/v2/models/m/versions",
            "/v2/models/m/versions/",
            "/v2/models/m/versions//infer",
            "/v2/models/m/versions/2/3/infer",
            "/v2/models/m/versions/2/trace/setting",
            "/models/m/versions/2/reload",
        ] {
            assert!(found(path).is_none(), "{path}");
        }
    }

    #[test]
    fn every_route_has_its_own_path_and_names_itself() {
        for endpoint in &ENDPOINTS {
            let target = Target::of(endpoint.pattern).unwrap();
            assert_eq!(target.route(), endpoint.route);
            assert_eq!(ENDPOINTS.iter().filter(|other| other.route == endpoint.route).count(), 1);
            let other =
                [V2, V1].into_iter().find(|begin| endpoint.pattern.starts_with(begin)).unwrap_or_default();
            let other = &*format!("{other}/x");
            assert!(no_such_path(other).contains(&*endpoint.path_shown()));
        }
    }

    #[test]
    fn settings_and_messages_are_read_and_everything_else_is_looked_at_or_changed() {
        for (method, path, effect) in [
            (Method::GET, "/config", Effect::Read),
            (Method::GET, "/queues/q", Effect::Read),
            (Method::GET, "/queues", Effect::Look),
            (Method::GET, "/models/a", Effect::Look),
            (Method::GET, "/jobs", Effect::Look),
            (Method::GET, "/jobs/a", Effect::Look),
            (Method::DELETE, "/queues/q", Effect::Change),
            (Method::DELETE, "/jobs/a", Effect::Change),
            (Method::POST, "/jobs/a/redeliver", Effect::Change),
            (Method::POST, "/models/a/reload", Effect::Change),
            (Method::POST, "/models/a/rollback", Effect::Change),
            (Method::POST, "/models/a/unload", Effect::Change),
            (Method::POST, "/volumes/a/reload", Effect::Change),
            (Method::POST, "/config/reload", Effect::Change),
            (Method::POST, "/v2/repository/index", Effect::Look),
            (Method::POST, "/v2/repository/models/a/load", Effect::Change),
            (Method::GET, "/v2/logging", Effect::Read),
            (Method::POST, "/v2/logging", Effect::Change),
        ] {
            let target = Target::of(path).unwrap();
            assert!(target.takes(&method), "{method} {path}");
            assert_eq!(target.effect(&method), effect, "{method} {path}");
        }
    }

    /// The README's table, from the list.
    fn table() -> String {
        let mut text = "| request | open to | answer |\n| --- | --- | --- |\n".to_owned();
        for Endpoint { pattern, versioned, methods, open_to, parameters, about, .. } in &ENDPOINTS {
            let methods = shown(methods, ", ");
            let pattern = if *versioned {
                pattern.replacen("{name}", "NAME[/versions/N]", 1)
            } else {
                (*pattern).to_owned()
            };
            let pattern = pattern.replace("{id}", "ID").replace("{name}", "NAME").replace(ANYTHING, "…");
            let query = match parameters {
                [] => String::new(),
                names => format!("?{}=", names.join("=&")),
            };
            let open_to = match open_to {
                OpenTo::Everybody => "everybody",
                OpenTo::Callers => "callers",
                OpenTo::Management => "management",
            };
            let _ = writeln!(text, "| `{methods} {pattern}{query}` | {open_to} | {about} |");
        }
        text
    }

    #[test]
    fn the_readme_has_this_table() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../README.md");
        let readme = std::fs::read_to_string(path).unwrap();
        let begin = readme.find("| request | open to |").expect("the README has the table");
        let length = readme[begin..].find("\n\n").expect("it ends") + 1;
        if std::env::var_os("MODALKIT_UPDATE").is_some() {
            std::fs::write(path, readme.replace(&readme[begin..begin + length], &table())).unwrap();
        } else {
            assert_eq!(
                &readme[begin..begin + length],
                table(),
                "run this test with MODALKIT_UPDATE=1 to write the README's table anew"
            );
        }
    }
}
