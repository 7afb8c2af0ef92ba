//! RDMA devices of the host, through libibverbs over the bindings in `sys/rdma-sys`. The types of the same names one
//! folder up wrap these, and say what they are for.

mod call;
mod completion;
mod device;
mod memory;
mod queue_pair;

pub(crate) use completion::CompletionQueue;
pub(crate) use device::{Context, survey};
pub(crate) use memory::{MemoryRegion, MemoryWindow, ProtectionDomain};
pub(crate) use queue_pair::{Depths, QueuePair, SharedReceiveQueue};
