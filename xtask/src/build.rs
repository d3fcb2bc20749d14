//! Builds host and plugins, and puts plugins into a volume in one step: a host that watches never sees half a file.

use std::{
    env, fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, bail};

/// Extensions of what is a model's data, and not how it was made.
const MODEL_DATA: [&str; 4] = ["onnx", "npy", "labels", "corpus"];

/// Runs cargo and shows its progress.
pub(crate) fn cargo<S: AsRef<str>>(args: &[S]) -> anyhow::Result<()> {
    run(&mut command(args))
}

/// The cargo that runs this program, with these arguments.
pub(crate) fn command<S: AsRef<str>>(args: &[S]) -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(args.iter().map(AsRef::as_ref));
    // Cargo tells this program which package it is of. Build scripts of others that ask for the same variables would take it for a change.
    let of_this_package = |name: &str| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_");
    for (name, _) in env::vars_os() {
        if name.to_str().is_some_and(of_this_package) {
            command.env_remove(name);
        }
    }
    command
}

/// Runs a command to its end; a failure names it.
pub(crate) fn run(command: &mut Command) -> anyhow::Result<()> {
    let words: Vec<_> = std::iter::once(command.get_program()).chain(command.get_args()).collect();
    let line = words.iter().map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ");
    println!("$ {line}");
    let status = command.status().with_context(|| format!("can't start {line}"))?;
    if !status.success() {
        bail!("{line}: {status}");
    }
    Ok(())
}

/// Stands in the manifest of a plugin that `run` doesn't build.
const WANTS_A_MODEL: &str = "wants-a-model = true";

/// The plugins of this workspace, by folder.
pub(crate) fn plugins() -> anyhow::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir("plugins").context("can't read plugins/")? {
        let entry = entry?;
        if entry.path().join("Cargo.toml").is_file() {
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    names.sort();
    Ok(names)
}

/// Whether a plugin has something to serve: not where it says that it wants a model of whoever runs it.
pub(crate) fn serves_by_itself(name: &str) -> bool {
    let manifest = fs::read_to_string(format!("plugins/{name}/Cargo.toml")).unwrap_or_default();
    !manifest.lines().any(|line| line.trim() == WANTS_A_MODEL)
}

/// Builds one plugin in release.
pub(crate) fn plugin(name: &str) -> anyhow::Result<()> {
    let known = plugins()?;
    if !known.iter().any(|plugin| plugin == name) {
        bail!(
            "no plugin {name:?} in plugins/; expected one of {known:?}, or make it with `cargo xtask new-plugin {name}`"
        );
    }
    cargo(&["build", "--release", "--package", name])
}

/// Installs a plugin that was built into this folder, and the data that lies beside its source in `model/`.
pub(crate) fn install(name: &str, built: &Path, volume: &Path) -> anyhow::Result<PathBuf> {
    make_volume(volume)?;
    for model in fs::read_dir(format!("plugins/{name}/model")).into_iter().flatten().flatten() {
        if model.path().extension().is_some_and(|kind| MODEL_DATA.iter().any(|known| kind == *known)) {
            put(&model.path(), &volume.join(model.file_name()))?;
        }
    }
    let library = built.join(format!("lib{}.so", name.replace('-', "_")));
    let installed = volume.join(format!("{name}.so"));
    put(&library, &installed)?;
    Ok(installed)
}

/// Makes the folder that is watched, and sees that it is fit for code: the host takes no plugin from one that others may
/// write, and with a umask of 002, as many systems have it, what is made here would be such a one.
fn make_volume(volume: &Path) -> anyhow::Result<()> {
    let made = fs::create_dir_all(volume).and_then(|()| fs::metadata(volume)).and_then(|metadata| {
        let mode = metadata.permissions().mode();
        if mode & 0o022 == 0 {
            return Ok(());
        }
        fs::set_permissions(volume, fs::Permissions::from_mode(mode & !0o022))
    });
    made.with_context(|| format!("can't make {} a folder that only its owner may write", volume.display()))
}

/// Where cargo puts what it builds in release.
pub(crate) fn release() -> PathBuf {
    target().join("release")
}

/// Where cargo puts what it builds.
pub(crate) fn target() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| "target".into(), PathBuf::from)
}

/// Copies to a hidden name of its own beside the target, then renames: another command may install the same at the same time.
fn put(from: &Path, to: &Path) -> anyhow::Result<()> {
    let name = to.file_name().context("the target has a name")?.to_string_lossy();
    let part = to.with_file_name(format!(".{name}.{}.part", std::process::id()));
    fs::copy(from, &part)
        .and_then(|_| fs::set_permissions(&part, fs::Permissions::from_mode(0o644)))
        .with_context(|| format!("can't copy {} to {}", from.display(), part.display()))?;
    fs::rename(&part, to).with_context(|| format!("can't rename {} to {}", part.display(), to.display()))
}
