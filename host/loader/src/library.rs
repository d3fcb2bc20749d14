//! One opened library: handshake first, then layout, then calls.

use std::{
    path::Path,
    sync::{Arc, OnceLock},
};

use libloading::os::unix::{Library as DynamicLibrary, RTLD_LOCAL, RTLD_NOW};
use modalkit_abi::{
    ABI_MAJOR, ABI_MINOR, DEBUG_ASSERTIONS_SYMBOL, Features, HANDSHAKE_SYMBOL, Handshake, HostApi,
    HostApiRef, MAGIC, NEEDS_SYMBOL, Needs, PluginModuleRef, QUEUE_HANDSHAKE_SYMBOL,
    abi_stable::{
        StableAbi,
        abi_stability::abi_checking::check_layout_compatibility,
        library::{AbiHeaderRef, LibHeader, LibraryError, RootModule},
        prefix_type::PrefixTypeTrait,
        std_types::{RResult, RStr, RString},
    },
};
use modalkit_engine::{Description, LogLevel, PluginLog, Staged};
use rustix::fs::StatVfsMountFlags;
use serde::Deserialize;

use crate::{
    convert, document, elf,
    ending::{self, Entered},
    error::{self, OpenError},
};

static LOG: OnceLock<PluginLog> = OnceLock::new();

/// An opened library, of either kind.
pub(crate) trait Library: Clone {
    /// Sends what the plugin logs, down to this level, to the log. The first log of the process takes the lines of all plugins; a second call for a
    /// plugin changes its level.
    fn attach(&self, level: LogLevel, log: &PluginLog);
}

/// An opened library of a pipeline. It stays mapped until the process ends: Rust libraries leave thread-locals and vtables behind
/// that make closing one unsound.
#[derive(Clone)]
pub(crate) struct PipelineLibrary {
    shared: Arc<Shared>,
}

struct Shared {
    module: PluginModuleRef,
    /// Its copy stays where debuggers look for it.
    description: Description,
}

impl PipelineLibrary {
    /// Opens a staged copy.
    ///
    /// # Errors
    /// The file isn't a plugin that this host can run; see [`OpenError`].
    pub(crate) fn open(staged: &Staged) -> Result<Self, OpenError> {
        let Taken { module, handshake, abi_minor, has_debug_assertions } =
            take::<PluginModuleRef>(staged.path(), HANDSHAKE_SYMBOL)?;
        let _code = Entered::new("", "description");
        let described = described(module.describe()())?;
        let said: document::Description<'_> = described_in(&described)?;
        let description = Description {
            name: said.name,
            version: said.version,
            abi: error::number(handshake.abi_major, abi_minor),
            // SAFETY: the magic was checked, and the library is never closed.
            sdk: unsafe { handshake.sdk_version.get() }.to_owned(),
            // SAFETY: as above.
            rustc: unsafe { handshake.rustc_version.get() }.to_owned(),
            has_debug_assertions,
            input_schema: said.input_schema.get().to_owned(),
            output_schema: said.output_schema.get().to_owned(),
            settings_schema: said.settings_schema.get().to_owned(),
            staged: staged.clone(),
        };
        Ok(Self { shared: Arc::new(Shared { module, description }) })
    }

    pub(crate) fn module(&self) -> PluginModuleRef {
        self.shared.module
    }

    /// The plugin crate's name.
    pub(crate) fn name(&self) -> &str {
        &self.shared.description.name
    }

    pub(crate) fn about(&self) -> &Description {
        &self.shared.description
    }

    /// Whether both are the same opened library.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.shared, &other.shared)
    }
}

impl Library for PipelineLibrary {
    fn attach(&self, level: LogLevel, log: &PluginLog) {
        self.module().attach()(host_api(log), convert::level_of_plugins(level));
    }
}

/// A description, or why there is none.
pub(crate) fn described(said: RResult<RString, modalkit_abi::Failure>) -> Result<RString, OpenError> {
    said.into_result().map_err(|failure| OpenError::Description { reason: failure.message.into() })
}

/// Reads a description.
pub(crate) fn described_in<'a, T: Deserialize<'a>>(document: &'a RString) -> Result<T, OpenError> {
    let reason = |error| format!("its description is none that this host reads: {error}");
    serde_json::from_str(document).map_err(|error| OpenError::Description { reason: reason(error) })
}

