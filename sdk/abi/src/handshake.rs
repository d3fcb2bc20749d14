//! The one exported symbol: what a host may read before it trusts anything else in a file.

use abi_stable::library::LibHeader;

/// The number of this boundary. Host and plugin must agree exactly.
pub const ABI_VERSION: u32 = 5;

/// The name under which a plugin exports its [`Handshake`], NUL-terminated for `dlsym`.
pub const HANDSHAKE_SYMBOL: &[u8] = b"modalkit_plugin_handshake\0";

/// The symbol of a byte that is 1 where the plugin was built with debug assertions. Plugins of earlier SDKs don't have it.
pub const DEBUG_ASSERTIONS_SYMBOL: &[u8] = b"modalkit_plugin_debug_assertions\0";

/// The first bytes of every [`Handshake`].
pub const MAGIC: [u8; 16] = *b"modalkit plugin\0";

/// A string that lives in the plugin's read-only data: pointer and length in bytes, always UTF-8.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct StaticStr {
    start: *const u8,
    len: usize,
}

// SAFETY: it points into a `&'static str`, which any thread may read.
unsafe impl Sync for StaticStr {}
// SAFETY: as above.
unsafe impl Send for StaticStr {}

impl StaticStr {
    /// Wraps a string literal.
    #[must_use]
    pub const fn new(text: &'static str) -> Self {
        Self { start: text.as_ptr(), len: text.len() }
    }

    /// The text.
    ///
    /// # Safety
    ///
    /// The value must come from [`StaticStr::new`] in a library that is still mapped and whose [`MAGIC`] was checked.
    #[must_use]
    pub unsafe fn get(&self) -> &'static str {
        // SAFETY: by the caller's promise these are the parts of a `&'static str`.
        unsafe { std::str::from_utf8_unchecked(std::slice::from_raw_parts(self.start, self.len)) }
    }
}

/// What a plugin says of itself before anything of it is called.
///
/// The order and types of these fields are frozen for all ABI versions: new facts go behind `header`.
#[repr(C)]
pub struct Handshake {
    /// [`MAGIC`]; anything else is not a modalkit plugin.
    pub magic: [u8; 16],
    /// The [`ABI_VERSION`] that the plugin was built with.
    pub abi_version: u32,
    /// 1 when the plugin was compiled with `panic = "abort"`, which would take the host down with it.
    pub panic_aborts: u32,
    /// Version of the SDK crate.
    pub sdk_version: StaticStr,
    /// What `rustc --version` printed where the SDK was compiled.
    pub rustc_version: StaticStr,
    /// abi_stable's header: type layouts and the constructor of the [`crate::PluginModuleRef`].
    /// May be read only after `abi_version` was found equal.
    pub header: &'static LibHeader,
}

const _: () = {
    const fn shared_between_threads<T: Sync>() {}
    shared_between_threads::<Handshake>();
};
