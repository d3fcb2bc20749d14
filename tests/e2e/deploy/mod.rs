//! What is rendered from configurations: that it is what the repository holds, that it carries no secret, and that every key of the Python library
//! has an effect.

mod with_rendering;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use modalkit_tests::{KEY, built, workspace};

/// Runs the program in a folder; its exit code, what it printed, what it complained of.
pub(super) fn modalkit(folder: &Path, args: &[&str], path: Option<&str>) -> (i32, String, String) {
    let mut command = Command::new(built().join("modalkit"));
    command.args(args).current_dir(folder).env_remove("MODALKIT_CONFIG");
    if let Some(path) = path {
        command.env("PATH", path);
    }
    let output = command.output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

/// A configuration, and what is rendered from it with these arguments: into a folder, or from standard output.
pub(super) fn rendered(config: &str, args: &[&str]) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let name = if config.contains("\napp_settings:\n") { "config.yaml" } else { "config.toml" };
    fs::write(folder.path().join(name), config).unwrap();
    let mut all = vec!["deploy", "render", "--output", "out", "--config", name];
    all.extend(args);
    let (code, said, complaint) = modalkit(folder.path(), &all, None);
    assert_eq!(code, 0, "{said}{complaint}");
    let out = folder.path().join("out");
    (folder, out)
}

/// Everything that can be said of a deployment.
pub(super) const EVERYTHING: &str = r#"
[server]
listen = "127.0.0.1:9000"
drain_timeout_seconds = 60

[app_settings]
app_prefix = "Demo_App"

[app_settings.auth_config]
api_key = "sk-4f9a1c7be2d85036"

[app_settings.auth_config.keys.operator]
secret = "operator-key"
management = true

[app_settings.build_config]
image = "python"
tag = "3.11-slim-bookworm"
workdir = "/app"
env = { MODEL_VERSION = "3", QUOTED = 'a "b" $c \ d' }
extra_run_commands = ["apt-get update", "apt-get install -y libgomp1"]

[app_settings.deployment_config]
region = "eu-west-1"
gpu = ["H100:2", "A100"]
memory = 16384
cpu = 8
concurrency_limit = 4
secrets = ["demo-aws"]
secure = true
cloud_bucket_mounts = [{ mount_point = "/mnt/weights", bucket_name = "demo-weights", key_prefix = "v3/", secret = "bucket-keys", bucket_bytes_max = 1073741824 }]

[app_settings.deployment_config.volumes]
"/mnt/models" = "demo-models"

[app_settings.queue_config.backends.main]
kind = "redis"
redis_type = "stream"
broker_url = "redis://redis.example:6379/0"

[[app_settings.queue_config.consume]]
queue = "main://requests"
model = "digits"
in_flight_max = 16

[model_settings]
local_model_repository_folder = "/mnt/models"

[model_settings.model_entries.digits]
plugin = "onnx"
"#;

#[test]
fn the_repositorys_manifests_and_unit_are_what_is_rendered() {
    for (target, file) in [("kubernetes", "config/kubernetes.yaml"), ("systemd", "config/modalkit.service")] {
        let args = ["deploy", "render", "--target", target, "--config", "config/production.toml"];
        let (code, text, complaint) = modalkit(&workspace(), &args, None);
        assert_eq!(code, 0, "{complaint}");
        let path = workspace().join(file);
        if std::env::var_os("MODALKIT_UPDATE").is_some() {
            fs::write(&path, &text).unwrap();
        }
        assert!(
            fs::read_to_string(&path).unwrap() == text,
            "{file} isn't what is rendered: MODALKIT_UPDATE=1 cargo test -p modalkit-tests --test e2e deploy:: writes it"
        );
    }
}

