//! Binds a C library of the host that builds: finds it with pkg-config, generates Rust with bindgen, and compiles its
//! inline functions.
#![forbid(unsafe_code)]

use std::env;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

/// A library that is to be bound. Its header is `wrapper.h` beside the build script.
pub struct Library<'a> {
    /// Names for pkg-config, the main one first.
    pub names: &'a [&'a str],
    /// Least version of the main one.
    pub version: &'a str,
    /// Flags for clang and the C compiler.
    pub flags: &'a [&'a str],
    /// Packages to install, as a sentence goes on after "install".
    pub packages: &'a str,
}

/// Says why a library is not bound, and what to install.
#[derive(Debug)]
pub struct Missing(pub String);

impl Library<'_> {
    fn missing(&self, what: &str) -> Missing {
        Missing(format!("{what} is missing: install {}", self.packages))
    }

    /// Binds the library: `bindings.rs` lies in `OUT_DIR` afterwards, and the inline functions are linked. `choose` names
    /// what is bound.
    ///
    /// # Errors
    /// [`Missing`]; nothing is linked then.
    pub fn bind(&self, choose: impl FnOnce(bindgen::Builder) -> bindgen::Builder) -> Result<(), Missing> {
        println!("cargo::rerun-if-changed=wrapper.h");
        for variable in ["PKG_CONFIG_PATH", "PKG_CONFIG_LIBDIR", "LIBCLANG_PATH", "BINDGEN_EXTRA_CLANG_ARGS"] {
            println!("cargo::rerun-if-env-changed={variable}");
        }
        let mut includes = Vec::new();
        for (index, name) in self.names.iter().enumerate() {
            let mut config = pkg_config::Config::new();
            // Linked once all is found.
            config.statik(false).cargo_metadata(false);
            if index == 0 {
                config.atleast_version(self.version);
            }
            let found = config.probe(name).map_err(|_| self.missing(&format!("{name}, {} or later,", self.version)))?;
            includes.extend(found.include_paths);
        }
        let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default());
        let inlines = out.join("inlines");
        let builder = bindgen::Builder::default()
            .header("wrapper.h")
            .clang_args(includes.iter().map(|path| format!("-I{}", path.display())))
            .clang_args(self.flags)
            .default_enum_style(bindgen::EnumVariation::Consts)
            .prepend_enum_name(false)
            .wrap_static_fns(true)
            .wrap_static_fns_path(&inlines)
            .wrap_static_fns_suffix("__inline");
        let builder = choose(builder);
        // Without libclang bindgen panics.
        std::panic::set_hook(Box::new(|_| {}));
        let generated = catch_unwind(AssertUnwindSafe(move || builder.generate()));
        let _ = std::panic::take_hook();
        let bindings = match generated {
            Ok(Ok(bindings)) => bindings,
            Ok(Err(error)) => return Err(self.missing(&format!("a header ({error})"))),
            Err(_) => return Err(self.missing("libclang")),
        };
        bindings.write_to_file(out.join("bindings.rs")).map_err(|error| Missing(format!("cannot write: {error}")))?;
        let mut library = cc::Build::new();
        library.file(inlines.with_extension("c")).includes(&includes).warnings(false);
        library.include(env::var_os("CARGO_MANIFEST_DIR").as_deref().map_or(Path::new("."), Path::new));
        self.flags.iter().for_each(|flag| {
            library.flag(flag);
        });
        library.compile(&format!("{}_inlines", self.names[0]));
        for name in self.names {
            let linked = pkg_config::Config::new().statik(false).probe(name);
            linked.map_err(|error| Missing(error.to_string()))?;
        }
        Ok(())
    }
}
