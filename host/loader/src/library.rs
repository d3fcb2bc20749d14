//! One opened library: handshake first, then layout, then calls.

use std::sync::{Arc, OnceLock};

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
use modalkit_abi::{
    ABI_VERSION, Description, HANDSHAKE_SYMBOL, Handshake, HostApi, LoadArgs, LogLevel, LogRecord, MAGIC,
    PluginModuleRef,
    abi_stable::{
        library::{AbiHeaderRef, LibHeader, LibraryError},
        std_types::{ROption, RResult},
    },
};

use crate::{Failure, Instance, Item, OpenError, Rejection, Staged};

/// Takes lines that plugins log: level, model (else plugin), target, message, fields.
pub type LogSink = fn(LogLevel, &str, &str, &str, &str);

static LOG_SINK: OnceLock<LogSink> = OnceLock::new();

/// An opened plugin. It stays mapped until the process ends: Rust libraries leave thread-locals and vtables behind
/// that make closing one unsound.
#[derive(Clone)]
pub struct Plugin {
    shared: Arc<Shared>,
}

struct Shared {
    module: PluginModuleRef,
    description: Description,
    sha256: String,
    rustc: &'static str,
    sdk: &'static str,
}

impl Plugin {
    /// Opens a staged copy.
    ///
    /// # Errors
    /// The file isn't a plugin that this host can run; see [`OpenError`].
    pub fn open(staged: &Staged) -> Result<Self, OpenError> {
        let (module, handshake) = take(staged.path())?;
        let description = match module.describe()() {
            RResult::ROk(description) => description,
            RResult::RErr(failure) => return Err(OpenError::Description { reason: failure.message.into() }),
        };
        Ok(Self {
            shared: Arc::new(Shared {
                module,
                description,
                sha256: staged.sha256().to_owned(),
                // SAFETY: the magic was checked, and the library is never closed.
                rustc: unsafe { handshake.rustc_version.get() },
                // SAFETY: as above.
                sdk: unsafe { handshake.sdk_version.get() },
            }),
        })
    }

    /// Sends what the plugin logs, down to `level`, to `sink`. The first sink of the process takes the lines of all
    /// plugins; a second call for a plugin changes its level.
    pub fn attach(&self, level: LogLevel, sink: LogSink) {
        LOG_SINK.get_or_init(|| sink);
        self.module().attach()(HostApi { log: forward, level });
    }

    /// Builds a pipeline; takes as long as the author's `load`.
    ///
    /// # Errors
    /// What the pipeline's `load` said.
    pub fn load(
        &self,
        model_name: &str,
        all_model_data_folder: &str,
        common_settings: &str,
        settings: &str,
    ) -> Result<Instance, Failure> {
        let args = LoadArgs {
            model_name: model_name.into(),
            all_model_data_folder: all_model_data_folder.into(),
            common_settings: common_settings.into(),
            settings: settings.into(),
        };
        self.module().load()(args).into_result().map(|handle| Instance::new(self.clone(), handle))
    }

    /// Parses one input, and validates it where an instance of this plugin is given.
    ///
    /// # Errors
    /// Why the input isn't one; [`Rejection::Busy`] where the instance can't look at it now.
    pub fn decode(&self, instance: Option<&Instance>, json: &[u8]) -> Result<Item, Rejection> {
        let instance = instance.filter(|instance| instance.plugin().is_same(self));
        let handle = instance.map(Instance::handle);
        // SAFETY: the handle is of a live instance of this library, checked the line before.
        let decoded = unsafe { self.module().decode()(ROption::from(handle), json.into()) };
        decoded.into_result().map(|item| Item::new(self.clone(), item, instance.is_some()))
    }

    /// The plugin crate's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.shared.description.name
    }

    /// The plugin crate's version.
    #[must_use]
    pub fn version(&self) -> &str {
        &self.shared.description.version
    }

    /// The compiler that built the plugin's SDK.
    #[must_use]
    pub fn rustc(&self) -> &str {
        self.shared.rustc
    }

    /// The version of the plugin's SDK.
    #[must_use]
    pub fn sdk(&self) -> &str {
        self.shared.sdk
    }

    /// JSON Schema of one input.
    #[must_use]
    pub fn input_schema(&self) -> &str {
        &self.shared.description.input_schema
    }

    /// JSON Schema of one output.
    #[must_use]
    pub fn output_schema(&self) -> &str {
        &self.shared.description.output_schema
    }

    /// SHA-256 of the file, in hexadecimal.
    #[must_use]
    pub fn sha256(&self) -> &str {
        &self.shared.sha256
    }

    pub(crate) fn module(&self) -> PluginModuleRef {
        self.shared.module
    }

    pub(crate) fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.shared, &other.shared)
    }
}

