//! One opened library: handshake first, then layout, then calls.

use std::{
    collections::{BTreeMap, HashSet},
    fs, io,
    path::Path,
    sync::{Arc, OnceLock},
};

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
use modalkit_abi::{
    ABI_VERSION, DEBUG_ASSERTIONS_SYMBOL, Description, HANDSHAKE_SYMBOL, Handshake, HostApi, LeasedDevice,
    LoadArgs, LogLevel, LogRecord, MAGIC, PluginModuleRef, QUEUE_HANDSHAKE_SYMBOL, Secret,
    abi_stable::{
        library::{AbiHeaderRef, LibHeader, LibraryError, RootModule},
        std_types::{ROption, RResult},
    },
};
use rustix::fs::StatVfsMountFlags;

use crate::{
    Failure, Instance, Item, OpenError, Rejection, Staged, elf,
    ending::{self, Entered},
};

/// Takes lines that plugins log: level, model (else plugin), target, message, fields.
pub type LogSink = fn(LogLevel, &str, &str, &str, &str);

static LOG_SINK: OnceLock<LogSink> = OnceLock::new();

/// An opened plugin. It stays mapped until the process ends: Rust libraries leave thread-locals and vtables behind
/// that make closing one unsound.
#[derive(Clone)]
pub struct Plugin {
    shared: Arc<Shared>,
}

/// What a pipeline is loaded with.
pub struct Load<'a> {
    /// The model's name.
    pub model_name: &'a str,
    /// The folder that holds every model's data.
    pub all_model_data_folder: &'a str,
    /// What all models have in common: a JSON object.
    pub common_settings: &'a str,
    /// The model's own keys: a JSON object.
    pub settings: &'a str,
    /// Secrets by name.
    pub secrets: &'a BTreeMap<String, String>,
    /// The devices that it is given.
    pub devices: &'a [Device<'a>],
}

/// A device that an instance is given.
#[derive(Clone, Copy, Debug)]
pub struct Device<'a> {
    /// Its number in this process, as CUDA counts.
    pub ordinal: u32,
    /// As its maker calls it.
    pub name: &'a str,
    /// Its own for ever.
    pub uuid: &'a str,
    /// Bytes of all of its memory.
    pub memory_bytes: u64,
    /// Bytes that the instance may use; `None` for all.
    pub memory_budget_bytes: Option<u64>,
}

struct Shared {
    module: PluginModuleRef,
    description: Description,
    /// Keeps the file where debuggers look for it.
    staged: Staged,
    rustc: &'static str,
    sdk: &'static str,
    has_debug_assertions: bool,
}

impl Plugin {
    /// Opens a staged copy.
    ///
    /// # Errors
    /// The file isn't a plugin that this host can run; see [`OpenError`].
    pub fn open(staged: &Staged) -> Result<Self, OpenError> {
        let Taken { module, handshake, has_debug_assertions } =
            take::<PluginModuleRef>(staged.path(), HANDSHAKE_SYMBOL)?;
        let _code = Entered::new("", "description");
        let description = match module.describe()() {
            RResult::ROk(description) => description,
            RResult::RErr(failure) => return Err(OpenError::Description { reason: failure.message.into() }),
        };
        Ok(Self {
            shared: Arc::new(Shared {
                module,
                description,
                staged: staged.clone(),
                // SAFETY: the magic was checked, and the library is never closed.
                rustc: unsafe { handshake.rustc_version.get() },
                // SAFETY: as above.
                sdk: unsafe { handshake.sdk_version.get() },
                has_debug_assertions,
            }),
        })
    }

    /// Sends what the plugin logs, down to `level`, to `sink`. The first sink of the process takes the lines of all
    /// plugins; a second call for a plugin changes its level.
    pub fn attach(&self, level: LogLevel, sink: LogSink) {
        set_log_sink(sink);
        self.module().attach()(HostApi { log: forward, level });
    }