/// What a library exports.
pub(crate) struct Taken<M> {
    pub(crate) module: M,
    pub(crate) handshake: &'static Handshake,
    pub(crate) abi_minor: u32,
    pub(crate) has_debug_assertions: bool,
}

/// Opens a file and checks all that can be checked before plugin code runs.
pub(crate) fn take<M: RootModule>(path: &Path, symbol: &[u8]) -> Result<Taken<M>, OpenError> {
    elf::check(path)?;
    let _code = Entered::new("", "constructors");
    // Everything is bound now: a symbol that is missing must fail here and not in the middle of a request.
    // SAFETY: opening runs the library's constructors, which the preflight survived on the same bytes.
    let library = unsafe { DynamicLibrary::open(Some(path), RTLD_NOW | RTLD_LOCAL) }
        .map_err(|error| unloadable(path, &error))?;
    // SAFETY: only the address is taken; what it points at is checked below.
    let handshake = unsafe { library.get::<*const Handshake>(symbol) }.map(|symbol| *symbol).ok();
    // SAFETY: as above.
    let is_queue = unsafe { library.get::<*const Handshake>(QUEUE_HANDSHAKE_SYMBOL) }.is_ok();
    // SAFETY: as above.
    let needs = unsafe { library.get::<*const Needs>(NEEDS_SYMBOL) }.map(|symbol| *symbol).ok();
    // SAFETY: only the address is taken; it is one byte, which the SDK exports beside the handshake.
    let debug = unsafe { library.get::<*const u8>(DEBUG_ASSERTIONS_SYMBOL) }.map(|symbol| *symbol).ok();
    // Where it can't be, its destructors run first at an `exit`: that is all.
    let _ = ending::watch_exit();
    // Never closed; see `PipelineLibrary`. A refused library stays mapped as well, as its constructors have run.
    std::mem::forget(library);
    let handshake = handshake.ok_or(if is_queue { OpenError::IsAQueue } else { OpenError::NotAPlugin })?;
    // SAFETY: the library stays mapped, and what its symbol points at is looked at before it is taken for more than bytes.
    let (handshake, abi_minor) = unsafe { accept(handshake, needs) }?;
    let header = std::ptr::from_ref::<LibHeader>(handshake.header);
    // SAFETY: `AbiHeaderRef` is a transparent pointer to the first field of a `LibHeader`; the plugin has our ABI number,
    // so that is what it points to.
    let header: AbiHeaderRef = unsafe { std::mem::transmute(header) };
    let module = init_module(header)?;
    // SAFETY: the library stays mapped, and with the symbol goes a byte.
    let has_debug_assertions = debug.is_some_and(|byte| unsafe { byte.read() } != 0);
    Ok(Taken { module, handshake, abi_minor, has_debug_assertions })
}

/// The table behind a header, once its layout was found to be the host's, or the beginning of it.
fn init_module<M: RootModule>(header: AbiHeaderRef) -> Result<M, OpenError> {
    let unfit = |error: &LibraryError| OpenError::Layout { difference: first_difference(error) };
    let header = header.upgrade().map_err(|error| unfit(&error))?;
    let layout = header.layout().ok_or(OpenError::NotAPlugin)?;
    // The one who may have more is named second: tables of plugins and of older hosts end earlier than this host's.
    check_layout_compatibility(layout, <M as StableAbi>::LAYOUT)
        .map_err(|errors| OpenError::Layout { difference: condense(&errors.to_string()) })?;
    // SAFETY: the layout was checked above, by abi_stable's rules for tables that grow.
    unsafe { header.init_root_module_with_unchecked_layout::<M>() }.map_err(|error| unfit(&error))
}

