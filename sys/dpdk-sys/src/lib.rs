//! Bindings to the DPDK of the host that built this, its inline functions included.
//!
//! They are generated from the installed headers, whose comments describe each item. Functions named `embarcadero_` reach
//! the error number, and fields of a packet buffer in anonymous unions.
#![allow(non_camel_case_types, non_snake_case, non_upper_case_globals, unused_imports)]
#![allow(missing_docs, clippy::all, clippy::pedantic)]

include!(concat!(env!("OUT_DIR"), "/bindings.rs"));

#[cfg(test)]
mod tests {
    #[test]
    fn the_library_answers() {
        // SAFETY: takes nothing and returns a static string.
        let version = unsafe { std::ffi::CStr::from_ptr(super::rte_version()) };
        assert!(version.to_str().unwrap().starts_with("DPDK "), "{version:?}");
    }
}
