//! NUMA nodes of a mapping's pages.
//!
//! CXL memory that the kernel has brought online as system-ram is a NUMA node without cores.

use crate::native::Mapping;
use std::io;
use std::ptr;

/// Nodes in a mask. Source: include/linux/numa.h, `MAX_NUMNODES`, with the largest `NODES_SHIFT` of arch/x86/Kconfig,
/// 10.
const NODES: u32 = 1024;
/// Policy that takes pages from the nodes of the mask only. Source: include/uapi/linux/mempolicy.h.
const MPOL_BIND: libc::c_int = 2;
/// Most pages whose node is looked up.
const LOOKED: u64 = 1 << 16;
/// Bytes of a page. Source: arch/x86/include/asm/page_types.h, `PAGE_SIZE`.
const PAGE_BYTES: u64 = 4096;

impl Mapping {
    /// Makes the kernel take pages that are not allocated yet from `node` only (mbind(2)). The policy belongs to the
    /// file on tmpfs or hugetlbfs, so it holds for every process that maps it. Source:
    /// Documentation/admin-guide/mm/numa_memory_policy.rst, "Shared Policy".
    ///
    /// # Errors
    /// The error of mbind(2), also when the host has no such node.
    pub fn bind(&self, node: u32) -> io::Result<()> {
        let mut mask = [0u64; NODES as usize / 64];
        let word = mask.get_mut(node as usize / 64).ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidInput, format!("NUMA node {node} is more than {}", NODES - 1))
        })?;
        *word = 1 << (node % 64);
        let (base, bytes) = self.pages();
        // SAFETY: the range is the mapping. The kernel reads one bit less than it is told (`get_nodes` in
        // mm/mempolicy.c), so as many as the mask has.
        let failed = unsafe {
            libc::syscall(libc::SYS_mbind, base, bytes, MPOL_BIND, mask.as_ptr(), libc::c_ulong::from(NODES + 1), 0u32)
        };
        if failed == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Looks up the NUMA node of every page, or of at most 65,536 evenly spread ones (move_pages(2)). `None` stands for
    /// a page that is not allocated.
    ///
    /// # Errors
    /// The error of move_pages(2).
    pub fn nodes(&self) -> io::Result<Vec<Option<u32>>> {
        let (base, bytes) = self.pages();
        let step = (bytes as u64).div_ceil(LOOKED).next_multiple_of(PAGE_BYTES) as usize;
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
        // A status below zero is an errno: there is no page.
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
