//! Fuzzes the tables of a region: any bytes are refused as a superblock, or its tables are read without a panic.
#![no_main]

use embarcadero_broker::mirror;
use embarcadero_cxl::{Fabric, Mapping, Native, Region, RegionOffset};
use embarcadero_cxl::broker_table::read_broker;
use embarcadero_cxl::cache::FlushMethod;
use embarcadero_cxl::leadership::read_leader;
use embarcadero_cxl::session_table::read_session;
use embarcadero_cxl::topic_table::live_topics;
use embarcadero_wire::{BrokerId, SessionSlot};
use libfuzzer_sys::fuzz_target;
use std::cell::OnceCell;

thread_local! {
    static MEMORY: OnceCell<Native> = const { OnceCell::new() };
}

fuzz_target!(|bytes: &[u8]| {
    MEMORY.with(|memory| {
        let memory = memory.get_or_init(|| {
            let mapping = Mapping::anonymous(256 << 20).expect("anonymous memory");
            Native::new(mapping, FlushMethod::None).expect("no flush is always there")
        });
        let bytes = &bytes[..bytes.len().min(1 << 20)];
        memory.write_bytes(RegionOffset(0), bytes);
        if let Ok(region) = Region::open(memory.clone()) {
            let _ = mirror::read(&region);
            let _ = (live_topics(&region), read_leader(&region));
            let _ = (read_broker(&region, BrokerId(0)), read_session(&region, SessionSlot(0)));
        }
    });
});
