//! What may be said on the command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use modalkit::config::Environment;

const EXIT_CODES: &str = "\
Exit codes:
  0    done; after a signal: everything that was admitted was answered
  1    not done: the host could not start or was cut off, a running host did not do what was asked, `check` found errors,
       (with --strict: or warnings), or `inspect` would not take the file
  2    wrong usage, or a wrong configuration to start with
  70   a plugin ended the process with `exit`
  75   a GPU failed for as long as the process lives: start it again
  130  a second signal";

/// Serves machine-learning pipelines: plugins in watched folders, over HTTP.
#[derive(Parser)]
#[command(version, about, after_help = EXIT_CODES)]
pub(crate) struct Cli {
    /// Configuration files, TOML, YAML or JSON; later ones win. The environment (MODALKIT_…__…) beats them. Default:
    /// MODALKIT_CONFIG, with commas between them.
    #[arg(long, value_delimiter = ',', global = true)]
    config: Vec<PathBuf>,
    /// What to do; serve where nothing is said.
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
}

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Serve until SIGTERM or SIGINT (what happens without a command).
    Serve {
        /// Where the journal of asynchronous jobs can't be read: rename it and begin an empty one.
        #[arg(long)]
        set_journal_aside: bool,
    },
    /// Print every setting with its value and where that comes from, and everything that is wrong.
    Check {
        /// Print the settings as a configuration file in JSON, with `$provenance` and `$warnings`, or the errors.
        #[arg(long)]
        json: bool,
        /// Fail over warnings as well, such as a key of a YAML file that means nothing here.
        #[arg(long)]
        strict: bool,
    },
    /// Print what a plugin says of itself, and whether this host would take it; of a model's file, also what it takes and gives, and how fast it
    /// runs.
    Inspect {
        /// The library, a folder of Python, or a model's file or folder.
        file: PathBuf,
        /// The plugin of a model's file, or its name in a volume; without it the one that says that it takes such files.
        #[arg(long)]
        plugin: Option<PathBuf>,
        /// A key of the entry that a model's file would have, with its value in JSON or as text: `--set 'dimensions={"width":320}'`.
        #[arg(long = "set", value_name = "KEY=VALUE")]
        settings: Vec<String>,
        /// Print JSON, with the schemas of input, output and settings.
        #[arg(long)]
        json: bool,
    },
    /// Write a folder with a pipeline that serves, its tests, and what to do next.
    New {
        /// The folder; the model is served under its name.
        folder: PathBuf,
        /// In Python. Compiled ones come from `cargo xtask new-plugin` in the host's own tree.
        #[arg(long, required = true)]
        python: bool,
    },
    /// Print the Dockerfile of an image with the host, its plugins and its folders of Python, or build the image.
    Image {
        /// Build it, with docker, podman or buildah, whichever is there.
        #[arg(long)]
        build: bool,
        /// The image's name and tag. Default: app_prefix, and this version.
        #[arg(long, value_name = "NAME:TAG")]
        tag: Option<String>,
    },
    /// What a host runs in: manifests, a chart, a compose file, a unit.
    Deploy {
        #[command(subcommand)]
        command: DeployCommand,
    },
    /// What there is to be configured.
    Config {
        #[command(subcommand)]
        command: ConfigCommand,
    },
    /// Show the models of a running host, or one of them with its history.
    Models {
        /// The model.
        name: Option<String>,
        #[command(flatten)]
        host: Host,
    },
    /// Show a running host's GPUs: how busy each is, and which replicas hold it.
    Devices {
        #[command(flatten)]
        host: Host,
    },
    /// Print a running host's metrics, in Prometheus' text format.
    Metrics {
        #[command(flatten)]
        host: Host,
    },
    /// Have a running host take a model's plugin from its volume again, or look through a volume.
    Reload {
        /// The model.
        #[arg(required_unless_present = "volume")]
        model: Option<String>,
        /// The volume to look through instead.
        #[arg(long, conflicts_with = "model")]
        volume: Option<String>,
        #[command(flatten)]
        host: Host,
    },
    /// Have a running host go back to a model's generation before.
    Rollback {
        /// The model.
        model: String,
        #[command(flatten)]
        host: Host,
    },
    /// Have a running host unload a model that has no entry in its configuration.
    Unload {
        /// The model.
        model: String,
        #[command(flatten)]
        host: Host,
    },
    /// Ask a running host's model for an answer.
    Predict {
        /// The model; may be left out where one is served.
        model: Option<String>,
        /// The input: JSON, `@FILE`, or `-` for standard input. With --batch a list of inputs.
        #[arg(long, short, default_value = "-")]
        input: String,
        /// Send a list of inputs.
        #[arg(long, conflicts_with = "later")]
        batch: bool,
        /// Send the input as an asynchronous job, and print its id.
        #[arg(long = "async")]
        later: bool,
        #[command(flatten)]
        host: Host,
    },
    /// Show a running host's asynchronous jobs, or one of them; take one back, or have its result delivered again.
    Jobs {
        /// The job's id; without one, the youngest jobs are listed.
        id: Option<String>,
        /// Take it back.
        #[arg(long, requires = "id", conflicts_with = "redeliver")]
        cancel: bool,
        /// Have its result delivered again.
        #[arg(long, requires = "id")]
        redeliver: bool,
        /// Wait for its end, at most so many milliseconds.
        #[arg(long, requires = "id", value_name = "MS")]
        wait: Option<u64>,
        /// List those in this state: queued, running, succeeded, failed or cancelled.
        #[arg(long, conflicts_with = "id")]
        state: Option<String>,
        /// List those whose results are: none, pending, delivered or dead.
        #[arg(long, conflicts_with = "id")]
        delivery: Option<String>,
        /// List those of this model.
        #[arg(long, conflicts_with = "id")]
        model: Option<String>,
        /// List those that came before this one.
        #[arg(long, conflicts_with = "id", value_name = "ID")]
        after: Option<String>,
        /// At most so many.
        #[arg(long, conflicts_with = "id", default_value_t = 20)]
        limit: usize,
        #[command(flatten)]
        host: Host,
    },
    /// Print a script that completes this command line in a shell.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Open a plugin and say whether this host could take it; the host runs this on itself.
    #[command(hide = true)]
    Preflight {
        /// The library.
        file: PathBuf,
    },
    /// Run a pipeline for the host that started this process, and for nobody else.
    #[command(hide = true)]
    Worker {
        /// That host's process id.
        host: i32,
        /// The connections that it hands over.
        connections: usize,
        /// The control group to join.
        cgroup: Option<PathBuf>,
    },
}

