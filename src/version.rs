//! What this build was made from.

/// Version of the package.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
/// Commit that it was built from, 12 hexadecimal digits; `unknown` outside a checkout.
pub const COMMIT: &str = env!("EMBARCADERO_COMMIT");

/// Prints the version; if `verbose`, also commit, target and native libraries.
pub fn print(verbose: bool) {
    println!("embarcadero {VERSION}");
    if verbose {
        println!("commit {COMMIT}");
        println!("target {} ({})", env!("EMBARCADERO_TARGET"), env!("EMBARCADERO_PROFILE"));
        println!("native libraries at build time: {}", env!("EMBARCADERO_LIBRARIES"));
        println!(
            "transports: {}",
            if cfg!(feature = "rdma") { "tcp, verbs, roce" } else { "tcp, roce (built without feature rdma)" }
        );
    }
}
