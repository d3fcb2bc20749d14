//! Handles: pointers that only who made them looks behind.

macro_rules! handle {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[repr(transparent)]
        #[derive(::abi_stable::StableAbi, Clone, Copy, Debug, PartialEq, Eq)]
        pub struct $name(*mut ());

        impl $name {
            /// Wraps its maker's pointer.
            #[must_use]
            pub const fn from_raw(raw: *mut ()) -> Self {
                Self(raw)
            }

            /// Its maker's pointer.
            #[must_use]
            pub const fn into_raw(self) -> *mut () {
                self.0
            }
        }
    };
}

pub(crate) use handle;
