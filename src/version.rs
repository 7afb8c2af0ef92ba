//! Version of this build, and the libraries and transports that it has.

use embarcadero_verbs::{has_dpdk, rdma_missing};

/// Version of the package, as in `0.1.0`.
const VERSION: &str = env!("CARGO_PKG_VERSION");
/// Commit of the sources, 12 hexadecimal digits; `unknown` if they were no Git checkout.
pub const COMMIT: &str = env!("EMBARCADERO_COMMIT");

/// Prints the version; if `verbose`, also commit, target, native libraries and transports.
pub fn print(verbose: bool) {
    println!("embarcadero {VERSION}");
    if verbose {
        println!("commit {COMMIT}");
        println!("target {} ({})", env!("EMBARCADERO_TARGET"), env!("EMBARCADERO_PROFILE"));
        println!("native libraries at build time: {}", env!("EMBARCADERO_LIBRARIES"));
        let mut transports = vec!["tcp".to_owned(), "roce".to_owned()];
        transports.push(rdma_missing().map_or("verbs".to_owned(), |why| format!("no verbs ({why})")));
        transports.push(if has_dpdk() { "dpdk" } else { "no dpdk (built without cargo feature dpdk)" }.to_owned());
        println!("transports: {}", transports.join("; "));
    }
}