/// Takes what a library's symbol points at for a handshake, once its magic, its place and its ABI number say that it is one: only
/// then are all of its fields what their types say. With it comes the minor number of its ABI.
///
/// # Safety
/// Both point into a library that is never closed, or at values that live as long.
unsafe fn accept(
    handshake: *const Handshake,
    needs: Option<*const Needs>,
) -> Result<(&'static Handshake, u32), OpenError> {
    if handshake.is_null() {
        return Err(OpenError::NotAPlugin);
    }
    // SAFETY: bytes of any value and at any place; that so many are mapped, the preflight survived on the same file.
    let magic = unsafe { handshake.cast::<[u8; MAGIC.len()]>().read_unaligned() };
    if magic != MAGIC || !handshake.is_aligned() {
        return Err(OpenError::NotAPlugin);
    }
    // SAFETY: with our magic it has the fields that are frozen for all ABI numbers. Each is read by itself, since what the last
    // one, a reference, leads to is not.
    let (abi_major, panic_aborts, sdk, rustc, header) = unsafe {
        (
            (&raw const (*handshake).abi_major).read(),
            (&raw const (*handshake).panic_aborts).read(),
            (&raw const (*handshake).sdk_version).read(),
            (&raw const (*handshake).rustc_version).read(),
            (&raw const (*handshake).header).cast::<*const LibHeader>().read(),
        )
    };
    let another = |found: String, is_newer: bool| {
        // SAFETY: the magic was checked, and the library is never closed.
        let (sdk, rustc) = unsafe { (sdk.get(), rustc.get()) };
        Err(OpenError::AbiVersion { found, is_newer, sdk: sdk.into(), rustc: rustc.into() })
    };
    if abi_major != ABI_MAJOR {
        return another(abi_major.to_string(), abi_major > ABI_MAJOR);
    }
    // Plugins of this number have said it since it was given out.
    let Some(needs) = needs.filter(|needs| !needs.is_null() && needs.is_aligned()) else {
        return another(format!("{abi_major} as it was before {}", error::number(abi_major, 0)), false);
    };
    // SAFETY: with our major number, what its symbol points at begins with these fields, and they are numbers.
    let Needs { abi_minor, features, .. } = unsafe { needs.read() };
    if abi_minor > ABI_MINOR {
        return another(error::number(abi_major, abi_minor), true);
    }
    let missing = features.missing_in(Features::ALL);
    if !missing.is_empty() {
        return Err(OpenError::Features { missing });
    }
    if panic_aborts != 0 {
        return Err(OpenError::PanicAborts);
    }
    if header.is_null() {
        return Err(OpenError::NotAPlugin);
    }
    // SAFETY: it has our magic and our ABI number, is aligned, and none of its fields is what its type forbids.
    Ok((unsafe { &*handshake }, abi_minor))
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

/// The first mismatch in abi_stable's report: of which type, what was expected, what was found. What it calls expected is the plugin's, since the
/// host is the one that may have more.
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
                brief(&rest[found + 1..]),
                brief(&rest[1..found])
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

/// What plugins are given of this host; their lines go to the first log of the process.
pub(crate) fn host_api(log: &PluginLog) -> HostApiRef {
    static API: OnceLock<HostApiRef> = OnceLock::new();
    LOG.get_or_init(|| *log);
    *API.get_or_init(|| HostApi { features: Features::ALL.0, log: forward }.leak_into_prefix())
}

extern "C" fn forward(
    level: modalkit_abi::LogLevel,
    model: RStr<'_>,
    target: RStr<'_>,
    message: RStr<'_>,
    fields: RStr<'_>,
) {
    if let Some(log) = LOG.get() {
        let level = convert::level(level);
        (log.sink)(level, model.as_str(), target.as_str(), message.as_str(), fields.as_str());
    }
}

#[cfg(test)]
mod tests {
    use modalkit_abi::{
        StaticStr,
        abi_stable::{
            library::{CheckTypeLayout, RootModuleResult},
            prefix_type::PrefixRefTrait,
        },
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
            abi_major: ABI_MAJOR,
            panic_aborts: 0,
            sdk_version: StaticStr::new("7.8.9"),
            rustc_version: StaticStr::new("rustc 1.2.3"),
            header: &HEADER,
        }
    }

    /// A table at some moment of its growth.
    macro_rules! table {
        ($module:ident: $($field:ident)*) => {
            #[allow(dead_code, unreachable_pub, reason = "made by a macro, and never all of it used")]
            mod $module {
                use super::*;

                #[repr(C)]
                #[derive(StableAbi)]
                #[sabi(kind(Prefix(prefix_ref = TableRef)))]
                #[sabi(missing_field(option))]
                pub struct Table {
                    #[sabi(last_prefix_field)]
                    pub first: extern "C" fn() -> u32,
                    $(pub $field: extern "C" fn() -> u32,)*
                }
            }
        };
    }

    table!(short:);
    table!(long: second);
    table!(longer: second third);

    #[test]
    fn a_table_that_ends_earlier_than_the_hosts_fits_and_one_that_ends_later_does_not() {
        let layouts = [short::TableRef::LAYOUT, long::TableRef::LAYOUT, longer::TableRef::LAYOUT];
        for (plugin, of_plugin) in layouts.into_iter().enumerate() {
            for (host, of_host) in layouts.into_iter().enumerate() {
                let checked = check_layout_compatibility(of_plugin, of_host);
                assert_eq!(checked.is_ok(), plugin <= host, "{plugin} in {host}");
            }
        }
    }

    extern "C" fn seven() -> u32 {
        7
    }

    #[test]
    fn what_an_older_table_lacks_is_found_missing() {
        let table = short::Table { first: seven }.leak_into_prefix();
        // SAFETY: the layouts were compared by the test above, as the loader does it.
        let table = longer::TableRef::from_prefix_ref(unsafe { table.to_prefix_ref().cast() });
        assert_eq!(table.first()(), 7);
        assert!(table.second().is_none() && table.third().is_none());
    }

    #[test]
    fn of_a_report_the_first_difference_is_told() {
        let report = "Compared <this>:\n  --- Type Layout ---\n  type:Ref\nTo <other>:\n  type:Ref\n\n0 error(s).\n\n\
                      1 error(s)inside:\n    <other>\n    field_name:0\n    type:PluginModule\n\n\
                      Layout of expected type:\n  type:Other\n\n\
                      Error:too many fields\nExpected:\n    14\nFound:\n    15\n\nError:another\nExpected:\n 1\nFound:\n 2\n";
        assert_eq!(condense(report), "in PluginModule, too many fields: expected 15, found 14");
        assert_eq!(condense("something else\n\n  entirely"), "something else entirely");
    }

    fn text_with(handshake: *const Handshake, needs: Option<Needs>) -> String {
        let needs = needs.as_ref().map(std::ptr::from_ref);
        // SAFETY: whatever it is, it lives as long as this call, and a refused one is kept by nobody.
        unsafe { accept(handshake, needs) }.err().map(|error| error.to_string()).unwrap_or_default()
    }

    fn text(handshake: *const Handshake) -> String {
        text_with(handshake, Some(Needs::of(Features::NONE)))
    }

    #[test]
    fn a_handshake_is_refused_for_what_it_says_before_anything_is_called() {
        let text = |handshake: Handshake| text(&raw const handshake);
        assert_eq!(text(handshake()), "");
        let older = text(Handshake { abi_major: ABI_MAJOR - 1, ..handshake() });
        let said = format!("plugin ABI {} (SDK 7.8.9, rustc 1.2.3)", ABI_MAJOR - 1);
        assert!(older.contains(&said) && older.contains("rebuild it"), "{older}");
        let none = Needs::of(Features::NONE);
        for (newer, needs, number) in [
            (Handshake { abi_major: 99, ..handshake() }, none, "99".to_owned()),
            (
                handshake(),
                Needs { abi_minor: ABI_MINOR + 1, ..none },
                error::number(ABI_MAJOR, ABI_MINOR + 1),
            ),
        ] {
            let newer = text_with(&raw const newer, Some(needs));
            let said =
                format!("plugin ABI {number} (SDK 7.8.9, rustc 1.2.3), and this host takes ABI {ABI_MAJOR}.");
            assert!(newer.contains(&said) && newer.contains("update this host"), "{newer}");
        }
        let plain = handshake();
        let before = text_with(&raw const plain, None);
        assert!(before.contains("plugin ABI 5 as it was before 5.0 (SDK 7.8.9"), "{before}");
        assert!(before.contains("rebuild it"), "{before}");
        let needs = text_with(&raw const plain, Some(Needs::of(Features(1 << 63))));
        assert!(needs.contains("it needs what this host doesn't have: feature 63;"), "{needs}");
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
        let ours = Other(MAGIC, ABI_MAJOR, 0, sdk, rustc, 0);
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
