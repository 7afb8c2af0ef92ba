//! Enumerations that travel, or lie in shared memory and in files, as numbers.

/// Defines an enumeration whose variants have fixed numbers: `code` and `from_code` convert, `ALL` lists the variants,
/// and `DIGEST` changes with every name and number.
#[macro_export]
macro_rules! codes {
    ($($(#[$meta:meta])* pub enum $name:ident: $number:ident {
        $($(#[$variant_meta:meta])* $variant:ident = $code:literal),* $(,)?
    })*) => {$(
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr($number)]
        pub enum $name { $($(#[$variant_meta])* $variant = $code),* }

        impl $name {
            /// Every variant.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// Digest of the names and numbers.
            pub const DIGEST: u64 = {
                let mut digest = $crate::digest($crate::DIGEST_SEED, stringify!($name), size_of::<$number>() as u64);
                $(digest = $crate::digest(digest, stringify!($variant), $code);)*
                digest
            };

            /// Number of the variant.
            #[inline]
            #[must_use]
            pub const fn code(self) -> $number {
                self as $number
            }

            /// Variant of a number; `None` for a number that has none.
            #[inline]
            #[must_use]
            pub const fn from_code(code: $number) -> Option<Self> {
                match code {
                    $($code => Some(Self::$variant),)*
                    _ => None,
                }
            }
        }
    )*};
}
