//! DPDK's environment, which is set up once in a process.
//!
//! The calls are described in DPDK's programmer's guide, "Environment Abstraction Layer".

use dpdk_sys as ffi;
use std::ffi::{CStr, CString};
use std::io;
use std::ptr::null_mut;
use std::sync::{Mutex, PoisonError};

/// Makes an error from DPDK's error number. `what` completes "DPDK cannot ..".
pub(super) fn error_of(number: i32, what: &str) -> io::Error {
    // SAFETY: takes a number, and returns a string of the thread's own that stays until its next call.
    let text = unsafe { CStr::from_ptr(ffi::rte_strerror(number)) }.to_string_lossy().into_owned();
    io::Error::other(format!("DPDK cannot {what}: {text}"))
}

/// Turns the result of a call into an error: a negative one is an error number.
pub(super) fn check(result: i32, what: &str) -> io::Result<()> {
    if result < 0 { Err(error_of(-result, what)) } else { Ok(()) }
}

/// Version of DPDK, in its own words.
pub(crate) fn version() -> String {
    // SAFETY: takes nothing and returns a static string.
    unsafe { CStr::from_ptr(ffi::rte_version()) }.to_string_lossy().into_owned()
}

/// Sets up DPDK for this process, once. Later calls must have the same arguments.
pub(super) fn start(arguments: &[String]) -> io::Result<()> {
    static STARTED: Mutex<Option<Started>> = Mutex::new(None);
    let mut started = STARTED.lock().unwrap_or_else(PoisonError::into_inner);
    let started = started.get_or_insert_with(|| Started { arguments: arguments.to_vec(), result: init(arguments) });
    if started.arguments != arguments {
        return Err(io::Error::other("DPDK was set up with other arguments, and can be only once in a process"));
    }
    started.result.clone().map_err(io::Error::other)
}

/// Arguments that DPDK was set up with, and the result.
struct Started {
    arguments: Vec<String>,
    result: Result<(), String>,
}

/// Sets up DPDK.
fn init(arguments: &[String]) -> Result<(), String> {
    let all = ["embarcadero"].into_iter().chain(arguments.iter().map(String::as_str));
    let all: Vec<CString> = all.map(CString::new).collect::<Result<_, _>>().map_err(|error| error.to_string())?;
    // It pins the thread that calls it, and keeps the strings: hence a thread of its own, and strings that stay.
    let all: &'static [CString] = Vec::leak(all);
    let thread = std::thread::Builder::new().name("dpdk-init".to_owned()).spawn(move || {
        let mut pointers: Vec<_> = all.iter().map(|argument| argument.as_ptr().cast_mut()).collect();
        pointers.push(null_mut());
        // SAFETY: as many strings as stated, with an end, which stay; the call is made once in this process.
        let result = unsafe { ffi::rte_eal_init(all.len() as i32, pointers.as_mut_ptr()) };
        // SAFETY: reads a number of this thread.
        if result < 0 { Err(unsafe { ffi::embarcadero_rte_errno() }) } else { Ok(()) }
    });
    let result = thread.map_err(|error| error.to_string())?.join().map_err(|_| "DPDK ended its thread".to_owned())?;
    result.map_err(|number| format!("{} (arguments: {})", error_of(number, "be set up"), arguments.join(" ")))
}
