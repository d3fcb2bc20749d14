//! Every key there is, with its kind, default and meaning: the one list that parsing, defaults, the JSON Schema and `check`
//! follow. What is written in one layer is such a value; layers are merged into one. It never knows what keys lead to.

use super::{
    declare::layer,
    layer::Setting,
    types::{
        Address, Amount, BatchWaitMs, BucketProvider, Count, Folder, FreeForm, Gpu, IsolationKind, Levels,
        MountKind, Named, OneOrMany, Over, PerSecond, Period, QueueKind, Ratio, RedisType, ReloadGpu,
        Seconds, SecondsOrZero, Secret, Sha256, Share, TaskKind, Url, Watch,
    },
};

/// Milliseconds up to a day.
type Milliseconds = Count<1, 86_400_000>;
/// A number that only memory bounds.
type Large = Count<1, 4_294_967_296>;

const MAX_REPLICAS: u64 = 256;
const MAX_THREADS: u64 = 1024;
/// Each library that touches a thread-local keeps a pthread key, of which a process has 1,024; others need some too.
const MAX_GENERATIONS: u64 = 768;

fn cores() -> u64 {
    std::thread::available_parallelism().map_or(1, |cores| cores.get() as u64)
}

layer! {
    /// The configuration of a modalkit host.
    pub(super) struct Root {
        /// What only the host cares about.
        server: Server = Server::default();
        /// The application: how its models are deployed, batched and guarded.
        app_settings: AppSettings = AppSettings::default();
        /// The models and their data.
        model_settings: ModelSettings = ModelSettings::default();
    }
}