    /// Says whether a JSON object is what the pipeline takes as a model's own keys.
    ///
    /// # Errors
    /// Why it isn't.
    pub fn check_settings(&self, settings: &str) -> Result<(), Failure> {
        let _code = Entered::new(self.name(), "check of settings");
        self.module().check_settings()(settings.into()).into_result()
    }

    /// Builds a pipeline; takes as long as the author's `load`.
    ///
    /// # Errors
    /// What the pipeline's `load` said.
    pub fn load<'a>(&self, with: &Load<'a>) -> Result<Instance, Failure> {
        let secrets: Vec<Secret<'_>> = with
            .secrets
            .iter()
            .map(|(name, value)| Secret { name: name.as_str().into(), value: value.as_str().into() })
            .collect();
        let leased = |device: &Device<'a>| LeasedDevice {
            ordinal: device.ordinal,
            name: device.name.into(),
            uuid: device.uuid.into(),
            memory_bytes: device.memory_bytes,
            memory_budget_bytes: device.memory_budget_bytes.into(),
        };
        let devices: Vec<LeasedDevice<'a>> = with.devices.iter().map(leased).collect();
        let args = LoadArgs {
            model_name: with.model_name.into(),
            all_model_data_folder: with.all_model_data_folder.into(),
            common_settings: with.common_settings.into(),
            settings: with.settings.into(),
            secrets: secrets.as_slice().into(),
            devices: devices.as_slice().into(),
        };
        let _code = Entered::new(with.model_name, "load");
        let loaded = self.module().load()(args).into_result();
        loaded.map(|handle| Instance::new(self.clone(), with.model_name.into(), handle))
    }

    /// Parses one input, and validates it where an instance of this plugin is given.
    ///
    /// # Errors
    /// Why the input isn't one; [`Rejection::Busy`] where the instance can't look at it now.
    pub fn decode(&self, instance: Option<&Instance>, json: &[u8]) -> Result<Item, Rejection> {
        let instance = instance.filter(|instance| instance.plugin().is_same(self));
        let handle = instance.map(Instance::handle);
        let _code = Entered::new(instance.map_or(self.name(), Instance::model), "decode");
        // SAFETY: the handle is of a live instance of this library, checked before.
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

    /// Whether it says that it was built for debugging: it is many times slower then.
    #[must_use]
    pub fn has_debug_assertions(&self) -> bool {
        self.shared.has_debug_assertions
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

    /// JSON Schema of the model's own keys.
    #[must_use]
    pub fn settings_schema(&self) -> &str {
        &self.shared.description.settings_schema
    }

    /// SHA-256 of the file, in hexadecimal.
    #[must_use]
    pub fn sha256(&self) -> &str {
        self.shared.staged.sha256()
    }

    /// Copies its file.
    ///
    /// # Errors
    /// It was swept away, or can't be written there.
    pub fn copy_to(&self, path: &Path) -> io::Result<()> {
        fs::copy(self.shared.staged.path(), path).map(drop)
    }

    pub(crate) fn module(&self) -> PluginModuleRef {
        self.shared.module
    }

    /// Whether both are the same opened library.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.shared, &other.shared)
    }
}

/// Bytes of memory that these libraries keep until the process ends: the resident part of their mappings, pages that are
/// shared with other processes by their share. 0 where the kernel doesn't say.
#[must_use]
pub fn mapped_bytes<'p>(plugins: impl IntoIterator<Item = &'p Plugin>) -> u64 {
    // The kernel names files by their real paths.
    let path =
        |plugin: &Plugin| plugin.shared.staged.path().canonicalize().ok()?.to_str().map(ToOwned::to_owned);
    let paths: HashSet<String> = plugins.into_iter().filter_map(path).collect();
    // A file of some milliseconds: for reports, not for every request.
    let maps = fs::read_to_string("/proc/self/smaps").unwrap_or_default();
    let mut counts = false;
    let mut kibibytes = 0;
    for line in maps.lines() {
        if let Some(pss) = line.strip_prefix("Pss:") {
            let pss: u64 = pss.trim().trim_end_matches("kB").trim().parse().unwrap_or(0);
            kibibytes += if counts { pss } else { 0 };
        } else if let Some((range, rest)) = line.split_once(' ')
            && range.contains('-')
        {
            counts = rest.find('/').is_some_and(|start| paths.contains(&rest[start..]));
        }
    }
    kibibytes * 1024
}