#[test]
fn a_unit_may_write_what_the_configuration_says_that_the_host_writes() {
    let config = "[server]\nlisten = \"127.0.0.1:443\"\nstate_folder = \"/data/modalkit\"\n\
                  [app_settings.deployment_config]\nmounts = [{ local_path = \"/etc/labels.json\", remote_path = \"/srv/app/labels.json\" }]\n\
                  cloud_bucket_mounts = [{ mount_point = \"/mnt/weights\", bucket_name = \"b\" }]\n";
    let (_folder, out) = rendered(config, &["--target", "systemd"]);
    let unit = fs::read_to_string(out.join("modalkit.service")).unwrap();
    for line in [
        "ReadWritePaths=-/data/modalkit -/srv/app",
        "ExecStartPre=+/bin/ln -sfn /data/modalkit/buckets/weights/current /mnt/weights",
        "AmbientCapabilities=CAP_NET_BIND_SERVICE",
    ] {
        assert!(unit.contains(line), "{line:?} is not in\n{unit}");
    }
}

#[test]
fn no_secret_is_rendered_and_each_has_a_place_to_come_from() {
    for target in ["kubernetes", "helm", "compose", "systemd"] {
        let (_folder, out) = rendered(EVERYTHING, &["--target", target]);
        let mut files = vec![out];
        let mut all = String::new();
        while let Some(path) = files.pop() {
            if path.is_dir() {
                files.extend(fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()));
            } else {
                all.push_str(&fs::read_to_string(path).unwrap());
            }
        }
        assert!(!all.contains(KEY), "{target}");
        for name in [
            "MODALKIT_APP_SETTINGS__AUTH_CONFIG__API_KEY",
            "MODAL_SECRET",
            "operator-key",
            "bucket-keys",
            "demo-aws",
        ] {
            assert!(all.contains(name), "{target}: {name}");
        }
    }
}

#[test]
fn a_configuration_that_the_cluster_could_not_serve_says_what_is_missing() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("a.toml"), "[app_settings.deployment_config]\nconcurrency_limit = 3\n")
        .unwrap();
    let render = |args: &[&str]| {
        let mut all = vec!["deploy", "render", "--config", "a.toml"];
        all.extend(args);
        modalkit(folder.path(), &all, None)
    };
    let (code, _, said) = render(&["--target", "kubernetes", "--autoscaler", "keda"]);
    assert!(
        code == 1
            && said.contains("expected something for KEDA to scale by")
            && said.contains("--prometheus"),
        "{said}"
    );
    let (code, _, said) = render(&["--target", "helm"]);
    assert!(code == 1 && said.contains("expected --output") && said.contains("values.yaml"), "{said}");
    let (code, said, _) =
        render(&["--target", "kubernetes", "--autoscaler", "keda", "--prometheus", "http://prometheus:9090"]);
    assert!(code == 0 && said.contains("sum(modalkit_queued_jobs)"), "{said}");
    fs::write(
        folder.path().join("b.toml"),
        "[app_settings.auth_config.keys.my-key]\napi_key = \"sk-4f9a1c7be2d85036\"\n",
    )
    .unwrap();
    let (code, _, said) =
        modalkit(folder.path(), &["deploy", "render", "--target", "compose", "--config", "b.toml"], None);
    assert!(code == 1 && said.contains("MY-KEY") && !said.contains(KEY), "{said}");
    let (code, _, said) = render(&["--target", "nomad"]);
    assert!(code == 2 && said.contains("kubernetes"), "{said}");
}

/// A builder that notes what it was asked for stands in for docker, which needs images that aren't to be had here.
#[test]
fn an_image_is_built_by_the_builder_that_is_there() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("a.toml"), "[app_settings]\napp_prefix = \"demo\"\n").unwrap();
    let args = ["image", "--build", "--config", "a.toml"];
    let programs = folder.path().join("bin");
    fs::create_dir(&programs).unwrap();
    let path = programs.display().to_string();
    let (code, _, said) = modalkit(folder.path(), &args, Some(&path));
    assert!(code == 1 && said.contains("expected one of docker, podman, buildah in PATH"), "{said}");
    let podman = programs.join("podman");
    fs::write(
        &podman,
        "#!/bin/sh\nprintf '%s ' \"$@\" > asked\n/bin/cat \"$5\" > Dockerfile.seen\nexit ${FAILS:-0}\n",
    )
    .unwrap();
    fs::set_permissions(&podman, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let (code, said, complaint) = modalkit(folder.path(), &args, Some(&path));
    assert_eq!((code, said.as_str()), (0, "demo:0.1.0\n"), "{complaint}");
    let asked = fs::read_to_string(folder.path().join("asked")).unwrap();
    assert!(asked.starts_with("build --tag demo:0.1.0 --file /") && asked.ends_with(" . "), "{asked}");
    let (_, printed, _) = modalkit(folder.path(), &["image", "--config", "a.toml"], None);
    assert_eq!(fs::read_to_string(folder.path().join("Dockerfile.seen")).unwrap(), printed);
    fs::write(&podman, "#!/bin/sh\nexit 3\n").unwrap();
    let (code, _, said) = modalkit(folder.path(), &args, Some(&path));
    assert!(code == 1 && said.contains("podman could not build demo:0.1.0"), "{said}");
}