layer! {
    /// What only the host cares about.
    pub(super) struct Server {
        /// Address and port. Another address than loopback also needs `app_settings.auth_config`, or `insecure = true`.
        listen: Address = Address(std::net::SocketAddr::from(([127, 0, 0, 1], 8000)));
        /// Serves everybody who reaches another address than loopback without asking who they are.
        insecure: bool = false;
        /// Threads that serve connections.
        io_threads: Count<1, MAX_THREADS>, or "as many as there are cores";
        /// Open connections. Of further ones a few are answered: `/livez` and `/readyz`, anything else with 503; the rest are closed.
        connections_max: Count<1, 1_048_576> = Count(4096);
        /// Open connections of one address (of IPv6: one /64). Of further ones a few are answered like those beyond connections_max.
        connections_per_address_max: Count<1, 1_048_576>, or "half of connections_max, at least 1";
        /// Milliseconds until a connection's first request, and from the first byte of each further request to the end of its headers.
        header_timeout_ms: Milliseconds = Count(30_000);
        /// Milliseconds that a connection may idle between requests. Balancers keep theirs for 60 s: this is more, so that they end first.
        keep_alive_timeout_ms: Milliseconds = Count(75_000);
        /// Bytes of a request's headers, and of what a connection reads ahead.
        header_bytes_max: Count<8_192, 16_777_216> = Count(64 << 10);
        /// Milliseconds from the end of the headers to the end of the body.
        body_timeout_ms: Milliseconds = Count(30_000);
        /// Bytes of a request's body.
        body_bytes_max: Large = Count(8 << 20);
        /// Bytes of bodies that have come and of answers that are being written, of all requests together; beyond them bodies get a 429.
        bytes_in_flight_max: Count<1_048_576, 1_099_511_627_776> = Count(256 << 20);
        /// Milliseconds that an answer may wait for its caller to take any of it; then the connection is ended.
        write_timeout_ms: Milliseconds = Count(30_000);
        /// Milliseconds after which a stream that has nothing to say sends a comment, so that nobody on the way takes it for dead.
        stream_heartbeat_ms: Milliseconds = Count(15_000);
        /// Bodies up to this many bytes are parsed on the connection's thread, larger ones on a pool of one thread a core.
        decode_inline_bytes_max: Count<0, 4_294_967_296> = Count(16 << 10);
        /// Answers from this many bytes on are compressed where their callers take that (`accept-encoding`); 0 for none. Those of tensors only where a caller
        /// takes one coding and nothing else.
        compress_bytes_min: Count<0, 4_294_967_296> = Count(16 << 10);
        /// Milliseconds until a request gets a 504.
        request_timeout_ms: Milliseconds = Count(60_000);
        /// The most milliseconds that a request may ask for with `x-request-timeout-ms`.
        request_timeout_ms_max: Milliseconds = Count(600_000);
        /// Seconds between a signal to end and the drain, in which `/readyz` answers 503 and everything else goes on: balancers take this
        /// host out meanwhile.
        drain_delay_seconds: Count<0, 3_600> = Count(0);
        /// Seconds that a shutdown waits for what was admitted.
        drain_timeout_seconds: Count<0, 86_400> = Count(30);
        /// Seconds that a plugin may take to open in the process that tries it first.
        preflight_timeout_seconds: Count<1, 3_600> = Count(30);
        /// Milliseconds that a file in a volume must hold still before it counts as written, unless its writer was seen closing
        /// or renaming it.
        settle_ms: Count<1, 60_000> = Count(200);
        /// Seconds that a library may hold still that is not all there, and that model data on its way holds up other data.
        settle_timeout_seconds: Count<1, 86_400> = Count(10);
        /// Milliseconds between two looks at a volume that is polled.
        poll_interval_ms: Milliseconds = Count(2_000);
        /// Seconds after which a model without an entry in the configuration is unloaded, once its plugin's file has gone.
        removed_plugin_seconds: Count<1, 31_536_000>, or "never: it serves on until `modalkit unload NAME`, the end of the host, or until it has failed for a minute and `load_timeout_seconds`";
        /// Plugin libraries that the process opens in its life.
        generations_max: Count<1, MAX_GENERATIONS> = Count(256);
        /// Takes plugins of any owner; otherwise files and folders of others than root and the host's user are refused.
        plugins_of_any_owner: bool = false;
        /// Takes plugins that their group or everybody may write.
        plugins_of_any_mode: bool = false;
        /// The folder of the journal of asynchronous jobs, for this host alone. What must survive the machine belongs on a volume.
        state_folder: Folder, or "$STATE_DIRECTORY, which systemd sets; else modalkit in $XDG_STATE_HOME, in $HOME/.local/state, or in /var/lib";
        /// The Unix socket over which this host's user, and root, manage it without a key, as the command line does by itself; "" for none.
        management_socket: String, or "manage.sock in state_folder";
        /// Names and addresses, beside those of loopback, that requests may be for (their header Host), where nobody is asked for a key.
        allowed_hosts: Vec<String> = Vec::new();
        /// Origins whose pages may call this host from a browser (CORS), as `https://app.example`; `*` for all, where callers show keys.
        cors_origins: Vec<String> = Vec::new();
        /// Asynchronous jobs that are not done with: unfinished, or with results that are not delivered.
        jobs_max: Large = Count(100_000);
        /// Unfinished asynchronous jobs of one model.
        jobs_per_model_max: Large = Count(50_000);
        /// Seconds that jobs and their results are kept after they were done with, while the host runs.
        job_retention_seconds: Count<0, 31_536_000> = Count(3_600);
        /// Bytes of the journal: beyond them the oldest finished jobs are forgotten sooner, and new ones are refused where there are none.
        job_store_bytes_max: Count<1_048_576, 1_099_511_627_776> = Count(1 << 30);
        /// Bytes of an asynchronous job's result, `meta` included: a job whose result has more has failed.
        result_bytes_max: Count<1_024, 536_870_912> = Count(64 << 20);
        /// Times that the host may die of something that nobody knows of while it runs a job and no other, until the job has failed. One that is
        /// seen to end the host fails at once.
        job_crashes_max: Count<1, 1_000> = Count(3);
        /// Seconds that the names in `Idempotency-Key`, and those of messages from queues, are remembered while the host runs, from the
        /// job's acceptance on and at least until it is done with.
        idempotency_window_seconds: Count<0, 31_536_000> = Count(3_600);
        /// Log levels: one for all, or by module, as in `info,modalkit=debug`.
        log: Levels = Levels("info".to_owned());
        /// Settings of single volumes, by their names.
        volumes: Named<ServerVolume>;
        /// The folder that buckets are mirrored into, a folder in it for each of `deployment_config.cloud_bucket_mounts`; for this host alone.
        buckets_folder: Folder, or "buckets in state_folder";
        /// Seconds that models wait at the start for the buckets that they use to be mirrored; then they are loaded with what is there.
        bucket_wait_seconds: Count<0, 86_400> = Count(600);
        /// The folder with one file for each secret, as Docker and Kubernetes mount them.
        secrets_folder: String = "/run/secrets".to_owned();
        /// Serves HTTPS instead of HTTP.
        tls: Tls;
        /// Exports traces over OTLP.
        traces: Traces;
    }
}

