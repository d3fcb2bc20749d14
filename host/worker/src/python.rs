//! A pipeline in Python: which interpreter runs it, and with what. The interpreter is the user's own; what it runs first is this crate's package
//! (`python/`), which the program carries. It never knows how a process is started.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use modalkit_engine::{Engine, LoadError, Python, Staged, tree};
use serde::{Deserialize, Serialize};

macro_rules! package {
    ($($path:literal)+) => { &[$(($path, include_str!(concat!("../python/", $path)))),+] };
}

/// The package, by the paths of its files.
const PACKAGE: &[(&str, &str)] = package!(
    "__main__.py"
    "modalkit_worker/__init__.py"
    "modalkit_worker/code.py"
    "modalkit_worker/encoding.py"
    "modalkit_worker/frames.py"
    "modalkit_worker/items.py"
    "modalkit_worker/output.py"
    "modalkit_worker/pipelines.py"
    "modalkit_worker/serving.py"
    "modalkit_worker/streams.py"
    "modalkit_worker/tensors.py"
    "modalkit_worker/told.py"
    "shim/modal/__init__.py"
    "shim/modal/experimental.py"
    "shim/modalkit/__init__.py"
    "shim/modalkit/auth.py"
    "shim/modalkit/exceptions.py"
    "shim/modalkit/fast_api.py"
    "shim/modalkit/inference.py"
    "shim/modalkit/inference_pipeline.py"
    "shim/modalkit/iomodel.py"
    "shim/modalkit/logger.py"
    "shim/modalkit/modal_config.py"
    "shim/modalkit/modal_service.py"
    "shim/modalkit/modalapp.py"
    "shim/modalkit/modalutils.py"
    "shim/modalkit/settings.py"
    "shim/modalkit/task_queue.py"
    "shim/modalkit/utils.py"
);
/// Where it is put is named after this.
const PACKAGE_NAME: &str = "modalkit-worker-of-python";
/// What stands for code that people put beside their own, where they import what the Python library has.
const SHIM: &str = "shim";
/// The interpreter where a folder has no environment of its own.
const OF_SYSTEM: &str = "python3";
/// What belongs to an interpreter below the root of its environment or installation: not all that may lie there.
const INSTALLED: [&str; 7] = [tree::VENV, "bin", "lib", "lib64", "include", "share", "ssl"];
/// Threads of libraries that compute, by the variables that they read before they are loaded.
const THREADS: [&str; 4] =
    ["OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS"];

/// What runs a folder.
#[derive(Clone, Debug)]
pub(crate) struct Interpreter {
    path: PathBuf,
    folder: PathBuf,
    package: Staged,
    python: Python,
}

/// What a worker is told of it.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub(crate) struct PythonDocument {
    /// The interpreter, and the package's folder, which it runs.
    pub(crate) interpreter: PathBuf,
    pub(crate) package: PathBuf,
    /// The user's own folder, and what is searched after it, if anything.
    pub(crate) folder: PathBuf,
    pub(crate) shim: Option<PathBuf>,
    pub(crate) pipeline: Option<String>,
    pub(crate) input_model: Option<String>,
    pub(crate) output_model: Option<String>,
    pub(crate) environment: BTreeMap<String, String>,
}

/// Puts the package where interpreters find it.
pub(crate) fn put_package(engine: &dyn Engine) -> Result<Staged, LoadError> {
    let file = |(path, text): &(&str, &str)| (PathBuf::from(path), text.as_bytes().to_vec());
    let files: Vec<(PathBuf, Vec<u8>)> = PACKAGE.iter().map(file).collect();
    engine.put(Path::new(PACKAGE_NAME), &files)
}

impl PythonDocument {
    /// What it has to read: the folder, the package, the environment, and where the interpreter itself is installed.
    pub(crate) fn readable(&self) -> Vec<PathBuf> {
        let mut readable = vec![self.folder.clone(), self.package.clone(), self.interpreter.clone()];
        for root in roots(&self.interpreter) {
            readable.extend(INSTALLED.iter().map(|inside| root.join(inside)));
        }
        readable
    }
}

/// The environment that a program lies in, and where it is installed, if that is elsewhere.
fn roots(program: &Path) -> Vec<PathBuf> {
    let installed = program.canonicalize().unwrap_or_else(|_| program.to_owned());
    let root = |path: &Path| path.parent().and_then(Path::parent).map(Path::to_owned);
    let mut roots: Vec<PathBuf> = [program, &installed].into_iter().filter_map(root).collect();
    roots.dedup();
    roots
}

/// The absolute path of a program that is looked for where programs are.
fn in_path(program: &str) -> Option<PathBuf> {
    let folders = std::env::var_os("PATH")?;
    let folders = std::env::split_paths(&folders).filter(|folder| folder.is_absolute());
    folders.map(|folder| folder.join(program)).find(|path| path.is_file())
}

impl Interpreter {
    /// The interpreter of an entry, or of a folder's own environment, or the system's.
    ///
    /// # Errors
    /// The entry names one that isn't there, or there is none at all.
    pub(crate) fn find(folder: &Path, python: &Python, package: Staged) -> Result<Self, LoadError> {
        let path = match &python.interpreter {
            Some(named) => {
                let path = folder.join(named);
                if !path.is_file() {
                    return Err(LoadError::Refused(format!(
                        "expected the interpreter {} (python.interpreter), and there is no such file",
                        path.display()
                    )));
                }
                path
            }
            None => {
                tree::interpreter(folder).or_else(|| in_path(OF_SYSTEM)).ok_or_else(|| {
                    LoadError::Refused(format!(
                        "expected an interpreter, and there is neither .venv/bin/python in {folder} nor {OF_SYSTEM} in PATH: make an environment with `python3 -m venv {folder}/.venv` or `uv venv`",
                        folder = folder.display(),
                    ))
                })?
            }
        };
        Ok(Self { path, folder: folder.to_owned(), package, python: python.clone() })
    }

    /// What of it is no copy: the program, what says where its environment's own one is, and the folders that it imports from.
    pub(crate) fn used_in_place(&self) -> (Vec<PathBuf>, Vec<PathBuf>) {
        let roots = roots(&self.path);
        let configuration = roots.iter().map(|root| root.join(tree::VENV)).filter(|path| path.is_file());
        let files = std::iter::once(self.path.clone()).chain(configuration).collect();
        (files, roots.iter().flat_map(|root| tree::import_folders(root)).collect())
    }

    /// What tells it from others: which interpreter it is, and in which folder.
    pub(crate) fn place(&self) -> (&Path, &Path) {
        (&self.path, &self.folder)
    }

    pub(crate) fn document(&self, cores: Option<f64>) -> PythonDocument {
        let package = self.package.path().to_owned();
        let threads = self.python.threads.or(cores.map(|cores| cores.ceil() as u32));
        let mut environment: BTreeMap<String, String> = threads
            .into_iter()
            .flat_map(|threads| THREADS.map(|name| (name.to_owned(), threads.to_string())))
            .collect();
        environment.extend(self.python.environment.clone());
        PythonDocument {
            interpreter: self.path.clone(),
            shim: self.python.shim.then(|| package.join(SHIM)),
            package,
            folder: self.folder.clone(),
            pipeline: self.python.pipeline.clone(),
            input_model: self.python.input_model.clone(),
            output_model: self.python.output_model.clone(),
            environment,
        }
    }
}
