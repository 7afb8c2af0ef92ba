//! On which NUMA node a mapping's pages lie: CXL memory that the kernel has onlined as system-ram is a node without cores.

use crate::native::Mapping;
use std::io;
use std::ptr;

/// Nodes that a mask has room for: what the kernel has at most (`MAX_NUMNODES`).
const NODES: u32 = 1024;
/// Source: include/uapi/linux/mempolicy.h.
const MPOL_BIND: libc::c_int = 2;
/// Pages that are looked at, at most.
const LOOKED: u64 = 1 << 16;

impl Mapping {
    /// Has pages that are not there yet come from `node` only: those of the file too, for every process (mbind(2)).
    ///
    /// # Errors
    /// What `mbind` reports, for a node that is not there too.
    pub fn bind(&self, node: u32) -> io::Result<()> {
        let mut mask = [0u64; NODES as usize / 64];
        let word = mask.get_mut(node as usize / 64).ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidInput, format!("NUMA node {node} is more than {}", NODES - 1))
        })?;
        *word = 1 << (node % 64);
        let (base, bytes) = self.pages();
        // SAFETY: the range is the mapping; the kernel reads one bit less than it is told, so as many as the mask has.
        let failed = unsafe {
            libc::syscall(libc::SYS_mbind, base, bytes, MPOL_BIND, mask.as_ptr(), libc::c_ulong::from(NODES + 1), 0u32)
        };
        if failed == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// On which node each page is that is there: of all pages, or of 65,536 that are evenly spread (move_pages(2)).
    ///
    /// # Errors
    /// What `move_pages` reports.
    pub fn nodes(&self) -> io::Result<Vec<Option<u32>>> {
        let (base, bytes) = self.pages();
        let step = (bytes as u64).div_ceil(LOOKED).next_multiple_of(4096) as usize;
        let pages: Vec<*mut u8> = (0..bytes).step_by(step).map(|at| base.wrapping_add(at)).collect();
        let mut nodes: Vec<libc::c_int> = vec![0; pages.len()];
        // SAFETY: with no nodes to move to, the call only writes one number for each page, for which there is room.
        let failed = unsafe {
            libc::syscall(
                libc::SYS_move_pages,
                0,
                pages.len(),
                pages.as_ptr(),
                ptr::null::<libc::c_int>(),
                nodes.as_mut_ptr(),
                0,
            )
        };
        if failed != 0 {
            return Err(io::Error::last_os_error());
        }
        // Below zero: no page there.
        Ok(nodes.into_iter().map(|node| u32::try_from(node).ok()).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bound_pages_are_where_they_should_be() {
        let mapping = Mapping::anonymous(64 << 12).unwrap();
        mapping.bind(0).unwrap();
        assert_eq!(mapping.nodes().unwrap(), [None; 64]);
        mapping.prefault().unwrap();
        assert_eq!(mapping.nodes().unwrap(), [Some(0); 64]);
        assert!(mapping.bind(NODES).is_err());
        assert!(mapping.bind(NODES - 1).is_err(), "no host has that many nodes");
    }
}
