//! Cache control instructions, chosen at run time.
//!
//! Source: Intel 64 and IA-32 Architectures Software Developer's Manual (SDM), volume 2, sections CLFLUSH, CLFLUSHOPT,
//! CLWB, MOVDIR64B, MOVNTDQ, SFENCE and MFENCE. Which fence orders what is in the section of each instruction. AMD64
//! Architecture Programmer's Manual (APM), volume 3, has the same sections.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Method by which lines are written back to the region's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FlushMethod {
    /// Lines are not written back: all brokers run on one host, or the fabric is coherent.
    None,
    /// `clwb` writes the line back and keeps it in the cache.
    Clwb,
    /// `clflushopt` writes the line back and drops it from the cache.
    Clflushopt,
    /// `clflush` writes the line back and drops it, one line at a time. For CPUs that have nothing better.
    Clflush,
    /// `movdir64b` stores whole lines without reading them first; `clflushopt` writes back the rest.
    Movdir64b,
}

impl fmt::Display for FlushMethod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Clwb => "clwb",
            Self::Clflushopt => "clflushopt",
            Self::Clflush => "clflush",
            Self::Movdir64b => "movdir64b",
        })
    }
}

/// Configured flush method that this CPU lacks.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("cxl.flush is {wanted}, but this CPU lacks it; it has {}", present.names())]
pub struct UnsupportedFlush {
    /// Method that was asked for.
    pub wanted: FlushMethod,
    /// Instructions that the CPU has.
    pub present: FlushSupport,
}

/// Cache control instructions that a CPU has. Source of the bits: Intel SDM volume 2, CPUID, leaves 01H and 07H.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct FlushSupport {
    /// `clflush`: CPUID.01H:EDX, bit 19 (CLFSH).
    pub clflush: bool,
    /// `clflushopt`: CPUID.(07H,0):EBX, bit 23.
    pub clflushopt: bool,
    /// `clwb`: CPUID.(07H,0):EBX, bit 24.
    pub clwb: bool,
    /// `movdir64b`: CPUID.(07H,0):ECX, bit 28.
    pub movdir64b: bool,
}

impl FlushSupport {
    /// Asks the CPU which instructions it has. Other processors than x86-64 have none.
    #[must_use]
    pub fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            use core::arch::x86_64::{__cpuid, __cpuid_count};
            let highest = __cpuid(0).eax;
            let leaf1 = __cpuid(1);
            let leaf7 = if highest >= 7 { __cpuid_count(7, 0) } else { __cpuid_count(highest, 0) };
            let seven = highest >= 7;
            Self {
                clflush: leaf1.edx & (1 << 19) != 0,
                clflushopt: seven && leaf7.ebx & (1 << 23) != 0,
                clwb: seven && leaf7.ebx & (1 << 24) != 0,
                movdir64b: seven && leaf7.ecx & (1 << 28) != 0,
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        Self::default()
    }

    /// Returns the names of the instructions, or `none`.
    #[must_use]
    pub fn names(&self) -> String {
        let all = [
            (self.clflush, "clflush"),
            (self.clflushopt, "clflushopt"),
            (self.clwb, "clwb"),
            (self.movdir64b, "movdir64b"),
        ];
        let names: Vec<_> = all.iter().filter(|(has, _)| *has).map(|(_, name)| *name).collect();
        if names.is_empty() { "none".to_owned() } else { names.join(", ") }
    }

    /// Returns the best method for memory that is not coherent, if there is one. `clwb` comes first: it keeps lines
    /// that the writer touches again.
    #[must_use]
    pub fn best(&self) -> Option<FlushMethod> {
        if self.clwb {
            Some(FlushMethod::Clwb)
        } else if self.clflushopt {
            Some(FlushMethod::Clflushopt)
        } else if self.clflush {
            Some(FlushMethod::Clflush)
        } else {
            None
        }
    }

    /// Returns the best method that drops lines, if there is one.
    #[must_use]
    pub(crate) fn dropping(&self) -> Option<FlushMethod> {
        let methods = [(self.clflushopt, FlushMethod::Clflushopt), (self.clflush, FlushMethod::Clflush)];
        methods.into_iter().find_map(|(has, method)| has.then_some(method))
    }

    /// Checks that the CPU has every instruction that `method` needs.
    ///
    /// # Errors
    /// [`UnsupportedFlush`] when one is missing.
    pub fn check(&self, method: FlushMethod) -> Result<(), UnsupportedFlush> {
        let has = match method {
            FlushMethod::None => true,
            FlushMethod::Clwb => self.clwb && self.clflushopt,
            FlushMethod::Clflushopt => self.clflushopt,
            FlushMethod::Clflush => self.clflush,
            FlushMethod::Movdir64b => self.movdir64b && self.clflushopt,
        };
        if has { Ok(()) } else { Err(UnsupportedFlush { wanted: method, present: *self }) }
    }
}