/// What a library exports.
pub(crate) struct Taken<M> {
    pub(crate) module: M,
    pub(crate) handshake: &'static Handshake,
    pub(crate) has_debug_assertions: bool,
}

/// Opens a file and checks all that can be checked before plugin code runs.
pub(crate) fn take<M: RootModule>(path: &Path, symbol: &[u8]) -> Result<Taken<M>, OpenError> {
    elf::check(path)?;
    let _code = Entered::new("", "constructors");
    // Everything is bound now: a symbol that is missing must fail here and not in the middle of a request.
    // SAFETY: opening runs the library's constructors, which the preflight survived on the same bytes.
    let library = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_LOCAL) }
        .map_err(|error| unloadable(path, &error))?;
    // SAFETY: only the address is taken; what it points at is checked below.
    let handshake = unsafe { library.get::<*const Handshake>(symbol) }.map(|symbol| *symbol).ok();
    // SAFETY: as above.
    let is_queue = unsafe { library.get::<*const Handshake>(QUEUE_HANDSHAKE_SYMBOL) }.is_ok();
    // SAFETY: only the address is taken; it is one byte, which the SDK exports beside the handshake.
    let debug = unsafe { library.get::<*const u8>(DEBUG_ASSERTIONS_SYMBOL) }.map(|symbol| *symbol).ok();
    // Where it can't be, its destructors run first at an `exit`: that is all.
    let _ = ending::watch_exit();
    // Never closed; see `Plugin`. A refused library stays mapped as well, as its constructors have run.
    std::mem::forget(library);
    let handshake = handshake.ok_or(if is_queue { OpenError::IsAQueue } else { OpenError::NotAPlugin })?;
    // SAFETY: the library stays mapped, and what its symbol points at is looked at before it is taken for more than bytes.
    let handshake = unsafe { accept(handshake) }?;
    let header = std::ptr::from_ref::<LibHeader>(handshake.header);
    // SAFETY: `AbiHeaderRef` is a transparent pointer to the first field of a `LibHeader`; the plugin has our ABI number,
    // so that is what it points to.
    let header: AbiHeaderRef = unsafe { std::mem::transmute(header) };
    let module = header
        .upgrade()
        .and_then(|header| header.init_root_module::<M>())
        .map_err(|error| OpenError::Layout { difference: first_difference(&error) })?;
    // SAFETY: the library stays mapped, and with the symbol goes a byte.
    let has_debug_assertions = debug.is_some_and(|byte| unsafe { byte.read() } != 0);
    Ok(Taken { module, handshake, has_debug_assertions })
}

/// Takes what a library's symbol points at for a handshake, once its magic, its place and its ABI number say that it is one: only
/// then are all of its fields what their types say.
///
/// # Safety
/// It points into a library that is never closed, or at a `Handshake` that lives as long.
unsafe fn accept(handshake: *const Handshake) -> Result<&'static Handshake, OpenError> {
    if handshake.is_null() {
        return Err(OpenError::NotAPlugin);
    }
    // SAFETY: bytes of any value and at any place; that so many are mapped, the preflight survived on the same file.
    let magic = unsafe { handshake.cast::<[u8; MAGIC.len()]>().read_unaligned() };
    if magic != MAGIC || !handshake.is_aligned() {
        return Err(OpenError::NotAPlugin);
    }
    // SAFETY: with our magic it has the fields that are frozen for all ABI versions. Each is read by itself, since what the last
    // one, a reference, leads to is not.
    let (abi_version, panic_aborts, sdk, rustc, header) = unsafe {
        (
            (&raw const (*handshake).abi_version).read(),
            (&raw const (*handshake).panic_aborts).read(),
            (&raw const (*handshake).sdk_version).read(),
            (&raw const (*handshake).rustc_version).read(),
            (&raw const (*handshake).header).cast::<*const LibHeader>().read(),
        )
    };
    if abi_version != ABI_VERSION {
        // SAFETY: the magic was checked, and the library is never closed.
        let (sdk, rustc) = unsafe { (sdk.get(), rustc.get()) };
        return Err(OpenError::AbiVersion { found: abi_version, sdk: sdk.into(), rustc: rustc.into() });
    }
    if panic_aborts != 0 {
        return Err(OpenError::PanicAborts);
    }
    if header.is_null() {
        return Err(OpenError::NotAPlugin);
    }
    // SAFETY: it has our magic and our ABI number, is aligned, and none of its fields is what its type forbids.
    Ok(unsafe { &*handshake })
}