layer! {
    /// Traces over OTLP (HTTP, protobuf).
    pub(super) struct Traces {
        /// Where the collector answers, such as http://127.0.0.1:4318; without it nothing is exported.
        endpoint: Url;
        /// The share of requests that are sampled, from 0 to 1, where their callers haven't decided (`traceparent`).
        sample_ratio: Share = Share(0.01);
        /// Headers of exports, such as a collector's key.
        headers: Named<Secret>;
    }
}

layer! {
    /// HTTPS. Files that change are read again.
    pub(super) struct Tls {
        /// The file with the certificate and those between it and its authority, in PEM.
        certificate: String;
        /// The file with its private key, in PEM.
        private_key: String;
    }
}

layer! {
    /// Settings of one volume.
    pub(super) struct ServerVolume {
        /// How changes in it are noticed.
        watch: Watch, or "native on local file systems, both on others";
    }
}

layer! {
    /// The application.
    pub(super) struct AppSettings {
        /// The application's name is this, followed by the environment variable MODALKIT_APP_POSTFIX (`-dev` where unset).
        app_prefix: String = "modalkit".to_owned();
        /// How requests become batches.
        batch_config: BatchConfig = BatchConfig::default();
        /// Replicas, volumes and what else models run with.
        deployment_config: DeploymentConfig = DeploymentConfig::default();
        /// Who may call.
        auth_config: AuthConfig;
        /// Where asynchronous results go, and requests come from.
        queue_config: QueueConfig = QueueConfig::default();
        /// The container image that `modalkit image` describes.
        build_config: BuildConfig;
    }
}

layer! {
    /// How requests become batches.
    pub(super) struct BatchConfig {
        /// Items in a batch.
        max_batch_size: Count<1, 1000> = Count(1);
        /// What the items of a batch cost together at most, in the unit of the model's pipeline; one that costs more runs by itself.
        max_batch_cost: Large, or "any";
        /// Milliseconds that an incomplete batch waits for more, or "adaptive".
        wait_ms: BatchWaitMs = BatchWaitMs::Milliseconds(0);
        /// Items that wait for a batch, for each model.
        queue_max: Count<1, 16_777_216> = Count(4096);
    }
}