#[derive(Subcommand)]
pub(crate) enum DeployCommand {
    /// Render what a target takes, from the configuration.
    Render(RenderArgs),
}

#[derive(Args)]
pub(crate) struct RenderArgs {
    /// What is rendered for.
    #[arg(long)]
    pub(crate) target: DeployTarget,
    /// The folder to write to. Default: standard output, where it is one file.
    #[arg(long, value_name = "DIR")]
    pub(crate) output: Option<PathBuf>,
    /// The image's name and tag. Default: app_prefix, and this version.
    #[arg(long, value_name = "NAME:TAG")]
    pub(crate) image: Option<String>,
    /// What adds pods with the work, up to concurrency_limit.
    #[arg(long, default_value = "hpa")]
    pub(crate) autoscaler: DeployAutoscaler,
    /// Where Prometheus answers, for KEDA.
    #[arg(long, value_name = "URL")]
    pub(crate) prometheus: Option<String>,
    /// A Deployment, whose pods keep no state, in place of a StatefulSet.
    #[arg(long)]
    pub(crate) stateless: bool,
    /// Also KServe's ServingRuntime and InferenceService.
    #[arg(long)]
    pub(crate) kserve: bool,
}

#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum DeployTarget {
    Kubernetes,
    Helm,
    Compose,
    Systemd,
}

#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum DeployAutoscaler {
    Hpa,
    Keda,
}

#[derive(Subcommand)]
pub(crate) enum ConfigCommand {
    /// Print the JSON Schema of configuration files, for editors.
    Schema,
    /// Show the configuration that a running host has in force, and what became of its last change.
    Show {
        #[command(flatten)]
        host: Host,
    },
    /// Have a running host read its configuration again.
    Reload {
        #[command(flatten)]
        host: Host,
    },
}

/// Which host, and how to print what it says.
#[derive(Args)]
pub(crate) struct Host {
    /// Where it listens; MODALKIT_URL says so as well. Default: what the configuration says. Where neither this nor a key is given, all
    /// but predictions goes over its management socket.
    #[arg(long)]
    pub(crate) url: Option<String>,
    /// Its management socket, for all but predictions; MODALKIT_SOCKET says so as well. Default: what the configuration says.
    #[arg(long, conflicts_with = "url")]
    pub(crate) socket: Option<PathBuf>,
    /// Print the host's own JSON.
    #[arg(long)]
    pub(crate) json: bool,
    /// The file with the authority of its certificate, in PEM, where that is one of your own.
    #[arg(long, env = "MODALKIT_CA")]
    pub(crate) ca: Option<PathBuf>,
    /// The key to show it. Better given in the environment, where other users don't see it.
    #[arg(long, env = "MODALKIT_KEY", hide_env_values = true)]
    pub(crate) key: Option<String>,
}

impl Cli {
    /// The files that were named, here or in the environment.
    pub(crate) fn files(&self, environment: &Environment) -> Vec<PathBuf> {
        if !self.config.is_empty() {
            return self.config.clone();
        }
        let named = environment.get("MODALKIT_CONFIG").unwrap_or_default();
        named.split(',').map(str::trim).filter(|name| !name.is_empty()).map(PathBuf::from).collect()
    }
}