/// The linker's words without the private path, which means nothing to anyone.
fn unloadable(path: &Path, error: &libloading::Error) -> OpenError {
    let text = std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string);
    let folder = path.parent().unwrap_or(path);
    // Where the system doesn't say it, the linker's words are all that there is.
    let mount = rustix::fs::statvfs(folder).map_or(StatVfsMountFlags::empty(), |about| about.f_flag);
    in_words(folder, mount, &text)
}

fn in_words(folder: &Path, mount: StatVfsMountFlags, text: &str) -> OpenError {
    // A security policy is no flag of a mount; glibc's words for what that does.
    let forbidden = || text.contains("failed to map segment") && text.contains("not permitted");
    if mount.contains(StatVfsMountFlags::NOEXEC) || forbidden() {
        return OpenError::NoExec { folder: folder.to_owned() };
    }
    // glibc's words for a library that another one needs; a file that we named ourselves is there.
    if let Some((name, _)) = text.split_once(": cannot open shared object file") {
        return OpenError::MissingLibrary { name: name.to_owned(), beside: false };
    }
    let reason = text.split_once(".so: ").map_or(text, |(_, reason)| reason).to_owned();
    OpenError::Unloadable { reason }
}

/// abi_stable prints whole type trees, those of both sides for every difference; the first difference says enough.
fn first_difference(error: &LibraryError) -> String {
    match error {
        LibraryError::IncompatibleVersionNumber { expected_version, actual_version, .. } => {
            format!("expected modalkit-abi {expected_version}, found {actual_version}")
        }
        other => condense(&other.to_string()),
    }
}

/// The first mismatch in abi_stable's report: of which type, what was expected, what was found.
fn condense(report: &str) -> String {
    let lines: Vec<&str> = report.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let Some(error) = lines.iter().position(|line| line.starts_with("Error:")) else {
        return brief(&lines);
    };
    let inside = lines[..error].iter().rposition(|line| line.ends_with("inside:")).unwrap_or(0);
    let of = lines[inside..error].iter().find_map(|line| line.strip_prefix("type:")).unwrap_or("the table");
    let what = lines[error].trim_start_matches("Error:");
    let rest = &lines[error + 1..];
    let end = rest.iter().position(|line| line.starts_with("Error:")).unwrap_or(rest.len());
    let rest = &rest[..end];
    match rest.iter().position(|line| *line == "Found:") {
        Some(found) if rest.first() == Some(&"Expected:") => {
            format!(
                "in {of}, {what}: expected {}, found {}",
                brief(&rest[1..found]),
                brief(&rest[found + 1..])
            )
        }
        _ => format!("in {of}, {what}: {}", brief(rest)),
    }
}

fn brief(lines: &[&str]) -> String {
    let words = lines.join(" ");
    match words.char_indices().nth(DIFFERENCE_CHARS) {
        Some((end, _)) => format!("{}...", &words[..end]),
        None => words,
    }
}

/// What is shown of each side of a difference.
const DIFFERENCE_CHARS: usize = 120;

/// Sends what plugins log here; the first one stays.
pub(crate) fn set_log_sink(sink: LogSink) {
    LOG_SINK.get_or_init(|| sink);
}

