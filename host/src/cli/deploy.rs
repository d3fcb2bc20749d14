//! `image` and `deploy render`: what is rendered is printed, written or handed to a builder. It renders nothing itself.

use std::{
    env, fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, bail};
use modalkit::{
    config::{self, Environment, Loaded},
    deploy::{self, Autoscaler, File, Options, Target},
};

use super::{
    DONE, NOT_DONE, WRONG_USAGE,
    args::{DeployAutoscaler, DeployTarget, RenderArgs},
    print::{complain, print},
};

/// Programs that build images, in the order in which they are looked for, with what comes before the context.
const BUILDERS: [(&str, &[&str]); 3] =
    [("docker", &["build"]), ("podman", &["build"]), ("buildah", &["build"])];

pub(crate) fn image(files: &[PathBuf], environment: &Environment, build: bool, tag: Option<String>) -> u8 {
    let options = Options { image: tag, ..Options::default() };
    on_loaded(files, environment, |loaded| {
        let text = deploy::dockerfile(loaded, &options)?;
        if build {
            let image = options.image.clone().unwrap_or_else(|| deploy::image_name(loaded));
            return run_builder(&text, &image);
        }
        print(&text);
        Ok(())
    })
}

pub(crate) fn render(files: &[PathBuf], environment: &Environment, args: RenderArgs) -> u8 {
    let target = match args.target {
        DeployTarget::Kubernetes => Target::Kubernetes,
        DeployTarget::Helm => Target::Helm,
        DeployTarget::Compose => Target::Compose,
        DeployTarget::Systemd => Target::Systemd,
    };
    let options = Options {
        image: args.image,
        autoscaler: match args.autoscaler {
            DeployAutoscaler::Hpa => Autoscaler::Hpa,
            DeployAutoscaler::Keda => Autoscaler::Keda,
        },
        prometheus: args.prometheus,
        stateless: args.stateless,
        kserve: args.kserve,
    };
    on_loaded(files, environment, |loaded| {
        let rendered = deploy::render(loaded, target, &options)?;
        match (&args.output, rendered.as_slice()) {
            (Some(folder), _) => write(folder, &rendered),
            (None, [one]) => {
                print(&one.text);
                Ok(())
            }
            (None, several) => {
                let names: Vec<String> = several.iter().map(|file| file.path.display().to_string()).collect();
                bail!("expected --output with a folder for these files: {}", names.join(", "))
            }
        }
    })
}

fn on_loaded(
    files: &[PathBuf],
    environment: &Environment,
    work: impl FnOnce(&Loaded) -> anyhow::Result<()>,
) -> u8 {
    let loaded = match config::load(files, environment) {
        Ok(loaded) => loaded,
        Err(faults) => {
            complain(&anyhow::Error::new(faults));
            return WRONG_USAGE;
        }
    };
    match work(&loaded) {
        Ok(()) => DONE,
        Err(error) => {
            complain(&error);
            NOT_DONE
        }
    }
}

fn write(folder: &Path, files: &[File]) -> anyhow::Result<()> {
    for file in files {
        let path = folder.join(&file.path);
        let parent = path.parent().unwrap_or(folder);
        fs::create_dir_all(parent).with_context(|| format!("can't make {}", parent.display()))?;
        fs::write(&path, &file.text).with_context(|| format!("can't write {}", path.display()))?;
        print(&format!("{}\n", path.display()));
    }
    Ok(())
}

fn run_builder(dockerfile: &str, image: &str) -> anyhow::Result<()> {
    let folders = env::var_os("PATH").unwrap_or_default();
    let is_there = |name: &str| env::split_paths(&folders).any(|folder| folder.join(name).is_file());
    let Some((program, arguments)) = BUILDERS.iter().find(|(name, _)| is_there(name)) else {
        let names: Vec<&str> = BUILDERS.iter().map(|(name, _)| *name).collect();
        bail!(
            "expected one of {} in PATH to build the image with, found none; `modalkit image` prints the Dockerfile",
            names.join(", ")
        );
    };
    // By a file outside of the context, which all of them take; from standard input not all do.
    let mut file = tempfile::NamedTempFile::new().context("can't write the Dockerfile")?;
    file.write_all(dockerfile.as_bytes()).context("can't write the Dockerfile")?;
    let mut command = Command::new(program);
    command.args(*arguments).args(["--tag", image, "--file"]).arg(file.path()).arg(".");
    command.env("DOCKER_BUILDKIT", "1").stdin(Stdio::null());
    let status = command.status().with_context(|| format!("can't start {program}"))?;
    if !status.success() {
        bail!("{program} could not build {image}: {status}");
    }
    print(&format!("{image}\n"));
    Ok(())
}