layer! {
    /// Replicas, volumes and what else models run with.
    pub(super) struct DeploymentConfig {
        /// Watched folders and the names of their volumes, such as `"/mnt/models" = "models"`.
        volumes: Named<String>, or "local_model_repository_folder, or else the folder `volume`, named \"volume\"";
        /// Replicas kept also without work.
        min_replicas: Count<0, MAX_REPLICAS> = Count(1);
        /// Replicas beside these that are loaded, run nothing, and take over at once where the process of another one dies or more are wanted. Of
        /// models in processes of their own, without a GPU.
        spare_replicas: Count<0, MAX_REPLICAS> = Count(0);
        /// The most replicas there are.
        concurrency_limit: Count<1, MAX_REPLICAS>, or "min_replicas, or 1";
        /// Inputs that one replica handles at once, where that is more than a batch.
        allow_concurrent_inputs: Count<1, 4_294_967_295> = Count(1);
        /// Batches that one replica runs at once, each on a thread of its own.
        batches_in_flight: Count<1, MAX_THREADS>, or "as many whole batches as allow_concurrent_inputs holds, at least 1";
        /// Requests in flight before 429; for the whole host.
        allow_concurrent_inputs_handler: Count<1, 4_294_967_295> = Count(1024);
        /// Seconds without work until a replica above the minimum is retired.
        container_idle_timeout: Count<1, 4_294_967_295> = Count(180);
        /// Seconds that a batch may run until its callers get a 504 and its replica is replaced.
        batch_timeout_seconds: Seconds = Seconds(300.0);
        /// Seconds that a batch waits for a caller of `/predict_stream` who reads none of its chunks; then that caller is cut off.
        stream_wait_seconds: Seconds = Seconds(10.0);
        /// Replicas that may hang in a batch until the model is given up.
        stuck_replicas_max: Count<0, MAX_REPLICAS> = Count(2);
        /// Seconds that a pipeline's `load` and `warmup` together may take, and each of its `on_volume_reload`.
        load_timeout_seconds: Seconds = Seconds(600.0);
        /// Seconds between calls of `on_volume_reload` without any change; -1: only on change.
        volume_reload_interval_seconds: Period = Period(-1.0);
        /// Seconds that the generation before is kept on standby after a swap; 0: not at all.
        probation_seconds: SecondsOrZero = SecondsOrZero(10.0);
        /// Batches that must have ended before a generation on probation is judged.
        probation_batches_min: Large = Count(10);
        /// How much larger the share of failed batches may be, from 0 to 1.
        probation_failed_share_max: Share = Share(0.1);
        /// How many times as long 99 of 100 batches may take.
        probation_p99_ratio_max: Ratio = Ratio(3.0);
        /// Names of secrets for the pipelines: variables of the environment, or files in `server.secrets_folder`.
        secrets: Vec<String> = Vec::new();
        /// Files and folders that are put in place at the start and when the configuration is read again.
        mounts: Vec<Mount> = Vec::new();
        /// Whether callers must send Modal-Key and Modal-Secret, which are the secrets `modal-key` and `modal-secret`.
        secure: bool = false;
        /// Further attempts for an asynchronous job that failed, where another may help.
        retries: Count<0, 1000> = Count(1);
        /// The region of cloud services: of SSM and SQS, where these have none of their own.
        region: String;
        /// The device of each replica, such as "A100", "H100:2" for two, or "any"; several in order of preference; [] or null for none.
        gpu: OneOrMany<Gpu>;
        /// Mebibytes of a device's memory that one replica needs: others that say so may share the device with it.
        gpu_memory_mb: Large, or "the whole device";
        /// What a new generation does where no device is free: it shares the old one's ("share"), waits ("wait"), or takes them after
        /// the old one has stopped, while requests wait ("stop_first").
        reload_gpu: ReloadGpu = ReloadGpu::Share;
        /// Whether the pipeline runs in the host's own process ("in-process": fastest, and its crash is the host's), or each replica in a
        /// process of its own ("process").
        isolation: IsolationKind = IsolationKind::InProcess;
        /// Megabytes of memory that each replica's process may have; with `isolation = "process"`.
        memory: Amount, or "as much as there is";
        /// Cores that each replica's process may use, also parts of them; with `isolation = "process"`.
        cpu: Amount, or "all";
        /// Whether each replica's process may read its volumes and the system's files alone, and write, connect and start nothing; with
        /// `isolation = "process"`.
        sandbox: bool = false;
        /// Whether a process in a sandbox may open sockets all the same.
        sandbox_network: bool = false;
        /// Batches after which a replica's process is replaced by a fresh one; with `isolation = "process"`.
        recycle_after_batches: Large, or "never";
        /// Mebibytes of memory beyond which a replica's process is replaced by a fresh one; with `isolation = "process"`.
        recycle_after_mb: Large, or "never";
        /// Prefixes of buckets that are mirrored into folders, each of which is a volume.
        cloud_bucket_mounts: Vec<BucketMount> = Vec::new();
    }
}

