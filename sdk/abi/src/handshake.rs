//! The one exported symbol: what a host may read before it trusts anything else in a file.

use abi_stable::library::LibHeader;

/// The major number of this boundary: what an older number of it says, a newer one says otherwise.
pub const ABI_MAJOR: u32 = 5;

/// The minor number: grows with each addition, and starts again at 0 with each [`ABI_MAJOR`]. A host takes plugins whose minor number
/// is at most its own.
pub const ABI_MINOR: u32 = 0;

/// The name under which a plugin exports its [`Handshake`], NUL-terminated for `dlsym`.
pub const HANDSHAKE_SYMBOL: &[u8] = b"modalkit_plugin_handshake\0";

/// The name under which a plugin exports its [`Needs`].
pub const NEEDS_SYMBOL: &[u8] = b"modalkit_plugin_needs\0";

/// The symbol of a byte that is 1 where the plugin was built with debug assertions. Plugins of earlier SDKs don't have it.
pub const DEBUG_ASSERTIONS_SYMBOL: &[u8] = b"modalkit_plugin_debug_assertions\0";

/// The first bytes of every [`Handshake`].
pub const MAGIC: [u8; 16] = *b"modalkit plugin\0";

/// A set of abilities that a host may have or lack, whatever its minor number: bits that are given once and never reused.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features(pub u64);

impl Features {
    /// Each with its bit and its name, which is what people read.
    pub const NAMES: [(Self, &'static str); 0] = [];

    /// What a host of this minor number can have.
    pub const ALL: Self = Self::NONE;

    /// Nothing.
    pub const NONE: Self = Self(0);

    /// Those of `self` that `offered` lacks.
    #[must_use]
    pub const fn missing_in(self, offered: Self) -> Self {
        Self(self.0 & !offered.0)
    }

    /// Whether there is none.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The names of those that have one here, and the numbers of the other bits.
    #[must_use]
    pub fn names(self) -> Vec<String> {
        let bits = (0..u64::BITS).filter(|bit| self.0 & 1 << bit != 0);
        bits.map(|bit| {
            let known = Self::NAMES.iter().find(|(feature, _)| feature.0 == 1 << bit);
            known.map_or_else(|| format!("feature {bit}"), |(_, name)| (*name).to_owned())
        })
        .collect()
    }
}

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
/// The order and types of its fields are frozen for all ABI numbers; new facts go into [`Needs`].
#[repr(C)]
pub struct Handshake {
    /// [`MAGIC`]; anything else is not a modalkit plugin.
    pub magic: [u8; 16],
    /// The [`ABI_MAJOR`] that the plugin was built with.
    pub abi_major: u32,
    /// 1 when the plugin was compiled with `panic = "abort"`, which would take the host down with it.
    pub panic_aborts: u32,
    /// Version of the SDK crate.
    pub sdk_version: StaticStr,
    /// What `rustc --version` printed where the SDK was compiled.
    pub rustc_version: StaticStr,
    /// abi_stable's header: type layouts and the constructor of the [`crate::PluginModuleRef`].
    /// May be read only after `abi_major` was found equal.
    pub header: &'static LibHeader,
}

/// What a plugin needs of a host with its [`ABI_MAJOR`]; behind a symbol of its own, since a [`Handshake`] doesn't say how long it is.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Needs {
    /// Bytes of this struct where the plugin was built: fields that later ones have behind these are read only where they are.
    pub bytes: u32,
    /// The [`ABI_MINOR`] that the plugin was built with.
    pub abi_minor: u32,
    /// The features that it can't do without.
    pub features: Features,
}

impl Needs {
    /// Of a plugin that is built with this crate.
    #[must_use]
    pub const fn of(features: Features) -> Self {
        Self { bytes: size_of::<Self>() as u32, abi_minor: ABI_MINOR, features }
    }
}

const _: () = {
    const fn shared_between_threads<T: Sync>() {}
    shared_between_threads::<Handshake>();
    shared_between_threads::<Needs>();
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_crates_version_has_the_numbers_of_the_boundary() {
        let version = format!("{ABI_MAJOR}.{ABI_MINOR}.");
        assert!(env!("CARGO_PKG_VERSION").starts_with(&version), "expected {version}*");
    }

    #[test]
    fn a_feature_without_a_name_has_its_number() {
        assert_eq!(Features(1 << 63 | 1).missing_in(Features(1)).names(), ["feature 63"]);
    }
}
