//! Bindings to the rdma-core of the host that built this: libibverbs and librdmacm, their inline functions included.
//!
//! They are generated from the installed headers. The manual pages describe the items, for example `man ibv_post_send`.
//!
//! Call [`embarcadero_ibv_query_port`] and [`embarcadero_ibv_reg_mr`] instead of the functions with the plain names. For
//! those `verbs.h` has macros, and without the macros fields stay unset.
#![allow(non_camel_case_types, non_snake_case, non_upper_case_globals, unused_imports)]
#![allow(missing_docs, clippy::all, clippy::pedantic)]

#[cfg(bound)]
include!(concat!(env!("OUT_DIR"), "/bindings.rs"));

#[cfg(test)]
mod tests {
    #[test]
    fn the_library_answers() {
        // SAFETY: takes an error number by value and returns a static string.
        let text = unsafe { std::ffi::CStr::from_ptr(super::ibv_wc_status_str(super::IBV_WC_REM_ACCESS_ERR)) };
        assert_eq!(text.to_str(), Ok("remote access error"));
    }
}