/// Each key of the two configurations that people of the Python library have, and where it takes effect: here, or in what is rendered from it.
#[test]
fn every_key_of_the_python_librarys_configurations_has_an_effect() {
    let production = fs::read_to_string(workspace().join("tests/configurations/production.yaml")).unwrap();
    let (_folder, manifests) = rendered(&production, &["--target", "kubernetes"]);
    let manifests = fs::read_to_string(manifests.join("kubernetes.yaml")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("production.yaml"), &production).unwrap();
    fs::write(folder.path().join("labels.json"), "[]").unwrap();
    let (code, dockerfile, said) = modalkit(folder.path(), &["image", "--config", "production.yaml"], None);
    assert_eq!(code, 0, "{said}");
    let (_, checked, _) = modalkit(folder.path(), &["check", "--config", "production.yaml"], None);
    // Where a key's effect is seen: in the manifests, in the Dockerfile, or in what the host does (the test that shows it).
    let rendered = [
        ("app_prefix", &manifests, "name: demo"),
        ("auth_config.ssm_key", &manifests, "ssm_key = \"/demo/api-key\""),
        ("build_config.image, tag", &dockerfile, "FROM registry.example/ml/base:v3"),
        ("build_config.workdir", &dockerfile, "WORKDIR /app"),
        ("build_config.env", &dockerfile, "ENV MODEL_VERSION=\"3\""),
        ("build_config.extra_run_commands", &dockerfile, "RUN apt-get install -y libgomp1"),
        ("deployment_config.region", &manifests, "values: [\"eu-west-1\"]"),
        ("deployment_config.gpu", &manifests, "nvidia.com/gpu: 1"),
        ("deployment_config.memory", &manifests, "memory: 16384M"),
        ("deployment_config.cpu", &manifests, "cpu: 8000m"),
        ("deployment_config.concurrency_limit", &manifests, "maxReplicas: 4"),
        ("deployment_config.secrets", &manifests, "secretName: demo-aws"),
        ("deployment_config.volumes", &manifests, "claimName: demo-models"),
        ("deployment_config.mounts", &dockerfile, "COPY labels.json /app/labels.json"),
        (
            "deployment_config.cloud_bucket_mounts",
            &dockerfile,
            "ln -s /var/lib/modalkit-buckets/weights/current /mnt/weights",
        ),
        ("deployment_config.secure", &manifests, "MODAL_KEY"),
        ("deployment_config.allow_concurrent_inputs", &manifests, "allow_concurrent_inputs = 64"),
        ("deployment_config.container_idle_timeout", &manifests, "container_idle_timeout = 300"),
        ("deployment_config.retries", &manifests, "retries = 3"),
        (
            "deployment_config.volume_reload_interval_seconds",
            &manifests,
            "volume_reload_interval_seconds = 300",
        ),
        ("batch_config", &manifests, "max_batch_size = 64"),
        ("queue_config", &manifests, "backend = \"taskiq\""),
        ("model_settings.common", &manifests, "max_length = 512"),
        ("model_settings.model_entries", &manifests, "top_k = 3"),
    ];
    for (key, text, expected) in rendered {
        assert!(text.contains(expected), "{key}: {expected:?} is not in\n{text}");
    }
    assert!(!checked.contains("no effect"), "{checked}");
    let development = workspace().join("tests/configurations/development.yaml").display().to_string();
    let (_, checked, _) = modalkit(folder.path(), &["check", "--config", &development], None);
    assert!(!checked.contains("no effect"), "{checked}");
}