/// Opens a file and checks all that can be checked before plugin code runs.
fn take(path: &std::path::Path) -> Result<(PluginModuleRef, &'static Handshake), OpenError> {
    // Everything is bound now: a symbol that is missing must fail here and not in the middle of a request.
    // SAFETY: opening runs the library's constructors, which the preflight survived on the same bytes.
    let library = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_LOCAL) }
        .map_err(|error| OpenError::Unloadable { reason: linker_reason(&error) })?;
    // SAFETY: only the address is taken; what it points at is checked below.
    let handshake = unsafe { library.get::<*const Handshake>(HANDSHAKE_SYMBOL) }
        .map(|symbol| *symbol)
        .map_err(|_| OpenError::NotAPlugin)?;
    // Never closed; see `Plugin`. A refused library stays mapped as well, as its constructors have run.
    std::mem::forget(library);
    // SAFETY: a library that exports our symbol promises that it points to a `Handshake`, whose shape is frozen.
    let handshake: &'static Handshake = unsafe { &*handshake };
    check(handshake)?;
    let header = std::ptr::from_ref::<LibHeader>(handshake.header);
    // SAFETY: `AbiHeaderRef` is a transparent pointer to the first field of a `LibHeader`; the plugin has our ABI number,
    // so that is what it points to.
    let header: AbiHeaderRef = unsafe { std::mem::transmute(header) };
    let module = header
        .upgrade()
        .and_then(|header| header.init_root_module::<PluginModuleRef>())
        .map_err(|error| OpenError::Layout { difference: first_difference(&error) })?;
    Ok((module, handshake))
}

fn check(handshake: &Handshake) -> Result<(), OpenError> {
    if handshake.magic != MAGIC {
        return Err(OpenError::NotAPlugin);
    }
    if handshake.abi_version != ABI_VERSION {
        // SAFETY: the magic was checked, and the library is never closed.
        let (sdk, rustc) = unsafe { (handshake.sdk_version.get(), handshake.rustc_version.get()) };
        return Err(OpenError::AbiVersion {
            found: handshake.abi_version,
            sdk: sdk.into(),
            rustc: rustc.into(),
        });
    }
    if handshake.panic_aborts != 0 {
        return Err(OpenError::PanicAborts);
    }
    Ok(())
}

/// The linker's words without the private path, which means nothing to anyone.
fn linker_reason(error: &libloading::Error) -> String {
    let mut text = error.to_string();
    if let Some(source) = std::error::Error::source(error) {
        text = source.to_string();
    }
    text.split_once(".so: ").map_or(text.clone(), |(_, reason)| reason.to_owned())
}

/// abi_stable prints whole type trees; the first line that names a mismatch says enough.
fn first_difference(error: &LibraryError) -> String {
    let text = error.to_string();
    let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let start =
        lines.clone().position(|line| line.starts_with("error") || line.contains("xpected")).unwrap_or(0);
    lines.by_ref().skip(start).take(4).collect::<Vec<_>>().join(" ")
}

extern "C" fn forward(record: &LogRecord<'_>) {
    if let Some(sink) = LOG_SINK.get() {
        sink(
            record.level,
            record.model.as_str(),
            record.target.as_str(),
            record.message.as_str(),
            record.fields.as_str(),
        );
    }
}

#[cfg(test)]
mod tests {
    use modalkit_abi::{
        StaticStr,
        abi_stable::library::{CheckTypeLayout, RootModuleResult},
    };

    use super::*;

    extern "C" fn never_called() -> RootModuleResult {
        unreachable!("a refused plugin is not asked for its functions")
    }

    // SAFETY: the constructor returns nothing at all.
    static HEADER: LibHeader =
        unsafe { LibHeader::from_constructor::<PluginModuleRef>(never_called, CheckTypeLayout::Yes) };

    fn handshake() -> Handshake {
        Handshake {
            magic: MAGIC,
            abi_version: ABI_VERSION,
            panic_aborts: 0,
            sdk_version: StaticStr::new("7.8.9"),
            rustc_version: StaticStr::new("rustc 1.2.3"),
            header: &HEADER,
        }
    }

    #[test]
    fn a_handshake_is_refused_for_what_it_says_before_anything_is_called() {
        assert!(check(&handshake()).is_ok());
        let text = |handshake: &Handshake| check(handshake).unwrap_err().to_string();
        let older = text(&Handshake { abi_version: 99, ..handshake() });
        assert!(
            older.contains("plugin ABI 99 (SDK 7.8.9, rustc 1.2.3)") && older.contains("rebuild it"),
            "{older}"
        );
        let aborts = text(&Handshake { panic_aborts: 1, ..handshake() });
        assert!(aborts.contains("panic = \"abort\"") && aborts.contains("\"unwind\""), "{aborts}");
        assert!(text(&Handshake { magic: [0; 16], ..handshake() }).contains("exports no modalkit plugin"));
    }
}