/// Starts the write-back of the line at `line`. `method` must have passed [`FlushSupport::check`].
///
/// # Safety
/// `line` points into mapped memory.
#[inline]
pub(super) unsafe fn write_back(method: FlushMethod, line: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the caller promises mapped memory, and start-up checked that the CPU has the instruction. None of them
    // changes a register or memory as the abstract machine sees it.
    unsafe {
        use core::arch::asm;
        match method {
            FlushMethod::None => {}
            FlushMethod::Clwb => asm!("clwb [{}]", in(reg) line, options(nostack, preserves_flags)),
            FlushMethod::Clflushopt | FlushMethod::Movdir64b => {
                asm!("clflushopt [{}]", in(reg) line, options(nostack, preserves_flags));
            }
            FlushMethod::Clflush => asm!("clflush [{}]", in(reg) line, options(nostack, preserves_flags)),
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (method, line);
}

/// Drops this host's copy of the line at `line`.
///
/// # Safety
/// `line` points into mapped memory.
#[inline]
pub(super) unsafe fn drop_line(method: FlushMethod, line: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: as for `write_back`.
    unsafe {
        use core::arch::asm;
        match method {
            FlushMethod::None => {}
            FlushMethod::Clflush => asm!("clflush [{}]", in(reg) line, options(nostack, preserves_flags)),
            FlushMethod::Clwb | FlushMethod::Clflushopt | FlushMethod::Movdir64b => {
                asm!("clflushopt [{}]", in(reg) line, options(nostack, preserves_flags));
            }
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (method, line);
}

/// Orders earlier flushes and stores before later stores.
///
/// `sfence` orders `clwb` and `clflushopt`. On AMD it does not order `clflush`, which only `mfence` does. Source: AMD64
/// Architecture Programmer's Manual, volume 3, CLFLUSH. Intel's manual says that `clflush` is ordered by any fence.
#[inline]
pub(super) fn store_fence(method: FlushMethod) {
    #[cfg(target_arch = "x86_64")]
    match method {
        FlushMethod::None => {}
        FlushMethod::Clflush => return full_fence(method),
        FlushMethod::Clwb | FlushMethod::Clflushopt | FlushMethod::Movdir64b => {
            // SAFETY: SSE is part of x86_64.
            unsafe { core::arch::x86_64::_mm_sfence() };
            return;
        }
    }
    let _ = method;
    std::sync::atomic::fence(std::sync::atomic::Ordering::Release);
}

/// Orders earlier stores, write-backs and dropped lines before later loads. `mfence` orders `clflushopt`; `lfence` does
/// not.
#[inline]
pub(super) fn full_fence(method: FlushMethod) {
    #[cfg(target_arch = "x86_64")]
    if method != FlushMethod::None {
        // SAFETY: SSE2 is part of x86_64.
        unsafe { core::arch::x86_64::_mm_mfence() };
    }
    let _ = method;
}

/// Writes 64 bytes straight to memory without reading the line first.
///
/// # Safety
/// `to` is mapped and 64-byte aligned, and the CPU has `movdir64b`.
#[inline]
pub(super) unsafe fn direct_store(to: *mut u8, from: &[u64; 8]) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: by the caller; the source is 64 readable bytes.
    unsafe {
        core::arch::asm!("movdir64b {}, [{}]", in(reg) to, in(reg) from.as_ptr(), options(nostack, preserves_flags));
    }
    #[cfg(not(target_arch = "x86_64"))]
    // SAFETY: by the caller.
    unsafe {
        std::ptr::copy_nonoverlapping(from.as_ptr().cast::<u8>(), to, 64);
    }
}

/// Copies whole lines past the caches by `movntdq`; other processors than x86-64 copy through the cache. Later stores
/// may overtake the lines until [`fence_lines`].
///
/// # Safety
/// `to` is mapped for as many lines, 64-byte aligned if there is one, and overlaps no line of `lines`.
pub(super) unsafe fn store_lines(to: *mut u8, lines: &[[u8; 64]]) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: by the caller; SSE2 is part of x86_64.
    unsafe {
        use core::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_stream_si128};
        let mut to = to.cast::<__m128i>();
        for word in lines.as_flattened().as_chunks::<16>().0 {
            _mm_stream_si128(to, _mm_loadu_si128(word.as_ptr().cast()));
            to = to.add(1);
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    // SAFETY: by the caller.
    unsafe {
        std::ptr::copy_nonoverlapping(lines.as_ptr().cast::<u8>(), to, size_of_val(lines));
    }
}

/// Orders lines that were stored past the caches before every later store.
pub fn fence_lines() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: SSE is part of x86_64.
    unsafe {
        core::arch::x86_64::_mm_sfence();
    }
    #[cfg(not(target_arch = "x86_64"))]
    std::sync::atomic::fence(std::sync::atomic::Ordering::Release);
}