layer! {
    /// A file or folder that is put in place.
    pub(super) struct Mount {
        /// What is copied.
        local_path: String;
        /// Where it is put.
        remote_path: String;
        /// Whether it is a file or a folder.
        r#type: MountKind = MountKind::File;
    }
}

layer! {
    /// A prefix of a bucket that is mirrored into a folder.
    pub(super) struct BucketMount {
        /// The folder: a link to what was mirrored last.
        mount_point: String;
        /// The volume's name.
        name: String, or "the last part of mount_point";
        /// The bucket; of Azure, the container.
        bucket_name: String;
        /// Where the store answers, where that isn't the cloud's own address.
        bucket_endpoint_url: Url;
        /// What the store speaks.
        provider: BucketProvider, or "what bucket_endpoint_url and the names in the secret say, else s3";
        /// The folder of keys that is mirrored.
        key_prefix: String, or "the whole bucket";
        /// The secret with the credentials, by the names that clients of the cloud know: `AWS_ACCESS_KEY_ID` and so on.
        secret: String, or "what the environment has, as the cloud's own programs look for it";
        /// The role whose credentials are asked for, with the token in the file AWS_WEB_IDENTITY_TOKEN_FILE.
        oidc_auth_role_arn: String;
        /// Whether files that are written below the mount point stay here, instead of going up.
        read_only: bool = false;
        /// Whether the caller pays, and not the bucket's owner.
        requester_pays: bool = false;
        /// Milliseconds between two listings.
        poll_interval_ms: Milliseconds = Count(60_000);
        /// Bytes that the mirrored objects may have together.
        bucket_bytes_max: Count<1, 1_125_899_906_842_624>, or "what the disk has room for";
        /// Takes plugins from it whose content no `plugin_sha256` names: whoever may write the bucket runs code here.
        plugins_from_buckets: bool = false;
    }
}

layer! {
    /// Who may call. Where nothing stands here, everybody who reaches the host may.
    pub(super) struct AuthConfig {
        /// The one key, named "default", where there is no need for several.
        api_key: Secret;
        /// The parameter in SSM that holds the one key.
        ssm_key: String;
        /// The header that holds a caller's key; `Authorization: Bearer KEY` is taken as well.
        auth_header: String = "x-api-key".to_owned();
        /// Further keys, by name. Names stand in logs and metrics, keys never do.
        keys: Named<ApiKey>;
        /// Where SSM answers.
        ssm_endpoint: Url, or "the region's own address";
        /// The region of SSM.
        ssm_region: String, or "app_settings.deployment_config.region, AWS_REGION, or us-east-1";
        /// Seconds between two looks at keys in files and in SSM.
        refresh_seconds: Seconds = Seconds(30.0);
    }
}

layer! {
    /// One key. Its value is one of `api_key`, `variable`, `secret` and `ssm_key`.
    pub(super) struct ApiKey {
        /// The key itself.
        api_key: Secret;
        /// The variable of the environment that holds it.
        variable: String;
        /// The file in `server.secrets_folder` that holds it.
        secret: String;
        /// The parameter in SSM that holds it.
        ssm_key: String;
        /// Whether it may look at the host's inside and ask for reloads and rollbacks.
        management: bool = false;
        /// Whether its answers may say where their time went.
        explain: bool = false;
        /// The queues that its jobs may name, in place of `queue_config.allowed_queues`.
        allowed_queues: Vec<String>, or "queue_config.allowed_queues";
        /// Requests that it may make.
        requests_per_second: PerSecond;
        /// Requests that it may make at once after a pause.
        burst: Count<1, 1_000_000>, or "as many as in one second";
        /// Its requests in flight.
        concurrency_max: Large;
    }
}