pub(crate) extern "C" fn forward(record: &LogRecord<'_>) {
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
    fn of_a_report_the_first_difference_is_told() {
        let report = "Compared <this>:\n  --- Type Layout ---\n  type:Ref\nTo <other>:\n  type:Ref\n\n0 error(s).\n\n\
                      1 error(s)inside:\n    <other>\n    field_name:0\n    type:PluginModule\n\n\
                      Layout of expected type:\n  type:Other\n\n\
                      Error:too many fields\nExpected:\n    14\nFound:\n    15\n\nError:another\nExpected:\n 1\nFound:\n 2\n";
        assert_eq!(condense(report), "in PluginModule, too many fields: expected 14, found 15");
        assert_eq!(condense("something else\n\n  entirely"), "something else entirely");
    }

    fn text(handshake: *const Handshake) -> String {
        // SAFETY: whatever it is, it lives as long as this call, and a refused one is kept by nobody.
        unsafe { accept(handshake) }.err().map(|error| error.to_string()).unwrap_or_default()
    }

    #[test]
    fn a_handshake_is_refused_for_what_it_says_before_anything_is_called() {
        let text = |handshake: Handshake| text(&raw const handshake);
        assert_eq!(text(handshake()), "");
        let older = text(Handshake { abi_version: 99, ..handshake() });
        assert!(
            older.contains("plugin ABI 99 (SDK 7.8.9, rustc 1.2.3)") && older.contains("rebuild it"),
            "{older}"
        );
        let aborts = text(Handshake { panic_aborts: 1, ..handshake() });
        assert!(aborts.contains("panic = \"abort\"") && aborts.contains("\"unwind\""), "{aborts}");
        assert!(text(Handshake { magic: [0; 16], ..handshake() }).contains("exports no modalkit plugin"));
    }

    #[test]
    fn what_is_no_handshake_is_never_taken_for_one() {
        let no_plugin = "exports no modalkit plugin";
        assert!(text(std::ptr::null()).contains(no_plugin));
        // Shorter than a handshake, and then at a place where none can be.
        assert!(text([0x5a_u8; 16].as_ptr().cast()).contains(no_plugin));
        let mut bytes = [0_u8; 2 * size_of::<Handshake>()];
        let odd = bytes.as_ptr().align_offset(align_of::<Handshake>()) + 1;
        bytes[odd..odd + MAGIC.len()].copy_from_slice(&MAGIC);
        assert!(text(bytes[odd..].as_ptr().cast()).contains(no_plugin));
        // Of another ABI, with a header that no reference could be: its words are told, and nothing more of it is touched.
        #[repr(C, align(8))]
        struct Other([u8; 16], u32, u32, StaticStr, StaticStr, usize);
        let (sdk, rustc) = (StaticStr::new("9.9.9"), StaticStr::new("rustc 9"));
        let other = Other(MAGIC, 999, 0, sdk, rustc, 0);
        assert!(text((&raw const other).cast()).contains("plugin ABI 999 (SDK 9.9.9, rustc 9)"));
        let ours = Other(MAGIC, ABI_VERSION, 0, sdk, rustc, 0);
        assert!(text((&raw const ours).cast()).contains(no_plugin));
    }

    #[test]
    fn a_place_without_permission_to_run_code_is_told_from_a_broken_file() {
        let folder = Path::new("/tmp/modalkit-plugins-x");
        let said = "/tmp/modalkit-plugins-x/0a.so: failed to map segment from shared object";
        let none = StatVfsMountFlags::empty();
        // The mount's flag decides, in whatever words and language the linker says it.
        for (mount, said) in [
            (none, format!("{said}: Operation not permitted")),
            (StatVfsMountFlags::NOEXEC | StatVfsMountFlags::NOSUID, "im anderen Wortlaut".to_owned()),
        ] {
            let text = in_words(folder, mount, &said).to_string();
            assert!(text.contains("/tmp/modalkit-plugins-x") && text.contains("noexec"), "{text}");
            assert!(text.contains("TMPDIR"), "{text}");
        }
        for mount in [none, StatVfsMountFlags::NOSUID] {
            assert!(matches!(in_words(folder, mount, said), OpenError::Unloadable { .. }));
        }
    }
}