layer! {
    /// The container image.
    pub(super) struct BuildConfig {
        /// The image it is built from.
        image: String;
        /// That image's tag.
        tag: String;
        /// The working folder in it.
        workdir: String = "/root".to_owned();
        /// Variables of its environment.
        env: Named<String> = Named::default();
        /// Commands that are run while it is built.
        extra_run_commands: OneOrMany<String>;
    }
}

layer! {
    /// Where asynchronous results go, and requests come from.
    pub(super) struct QueueConfig {
        /// The backend of queues that name none: memory, redis, sqs, taskiq, or one of `backends`.
        backend: String = "memory".to_owned();
        /// Where the broker of that backend answers.
        broker_url: Url = Url("memory://".to_owned());
        /// Further backends, by name. A queue chooses one by `NAME://QUEUE`.
        backends: Named<QueueBackend>;
        /// The backends of single queues: queue = backend.
        queues: Named<String>;
        /// The queues that jobs may name: BACKEND://QUEUE, or a name that is found as a request's is; * stands for anything.
        allowed_queues: Vec<String>, or "every queue in memory, and those in `queues`";
        /// Seconds that a result is tried to be delivered until it is given up.
        delivery_deadline_seconds: Count<1, 31_536_000> = Count(86_400);
        /// The queue for messages that are no requests and name no queue themselves.
        dead_letter_queue: String;
        /// Queues that requests are taken from.
        consume: Vec<Consume> = Vec::new();
    }
}

layer! {
    /// A queue that requests are taken from. Its messages hold what `/predict_async` takes.
    pub(super) struct Consume {
        /// The queue: of SQS, or a stream of Redis.
        queue: String;
        /// The model that runs them.
        model: String;
        /// Requests that are taken and not done at once.
        in_flight_max: Count<1, 100_000> = Count(64);
        /// Seconds until a request that a dead host had taken comes to another one.
        visibility_seconds: Count<2, 43_200> = Count(30);
    }
}

layer! {
    /// A kind of queue, and how its broker is reached.
    pub(super) struct QueueBackend {
        /// What it is.
        kind: QueueKind, or "its name";
        /// Where the broker answers: redis://, rediss:// (TLS), http:// or https://.
        broker_url: Url, or "redis://127.0.0.1:6379; for SQS the region's own address";
        /// Who asks, for Redis.
        username: String;
        /// The password, for Redis.
        password: Secret;
        /// The file with the authority of the broker's certificate, in PEM.
        ca: String;
        /// What a queue is in Redis.
        redis_type: RedisType = RedisType::List;
        /// Entries that a stream of Redis keeps, about; older ones go.
        stream_length_max: Large;
        /// The task that workers of TaskIQ execute.
        task: String = "on_result".to_owned();
        /// The same for single queues: queue = task.
        tasks: Named<String>;
        /// The region, for SQS.
        region: String, or "app_settings.deployment_config.region, AWS_REGION, or us-east-1";
        /// The id of the access key, for SQS; without one credentials are found as AWS's own programs find them.
        access_key_id: Secret;
        /// The secret of the access key.
        secret_access_key: Secret;
        /// The token of temporary credentials.
        session_token: Secret;
        /// Whether a queue of SQS that is not there is made.
        create_missing: bool = true;
        /// Bytes of one message.
        message_bytes_max: Large, or "what the broker takes: 1048576 for SQS, 536870912 for Redis";
        /// Messages in each queue in memory.
        messages_max: Large = Count(10_000);
        /// Bytes of all queues in memory.
        bytes_max: Large = Count(64 << 20);
        /// The model whose own code sends, for the kind model.
        model: String, or "the backend's name";
        /// The plugin: `NAME.so` or `libNAME.so` in a volume.
        plugin: String, or "the backend's name";
        /// The only content of the plugin that is taken, as `sha256sum` prints it.
        plugin_sha256: Sha256;
        /// The plugin's own keys.
        settings: FreeForm = FreeForm::default();
        /// Names of secrets for the plugin.
        secrets: Vec<String> = Vec::new();
    }
}

layer! {
    /// The models and their data.
    pub(super) struct ModelSettings {
        /// The folder that holds the models' data.
        local_model_repository_folder: String, or "the first volume";
        /// What every pipeline gets.
        common: FreeForm = FreeForm::default();
        /// The models, by name. A plugin needs no entry to be served under its own name.
        model_entries: Named<ModelEntry>;
    }
}

layer! {
    /// One model; further keys go to its pipeline.
    pub(super) struct ModelEntry {
        /// The plugin: `NAME.so` or `libNAME.so` in a volume.
        plugin: String, or "the model's name";
        /// The only content of its plugin that is taken, as `sha256sum` prints it.
        plugin_sha256: Sha256;
        /// Whether the host is ready only while this model is; without an entry a model isn't required.
        required: bool = true;
        /// Refuses inputs that don't fit the input's JSON Schema in every part (lengths, ranges, patterns), which the pipeline's own
        /// parsing needn't look at. Costs a second parsing of each input.
        enforce_schema: bool = false;
        /// What it does, for clients of OpenAI's API: "embedding" (`/v1/embeddings`), "completion" (`/v1/completions`) or "chat"
        /// (`/v1/chat/completions`). Its inputs and outputs are of the form that docs/protocols.md has for that.
        task: TaskKind, or "none: nothing under `/v1` leads to it";
        /// The volumes whose changes it hears of.
        volumes: Vec<String>, or "those that its data folder or its paths lie in";
        /// A file with requests and answers that a new generation must give before it serves, in the data folder.
        golden: String;
        /// Milliseconds that each of those answers may take.
        golden_latency_ms: Milliseconds;
        /// A pipeline in Python: what is not found in its folder by itself.
        python: Python;
        /// Its own batches; what isn't said here is as for the application.
        batch_config: Over<BatchConfig>;
        /// Its own deployment; what isn't said here is as for the application.
        deployment_config: Over<DeploymentConfig>;
    }
    rest settings;
}

layer! {
    /// A pipeline in Python, which is a folder in a volume, under the plugin's name. It runs in a process of its own.
    pub(super) struct Python {
        /// Its folder, where that lies in no volume; it is the working directory.
        folder: String, or "the folder of the plugin's name in a volume";
        /// Its class or function, as `module:Name`.
        pipeline: String, or "the only one in pipeline.py, model.py or app.py";
        /// In place of `pipeline`: the file with the service around it, as `app.py`.
        app: String, or "none";
        /// The interpreter, by its path from the folder on.
        interpreter: String, or ".venv/bin/python in the folder, else python3";
        /// The pydantic model of one input, as `module:Name`.
        input_model: String, or "what the annotation list[Model] of its first stage says";
        /// The pydantic model of one output, as `module:Name`: for its JSON Schema.
        output_model: String, or "none";
        /// Variables of its environment.
        env: Named<String> = Named::default();
        /// Threads that its libraries for arrays may use each.
        threads: Count<1, 1_024>, or "as many as `cpu` says, else what they choose";
        /// Whether `modalkit` and `modal` are the host's own modules of these names, and not what is installed.
        shim: bool = true;
    }
}

impl Server {
    pub(super) fn io_threads(&self) -> u64 {
        self.io_threads.value().map_or_else(cores, |threads| threads.0)
    }
}

impl BatchConfig {
    /// These laid over the application's.
    pub(super) fn over(&self, application: &Self) -> Self {
        let mut whole = application.clone();
        whole.merge(self.clone());
        whole
    }
}

impl DeploymentConfig {
    /// These laid over the application's.
    pub(super) fn over(&self, application: &Self) -> Self {
        let mut whole = application.clone();
        whole.merge(self.clone());
        whole
    }
}
